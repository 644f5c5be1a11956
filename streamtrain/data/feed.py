"""From chunks to rows: which part of which chunk makes up a cell, and where its rows go.

Its law: a chunk is read once for all the rows that a piece wants of it. A cell's rows are numbered in C order over
the sample axes; an array may be chunked differently from the cells, and over its other axes too.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.cache import ChunkCache
from streamtrain.data.cells import CellGrid
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ArrayLayout, essence
from streamtrain.data.permutation import Ints
from streamtrain.data.readers import LocalReader
from streamtrain.data.reading import ChunkName, ChunkReader, Scratch, Version

Rows = slice | Ints
_EVERY = slice(None)
Part = tuple[slice | int, ...]
Put = Callable[[Rows, Any, Part | None], None]
"""Called with which of the wanted rows these are, their values (n, *row_shape or a part of it), and that part; rows of
different lengths as a `ragged.Run`."""


class Change(Protocol):
    """What is done to an array's rows on their way."""

    def around(self, put: Put, scratch: Scratch) -> Put:
        """A `put` that changes the values, and hands them to this one."""


@dataclass(frozen=True)
class Box:
    """A cell: its first sample and its extent along each sample axis."""

    origin: tuple[int, ...]
    extent: tuple[int, ...]

    @classmethod
    def of(cls, grid: CellGrid, cell: int) -> Box:
        """The box of one cell."""
        return cls(*grid.box(cell))


@dataclass(frozen=True)
class Site:
    """How an array lies under the cells: which axes number samples, and how its chunks cut cells and rows."""

    layout: ArrayLayout
    sample_axes: tuple[int, ...]
    cell: tuple[int, ...]
    dtype: np.dtype[Any]
    """What its values are cast to."""
    selection: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Of some axes of a sample: the places that are taken, in this order."""

    @cached_property
    def taken(self) -> dict[int, Ints]:
        """The selection by axis."""
        return {axis: np.array(places, dtype=np.int64) for axis, places in self.selection}

    def chosen(self, values: NDArray[Any], axis: int, at: int, first: int = 0) -> NDArray[Any]:
        """Of `values`, whose axis `at` is this axis from place `first` on: what is taken, places in a row uncopied."""
        places = self.taken[axis]
        low, high = int(places[0]), int(places[-1]) + 1
        if high - low == len(places) and bool((np.diff(places) == 1).all()):
            return values[(*(slice(None),) * at, slice(low - first, high - first))]
        return values.take(places - first, axis=at)

    def length(self, axis: int) -> int:
        """Places of a sample along one of its axes."""
        return len(self.taken[axis]) if axis in self.taken else self.layout.shape[axis]

    @cached_property
    def row_axes(self) -> tuple[int, ...]:
        """The other axes: those of one sample."""
        return tuple(a for a in range(self.layout.ndim) if a not in self.sample_axes)

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.length(a) for a in self.row_axes)

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """What numbers are changed in: a sample, or an element of one where samples have different lengths."""
        return self.row_shape

    @cached_property
    def row_bytes(self) -> int:
        """Stored bytes of one sample."""
        return math.prod(self.row_shape) * self.layout.dtype.itemsize

    @cached_property
    def chunks_per_row(self) -> tuple[int, ...]:
        """Into how many chunks the array is cut along each axis of a sample."""
        return tuple(-(-self.layout.shape[a] // self.layout.chunk_shape[a]) for a in self.row_axes)

    def chunks_along(self, axis: int) -> Sequence[int]:
        """The chunks along an axis of a sample from which something is taken."""
        size = self.layout.chunk_shape[axis]
        if axis in self.taken:
            return [int(number) for number in np.unique(self.taken[axis] // size)]
        return range(-(-self.layout.shape[axis] // size))

    @cached_property
    def chunks_of_row(self) -> int:
        """Chunks from which one sample is taken."""
        return math.prod(len(self.chunks_along(axis)) for axis in self.row_axes)

    @cached_property
    def cell_holds_chunks(self) -> bool:
        """Whether no chunk reaches over more than one cell."""
        chunks, shape = self.layout.chunk_shape, self.layout.shape
        return all(
            c % chunks[a] == 0 or chunks[a] >= shape[a] == c for a, c in zip(self.sample_axes, self.cell, strict=True)
        )

    @cached_property
    def region_bytes(self) -> int:
        """Bytes of the region that a cell's samples are put together in; 0 where they are not."""
        return 0

    @cached_property
    def chunks_per_cell(self) -> int:
        """Chunks that a whole cell touches."""
        chunks = self.layout.chunk_shape
        sampled = (max(1, -(-c // chunks[a])) for a, c in zip(self.sample_axes, self.cell, strict=True))
        return math.prod(sampled) * self.chunks_of_row

    @cached_property
    def rows_per_chunk(self) -> int:
        """Samples of which a chunk has a part."""
        return math.prod(min(self.layout.chunk_shape[a], self.layout.shape[a]) for a in self.sample_axes)

    @cached_property
    def one_chunk(self) -> bool:
        """Whether a cell is exactly one chunk, the usual case."""
        chunks, shape = self.layout.chunk_shape, self.layout.shape
        same = all(min(chunks[a], shape[a]) == c for a, c in zip(self.sample_axes, self.cell, strict=True))
        return same and all(count == 1 for count in self.chunks_per_row)


class Feed:
    """One array's rows, cell by cell. Thread-safe: what it keeps between calls is the cache, which is."""

    beside: tuple[Feed, ...] = ()
    """Those of arrays that are read along with it."""
    checked = True
    """Whether values are used, and held against what they must be: not where they are only asked for, to know what is
    read; nothing is put together then."""

    def __init__(
        self,
        site: Site,
        reader: ChunkReader,
        cache: ChunkCache | None,
        store: Hashable,
        *,
        change: Change | None = None,
    ) -> None:
        """`store`: which it is, among all whose chunks the cache keeps; with array and chunk it names what is kept.
        `change`: what is done to rows before they are put."""
        self._kept_as, self.change = (store, repr(essence(site.layout))), change
        self.site, self.layout, self.reader, self.cache = site, site.layout, reader, cache
        self._order = site.sample_axes + site.row_axes

    def key(self, chunk: tuple[int, ...]) -> Hashable:
        """What a chunk is called in the cache."""
        return *self._kept_as, chunk

    def keeps(self, chunk: tuple[int, ...]) -> bool:
        """Whether the cache has this chunk, of whatever version."""
        return self.cache is not None and self.key(chunk) in self.cache

    def during(self, seed: int, epoch: int) -> Feed:
        """The same for one epoch: itself, unless its samples lie elsewhere in each."""
        return self

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over these rows of a cell. Raises DataError for chunks that can't be used."""
        if self.change is not None:
            put = self.change.around(put, scratch)
        if self._plain:
            self._put(put, _EVERY, self._rows_of_one(box, rows, scratch), None, scratch)
            return
        if self.site.one_chunk:
            where = self._chunk_of(box.origin, (0,) * len(self.site.row_axes))
            values = self._values(where, box.extent, self._reach(rows, box), scratch, few=_few(rows, box.extent))
            for axis in self.site.taken:
                values = self.site.chosen(values, axis, 1 + self.site.row_axes.index(axis))
            self._put(put, slice(None), values if self._as_is(rows, len(values)) else values[rows], None, scratch)
            return
        for first, inside, wanted in self._parts(box, rows):
            for part in itertools.product(*self._row_chunks):
                self._fill_part(first, inside, wanted, part, put, scratch)

    @cached_property
    def _plain(self) -> bool:
        """Whether a cell is one chunk along the first axis, and each of its samples is taken whole: the usual case."""
        plain = self._order == tuple(range(self.layout.ndim)) and self.site.sample_axes == (0,)
        return plain and self.site.one_chunk and not self.site.taken

    def lined_up(self, dtype: np.dtype[Any]) -> LocalReader | None:
        """What has all rows in one piece of memory, as they are handed over in this dtype; None where nothing may."""
        plain = type(self).fill is Feed.fill and self._plain and self.change is None and self.cache is None
        if not plain or not isinstance(self.reader, LocalReader) or self.layout.dtype != dtype:
            return None
        return self.reader

    @cached_property
    def in_order(self) -> bool:
        """Whether a decoded chunk is its samples one after another, and nothing between or behind them."""
        same = self.layout.chunk_shape[1:] == self.site.row_shape
        return same and self.layout.axes == tuple(range(self.layout.ndim))

    def whole(self, cell: int, out: Bytes, scratch: Scratch) -> NDArray[Any]:
        """All rows of the chunk that is this cell (where `lined_up` and `in_order`); at the beginning of `out`, where
        it is encoded, else valid until the scratch is used again. Raises DataError if it can't be used."""
        assert isinstance(self.reader, LocalReader)
        chunk = (cell, *self._first_columns)
        scratch.reading = (ChunkName(self.layout.name, chunk), time.monotonic())
        scratch.chunks += 1
        try:
            values = self.reader.read(chunk, (0, self.layout.chunk_shape[0]), scratch, out=out)
        finally:
            scratch.reading = None
        if values is not None:
            return values
        shape, fill = self.layout.chunk_shape, np.asarray(self.layout.fill_value, self.layout.dtype)
        if not self.layout.decode_room:
            return np.broadcast_to(fill, shape)
        values = out[: self.layout.chunk_bytes].view(self.layout.dtype).reshape(shape)
        values[...] = fill
        return values

    @cached_property
    def _whole_rows(self) -> tuple[slice, ...]:
        """The part of a chunk along the axes of a sample that the array has."""
        return tuple(slice(0, length) for length in self.site.row_shape)

    @cached_property
    def _first_columns(self) -> tuple[int, ...]:
        return (0,) * len(self.site.row_axes)

    def _rows_of_one(self, box: Box, rows: Rows, scratch: Scratch) -> NDArray[Any]:
        """What `_values` gives, in the usual case: of small chunks half of the time was spent on the others."""
        [first], [count] = box.origin, box.extent
        chunk = (first // self.layout.chunk_shape[0], *self._first_columns)
        values = self.chunk(chunk, self._reach(rows, box), scratch, few=_few(rows, box.extent))
        shape = (count, *self.site.row_shape)
        if values is None:
            values = np.broadcast_to(np.asarray(self.layout.fill_value, self.layout.native), shape)
        elif values.shape != shape:
            values = values[(slice(0, count), *self._whole_rows)]
        return values if self._as_is(rows, count) else values[rows]

    def _as_is(self, rows: Rows, count: int) -> bool:
        """Whether nothing has to be gathered for these rows of so many."""
        return not self.checked or _whole(rows, count)

    def _fill_part(
        self, first: Sequence[int], inside: Rows, wanted: Rows, part: tuple[int, ...], put: Put, scratch: Scratch
    ) -> None:
        """Rows `inside` the chunk that begins at sample `first`, which are the rows `wanted` of the piece."""
        lengths, chunks = self.layout.shape, self.layout.chunk_shape
        extent = tuple(min(chunks[a], lengths[a] - f) for a, f in zip(self.site.sample_axes, first, strict=True))
        reach = (inside.start, inside.stop) if isinstance(inside, slice) and len(first) == 1 else (0, extent[0])
        values = self._values(self._chunk_of(first, part), extent, reach, scratch, few=_few(inside, extent))
        values = values[inside] if self.checked else values
        if self.site.taken:
            runs = [list(self._runs(a, p)) for p, a in zip(part, self.site.row_axes, strict=True)]
            for each in itertools.product(*runs):
                cut = tuple(source for source, _ in each)
                self._put(put, wanted, values[(slice(None), *cut)], tuple(place for _, place in each), scratch)
            return
        columns = tuple(
            slice(p * chunks[a], min((p + 1) * chunks[a], lengths[a]))
            for p, a in zip(part, self.site.row_axes, strict=True)
        )
        whole = all(count == 1 for count in self.site.chunks_per_row)
        self._put(put, wanted, values, None if whole else columns, scratch)

    @cached_property
    def _row_chunks(self) -> list[Sequence[int]]:
        """The chunks along each axis of a sample from which something is taken."""
        return [self.site.chunks_along(axis) for axis in self.site.row_axes]

    def _runs(self, axis: int, number: int) -> Iterator[tuple[slice | int, slice | int]]:
        """Which places of a chunk along this axis go to which of the sample, in runs."""
        size = self.layout.chunk_shape[axis]
        first, last = number * size, min((number + 1) * size, self.layout.shape[axis])
        if axis not in self.site.taken:
            yield slice(0, last - first), slice(first, last)
            return
        places = self.site.taken[axis]
        mine = np.flatnonzero((places >= first) & (places < last))
        breaks = np.flatnonzero((np.diff(mine) != 1) | (np.diff(places[mine]) != 1)) + 1
        for run in np.split(mine, breaks):
            source, place = int(places[run[0]]) - first, int(run[0])
            yield slice(source, source + len(run)), slice(place, place + len(run))

    @staticmethod
    def _put(put: Put, wanted: Rows, values: Any, part: Part | None, scratch: Scratch) -> None:
        began = time.perf_counter()
        put(wanted, values, part)
        scratch.seconds["gather"] += time.perf_counter() - began

    def _chunk_of(self, first: Sequence[int], part: Sequence[int]) -> tuple[int, ...]:
        chunk = [0] * self.layout.ndim
        for axis, sample in zip(self.site.sample_axes, first, strict=True):
            chunk[axis] = sample // self.layout.chunk_shape[axis]
        for axis, number in zip(self.site.row_axes, part, strict=True):
            chunk[axis] = number
        return tuple(chunk)

    def _reach(self, rows: Rows, box: Box) -> tuple[int, int]:
        """The bounds along the first sample axis of what is wanted, where they are known without a search."""
        if len(box.extent) == 1 and isinstance(rows, slice) and rows.stop is not None:
            return rows.start or 0, rows.stop
        return 0, box.extent[0]

    def _values(
        self, chunk: tuple[int, ...], extent: Sequence[int], reach: tuple[int, int], scratch: Scratch, *, few: bool
    ) -> NDArray[Any]:
        """The samples of a chunk in C order, (n, *part of the row shape); outside of `reach` they may be undefined."""
        every = (0, self.layout.chunk_shape[0]) if self.layout.ndim else (0, 1)
        data = self.chunk(chunk, reach if self._order[:1] == (0,) else every, scratch, few=few)
        shape = tuple(
            min(size, end - start) for size, (start, end) in zip(extent, self._sample_box(chunk), strict=True)
        )
        rest = tuple(end - start for start, end in self._row_box(chunk))
        if data is None:
            return np.broadcast_to(np.asarray(self.layout.fill_value, self.layout.native), (int(np.prod(shape)), *rest))
        cut = tuple(slice(0, size) for size in (*shape, *rest))
        return data.transpose(self._order)[cut].reshape(-1, *rest)

    def _sample_box(self, chunk: Sequence[int]) -> list[tuple[int, int]]:
        box = self.layout.box(chunk)
        return [box[a] for a in self.site.sample_axes]

    def _row_box(self, chunk: Sequence[int]) -> list[tuple[int, int]]:
        box = self.layout.box(chunk)
        return [box[a] for a in self.site.row_axes]

    def chunk(
        self, chunk: tuple[int, ...], rows: tuple[int, int], scratch: Scratch, *, few: bool
    ) -> NDArray[Any] | None:
        """A decoded chunk, from the cache if there is one; None if absent. Of its first axis `rows` will be used."""
        scratch.reading = (ChunkName(self.layout.name, chunk), time.monotonic())
        scratch.chunks += 1
        try:
            if self.cache is None:
                return self.reader.read(chunk, rows, scratch, few=few)
            everything = (0, self.layout.chunk_shape[0]) if self.layout.ndim else (0, 1)
            return self.cache.get(
                self.key(chunk),
                lambda: self.reader.read(chunk, everything, scratch),
                lambda: self._version(chunk, scratch),
            )
        finally:
            scratch.reading = None

    def _version(self, chunk: tuple[int, ...], scratch: Scratch) -> Version | None:
        """What a chunk's source is now; asked for where that is not known yet, and the chunk is kept."""
        now = self.reader.version(chunk)
        if now is None and self.keeps(chunk):
            self.reader.look(chunk, scratch)
            now = self.reader.version(chunk)
        return now

    def _parts(self, box: Box, rows: Rows) -> Iterator[tuple[tuple[int, ...], Rows, Rows]]:
        """The chunks that a cell touches: first sample, rows in the chunk, and which of the wanted rows they are."""
        chunks = [self.layout.chunk_shape[a] for a in self.site.sample_axes]
        spans = [range(o // c * c, o + e, c) for o, e, c in zip(box.origin, box.extent, chunks, strict=True)]
        if len(spans) == 1 and isinstance(rows, slice):
            yield from self._slices(box, rows, spans[0], chunks[0])
            return
        local = np.arange(*rows.indices(int(np.prod(box.extent))), dtype=np.int64) if isinstance(rows, slice) else rows
        where = [w + o for w, o in zip(np.unravel_index(local, box.extent), box.origin, strict=True)]
        for first in itertools.product(*spans):
            inside = np.ones(len(local), dtype=bool)
            for w, f, c in zip(where, first, chunks, strict=True):
                inside &= (w >= f) & (w < f + c)
            wanted = np.flatnonzero(inside)
            if wanted.size:
                extent = tuple(
                    min(c, self.layout.shape[a] - f)
                    for a, f, c in zip(self.site.sample_axes, first, chunks, strict=True)
                )
                at = tuple(w[wanted] - f for w, f in zip(where, first, strict=True))
                yield first, np.ravel_multi_index(at, extent), wanted

    @staticmethod
    def _slices(box: Box, rows: slice, firsts: range, chunk: int) -> Iterator[tuple[tuple[int, ...], slice, slice]]:
        start, stop, _ = rows.indices(box.extent[0])
        begin = box.origin[0] + start
        end = box.origin[0] + stop
        for first in firsts:
            low, high = max(first, begin), min(first + chunk, end)
            if low < high:
                yield (first,), slice(low - first, high - first), slice(low - begin, high - begin)


def _few(rows: Rows, extent: Sequence[int]) -> bool:
    """Whether these are scattered rows of a chunk, less than a quarter of it."""
    return not isinstance(rows, slice) and 4 * len(rows) < math.prod(extent)


def _whole(rows: Rows, count: int) -> bool:
    return isinstance(rows, slice) and rows.indices(count)[:2] == (0, count)
