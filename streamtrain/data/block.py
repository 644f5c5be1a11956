"""Blocks: many batches in one leased buffer, each batch's part of each array in an aligned slot of its own.

Its law: a batch is a view, never a copy, and its buffer comes back when the last view of it has died. Slots begin at
multiples of 64 bytes, because alignment changes the results of matrix products bit by bit.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.budget import Share
from streamtrain.data.permutation import Ints, numbers_in
from streamtrain.data.reading import anonymous

ALIGN = 64
SPARE = 4096
"""Bytes of padding that a slot may cost for rows to lie at one pitch throughout the buffer."""
POISON = 0xA5

Bytes = NDArray[np.uint8]
_NOTHING: Bytes = np.empty(0, dtype=np.uint8)
Places = slice | Ints


@dataclass(frozen=True)
class Column:
    """One array's part in every batch: rows of this shape and (native) dtype, `batch_size` of them in a slot."""

    name: str
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    batch_size: int

    @property
    def area_bytes(self) -> int:
        """Bytes in a block beside its slots: the elements of rows of different lengths (`ragged.RaggedColumn`)."""
        return 0

    @cached_property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    @cached_property
    def pitch(self) -> int:
        """Rows from one slot to the next, where slots lie at whole rows; else 0."""
        unit = ALIGN // math.gcd(ALIGN, self.row_bytes)
        rows = -(-self.batch_size // unit) * unit
        waste = (rows - self.batch_size) * self.row_bytes
        return rows if waste <= max(SPARE, self.batch_size * self.row_bytes // 4) else 0

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes from one slot to the next."""
        size = self.batch_size * self.row_bytes
        return self.pitch * self.row_bytes if self.pitch else -(-size // ALIGN) * ALIGN

    @property
    def batch_bytes(self) -> int:
        """Bytes of a batch as it is handed over."""
        return self.slot_bytes

    @cached_property
    def mover(self) -> np.dtype[Any]:
        """A dtype of a row's width whose copies are plain moves of bytes."""
        return np.dtype(f"u{self.row_bytes}" if self.row_bytes in (1, 2, 4, 8) else (np.void, self.row_bytes))


class Store(Protocol):
    """What has a block's rows of one column in a way of its own; places are counted from the block's first."""

    def lay(self, first: int, lengths: Ints) -> None:
        """Set aside room for rows of these lengths."""

    def put(self, places: Ints, rows: Any) -> None:
        """Copy rows to their places."""

    def lay_out(self, slot: int, rows: int, out: NDArray[Any]) -> None:
        """Fill `out` with the first rows of a batch."""

    def sparse(self, slot: int, rows: int) -> Any:
        """The first rows of a batch, where they are not to be laid out."""


@runtime_checkable
class Storing(Protocol):
    """A column whose rows are not kept as they are handed over."""

    def store(self, memory: Bytes, slots: int) -> Store:
        """Its part of a block."""


def block_bytes(columns: Sequence[Column], slots: int) -> int:
    """Bytes of a buffer with this many slots of each column."""
    return sum(slots * column.slot_bytes + column.area_bytes for column in columns)


class Block:
    """The slots of `slots` batches, the first of which begins at position `first` of the epoch.

    Rows arrive in any order and from several threads; nobody waits for anybody, since no two rows share a place.
    """

    def __init__(self, root: Bytes, columns: Sequence[Column], first: int, slots: int) -> None:
        self.columns, self.first, self.slots = columns, first, slots
        self.batch_size = columns[0].batch_size
        self._slots: list[NDArray[Any]] = []
        self._rows: list[NDArray[Any] | None] = []
        self._areas: dict[int, Store] = {}
        start = 0
        for number, column in enumerate(columns):
            part = root[start : start + block_bytes([column], slots)]
            start += len(part)
            if isinstance(column, Storing):
                self._areas[number] = column.store(part, slots)
                self._slots.append(_NOTHING)
                self._rows.append(None)
                continue
            self._slots.append(_slots(part, column, slots))
            self._rows.append(part.view(column.mover) if column.pitch else None)

    @property
    def stop(self) -> int:
        """The position after the last slot."""
        return self.first + self.slots * self.batch_size

    def put(self, number: int, at: Places, values: Any) -> None:
        """Copy rows of column `number` to these positions of the epoch, cast to the column's dtype."""
        column, rows = self.columns[number], self._rows[number]
        if number in self._areas:
            self._areas[number].put(numbers_in(at) - self.first, values)
            return
        plain = values.dtype == column.dtype and (
            values.flags.c_contiguous or (values.size and values[0].flags.c_contiguous)
        )
        if rows is None:
            slot, inside = np.divmod(numbers_in(at) - self.first, self.batch_size)
            self._slots[number][slot, inside] = values
        elif plain:
            rows[self._flat(column, at)] = _as_items(values, column.mover)
        else:
            self._typed(number)[self._flat(column, at)] = values

    def put_part(self, number: int, at: Places, values: NDArray[Any], part: tuple[slice | int, ...]) -> None:
        """The same for a part of each row."""
        slot, inside = np.divmod(numbers_in(at) - self.first, self.batch_size)
        where: tuple[Any, ...] = (slot, inside, *part)
        self._slots[number][where] = values

    def gather(self, sources: Mapping[int, NDArray[Any]], numbers: int, start: int, stop: int) -> None:
        """Copy to the positions from `start` to `stop` the rows whose numbers column `numbers` has there.

        `sources`: of each column its rows (n, *row_shape), which lie together and have the column's dtype. One call for
        each in all, or one a batch where slots have padding between them.
        """
        items = {number: _as_items(source, self.columns[number].mover) for number, source in sources.items()}
        together = all(self.columns[number].pitch == self.batch_size for number in (numbers, *items))
        at, stop = start - self.first, stop - self.first
        while at < stop:
            slot, inside = divmod(at, self.batch_size)
            count = stop - at if together else min(stop - at, self.batch_size - inside)
            which = self._typed(numbers)[self._run(numbers, slot, inside, count)]
            for number, source in items.items():
                rows = self._rows[number]
                assert rows is not None
                source.take(which, out=rows[self._run(number, slot, inside, count)], mode="clip")
            at += count

    def _run(self, number: int, slot: int, inside: int, count: int) -> slice:
        first = slot * self.columns[number].pitch + inside
        return slice(first, first + count)

    def lay(self, number: int, first: int, lengths: Ints) -> None:
        """Set aside room for rows of these lengths, at the positions from `first` on."""
        self._areas[number].lay(first - self.first, lengths)

    def batch(self, slot: int, rows: int, room: Bytes | None = None) -> Iterator[Any]:
        """The columns of the first `rows` samples in this slot: views, (rows, *row_shape) each.

        Rows of different lengths are laid out in `room`, one such column after another. Where there are none, but a
        room: all columns are copies in it.
        """
        if room is not None and not self._areas:
            yield from self._copied(slot, rows, room)
            return
        start = 0
        for number, (column, views) in enumerate(zip(self.columns, self._slots, strict=True)):
            if number not in self._areas:
                yield views[slot, :rows]
                continue
            if getattr(column, "kept_sparse", False):
                yield self._areas[number].sparse(slot, rows)
                continue
            assert room is not None
            part = room[start : start + self.batch_size * column.row_bytes]
            start += column.batch_bytes
            laid = part.view(column.dtype).reshape(self.batch_size, *column.row_shape)[:rows]
            self._areas[number].lay_out(slot, rows, laid)
            yield laid

    def _copied(self, slot: int, rows: int, room: Bytes) -> Iterator[NDArray[Any]]:
        """The same columns in a buffer of their own, which is a block of one batch."""
        for copy, views in zip(Block(room, self.columns, 0, 1).batch(0, rows), self._slots, strict=True):
            copy[...] = views[slot, :rows]
            yield copy

    def _typed(self, number: int) -> NDArray[Any]:
        column, rows = self.columns[number], self._rows[number]
        assert rows is not None
        return rows.view(np.uint8).view(column.dtype).reshape(-1, *column.row_shape)

    def _flat(self, column: Column, at: Places) -> Places:
        """Positions of the epoch as rows of the buffer."""
        if column.pitch == self.batch_size:
            return slice(at.start - self.first, at.stop - self.first) if isinstance(at, slice) else at - self.first
        slot, inside = np.divmod(numbers_in(at) - self.first, self.batch_size)
        return slot * column.pitch + inside


def _as_items(values: NDArray[Any], mover: np.dtype[Any]) -> NDArray[Any]:
    """Rows as items of one dtype: no copy, also where rows overlap or lie apart."""
    if values.flags.c_contiguous:
        flat = values if values.ndim < 3 else values.reshape(len(values), -1)
        return flat.view(mover).reshape(len(values))
    first = values[:1].reshape(-1).view(mover)  # a view, since a row lies together
    return np.lib.stride_tricks.as_strided(first, shape=(len(values),), strides=values.strides[:1], writeable=False)


def _slots(part: Bytes, column: Column, slots: int) -> NDArray[Any]:
    """The buffer as (slots, batch_size, *row_shape), with the padding left out."""
    inner = np.empty(column.row_shape, dtype=column.dtype).strides
    return np.lib.stride_tricks.as_strided(
        part.view(column.dtype) if part.size else np.empty(0, dtype=column.dtype),
        shape=(slots, column.batch_size, *column.row_shape),
        strides=(column.slot_bytes, column.row_bytes, *inner),
    )


class _Lease(weakref.ref[Bytes]):
    """Tells the account of its pool that the root array of a buffer has died."""

    __slots__ = ("memory",)
    memory: Bytes


_LEASES: dict[int, _Lease] = {}
"""All that are out, of every pool, by their `id`. A lease that is garbage together with its array tells nobody: the
bytes of a cycle that keeps a pass, or of batches that outlive their stream, would be lost for good."""


class _Account:
    """What a pool's leases refer to: not the pool itself, so that letting go of a pool ends it at once."""

    def __init__(self, size: int, share: Share) -> None:
        self.size, self.share = size, share
        self.returned: deque[Bytes] = deque()
        self.out: set[int] = set()
        """Leases of this pool."""
        self.closed = False

    def back(self, lease: weakref.ref[Bytes]) -> None:
        """A finalizer: it may run at any moment and in any thread, so that it takes no lock."""
        assert isinstance(lease, _Lease)
        del _LEASES[id(lease)]
        self.out.discard(id(lease))
        if self.closed:
            self.share.release_from_finalizer(self.size)
        else:
            self.returned.append(lease.memory)


class Pool:
    """Buffers of one size, granted by a budget; each comes back when the last view of its root array has died."""

    def __init__(self, size: int, share: Share, *, poison: bool = False) -> None:
        self.size = size
        self._share = share
        self._poison = poison
        self._account = _Account(size, share)
        idle = self._account.returned
        self._lend = lambda: _give_back(idle, size, share.release)
        share.lend.append(self._lend)

    @property
    def out(self) -> int:
        """Buffers that somebody still looks at."""
        return len(self._account.out)

    @property
    def made(self) -> int:
        """Buffers that there are, idle ones too."""
        return len(self._account.out) + len(self._account.returned)

    def take(self, *, keep_free: int = 0) -> Bytes | None:
        """The root array of a buffer, its content undefined; None if the budget, less `keep_free`, grants no more."""
        try:
            memory = self._account.returned.pop()  # the last one is warm; another stream may take it first
            if self._poison:
                memory[:] = POISON
        except IndexError:
            if keep_free and self._share.free < self.size + keep_free:
                return None
            if not self._share.try_acquire(self.size):
                return None
            memory = anonymous(self.size)
        root: Bytes = np.frombuffer(memory.data, dtype=np.uint8)
        lease = _Lease(root, self._account.back)
        lease.memory = memory
        self._account.out.add(id(lease))
        _LEASES[id(lease)] = lease
        return root

    def close(self) -> None:
        """Give back what is free now, and the rest when its last views die."""
        self._account.closed = True
        _give_back(self._account.returned, self.size, self._share.release)
        if self._lend in self._share.lend:
            self._share.lend.remove(self._lend)

    def __del__(self) -> None:
        account = self._account
        account.closed = True
        _give_back(account.returned, account.size, account.share.release_from_finalizer)


def _give_back(idle: deque[Bytes], size: int, release: Callable[[int], None]) -> None:
    while idle:
        try:
            idle.pop()
        except IndexError:  # another thread was faster
            return
        release(size)
