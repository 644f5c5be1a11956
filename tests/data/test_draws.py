"""What the draws of a mix promise: arithmetic, by the weights, and lengths that are counted right."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.data.draws import Draws
from streamtrain.errors import ConfigError, UserCodeError


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6), st.integers(0, 1000))
def test_frequencies_are_the_weights_by_chi_square(weights: list[float], seed: int) -> None:
    drawn, count = Draws(len(weights), weights, seed), 4000
    seen = [0] * len(weights)
    for i in range(count):
        seen[drawn.source(i)] += 1
    expected = [count * weight / sum(weights) for weight in weights]
    chi = sum((n - e) ** 2 / e for n, e in zip(seen, expected, strict=True))
    freedom = len(weights) - 1
    assert chi < freedom + 6 * math.sqrt(2 * freedom) + 12, (seen, expected)  # about 1e-6 in each example


@given(st.integers(0, 50), st.integers(0, 200))
def test_a_draw_depends_on_seed_weights_and_i_alone(seed: int, i: int) -> None:
    one, other = Draws(3, [1, 2, 3], seed), Draws(3, [1, 2, 3], seed)
    for before in range(i):
        one.source(before)
    assert one.source(i) == other.source(i)


def test_another_seed_draws_otherwise() -> None:
    assert [Draws(2, None, 0).source(i) for i in range(64)] != [Draws(2, None, 1).source(i) for i in range(64)]


def test_a_weight_of_zero_is_never_drawn() -> None:
    assert {Draws(3, [0, 1, 0], 5).source(i) for i in range(500)} == {1}


def test_weights_change_at_their_step_and_not_before() -> None:
    drawn, before = Draws(2, [1, 1], 0), Draws(2, [1, 1], 0)
    drawn.change(50, [0, 1])
    drawn.change(90, [1, 0])
    assert [drawn.source(i) for i in range(50)] == [before.source(i) for i in range(50)]
    assert {drawn.source(i) for i in range(50, 90)} == {1}
    assert {drawn.source(i) for i in range(90, 120)} == {0}
    again = Draws(2, [1, 1], 0)
    again.restore(drawn.changes)
    assert [again.source(i) for i in range(120)] == [drawn.source(i) for i in range(120)]


def test_a_function_gives_weights_until_they_are_set() -> None:
    drawn = Draws(2, lambda i: [1, 0] if i < 30 else [0, 1], 0)
    assert [drawn.source(i) for i in range(60)] == [0] * 30 + [1] * 30
    drawn.change(40, [1, 0])
    assert [drawn.source(i) for i in range(60)] == [0] * 30 + [1] * 10 + [0] * 20


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [0, 0], [1, -1], [1, float("nan")], [1, float("inf")], "ab", 3])
def test_what_can_not_be_weights_is_refused(weights: object) -> None:
    with pytest.raises(ConfigError):
        Draws(2, weights, 0)  # type: ignore[arg-type]


def test_a_function_of_weights_that_fails_is_named() -> None:
    with pytest.raises(UserCodeError, match=r"weights\(7\) raised ZeroDivisionError"):
        Draws(2, lambda i: 1 // 0, 0).source(7)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_lengths_are_those_of_a_walk(lengths: list[int], every: bool, seed: int) -> None:
    drawn = Draws(len(lengths), None, seed)
    left, through, i = list(lengths), set[int](), 0
    while True:
        number = drawn.source(i)
        if not left[number]:
            through.add(number)
            if not every or len(through) == len(lengths):
                break
            left[number] = lengths[number]
        left[number] -= 1
        i += 1
    assert drawn.length(lengths, every=every) == i
