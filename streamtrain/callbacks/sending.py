"""The thread that hands lines to a service, in batches, in their order, for as long as it takes.

Its law: a batch is tried again until the service has it; the next one waits for that. A batch that the service refuses
for what it holds is halved, down to the lines that it will not have, and these are put aside. Pauses double, blurred by
chance, so that many runs do not come back all at once.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamtrain.callbacks.spool import Spool

logger = logging.getLogger(__name__)

LONGEST = 60.0
"""Seconds between two tries."""
ASKED = 3600.0
"""Seconds for which a service is left alone at most, if it asks for it."""


class Away(Exception):
    """The service did not take a batch now, but may later."""

    def __init__(self, reason: str, *, after: float | None = None, human: str = "") -> None:
        super().__init__(reason)
        self.after = after
        """Seconds for which it asked to be left alone."""
        self.human = human
        """The answer, where somebody has to see to it first: another token, another address."""


class Refused(Exception):
    """The service will never take this batch as it is."""

    def __init__(self, reason: str, *, large: bool = False) -> None:
        super().__init__(reason)
        self.large = large
        """Whether there is too much of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How lines go."""

    batch: int
    """Lines that go together, at most."""
    every: float
    """Seconds until a batch that is not full goes."""
    pause: float
    """Seconds after the first failure; doubled after each further one."""


class Sender:
    """Sends what is put until `end`. `post(lines)` raises Away or Refused; `where` names the service in messages."""

    def __init__(self, spool: Spool, post: Callable[[Sequence[str]], None], where: str, pace: Pace) -> None:
        self.spool = spool
        self._post, self._where, self._pace = post, where, pace
        self._wake, self._ending = threading.Event(), threading.Event()
        self._deadline = float("inf")
        self._tries = 0
        self._together = self._limit = pace.batch
        """Lines that go together now, and at most."""
        self._said: set[str] = set()
        # A daemon, so that a service which never answers cannot keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="streamtrain-remote", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """A line to send."""
        try:
            self.spool.put(line)
        except OSError as error:
            self._disk(error)
        if self.spool.waiting >= self._pace.batch:
            self._wake.set()

    def end(self, seconds: float) -> None:
        """Send the rest, for at most so long; what is left then goes into the file."""
        self._deadline = time.monotonic() + seconds
        self._ending.set()
        self._wake.set()
        self._thread.join(seconds + 1.0)
        self._aside()
        if self._thread.is_alive():
            logger.error("%s has not answered: the thread that waits for it is left behind", self._where)

    def _work(self) -> None:
        while not self._ending.is_set():
            self._wake.wait(self._pace.every)
            self._wake.clear()
            self._send()
        self._send()

    def _send(self) -> None:
        """Batch after batch, until nothing is left or the time is up."""
        while time.monotonic() < self._deadline:
            try:
                lines = self.spool.head(self._together)
            except OSError as error:
                return self._disk(error)
            if not lines:
                return None
            try:
                self._post(lines)
            except Refused as error:
                self._refused(lines, error)
                continue
            except Away as error:
                self._wait(error)
                continue
            if self._tries:
                logger.info("%s takes lines of the log again", self._where)
            self._count(lines)
        return None

    def _count(self, lines: Sequence[str]) -> None:
        self.spool.delivered(lines)
        self._tries = 0
        self._together = min(2 * self._together, self._limit)

    def _refused(self, lines: Sequence[str], error: Refused) -> None:
        if len(lines) > 1:
            self._together = len(lines) // 2
            if error.large:
                self._limit = self._together
            return
        try:
            aside = self.spool.aside(lines[0])
        except OSError as problem:
            self._disk(problem)
            aside = None
        if aside is None:
            self._say("left out", "%s refuses lines of the log, which are left out: %s", self._where, error)
        else:
            text = "%s refuses lines of the log, which are put aside in %s: %s"
            self._say("refused", text, self._where, aside, error)
        self.spool.delivered(lines)

    def _wait(self, error: Away) -> None:
        if error.human:
            text = "%s takes no lines of the log until that is seen to; they wait: %s"
            self._say(f"human {error.human}", text, self._where, error)
        elif not self._tries:
            self._say("away", "%s takes no lines of the log now; they wait: %s", self._where, error)
        pause = min(self._pace.pause * 2.0 ** min(self._tries, 30), LONGEST)
        until = time.monotonic() + (random.Random().uniform(0.5, 1.0) * pause if error.after is None else error.after)
        self._tries += 1
        self._stow()
        while (left := min(until, self._deadline) - time.monotonic()) > 0:
            if self._wake.wait(left):
                self._wake.clear()
                self._stow()
                if self._ending.is_set():
                    left = max(0.0, min(until, self._deadline) - time.monotonic())
                    self._wake.wait(left)  # nobody puts any more
                    return

    def _stow(self) -> None:
        try:
            self.spool.stow()
        except OSError as error:
            self._disk(error)

    def _aside(self) -> None:
        self._stow()
        try:
            self.spool.sync()
        except OSError as error:
            self._disk(error)
        if left := self.spool.left:
            logger.warning("lines for %s wait in %s: the next fit in this folder sends them", self._where, left)
        lost = self.spool.dropped + self.spool.waiting
        if lost:
            why = "there was no room to keep them" if self.spool.on_disk else "without a run_dir they are kept nowhere"
            logger.warning("%d lines of the log never reached %s: %s", lost, self._where, why)

    def _disk(self, error: OSError) -> None:
        self._say("disk", "lines for %s can't be kept on the disk: %s", self._where, error.strerror or error)

    def _say(self, what: str, message: str, *arguments: object) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(message, *arguments)
