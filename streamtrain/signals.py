"""Signals: the first one asks, the second one ends; the handlers that were there are called too, and come back.

    SIGINT, SIGTERM, SIGHUP    the first asks for the end, a second one ends at once
    SIGUSR1, SIGUSR2           save and go on
    SIGQUIT                    say where everything stands, and go on

Used by the command line and `fit_sync`, never by `fit`. It works through `signal.signal`, since what event loops offer
does not put the old handlers back; the handler runs on the main thread between two bytecodes and must not block.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVING: tuple[signal.Signals, ...] = (signal.SIGUSR1, signal.SIGUSR2)
SHOWING: tuple[signal.Signals, ...] = (signal.SIGQUIT,)
MAY_BE_IGNORED = (signal.SIGHUP, *SAVING)
"""Where somebody chose to ignore these they stay ignored. SIGINT and SIGQUIT do not: a shell script ignores them for
whatever it starts in the background, and nobody chose that."""

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """A signal came while there was nothing to finish and save: to be raised by an `on_first`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass(slots=True)
class Captured:
    """What has come in so far, of those that end."""

    first: int | None = None
    """Number of the first signal; a process that ends because of it exits with 128 + this."""
    count: int = 0


def leave(signum: int) -> None:
    """End the process at once with 128 + `signum`; no clean-up runs, and committed checkpoints stand."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{signal.Signals(signum).name} again: leaving at once, the last checkpoint stands\n".encode())
    os._exit(128 + signum)


@contextmanager
def capture(
    on_first: Callable[[int], None],
    *,
    second: Callable[[int], None] = leave,
    save: Callable[[int], None] | None = None,
    show: Callable[[int], None] | None = None,
) -> Iterator[Captured]:
    """While this is open, the first of SIGINT, SIGTERM, SIGHUP calls `on_first` and each later one `second`.

    SIGUSR1 and SIGUSR2 call `save`, SIGQUIT calls `show`; they are left alone where these are None. A repeated SIGTERM
    or SIGHUP is no second one: timeout(1) and terminals that close send theirs twice. All four are called on the main
    thread with the signal's number and must not block. A SIGHUP (SIGUSR1, SIGUSR2) that is ignored, as by nohup, stays
    ignored.

    A handler that the program had set before is called after ours, unless it is Python's own; what it raises is logged
    and goes no further, since it would tear apart whatever the main thread does. It is the handler again at the end.
    Raises ValueError outside of the main thread, before anything is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("signals can be captured on the main thread only")
    captured = Captured()

    def ending(signum: int) -> None:
        captured.count += 1
        if captured.first is None:
            captured.first = signum
            on_first(signum)
        elif signum == signal.SIGINT or signum != captured.first:
            second(signum)

    actions: dict[signal.Signals, Callable[[int], None]] = dict.fromkeys(SIGNALS, ending)
    if save is not None:
        actions |= dict.fromkeys(SAVING, save)
    if show is not None:
        actions |= dict.fromkeys(SHOWING, show)
    before = {number: signal.getsignal(number) for number in actions if not _left_alone(number)}

    def handle(signum: int, frame: FrameType | None) -> None:
        number = signal.Signals(signum)
        try:
            actions[number](signum)
        finally:
            theirs = before[number]
            if callable(theirs) and theirs is not signal.default_int_handler:
                _pass_on(theirs, signum, frame)

    try:
        for number in before:
            signal.signal(number, handle)
        yield captured
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def untouched() -> bool:
    """Whether this is the main thread and SIGINT and SIGTERM still do what Python starts with: SIGINT nothing in what a
    shell script starts in the background."""
    return (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )


def _left_alone(number: signal.Signals) -> bool:
    """A handler set from C can't be put back; what somebody chose to ignore is to be ignored."""
    handler = signal.getsignal(number)
    return handler is None or (number in MAY_BE_IGNORED and handler is signal.SIG_IGN)


def _pass_on(handler: Callable[[int, FrameType | None], object], signum: int, frame: FrameType | None) -> None:
    try:
        handler(signum, frame)
    except BaseException:  # SystemExit too: ours has seen to the end
        logger.exception("the handler of %s that was there before failed", signal.Signals(signum).name)
