"""How samples lie in cells, and how both are numbered. Pure.

Samples are numbered in C order over the sample axes. A *cell* is what one chunk holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from streamtrain.data.permutation import Ints


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
