"""That the benchmarks count right: bars, chances and who takes the processor."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench.__main__ import BENCHES, parser
from tests.bench.measure import Measure, Others, percentile
from tests.bench.shuffle import chi_square_p, p_of_even


def test_the_median_is_held_against_the_bar() -> None:
    values = (0.5, 0.8, 3.0)
    assert Measure(name="a", values=values, at_least=0.8).ok
    assert not Measure(name="a", values=values, at_least=0.81).ok
    assert not Measure(name="a", values=values, at_most=0.79).ok
    assert "SHORT" in str(Measure(name="a", values=values, at_most=0.79))
    assert str(Measure(name="a", values=values)).endswith("(0.5 to 3, n=3)")


@pytest.mark.parametrize(
    ("value", "freedom", "p"),
    [(16.92, 9, 0.05), (21.67, 9, 0.01), (27.88, 9, 0.001), (124.34, 100, 0.05), (77.93, 100, 0.95)],
)
def test_chances_are_those_of_the_printed_tables(value: float, freedom: int, p: float) -> None:
    assert chi_square_p(value, freedom) == pytest.approx(p, rel=0.1)


def test_counts_that_lean_to_one_side_are_found_out() -> None:
    even = np.full((4, 8), 100.0)
    assert p_of_even(even) > 0.99
    even[0, 0], even[0, 1] = 160, 40
    assert p_of_even(even) < 1e-3


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_shares_of_the_processor_are_shares() -> None:
    others = Others()
    sum(range(100_000))
    assert 0 <= others.share() <= 1


def test_each_benchmark_has_a_name_on_the_command_line() -> None:
    assert parser().parse_args(["all"]).names == ["all"]
    assert parser().parse_args(list(BENCHES)).names == list(BENCHES)
