"""Signals: the first one asks, the second one ends; the handlers that were there come back.

Used by the command line and `fit_sync`, never by `fit`. It works through `signal.signal`, since what event loops offer
does not put the old handlers back; the handler runs on the main thread between two bytecodes and must not block.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal came while there was nothing to finish and save: to be raised by an `on_first`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass(slots=True)
class Captured:
    """What has come in so far."""

    first: int | None = None
    """Number of the first signal; a process that ends because of it exits with 128 + this."""
    count: int = 0


def leave(signum: int) -> None:
    """End the process at once with 128 + `signum`; no clean-up runs, and committed checkpoints stand."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{signal.Signals(signum).name} again: leaving at once, the last checkpoint stands\n".encode())
    os._exit(128 + signum)


@contextmanager
def capture(on_first: Callable[[int], None], *, second: Callable[[int], None] = leave) -> Iterator[Captured]:
    """While this is open, the first of SIGINT, SIGTERM, SIGHUP calls `on_first` and each later one `second`.

    A repeated SIGTERM or SIGHUP is no second one: timeout(1) and terminals that close send theirs twice. Both functions
    are called on the main thread with the signal's number and must not block. A SIGHUP that is ignored (nohup)
    stays ignored. Raises ValueError outside of the main thread, before anything is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("signals can be captured on the main thread only")
    captured = Captured()

    def handle(signum: int, frame: FrameType | None) -> None:
        captured.count += 1
        if captured.first is None:
            captured.first = signum
            on_first(signum)
        elif signum == signal.SIGINT or signum != captured.first:
            second(signum)

    wanted = [number for number in SIGNALS if not _left_alone(number)]
    before = {number: signal.getsignal(number) for number in wanted}
    try:
        for number in wanted:
            signal.signal(number, handle)
        yield captured
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def untouched() -> bool:
    """Whether this is the main thread and SIGINT and SIGTERM still do what Python starts with."""
    return (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )


def _left_alone(number: signal.Signals) -> bool:
    """A handler set from C can't be put back; a hangup that somebody chose to ignore is to be ignored."""
    handler = signal.getsignal(number)
    return handler is None or (number is signal.SIGHUP and handler is signal.SIG_IGN)
