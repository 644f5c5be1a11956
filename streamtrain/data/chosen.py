"""Samples that the user chose or weighted, as cells with the rows that each contributes. Pure.

Its law: whoever is drawn is arithmetic on (seed, epoch) and the weights. It takes about 24 bytes of memory a sample.
"""

from __future__ import annotations

import threading
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.cells import Cells
from streamtrain.data.permutation import Ints, Permutation, derive_key
from streamtrain.data.splits import SplitBy

Floats = NDArray[np.float64]


class Chosen:
    """Some samples by their numbers, each once, as a Split is."""

    scattered_rows = True
    """Rows of a cell are not simply a range."""
    contiguous = False
    lower = 0
    exceptions: dict[int, int] | None = None

    def __init__(self, grid: Cells, numbers: Ints, by: SplitBy = "range") -> None:
        """`numbers`: different, in any order."""
        self.grid, self.by = grid, by
        cells, rows = grid.locate(np.sort(numbers))
        order = np.lexsort((rows, cells))
        self._rows = rows[order]
        self._ids, first = np.unique(cells[order], return_index=True)
        self._firsts = np.append(first, len(numbers)).astype(np.int64)
        self.num_samples, self.num_cells = len(numbers), len(self._ids)

    @cached_property
    def numbers(self) -> Ints:
        """The samples' numbers, cell by cell."""
        parts = [
            self.grid.numbers(int(c), self.rows(int(c), 0, n)) for c, n in zip(self._ids, self._sizes, strict=True)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    @property
    def _sizes(self) -> list[int]:
        return [int(n) for n in np.diff(self._firsts)]

    def cells(self, j: Ints) -> tuple[Ints, Ints, Ints]:
        """Ids of the j-th cells and the bounds of the rows that they contribute."""
        firsts = self._bounds
        counts: Ints = firsts[j + 1] - firsts[j]
        return self._ids[j], np.zeros(len(j), dtype=np.int64), counts

    def counts(self, j: Ints) -> Ints:
        """Samples that the j-th cells contribute."""
        return self.cells(j)[2]

    def rows(self, cell: int, lower: int, upper: int) -> Ints:
        """The rows of one cell that the range lower..upper of `cells` stands for."""
        place = int(np.searchsorted(self._ids, cell))
        first = int(self._firsts[place])
        rows: Ints = self._rows[first + lower : first + upper]
        return rows

    def most(self, cells: int) -> int:
        """Most samples that so many cells contribute."""
        return int(np.sort(np.diff(self._bounds))[-cells:].sum())

    @property
    def _bounds(self) -> Ints:
        return self._firsts

    @property
    def starts(self) -> Ints:
        """Samples before each of the cells."""
        return self._bounds


class Weighted(Chosen):
    """Samples drawn by weight, as many as there are: each as often as its share of the sum, rounded up or down.

    Systematic resampling (Kitagawa 1996) with an offset keyed by seed and epoch: over epochs each sample comes exactly
    as often as its weight says. The table is made when it is first needed, off the event loop.
    """

    def __init__(self, base: Chosen, weights: Floats, seed: int, epoch: int) -> None:
        """`weights`: one for each of `base.numbers`, not negative, their sum above 0."""
        self.grid, self.by = base.grid, base.by
        self._ids, self._base_rows, self._base_firsts = base._ids, base._rows, base._firsts
        self.num_samples, self.num_cells = base.num_samples, base.num_cells
        self._weights, self._offset = weights, derive_key(seed, epoch, "weights") / 2**64
        self._lock = threading.Lock()
        self._table: tuple[Ints, Ints] | None = None

    def _drawn(self) -> tuple[Ints, Ints]:
        """Rows with their repetitions, cell by cell, and where each cell's begin."""
        with self._lock:
            if self._table is None:
                reach = np.cumsum(self._weights)
                reach *= self.num_samples / reach[-1]
                reach[-1] = self.num_samples
                upto = np.floor(reach + self._offset).astype(np.int64)
                upto[-1] = self.num_samples
                copies = np.diff(upto, prepend=0)
                before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(copies)])
                self._table = np.repeat(self._base_rows, copies), before[self._base_firsts]
            return self._table

    @property
    def _bounds(self) -> Ints:
        return self._drawn()[1]

    def rows(self, cell: int, lower: int, upper: int) -> Ints:
        """The rows of one cell, repeated as they were drawn."""
        rows, firsts = self._drawn()
        first = int(firsts[int(np.searchsorted(self._ids, cell))])
        return rows[first + lower : first + upper]


def part_of(numbers: Ints, grid: Cells, lower: int, upper: int, by: SplitBy, seed: int) -> Ints:
    """The samples from `lower` to `upper` of these, in their own order, or in one keyed by `seed`."""
    numbers = np.sort(numbers)
    if by == "sample":
        return numbers[Permutation(len(numbers), derive_key(seed, "chosen")).span(lower, upper)]
    if by == "chunk":
        cells = grid.locate(numbers)[0]
        places = Permutation(grid.num_cells, derive_key(seed, "split")).inverse(cells)
        return numbers[np.argsort(places, kind="stable")][lower:upper]
    return numbers[lower:upper]


def part_by_group(numbers: Ints, groups: NDArray[np.generic], lower: int, upper: int, seed: int) -> Ints:
    """The samples of whole groups, in an order of groups keyed by `seed`: those that begin from `lower` to `upper`."""
    _, owner, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = Permutation(len(sizes), derive_key(seed, "groups")).span(0, len(sizes))
    begins = np.empty(len(sizes), dtype=np.int64)
    begins[order] = np.cumsum(sizes[order]) - sizes[order]
    mine = (begins >= lower) & (begins < upper)
    return numbers[mine[owner]]


def balancing(labels: NDArray[np.generic]) -> Floats:
    """Weights under which each label comes equally often."""
    _, owner, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights: Floats = 1.0 / counts[owner]
    return weights
