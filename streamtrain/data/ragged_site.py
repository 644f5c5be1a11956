"""How rows of different lengths lie under cells: their elements one after another, offsets beside them. Pure.

Its law: cells are so many rows, by metadata alone; where their elements begin is looked up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from streamtrain.data.block import Column
from streamtrain.data.feed import Box, Rows, Site
from streamtrain.data.layout import ArrayLayout, decoded_whole
from streamtrain.data.permutation import Ints
from streamtrain.data.ragged import SCRATCH_BYTES, Piece, RaggedColumn, Table

SPANS = 8
"""Chunks that are decoded whole make up a cell by so many, so that an eighth of what is decoded is so twice."""
CELL_BYTES = 1 << 20
"""A cell has at least so many bytes of elements, and at most MOST_CELL_BYTES."""
MOST_CELL_BYTES = 16 << 20
Selection = tuple[tuple[int, tuple[int, ...]], ...]
WHOLE = 1 << 31
"""Rows of fewer columns have their numbers in 32 bits."""


@dataclass(frozen=True, eq=False)
class RaggedArray:
    """What an array of elements is made of beside them."""

    table: Table
    width: int
    """Places of a row laid out."""
    columns: ArrayLayout | None = None
    """Of sparse rows: the array of the elements' columns."""
    fill: float = 0
    lengths: bool = False
    """Whether the lengths of the rows are asked for, not the rows."""
    kept_sparse: bool = False
    """Whether batches have sparse rows as they are."""

    def site(
        self, layout: ArrayLayout, cell: tuple[int, ...], dtype: np.dtype[Any], selection: Selection
    ) -> RaggedSite:
        """How it lies under cells of so many rows."""
        kind = LengthsSite if self.lengths else RaggedSite
        return kind(
            layout, (0,), cell, dtype, selection, self.table, self.width, self.columns, self.fill, self.kept_sparse
        )


@dataclass(frozen=True)
class RaggedSite(Site):
    """How rows of different lengths lie under the cells: `layout` is that of their elements, one after another."""

    table: Table = field(default_factory=lambda: Table(np.zeros(1, dtype=np.int64)), compare=False)
    width: int = 0
    """Places of a row laid out."""
    columns: ArrayLayout | None = None
    """Of sparse rows: the array of the elements' columns."""
    fill: float = 0
    kept_sparse: bool = False

    @cached_property
    def inner_shape(self) -> tuple[int, ...]:
        """Of one element."""
        return tuple(self.length(axis) for axis in range(1, self.layout.ndim))

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        return (self.width, *self.inner_shape)

    @cached_property
    def mean(self) -> float:
        """Elements of a row."""
        return self.layout.shape[0] / max(1, self.table.rows)

    @cached_property
    def element_bytes(self) -> int:
        """Stored bytes of an element."""
        inner = math.prod(self.layout.shape[1:]) * self.layout.dtype.itemsize
        return inner + (0 if self.columns is None else self.columns.dtype.itemsize)

    @cached_property
    def row_bytes(self) -> int:
        """Stored bytes of a row, on average."""
        return max(1, round(self.mean * self.element_bytes))

    @cached_property
    def chunks_per_row(self) -> tuple[int, ...]:
        return (1,)

    @cached_property
    def chunks_of_row(self) -> int:
        """One: where rows begin in it, they mostly end in it."""
        return 1

    @cached_property
    def cell_holds_chunks(self) -> bool:
        """Never: rows begin anywhere in a chunk."""
        return False

    @cached_property
    def one_chunk(self) -> bool:
        return False

    @cached_property
    def rows_per_chunk(self) -> int:
        return max(1, round(self.layout.chunk_shape[0] / max(1.0, self.mean)))

    @cached_property
    def chunks_per_cell(self) -> int:
        layouts = [self.layout, *([self.columns] if self.columns is not None else [])]
        return sum(math.ceil(self.cell[0] * self.mean / layout.chunk_shape[0]) + 1 for layout in layouts)

    @cached_property
    def scratch_bytes(self) -> int:
        """Bytes that one thread takes: for the elements of a cell (of sparse ones the columns), and the chunks' own."""
        layouts = [self.layout, *([self.columns] if self.columns is not None else [])]
        each = 8 if self.columns is not None else 2 * (self.element_bytes + math.prod(self.inner_shape) * 8)
        return each * self.table.span(self.cell[0]) + max(_reading(layout) for layout in layouts) + SCRATCH_BYTES

    def column(self, name: str, batch_size: int) -> Column:
        """Its part of a batch; a block's room for it is settled later."""
        shape, kept = self.row_shape, self.kept_sparse
        return RaggedColumn(name, shape, self.dtype, batch_size, self.pieces, 0, self.fill, kept)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What an element has in a block."""
        number = Piece(np.dtype(np.int32 if self.width < WHOLE else np.int64))
        return (Piece(self.dtype, self.inner_shape), *([number] if self.columns is not None else []))


@dataclass(frozen=True)
class LengthsSite(RaggedSite):
    """The same where only the lengths of rows are wanted, which are known already."""

    row_shape = ()
    row_bytes = 8
    chunks_per_cell = 0
    scratch_bytes = 0

    def column(self, name: str, batch_size: int) -> Column:
        """Its part of a batch."""
        return Column(name, (), self.dtype, batch_size)


def _reading(layout: ArrayLayout) -> int:
    """Bytes in which one chunk is read."""
    return layout.chunk_bytes + (max(layout.chunk_bytes, layout.decode_room) if decoded_whole(layout) else 0)


def cell_rows(layout: ArrayLayout, columns: ArrayLayout | None, rows: int) -> int:
    """Rows of a cell, by metadata alone: as many as have the elements of a chunk, or of a few that are decoded."""
    mean = max(layout.shape[0] / max(1, rows), 1e-9)
    element = math.prod(layout.shape[1:]) * layout.dtype.itemsize + (0 if columns is None else columns.dtype.itemsize)
    wanted = layout.chunk_shape[0] * (SPANS if decoded_whole(layout) else 1)
    wanted = max(CELL_BYTES // max(1, element), min(wanted, MOST_CELL_BYTES // max(1, element)))
    return max(1, min(rows, round(wanted / mean)))


def numbers_of(box: Box, rows: Rows) -> slice | Ints:
    """Numbers of these rows of a cell, in their store."""
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(box.extent[0])
        return slice(box.origin[0] + start, box.origin[0] + stop)
    return rows + box.origin[0]
