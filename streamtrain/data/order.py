"""Which samples, in which order: a pure function of (seed, epoch, position). Integers in, integers out, no I/O.

An `EpochOrder` permutes the cells of a split, takes K of them as a *block* and permutes the block's rows. Cells of one
size need O(1) memory and O(log cells) time to seek; uneven ones (edges of a grid over several axes, splits by sample)
need a table of 8 bytes a block.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from streamtrain.data.chosen import Chosen
from streamtrain.data.permutation import Ints, Permutation, Spans, derive_key, numbers_in
from streamtrain.data.splits import Split

Shuffle = Literal["none", "block", "global"]

SCAN = 1 << 16
"""Cells looked at together while a table of block starts is built."""
BLOCK_BYTES = 32 << 20
"""A block is at least so large, and has at least MIN_CELLS cells: K is a function of the stores' metadata alone."""
MIN_CELLS = 8
LARGE_BLOCK_BYTES = 256 << 20
KEPT_PERMUTATIONS = 4
"""Permutations of rows kept for blocks that are being filled (8 bytes a row each, up to TABLE_LIMIT rows)."""


class Piece(NamedTuple):
    """Rows of one cell that go into a run of positions."""

    cell: int
    lower: int
    upper: int
    """Bounds of the cell's contribution, as `Split.cells` gives them; unused when `rows` is set."""
    block: int
    """The block whose permutation places the rows; -1 for rows that stay in order."""
    offset: int
    """Rows of the block (of the lane) before the first one, in the order before their permutation."""
    base: int
    """Position in the epoch of the block's first row."""
    lane: int = 0
    """Of the block's lanes; `offset` counts the rows of this one."""
    rows: Ints | None = None
    """Explicit rows within the cell (unsorted orders over several axes, and "global")."""
    at: Ints | None = None
    """Their positions in the epoch."""


class EpochOrder:
    """The order of one epoch: positions 0..num_samples-1, in blocks that must be resident whole."""

    def __init__(
        self,
        split: Split | Chosen,
        shuffle: Shuffle,
        cells_per_block: int,
        seed: int,
        epoch: int,
        *,
        lanes: int = 1,
    ) -> None:
        """`lanes`: of a block shuffle, cell number i of a block goes to the positions of lane i mod lanes."""
        assert cells_per_block >= 1
        self.lanes = lanes if shuffle == "block" else 1
        self.split, self.shuffle, self.seed, self.epoch = split, shuffle, seed, epoch
        m = split.num_cells
        self.num_samples = split.num_samples
        self.num_blocks = max(1, m // cells_per_block) if shuffle == "block" else max(1, m)
        if not m:
            self.num_blocks = 0
        self._cells = Permutation(m, derive_key(seed, epoch, "cells"))
        self._samples = Permutation(self.num_samples, derive_key(seed, epoch, "samples"))
        self._row_places: dict[int, list[Lane]] = {}
        self._lock = threading.Lock()

    @property
    def scattered(self) -> bool:
        """Whether positions know no blocks of cells: any run of positions can be taken."""
        return self.shuffle == "global" or (
            self.shuffle == "none" and self.split.contiguous and self.split.grid.scattered
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
        result, offsets = [], [0] * self.lanes
        for i, (cell, a, b) in enumerate(zip(ids.tolist(), lower.tolist(), upper.tolist(), strict=True)):
            lane = i % self.lanes
            if b > a:
                result.append(Piece(cell, a, b, number, offsets[lane], base, lane))
                offsets[lane] += b - a
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
            if self.split.scattered_rows:
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
        return rows, self._lanes(piece.block)[piece.lane].positions(piece.offset, piece.offset + count)

    def place_since(self, piece: Piece, position: int) -> tuple[slice | Ints, slice | Ints] | None:
        """The same of those rows alone that go to this position or behind it; None where there are none."""
        rows, at = self.place(piece)
        if piece.base >= position:
            return rows, at
        if isinstance(at, slice):
            early = max(0, position - at.start)
            rows = slice(rows.start + early, rows.stop) if isinstance(rows, slice) else rows[early:]
            return (rows, slice(at.start + early, at.stop)) if at.start + early < at.stop else None
        late = np.flatnonzero(at >= position)
        if len(late) == len(at):
            return rows, at
        return (numbers_in(rows)[late], at[late]) if len(late) else None

    def places(self, block: int) -> list[Ints]:
        """Of each lane of a shuffled block: the positions of all its rows."""
        return [lane.positions(0, lane.rows) for lane in self._lanes(block)]

    def _lanes(self, block: int) -> list[Lane]:
        """Where a block's rows go, lane by lane."""
        with self._lock:  # several threads fill one block, and each permutation is worth making once
            known = self._row_places.get(block)
            if known is None:
                first, last = self._first_cell(block), self._first_cell(block + 1)
                known = lanes_of(
                    self.split.counts(self._sequence(np.arange(first, last, dtype=np.int64))),
                    self.block_start(block),
                    self.lanes,
                    (self.seed, self.epoch, "block", block),
                )
                while len(self._row_places) >= KEPT_PERMUTATIONS:
                    del self._row_places[next(iter(self._row_places))]
                self._row_places[block] = known
            return known


class Lane:
    """The rows of every so manyth cell of a block, permuted onto every so manyth of its positions.

    Where the lanes' cells have not just as many rows as their positions are, the surplus goes to those left over.
    """

    def __init__(self, permutation: Permutation, first: int, step: int, own: int, spill: Ints) -> None:
        self.rows = permutation.n
        self._spans, self._first, self._step, self._own, self._spill = Spans(permutation), first, step, own, spill

    def positions(self, start: int, stop: int) -> Ints:
        """Positions in the epoch of the lane's rows start..stop-1."""
        places = self._spans.span(start, stop)
        if not len(self._spill):
            return self._first + (places if self._step == 1 else places * self._step)
        inside = np.minimum(places, self._own - 1)
        outside = np.clip(places - self._own, 0, len(self._spill) - 1)
        return np.where(places < self._own, self._first + inside * self._step, self._spill[outside])


def lanes_of(counts: Ints, base: int, lanes: int, key: tuple[int | str, ...]) -> list[Lane]:
    """The lanes of a block that begins at position `base` and whose cells have `counts` rows."""
    total = int(counts.sum())
    rows = [int(counts[lane::lanes].sum()) for lane in range(lanes)]
    firsts = [base + (lane - base) % lanes for lane in range(lanes)]
    slots = [max(0, -(-(base + total - first) // lanes)) for first in firsts]
    spare = [f + np.arange(n, m, dtype=np.int64) * lanes for f, n, m in zip(firsts, rows, slots, strict=True) if n < m]
    free = np.concatenate(spare) if spare else np.zeros(0, dtype=np.int64)
    result = []
    for lane, (n, m, first) in enumerate(zip(rows, slots, firsts, strict=True)):
        surplus, free = free[: max(0, n - m)], free[max(0, n - m) :]
        permutation = Permutation(n, derive_key(*key, *(("lane", lane) if lanes > 1 else ())))
        permutation.span(0, min(1, n))
        result.append(Lane(permutation, first, lanes, m, surplus))
    return result


def default_cells_per_block(cell_bytes: int, cell_samples: int) -> int:
    """K: as many cells as fill BLOCK_BYTES (numbers of samples counted too), at least 8, fewer of very large ones."""
    cost = max(1, cell_bytes + 16 * cell_samples)
    return max(BLOCK_BYTES // cost, min(MIN_CELLS, max(2, LARGE_BLOCK_BYTES // cost)))
