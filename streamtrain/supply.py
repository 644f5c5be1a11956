"""Batches on their way from a pass to the train thread, about a burst's worth ahead of it.

Its law: `take` never waits, so that a burst never does; what was gathered and not taken is simply derived again in the
next life. A synchronous source has nothing ahead: it is pulled on the train thread, between two steps.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar

from streamtrain.data.batch import Batch
from streamtrain.data.budget import BudgetHeld
from streamtrain.data.source import Pass, Stream
from streamtrain.ending import to_its_end
from streamtrain.errors import UserCodeError

T = TypeVar("T")
MOST_AHEAD = 128
"""Batches gathered for one burst, at most."""


class Runner(Protocol):
    """Runs a function on the train thread."""

    async def __call__(self, fn: Callable[[], Batch | None], /) -> Batch | None: ...


class Supply(Protocol):
    """What a burst takes its batches from."""

    ended: bool
    """Nothing comes any more beyond what can be taken."""
    waited: float
    """Seconds for which the train thread waited in `take`."""

    def take(self) -> Batch | None:
        """The next batch, None if none is ready; on the train thread."""

    @property
    def ready(self) -> bool:
        """Whether `wait` would return at once."""

    async def wait(self) -> bool:
        """Wait until a burst can begin; False at the end of the pass."""

    async def finished(self) -> bool:
        """Whether the pass has no further batch; waits until that is known."""

    def finished_nowait(self) -> bool:
        """Whether it is known that the pass has no further batch."""

    def burst(self, batches: int | None) -> None:
        """A burst of about so many batches begins, or (None) has ended."""

    def first(self) -> Batch | None:
        """The next batch, without taking it, if it is there."""

    def go_there(self) -> None:
        """Have a synchronous source produce again what comes before its position; on the train thread."""

    async def aclose(self) -> None:
        """End the pass, whether or not we are cancelled meanwhile."""


def supply(stream: Stream, *, limit: int | None, runner: Runner) -> Supply:
    """Start a pass over `stream` of `limit` batches at most (None: all)."""
    if stream.pulls_inside:
        return Pulled(aiter(stream), limit, runner)
    return Pumped(aiter(stream), limit)


class Pumped:
    """An asynchronous source: a task of ours gathers while the train thread works."""

    def __init__(self, source: Pass, limit: int | None) -> None:
        self.ended = False
        self.waited = 0.0
        self._pass = source
        self._left = limit
        self._ready: deque[Batch] = deque()
        self._batches = 1
        self._running = False
        self._full = self._closing = False
        self._failure: BaseException | None = None
        """What ended the pass early; `ended` stays False then: a group cut short by it is no last group."""
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._pump(), name="streamtrain-supply")

    def take(self) -> Batch | None:
        try:
            batch = self._ready.popleft()
        except IndexError:
            return None
        if self._full and len(self._ready) <= self._batches // 4:
            self._full = False  # rarely: what was gathered lasts for nearly two bursts, and each wakes the pump anyway
            self._loop.call_soon_threadsafe(self._room.set)
        return batch

    @property
    def _most(self) -> int:
        """Batches that are gathered: for the next burst, and for the one behind it all but the last, which comes while
        the first is trained; where a burst is one batch, that is one."""
        return 2 * self._batches - 1

    @property
    def ready(self) -> bool:
        return bool(self._ready) or self.ended or self._failure is not None

    async def wait(self) -> bool:
        while not self.ready:
            self._changed.clear()
            await self._changed.wait()
        if self._ready:
            return True
        if self._failure is not None:
            raise self._failure
        return False

    async def finished(self) -> bool:
        return not await self.wait()

    def finished_nowait(self) -> bool:
        return self.ended and not self._ready

    def burst(self, batches: int | None) -> None:
        self._running = batches is not None
        if batches is not None:
            self._batches = min(batches, MOST_AHEAD)
        self._room.set()

    def first(self) -> Batch | None:
        return self._ready[0] if self._ready else None

    def go_there(self) -> None:
        pass  # its pass does that while it waits

    async def aclose(self) -> None:
        self._closing = True  # a source of the user's may swallow a cancellation
        self._task.cancel()
        await to_its_end(self._close(), "streamtrain-close")  # else the threads of the pass would be left behind

    async def _close(self) -> None:
        await asyncio.gather(self._task, return_exceptions=True)
        self._ready.clear()
        await self._pass.aclose()

    async def _pump(self) -> None:
        try:
            while (self._left is None or self._left > 0) and not self._closing:
                if len(self._ready) >= self._most:
                    await self._until_room()
                try:
                    batch = self._pass.next_nowait()
                    if batch is None:
                        batch = await anext(self._pass)
                except BudgetHeld:
                    await self._until_trained()
                    batch = await anext(self._pass)
                self._ready.append(batch)
                del batch  # nothing is kept alive here while the next one is waited for
                if self._left is not None:
                    self._left -= 1
                self._changed.set()
        except StopAsyncIteration:
            pass
        except asyncio.CancelledError as error:
            self._failure = error
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._failure = UserCodeError(
                "a data source was cancelled from within, before the end of its pass",
                hint="Something that it awaits was cancelled: have it raise what that means for the data.",
            )
            self._failure.__cause__ = error
        except BaseException as error:
            self._failure = error
        finally:
            self.ended = self._failure is None
            self._changed.set()

    async def _until_trained(self) -> None:
        """Our own batches may be what holds the budget: once they are trained there is room."""
        while self._ready or self._running:
            self._room.clear()
            await self._room.wait()

    async def _until_room(self) -> None:
        while len(self._ready) >= self._most:
            self._room.clear()
            self._full = True
            if len(self._ready) < self._most:  # taken in the meantime, on the other thread
                break
            await self._room.wait()
        self._full = False


class Pulled:
    """A synchronous source: `take` asks it for the next batch, on the train thread."""

    def __init__(self, source: Pass, limit: int | None, runner: Runner) -> None:
        self.ended = False
        self.waited = 0.0
        self._pass = source
        self._left = limit
        self._runner = runner
        self._ahead: Batch | None = None

    def take(self) -> Batch | None:
        if self._ahead is None:
            return self._pull()
        batch, self._ahead = self._ahead, None
        return batch

    @property
    def ready(self) -> bool:
        return True

    async def wait(self) -> bool:
        return not self.finished_nowait()

    async def finished(self) -> bool:
        if self._ahead is None and not self.ended:
            self._ahead = await self._runner(self._pull)
        return self.finished_nowait()

    def finished_nowait(self) -> bool:
        return self.ended and self._ahead is None

    def burst(self, batches: int | None) -> None:
        pass

    def first(self) -> Batch | None:
        return self._ahead

    def go_there(self) -> None:
        begin = getattr(self._pass, "begin_nowait", None)
        if begin is not None:
            try:
                begin()
            except StopAsyncIteration:
                self.ended = True

    async def aclose(self) -> None:
        self._ahead = None
        await self._pass.aclose()

    def _pull(self) -> Batch | None:
        if self.ended or self._left == 0:
            self.ended = True
            return None
        began = time.perf_counter()
        try:
            batch = self._pass.next_nowait()
        except StopAsyncIteration:
            self.ended = True
            return None
        finally:
            self.waited += time.perf_counter() - began
        if self._left is not None:
            self._left -= 1
        return batch
