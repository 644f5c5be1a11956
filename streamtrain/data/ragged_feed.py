"""From chunks to rows of different lengths: which elements of which chunk belong to the rows of a cell.

Its law: a chunk is read once for all the rows that a piece wants of it, and a column number is used only after it was
held against the number of columns.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.block import Column
from streamtrain.data.feed import Box, Feed, Part, Put, Rows, Site
from streamtrain.data.layout import ArrayLayout, decoded_whole
from streamtrain.data.permutation import Ints
from streamtrain.data.ragged import (
    SCRATCH_BYTES,
    Piece,
    RaggedColumn,
    Run,
    Table,
    copy_runs,
    strictly_rising,
)
from streamtrain.data.readers import Scratch
from streamtrain.errors import DataError

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

    def site(
        self, layout: ArrayLayout, cell: tuple[int, ...], dtype: np.dtype[Any], selection: Selection
    ) -> RaggedSite:
        """How it lies under cells of so many rows."""
        kind = LengthsSite if self.lengths else RaggedSite
        return kind(layout, (0,), cell, dtype, selection, self.table, self.width, self.columns, self.fill)


@dataclass(frozen=True)
class RaggedSite(Site):
    """How rows of different lengths lie under the cells: `layout` is that of their elements, one after another."""

    table: Table = field(default_factory=lambda: Table(np.zeros(1, dtype=np.int64)), compare=False)
    width: int = 0
    """Places of a row laid out."""
    columns: ArrayLayout | None = None
    """Of sparse rows: the array of the elements' columns."""
    fill: float = 0

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
        return RaggedColumn(name, self.row_shape, self.dtype, batch_size, self.pieces, 0, self.fill)

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


class RaggedFeed(Feed):
    """One array's rows of different lengths, cell by cell; beside it is the feed of sparse rows' columns."""

    site: RaggedSite

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over these rows of a cell, as `Run`s. Raises DataError for what can't be used."""
        wanted = Wanted.of(self.site.table, numbers_of(box, rows))
        before = len(scratch.damages)
        scratch.tainted = []
        try:
            self._put_parts(0, wanted, put, scratch, self._values(wanted, scratch))
            for columns in self.beside:
                self._put_parts(1, wanted, put, scratch, _parts(columns, wanted, scratch))
            if wanted.bad:
                scratch.tainted = [damage for _, damage in scratch.damages[before:]]
                lost = np.flatnonzero(wanted.lost)
                put(lost, self._nothing(wanted.lengths[lost]), None)
        finally:
            scratch.tainted = None
            del scratch.damages[before:]  # their rows are told: nobody else's are lost for them

    def _put_parts(self, number: int, wanted: Wanted, put: Put, scratch: Scratch, parts: Iterator[Stretch]) -> None:
        """Hand over all parts of the rows' values (0) or columns (1)."""
        for part in parts:
            repeated = number == 1 and self.checked and self._check_columns(part, wanted)
            run = Run({number: part.elements}, part.starts, part.lengths, part.skipped, repeated)
            self._put(put, wanted.rows(part.rows), run, None, scratch)

    def _values(self, wanted: Wanted, scratch: Scratch) -> Iterator[Stretch]:
        """The rows' values as they are handed over."""
        if self.layout.ndim == 1 and self.change is None:
            yield from _parts(self, wanted, scratch)
            return
        elements = self._changed(_gathered(self, wanted, scratch), scratch)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(wanted.lengths)])[:-1]
        yield Stretch(slice(0, len(starts)), elements, starts, wanted.lengths, np.zeros(len(starts), dtype=np.int64), 0)

    def _changed(self, values: NDArray[Any], scratch: Scratch) -> NDArray[Any]:
        """Elements as they are handed over: the taken places of their axes, and what is done to numbers."""
        for axis, places in self.site.taken.items():
            values = values.take(places, axis=axis)
        if self.change is None:
            return values
        size = values.size * self.site.dtype.itemsize
        out = scratch.take("ragged changed", size).view(self.site.dtype).reshape(values.shape)

        def keep(wanted: Rows, changed: NDArray[Any], part: Part | None) -> None:
            out[wanted] = changed

        self.change.around(keep, scratch)(slice(0, len(values)), values, None)
        return out

    def _nothing(self, lengths: Ints) -> Run:
        """Rows of zeros, in place of lost ones."""
        zeros, most = np.zeros(len(lengths), dtype=np.int64), int(lengths.max(initial=0))
        arrays = {n: np.zeros((most, *piece.shape), dtype=piece.dtype) for n, piece in enumerate(self.site.pieces)}
        return Run(arrays, zeros, lengths, zeros)

    def _check_columns(self, part: Stretch, wanted: Wanted) -> bool:
        """Whether a row may name a column twice. Raises DataError where a column is none of the array's."""
        some = part.lengths > 0
        first, ends, columns = part.starts[some], (part.starts + part.lengths)[some], part.elements
        if not len(first):
            return False
        if (first[1:] == ends[:-1]).all():
            columns = columns[int(first[0]) : int(ends[-1])]
            ends = ends - int(first[0])
        else:
            ends = np.cumsum(part.lengths[some])
            columns = np.empty(int(ends[-1]), dtype=columns.dtype)
            copy_runs(columns, ends - part.lengths[some], part.elements, first, part.lengths[some])
        rising = strictly_rising(columns, ends)
        first_ones, last_ones = columns[ends - part.lengths[some]], columns[ends - 1]
        low, high = (first_ones, last_ones) if rising else (columns, columns)
        if int(low.min()) < 0 or int(high.max()) >= self.site.width:
            raise self._wrong(part, wanted)
        before = wanted.last_columns[part.rows][some]
        wanted.last_columns[_array(part.rows)[some]] = last_ones
        return not rising or bool((first_ones <= before).any())

    def _wrong(self, part: Stretch, wanted: Wanted) -> DataError:
        """Names the first column of a row that is none."""
        assert self.site.columns is not None
        columns, layout = part.elements, self.site.columns
        for row, start, length in zip(wanted.numbers_at(part.rows), part.starts, part.lengths, strict=True):
            mine = columns[start : start + length]
            if len(found := np.flatnonzero((mine < 0) | (mine >= self.site.width))):
                return DataError(
                    f"array {layout.name!r}: row {row} names column {mine[found[0]]}, in chunk {part.chunk}; there are "
                    f"columns 0 to {self.site.width - 1}",
                    hint="restore the file from its source, or convert the data again",
                )
        raise AssertionError("each column is one of the array's")


class LengthsFeed(Feed):
    """How many elements of each row are taken."""

    site: RaggedSite

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over the lengths of these rows, int64 of shape (n,)."""
        scratch.tainted = []
        try:
            put(slice(None), self.site.table.of(numbers_of(box, rows))[1], None)
        finally:
            scratch.tainted = None


class CodesFeed(Feed):
    """Numbers of categories; a row without one is refused."""

    categories = 0

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over the codes of these rows. Raises DataError for one that is no category's number."""

        def checked(wanted: Rows, values: NDArray[Any], part: Part | None) -> None:
            damaged = scratch.damages and scratch.damages[-1][0] == scratch.chunks
            if self.checked and not damaged and (int(values.min()) < 0 or int(values.max()) >= self.categories):
                self._refuse(values, _array(numbers_of(box, rows))[wanted])
            put(wanted, values, part)

        super().fill(box, rows, checked, scratch)

    def _refuse(self, codes: NDArray[Any], numbers: Ints) -> None:
        which = int(np.flatnonzero((codes < 0) | (codes >= self.categories))[0])
        code, row, name = int(codes[which]), numbers[which], self.layout.name
        if code == -1:
            raise DataError(
                f"array {name!r}: row {row} has no category (code -1)",
                hint="leave such rows out: indices= takes sample numbers, or the name of a boolean array",
            )
        raise DataError(
            f"array {name!r}: row {row} has the code {code}; there are categories 0 to {self.categories - 1}",
            hint="restore the file from its source, or convert the data again",
        )


class NullableFeed(Feed):
    """Values beside a mask; a row that the mask marks as missing is refused."""

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over the values of these rows. Raises DataError for one that is missing."""
        [mask] = self.beside
        before = len(scratch.damages)

        def look(wanted: Rows, missing: NDArray[Any], part: Part | None) -> None:
            if self.checked and len(scratch.damages) == before and missing.any():
                row = _array(numbers_of(box, rows))[wanted][int(np.flatnonzero(missing)[0])]
                raise DataError(
                    f"array {mask.layout.name!r}: row {row} has no value",
                    hint="leave such rows out: indices= takes sample numbers, or the name of a boolean array",
                )

        mask.fill(box, rows, look, scratch)
        super().fill(box, rows, put, scratch)


@dataclass
class Wanted:
    """The rows that a piece wants: where their elements lie, and which of them bad chunks have touched."""

    numbers: slice | Ints
    starts: Ints
    lengths: Ints
    bad: list[tuple[int, int]] = field(default_factory=list)
    """Bounds of the chunks that could not be used."""

    @cached_property
    def last_columns(self) -> Ints:
        """Of each row the last column that was seen; -1 before the first."""
        return np.full(len(self.starts), -1, dtype=np.int64)

    @classmethod
    def of(cls, table: Table, numbers: slice | Ints) -> Wanted:
        """These rows of an array."""
        return cls(numbers, *table.of(numbers))

    @cached_property
    def rising(self) -> bool:
        """Whether the rows follow one another, so that those of a chunk are a run of them."""
        return isinstance(self.numbers, slice)

    def within(self, low: int, high: int) -> slice | Ints:
        """Which of them have elements between these bounds."""
        if self.rising:
            first = int(np.searchsorted(self.starts, low, side="right")) - 1
            return slice(max(0, first), int(np.searchsorted(self.starts, high, side="left")))
        return np.flatnonzero((self.starts < high) & (self.starts + self.lengths > low))

    def rows(self, which: slice | Ints) -> Rows:
        """The same for a put; a slice without bounds stands for all."""
        everything = isinstance(which, slice) and (which.start, which.stop) == (0, len(self.starts))
        return slice(None) if everything else which

    def numbers_at(self, which: slice | Ints) -> Ints:
        """Numbers of the rows, in their store."""
        return _array(self.numbers)[which]

    @property
    def lost(self) -> NDArray[np.bool_]:
        """Which rows a bad chunk has touched."""
        lost = np.zeros(len(self.starts), dtype=bool)
        for low, high in self.bad:
            lost |= (self.starts < high) & (self.starts + self.lengths > low) & (self.lengths > 0)
        return lost


@dataclass(frozen=True)
class Stretch:
    """What one chunk has of the wanted rows."""

    rows: slice | Ints
    """Which of them."""
    elements: NDArray[Any]
    starts: Ints
    """In `elements`."""
    lengths: Ints
    skipped: Ints
    """Elements of each row before these."""
    chunk: int


def _parts(
    feed: Feed, wanted: Wanted, scratch: Scratch, inner: tuple[int, ...] = (), cut: tuple[slice, ...] = ()
) -> Iterator[Stretch]:
    """What each chunk has of the wanted rows; `inner`, `cut`: which part of an element's axes, and the places of it."""
    layout, size, shape = feed.layout, feed.layout.chunk_shape[0], tuple(c.stop - c.start for c in cut)
    for number in _chunks(wanted.starts, wanted.lengths, size):
        low, high = number * size, min((number + 1) * size, layout.shape[0])
        which = wanted.within(low, high)
        starts, lengths = wanted.starts[which], wanted.lengths[which]
        first = np.maximum(starts, low)
        counts = np.maximum(np.minimum(starts + lengths, high) - first, 0)
        inside = first - low
        reach = int(inside.min()), int((inside + counts).max())
        damages = len(scratch.damages)
        data = feed.chunk((number, *inner), reach, scratch, few=4 * int(counts.sum()) < high - low)
        if len(scratch.damages) > damages:
            wanted.bad.append((low, high))
            continue
        if data is None:
            data = np.broadcast_to(np.asarray(layout.fill_value, layout.native), (high - low, *shape))
        data = data[(slice(None), *(slice(0, length) for length in shape))]
        yield Stretch(which, data, inside, counts, first - starts, number)


def _gathered(feed: Feed, wanted: Wanted, scratch: Scratch) -> NDArray[Any]:
    """The elements of the wanted rows one after another."""
    layout = feed.layout
    inner, total = layout.shape[1:], int(wanted.lengths.sum())
    size = total * math.prod(inner) * layout.dtype.itemsize
    out = scratch.take(f"ragged {layout.name}", size).view(layout.native).reshape(total, *inner)
    to = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(wanted.lengths)])[:-1]
    for chunk, cut in _inner_chunks(layout):
        for part in _parts(feed, wanted, scratch, chunk, cut):
            began = time.perf_counter()
            places = to[part.rows] + part.skipped
            copy_runs(out[(slice(None), *cut)], places, part.elements, part.starts, part.lengths)
            scratch.seconds["gather"] += time.perf_counter() - began
    return out


def _chunks(starts: Ints, lengths: Ints, size: int) -> Iterator[int]:
    """Numbers of the chunks that these runs touch."""
    some = lengths > 0
    if not some.any():
        return iter(())
    first, last = starts[some] // size, (starts[some] + lengths[some] - 1) // size
    low = int(first.min())
    edges = np.zeros(int(last.max()) - low + 2, dtype=np.int64)
    np.add.at(edges, first - low, 1)
    np.add.at(edges, last - low + 1, -1)
    return iter((np.flatnonzero(np.cumsum(edges) > 0) + low).tolist())


def _inner_chunks(layout: ArrayLayout) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The chunks into which elements are cut: their numbers, and what they hold of one."""
    counts = [range(-(-s // c)) for s, c in zip(layout.shape[1:], layout.chunk_shape[1:], strict=True)]
    for chunk in itertools.product(*counts):
        yield chunk, tuple(slice(a, b) for a, b in layout.box((0, *chunk))[1:])


def numbers_of(box: Box, rows: Rows) -> slice | Ints:
    """Numbers of these rows of a cell, in their store."""
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(box.extent[0])
        return slice(box.origin[0] + start, box.origin[0] + stop)
    return rows + box.origin[0]


def _array(numbers: slice | Ints) -> Ints:
    return np.arange(numbers.start, numbers.stop, dtype=np.int64) if isinstance(numbers, slice) else numbers
