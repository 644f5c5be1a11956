"""The bus carries events from the wheel to the callbacks: one mailbox, one task and (for `def` hooks) one thread each.

Its law: no callback delays another, news never makes the wheel wait, and nothing but news is ever lost.

    news   on_batch_begin, on_batch_end     merged with what still lies in the mailbox; never waits
    emit   everything else                  always put in; then waits until no mailbox holds more than its size
    ask    emit, then the deciders' verdicts
    mark   no event: what is to be done between what was told so far and what is told later; never waits
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar, cast

from streamtrain.callbacks import naming
from streamtrain.callbacks.mailbox import MARK, Letter, Mailbox, MailboxStatistics
from streamtrain.ending import to_its_end
from streamtrain.events import Event, Verdict
from streamtrain.watchdog import Busy

T = TypeVar("T")
logger = logging.getLogger(__name__)

_LAST_WORDS = 1.0
"""Seconds that hooks have at the end, however late it is."""


@dataclass(frozen=True, slots=True)
class BusStatistics:
    """How the callbacks keep up, in their order."""

    mailboxes: tuple[MailboxStatistics, ...]

    @property
    def waited(self) -> float:
        """Seconds for which the wheel waited for callbacks, verdicts not counted."""
        return sum(box.waited for box in self.mailboxes)


class Bus:
    """Delivers events to callbacks while `async with bus:` lasts; used from one event loop.

    `mailbox`: events that may wait for a callback before the wheel waits for it.
    `grace`: seconds that hooks still have when the block is left by an exception; without one they have all they need.
    """

    def __init__(self, callbacks: Sequence[object], *, mailbox: int = 64, grace: float = 25.0) -> None:
        self._boxes = tuple(
            Mailbox(callback, name, mailbox) for callback, name in zip(callbacks, naming.named(callbacks), strict=True)
        )
        self._grace = grace
        self._tasks: dict[Mailbox, asyncio.Task[None]] = {}
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

    def put(self, hook: str, event: Event, answers: list[asyncio.Future[Any]] | None = None) -> list[Mailbox]:
        """Tell an event to whom it concerns, without waiting for room; `answers`: where the deciders' are to come."""
        boxes = [box for box in self._by_hook.get(hook, ()) if box.wants(hook)]
        for box in boxes:
            answer = None
            if answers is not None and box.decides:
                answer = asyncio.get_running_loop().create_future()
                answers.append(answer)
            box.put(Letter(hook, event, answer))
        return boxes

    def has_room(self, events: int) -> bool:
        """Whether so many more can be emitted without a wait."""
        return all(box.has_room(events) for box in self._boxes)

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
                box.put(Letter(MARK, Event(), answer, partial(take, box.callback)))
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
