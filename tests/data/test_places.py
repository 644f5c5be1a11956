"""What places promise: a sample is had where all of its places are, and parts share none, as counted one by one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.data.framing import Frame
from streamtrain.data.places import lying, parted, places_in_all

quick = settings(deadline=None, max_examples=40)


@st.composite
def frames(draw: st.DrawFn) -> list[Frame]:
    """Frames of one or two stores, over one or two axes."""
    axes = draw(st.integers(1, 2))
    span, stride, jitter = (
        tuple(draw(st.integers(low, high)) for _ in range(axes)) for low, high in ((1, 4), (1, 3), (0, 2))
    )
    made = []
    for _ in range(draw(st.integers(1, 2))):
        places = tuple(draw(st.integers(s, 14)) for s in span)
        shape = tuple((n - s) // step + 1 for n, s, step in zip(places, span, stride, strict=True))
        cell = tuple(draw(st.integers(1, n)) for n in shape)
        kept = tuple(draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n).map(np.array)) for n in places)
        made.append(Frame(shape, cell, [], stride, span, places, jitter, kept))
    return made


def covered(frame: Frame, axis: int, number: int) -> set[int]:
    """The places that a sample may cover along an axis."""
    start = number * frame.strides[axis]
    stop = start + frame.spans[axis]
    for place in range(stop, min(stop + frame.jitters[axis], frame.places[axis])):
        if not {*range(start, place + 1)} <= left(frame, axis):
            break
        stop = place + 1
    return set(range(start, stop))


def left(frame: Frame, axis: int) -> set[int]:
    kept = frame.kept[axis]
    return set(range(frame.places[axis])) if kept is None else {*np.flatnonzero(kept).tolist()}


def whole(frame: Frame, sample: tuple[int, ...], first: set[int]) -> bool:
    """Whether a sample lies in these places of the first axis, and in what is left of the others."""
    parts = [first, *(left(frame, axis) for axis in range(1, len(sample)))]
    return all(covered(frame, axis, n) <= part for axis, (n, part) in enumerate(zip(sample, parts, strict=True)))


@quick
@given(frames())
def test_a_sample_is_had_where_all_its_places_are_left(made: list[Frame]) -> None:
    expected = [
        whole(frame, sample, left(frame, 0))
        for frame in made
        for sample in itertools.product(*map(range, frame.sample_shape))
    ]
    found = lying(made)
    assert (found is None and all(expected)) or (found is not None and found.tolist() == expected)


@quick
@given(frames(), st.sampled_from(["range", "chunk"]), st.integers(0, 3), st.lists(st.integers(0, 28), max_size=3))
def test_parts_are_of_all_places_and_share_none(made: list[Frame], by: Any, seed: int, cuts: list[int]) -> None:
    total = places_in_all(made)
    bounds = sorted({0, total, *(min(cut, total) for cut in cuts)})
    seen: list[tuple[int, int]] = []
    for lower, upper in itertools.pairwise(bounds):
        mine, cut = parted(made, lower, upper, by, seed)
        assert cut >= 0
        flat = iter(mine.tolist())
        part: set[tuple[int, int]] = set()
        for number, frame in enumerate(made):
            for sample in itertools.product(*map(range, frame.sample_shape)):
                if next(flat):
                    assert whole(frame, sample, left(frame, 0))
                    part |= {(number, place) for place in covered(frame, 0, sample[0])}
        assert len(part) <= upper - lower
        seen += part
    assert len(set(seen)) == len(seen)


@quick
@given(frames(), st.sampled_from(["range", "chunk"]))
def test_all_in_one_part_are_those_that_are_left(made: list[Frame], by: Any) -> None:
    mine, cut = parted(made, 0, places_in_all(made), by, 1)
    found = lying(made)
    assert mine.all() if found is None else (mine == found).all()
    assert cut == 0 or found is not None
