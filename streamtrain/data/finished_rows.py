"""Finished rows of shuffled epochs: what a transform made of each sample, from which the next order takes its batches.

Its law: a batch is given from here only if each of its samples is known: kept, or left out by the transform. The order
is arithmetic, so which they are is known before anything is read. Asked for by `cache_transform=True` alone, which says
that the transform makes the same of a sample whatever the others in its batch are.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.budget import Share, format_bytes
from streamtrain.data.finished import LARGEST, FinishedStatistics, Key
from streamtrain.data.order import EpochOrder
from streamtrain.data.permutation import Ints
from streamtrain.data.transform import aligned_copy, batch_bytes

logger = logging.getLogger(__name__)

UNKNOWN, LEFT_OUT = -1, -2
BLOCKS = 2
"""Blocks of an order whose samples' numbers are kept in mind: a batch lies in one or two."""


@dataclass(frozen=True)
class _Store:
    """Room for the rows of all samples."""

    like: Batch
    """A batch without rows: what its parts are called, and how they nest."""
    leaves: list[NDArray[Any]]
    """Of each array in it, a row for each sample, in the order in which they came."""
    slots: Ints
    """Of each sample of the store, by number: its row, UNKNOWN or LEFT_OUT."""
    size: int


class FinishedRows:
    """Rows of one stream, all or none: a part of them would give hardly a whole batch."""

    def __init__(self, capacity: int, share: Share, *, samples: int, numbers: int) -> None:
        """`samples` of an epoch, numbered below `numbers`."""
        self.capacity, self.on = capacity, capacity > 0
        self._share, self._samples, self._numbers = share, samples, numbers
        self._lock = threading.Lock()
        self._store: _Store | None = None
        self._filled = 0
        self._hits = self._misses = self._refused = 0

    def of(self, order: EpochOrder, batch_size: int, *, drop_last: bool) -> RowsInOrder:
        """The batches of one epoch."""
        return RowsInOrder(self, order, batch_size, drop_last=drop_last)

    def take(self, numbers: Ints) -> Batch | None:
        """A batch of these samples (without those left out), if all are known."""
        with self._lock:
            store = self._store
            found = None if store is None else store.slots[numbers]
            if store is None or found is None or (found == UNKNOWN).any():
                return None
            rows = iter([aligned_copy(leaf[found[found >= 0]]) for leaf in store.leaves])
            like = store.like
            self._hits += bool((found >= 0).any())
        index = aligned_copy(numbers[found >= 0])
        return Batch(_mapped(like.inputs, lambda _: next(rows)), _mapped(like.targets, lambda _: next(rows)), index)

    def keep(self, numbers: Ints, batch: Batch) -> None:
        """Keep what became of these samples."""
        self._misses += 1
        if not self.on:
            return
        try:
            leaves, index = _leaves(batch), _plain(batch.index)
            if self._store is None and not self._make(batch, leaves):
                self._refused += 1
                return
        except TypeError as error:
            self.stop(f"it makes {error}")
            return
        with self._lock:
            store = self._store
            if store is None:  # given up meanwhile
                return
            if list(map(_kind, leaves)) != list(map(_kind, store.leaves)):
                wrong = "rows of another shape or dtype in one batch than in another"
            elif len(np.unique(index)) < len(index):
                wrong = "several rows of one sample"
            elif self._filled + np.count_nonzero(store.slots[index] < 0) > self._samples:
                wrong = "more rows than there are samples"
            else:
                self._put(store, numbers, leaves, index)
                return
        self.stop(f"it makes {wrong}")

    def leave_out(self, numbers: Ints) -> None:
        """The transform has left these out, at the epoch's end."""
        with self._lock:
            if self._store is not None:
                store = self._store
                store.slots[numbers[store.slots[numbers] == UNKNOWN]] = LEFT_OUT

    def _put(self, store: _Store, numbers: Ints, leaves: list[NDArray[Any]], index: Ints) -> None:
        new = store.slots[index] < 0  # of an epoch that began over some are there
        index, first = index[new], self._filled
        for kept, leaf in zip(store.leaves, leaves, strict=True):
            kept[first : first + len(index)] = leaf[new]
        self._filled += len(index)
        gone = numbers[store.slots[numbers] == UNKNOWN]
        store.slots[gone] = LEFT_OUT
        store.slots[index] = np.arange(first, self._filled)

    def _make(self, batch: Batch, leaves: list[NDArray[Any]]) -> bool:
        """Whether there is room for all samples' rows, which is granted then. Raises TypeError for what is no rows."""
        if batch_bytes(batch) > LARGEST:
            raise TypeError(f"batches of more than {format_bytes(LARGEST)}")
        row = sum(leaf.nbytes // max(1, len(leaf)) for leaf in leaves)
        size = self._samples * row + 8 * self._numbers
        if size > self.capacity:
            self.stop(
                f"those of all {self._samples} samples take {format_bytes(size)} of {format_bytes(self.capacity)}"
            )
            return False
        if not len(batch) or self._share.free < size or not self._share.try_acquire(size):
            return False
        store = _Store(
            Batch(_mapped(batch.inputs, _head), _mapped(batch.targets, _head), batch.index),
            [np.empty((self._samples, *leaf.shape[1:]), dtype=leaf.dtype) for leaf in leaves],
            np.full(self._numbers, UNKNOWN, dtype=np.int64),
            size,
        )
        with self._lock:
            self._store, self._filled = store, 0
        return True

    def clear(self) -> None:
        """Forget all, from any thread: somebody else needs the bytes."""
        with self._lock:
            store, self._store, self._filled = self._store, None, 0
        if store is not None:
            self._share.release(store.size)

    def stop(self, reason: str) -> None:
        """Keep nothing any more."""
        if self.on:
            self.on = False
            logger.info("finished rows are not kept: %s", reason)
        self.clear()

    def __del__(self) -> None:
        if self._store is not None:
            self._share.release_from_finalizer(self._store.size)

    def statistics(self) -> FinishedStatistics:
        """How it does now; hits, misses and refusals count batches."""
        store = self._store
        size = 0 if store is None else store.size
        return FinishedStatistics(self._hits, self._misses, self._refused, size, self.capacity)


class RowsInOrder:
    """Batches of one epoch out of kept rows; what a `KeptPass` asks."""

    def __init__(self, rows: FinishedRows, order: EpochOrder, batch_size: int, *, drop_last: bool) -> None:
        self._rows, self._order, self._size = rows, order, batch_size
        self._drop_last = drop_last
        self._known: collections.OrderedDict[int, Ints] = collections.OrderedDict()

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self._rows.on

    def begin_pass(self) -> None:
        """Nothing goes by passes here."""

    def get(self, key: Key) -> tuple[bool, Batch | None]:
        """Whether it is known, and the batch that comes at this position (None: nothing more)."""
        start, end = key[1], self._end(key[1])
        while start < end:
            stop = min(start + self._size, self._order.num_samples)
            batch = self._rows.take(self._samples(start, stop))
            if batch is None:
                return False, None
            if len(batch):
                batch.cursor = Cursor(key[0], stop)
                return True, batch
            start = stop
        return True, None

    def put(self, key: Key, batch: Batch | None) -> None:
        """Keep its rows; batches without any that came before it are known by the same."""
        if batch is not None:
            self._rows.keep(self._samples(key[1], batch.cursor.position), batch)
        elif key[1] < self._end(key[1]) and self._rows.on:
            self._rows.leave_out(self._samples(key[1], self._end(key[1])))

    def _end(self, start: int) -> int:
        """Where batches end that begin there: what `drop_last` drops depends on where a pass began."""
        rest = self._order.num_samples - start
        return start + (rest // self._size * self._size if self._drop_last else rest)

    def _samples(self, start: int, stop: int) -> Ints:
        """The numbers of the samples at these positions."""
        order = self._order
        if order.scattered:
            return self._of(order.run(start, stop), start, stop)
        parts: list[Ints] = []
        while start < stop:
            block = order.block_of(start)
            first, following = order.block_start(block), order.block_start(block + 1)
            last = min(stop, following)
            if block not in self._known:
                self._known[block] = self._of(order.pieces(block), first, following)
                while len(self._known) > BLOCKS:
                    self._known.popitem(last=False)
            parts.append(self._known[block][start - first : last - first])
            start = last
        return np.concatenate(parts)

    def _of(self, pieces: Any, start: int, stop: int) -> Ints:
        found = np.empty(stop - start, dtype=np.int64)
        for piece in pieces:
            rows, at = self._order.place(piece)
            local = np.arange(rows.start, rows.stop, dtype=np.int64) if isinstance(rows, slice) else rows
            where = slice(at.start - start, at.stop - start) if isinstance(at, slice) else at - start
            found[where] = self._order.split.grid.numbers(piece.cell, local)
        return found


def _mapped(tree: Any, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Any:
    """The tree with each of its arrays changed. Raises TypeError for what is neither arrays nor None."""
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(_mapped(value, change) for value in tree)
    return None if tree is None else change(_plain(tree))


def _plain(leaf: Any) -> NDArray[Any]:
    if hasattr(leaf, "detach"):
        try:
            leaf = leaf.numpy()
        except TypeError:
            raise TypeError("sparse tensors, which are not taken apart into rows") from None
    if not isinstance(leaf, np.ndarray):
        raise TypeError(f"a {type(leaf).__name__}, which has no rows")
    return leaf


def _leaves(batch: Batch) -> list[NDArray[Any]]:
    found: list[NDArray[Any]] = []

    def note(leaf: NDArray[Any]) -> NDArray[Any]:
        if not leaf.ndim or len(leaf) != len(batch):
            raise TypeError("arrays that have not one row for each sample")
        found.append(leaf)
        return leaf

    _mapped(batch.inputs, note)
    _mapped(batch.targets, note)
    return found


def _kind(leaf: NDArray[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """What its rows are."""
    return leaf.shape[1:], leaf.dtype


def _head(leaf: NDArray[Any]) -> NDArray[Any]:
    return leaf[:0].copy()
