"""Lines that wait for a service: some in memory, and what does not fit there in a file; first in, first out.

Its law: a line leaves once it is said to be delivered or put aside, and no sooner; memory is bounded; an empty file is
gone.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path


class Spool:
    """Lines of ASCII, each with its newline; from any thread. Its calls may wait for the disk."""

    def __init__(self, path: Path | None, *, memory: int, disk: int) -> None:
        """`memory`: lines; `disk`: bytes. What finds no room in either is dropped: of memory the oldest.

        A line that a kill tore at the file's end is cut off. Raises OSError.
        """
        self.dropped = 0
        """Lines that found no room."""
        self._path, self._most, self._disk = path, memory, disk
        self._lines: deque[str] = deque()
        self._lock = threading.Lock()
        self._read = 0
        """Bytes of the file that are delivered."""
        if path is not None and path.is_file():
            _mend(path)

    @property
    def on_disk(self) -> bool:
        """Whether there is a file for what memory does not hold."""
        return self._path is not None

    @property
    def waiting(self) -> int:
        """Lines in memory."""
        return len(self._lines)

    def put(self, line: str) -> None:
        """One more line. Raises OSError where memory is full and the disk refuses, and then drops the oldest."""
        with self._lock:
            self._lines.append(line)
            if len(self._lines) > self._most:
                self._stow()

    def unsent(self) -> list[str]:
        """The lines in memory."""
        return list(self._lines)

    def head(self, lines: int) -> list[str]:
        """The oldest lines, at most so many. Raises OSError."""
        with self._lock:
            if self._path is not None and self._path.is_file():
                with open(self._path, "rb") as file:
                    file.seek(self._read)
                    found = [line.decode("ascii", "replace") for line, _ in zip(file, range(lines), strict=False)]
                if found:
                    return found
                self._path.unlink()  # all of it is delivered
                self._read = 0
            return [line for line, _ in zip(self._lines, range(lines), strict=False)]

    def delivered(self, lines: Sequence[str]) -> None:
        """What `head` gave is delivered, or is never to be; some of it may have gone from memory to the file since."""
        with self._lock:
            stowed = self._path is not None and self._path.is_file()
            for line in lines:
                if stowed:
                    self._read += len(line)
                elif self._lines and self._lines[0] == line:
                    self._lines.popleft()

    def aside(self, line: str) -> Path | None:
        """Append the line to a file beside the spool's, which nobody sends, and name it; None if there is no room.

        Raises OSError.
        """
        if self._path is None:
            return None
        path = self._path.with_name(f"refused-{self._path.name}")
        with self._lock, open(path, "ab") as file:
            if file.tell() + len(line) > self._disk:
                return None
            file.write(line.encode("ascii"))
        return path

    @property
    def left(self) -> Path | None:
        """The file, where lines wait in it."""
        return self._path if self._path is not None and self._path.is_file() else None

    def stow(self) -> None:
        """Put the lines of memory into the file. Raises OSError, and keeps then what memory has room for."""
        with self._lock:
            self._stow()

    def _stow(self) -> None:
        try:
            if self._path is not None and self._lines:
                size = self._path.stat().st_size if self._path.is_file() else 0
                with open(self._path, "ab") as file:
                    while self._lines and size + len(self._lines[0]) <= self._disk:
                        size += file.write(self._lines[0].encode("ascii"))
                        file.flush()
                        self._lines.popleft()
        finally:
            while len(self._lines) > self._most:
                self._lines.popleft()
                self.dropped += 1

    def sync(self) -> None:
        """Have the file survive a power cut. Raises OSError."""
        with self._lock:
            if self._path is not None and self._path.is_file():
                with open(self._path, "rb") as file:
                    os.fsync(file.fileno())


def _mend(path: Path) -> None:
    with open(path, "rb+") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(whole)
