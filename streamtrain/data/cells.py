"""How samples lie in cells, and how both are numbered. Pure.

Samples are numbered in C order over the sample axes. A *cell* is what one chunk holds. Several stores are one row of
cells, those of the first store first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from streamtrain.data.permutation import Ints


class Cells(Protocol):
    """What an order needs to know of how samples lie in cells."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_cells(self) -> int: ...

    @property
    def full(self) -> int:
        """Samples in a cell that no edge cuts; in the largest where stores differ."""

    @property
    def even(self) -> bool:
        """Whether all cells have the same size."""

    @property
    def line(self) -> bool:
        """Whether samples are numbered cell by cell, and only the last cell may be short."""

    @property
    def scattered(self) -> bool:
        """Whether a run of sample numbers goes back and forth between cells."""

    @property
    def run(self) -> int:
        """Samples with following numbers that lie in one cell; of the first store where there are several."""

    def sizes(self, ids: Ints) -> Ints:
        """Samples in each of these cells."""

    def below(self, ids: Ints, bound: int) -> Ints:
        """How many samples of each cell have a number less than `bound`."""

    def band(self, lower: int, upper: int) -> tuple[int, int]:
        """The first of the cells that hold the samples lower..upper-1, and how many there are from there on."""

    def whole_bands(self, lower: int, upper: int) -> bool:
        """Whether all of these cells but the first and the last have all their samples within these bounds."""

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Cell, and row within it, of these samples."""

    def part(self, cell: int) -> tuple[int, int, CellGrid]:
        """Which store a cell belongs to, its number there, and that store's cells."""

    def numbers(self, cell: int, local: Ints) -> Ints:
        """Sample numbers of the rows `local` (C order within the cell) of one cell."""


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

    @property
    def line(self) -> bool:
        return len(self.shape) == 1

    @property
    def scattered(self) -> bool:
        return len(self.shape) > 1

    @property
    def run(self) -> int:
        return min(self.cell[-1], self.shape[-1])

    def part(self, cell: int) -> tuple[int, int, CellGrid]:
        return 0, cell, self

    def band(self, lower: int, upper: int) -> tuple[int, int]:
        band, cells = math.prod(self.shape[1:]), math.prod(self.grid[1:])
        first, last = lower // band // self.cell[0], (upper - 1) // band // self.cell[0]
        return first * cells, (last + 1 - first) * cells

    def whole_bands(self, lower: int, upper: int) -> bool:
        band = math.prod(self.shape[1:]) * self.cell[0]
        return self.line or (self.even and not lower % band and not upper % band)

    def box(self, cell: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Origin and extent of one cell along each sample axis; by numpy it would take ten times longer."""
        if len(self.shape) == 1:
            [length], [size] = self.shape, self.cell
            start = cell * size
            return (start,), (min(size, length - start),)
        origin = [0] * len(self.shape)
        for axis in range(len(self.shape) - 1, -1, -1):
            cell, place = divmod(cell, self.grid[axis])
            origin[axis] = place * self.cell[axis]
        return tuple(origin), tuple(min(c, s - o) for o, c, s in zip(origin, self.cell, self.shape, strict=True))

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
        if len(self.shape) == 1:
            return local + cell * self.cell[0]
        origins, extents = self.box(cell)
        where = np.unravel_index(local, extents)
        number = np.zeros(len(local), dtype=np.int64)
        for position, origin, size in zip(where, origins, self.shape, strict=True):
            number = number * size + (position + origin)
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


def joined(parts: Sequence[CellGrid]) -> Cells:
    """The cells of these stores."""
    return parts[0] if len(parts) == 1 else JoinedCells(parts)


class JoinedCells:
    """The cells of several stores in a row."""

    def __init__(self, parts: Sequence[CellGrid]) -> None:
        self.parts = parts
        self._cells = _starts([part.num_cells for part in parts])
        self._samples = _starts([part.num_samples for part in parts])
        self.num_cells, self.num_samples = int(self._cells[-1]), int(self._samples[-1])
        self.full = max(part.full for part in parts)
        self.even = all(part.even and part.full == self.full for part in parts)
        self.line = False
        self.scattered = any(part.scattered for part in parts)
        self.run = parts[0].run

    def part(self, cell: int) -> tuple[int, int, CellGrid]:
        """Which store a cell belongs to, its number there, and that store's cells."""
        number = int(np.searchsorted(self._cells, cell, side="right")) - 1
        return number, cell - int(self._cells[number]), self.parts[number]

    def _by_part(self, ids: Ints) -> Iterator[tuple[int, Ints, Ints]]:
        """Store by store: its number, where in `ids` its cells stand, and their numbers there."""
        owners = np.searchsorted(self._cells, ids, side="right") - 1
        for number in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == number)
            yield number, mine, ids[mine] - self._cells[number]

    def sizes(self, ids: Ints) -> Ints:
        """Samples in each of these cells."""
        result = np.empty(len(ids), dtype=np.int64)
        for number, mine, local in self._by_part(ids):
            result[mine] = self.parts[number].sizes(local)
        return result

    def below(self, ids: Ints, bound: int) -> Ints:
        """How many samples of each cell have a number less than `bound`."""
        result = np.empty(len(ids), dtype=np.int64)
        for number, mine, local in self._by_part(ids):
            part, rest = self.parts[number], bound - int(self._samples[number])
            result[mine] = part.below(local, rest) if rest > 0 else 0
        return result

    def band(self, lower: int, upper: int) -> tuple[int, int]:
        """The first of the cells that hold the samples lower..upper-1, and how many there are from there on."""
        first, last = (int(np.searchsorted(self._samples, n, side="right")) - 1 for n in (lower, upper - 1))
        begin, end = int(self._samples[first]), int(self._samples[last])
        start = self.parts[first].band(lower - begin, min(upper - begin, self.parts[first].num_samples))[0]
        low, count = self.parts[last].band(max(lower - end, 0), upper - end)
        start += int(self._cells[first])
        return start, int(self._cells[last]) + low + count - start

    def whole_bands(self, lower: int, upper: int) -> bool:
        """Only where nothing is cut: else a table tells."""
        return self.even and lower == 0 and upper == self.num_samples

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Cell, and row within it, of these samples."""
        owners = np.searchsorted(self._samples, numbers, side="right") - 1
        cells, rows = np.empty(len(numbers), dtype=np.int64), np.empty(len(numbers), dtype=np.int64)
        for number in np.unique(owners).tolist():
            mine = owners == number
            ids, rows[mine] = self.parts[number].locate(numbers[mine] - self._samples[number])
            cells[mine] = ids + self._cells[number]
        return cells, rows

    def numbers(self, cell: int, local: Ints) -> Ints:
        """Sample numbers of the rows `local` (C order within the cell) of one cell."""
        number, inner, part = self.part(cell)
        return part.numbers(inner, local) + int(self._samples[number])


def _starts(counts: Sequence[int]) -> Ints:
    starts: Ints = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(counts, dtype=np.int64))])
    return starts
