"""Which source gives batch i of a mix: a keyed function of seed, weights and i. Pure.

Its law: a draw depends on nothing that was drawn before, so that a mix is exact from any i.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from streamtrain.data.permutation import derive_key
from streamtrain.errors import ConfigError, UserCodeError

Weights = Sequence[float] | Callable[[int], Sequence[float]]
"""One number a source, or a function of i that gives them."""
_MASK = (1 << 64) - 1


def shares(weights: Any, count: int) -> list[float]:
    """Cumulated shares, the last exactly 1. Raises ConfigError for what can't be weights of `count` sources."""
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise ConfigError(f"weights must be {count} numbers, not {weights!r:.80}") from None
    if len(numbers) != count:
        raise ConfigError(f"{len(numbers)} weights for {count} sources: {numbers}", hint="give one for each source")
    if not all(0 <= number < math.inf for number in numbers) or not sum(numbers) > 0:
        raise ConfigError(f"weights must be finite, not negative and not all 0, got {numbers}")
    last = max(number for number, weight in enumerate(numbers) if weight)
    total = sum(numbers)
    return [1.0 if number >= last else upto / total for number, upto in enumerate(accumulate(numbers))]


class Draws:
    """The source of each batch; weights may change at given steps."""

    def __init__(self, count: int, weights: Weights | None, seed: int) -> None:
        self.count = count
        self._key = derive_key(seed, "mix")
        self._fn = weights if callable(weights) else None
        first = [1.0] * count if weights is None else [] if callable(weights) else weights
        self.changes: list[tuple[int, list[float]]] = []
        """From which draw on which weights, in order; part of the position."""
        self._shares: list[list[float]] = []
        if self._fn is None:
            self.restore([(0, first)])

    @property
    def fixed(self) -> bool:
        """Whether the weights never change."""
        return self._fn is None and len(self.changes) == 1

    def restore(self, changes: Sequence[tuple[int, Sequence[float]]]) -> None:
        """Take on a list of changes. Raises ConfigError."""
        self._shares = [shares(weights, self.count) for _, weights in changes]
        self.changes = [(int(step), [float(weight) for weight in weights]) for step, weights in changes]

    def change(self, step: int, weights: Sequence[float]) -> None:
        """Other weights from draw `step` on; later changes that were made before are forgotten."""
        kept = [(at, before) for at, before in self.changes if at < step]
        self.restore([*kept, (step, weights)])

    def source(self, i: int) -> int:
        """The number of the source that gives batch i."""
        x = (self._key + (i + 1) * 0x9E3779B97F4A7C15) & _MASK  # SplitMix64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return bisect_right(self.cumulated(i), ((x ^ (x >> 31)) >> 11) * 2.0**-53)

    def cumulated(self, i: int) -> list[float]:
        """Cumulated shares at draw i."""
        if self._fn is not None and not (self.changes and i >= self.changes[0][0]):
            try:
                weights = self._fn(i)
            except Exception as error:
                raise UserCodeError(f"weights({i}) raised {type(error).__name__}: {error}") from error
            return shares(weights, self.count)
        return self._shares[bisect_right(self.changes, i, key=lambda change: change[0]) - 1]

    def ever(self, number: int) -> bool:
        """Whether this source can be drawn at some time."""
        return self._fn is not None or any(weights[number] for _, weights in self.changes)

    def length(self, lengths: Sequence[int], *, every: bool) -> int:
        """Draws until one falls on a source that has given all of its batches: the first, or (`every`) the last one."""
        left = {number: length for number, length in enumerate(lengths) if self.ever(number)}
        i = 0
        while True:
            number = self.source(i)
            if number in left:
                left[number] -= 1
                if left[number] < 0:
                    del left[number]
                    if not (every and left):
                        return i
            i += 1
