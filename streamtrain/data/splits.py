"""A part of the samples, as a sequence of cells with the rows that each contributes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from streamtrain.data.cells import Cells
from streamtrain.data.permutation import Ints, Permutation, derive_key

SplitBy = Literal["range", "chunk", "sample"]


class Split:
    """A part of the samples as a sequence of cells, each with the range of its rows that belongs to the part.

    `range`: samples lower..upper-1. `chunk`: the same of the cells in an order keyed by `seed`. `sample`: of every
    cell its share, of its rows in an order keyed by `seed`; shares add up to exactly upper - lower.
    """

    def __init__(
        self, grid: Cells, lower: int, upper: int, by: SplitBy = "range", seed: int = 0, *, ascending: bool = False
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

    def most(self, cells: int) -> int:
        """Most samples that so many cells contribute."""
        return min(self.num_samples, cells * self.grid.full)

    @property
    def scattered_rows(self) -> bool:
        """Whether the rows of a cell are not simply a range."""
        return self.by == "sample"

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
        return grid.band(self.lower, self.upper)

    @cached_property
    def _chunk_starts(self) -> Ints | None:
        """Samples before each cell in the keyed order of cells; None where arithmetic gives it."""
        if self.grid.even or self.grid.line:
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
        if self.grid.even or self.grid.line:
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
        if self.by == "range" and not self.grid.whole_bands(self.lower, self.upper):
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


def split_bounds(split: object, num_samples: int) -> tuple[int, int]:
    """Sample bounds of `split`: two floats are fractions (bound = floor(f * n)), two ints numbers; beside a float, the
    ints 0 and 1 are fractions, too.

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
    fractions = all(isinstance(x, float) or (type(x) is int and x in (0, 1)) for x in (a, b))
    if not (fractions and 0.0 <= a <= b <= 1.0):
        raise ValueError(f"split {split!r} must be two fractions 0.0 <= a <= b <= 1.0, or two sample numbers")
    return math.floor(a * num_samples), math.floor(b * num_samples)
