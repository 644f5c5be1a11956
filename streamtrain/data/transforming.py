"""The transform stage of a pass: raw batches go in, transformed ones come out, in the same order.

Its law: bytes for what a transform makes are granted before it is made (by a guess, settled afterwards), so that
transforms never starve the buffers they read from; only the batch that the consumer waits for is made without.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.block import Block, Bytes, Pool
from streamtrain.data.budget import Share
from streamtrain.data.permutation import Ints
from streamtrain.data.queue import ReadyQueue
from streamtrain.data.reading import Scratch
from streamtrain.data.skipping import compact
from streamtrain.data.transform import batch_bytes
from streamtrain.data.workers import Workers
from streamtrain.errors import UserCodeError

GROUP_BYTES = 1 << 20
GROUP_BATCHES = 16
"""Batches are transformed in groups up to so much, for one hop a group."""


@dataclass(slots=True)
class Ready:
    """A batch that lies complete in its block."""

    block: Block
    slot: int
    rows: int
    cursor: Cursor
    dropped: Ints | None
    """Rows that are left out, because of bad chunks; None where none is."""
    room: Bytes | None = None
    """Where rows of different lengths are laid out, or all are copied to; None where neither is."""

    def columns(self) -> list[NDArray[Any]]:
        """What is handed over."""
        columns = list(self.block.batch(self.slot, self.rows, self.room))
        return columns if self.dropped is None else compact(columns, self.dropped)


@dataclass(slots=True)
class Made:
    """A transformed batch (None: no row of it is left), and the bytes granted for it."""

    batch: Batch | None
    granted: int


Done = Callable[[list[Batch], BaseException | None], None]
"""Called on the loop with what was made of a group; the error is that of the batch after them."""


class Runner(Protocol):
    """Where transforms run."""

    ahead: int
    """Groups under way or waiting, at most."""
    most: int
    """Batches of a group, at most."""

    def run(self, group: list[Ready], done: Done) -> None:
        """Transform these, in order, and say what was made of them; empties the list."""

    @property
    def seconds(self) -> float:
        """Time spent in threads or tasks of its own."""

    def stop(self) -> None:
        """End what is under way, from any thread, without waiting."""

    async def joined(self, timeout: float) -> bool:
        """Wait for that end, `timeout` seconds at most; whether it came."""


class ThreadRunner:
    """Runs groups in threads: one hop a group."""

    def __init__(self, work: Callable[[Ready], Batch], workers: Workers, *, ahead: int, own: bool) -> None:
        """`own`: the workers are the transforms' alone, and end with them; else they are those who read."""
        self.ahead, self.most = ahead, GROUP_BATCHES
        self._work, self._workers, self._own = work, workers, own
        self._loop = asyncio.get_running_loop()

    def run(self, group: list[Ready], done: Done) -> None:
        """Queue the group, before anything that is still to be read."""
        self._workers.submit(lambda scratch: self._job(group, done, scratch), front=not self._own)

    @property
    def seconds(self) -> float:
        """Time that its own threads spent."""
        return sum(scratch.seconds["transform"] for scratch in self._workers.scratches) if self._own else 0.0

    def stop(self) -> None:
        """End its own threads after the batch that each has in hand."""
        if self._own:
            self._workers.stop()

    async def joined(self, timeout: float) -> bool:
        """Wait for its own threads."""
        return not self._own or await self._workers.joined(timeout)

    def _job(self, group: list[Ready], done: Done, scratch: Scratch) -> None:
        began = time.perf_counter()
        made: list[Batch] = []
        error = self._fill(made, group)
        scratch.seconds["transform"] += time.perf_counter() - began
        # The loop empties this list: nothing here may keep a batch's buffer from coming back.
        with contextlib.suppress(RuntimeError):  # the loop was closed under us; nobody waits any more
            self._loop.call_soon_threadsafe(done, made, error)
        del error  # its traceback leads to this very frame: a cycle that would keep the buffer

    def _fill(self, made: list[Batch], group: list[Ready]) -> BaseException | None:
        """Transform one after the other; what stopped that."""
        try:
            while group and not self._workers.stopped():
                made.append(self._work(group.pop(0)))
            group.clear()  # the pass ends: nobody wants the rest
        except BaseException as error:
            group.clear()
            return error
        return None


class TaskRunner:
    """Runs `async def` transforms as tasks of the pass's loop, one a batch."""

    def __init__(self, work: Callable[[Ready], Coroutine[Any, Any, Batch]], *, ahead: int) -> None:
        self.ahead, self.most, self.seconds = ahead, 1, 0.0
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def run(self, group: list[Ready], done: Done) -> None:
        """Start a task for the batch."""
        task = self._loop.create_task(self._job(group, done), name="streamtrain-transform")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _job(self, group: list[Ready], done: Done) -> None:
        began = time.perf_counter()
        made: list[Batch] = []
        failure: BaseException | None = None
        try:
            made.append(await self._work(group.pop()))
        except asyncio.CancelledError:
            if self._stopped:
                raise
            failure = UserCodeError(
                "transform was cancelled, by itself or by somebody who cancels all tasks",
                hint="catch what it cancels inside of the transform",
            )
        except BaseException as error:
            failure = error
        self.seconds += time.perf_counter() - began
        done(made, failure)

    def stop(self) -> None:
        """Cancel all tasks."""
        self._stopped = True
        with contextlib.suppress(RuntimeError):  # the loop was closed, and its tasks with it
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def joined(self, timeout: float) -> bool:
        """Wait for the tasks."""
        self._cancel()
        if not self._tasks:
            return True
        _, pending = await asyncio.wait(set(self._tasks), timeout=timeout)
        return not pending


@dataclass(frozen=True)
class Rooms:
    """Buffers in which batches are laid out, one each."""

    pool: Pool
    keep_free: Callable[[], int]
    """Bytes that must be left for what is read."""
    handed_over: bool
    """Whether a batch is handed over as it lies there; else a transform makes others of it."""

    def take(self, most: int) -> list[Bytes | None]:
        """At most so many of them; none while none is free."""
        found: list[Bytes | None] = []
        while len(found) < most and (room := self.pool.take(keep_free=self.keep_free())) is not None:
            found.append(room)
        return found

    def missing(self, wanted: int) -> int:
        """Bytes of those that are still to be made until there are so many."""
        return max(0, wanted - self.pool.made) * self.pool.size


class TransformStage:
    """Groups of batches on their way through the transform; all methods run on the pass's loop."""

    def __init__(
        self,
        runner: Runner,
        out: ReadyQueue[Any],
        share: Share,
        *,
        slot_bytes: int,
        prefetch: int | None,
        keep_empty: bool,
        rooms: Rooms | None,
        drained: Callable[[], None],
        settled: Callable[[], None],
    ) -> None:
        """`keep_empty`: hand on batches without rows too, since other ranks count on them. `rooms`: where batches are
        laid out, if they are. `drained`: a raw batch was
        taken; `settled`: a group has arrived. Both are methods, and held weakly, so that letting go of a pass ends it
        at once."""
        self.made_bytes = 0
        """Of the largest batch that was made until now; 0 before the first."""
        self._runner, self._out, self._share = runner, out, share
        self._slot_bytes, self._prefetch, self._keep_empty = slot_bytes, prefetch, keep_empty
        self._rooms = rooms
        self.starved = False
        """Whether there was no room for the next batch."""
        self._drained, self._settled = weakref.WeakMethod(drained), weakref.WeakMethod(settled)
        self._raw: ReadyQueue[Ready] = ReadyQueue(max_items=None, max_bytes=share.total)
        self._granted = 0
        """For transforms under way and what they made."""
        self._groups: dict[int, tuple[list[Made], BaseException | None] | None] = {}
        self._number = self._next = 0
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether something is on its way to the queue."""
        return bool(len(self._raw) or self._groups)

    @property
    def stuck(self) -> bool:
        """Whether nothing is under way, since the consumer keeps all room that there is for batches."""
        return self.starved and not self._groups

    def put_run(self, make: Callable[[int], Ready], count: int) -> None:
        """Append `count` raw batches, made when they are taken; `pump` starts them."""
        self._raw.put_run(make, count, self._slot_bytes)

    def pump(self) -> None:
        """Start groups while there is room for what they make."""
        ahead = self._runner.ahead
        while len(self._raw) and len(self._groups) < ahead and not (self._closed or self._out.closed):
            size = self._size()
            if len(self._out) >= ahead * size:
                return
            places = self._places(size)
            if not places:
                return
            size, granted = len(places), len(places) * (self.made_bytes or self._slot_bytes)
            if self._leased:
                granted = 0
            if not self._share.try_acquire(granted):
                if self._groups or len(self._out):
                    return
                size, granted = 1, 0  # the one batch that the consumer waits for
            self._launch(places[:size], granted)

    @property
    def _leased(self) -> bool:
        """Whether a batch is handed over as it is laid out, in bytes that are granted already."""
        return self._rooms is not None and self._rooms.handed_over

    def _places(self, size: int) -> list[Bytes | None]:
        """Room for so many batches, or for fewer; for none while the consumer keeps it all."""
        if self._rooms is None:
            return [None] * size
        places = self._rooms.take(size)
        self.starved = not places
        return places

    def _size(self) -> int:
        """Batches of the next group."""
        if not self.made_bytes:
            return 1  # the first tells how much is made of a batch
        fit = GROUP_BYTES // max(1, self._slot_bytes, self.made_bytes)
        size = max(1, min(self._runner.most, fit, len(self._raw)))
        return size if self._prefetch is None else min(size, max(1, self._prefetch // self._runner.ahead))

    def _launch(self, places: list[Bytes | None], granted: int) -> None:
        size = len(places)
        group = [ready for ready in (self._raw.get_nowait() for _ in range(size)) if ready is not None]
        while places:  # what is taken by the group must be kept by nobody else
            group[len(places) - 1].room = places.pop()
        number = self._number
        self._number += 1
        self._groups[number] = None
        self._granted += granted
        self._runner.run(group, lambda made, error: self._done(number, granted, made, error))
        drained = self._drained()
        for _ in range(size):
            if drained is not None:
                drained()

    def _done(self, number: int, granted: int, batches: list[Batch], error: BaseException | None) -> None:
        if self._closed:
            return  # what was granted came back with the pass's end
        sizes = self._settle([batch_bytes(batch) for batch in batches], granted)
        kept = [batch if self._keep_empty or len(batch) else None for batch in batches]
        batches.clear()
        self._groups[number] = ([Made(batch, size) for batch, size in zip(kept, sizes, strict=True)], error)
        del kept
        while not self._out.closed and (ready := self._groups.get(self._next)) is not None:
            del self._groups[self._next]
            self._next += 1
            for made in ready[0]:
                self._out.put(made, made.granted)
            if ready[1] is not None:
                self._out.fail(ready[1])
        self.pump()
        settled = self._settled()
        if settled is not None:
            settled()

    def _settle(self, sizes: list[int], granted: int) -> list[int]:
        """Grant what a group really made, in place of the guess; the bytes granted for each of its batches."""
        if self._leased:
            self.made_bytes = self._slot_bytes
            return [0] * len(sizes)
        need = sum(sizes)
        self.made_bytes = max(self.made_bytes, *sizes, 0)
        if need > granted and not self._share.try_acquire(need - granted):
            sizes = [granted // len(sizes)] * len(sizes)
            need = sum(sizes)
        self._share.release(max(0, granted - need))
        self._granted += need - granted
        return sizes

    def taken(self, made: Made) -> None:
        """The consumer has this batch: its bytes are the consumer's affair now."""
        self._granted -= made.granted
        self._share.release(made.granted)
        self.pump()

    @property
    def reserve(self) -> int:
        """Bytes that must stay free for transforms to go on."""
        laid = self._rooms.missing(self._runner.ahead + 2) if self._rooms is not None else 0
        return laid + (0 if self._leased else self.made_bytes * (self._runner.ahead + 1))

    @property
    def seconds(self) -> float:
        """Time spent in threads or tasks that only transform."""
        return self._runner.seconds

    async def joined(self, timeout: float) -> bool:
        """Wait for what `stop` has ended, `timeout` seconds at most; whether it has."""
        return await self._runner.joined(timeout)

    def stop(self) -> None:
        """Forget all that is under way, and give its bytes back."""
        self._closed = True
        self._runner.stop()
        self._raw.clear()
        self._groups.clear()
        granted, self._granted = self._granted, 0
        self._share.release(granted)

    def abandon(self) -> int:
        """The same for finalizers, which may take no lock: the bytes that are still to be given back."""
        self._closed = True
        self._runner.stop()
        granted, self._granted = self._granted, 0
        return granted
