"""Which samples, in which order: a pure function of (seed, epoch, position). Integers in, integers out, no I/O.

Samples are numbered in C order over the sample axes. They come in *cells* (what one chunk holds); a `Split` is a
sequence of cells with the range of rows that each contributes; an `EpochOrder` permutes the cells, takes K of them
as a *block* and permutes the block's rows. Cells of one size need O(1) memory and O(log cells) time to seek; uneven
ones (edges of a grid over several axes, splits by sample) need a table of 8 bytes a block.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
SplitBy = Literal["range", "chunk", "sample"]
Shuffle = Literal["none", "block", "global"]

TABLE_LIMIT = 1 << 16
"""Permutations up to this size are sorted tables (uniform over all permutations); larger ones are Feistel networks."""
ROUNDS = 8
SCAN = 1 << 16
"""Cells looked at together while a table of block starts is built."""
BLOCK_BYTES = 32 << 20
"""A block is at least so large, and has at least MIN_CELLS cells: K is a function of the stores' metadata alone."""
MIN_CELLS = 8
LARGE_BLOCK_BYTES = 256 << 20
KEPT_PERMUTATIONS = 4
"""Permutations of rows kept for blocks that are being filled (8 bytes a row each, up to TABLE_LIMIT rows)."""


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


@dataclass(frozen=True)
class CellGrid:
    """How samples lie in cells: `shape` samples along each sample axis, `cell` of them in a cell."""

    shape: tuple[int, ...]
    cell: tuple[int, ...]

    @cached_property
    def grid(self) -> tuple[int, ...]:
        return tuple(-(-s // c) for s, c in zip(self.shape, self.cell, strict=True))

    @cached_property
    def num_samples(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def num_cells(self) -> int:
        return math.prod(self.grid)

    @cached_property
    def full(self) -> int:
        """Samples in a cell that no edge cuts."""
        return math.prod(min(c, s) for c, s in zip(self.cell, self.shape, strict=True))

    @cached_property
    def even(self) -> bool:
        """Whether all cells have the same size."""
        return all(s % min(c, s) == 0 for c, s in zip(self.cell, self.shape, strict=True))

    def boxes(self, ids: Ints) -> tuple[list[Ints], list[Ints]]:
        """Origin and extent of these cells along each sample axis."""
        where = np.unravel_index(ids, self.grid)
        origins = [w.astype(np.int64) * c for w, c in zip(where, self.cell, strict=True)]
        return origins, [np.minimum(o + c, s) - o for o, c, s in zip(origins, self.cell, self.shape, strict=True)]

    def sizes(self, ids: Ints) -> Ints:
        """Samples in each of these cells."""
        if self.even:
            return np.full(len(ids), self.full, dtype=np.int64)
        result = np.ones(len(ids), dtype=np.int64)
        for extent in self.boxes(ids)[1]:
            result *= extent
        return result

    def below(self, ids: Ints, bound: int) -> Ints:
        """How many samples of each cell have a number less than `bound`."""
        origins, extents = self.boxes(ids)
        if bound >= self.num_samples:
            return self.sizes(ids)
        point = np.unravel_index(bound, self.shape) if bound else (0,) * len(self.shape)
        total = np.zeros(len(ids), dtype=np.int64)
        inside = np.ones(len(ids), dtype=bool)
        for axis, (origin, extent) in enumerate(zip(origins, extents, strict=True)):
            before = np.clip(int(point[axis]) - origin, 0, extent)
            for inner in extents[axis + 1 :]:
                before = before * inner
            total += np.where(inside, before, 0)
            inside &= (origin <= point[axis]) & (point[axis] < origin + extent)
        return total

    def numbers(self, cell: int, local: Ints) -> Ints:
        """Sample numbers of the rows `local` (C order within the cell) of one cell."""
        origins, extents = self.boxes(np.array([cell]))
        if len(self.shape) == 1:
            first: int = int(origins[0][0])
            return local + first
        where = np.unravel_index(local, tuple(int(e[0]) for e in extents))
        number = np.zeros(len(local), dtype=np.int64)
        for position, origin, size in zip(where, origins, self.shape, strict=True):
            number = number * size + (position + origin[0])
        return number

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Cell, and row within it, of these samples."""
        if len(self.shape) == 1:
            return numbers // self.cell[0], numbers % self.cell[0]
        where = np.unravel_index(numbers, self.shape)
        ids = np.zeros(len(numbers), dtype=np.int64)
        for position, cell, cells in zip(where, self.cell, self.grid, strict=True):
            ids = ids * cells + position // cell
        local = np.zeros(len(numbers), dtype=np.int64)
        for position, cell, size in zip(where, self.cell, self.shape, strict=True):
            origin = position // cell * cell
            local = local * (np.minimum(origin + cell, size) - origin) + (position - origin)
        return ids, local


class Split:
    """A part of the samples as a sequence of cells, each with the range of its rows that belongs to the part.

    `range`: samples lower..upper-1. `chunk`: the same of the cells in an order keyed by `seed`. `sample`: of every
    cell its share, of its rows in an order keyed by `seed`; shares add up to exactly upper - lower.
    """

    def __init__(
        self, grid: CellGrid, lower: int, upper: int, by: SplitBy = "range", seed: int = 0, *, ascending: bool = False
    ) -> None:
        assert 0 <= lower <= upper <= grid.num_samples
        self.grid, self.lower, self.upper, self.by, self.seed = grid, lower, upper, by, seed
        if lower == 0 and upper == grid.num_samples:
            self.by = "range"
        self._cells = Permutation(grid.num_cells, derive_key(seed, "split"))
        self._first, self.num_cells = self._bounds()
        self._sorted: Ints | None = None
        if ascending and self.by == "chunk":
            self._sorted = np.argsort(self._cells.forward(np.arange(self._first, self._first + self.num_cells)))

    @property
    def num_samples(self) -> int:
        return self.upper - self.lower

    @property
    def contiguous(self) -> bool:
        """Whether rank r of this split is simply sample lower + r."""
        return self.by == "range"

    def _bounds(self) -> tuple[int, int]:
        grid = self.grid
        if self.lower == self.upper:
            return 0, 0
        if self.by == "sample":
            return 0, grid.num_cells
        if self.by == "chunk":
            first, last = self._chunk_at(self.lower), self._chunk_at(self.upper - 1)
            return first, last + 1 - first
        band = math.prod(grid.shape[1:])
        cells = math.prod(grid.grid[1:])
        first = self.lower // band // grid.cell[0]
        last = (self.upper - 1) // band // grid.cell[0]
        return first * cells, (last + 1 - first) * cells

    @cached_property
    def _chunk_starts(self) -> Ints | None:
        """Samples before each cell in the keyed order of cells; None where arithmetic gives it."""
        if self.grid.even or len(self.grid.shape) == 1:
            return None
        sizes = self.grid.sizes(self._cells.forward(np.arange(self.grid.num_cells)))
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])

    @cached_property
    def _short(self) -> tuple[int, int]:
        """Place in the keyed order, and missing samples, of the one short cell of a one-dimensional grid."""
        missing = self.grid.num_cells * self.grid.full - self.grid.num_samples if not self.grid.even else 0
        return int(self._cells.inverse(np.array([self.grid.num_cells - 1]))[0]), missing

    def _chunk_start(self, places: Ints) -> Ints:
        if self._chunk_starts is not None:
            return self._chunk_starts[places]
        place, missing = self._short
        return places * self.grid.full - np.where(places > place, missing, 0)

    def _chunk_at(self, sample: int) -> int:
        """The place, in the keyed order of cells, of the cell that holds the sample of this rank."""
        if self._chunk_starts is not None:
            return int(np.searchsorted(self._chunk_starts, sample, side="right")) - 1
        guess = min(sample // self.grid.full, self.grid.num_cells - 1)
        while guess + 1 < self.grid.num_cells and int(self._chunk_start(np.array([guess + 1]))[0]) <= sample:
            guess += 1
        return guess

    @cached_property
    def _cell_starts(self) -> Ints | None:
        """Samples before each cell, cells in their own order; None where arithmetic gives it."""
        if self.grid.even or len(self.grid.shape) == 1:
            return None
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.grid.sizes(np.arange(self.grid.num_cells)))])

    def _start_of(self, ids: Ints) -> Ints:
        """Samples before each of these cells, cells in their own order."""
        if self._cell_starts is not None:
            return self._cell_starts[ids]
        return np.minimum(ids * self.grid.full, self.grid.num_samples)

    def _share(self, ids: Ints, bound: int) -> Ints:
        """How many rows of each cell are among the first `bound` of n samples spread evenly over the cells.

        Down a binary tree of cells, each node gives its left half the share floor(x * left / all) of its x samples:
        shares grow with `bound`, by at most one a step, and add up to exactly `bound`.
        """
        wide = self.grid.num_samples >= 3_000_000_000
        low, high = np.zeros_like(ids), np.full_like(ids, self.grid.num_cells)
        share = np.full(len(ids), bound, dtype=object if wide else np.int64)
        while (high - low > 1).any():
            middle = (low + high) // 2
            start, cut, stop = (self._start_of(x).astype(share.dtype) for x in (low, middle, high))
            left = share * (cut - start) // np.maximum(stop - start, 1)
            right_hand = ids >= middle
            deeper = high - low > 1
            share = np.where(deeper, np.where(right_hand, share - left, left), share)
            low, high = np.where(deeper & right_hand, middle, low), np.where(deeper & ~right_hand, middle, high)
        return share.astype(np.int64)

    def cells(self, j: Ints) -> tuple[Ints, Ints, Ints]:
        """Ids of the split's j-th cells and the bounds of the rows that they contribute."""
        if self.by == "sample":
            return j, self._share(j, self.lower), self._share(j, self.upper)
        if self.by == "chunk":
            places = self._first + (j if self._sorted is None else self._sorted[j])
            ids, starts = self._cells.forward(places), self._chunk_start(places)
            sizes = self.grid.sizes(ids)
            return ids, np.clip(self.lower - starts, 0, sizes), np.clip(self.upper - starts, 0, sizes)
        ids = self._first + j
        return ids, self.grid.below(ids, self.lower), self.grid.below(ids, self.upper)

    def counts(self, j: Ints) -> Ints:
        """Samples that the split's j-th cells contribute."""
        _, lower, upper = self.cells(j)
        return upper - lower

    @cached_property
    def exceptions(self) -> dict[int, int] | None:
        """Missing samples of the few cells that are short; None where a table is needed."""
        if self.num_cells == 0:
            return {}
        if self.by == "sample":
            return None
        if self.by == "range" and len(self.grid.shape) > 1:
            band = math.prod(self.grid.shape[1:]) * self.grid.cell[0]
            if not self.grid.even or self.lower % band or self.upper % band:
                return None
        if self.by == "chunk" and self._chunk_starts is not None:
            return None
        ends = {0, self.num_cells - 1}
        if self.by == "chunk" and self._short[1]:
            place = self._short[0] - self._first
            if 0 <= place < self.num_cells:
                ends.add(place)
        where = np.array(sorted(ends))
        if self._sorted is not None:
            where = np.flatnonzero(np.isin(self._sorted, where))
        missing = self.grid.full - self.counts(where)
        return {int(j): int(m) for j, m in zip(where, missing, strict=True) if m}

    def rows(self, cell: int, lower: int, upper: int) -> slice | Ints:
        """The rows of one cell, in C order, that the range lower..upper of `cells` stands for."""
        if self.by != "sample":
            return slice(lower, upper)
        size = int(self.grid.sizes(np.array([cell]))[0])
        chosen = Permutation(size, derive_key(self.seed, "rows", cell)).span(lower, upper)
        return np.sort(chosen)

    @cached_property
    def starts(self) -> Ints:
        """Samples before each of the split's cells (8 bytes a cell: for orders that need ranks)."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.counts(np.arange(self.num_cells)))])


class Piece(NamedTuple):
    """Rows of one cell that go into a run of positions."""

    cell: int
    lower: int
    upper: int
    """Bounds of the cell's contribution, as `Split.cells` gives them; unused when `rows` is set."""
    block: int
    """The block whose permutation places the rows; -1 for rows that stay in order."""
    offset: int
    """Position in the block of the first row (before its permutation)."""
    base: int
    """Position in the epoch of the block's first row."""
    rows: Ints | None = None
    """Explicit rows within the cell (unsorted orders over several axes, and "global")."""
    at: Ints | None = None
    """Their positions in the epoch."""


class EpochOrder:
    """The order of one epoch: positions 0..num_samples-1, in blocks that must be resident whole."""

    def __init__(self, split: Split, shuffle: Shuffle, cells_per_block: int, seed: int, epoch: int) -> None:
        assert cells_per_block >= 1
        self.split, self.shuffle, self.seed, self.epoch = split, shuffle, seed, epoch
        m = split.num_cells
        self.num_samples = split.num_samples
        self.num_blocks = max(1, m // cells_per_block) if shuffle == "block" else max(1, m)
        if not m:
            self.num_blocks = 0
        self._cells = Permutation(m, derive_key(seed, epoch, "cells"))
        self._samples = Permutation(self.num_samples, derive_key(seed, epoch, "samples"))
        self._row_permutations: dict[int, Permutation] = {}
        self._lock = threading.Lock()

    @property
    def scattered(self) -> bool:
        """Whether positions know no blocks of cells: any run of positions can be taken."""
        return self.shuffle == "global" or (
            self.shuffle == "none" and self.split.contiguous and len(self.split.grid.shape) > 1
        )

    def _sequence(self, i: Ints) -> Ints:
        return self._cells.forward(i) if self.shuffle == "block" else i

    def _first_cell(self, block: int) -> int:
        return block * self.split.num_cells // self.num_blocks

    @cached_property
    def _missing(self) -> list[tuple[int, int]] | None:
        exceptions = self.split.exceptions
        if exceptions is None:
            return None
        if self.shuffle != "block" or not exceptions:
            return sorted(exceptions.items())
        where = self._cells.inverse(np.array(list(exceptions), dtype=np.int64))
        return sorted(zip(where.tolist(), exceptions.values(), strict=True))

    @cached_property
    def _table(self) -> Ints:
        blocks = np.arange(self.num_blocks + 1, dtype=np.int64) * self.split.num_cells // max(1, self.num_blocks)
        before = np.zeros(self.num_blocks + 1, dtype=np.int64)
        total = 0
        for start in range(0, self.split.num_cells, SCAN):
            stop = min(start + SCAN, self.split.num_cells)
            sums = np.cumsum(self.split.counts(self._sequence(np.arange(start, stop, dtype=np.int64))))
            inside = (blocks > start) & (blocks <= stop)
            before[inside] = total + sums[blocks[inside] - start - 1]
            total += int(sums[-1])
        return before

    def block_start(self, block: int) -> int:
        """Position of a block's first row; `num_samples` for the block after the last."""
        if self._missing is None:
            return int(self._table[block])
        if block >= self.num_blocks:
            return self.num_samples
        first = self._first_cell(block)
        return first * self.split.grid.full - sum(missing for place, missing in self._missing if place < first)

    def block_of(self, position: int) -> int:
        """The block that holds this position."""
        assert 0 <= position < self.num_samples
        low, high = 0, self.num_blocks
        while high - low > 1:
            middle = (low + high) // 2
            if self.block_start(middle) <= position:
                low = middle
            else:
                high = middle
        return low

    def pieces(self, block: int) -> list[Piece]:
        """What a block is made of."""
        first, last = self._first_cell(block), self._first_cell(block + 1)
        ids, lower, upper = self.split.cells(self._sequence(np.arange(first, last, dtype=np.int64)))
        base = self.block_start(block)
        number = block if self.shuffle == "block" else -1
        result, offset = [], 0
        for cell, a, b in zip(ids.tolist(), lower.tolist(), upper.tolist(), strict=True):
            if b > a:
                result.append(Piece(cell, a, b, number, offset, base))
                offset += b - a
        return result

    def run(self, start: int, stop: int) -> list[Piece]:
        """What the positions start..stop-1 of a scattered order are made of: a piece for each cell touched."""
        ranks = np.arange(start, stop, dtype=np.int64)
        if self.shuffle == "global":
            ranks = self._samples.forward(ranks)
        if self.split.contiguous:
            ids, local = self.split.grid.locate(ranks + self.split.lower)
        else:
            j = np.searchsorted(self.split.starts, ranks, side="right") - 1
            ids, lower, upper = self.split.cells(j)
            local = lower + (ranks - self.split.starts[j])
            if self.split.by == "sample":
                for cell in np.unique(ids):
                    mine = np.flatnonzero(ids == cell)
                    a, b = int(lower[mine[0]]), int(upper[mine[0]])
                    local[mine] = np.asarray(self.split.rows(int(cell), a, b))[local[mine] - a]
        order = np.argsort(ids, kind="stable")
        cuts = np.flatnonzero(np.diff(ids[order])) + 1
        return [
            Piece(int(ids[part[0]]), 0, 0, -1, 0, start, rows=local[part], at=part + start)
            for part in np.split(order, cuts)
            if part.size
        ]

    def place(self, piece: Piece) -> tuple[slice | Ints, slice | Ints]:
        """Rows of the piece's cell, and the positions in the epoch where they go."""
        if piece.rows is not None:
            assert piece.at is not None
            return piece.rows, piece.at
        rows = self.split.rows(piece.cell, piece.lower, piece.upper)
        count = piece.upper - piece.lower
        if piece.block < 0:
            start = piece.base + piece.offset
            return rows, slice(start, start + count)
        return rows, self._rows(piece.block).span(piece.offset, piece.offset + count) + piece.base

    def _rows(self, block: int) -> Permutation:
        with self._lock:  # several threads fill one block, and each permutation is worth making once
            known = self._row_permutations.get(block)
            if known is None:
                size = self.block_start(block + 1) - self.block_start(block)
                known = Permutation(size, derive_key(self.seed, self.epoch, "block", block))
                known.span(0, min(1, size))
                while len(self._row_permutations) >= KEPT_PERMUTATIONS:
                    del self._row_permutations[next(iter(self._row_permutations))]
                self._row_permutations[block] = known
            return known


def default_cells_per_block(cell_bytes: int, cell_samples: int) -> int:
    """K: as many cells as fill BLOCK_BYTES (numbers of samples counted too), at least 8, fewer of very large ones."""
    cost = max(1, cell_bytes + 16 * cell_samples)
    return max(BLOCK_BYTES // cost, min(MIN_CELLS, max(2, LARGE_BLOCK_BYTES // cost)))


def split_bounds(split: object, num_samples: int) -> tuple[int, int]:
    """Sample bounds of `split`: two floats are fractions (bound = floor(f * n)), two ints numbers.

    Raises ValueError with the reason if they are neither, or not 0 <= a <= b.
    """
    if split is None:
        return 0, num_samples
    if not isinstance(split, Sequence) or isinstance(split, str) or len(split) != 2:
        raise ValueError(f"split must be two numbers, got {split!r}")
    a, b = split
    if all(type(x) is int for x in (a, b)):
        if not 0 <= a <= b:
            raise ValueError(f"split {split!r} must be 0 <= a <= b")
        if b > num_samples:
            raise ValueError(f"split {split!r} ends beyond the {num_samples} samples there are")
        return int(a), int(b)
    if not (all(isinstance(x, float) for x in (a, b)) and 0.0 <= a <= b <= 1.0):
        raise ValueError(f"split {split!r} must be two fractions 0.0 <= a <= b <= 1.0, or two sample numbers")
    return math.floor(a * num_samples), math.floor(b * num_samples)
