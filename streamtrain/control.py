"""The one door for stop, pause, resume, save and set_lr: signals, dashboards, callbacks and cancellation knock here.

Its law: knocking never blocks and is safe from any thread or signal handler; what was asked for happens between two
updates. The train thread reads `pending` before each update, a plain attribute.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stop:
    """End after the current update."""

    reason: str
    """FitResult.reason: "stopped", "signal" or "cancelled"."""
    detail: str = ""
    deadline: float | None = field(default=None, compare=False)
    """Until when all has to be saved and closed, on `time.monotonic`'s clock; None: it may take its time."""


@dataclass(frozen=True, slots=True)
class Save:
    """Save a checkpoint: into the run's folder, or to `path`."""

    path: Path | None = None
    done: Callable[[Path | None, BaseException | None], None] | None = None
    """Called on the loop with the committed path, or with the error; with neither if the fit ended before."""


@dataclass(slots=True)
class Requests:
    """What was asked for since the last `take`."""

    stop: Stop | None = None
    saves: list[Save] = field(default_factory=list)
    lr: float | None = None


class Control:
    """Requests to the wheel; the first stop wins, the last learning rate wins.

    A stop, a pause or a save is meant for the fit that runs or was called for, or else for the first one. One that
    comes when a fit has ended, and no other was called for, has come too late for it, and is not the next one's.
    """

    def __init__(self) -> None:
        self.pending = False
        """Something waits to be taken: the current burst ends after its update."""
        self.paused = False
        self._rates: deque[float] = deque(maxlen=1)
        self._saves: deque[Save] = deque()
        self._stop: Stop | None = None
        self._late = False
        self._forgotten = 0
        """Saves that came too late and that nobody was told of."""
        self._hasten: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._knocked: asyncio.Event | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of the fit that runs."""
        return self._loop

    @property
    def late(self) -> bool:
        """Whether the last fit has ended, and no other was called for: what is asked for now is asked of nobody."""
        return self._late

    @property
    def stopping(self) -> Stop | None:
        """The first stop that was asked for."""
        return self._stop

    def expect(self) -> None:
        """A fit was called for: what is asked for from now on is meant for it, even if its task has not begun."""
        self._late = False
        self.say_forgotten()

    def say_forgotten(self) -> None:
        """Say which saves came too late. Not where they are asked for: that may be a signal's handler, which may not
        log."""
        forgotten, self._forgotten = self._forgotten, 0
        if forgotten:
            logger.warning("saves that were asked for after a fit had ended, and are not made: %d", forgotten)

    def bind(self, hasten: Callable[[], None] | None = None) -> None:
        """Serve the running loop from now on, beginning with what was asked for before.

        `hasten`: called on the loop whenever a stop is asked for that has a deadline.
        """
        self._hasten = hasten
        self._loop = asyncio.get_running_loop()
        self._knocked = asyncio.Event()
        self._late = False
        self.pending = bool(self._rates or self._saves) or self.paused or self._stop is not None

    def unbind(self) -> None:
        """The wheel stands still; who waits for a save that was not begun is told, and who asks for one from now on. A
        save that nobody waits for, as a signal's, is not the next fit's: it is forgotten, and that is said."""
        self._loop = self._knocked = self._stop = self._hasten = None
        self.paused, self._late = False, True
        saves, self._saves = self._saves, deque()
        if unmade := sum(save.done is None for save in saves):
            logger.warning("saves that were asked for as the fit ended, too late to be made: %d", unmade)
        for save in saves:
            if save.done is not None:
                self.save(save)

    def stop(self, reason: str = "stopped", detail: str = "", *, within: float | None = None) -> None:
        """End after the current update, save, and give `reason` as the result's; all `within` so many seconds.

        A later stop gives no other reason, but it may leave less time.
        """
        if self._late:
            return
        deadline = None if within is None else time.monotonic() + within
        if self._stop is None:
            self._stop = Stop(reason, detail, deadline)
        elif deadline is None or (self._stop.deadline is not None and self._stop.deadline <= deadline):
            return
        else:
            self._stop = replace(self._stop, deadline=deadline)
        self._knock()
        if deadline is not None and self._hasten is not None:
            self._soon(self._hasten)

    def pause(self) -> None:
        """Wait after the current update until `resume` or `stop`."""
        if not self._late:
            self.paused = True
            self._knock()

    def resume(self) -> None:
        """Go on."""
        self.paused = False
        self._knock()

    def save(self, save: Save | None = None) -> None:
        """Save after the current update, or now if the wheel waits for callbacks; not at all once the fit has ended."""
        save = save or Save()
        if not self._late:
            self._saves.append(save)
            self._knock()
        elif save.done is not None:
            save.done(None, None)
        else:
            self._forgotten += 1

    def set_lr(self, lr: float) -> None:
        """Bring the first group's learning rate to `lr`, the others in proportion."""
        self._rates.append(float(lr))
        self._knock()

    def _knock(self) -> None:
        self.pending = True
        if self._knocked is not None:
            self._soon(self._knocked.set)

    def _soon(self, fn: Callable[[], object]) -> None:
        """On the loop."""
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(fn)
            except RuntimeError:  # the loop was closed meanwhile
                self._loop = None

    def take(self) -> Requests:
        """All that was asked for since the last time."""
        self.pending = False  # first: what comes in meanwhile sets it again
        return Requests(stop=self._stop, saves=self.take_saves(), lr=self.take_rate())

    def take_rate(self) -> float | None:
        """The learning rate that was asked for last, and not taken yet."""
        return self._rates.popleft() if self._rates else None

    @property
    def saves_wait(self) -> bool:
        """Whether a save was asked for that is not taken yet."""
        return bool(self._saves)

    def take_saves(self) -> list[Save]:
        """The saves that were asked for; all else waits for its turn."""
        saves = []
        while self._saves:
            saves.append(self._saves.popleft())
        return saves

    async def knocked(self) -> None:
        """Wait for the next request."""
        assert self._knocked is not None, "control is bound while the wheel turns"
        await self._knocked.wait()
        self._knocked.clear()
