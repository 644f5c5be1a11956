"""`python -m streamtrain` and the console script `streamtrain`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

SAVING = (signal.SIGUSR1, signal.SIGUSR2)


def main() -> int:
    """Run the command line; the exit code."""
    _outlive_requests()
    _open_standard_files()
    try:
        from streamtrain.cli import main as run

        code = run()
        if code <= 128:
            return _end(code)
    except KeyboardInterrupt:  # before the commands could see to it, or while they said how they ended
        code = 130
    return _leave(code)


def _outlive_requests() -> None:
    """Have SIGUSR1 and SIGUSR2 do nothing where there is nothing to save (yet, or any more): a scheduler sends them
    whenever it likes, and they end a process that says nothing of them. A fit captures them."""
    for number in SAVING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _nothing_to_save)


def _nothing_to_save(signum: int, frame: FrameType | None) -> None:
    """One that starts or is done."""


def _end(code: int) -> int:
    """The same while the interpreter is taken apart, when it has no more handlers, and would end with 120 where what
    stderr still holds can't be written: its terminal is gone."""
    for number in SAVING:
        if signal.getsignal(number) is _nothing_to_save:
            signal.signal(number, signal.SIG_IGN)
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return code


def _leave(code: int) -> NoReturn:
    """End after a signal, when all is saved and said: what Python does at its end may wait for a read to return."""
    from streamtrain.outlet import last_words

    with last_words(code):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, KeyboardInterrupt):
                stream.flush()
    os._exit(code)


def _open_standard_files() -> None:
    """Give a process without stdin, stdout or stderr the null device in their place, before a file of ours is there."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
