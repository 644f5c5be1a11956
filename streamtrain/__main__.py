"""`python -m streamtrain` and the console script `streamtrain`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; the exit code."""
    try:
        from streamtrain.cli import main as run

        return run()
    except KeyboardInterrupt:  # before the commands could see to it
        return 130


if __name__ == "__main__":
    sys.exit(main())
