"""Logging as the command line wants it: short lines on stderr, and all of it in the run's log.txt and log.jsonl.

Nobody who logs waits for the disk, nor for whoever reads stderr: the files are written by a thread of its own, and
begin anew when they are full, the old ones kept as log.txt.1 and so on. Where they can't be written, that is said once.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import logging.handlers
import os
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from streamtrain.errors import named
from streamtrain.outlet import Outlet, writer

logger = logging.getLogger(__name__)

FULL, KEPT = 16 << 20, 5
"""Bytes of a file, and how many full ones are kept."""


class _File(logging.handlers.RotatingFileHandler):
    """A file of lines that a disk may refuse: `logging` itself would show a traceback for each of them."""

    _refused = False

    def _open(self) -> io.TextIOWrapper:
        """The file, at the beginning of a line: a life that a full disk or a kill has cut may have left half a one."""
        _end_line(self.baseFilename)
        return super()._open()

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


def _end_line(path: str) -> None:
    """Bring a file that ends within a line to the end of one: of a `.jsonl` half an object is cut off."""
    with suppress(OSError), open(path, "r+b") as file:
        if not file.seekable() or not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        if not path.endswith(".jsonl"):
            file.write(b"\n")
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


class _Queue(logging.handlers.QueueHandler):
    """Hands a record on as text, but with its traceback apart."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = record.exc_text or logging.Formatter().formatException(record.exc_info)
        record.exc_info = None
        return record


class _Lines(logging.Formatter):
    """A JSON object: `at` (UTC), `level`, `logger`, `message`, and `traceback` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        row = {"at": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        return json.dumps(row | ({"traceback": record.exc_text} if record.exc_text else {}))


class LogFile:
    """All that is logged, kept until the run's folder is there, then written to its log.txt and log.jsonl."""

    def __init__(self, *, full: int = FULL) -> None:
        self._records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self.handler = _Queue(self._records)
        self._full = full
        self._listener: logging.handlers.QueueListener | None = None
        self._files: list[_File] = []

    def open(self, folder: Path) -> None:
        """Write there from now on, also what was logged before."""
        text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        for name, formatter in (("log.txt", text), ("log.jsonl", _Lines())):
            path = folder / name
            file = _File(path, maxBytes=self._full, backupCount=KEPT, encoding="utf-8", errors="backslashreplace")
            file.setFormatter(formatter)
            self._files.append(file)
        self._listener = logging.handlers.QueueListener(self._records, *self._files)
        self._listener.start()

    def ended(self, error: BaseException) -> None:
        """What ends the command, for the files alone: on stderr it is said by whoever ends it."""
        text = f"ended by {named(error)}"
        kind = (type(error), error, error.__traceback__)
        self.handler.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), kind))

    def close(self) -> None:
        """Write the rest."""
        if self._listener is not None:
            self._listener.stop()
        for file in self._files:
            file.close()


class _Plain(logging.Formatter):
    """`warning: what happened`, on one line; `error:` is left to what ends the command, tracebacks to log.txt."""

    def format(self, record: logging.LogRecord) -> str:
        kind = "warning" if record.levelno > logging.INFO else "note" if record.levelno == logging.INFO else "debug"
        text = " ".join(record.getMessage().split("\n"))
        error = record.exc_info[1] if record.exc_info else None
        return f"{kind}: {text}" + (f" ({type(error).__name__}: {error})" if error is not None else "")


class _Stderr(logging.Handler):
    """Lines for stderr, which a thread of its own waits for."""

    def __init__(self, outlet: Outlet) -> None:
        super().__init__()
        self._outlet = outlet

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            self._outlet.put(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


@contextmanager
def logged(level: int, *, to_file: int = logging.INFO) -> Iterator[LogFile]:
    """Logging as the command line wants it, for as long as this is open: lines from `level` on to stderr, and from
    `to_file` or `level` on, whichever says more, to the files; also Python's warnings, and the error that ends it."""
    root, ours, log = logging.getLogger(), logging.getLogger("streamtrain"), LogFile()
    before = root.level, ours.level
    outlet = None if sys.stderr is None else Outlet(writer(sys.stderr), name="streamtrain-stderr")
    stderr = logging.NullHandler() if outlet is None else _Stderr(outlet)
    stderr.setFormatter(_Plain())
    stderr.setLevel(level)
    stderr.addFilter(lambda record: not getattr(record, "shown", False))  # it is there already
    handlers: tuple[logging.Handler, ...] = (stderr, log.handler)
    for handler in handlers:
        root.addHandler(handler)
    lowest = min(level, to_file)
    root.setLevel(max(lowest, logging.WARNING))
    ours.setLevel(lowest)
    logging.captureWarnings(True)
    try:
        yield log
    except BaseException as error:
        log.ended(error)
        raise
    finally:
        logging.captureWarnings(False)
        log.close()
        for handler in handlers:
            root.removeHandler(handler)
        if outlet is not None:
            outlet.close()
        root.setLevel(before[0])
        ours.setLevel(before[1])
