"""What a bounded series promises: any number of values in so many points, whose means are those of the values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.callbacks.series import Series


@given(st.lists(st.integers(-1000, 1000), max_size=300), st.integers(2, 20))
def test_points_are_means_of_equally_many_neighbours(values: list[int], most: int) -> None:
    series = Series(most)
    for place, value in enumerate(values):
        series.add(place, value)
    places, means = series.points
    assert len(means) <= most + 1
    each = int(places[0]) + 1 if places else 1
    parts = [values[begin : begin + each] for begin in range(0, len(values), each)]
    assert means == pytest.approx([sum(part) / len(part) for part in parts])
    assert list(places) == [min((number + 1) * each, len(values)) - 1 for number in range(len(parts))]


def test_what_is_not_finite_is_a_gap() -> None:
    series = Series()
    for value in (1.0, math.inf, 2.0):
        series.add(0, value)
    assert [math.isnan(value) for value in series.points[1]] == [False, True, False]
