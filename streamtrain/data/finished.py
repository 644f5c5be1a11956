"""Finished batches, kept after the transform: the next pass over the same order neither reads nor transforms them.

Its law: what is kept is a copy and what is given is a copy, so batches stay private; bytes are granted before they are
kept, and go back at once when another stream asks. The same position of the same order gives the same batch, so an
entry can't be of other data than its stream has opened; whether the store has changed since, nobody looks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.budget import BudgetHeld, Share
from streamtrain.data.passes import ZarrPass
from streamtrain.data.source import Ending
from streamtrain.data.transform import aligned_copy, batch_bytes

logger = logging.getLogger(__name__)

LARGEST = 8 << 20
"""Larger batches are not kept: they are copied on the loop, about 0.1 ms a MiB."""
Key = tuple[int, int]
"""Epoch (0 where all are the same) and position before the batch."""


@dataclass(frozen=True, slots=True)
class FinishedStatistics:
    """How the cache of finished batches does."""

    hits: int
    """Batches given without reading or transforming."""
    misses: int
    """Batches that were made."""
    refused: int
    """Of those, batches that were not kept, for want of room. Many: raise `memory` or `cache`."""
    bytes: int
    capacity: int


class FinishedBatches:
    """Copies of batches by position; an LRU by passes: what this pass or the last one used is never given up for more.

    (A plain LRU smaller than an epoch, read in a circle, would never hit.)
    """

    def __init__(self, capacity: int, share: Share) -> None:
        self.capacity = capacity
        self.on: bool = capacity > 0
        self._share = share
        self._lock = threading.Lock()
        self._kept: dict[Key, tuple[Batch | None, int]] = {}
        self._used: dict[Key, int] = {}
        self._pass = 0
        self._bytes = self._hits = self._misses = self._refused = 0

    def begin_pass(self) -> None:
        """A pass begins."""
        self._pass += 1

    def get(self, key: Key) -> tuple[bool, Batch | None]:
        """Whether it is known, and a copy of what comes at this position (None: nothing more)."""
        with self._lock:
            if key not in self._kept:
                return False, None
            self._used[key] = self._pass
            batch = self._kept[key][0]
            self._hits += batch is not None
        return True, None if batch is None else _copy(batch)

    def put(self, key: Key, batch: Batch | None) -> None:
        """Keep a copy, where there is room for it."""
        size = batch_bytes(batch)
        with self._lock:
            self._misses += batch is not None
            if not self.on or key in self._kept:
                return
            old = [at for at, used in self._used.items() if used < self._pass - 1] if self._full(size) else []
            while old and self._full(size):
                self._drop(old.pop())
            fits = size <= LARGEST and not self._full(size)
        # Not under the lock: who is asked for bytes may be another cache that asks this one.
        if not fits or self._share.free < size or not self._share.try_acquire(size):
            self._refused += 1
            return
        try:
            copy = None if batch is None else _copy(batch)
        except TypeError as error:  # something that numpy does not know
            self._share.release(size)
            self.stop(f"the transform makes what can't be copied: {error}")
            return
        with self._lock:
            self._bytes += size
            self._kept[key], self._used[key] = (copy, size), self._pass

    def _full(self, size: int) -> bool:
        return self._bytes + size > self.capacity

    def _drop(self, key: Key) -> None:
        _, size = self._kept.pop(key)
        del self._used[key]
        self._bytes -= size
        self._share.release(size)

    def clear(self) -> None:
        """Forget all, from any thread: somebody else needs the bytes."""
        with self._lock:
            for key in list(self._kept):
                self._drop(key)

    def stop(self, reason: str) -> None:
        """Keep nothing any more."""
        if self.on:
            self.on = False
            logger.info("finished batches are not kept: %s", reason)
        self.clear()

    def __del__(self) -> None:
        self._share.release_from_finalizer(self._bytes)

    def statistics(self) -> FinishedStatistics:
        """How it does now."""
        with self._lock:
            return FinishedStatistics(self._hits, self._misses, self._refused, self._bytes, self.capacity)


def _copy(batch: Batch) -> Batch:
    """The batch with numpy arrays of its own. Raises TypeError for leaves that are neither arrays nor plain."""
    return replace(batch, inputs=_own(batch.inputs), targets=_own(batch.targets), index=_own(batch.index))


def _own(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _own(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(_own(value) for value in tree)
    if tree is None or isinstance(tree, str | int | float | bool):
        return tree
    if hasattr(tree, "detach"):
        tree = tree.numpy()
    if not isinstance(tree, np.ndarray):
        raise TypeError(f"a {type(tree).__name__}")
    return aligned_copy(tree)


class Kept(Protocol):
    """Batches of one epoch by position: `FinishedBatches`, or rows in its order."""

    @property
    def on(self) -> bool:
        """Whether anything is kept."""

    def begin_pass(self) -> None:
        """A pass begins."""

    def get(self, key: Key) -> tuple[bool, Batch | None]:
        """Whether it is known, and a copy of what comes at this position (None: nothing more)."""

    def put(self, key: Key, batch: Batch | None) -> None:
        """Keep a copy, where there is room for it."""


class KeptPass(Ending):
    """A pass that gives what is kept, then goes on with a `ZarrPass` from there, and keeps its batches."""

    def __init__(
        self,
        kept: Kept,
        start: Cursor,
        end: int,
        *,
        make: Callable[[Cursor, Callable[[Cursor, bool], None]], ZarrPass],
        finish: Callable[[Batch], Batch],
        returned: Callable[[Cursor, bool], None],
        every_epoch: bool,
        before: KeptPass | ZarrPass | None,
    ) -> None:
        """`end`: samples of the epoch; `every_epoch`: all are the same."""
        self._kept, self._at, self._end = kept, start, end
        self._make, self._finish, self._every = make, finish, every_epoch
        self._returned = weakref.WeakMethod(returned)
        self._before = before
        self._inner: ZarrPass | None = None
        self._paused = self.closed = False
        kept.begin_pass()

    def __aiter__(self) -> KeptPass:
        return self

    async def __anext__(self) -> Batch:
        """The next batch."""
        if self._before is not None:
            await self._before.aclose()
            self._before = None
        if self._inner is None:
            # A pass of hits alone would never let anybody else run; before one is taken, since who is cancelled here
            # must lose none.
            await asyncio.sleep(0)
        try:
            batch = self.next_nowait()
            if batch is None:
                assert self._inner is not None
                batch = self._keep(await anext(self._inner))
        except BudgetHeld:
            raise
        except (StopAsyncIteration, Exception) as error:
            ended = isinstance(error, StopAsyncIteration)
            if ended:
                self._over()
            try:
                await self.aclose()
            except asyncio.CancelledError:
                self._untold = None if ended else error
                raise
            if ended:
                self._no_more()
            raise
        return batch

    def next_nowait(self) -> Batch | None:
        """The next batch if it is kept or ready."""
        if self.closed:
            self._no_more()
        if self._before is not None:
            return None
        if self._inner is None:
            known, batch = self._kept.get(self._key) if self._kept.on else (False, None)
            if known and batch is None:
                self._tell(Cursor(self._at.epoch, self._end), True)
                self.stop()
                raise StopAsyncIteration
            if batch is not None:
                return self._given(batch)
            self._inner = self._make(self._at, self._tell)
            self._inner.paused = self._paused
        try:
            batch = self._inner.next_nowait()
        except StopAsyncIteration:
            self._over()
            raise
        return None if batch is None else self._keep(batch)

    @property
    def _key(self) -> Key:
        return (0 if self._every else self._at.epoch, self._at.position)

    def _given(self, batch: Batch) -> Batch:
        """A kept batch, as one of this epoch."""
        batch.epoch, batch.cursor = self._at.epoch, Cursor(self._at.epoch, batch.cursor.position)
        self._at = batch.cursor
        self._tell(self._at, False)
        return self._finish(batch)

    def _keep(self, batch: Batch) -> Batch:
        self._kept.put(self._key, batch)
        self._at = batch.cursor
        return batch

    def _over(self) -> None:
        """The inner pass has come to its end: nothing follows."""
        if not self.closed and self._inner is not None:
            self._kept.put(self._key, None)

    def _tell(self, cursor: Cursor, finished: bool) -> None:
        returned = self._returned()
        if returned is not None:
            returned(cursor, finished)

    def supersede(self) -> None:
        """Another pass begins: end, and say so to who asks for more."""
        self._end_by_another(not self.closed)
        self.stop()

    def stop(self) -> None:
        """End without waiting."""
        self.closed = True
        if self._inner is not None:
            self._inner.stop()

    async def aclose(self) -> None:
        """End the pass, and join its threads."""
        self.stop()
        if self._before is not None:
            await self._before.aclose()
            self._before = None
        if self._inner is not None:
            await self._inner.aclose()

    @property
    def inner(self) -> ZarrPass | None:
        """The pass that reads, once something had to be read."""
        return self._inner

    @property
    def paused(self) -> bool:
        """Whether nothing is read ahead."""
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        if self._inner is not None:
            self._inner.paused = paused

    def go_on(self) -> None:
        """After `paused` was cleared."""
        if self._inner is not None:
            self._inner.go_on()


class Watched:
    """A transform, and whether it has drawn random numbers or looked at the epoch: then each epoch is another."""

    def __init__(self, transform: Callable[[Batch], Any], drew: Callable[[], None]) -> None:
        self._transform, self._drew, self._told = transform, drew, False

    def __call__(self, batch: Batch) -> Any:
        given, before = _Telling.of(batch), _state(batch.rng)
        made = self._transform(given)
        self._look(given, before)
        return made

    def _look(self, given: _Telling, before: Any) -> None:
        if not self._told and (given.looked or _state(given.rng) != before):
            self._told = True
            self._drew()


class WatchedAsync(Watched):
    """The same of an `async def`."""

    async def __call__(self, batch: Batch) -> Any:
        given, before = _Telling.of(batch), _state(batch.rng)
        made = await self._transform(given)
        self._look(given, before)
        return made


class _Telling(Batch):
    """A batch that tells whether its epoch was looked at."""

    __slots__ = ("looked",)

    @classmethod
    def of(cls, batch: Batch) -> _Telling:
        given = cls(batch.inputs, batch.targets, batch.index, batch.epoch, batch.cursor, batch.rng)
        given.looked = False
        return given

    def __getattribute__(self, name: str) -> Any:
        if name in ("epoch", "cursor"):
            self.looked = True
        return super().__getattribute__(name)


def _state(generator: np.random.Generator | None) -> Any:
    if generator is None:
        return None
    bits: Any = generator.bit_generator
    return bits.state, bits.seed_seq.n_children_spawned
