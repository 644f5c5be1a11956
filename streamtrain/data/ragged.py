"""Rows of different lengths: kept as their elements, and laid out as a whole batch only when that is made. Pure.

Its law: a row's elements lie together, in the order of the epoch, so that those of a batch are one run. Zeros and
padding cost memory in the batch alone, never in a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.block import ALIGN, Bytes, Column
from streamtrain.data.permutation import Ints

LONG = 128
"""Rows of at least so many elements (on average) are copied one by one, shorter ones all together by their places."""
SHORT_BYTES = 1 << 16
"""Runs of at most so many bytes are copied with the interpreter's lock held: to hand it over takes longer."""
TILE = 1 << 15
"""Elements that are laid out together: their places stay in the processor's cache."""
TILE_BYTES = 2 << 20
"""Bytes of a batch that are filled together, so that they are in a cache still when elements are put there."""
SCRATCH_BYTES = 4 * TILE * 8
"""What a thread takes for that."""


@dataclass(frozen=True)
class Piece:
    """What an element has: of this dtype and shape."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Run:
    """A part of some rows: of row i `lengths[i]` of elements, from number `skipped[i]` on; in each array they
    lie together from `starts[i]` on."""

    arrays: Mapping[int, NDArray[Any]]
    """Values (0) and columns (1), or one of them."""
    starts: Ints
    lengths: Ints
    skipped: Ints
    repeated: bool = False
    """Whether a row may name a column twice."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: slice | NDArray[Any]) -> Run:
        return Run(self.arrays, self.starts[rows], self.lengths[rows], self.skipped[rows], self.repeated)


class SparseRows(NamedTuple):
    """Rows as their numbers that are not zero: those of row i are `indptr[i]` to `indptr[i + 1]` of `data`, each in the
    column that `indices` has for it, as in a CSR matrix."""

    data: NDArray[Any]
    indices: NDArray[Any]
    indptr: NDArray[Any]
    shape: tuple[int, int]

    def added_up(self) -> SparseRows:
        """The same with rising columns in each row, numbers of one column added up."""
        rows = np.repeat(np.arange(self.shape[0], dtype=np.int64), np.diff(self.indptr))
        places, where = np.unique(rows * self.shape[1] + self.indices, return_inverse=True)
        data = np.zeros(len(places), dtype=self.data.dtype)
        np.add.at(data, where, self.data)
        counts = np.bincount(places // self.shape[1], minlength=self.shape[0])
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(self.indptr.dtype)
        return SparseRows(data, (places % self.shape[1]).astype(self.indices.dtype), indptr, self.shape)

    def take(self, keep: Ints) -> SparseRows:
        """Some of the rows, copied."""
        starts, lengths = self.indptr[keep].astype(np.int64), np.diff(self.indptr)[keep].astype(np.int64)
        ends = np.cumsum(lengths)
        data, indices = (np.empty(int(lengths.sum()), dtype=array.dtype) for array in (self.data, self.indices))
        for out, source in ((data, self.data), (indices, self.indices)):
            copy_runs(out, ends - lengths, source, starts, lengths)
        indptr = np.concatenate([[0], ends]).astype(self.indptr.dtype)
        return SparseRows(data, indices, indptr, (len(keep), self.shape[1]))


@dataclass(frozen=True)
class RaggedColumn(Column):
    """A column whose rows have different lengths: `row_shape` is that of a row laid out."""

    pieces: tuple[Piece, ...] = ()
    """Of an element: its value; of sparse rows then the number of its column."""
    most: int = 0
    """Elements that a block has room for."""
    fill: float = 0
    """What lies where a row has no element."""
    kept_sparse: bool = False
    """Whether batches have `SparseRows`, which are not laid out."""

    @property
    def sparse(self) -> bool:
        """Whether elements tell their own columns."""
        return len(self.pieces) == 2

    @cached_property
    def slot_bytes(self) -> int:
        """In a block: where each row of a batch begins, and the end of the last."""
        return _aligned(8 * (self.batch_size + 1))

    @property
    def area_bytes(self) -> int:
        """In a block: the elements of all its rows."""
        return sum(_aligned(self.most * piece.bytes) for piece in self.pieces)

    @property
    def batch_bytes(self) -> int:
        """Of a batch, laid out, where it is."""
        return self.slot_bytes if self.kept_sparse else _aligned(self.batch_size * self.row_bytes)

    def store(self, memory: Bytes, slots: int) -> Area:
        """The column's part of a block."""
        return Area(self, memory, slots)


class Area:
    """The elements of a block's rows, in the order of their places. Places are counted from the block's first."""

    def __init__(self, column: RaggedColumn, memory: Bytes, slots: int) -> None:
        self.column = column
        table = memory[: slots * column.slot_bytes].view(np.int64).reshape(slots, -1)
        self._starts: NDArray[np.int64] = table[:, : column.batch_size + 1]
        self._starts[:] = 0
        self._arrays: list[NDArray[Any]] = []
        at = slots * column.slot_bytes
        for piece in column.pieces:
            part = memory[at : at + column.most * piece.bytes].view(piece.dtype)
            self._arrays.append(part.reshape(column.most, *piece.shape))
            at += _aligned(column.most * piece.bytes)
        self._next = self._end = 0
        self._repeated = False

    def lay(self, first: int, lengths: Ints) -> None:
        """Set aside room for rows of these lengths, at the places from `first` on; runs of places come in order."""
        skipped = np.zeros(first - self._next, dtype=np.int64)
        lengths = np.concatenate([skipped, lengths])
        places = np.arange(self._next, self._next + len(lengths))
        slot, inside = np.divmod(places, self.column.batch_size)
        ends = self._end + np.cumsum(lengths)
        self._starts[slot, inside + 1] = ends
        heads = inside == 0
        self._starts[slot[heads], 0] = ends[heads] - lengths[heads]
        self._next += len(lengths)
        self._end = int(ends[-1]) if len(ends) else self._end
        assert self._end <= self.column.most

    def put(self, places: Ints, rows: Run) -> None:
        """Copy rows to their places; from several threads, since no two rows share one."""
        slot, inside = np.divmod(places, self.column.batch_size)
        to = self._starts[slot, inside] + rows.skipped
        if rows.repeated:
            self._repeated = True
        for number, source in rows.arrays.items():
            copy_runs(self._arrays[number], to, source, rows.starts, rows.lengths)

    def elements(self, slot: int, rows: int) -> tuple[list[NDArray[Any]], Ints]:
        """Of the first rows of a batch: their elements, and where each begins among them, the end of the last too."""
        starts = self._starts[slot, : rows + 1]
        first, last = int(starts[0]), int(starts[-1])
        return [array[first:last] for array in self._arrays], starts - first

    def sparse(self, slot: int, rows: int) -> SparseRows:
        """The first rows of a batch: views of the block, but for their offsets."""
        (values, columns), starts = self.elements(slot, rows)
        found = SparseRows(values, columns, starts.astype(columns.dtype), (rows, self.column.row_shape[0]))
        return found.added_up() if self._repeated else found

    def lay_out(self, slot: int, rows: int, out: NDArray[Any]) -> None:
        """Fill `out` (rows, *row_shape) with the first rows of a batch."""
        (values, *columns), starts = self.elements(slot, rows)
        places = out.reshape(rows * out.shape[1], *out.shape[2:])
        for first, last in _tiles(starts, max(1, TILE_BYTES // max(1, self.column.row_bytes))):
            begin, end = int(starts[first]), int(starts[last])
            tile = places[first * out.shape[1] : last * out.shape[1]]
            _fill(tile, self.column.fill)
            lengths = np.diff(starts[first : last + 1])
            origins = np.arange(last - first, dtype=np.int64) * out.shape[1]
            if columns:
                where = np.repeat(origins, lengths)
                where += columns[0][begin:end]
            else:
                where = np.repeat(origins - starts[first:last], lengths)
                where += np.arange(begin, end)
            found = values[begin:end].astype(out.dtype, copy=False)
            if self._repeated:
                np.add.at(tile, where, found)
            else:
                tile[where] = found


def _fill(tile: NDArray[Any], number: float) -> None:
    """Fill contiguous memory; zeros by bytes, which takes half the time of numbers."""
    if number == 0:
        tile.view(np.uint8).fill(0)
    else:
        tile.fill(number)


def _tiles(starts: Ints, most_rows: int) -> list[tuple[int, int]]:
    """Rows by the handful: of at most TILE elements, where one row has not more, and at most so many rows."""
    found, first, rows = [], 0, len(starts) - 1
    while first < rows:
        fitting = int(np.searchsorted(starts, starts[first] + TILE, side="right")) - 1
        last = min(max(first + 1, fitting), first + most_rows, rows)
        found.append((first, last))
        first = last
    return found


def copy_runs(out: NDArray[Any], to: Ints, source: NDArray[Any], starts: Ints, lengths: Ints) -> None:
    """Copy the runs of `source` that begin at `starts` to the places `to`."""
    if int(lengths.sum()) >= LONG * len(lengths):
        into: Any = out
        given: Any = source
        each = 1
        if lengths.max(initial=0) * (size := _bytes_of_one(out)) <= SHORT_BYTES and _plain(source, out):
            into, given, each = _as_bytes(out), _as_bytes(source), size
        bounds = (to * each).tolist(), (starts * each).tolist(), (lengths * each).tolist()
        for place, start, length in zip(*bounds, strict=True):
            into[place : place + length] = given[start : start + length]
        return
    before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    for first, last in _tiles(before, len(lengths)):
        count = np.arange(before[first], before[last])
        here = lengths[first:last]
        where = np.repeat(to[first:last] - before[first:last], here) + count
        begin = int(starts[first])
        if np.array_equal(starts[first:last] - begin, before[first:last] - before[first]):
            out[where] = source[begin : begin + len(count)]
        else:
            out[where] = source[np.repeat(starts[first:last] - before[first:last], here) + count]


def _plain(source: NDArray[Any], out: NDArray[Any]) -> bool:
    """Whether elements lie together in both, as they are wanted, and in memory of ours: what can't be written to may be
    a map of a file, whose pages may have to come from a disk."""
    together = source.flags.c_contiguous and out.flags.c_contiguous
    return together and source.flags.writeable and source.dtype == out.dtype


def _bytes_of_one(array: NDArray[Any]) -> int:
    return math.prod(array.shape[1:]) * array.dtype.itemsize


def _as_bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def strictly_rising(columns: NDArray[Any], ends: Ints) -> bool:
    """Whether the columns of each row rise, none named twice; the rows lie one after another, and end there."""
    if len(columns) < 2:
        return True
    rises = columns[1:] > columns[:-1]
    rises[ends[:-1] - 1] = True
    return bool(rises.all())


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True, eq=False)
class Table:
    """Where each row's elements begin; kept in memory, 8 bytes a row."""

    offsets: Ints
    """One more than there are rows; they never fall."""
    longest: int | None = None
    """Elements that are taken of a row at most."""

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def of(self, numbers: slice | Ints) -> tuple[Ints, Ints]:
        """Where the elements of these rows begin, and how many are taken."""
        if isinstance(numbers, slice):
            starts, ends = self.offsets[numbers], self.offsets[numbers.start + 1 : numbers.stop + 1]
        else:
            starts, ends = self.offsets[numbers], self.offsets[numbers + 1]
        lengths = ends - starts
        return starts, lengths if self.longest is None else np.minimum(lengths, self.longest)

    @property
    def lengths(self) -> Ints:
        """Elements that are taken of each row."""
        return self.of(slice(0, self.rows))[1]

    def span(self, rows: int) -> int:
        """Most elements of so many rows together, those between that are not taken included."""
        firsts = np.arange(0, self.rows, rows)
        lasts = np.minimum(firsts + rows, self.rows)
        return int((self.offsets[lasts] - self.offsets[firsts]).max(initial=0))
