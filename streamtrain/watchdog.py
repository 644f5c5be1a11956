"""The watchdog: names what has not come back for a while, where it stands, and since when.

Its law: it costs nothing per step. It looks now and then at what is under way, on the loop, and ends nothing: whoever
reads what it says knows whether a save of an hour is one that hangs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType

from streamtrain import stacks

logger = logging.getLogger(__name__)

OFTEN = 15.0
"""Seconds between two looks, at most."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Something that has begun and is not over."""

    what: str
    """As a sentence begins: "the save of step 12"."""
    since: float
    """On `time.monotonic`'s clock."""
    thread: str = ""
    """The name of the thread that does it, if there is one."""
    task: str = ""
    """The name of the task that does it, if there is one."""


class Watchdog:
    """`with Watchdog(patience, ask):` on a running loop; `ask()` tells what is under way; each is named once."""

    def __init__(self, patience: float, ask: Callable[[], Iterable[Busy]]) -> None:
        """`patience`: seconds; 0: nothing is ever named."""
        self._patience, self._ask = patience, ask
        self._named: set[tuple[str, int]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Watchdog:
        if self._patience:
            self._look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        loop, now = asyncio.get_running_loop(), time.monotonic()
        for busy in self._ask():
            mark = (busy.what, round(busy.since))
            if now - busy.since >= self._patience and mark not in self._named:
                self._named.add(mark)
                clock = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - busy.since)))
                said = "%s has not come back for %.3g s, since %s: it is waited for, and stands at\n%s"
                logger.warning(said, busy.what, now - busy.since, clock, "\n".join(_where(busy, loop)))
        self._timer = loop.call_later(min(OFTEN, self._patience / 4), self._look)


def _where(busy: Busy, loop: asyncio.AbstractEventLoop) -> list[str]:
    threads = [thread for thread in threading.enumerate() if thread.name == busy.thread]
    lines = [line for thread in threads for line in stacks.of_thread(thread)]
    for task in asyncio.all_tasks(loop) if busy.task and not lines else ():
        if task.get_name() == busy.task:
            lines += stacks.of_task(task)
    return lines or ["nobody knows where"]
