"""`python -m streamtrain` and the console script `streamtrain`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> int:
    """Run the command line; the exit code."""
    _open_standard_files()
    try:
        from streamtrain.cli import main as run

        code = run()
        if code <= 128:
            return code
    except KeyboardInterrupt:  # before the commands could see to it, or while they said how they ended
        code = 130
    return _leave(code)


def _leave(code: int) -> NoReturn:
    """End after a signal, when all is saved and said: what Python does at its end may wait for a read to return."""
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
