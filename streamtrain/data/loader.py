"""`as_loader()`: a stream as a plain iterable, for loops and trainers that know no asyncio.

Its law: the asynchronous pass runs on a loop in a thread of its own and hands batches over in bunches, one hop a bunch;
whatever ends the iteration (its end, `break`, an error, Ctrl-C, garbage collection) ends that thread.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import queue
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.budget import BudgetHeld
from streamtrain.data.readers import ZarrLoop
from streamtrain.data.source import Pass, Stream
from streamtrain.errors import StreamtrainError

MOST = 32
"""Batches of a bunch, at most."""
AHEAD = 2
"""Bunches that wait to be taken, at most."""
JOIN = 30.0
"""Seconds for a pass to end; a read that hangs is left behind before."""


class Loader:
    """What `as_loader` gives: iterate it once an epoch.

    Epochs follow each other as they do in `async for`: a finished one moves to the next, one that was left starts over.
    `state_dict` is the position after the last batch that the loop was given. Not for several threads at a time.
    """

    num_workers = 0
    sampler = batch_sampler = None
    pin_memory = persistent_workers = False

    def __init__(self, stream: Stream, collate: Callable[[Batch], Any] | None = None) -> None:
        self.stream = stream
        self._collate = collate
        self._run: _Run | None = None

    @property
    def batch_size(self) -> int | None:
        """Samples of a full batch; None where it differs."""
        return self.stream.batch_size

    @property
    def dataset(self) -> Samples:
        """Something with a length: that of an epoch in samples."""
        return Samples(self.stream)

    @property
    def drop_last(self) -> bool:
        """Whether a short last batch is left out."""
        return bool(getattr(self.stream, "drop_last", False))

    def __len__(self) -> int:
        """Batches of an epoch. Raises TypeError where nobody knows."""
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of this epoch; does nothing within it."""
        if epoch != self.stream.epoch:
            self.close()
        self.stream.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was given; JSON."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position: the next iteration continues there. Raises DataError if it is one of other data."""
        self.close()
        self.stream.load_state_dict(state)

    def close(self) -> None:
        """End a live iteration, and its thread."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch over, or go on where `load_state_dict` went. Ends the iteration that was live."""
        self.close()
        give = self._collate
        batches = self._pulled() if self.stream.pulls_inside else self._handed()
        return batches if give is None else map(give, batches)

    def _pulled(self) -> Iterator[Batch]:
        """A synchronous source needs no thread."""
        passing = aiter(self.stream)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                batch = passing.next_nowait()
                assert batch is not None
                yield batch

    def _handed(self) -> Iterator[Batch]:
        self.close()
        run = self._run = _Run(self.stream)
        trained = self.stream.trained
        try:
            while (bunch := run.get()) is not None:
                while bunch:
                    if run.closed:  # another iteration has begun, or the position has moved
                        return
                    trained(bunch[0].cursor)
                    yield bunch.popleft()
            if not run.closed:
                run.ended = True
                trained(Cursor(run.epoch + 1, 0))
        finally:
            run.close()


class Samples:
    """What `loader.dataset` is: its `len` is the number of samples; the data itself comes by the loader alone."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        """Samples of an epoch. Raises TypeError where nobody knows."""
        count = self._stream.num_samples
        if count is None:
            raise TypeError("nobody knows how many samples this stream has")
        return count


class _Run:
    """One pass on a loop in a thread, and the bunches that come from it."""

    def __init__(self, stream: Stream) -> None:
        stream.follow(True)
        self.closed = self.ended = False
        self.epoch = stream.epoch
        self._stream = stream
        self._bunches: queue.SimpleQueue[deque[Batch] | BaseException | None] = queue.SimpleQueue()
        self._room = asyncio.Event()
        self._full = self._starved = False
        self._stopping = False
        self._task: asyncio.Task[Exception] | None = None
        self._loop = ZarrLoop()
        self._done = self._loop.submit(self._serve())
        atexit.register(self.close)  # a thread that is killed with the interpreter aborts it

    # ---- the consumer's thread

    def get(self) -> deque[Batch] | None:
        """The next bunch, waited for; None at the end. Raises what ended the pass."""
        if self.closed:
            return None
        try:
            item = self._bunches.get_nowait()
        except queue.Empty:
            self._starved = True
            self._wake()
            item = self._bunches.get()
            self._starved = False
        if self._full:
            self._wake()
        if isinstance(item, BaseException):
            raise item
        return item

    def _wake(self) -> None:
        self._full = False
        self._call(self._room.set)

    def _call(self, fn: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.tell(fn)

    def close(self) -> None:
        """End the pass and join the thread; the stream's position is its own again."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        self._call(self._cancel)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self._done.result(JOIN)
        self._loop.close()
        self._stream.follow(False)
        if not self.ended and self._stream.epoch != self.epoch:  # read ahead to its end, but not given
            position = self._stream.state_dict()["position"]
            self._stream.set_epoch(self.epoch)
            self._stream.trained(Cursor(self.epoch, position))

    # ---- the loop's thread

    def _cancel(self) -> None:
        self._stopping = True
        if self._task is not None:
            self._task.cancel()

    async def _serve(self) -> None:
        """Pump until the end or `close`, then end the pass, which nothing interrupts."""
        if self._stopping:
            return
        end: BaseException | None
        try:
            passing = aiter(self._stream)
        except Exception as error:
            end = error
        else:
            self._task = asyncio.ensure_future(self._pump(passing))
            await asyncio.wait([self._task])
            end = None if self._task.cancelled() else self._task.exception() or self._task.result()
            await passing.aclose()
        self._bunches.put(None if isinstance(end, StopAsyncIteration) else end)

    async def _pump(self, passing: Pass) -> Exception:
        """Bunch after bunch; what came after the last one."""
        while True:
            bunch, end = await self._bunch(passing)
            if bunch:
                self._bunches.put(bunch)
            del bunch
            if end is not None:
                return end
            await self._until_room()

    async def _bunch(self, passing: Pass) -> tuple[deque[Batch], Exception | None]:
        """What is ready, at least one batch; and what comes after them, if that is known."""
        bunch: deque[Batch] = deque()
        try:
            bunch.append(await self._next(passing))
            while len(bunch) < MOST and (batch := passing.next_nowait()) is not None:
                bunch.append(batch)
                del batch
        except (StopAsyncIteration, StreamtrainError) as error:
            return bunch, error
        return bunch, None

    async def _next(self, passing: Pass) -> Batch:
        while True:
            try:
                return await anext(passing)
            except BudgetHeld:
                if self._starved and self._bunches.empty():
                    return await anext(passing)  # it holds what it holds: now the error is its own
                self._full = True
                self._room.clear()
                if not self._starved:
                    await self._room.wait()

    async def _until_room(self) -> None:
        while self._bunches.qsize() >= AHEAD:
            self._full = True
            self._room.clear()
            if self._bunches.qsize() < AHEAD:  # taken in the meantime, in the other thread
                break
            await self._room.wait()
