"""From a signal to a saved run, for whoever owns the process: the command line and the demo.

Its law: a signal never loses a finished step, and is always obeyed in time: the first one has the step finished and
the run saved; a second one, or `grace` seconds, end the process.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from streamtrain.signals import Interrupted, capture, leave

if TYPE_CHECKING:
    from streamtrain.trainer import Trainer


SAME = 0.2
"""Seconds within which a second SIGINT may be the first one again: timeout(1) signals its child, then their group."""
HURRY = 1.5
"""Seconds that are left to a run after such a one: whoever did press Ctrl-C twice waits no longer than that."""


class Watch:
    """`with Watch(grace) as watch:`; until `begins` a signal raises Interrupted, from then on it stops the trainer."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.signum = 0
        """The first signal's number; 0 while there was none."""
        self._when = 0.0
        self._trainer: Trainer | None = None
        self._news: queue.SimpleQueue[int] = queue.SimpleQueue()  # a signal handler may put where it may not wait
        self._waiting = threading.Thread(target=self._wait, name="streamtrain-watch", daemon=True)
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        self._waiting.start()
        self._stack.enter_context(capture(self._first, second=self._second))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._news.put(0)
        self._waiting.join()

    def begins(self, trainer: Trainer) -> None:
        """This trainer's `fit` begins; a signal that has come already is passed on. May be called again."""
        self._trainer = trainer
        if self.signum:
            self._stop()

    def exit_code(self, reason: str) -> int:
        """0, or 128 + the signal's number if the fit ended because of it."""
        return 128 + self.signum if self.signum and reason == "signal" else 0

    def _first(self, signum: int) -> None:
        self.signum, self._when = signum, time.monotonic()
        self._news.put(signum)
        if self._trainer is None:
            raise Interrupted(signum)
        self._stop()

    def _second(self, signum: int) -> None:
        if time.monotonic() - self._when >= SAME:
            leave(self.signum)
        else:
            self._news.put(signum)

    def _stop(self) -> None:
        assert self._trainer is not None
        self._trainer.control.stop("signal", signal.Signals(self.signum).name)

    def _wait(self) -> None:
        """On a thread of its own: tell of the signal, then be patient for so long."""
        signum, patience = self._news.get(), self.grace
        if not signum:
            return
        if self._trainer is not None:
            _tell(f"{signal.Signals(signum).name}: finishing the step and saving; once more to leave at once")
        try:
            while self._news.get(timeout=patience):
                patience = min(HURRY, self.grace)
        except queue.Empty:
            what = "ended" if self._trainer is None else "saved"
            _tell(f"not {what} within {patience:g} s: leaving, the last checkpoint stands")
            os._exit(128 + signum)


def _tell(line: str) -> None:
    """Say something on stderr, whoever else writes there, and if it is still there."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
