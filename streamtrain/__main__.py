"""`python -m streamtrain` and the console script `streamtrain`."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line; the exit code."""
    _open_standard_files()
    try:
        from streamtrain.cli import main as run

        return run()
    except KeyboardInterrupt:  # before the commands could see to it
        return 130


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
