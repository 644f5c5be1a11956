"""What is said to somebody who may not listen: a pipe that nobody empties, a terminal that was stopped by Ctrl-S.

Its law: no thread of a run ever waits for a reader, but for the blink in which an attentive one has read.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

BLINK = 0.1
"""Seconds that a line is waited for, so that what others write stays in order. After one that took longer no line is
waited for until all are read."""
MOST = 1000
"""Lines that are kept for a reader who comes late; those beyond are counted."""
LEAVE = 2.0
"""Seconds that a process which is told to end waits for somebody to take its last words."""


class Outlet:
    """Lines for `write`, which is called on a daemon thread of ours and may block for as long as it likes."""

    def __init__(self, write: Callable[[str], object], *, name: str = "streamtrain-outlet") -> None:
        self._write = write
        self._lines: deque[str] = deque()
        self._lost = 0
        self._writing, self._stuck, self._closing = False, False, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, line: str, *, wait: float = BLINK) -> None:
        """Have the line written, in its turn; back once it is, or after `wait` seconds. Any thread may call it."""
        with self._changed:
            if len(self._lines) >= MOST:
                self._lost += 1
                return
            self._lines.append(line)
            self._changed.notify_all()
            if not self._stuck:
                self._stuck = not self._changed.wait_for(self._is_empty, wait)

    def close(self, *, wait: float = 1.0) -> None:
        """End the thread once all is written; one that is stuck for longer than `wait` seconds is left behind."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(BLINK if self._stuck else wait)

    def _is_empty(self) -> bool:
        return not self._lines and not self._writing

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closing)
                if not self._lines:
                    return
                line, self._writing = self._lines.popleft(), True
                if not self._lines and self._lost:
                    line += f"warning: {self._lost} lines were left out here: nobody read them in time\n"
                    self._lost = 0
            with suppress(OSError, ValueError):  # closed by us or by whoever read it
                self._write(line)
            with self._changed:
                self._writing = False
                self._stuck = self._stuck and bool(self._lines)
                self._changed.notify_all()


def writer(stream: TextIO) -> Callable[[str], object]:
    """What writes to this file, and holds no lock of it meanwhile: Python flushes it at its end, and would wait."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):  # one that a test has put there
        return lambda text: (stream.write(text), stream.flush())
    encoding, errors = getattr(stream, "encoding", None) or "utf-8", getattr(stream, "errors", None) or "strict"
    return lambda text: write(descriptor, text.encode(encoding, errors))


def write(descriptor: int, data: bytes) -> None:
    """All of it, however long that takes. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


@contextmanager
def last_words(code: int, *, seconds: float = LEAVE, leave: Callable[[int], object] = os._exit) -> Iterator[None]:
    """What is said in here may find no reader: then the process ends with `code`, `seconds` later."""
    timer = threading.Timer(seconds, leave, (code,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
