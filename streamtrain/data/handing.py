"""A stream's pass for who knows no asyncio: on a loop in the caller's own thread, or on one in a thread beside it.

    Here        the loop turns while a batch is waited for, and for a moment now and then: no thread, no hand-over
    Beside      the loop turns in its own thread, which hands batches over in bunches: one hop a bunch

Its law: whatever ends the iteration (its end, `break`, an error, Ctrl-C, garbage collection) ends the loop, and every
thread that it started.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.budget import BudgetHeld
from streamtrain.data.source import Pass, Stream
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import ConfigError, StreamtrainError

MOST = 32
"""Batches of a bunch, at most."""
FEW = 16
"""The same where no thread waits for another: it makes 13 us of turning the loop less than 1 us a batch."""
AHEAD = 2
"""Bunches that wait to be taken, at most."""
TURN = 0.001
"""Seconds without a turn of the loop, at most, between two batches: a turn costs 5 us, and producers wait for it."""
JOIN = 30.0
"""Seconds for a pass to end; a read that hangs is left behind before."""


class Run(Protocol):
    """One pass over a stream, which nobody else may read meanwhile."""

    closed: bool
    ended: bool
    """Whether its end was reached: whoever takes batches from it says so."""
    epoch: int

    def get(self) -> deque[Batch] | None:
        """The next bunch, waited for; None at the end. Raises what ended the pass."""

    def turn(self) -> None:
        """Called between two batches of a bunch."""

    def close(self) -> None:
        """End the pass and its threads; the stream's position is its own again."""


def run_of(stream: Stream) -> Run:
    """Start a pass. Raises ConfigError where somebody else reads the stream.

    It runs here, unless this thread has a loop that is running (as in a notebook), or something of the stream gets on
    only while its loop turns: an async transform or source would stand still between two batches.
    """
    beside = loop_runs() or getattr(stream, "needs_loop", True)
    return Beside(stream) if beside else Here(stream)


def loop_runs() -> bool:
    """Whether this thread is within an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _check_no_loop() -> None:
    """Raise ConfigError within an event loop, where none but that one can turn."""
    if loop_runs():
        raise ConfigError(
            "the iteration of this loader began outside of an event loop, and can't go on within one",
            hint="begin it where it goes on: call iter(loader), or `for batch in loader`, within the loop",
        )


class _Follower:
    """What both kinds have in common: how a stream is taken and given back."""

    def __init__(self, stream: Stream) -> None:
        stream.follow(True)
        self.closed = self.ended = False
        self.epoch = stream.epoch
        self._stream = stream
        atexit.register(self.close)  # a thread that is killed with the interpreter aborts it

    def close(self) -> None:
        """End the pass and its threads; the stream's position is its own again."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        try:
            self._end()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        self._stream.follow(False)
        if not self.ended and self._stream.epoch != self.epoch:  # read ahead to its end, but not given
            position = self._stream.state_dict()["position"]
            self._stream.set_epoch(self.epoch)
            self._stream.trained(Cursor(self.epoch, position))

    def _end(self) -> None:
        raise NotImplementedError


class Here(_Follower):
    """A pass on a loop of the thread that asks for batches."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self._loop = asyncio.new_event_loop()
        self._pass: Pass | None = None
        self._bunch: deque[Batch] = deque()
        self._after: Exception | None = None
        """What came after the batches of the bunch."""
        self._turned = 0.0

    def get(self) -> deque[Batch] | None:
        """The next bunch, waited for; None at the end. Raises what ended the pass."""
        if self.closed:
            return None
        if self._after is None:
            _check_no_loop()
            try:
                self._loop.run_until_complete(self._fill())
            except asyncio.CancelledError:
                if not self.closed:
                    raise
            if self._left():
                return None
        if self._bunch or isinstance(self._after, StopAsyncIteration):
            return self._bunch or None
        assert self._after is not None
        raise self._after

    def turn(self) -> None:
        """Between two batches of a bunch: let what waits for the loop get on, if it has waited for long."""
        now = time.monotonic()
        if now - self._turned >= TURN and not self.closed:
            _check_no_loop()
            self._turned = now
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()
            self._left()

    async def _fill(self) -> None:
        """Take what is ready, at least one batch; what comes after them is kept."""
        self._turned = time.monotonic()
        if self._pass is None:
            self._pass = aiter(self._stream)
        self._after = await fill(self._bunch, self._pass, FEW)

    def _end(self) -> None:
        if self._loop.is_running():  # in another thread, which then winds up
            with contextlib.suppress(RuntimeError):  # it has just noticed
                self._loop.call_soon_threadsafe(_cancel_all)
        elif not loop_runs():
            self._wind_up()
        else:  # called by a task of another loop, or by a collection of garbage within it
            thread = threading.Thread(target=self._wind_up, name="streamtrain-end", daemon=True)
            thread.start()
            thread.join(JOIN)

    def _left(self) -> bool:
        """Whether another thread has closed it while the loop was turning."""
        if self.closed and not self._loop.is_closed():
            self._wind_up()
        return self.closed

    def _wind_up(self) -> None:
        self._bunch.clear()
        try:
            self._loop.run_until_complete(wind_up(self._pass))
        finally:
            self._loop.close()


async def fill(bunch: deque[Batch], passing: Pass, most: int) -> Exception | None:
    """Append what is ready, at least one batch and at most so many; what comes after them, if that is known."""
    try:
        bunch.append(await anext(passing))
        while len(bunch) < most and (batch := passing.next_nowait()) is not None:
            bunch.append(batch)
            del batch
    except Exception as error:
        return error
    return None


def _cancel_all() -> None:
    for task in asyncio.all_tasks():
        task.cancel()


async def wind_up(passing: Pass | None) -> None:
    """End a pass, and all that its loop still has."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    loop = asyncio.get_running_loop()
    try:
        if passing is not None:
            await passing.aclose()
    finally:
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()


def _both(end: BaseException | None, failed: BaseException) -> BaseException:
    """What a pass ended with, where ending it failed as well: the first failure, which names the second."""
    if end is None or isinstance(end, StopAsyncIteration):
        return failed
    end.add_note(f"then the end of the pass raised {type(failed).__name__}: {failed}")
    return end


class Beside(_Follower):
    """A pass on a loop in a thread, and the bunches that come from it."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self._bunches: queue.SimpleQueue[deque[Batch] | BaseException | None] = queue.SimpleQueue()
        self._room = asyncio.Event()
        self._full = self._starved = False
        self._stopping = False
        self._task: asyncio.Task[Exception] | None = None
        self._loop = ZarrLoop()
        self._done = self._loop.submit(self._serve())

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

    def turn(self) -> None:
        """Nothing: the loop turns by itself."""

    def _end(self) -> None:
        """Join the thread."""
        self._call(self._cancel)
        try:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                self._done.result(JOIN)
        finally:
            self._loop.close()

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
        failed: BaseException | None = None
        try:
            passing = aiter(self._stream)
        except Exception as error:
            end = error
        else:
            self._task = asyncio.ensure_future(self._pump(passing))
            await asyncio.wait([self._task])
            end = None if self._task.cancelled() else self._task.exception() or self._task.result()
            try:
                await passing.aclose()
            except BaseException as error:
                failed, end = error, _both(end, error)
        self._finish(end, failed)

    def _finish(self, end: BaseException | None, failed: BaseException | None) -> None:
        self._bunches.put(None if isinstance(end, StopAsyncIteration) else end)
        if failed is not None and (self._stopping or not isinstance(failed, Exception)):
            raise failed  # nobody takes any more what is put there

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
