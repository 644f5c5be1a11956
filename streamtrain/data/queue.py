"""The bounded queue between the producers and one consumer: a nowait core and the waiting around it.

All methods run on the consumer's loop. The end and a failure are states of the queue, not items in it.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """How a queue stands."""

    items: int
    """Items that are ready. Mostly 0 while a consumer waits: the producers are the bottleneck."""
    bytes: int
    max_items: int | None
    max_bytes: int
    put: int
    """Items that ever entered."""
    empty_waits: int
    """How often the consumer found it empty."""
    wait_seconds: float
    """How long the consumer waited in all."""


class _Run(Generic[T]):
    """Items in a row that are made when they are taken."""

    __slots__ = ("at", "left", "make", "size")

    def __init__(self, make: Callable[[int], T], count: int, size: int) -> None:
        self.make, self.at, self.left, self.size = make, 0, count, size


class ReadyQueue(Generic[T]):
    """Items with their sizes, first in first out; `has_room` is what producers ask before they put."""

    def __init__(self, *, max_items: int | None, max_bytes: int) -> None:
        self.max_items, self.max_bytes = max_items, max_bytes
        self._runs: collections.deque[_Run[T]] = collections.deque()
        self._count = self._bytes = self._put = self._empty_waits = 0
        self._wait_seconds = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._failure: BaseException | None = None

    def __len__(self) -> int:
        return self._count

    def has_room(self, items: int = 1, size: int = 0) -> bool:
        """Whether so much more may enter; an empty queue takes anything."""
        if not self._count and not items > (self.max_items or items):
            return True
        fits = self.max_items is None or self._count + items <= self.max_items
        return fits and self._bytes + size <= self.max_bytes

    def put(self, item: T, size: int) -> None:
        """Append an item of `size` bytes and wake the consumer."""
        self.put_run(lambda _: item, 1, size)

    def put_run(self, make: Callable[[int], T], count: int, size: int) -> None:
        """Append `count` items of `size` bytes each; `make(0)`, `make(1)`, ... gives them when they are taken."""
        if count:
            self._runs.append(_Run(make, count, size))
        self._count += count
        self._bytes += count * size
        self._put += count
        self.wake()

    def end(self) -> None:
        """No item follows."""
        self._ended = True
        self.wake()

    def fail(self, error: BaseException) -> None:
        """The consumer gets `error` after the items that are ready."""
        if self._failure is None:
            self._failure = error
        self.wake()

    @property
    def awaited(self) -> bool:
        """Whether somebody waits already."""
        return self._waiter is not None

    @property
    def closed(self) -> bool:
        """Whether nothing follows what is ready."""
        return self._ended or self._failure is not None

    def clear(self) -> None:
        """Forget all that is ready."""
        self._runs.clear()
        self._count = self._bytes = 0

    def wake(self) -> None:
        """Let a waiting consumer look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def get_nowait(self) -> T | None:
        """The next item, or None if there is none yet. Raises StopAsyncIteration at the end, or the failure."""
        if self._count:
            return self._first()
        if self._failure is not None:
            raise self._failure
        if self._ended:
            raise StopAsyncIteration
        return None

    def _first(self) -> T:
        run = self._runs[0]
        at, run.at, run.left = run.at, run.at + 1, run.left - 1
        if not run.left:
            self._runs.popleft()
        self._count -= 1
        self._bytes -= run.size
        return run.make(at)

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until something changed; False if nothing did within `timeout` seconds."""
        assert self._waiter is None, "one consumer a queue"
        self._waiter = asyncio.get_running_loop().create_future()
        self._empty_waits += 1
        started = time.perf_counter()
        try:
            # Not asyncio.wait_for: on Python 3.11 it loses a cancellation that comes together with the result.
            done, _ = await asyncio.wait([self._waiter], timeout=timeout)
        finally:
            self._waiter = None
            self._wait_seconds += time.perf_counter() - started
        return bool(done)

    def statistics(self) -> QueueStatistics:
        """How the queue stands now."""
        return QueueStatistics(
            self._count,
            self._bytes,
            self.max_items,
            self.max_bytes,
            self._put,
            self._empty_waits,
            self._wait_seconds,
        )
