"""Final weights are those of a bare torch loop, to the bit: each optimizer and schedule, in pairs with all else.

Each optimizer with each schedule: `python -m tests.bench equal`.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.optimizers import NAMES
from streamtrain.schedules import NAMED
from tests.bench.covering import Case, covering, pairs_of
from tests.bench.equal import cases, differing_tensors
from tests.bench.recipes import OPTIMIZERS, SCHEDULERS


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_a_covering_array_has_every_pair(sizes: list[int]) -> None:
    factors = {f"f{number}": [str(value) for value in range(size)] for number, size in enumerate(sizes)}
    made = covering(factors)
    covered = set().union(*(pairs_of(case) for case in made))
    wanted = {
        frozenset(((one, a), (other, b)))
        for one, other in itertools.combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
    }
    assert covered >= wanted
    assert len(made) <= len(wanted)


def test_every_optimizer_and_every_schedule_has_its_bare_loop() -> None:
    assert set(OPTIMIZERS) == set(NAMES)
    assert set(SCHEDULERS) >= set(NAMED)
    assert len(cases()) >= len(OPTIMIZERS) * len(SCHEDULERS)


@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: "-".join(case.values()))
async def test_weights_are_the_bare_loops(case: Case) -> None:
    assert await differing_tensors(case) == []
