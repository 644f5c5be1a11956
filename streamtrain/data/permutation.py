"""Keyed permutations and keys: randomness as arithmetic on integers. Pure.

Its law: the same on every machine and version, whatever else draws random numbers.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

TABLE_LIMIT = 1 << 16
"""Permutations up to this size are sorted tables (uniform over all permutations); larger ones are Feistel networks."""
ROUNDS = 8
TILE = 1 << 15
"""Elements of a Feistel network that are worked on together: more would leave the cache, fewer cost calls."""
SPAN_TILE = 1 << 14
KEPT_TILES = 4
"""Slices of SPAN_TILE images that `Spans` keeps: about one for each thread that takes short spans in a row."""

_MIX = tuple(np.uint64(number) for number in (0xBF58476D1CE4E5B9, 29, 0x94D049BB133111EB, 24))


def numbers_in(rows: slice | Ints) -> Ints:
    """The numbers that a slice with both bounds stands for; those given else."""
    return np.arange(rows.start, rows.stop, dtype=np.int64) if isinstance(rows, slice) else rows


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and words: the same on every machine and version."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed(key: int, numbers: Ints) -> NDArray[np.uint64]:
    """64 bits for each of these numbers that depend on it and the key alone: the terms of SplitMix64."""
    with np.errstate(over="ignore"):
        return _scramble(numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))


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
        return self.forward(np.arange(start, stop, dtype=np.int64))

    def _walk(self, i: Ints, rounds: range) -> Ints:
        """Slice by slice, so that what the rounds work on stays in the processor's cache."""
        given = np.asarray(i, dtype=np.int64)
        flat = given.reshape(-1)
        result = np.empty(flat.shape, dtype=np.uint64)
        room = np.empty((3, min(TILE, max(1, flat.size))), dtype=np.uint64)
        for start in range(0, flat.size, TILE):
            tile = result[start : start + TILE]
            tile[:] = flat[start : start + TILE]
            self._network(tile, room, rounds)
            outside = np.flatnonzero(tile >= np.uint64(self.n))
            while outside.size:
                moved = tile[outside]
                self._network(moved, room, rounds)
                tile[outside] = moved
                outside = outside[moved >= np.uint64(self.n)]
        return result.view(np.int64).reshape(given.shape)

    def _network(self, x: NDArray[np.uint64], room: NDArray[np.uint64], rounds: range) -> None:
        """Send `x` through these rounds, in place."""
        low, high, mixed = (part[: x.size] for part in room)
        np.bitwise_and(x, self._low_mask, out=low)
        np.right_shift(x, self._low_bits, out=high)
        for number in rounds:
            odd = number % 2
            self._mix(low if odd else high, self._round_keys[number], mixed, x)
            mixed &= self._high_mask if odd else self._low_mask
            np.bitwise_xor(high if odd else low, mixed, out=high if odd else low)
        np.left_shift(high, self._low_bits, out=high)
        np.bitwise_or(high, low, out=x)

    @staticmethod
    def _mix(half: NDArray[np.uint64], key: np.uint64, out: NDArray[np.uint64], spare: NDArray[np.uint64]) -> None:
        np.bitwise_xor(half, key, out=out)
        np.multiply(out, _MIX[0], out=out)
        np.right_shift(out, _MIX[1], out=spare)
        np.bitwise_xor(out, spare, out=out)
        np.multiply(out, _MIX[2], out=out)
        np.right_shift(out, _MIX[3], out=out)


class Spans:
    """Short spans of one permutation, one after another: cut from slices that are worked out whole, and a few kept.

    A network of 1,000 elements costs hardly less than one of 10,000. Any thread may ask; two may work out the same.
    """

    def __init__(self, permutation: Permutation) -> None:
        self._permutation = permutation
        self._tiles: dict[int, Ints] = {}

    def span(self, start: int, stop: int) -> Ints:
        """Images of start, ..., stop - 1."""
        if self._permutation.n <= TABLE_LIMIT or stop - start >= SPAN_TILE:
            return self._permutation.span(start, stop)
        parts = [
            self._tile(number)[max(0, start - number * SPAN_TILE) : stop - number * SPAN_TILE]
            for number in range(start // SPAN_TILE, -(-stop // SPAN_TILE))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _tile(self, number: int) -> Ints:
        tile = self._tiles.get(number)
        if tile is None:
            first = number * SPAN_TILE
            tile = self._permutation.span(first, min(first + SPAN_TILE, self._permutation.n))
            for old in list(self._tiles)[: max(0, len(self._tiles) + 1 - KEPT_TILES)]:
                self._tiles.pop(old, None)
            self._tiles[number] = tile
        return tile
