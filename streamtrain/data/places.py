"""Places along sample axes that are kept, and the samples that lie whole in them. Pure.

Its law: a sample of many places is had only where all of its places are, whatever it looks ahead to and may be shifted
by included; so it never crosses what was cut out, nor lies in two parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.crops import run_ends
from streamtrain.data.framing import Frame
from streamtrain.data.permutation import Ints, Permutation, derive_key
from streamtrain.data.splits import SplitBy

Mask = NDArray[np.bool_]


def lying(frames: Sequence[Frame]) -> Mask | None:
    """For each sample of all stores whether its places are kept; None where all are."""
    if all(kept is None for frame in frames for kept in frame.kept):
        return None
    return np.concatenate(
        [_samples(frame, [_whole(frame, k, kept) for k, kept in enumerate(frame.kept)]) for frame in frames]
    )


def parted(frames: Sequence[Frame], lower: int, upper: int, by: SplitBy, seed: int) -> tuple[Mask, int]:
    """For each sample whether it lies whole in a part of the kept places along the first axis, and how many lie in it
    but not whole. The places are taken in a row, or ("chunk") those of cells in an order keyed by `seed`.
    """
    firsts = [_kept(frame) for frame in frames]
    starts = [0, *itertools.accumulate(frame.places[0] for frame in frames)]
    places = np.concatenate([np.flatnonzero(mask) + start for mask, start in zip(firsts, starts, strict=False)])
    if by == "chunk":
        places = places[np.argsort(_turns(frames, seed)[places], kind="stable")]
    part = np.zeros(starts[-1], dtype=bool)
    part[places[lower:upper]] = True
    whole, touching = [], 0
    for frame, start, stop in zip(frames, starts, starts[1:], strict=False):
        mine = part[start:stop]
        others = [_whole(frame, k, kept) for k, kept in enumerate(frame.kept)][1:]
        whole.append(_samples(frame, [_whole(frame, 0, mine), *others]))
        touching += int(np.count_nonzero(_samples(frame, [_touching(frame, mine), *others])))
    found = np.concatenate(whole)
    return found, touching - int(np.count_nonzero(found))


def places_in_all(frames: Sequence[Frame]) -> int:
    """Kept places along the first sample axis."""
    return sum(int(np.count_nonzero(_kept(frame))) for frame in frames)


def _kept(frame: Frame) -> Mask:
    kept = frame.kept[0]
    return np.ones(frame.places[0], dtype=bool) if kept is None else kept


def _turns(frames: Sequence[Frame], seed: int) -> Ints:
    """For each place the turn of its cell."""
    cells, count = [], 0
    for frame in frames:
        last = -(-frame.sample_shape[0] // frame.cell[0]) - 1
        mine = np.minimum(np.arange(frame.places[0]) // (frame.cell[0] * frame.strides[0]), last)
        cells.append(mine + count)
        count += last + 1
    return Permutation(count, derive_key(seed, "split")).inverse(np.concatenate(cells).astype(np.int64))


def _counts(frame: Frame, axis: int, mask: Mask) -> tuple[Ints, Ints]:
    """Of the places that each sample covers along an axis, how many there are, and how many in the mask."""
    before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(mask)])
    start = np.arange(frame.sample_shape[axis], dtype=np.int64) * frame.strides[axis]
    whole = start + frame.spans[axis]
    stop = np.minimum(whole + frame.jitters[axis], frame.places[axis])
    kept = frame.kept[axis]
    if kept is not None:  # beyond the run in which it begins none is shifted
        stop = np.minimum(stop, np.maximum(run_ends(kept)[start], whole))
    return stop - start, before[stop] - before[start]


def _whole(frame: Frame, axis: int, mask: Mask | None) -> Mask:
    if mask is None:
        return np.ones(frame.sample_shape[axis], dtype=bool)
    places, inside = _counts(frame, axis, mask)
    return np.asarray(places == inside)


def _touching(frame: Frame, mask: Mask) -> Mask:
    return np.asarray(_counts(frame, 0, mask)[1] > 0)


def _samples(frame: Frame, along: Sequence[Mask]) -> Mask:
    """Each sample, of what holds along each axis."""
    found = along[0]
    for other in along[1:]:
        found = found[..., None] & other
    return np.broadcast_to(found, frame.sample_shape).reshape(-1)
