"""What joining requests promises: all that is wanted, none too large, as many at once as the formula says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.data.spans import MAX_REQUESTS, MIN_REQUESTS, coalesce, requests_at_once

EXTENTS = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(1, 60)).map(lambda at: (at[0], at[0] + at[1])), max_size=30
)


@given(EXTENTS, st.integers(0, 50), st.integers(1, 200))
def test_spans_cover_what_is_wanted_once_within_their_limits(
    wanted: list[tuple[int, int]], gap: int, most: int
) -> None:
    spans = coalesce([(start, stop, number) for number, (start, stop) in enumerate(wanted)], gap=gap, most=most)
    members = [member for span in spans for member in span.members]
    assert sorted(number for *_, number in members) == list(range(len(wanted)))
    assert all(wanted[number] == (start, stop) for start, stop, number in members)
    for span in spans:
        assert span.start == min(start for start, *_ in span.members)
        assert span.stop == max(stop for _, stop, _ in span.members)
        assert len(span.members) == 1 or span.stop - span.start <= most
        reached = span.start
        for start, stop, _ in span.members:
            assert start - reached <= gap
            reached = max(reached, stop)
    assert [span.start for span in spans] == sorted(span.start for span in spans)


def test_neighbours_share_a_request_and_others_do_not() -> None:
    spans = coalesce([(100, 110, "b"), (0, 10, "a"), (115, 120, "c")], gap=5, most=100)
    assert [(span.start, span.stop) for span in spans] == [(0, 10), (100, 120)]
    assert [(span.start, span.stop) for span in coalesce([(0, 60, "a"), (60, 120, "b")], gap=5, most=100)] == [
        (0, 60),
        (60, 120),
    ]


MIB = 1 << 20


@pytest.mark.parametrize(
    ("seconds", "answers", "request_bytes", "threads", "memory", "expected"),
    [
        (0.02, 0.0, MIB, 2, 1 << 30, MIN_REQUESTS),  # nothing is known yet
        (0.02, 400.0, MIB, 2, 1 << 30, 34),  # what the store gives: 4 * 400 * 0.02 + 2
        (0.02, 5000.0, MIB, 2, 1 << 30, 43),  # what two threads use up: 2 GiB/s * 0.02 s / 1 MiB + 2
        (0.1, 5000.0, MIB, 2, 64 * MIB, 18),  # a quarter of the memory
        (0.1, 9000.0, 1 << 16, 2, 1 << 30, MAX_REQUESTS),
        (0.001, 9000.0, 64 * MIB, 8, 1 << 30, MIN_REQUESTS),
    ],
)
def test_the_number_of_requests_follows_the_formula(
    seconds: float, answers: float, request_bytes: float, threads: int, memory: int, expected: int
) -> None:
    assert expected == requests_at_once(
        seconds=seconds, answers=answers, request_bytes=request_bytes, threads=threads, memory=memory
    )
