"""From a signal to a saved run, for whoever owns the process: the command line and the demo.

Its law: a signal never loses a finished step, and is always obeyed in time: the first one has the step finished and
the run saved; a second one, or `grace` seconds, end the process. A thread of its own hears of signals as they come,
through Python's wakeup descriptor, so that it keeps the time even where the main thread is stuck in a call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from streamtrain import stacks
from streamtrain.grace import lost
from streamtrain.outlet import Outlet, write
from streamtrain.signals import SAVING, SHOWING, SIGNALS, Interrupted, capture

if TYPE_CHECKING:
    from streamtrain.trainer import Trainer

T = TypeVar("T")
logger = logging.getLogger(__name__)

HEAVY = ("numpy", "torch", "zarr")
"""What every command with a watch needs, and what takes long to load."""
SAME = 0.2
"""Seconds within which a second SIGINT may be the first one again: timeout(1) signals its child, then their group."""
HURRY = 1.5
"""Seconds that are left to a run after such a one: whoever did press Ctrl-C twice waits no longer than that."""
PATIENCE = 0.3
"""Seconds that a word to the user is waited for before the process ends."""


class Watch:
    """`with Watch(grace) as watch:`; until `begins` a signal raises Interrupted, from then on it stops the trainer."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.signum = 0
        """The first signal's number that asks for the end; 0 while there was none."""
        self._when = 0.0
        self._loading = False
        self._trainer: Trainer | None = None
        self._work: tuple[asyncio.AbstractEventLoop, Callable[[], object]] | None = None
        """What a command does that has nothing to save: its loop, and what cancels it."""
        self._bell, self._ear = socket.socketpair()
        self._hearing = threading.Thread(target=self._hear, name="streamtrain-watch", daemon=True)
        self._stack = ExitStack()
        self._out: Outlet | None = None
        """To stderr, whoever else writes there, and if it is still there; while this is open."""

    def __enter__(self) -> Watch:
        self._bell.setblocking(False)
        self._out = Outlet(lambda line: write(2, line.encode()), name="streamtrain-watch-stderr")
        self._stack.callback(self._out.close)
        self._stack.callback(self._bell.close)
        self._stack.callback(self._ear.close)
        with ExitStack() as stack:
            before = self._take_bell()
            stack.callback(self._give_bell_back, before)
            stack.enter_context(capture(self._first, second=self._rung, save=self._save, show=self._rung))
            self._hearing.start()
            self._stack.callback(self._hearing.join)
            self._stack.callback(self._bell.send, b"\0")
            self._stack.push(stack.pop_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if isinstance(error, Exception) and self.signum and self._trainer is None:
            # What was being imported when Interrupted was raised there has made another error of it.
            raise Interrupted(self.signum) from error

    def load(self, *modules: str) -> None:
        """Import these, each to its end: an exception out of a handler within C++ that is being loaded aborts the
        process. Raises Interrupted if a signal came meanwhile."""
        for name in modules:
            self._loading = True
            try:
                import_module(name)
            finally:
                self._loading = False
            if self.signum:
                raise Interrupted(self.signum)

    def begins(self, trainer: Trainer) -> None:
        """This trainer's `fit` begins; a signal that has come already is passed on. May be called again."""
        self._trainer = trainer
        if self.signum:
            self._stop()

    async def cancelling(self, work: Coroutine[Any, Any, T]) -> T:
        """Await what has nothing to save: a signal cancels it, and Interrupted is raised once it has unwound."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        self._work = loop, task.cancel
        if self.signum:  # whatever ran when it came has kept Interrupted to itself
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if self.signum:
                raise Interrupted(self.signum) from None
            raise
        finally:
            task.cancel()
            self._work = None

    def exit_code(self, reason: str) -> int:
        """0, or 128 + the signal's number if the fit ended because of it."""
        return 128 + self.signum if self.signum and reason == "signal" else 0

    # --- on the main thread, in a handler ---

    def _first(self, signum: int) -> None:
        self._rung(signum)
        self.signum, self._when = signum, time.monotonic()
        if self._work is not None:
            loop, cancel = self._work
            loop.call_soon_threadsafe(cancel)
        elif self._trainer is not None:
            self._stop()
        elif not self._loading:
            raise Interrupted(signum)

    def _save(self, signum: int) -> None:
        self._rung(signum)
        if self._trainer is not None and not self._trainer.control.late:
            self._trainer.control.save()

    def _stop(self) -> None:
        assert self._trainer is not None
        left = max(0.0, self._when + self.grace - time.monotonic())
        self._trainer.control.stop("signal", signal.Signals(self.signum).name, within=left)

    def _rung(self, signum: int) -> None:
        """The thread hears of signals by itself, unless somebody else, such as an event loop, took its descriptor."""
        if (theirs := self._take_bell()) != self._bell.fileno():
            signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
            self._bell.send(bytes([signum]))

    def _take_bell(self) -> int:
        return signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)

    def _give_bell_back(self, before: int) -> None:
        if (theirs := signal.set_wakeup_fd(-1)) == self._bell.fileno():
            theirs = before
        with suppress(ValueError, OSError):  # whoever had it has closed it
            signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)

    # --- on a thread of its own ---

    def _hear(self) -> None:
        """Tell of each signal; after the first that asks for the end be patient for so long."""
        first, began, patience = 0, 0.0, self.grace
        while True:
            left = max(0.001, began + patience - time.monotonic()) if first else None
            self._ear.settimeout(left)
            try:
                heard = self._ear.recv(64)
            except TimeoutError:
                self._lose_patience(first, patience)
            for signum in heard:
                if not signum:
                    return
                if signum in SHOWING:
                    self._show(signum)
                elif signum in SAVING:
                    self._tell_of_save(signum)
                elif signum in SIGNALS and not first:
                    first, began = signum, time.monotonic()
                    if self._trainer is not None:
                        name = signal.Signals(signum).name
                        self._tell(f"{name}: finishing the step and saving; once more to leave at once")
                elif signum in SIGNALS and (signum == signal.SIGINT or signum != first):
                    since = time.monotonic() - began
                    if since >= SAME:
                        self._tell(f"{signal.Signals(signum).name} again: leaving at once, {self._stands()}")
                        os._exit(128 + first)
                    patience = min(patience, since + HURRY)

    def _lose_patience(self, signum: int, patience: float) -> NoReturn:
        what = "ended" if self._trainer is None else "saved"
        self._tell(f"not {what} within {patience:.3g} s: leaving, {self._stands()}")
        if patience == self.grace:
            self._tell(f"what is left:\n{stacks.everything(self._loop)}")
        os._exit(128 + signum)

    def _stands(self) -> str:
        """What is left of the run if it ends here."""
        path, step = getattr(self._trainer, "checkpoint", None), getattr(self._trainer, "state", None)
        if path is None or step is None:
            return "the last checkpoint stands"
        return f"the last checkpoint stands: {path.name}" + lost(path, step.step)

    @property
    def _loop(self) -> asyncio.AbstractEventLoop | None:
        if self._work is not None:
            return self._work[0]
        return None if self._trainer is None else self._trainer.control.loop

    def _show(self, signum: int) -> None:
        shown = f"{signal.Signals(signum).name}: where it stands, and goes on\n{stacks.everything(self._loop)}"
        self._tell(shown)
        logger.info(shown, extra={"shown": True})

    def _tell_of_save(self, signum: int) -> None:
        told = "saving, and going on"
        if self._trainer is None:
            told = "there is nothing to save"
        elif self._trainer.control.late:
            told = "the fit has ended: nothing more is saved"
        self._tell(f"{signal.Signals(signum).name}: {told}")

    def _tell(self, line: str) -> None:
        """Say something on stderr; a reader who is stuck keeps nobody from leaving in time."""
        if self._out is not None:
            self._out.put(f"\n{line}\n", wait=PATIENCE)
