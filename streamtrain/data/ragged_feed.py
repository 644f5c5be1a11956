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
    compact_run,
    copy_runs,
    strictly_rising,
)
from streamtrain.data.readers import Scratch
from streamtrain.errors import DataError

SPANS = 4
"""Chunks that are decoded whole make up a cell by so many, so that at most a quarter of what is decoded is so twice."""
CELL_BYTES = 256 << 10
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
        """Bytes that one thread takes: the elements of a cell, twice where they are changed, and the chunks' own."""
        region = self.table.span(self.cell[0]) * (self.element_bytes + math.prod(self.inner_shape) * 8)
        layouts = [self.layout, *([self.columns] if self.columns is not None else [])]
        return 2 * region + max(_reading(layout) for layout in layouts) + SCRATCH_BYTES

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
    """One array's rows of different lengths, cell by cell."""

    site: RaggedSite

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over these rows of a cell, as a `Run`. Raises DataError for what can't be used."""
        numbers = numbers_of(box, rows)
        starts, lengths = self.site.table.of(numbers)
        before, lost = len(scratch.damages), np.zeros(len(starts), dtype=bool)
        run = self._run(numbers, starts, lengths, scratch, lost)
        damages = [damage for _, damage in scratch.damages[before:]]
        try:
            for which, why in ((~lost, []), (lost, damages)):
                if which.all() and not why:
                    self._put_sound(put, slice(None), run, numbers, starts, scratch)
                elif which.any():
                    wanted = np.flatnonzero(which)
                    if why:
                        scratch.tainted = why
                        put(wanted, self._nothing(lengths[wanted]), None)
                    else:
                        mine = _array(numbers)[wanted]
                        self._put_sound(put, wanted, compact_run(run[wanted]), mine, starts[wanted], scratch)
        finally:
            scratch.tainted = None
            del scratch.damages[before:]  # their rows are told: nobody else's are lost for them

    def _put_sound(
        self, put: Put, wanted: Rows, run: Run, numbers: slice | Ints, starts: Ints, scratch: Scratch
    ) -> None:
        scratch.tainted = []
        if self.site.columns is not None and self.checked:
            run = self._with_checked_columns(run, numbers, starts)
        self._put(put, wanted, run, None, scratch)

    def _run(
        self, numbers: slice | Ints, starts: Ints, lengths: Ints, scratch: Scratch, lost: NDArray[np.bool_]
    ) -> Run:
        """The elements of these rows; `lost` becomes true of those that a bad chunk has touched."""
        together = isinstance(numbers, slice) and len(starts) > 0
        if together:
            first, last = int(starts[0]), int(self.site.table.offsets[numbers.stop])  # type: ignore[union-attr]
            parts, sizes = np.array([first]), np.array([last - first])
            begin = starts - first
        else:
            parts, sizes = starts, lengths
            begin = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])[:-1]
        arrays = []
        for feed in (self, *self.beside):
            out, bad = _gathered(feed, parts, sizes, scratch)
            for low, high in bad:
                lost |= (starts < high) & (starts + lengths > low) & (lengths > 0)
            arrays.append(out)
        arrays[0] = self._changed(arrays[0], scratch)
        return Run(tuple(arrays), begin, lengths)

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
        starts = np.zeros(len(lengths), dtype=np.int64)
        most = int(lengths.max(initial=0))
        return Run(tuple(np.zeros((most, *p.shape), dtype=p.dtype) for p in self.site.pieces), starts, lengths)

    def _with_checked_columns(self, run: Run, numbers: slice | Ints, starts: Ints) -> Run:
        """The rows, when each of their columns is one of the array's. Raises DataError."""
        columns, width = run.arrays[1], self.site.width
        some = run.lengths > 0
        first, last = run.starts[some], (run.starts + run.lengths)[some] - 1
        if not len(first):
            return run
        rising = strictly_rising(columns, run.starts, run.lengths)
        low, high = (columns[first], columns[last]) if rising else (columns, columns)
        if int(low.min()) < 0 or int(high.max()) >= width:
            self._refuse(run, _array(numbers), starts)
        return run if rising else Run(run.arrays, run.starts, run.lengths, True)

    def _refuse(self, run: Run, numbers: Ints, starts: Ints) -> None:
        """Name the first column that is none."""
        assert self.site.columns is not None
        columns, layout = run.arrays[1], self.site.columns
        element = int(np.flatnonzero((columns < 0) | (columns >= self.site.width))[0])
        row = int(np.searchsorted(run.starts, element, side="right")) - 1
        chunk = (int(starts[row]) + element - int(run.starts[row])) // layout.chunk_shape[0]
        raise DataError(
            f"array {layout.name!r}: row {numbers[row]} names column {columns[element]}, in chunk {chunk}; there are "
            f"columns 0 to {self.site.width - 1}",
            hint="restore the file from its source, or convert the data again",
        )


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


def _gathered(feed: Feed, starts: Ints, lengths: Ints, scratch: Scratch) -> tuple[NDArray[Any], list[tuple[int, int]]]:
    """The elements of these runs one after another, and the bounds of the chunks that could not be used."""
    layout = feed.layout
    inner, total = layout.shape[1:], int(lengths.sum())
    size = total * math.prod(inner) * layout.dtype.itemsize
    out = scratch.take(f"ragged {layout.name}", size).view(layout.native).reshape(total, *inner)
    to = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])[:-1]
    bad: list[tuple[int, int]] = []
    for number in _chunks(starts, lengths, layout.chunk_shape[0]):
        low = number * layout.chunk_shape[0]
        high = min(low + layout.chunk_shape[0], layout.shape[0])
        mine = np.flatnonzero((starts < high) & (starts + lengths > low))
        first = np.maximum(starts[mine], low)
        counts = np.minimum(starts[mine] + lengths[mine], high) - first
        places, inside = to[mine] + (first - starts[mine]), first - low
        reach = int(inside.min()), int((inside + counts).max())
        few = 4 * int(counts.sum()) < high - low
        for chunk, part in _inner_chunks(layout):
            damages = len(scratch.damages)
            data = feed.chunk((number, *chunk), reach, scratch, few=few)
            if len(scratch.damages) > damages:
                bad.append((low, high))
            if data is None:
                data = np.broadcast_to(np.asarray(layout.fill_value, layout.native), (high - low, *_shape(part)))
            cut = (slice(None), *(slice(0, p.stop - p.start) for p in part))
            began = time.perf_counter()
            copy_runs(out[(slice(None), *part)], places, data[cut], inside, counts)
            scratch.seconds["gather"] += time.perf_counter() - began
    return out, bad


def _chunks(starts: Ints, lengths: Ints, size: int) -> Iterator[int]:
    """Numbers of the chunks that these runs touch."""
    some = lengths > 0
    if not some.any():
        return iter(())
    first, last = starts[some] // size, (starts[some] + lengths[some] - 1) // size
    if len(first) == 1:
        return iter(range(int(first[0]), int(last[0]) + 1))
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


def _shape(part: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(p.stop - p.start for p in part)


def numbers_of(box: Box, rows: Rows) -> slice | Ints:
    """Numbers of these rows of a cell, in their store."""
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(box.extent[0])
        return slice(box.origin[0] + start, box.origin[0] + stop)
    return rows + box.origin[0]


def _array(numbers: slice | Ints) -> Ints:
    return np.arange(numbers.start, numbers.stop, dtype=np.int64) if isinstance(numbers, slice) else numbers
