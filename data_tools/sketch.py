"""Quantiles of a stream of numbers in bounded memory: a sketch that is exact while it is small, and can be merged.

Its law: the rank of an answer is off by at most `error` of the count, always (no probability in it). Manku,
Rajagopalan and Lindsay 1998, "Approximate medians and other quantiles in one pass and with limited memory": sorted
buffers of equal weight; two full ones become one of twice the weight by keeping every other number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


class Sketch:
    """Of one series of finite numbers. Memory: at most `size` numbers of 8 bytes for each doubling of count / size."""

    def __init__(self, size: int = 4096) -> None:
        assert size >= 2
        self.size = size
        self.count = 0
        self._fresh: list[Numbers] = []
        self._waiting = 0
        self._levels: list[Numbers | None] = []
        """At level h none, or one sorted buffer of `size` numbers that stand for 2^h each."""
        self._lost = 0
        """The most that a rank can be off: each halving at level h adds 2^h."""
        self._odd = 0

    @property
    def error(self) -> float:
        """By how much of the count the rank of an answer can be off at most; 0 while nothing was merged."""
        return self._lost / self.count if self.count else 0.0

    def add(self, values: Numbers) -> None:
        """Take in these numbers."""
        self.count += len(values)
        self._fresh.append(values)
        self._waiting += len(values)
        if self._waiting < self.size:
            return
        every = np.concatenate(self._fresh)
        whole = len(every) // self.size * self.size
        for buffer in np.sort(every[:whole].reshape(-1, self.size), axis=1):
            self._carry(buffer, 0)
        self._fresh, self._waiting = [every[whole:].copy()], len(every) - whole

    def _carry(self, buffer: Numbers, level: int) -> None:
        while len(self._levels) <= level:
            self._levels.append(None)
        other, self._levels[level] = self._levels[level], None
        if other is None:
            self._levels[level] = buffer
            return
        both = np.concatenate([other, buffer])
        both.sort(kind="stable")  # two runs: a merge
        self._odd ^= 1  # turn about, so that the errors do not all go one way
        self._lost += 1 << level
        self._carry(both[self._odd :: 2], level + 1)

    def merge(self, other: Sketch) -> None:
        """Take in what another one of the same size has seen."""
        assert other.size == self.size
        counted = self.count + other.count
        for level, buffer in enumerate(other._levels):
            if buffer is not None:
                self._carry(buffer, level)
        self._lost += other._lost
        for values in other._fresh:
            self.add(values)
        self.count = counted

    def quantiles(self, shares: Sequence[float]) -> Numbers:
        """For each share the smallest number that at least so much of all does not exceed; NaN where there is none."""
        parts = [(values, 1) for values in self._fresh]
        parts += [(buffer, 1 << level) for level, buffer in enumerate(self._levels) if buffer is not None]
        if not self.count:
            return np.full(len(shares), np.nan)
        values = np.concatenate([part for part, _ in parts])
        weights = np.concatenate([np.full(len(part), weight, dtype=np.int64) for part, weight in parts])
        order = np.argsort(values, kind="stable")
        ranks = np.cumsum(weights[order])
        wanted = np.ceil(np.asarray(shares) * ranks[-1]).astype(np.int64).clip(1, ranks[-1])
        found: Numbers = values[order][np.searchsorted(ranks, wanted)]
        return found
