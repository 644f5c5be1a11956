"""Keyed permutations and keys: randomness as arithmetic on integers. Pure.

Its law: the same on every machine and version, whatever else draws random numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

TABLE_LIMIT = 1 << 16
"""Permutations up to this size are sorted tables (uniform over all permutations); larger ones are Feistel networks."""
ROUNDS = 8
WINDOW = 1 << 12
"""Images of short spans come from windows of so many, since a call on 16 elements costs as much as one on 2,000."""
WINDOWS = 4
"""Windows that a permutation keeps: the few threads that fill a block are at neighbouring places of it."""


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and words: the same on every machine and version."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A keyed permutation of range(n): `forward` and `inverse` on int64 arrays.

    Up to TABLE_LIMIT by sorting hashes; above by an alternating Feistel network on the next power of two with cycle
    walking (Black and Rogaway 2002): O(1) memory.
    """

    def __init__(self, n: int, key: int) -> None:
        assert n >= 0
        self.n = n
        self._key = key
        bits = max(2, (n - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._windows: dict[int, Ints] = {}
        self._round_keys = [np.uint64(derive_key(key, "round", i)) for i in range(ROUNDS)]

    @cached_property
    def _table(self) -> Ints:
        counter = np.arange(self.n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(self._key)
        return np.argsort(_scramble(counter)).astype(np.int64, copy=False)

    @cached_property
    def _inverse_table(self) -> Ints:
        inverse = np.empty_like(self._table)
        inverse[self._table] = np.arange(self.n)
        return inverse

    def forward(self, i: Ints) -> Ints:
        """Images of the elements i."""
        if self.n <= TABLE_LIMIT:
            return self._table[i]
        return self._walk(i, range(ROUNDS))

    def inverse(self, i: Ints) -> Ints:
        """Elements whose images are i."""
        if self.n <= TABLE_LIMIT:
            return self._inverse_table[i]
        return self._walk(i, range(ROUNDS - 1, -1, -1))

    def span(self, start: int, stop: int) -> Ints:
        """Images of start, ..., stop - 1."""
        if self.n <= TABLE_LIMIT:
            return self._table[start:stop]
        number = start // WINDOW
        if stop > (number + 1) * WINDOW or 4 * (stop - start) > WINDOW:
            return self.forward(np.arange(start, stop, dtype=np.int64))
        return self._window(number)[start - number * WINDOW : stop - number * WINDOW]

    def _window(self, number: int) -> Ints:
        """The images of one window; two threads that miss it at once make it twice."""
        window = self._windows.get(number)
        if window is None:
            first = number * WINDOW
            window = self.forward(np.arange(first, min(first + WINDOW, self.n), dtype=np.int64))
            with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread was faster
                while len(self._windows) >= WINDOWS:
                    del self._windows[next(iter(self._windows))]
            self._windows[number] = window
        return window

    def _walk(self, i: Ints, rounds: range) -> Ints:
        x = self._network(np.asarray(i, dtype=np.int64).astype(np.uint64), rounds)
        outside = np.flatnonzero(x >= np.uint64(self.n))
        while outside.size:
            moved = self._network(x[outside], rounds)
            x[outside] = moved
            outside = outside[moved >= np.uint64(self.n)]
        return x.astype(np.int64)

    def _network(self, x: NDArray[np.uint64], rounds: range) -> NDArray[np.uint64]:
        low, high = x & self._low_mask, x >> self._low_bits
        for number in rounds:
            key = self._round_keys[number]
            if number % 2:
                high = high ^ (self._mix(low, key) & self._high_mask)
            else:
                low = low ^ (self._mix(high, key) & self._low_mask)
        return (high << self._low_bits) | low

    @staticmethod
    def _mix(x: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
        x = (x ^ key) * np.uint64(0xBF58476D1CE4E5B9)
        return (x ^ (x >> np.uint64(29))) * np.uint64(0x94D049BB133111EB) >> np.uint64(24)
