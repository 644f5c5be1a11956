"""A covering array: few combinations in which each pair of values of two factors comes at least once.

Greedy, after Cohen et al. 1997 (AETG): most faults need no more than two factors to show.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence

Case = dict[str, str]


def pairs_of(case: Mapping[str, str]) -> set[frozenset[tuple[str, str]]]:
    """The pairs of factors' values that a case covers."""
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


def covering(factors: Mapping[str, Sequence[str]], *, apart: Collection[frozenset[str]] = ()) -> list[Case]:
    """Cases that cover all pairs of values, but for those of factors that are kept `apart`; the same each time."""
    left = [
        {one: a, other: b}
        for one, other in itertools.combinations(factors, 2)
        if frozenset((one, other)) not in apart
        for a in factors[one]
        for b in factors[other]
    ]
    open_pairs = {frozenset(pair.items()) for pair in left}
    used = {(factor, value): 0 for factor in factors for value in factors[factor]}
    cases: list[Case] = []
    for seed in left:
        if frozenset(seed.items()) not in open_pairs:
            continue
        case = dict(seed)
        for factor in factors:
            if factor not in case:
                worth = functools.partial(_worth, case, factor, open_pairs, used)
                case[factor] = max(factors[factor], key=worth)
        cases.append({factor: case[factor] for factor in factors})
        open_pairs -= pairs_of(case)
        for item in case.items():
            used[item] += 1
    return cases


def _worth(
    case: Case,
    factor: str,
    open_pairs: set[frozenset[tuple[str, str]]],
    used: Mapping[tuple[str, str], int],
    value: str,
) -> tuple[int, int]:
    """Open pairs that a value would cover; of equal ones the rarest."""
    new = sum(frozenset(((factor, value), item)) in open_pairs for item in case.items())
    return new, -used[factor, value]
