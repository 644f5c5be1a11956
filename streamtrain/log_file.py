"""Logging as the command line wants it: short lines on stderr, and all of it in the run's log.txt.

Nobody who logs waits for the disk: log.txt is written by a thread of its own. Where it can't be, that is said once.
"""

from __future__ import annotations

import logging
import logging.handlers
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


class _File(logging.FileHandler):
    """A file of lines that a disk may refuse: `logging` itself would show a traceback for each of them."""

    _refused = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (its name in logging)
        error = sys.exception()
        if isinstance(error, OSError):
            self.refused(error)
        else:
            super().handleError(record)

    def refused(self, error: OSError) -> None:
        """Say so, the first time."""
        if not self._refused:
            self._refused = True
            logger.warning(
                "%s can't be written: %s; lines are missing there until it can be",
                self.baseFilename,
                error.strerror,
            )

    def close(self) -> None:
        """Close it, whether or not there is room for the last lines."""
        try:
            super().close()
        except OSError as error:
            self.refused(error)


class LogFile:
    """All that is logged, kept until the run's folder is there, then written to its log.txt by a thread of its own."""

    def __init__(self) -> None:
        self._records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self.handler = logging.handlers.QueueHandler(self._records)
        self._listener: logging.handlers.QueueListener | None = None
        self._file: _File | None = None

    def open(self, folder: Path) -> None:
        """Write there from now on, also what was logged before."""
        self._file = _File(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._listener = logging.handlers.QueueListener(self._records, self._file)
        self._listener.start()

    def close(self) -> None:
        """Write the rest."""
        if self._listener is not None:
            self._listener.stop()
        if self._file is not None:
            self._file.close()


class _Plain(logging.Formatter):
    """`warning: what happened`, on one line; `error:` is left to what ends the command, tracebacks to log.txt."""

    def format(self, record: logging.LogRecord) -> str:
        kind = "warning" if record.levelno > logging.INFO else "note" if record.levelno == logging.INFO else "debug"
        text = " ".join(record.getMessage().split("\n"))
        error = record.exc_info[1] if record.exc_info else None
        return f"{kind}: {text}" + (f" ({type(error).__name__}: {error})" if error is not None else "")


@contextmanager
def logged(level: int) -> Iterator[LogFile]:
    """Logging as the command line wants it, for as long as this is open: lines on stderr, all of it to log.txt."""
    root, ours, log = logging.getLogger(), logging.getLogger("streamtrain"), LogFile()
    before = root.level, ours.level
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(_Plain())
    handlers: tuple[logging.Handler, ...] = (stderr, log.handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(max(level, logging.WARNING))
    ours.setLevel(level)
    logging.captureWarnings(True)
    try:
        yield log
    finally:
        logging.captureWarnings(False)
        log.close()
        for handler in handlers:
            root.removeHandler(handler)
        root.setLevel(before[0])
        ours.setLevel(before[1])
