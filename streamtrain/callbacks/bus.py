"""The bus carries events from the wheel to the callbacks: one mailbox, one task and (for `def` hooks) one thread each.

Its law: no callback delays another, news never makes the wheel wait, and nothing but news is ever lost.

    news   on_batch_begin, on_batch_end     merged with what still lies in the mailbox; never waits
    emit   everything else                  always put in; then waits until no mailbox holds more than its size
    ask    emit, then the deciders' verdicts
    mark   no event: what is to be done between what was told so far and what is told later; never waits
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
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

from streamtrain.callbacks import naming
from streamtrain.callbacks.base import NEWS, hooks_of
from streamtrain.ending import as_if_not_cancelled, to_its_end
from streamtrain.errors import EnvironmentProblem, StreamtrainError, UserCodeError, named
from streamtrain.events import BatchBegin, BatchEnd, Event, Verdict
from streamtrain.threads import tell
from streamtrain.watchdog import Busy

T = TypeVar("T")
logger = logging.getLogger(__name__)

AFTER_FAILURE = frozenset({"on_exception", "on_train_end"})
"""The hooks that a callback is still given after one of its hooks raised."""
_MARK = "state_dict"
"""Stands for a hook where a callback's state is taken."""
_LAST_WORDS = 1.0
"""Seconds that hooks have at the end, however late it is."""


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


@dataclass(frozen=True, slots=True)
class BusStatistics:
    """How the callbacks keep up, in their order."""

    mailboxes: tuple[MailboxStatistics, ...]

    @property
    def waited(self) -> float:
        """Seconds for which the wheel waited for callbacks, verdicts not counted."""
        return sum(box.waited for box in self.mailboxes)


class _Letter(NamedTuple):
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


class _Mailbox:
    """One callback: what waits for it, the task that delivers, and its thread."""

    def __init__(self, callback: object, name: str, size: int) -> None:
        self.name = name
        self.hooks = hooks_of(callback)
        self.decides = bool(getattr(callback, "decides", False))
        self.failure: StreamtrainError | None = None
        self.callback = callback
        self._size = size
        self._letters: deque[_Letter] = deque()
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

    def put(self, letter: _Letter) -> None:
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
        self.put(_Letter(hook, event, None))

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

    def _checked(self, letter: _Letter, result: Any) -> Verdict | None:
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
        self._drop({*AFTER_FAILURE, _MARK})

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


class Bus:
    """Delivers events to callbacks while `async with bus:` lasts; used from one event loop.

    `mailbox`: events that may wait for a callback before the wheel waits for it.
    `grace`: seconds that hooks still have when the block is left by an exception; without one they have all they need.
    """

    def __init__(self, callbacks: Sequence[object], *, mailbox: int = 64, grace: float = 25.0) -> None:
        self._boxes = tuple(
            _Mailbox(callback, name, mailbox) for callback, name in zip(callbacks, naming.named(callbacks), strict=True)
        )
        self._grace = grace
        self._tasks: dict[_Mailbox, asyncio.Task[None]] = {}
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._given_up = False
        self.wants: frozenset[str] = frozenset().union(*(box.hooks for box in self._boxes))
        """The hooks that somebody defines; events for others need not be made."""
        self._by_hook = {hook: tuple(box for box in self._boxes if hook in box.hooks) for hook in self.wants}

    async def __aenter__(self) -> Bus:
        self._tasks = {
            box: asyncio.create_task(box.deliver(), name=f"streamtrain-callback-{box.name}")
            for box in self._boxes
            if box.hooks
        }
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Deliver what waits, end the tasks and join the threads; a cancellation meanwhile starts the grace."""
        cancelled: asyncio.CancelledError | None = None
        if kind is None:
            try:
                await self.drain()
            except asyncio.CancelledError as caught:
                cancelled = caught
        await to_its_end(self._close(), "streamtrain-callbacks-end")
        if cancelled is not None:
            raise cancelled

    def news(self, hook: str, event: Event) -> None:
        """Tell a batch event to whom it concerns, merged with what they have not read yet; never waits."""
        for box in self._by_hook.get(hook, ()):
            if box.wants(hook):
                box.put_news(hook, event)

    async def emit(self, hook: str, event: Event) -> None:
        """Tell an event to whom it concerns; returns once every mailbox has room again, not when the hooks are done."""
        for box in self.put(hook, event):
            await box.room()

    async def ask(self, hook: str, event: Event) -> list[Verdict]:
        """Tell an event to all and return the deciders' verdicts, in the callbacks' order.

        Raises what `check` raises if a hook failed.
        """
        answers: list[asyncio.Future[Any]] = []
        boxes = self.put(hook, event, answers)
        for box in boxes:
            await box.room()
        verdicts = [await answer for answer in answers]
        self.check()
        return [cast(Verdict, verdict) for verdict in verdicts if verdict is not None]

    def put(self, hook: str, event: Event, answers: list[asyncio.Future[Any]] | None = None) -> list[_Mailbox]:
        """Tell an event to whom it concerns, without waiting for room; `answers`: where the deciders' are to come."""
        boxes = [box for box in self._by_hook.get(hook, ()) if box.wants(hook)]
        for box in boxes:
            answer = None
            if answers is not None and box.decides:
                answer = asyncio.get_running_loop().create_future()
                answers.append(answer)
            box.put(_Letter(hook, event, answer))
        return boxes

    async def drain(self, only: Callable[[object], bool] = lambda callback: True) -> None:
        """Wait until all that was told so far has been dealt with, by all or by the callbacks that `only` picks."""
        for box in self._boxes:
            if only(box.callback):
                await box.idle()

    def mark(
        self, only: Callable[[object], bool], take: Callable[[object], Awaitable[T]]
    ) -> dict[str, asyncio.Future[T | None]]:
        """Have `take(callback)` awaited once a callback has taken in what was told so far, before it is given anything
        that is told later: by name what that gave, of those that `only` picks and that lag just now. None of one that
        is left behind before it comes there.
        """
        marks: dict[str, asyncio.Future[T | None]] = {}
        for box in self._boxes:
            if only(box.callback) and box.lags:
                marks[box.name] = answer = asyncio.get_running_loop().create_future()
                answer.add_done_callback(lambda mark: mark.cancelled() or mark.exception())  # nobody may want it then
                box.put(_Letter(_MARK, Event(), answer, partial(take, box.callback)))
        return marks

    def hurry(self, seconds: float) -> None:
        """Hooks have so many seconds from now on: a callback that is in one then is left behind, and that is said."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._deadline = loop.time() + seconds
        self._timer = loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        for box, task in self._tasks.items():
            if box.busy and not task.done():
                logger.error("callback %s has not returned from %s: it is left behind", box.name, box.busy)
                self._given_up = True
                box.dismiss()
                task.cancel()

    def check(self) -> None:
        """Raise the error of the first callback, in their order, that failed; costs nothing if none did.

        A StreamtrainError raised by a hook comes as it is, anything else as a UserCodeError naming callback and hook.
        """
        for box in self._boxes:
            if box.failure is not None:
                raise box.failure

    def busy(self) -> Iterator[Busy]:
        """The hooks that run now."""
        late = time.monotonic() - time.perf_counter()
        for box in self._boxes:
            if box.busy:
                own = {"thread": f"streamtrain-{box.name}", "task": f"streamtrain-callback-{box.name}"}
                yield Busy(f"callback {box.name}, in {box.busy},", box.since + late, **own)

    def named(self) -> dict[str, object]:
        """The callbacks by the names that they have in messages and checkpoints."""
        return {box.name: box.callback for box in self._boxes}

    def statistics(self) -> BusStatistics:
        """How each callback keeps up."""
        return BusStatistics(tuple(box.statistics() for box in self._boxes))

    async def _close(self) -> None:
        loop, patience, hurried = asyncio.get_running_loop(), self._grace, self._deadline is not None
        if self._deadline is not None:
            patience = max(_LAST_WORDS, self._deadline - loop.time())
        until = loop.time() + patience
        waiting = [asyncio.ensure_future(box.idle()) for box in self._boxes]
        late = (await asyncio.wait(waiting, timeout=patience))[1] if waiting else set()
        if self._timer is not None:
            self._timer.cancel()
        for box in self._tasks:
            box.dismiss()
        for task in [*late, *self._tasks.values()]:
            task.cancel()
        await asyncio.gather(*late, *self._tasks.values(), return_exceptions=True)
        # A hook that was cut off may still run in its thread, though nothing waits for its callback.
        left = 0.0 if late or self._given_up else until - loop.time()
        await asyncio.gather(*(box.join(max(left, 0.1 if hurried else _LAST_WORDS)) for box in self._boxes))
