"""One callback's mailbox: what waits for it, the task that delivers it, and the thread of its `def` hooks.

Its law: letters are delivered one by one, in the order in which they were put; only news is merged, with what still
lies here.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from streamtrain.callbacks.base import NEWS, hooks_of
from streamtrain.ending import as_if_not_cancelled
from streamtrain.errors import EnvironmentProblem, StreamtrainError, UserCodeError, named
from streamtrain.events import BatchBegin, BatchEnd, Event, Verdict
from streamtrain.threads import tell

logger = logging.getLogger(__name__)

AFTER_FAILURE = frozenset({"on_exception", "on_train_end"})
"""The hooks that a callback is still given after one of its hooks raised."""
MARK = "state_dict"
"""Stands for a hook where a callback's state is taken."""


def coalesce(earlier: Event, later: Event) -> Event:
    """One event that stands for two of the same kind, the later right after the earlier: sums add, the rest is new."""
    if isinstance(earlier, BatchEnd) and isinstance(later, BatchEnd):
        return replace(
            later,
            first_step=earlier.first_step,
            count=earlier.count + later.count,
            loss_sum=earlier.loss_sum + later.loss_sum,
            batch_samples=earlier.batch_samples + later.batch_samples,
            data_wait=earlier.data_wait + later.data_wait,
        )
    if isinstance(earlier, BatchBegin) and isinstance(later, BatchBegin):
        return replace(later, first_step=earlier.first_step, count=earlier.count + later.count)
    raise TypeError(f"{type(earlier).__name__} and {type(later).__name__} do not coalesce")


@dataclass(frozen=True, slots=True)
class MailboxStatistics:
    """How one callback keeps up."""

    name: str
    """The callback's class and its `state_key`, if it has one; numbered where these are the same twice."""
    pending: int
    """Events that wait in the mailbox now; near the mailbox's size: this callback is what training waits for."""
    delivered: int
    """Hooks called."""
    coalesced: int
    """News merged into an event that still waited; large beside `delivered`: the callback lags, training does not."""
    busy: float
    """Seconds spent in this callback's hooks."""
    waited: float
    """Seconds for which the wheel waited for room in this mailbox; more than 0: make the hooks cheaper."""


class Letter(NamedTuple):
    hook: str
    event: Event
    answer: asyncio.Future[Any] | None
    take: Callable[[], Awaitable[Any]] | None = None
    """Of a mark: what is awaited there in place of a hook."""


class _Thread:
    """The thread of one callback's `def` hooks, in first-in, first-out order, each run in the caller's context."""

    def __init__(self, name: str, context: contextvars.Context) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # A daemon, so that a hook which never returns cannot keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"streamtrain-{name}", daemon=True)
        self._thread.start()

    async def run(self, fn: Callable[[], Any]) -> Any:
        done: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put((fn, done))
        return await done

    async def join(self, timeout: float) -> bool:
        """End after the jobs given so far; False if that did not happen within `timeout` seconds."""
        self._jobs.put(None)
        await asyncio.wait([self._ended], timeout=timeout)
        if not self._ended.done():
            return False
        self._thread.join()
        return True

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            fn, done = job
            try:
                tell(self._loop, done, self._context.run(fn), None)
            except BaseException as error:  # SystemExit too: it is the hook's failure, not this thread's end
                tell(self._loop, done, None, error)
            del job, fn, done  # an idle thread keeps no event alive
        tell(self._loop, self._ended, None, None)


class Mailbox:
    """One callback: what waits for it, the task that delivers, and its thread."""

    def __init__(self, callback: object, name: str, size: int) -> None:
        self.name = name
        self.hooks = hooks_of(callback)
        self.decides = bool(getattr(callback, "decides", False))
        self.failure: StreamtrainError | None = None
        self.callback = callback
        self._size = size
        self._letters: deque[Letter] = deque()
        self._changed = asyncio.Event()
        self._progress = asyncio.Event()
        self._current: str | None = None
        self.since = 0.0
        """When the hook that runs now was called, on `time.perf_counter`'s clock."""
        self._context = contextvars.copy_context()
        self._thread: _Thread | None = None
        self._delivered = self._coalesced = 0
        self._busy = self._waited = 0.0
        self._said: set[str] = set()
        self._dismissed = self._ended = False

    @property
    def busy(self) -> str:
        """The hook that runs now, or nothing."""
        return self._current or ""

    @property
    def lags(self) -> bool:
        """Whether something was told that it has not taken in, and still may."""
        return not self._ended and (bool(self._letters) or self._current is not None)

    def wants(self, hook: str) -> bool:
        return hook in self.hooks and not self._ended and (self.failure is None or hook in AFTER_FAILURE)

    def put(self, letter: Letter) -> None:
        self._letters.append(letter)
        self._changed.set()

    def put_news(self, hook: str, event: Event) -> None:
        """Merge into the last such event unless something that is no news came after it."""
        for i in range(len(self._letters) - 1, -1, -1):
            waiting = self._letters[i]
            if waiting.hook not in NEWS:
                break
            if waiting.hook == hook:
                self._letters[i] = waiting._replace(event=coalesce(waiting.event, event))
                self._coalesced += 1
                if self._current is not None:
                    self._say(
                        "merge",
                        "callback %s still runs %s: its batch events are merged from here on (sums are kept)",
                        self.name,
                        self._current,
                    )
                return
        self.put(Letter(hook, event, None))

    def has_room(self, letters: int) -> bool:
        """Whether so many more may be put here before `room` waits."""
        return len(self._letters) + letters <= self._size

    async def room(self) -> None:
        """Wait until no more letters lie here than the mailbox's size."""
        if len(self._letters) <= self._size:
            return
        self._say(
            "full",
            "callback %s is %d events behind, in %s: training waits for it",
            self.name,
            len(self._letters),
            self._current or "no hook",
        )
        began = time.perf_counter()
        try:
            await self._until(lambda: len(self._letters) <= self._size)
        finally:
            self._waited += time.perf_counter() - began

    async def idle(self) -> None:
        """Wait until nothing waits and no hook runs."""
        await self._until(lambda: not self._letters and self._current is None)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not (condition() or self._ended):
            self._progress.clear()
            await self._progress.wait()

    def dismiss(self) -> None:
        """A cancellation from now on is the end."""
        self._dismissed = True

    async def deliver(self) -> None:
        """The task's life: one letter after the other, until it is dismissed and cancelled.

        `asyncio.run` cancels every task at its end; a fit has still to tell then what it has made, and saves.
        """
        try:
            while True:
                try:
                    await self._deliver()
                except asyncio.CancelledError:
                    if self._dismissed:
                        raise
                    as_if_not_cancelled(asyncio.current_task())
        finally:
            self._ended = True
            self._drop(())
            self._progress.set()

    async def _deliver(self) -> None:
        while True:
            while not self._letters:
                self._changed.clear()
                await self._changed.wait()
            letter = self._letters.popleft()
            self._current = letter.hook
            result = None
            began = self.since = time.perf_counter()
            try:
                if letter.take is not None:
                    result = await letter.take()
                elif self.wants(letter.hook):
                    self._delivered += 1
                    result = self._checked(letter, await self._call(letter.hook, letter.event))
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    if not self._dismissed:
                        self._say("cut", "callback %s: %s was cancelled before it had ended", self.name, letter.hook)
                    raise
                self._fail(letter.hook, error)
            except Exception as error:
                if letter.take is None or letter.answer is None or letter.answer.done():
                    self._fail(letter.hook, error)
                else:
                    letter.answer.set_exception(error)  # of whoever asked
            except BaseException as error:
                if letter.hook in self.hooks and inspect.iscoroutinefunction(getattr(self.callback, letter.hook)):
                    raise  # on the loop, SystemExit and KeyboardInterrupt end the program as they would anywhere
                self._fail(letter.hook, error)
            finally:
                self._busy += time.perf_counter() - began
                self._current = None
                if letter.answer is not None and not letter.answer.done():
                    letter.answer.set_result(result)
                self._progress.set()
            del letter

    async def _call(self, hook: str, event: Event) -> Any:
        function = getattr(self.callback, hook)
        if inspect.iscoroutinefunction(function):
            return await function(event)
        if self._thread is None:
            self._thread = _Thread(self.name, self._context)
        result = await self._thread.run(lambda: function(event))
        return await result if inspect.isawaitable(result) else result

    def _checked(self, letter: Letter, result: Any) -> Verdict | None:
        if letter.answer is not None:
            if result is not None and not isinstance(result, Verdict):
                raise TypeError(f"returned {type(result).__name__}, not a Verdict or None")
            return result
        if isinstance(result, Verdict):
            self._say(
                "verdict",
                "callback %s returned a Verdict from %s, which is not asked for one: set decides = True and return it "
                "from on_validation_end or on_epoch_end",
                self.name,
                letter.hook,
            )
        return None

    def _fail(self, hook: str, error: BaseException) -> None:
        if self.failure is not None:
            logger.error("callback %s raised again, in %s", self.name, hook, exc_info=error)
            return
        if isinstance(error, StreamtrainError):
            self.failure = error
        else:
            kind = EnvironmentProblem if isinstance(error, MemoryError) else UserCodeError
            self.failure = kind(
                f"callback {self.name}: {hook} raised {named(error)}",
                hint="The traceback (--debug) shows the line in the callback.",
            )
            self.failure.__cause__ = error
        self._drop({*AFTER_FAILURE, MARK})

    def _drop(self, but: Collection[str]) -> None:
        """Forget what waits, but these hooks; who asked gets no verdict."""
        dropped = [letter for letter in self._letters if letter.hook not in but]
        self._letters = deque(letter for letter in self._letters if letter.hook in but)
        for letter in dropped:
            if letter.answer is not None and not letter.answer.done():
                letter.answer.set_result(None)

    def _say(self, what: str, message: str, *arguments: object) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(message, *arguments)

    async def join(self, timeout: float) -> None:
        """End the thread; one that hangs in a hook is left behind, and that is said."""
        if self._thread is not None and not await self._thread.join(timeout):
            logger.error("callback %s did not return from a hook; its thread is left behind", self.name)

    def statistics(self) -> MailboxStatistics:
        return MailboxStatistics(
            self.name, len(self._letters), self._delivered, self._coalesced, self._busy, self._waited
        )
