"""Arrays on this machine that memory can't hold: the kernel is told what will be read, and what won't be any more.

    around    a job, with the reads that it will make: the same job with advice before and behind     (while planning)
    begin     WILLNEED for itself and for the jobs that come next, up to AHEAD_BYTES that nobody has begun to read
    leave     DONTNEED behind it, where the array is so large that what it leaves would not be found again

Its law: only what will be read is asked for, and advice changes no result: a file that can't be opened is left to the
read itself to complain of. Without it each thread would wait for the disk by itself, a window of the kernel's at a
time, and pages that nobody wants again would push out those that somebody does.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from streamtrain.data.feed import Box, Feed, Rows
from streamtrain.data.kept_chunks import KeptReader
from streamtrain.data.readers import LocalReader
from streamtrain.data.reading import Scratch, under
from streamtrain.data.wants import reads_of
from streamtrain.data.workers import Job

AHEAD_BYTES = 64 << 20
"""Bytes that are asked for before anybody reads them, but no more than a sixteenth of the memory."""
LEAST_CHUNK = 256 << 10
"""Chunks below this size cost more to ask for than to wait for."""
LEFT_BEHIND = 2
"""Arrays of more than so many times the memory leave nothing behind: the least of it would be found again."""


Advised = LocalReader | KeptReader
"""What has its chunks in files: those of the array, or of the disk cache."""


class Stretch(NamedTuple):
    """A part of a file that will be read."""

    reader: Advised
    chunk: tuple[int, ...]
    rows: tuple[int, int]


class _Turn:
    """A job, the stretches that it reads, and whether the kernel knows of them."""

    __slots__ = ("asked", "begun", "stretches")

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self.stretches, self.begun, self.asked = stretches, False, 0


class Readahead:
    """Advice for one pass; called in its threads."""

    def __init__(self, readers: Iterable[Advised]) -> None:
        self._readers = set(readers)
        self._memory = min(reader.memory for reader in self._readers)
        self._ahead_bytes = max(LEAST_CHUNK, min(AHEAD_BYTES, self._memory // 16))
        self._lock = threading.Lock()
        self._turns: collections.deque[_Turn] = collections.deque()
        self._ahead = 0
        """Bytes asked for that no job has begun to read."""
        self._measured = self._leaves_nothing = False

    @classmethod
    def over(cls, feeds: Iterable[Feed]) -> Readahead | None:
        """For these feeds, which are read together; None where memory may hold all arrays, or chunks are small."""
        found = (_near(each) for feed in feeds for each in (feed, *feed.beside))
        readers = {reader for reader in found if reader is not None}
        total = sum(reader.decoded_bytes for reader in readers)
        for reader in readers:
            reader.beside(total)
        worth = any(reader.layout.chunk_bytes >= LEAST_CHUNK for reader in readers)
        return cls(readers) if worth and total > min(reader.memory for reader in readers) else None

    def around(self, reads: Iterable[tuple[Feed, Box, Rows]], job: Job) -> Job:
        """The job, which asks for what the next ones read when it begins, and leaves nothing behind when it ends."""
        if not self._measured:
            self._measure()
        stretches = [stretch for feed, box, rows in reads for stretch in self._stretches(feed, box, rows)]
        if not stretches:
            return job
        turn = _Turn(stretches)
        with self._lock:
            self._turns.append(turn)

        def run(scratch: Scratch) -> None:
            self._begin(turn)
            try:
                job(scratch)
            finally:
                self._leave(turn)

        return run

    def _measure(self) -> None:
        """Files may be smaller than what they decode to: those that memory can hold need no advice."""
        total = sum(reader.stored_bytes() for reader in self._readers)
        beyond = total > self._memory
        self._readers = {r for r in self._readers if beyond and r.layout.chunk_bytes >= LEAST_CHUNK}
        self._leaves_nothing = total > LEFT_BEHIND * self._memory
        self._measured = True

    def _stretches(self, feed: Feed, box: Box, rows: Rows) -> list[Stretch]:
        if not any(_near(each) in self._readers for each in (feed, *feed.beside)):
            return []
        reads = ((_near(each), read) for each, read in reads_of(feed, box, rows))
        return [
            Stretch(reader, read.chunk, read.rows)
            for reader, read in reads
            if reader in self._readers and reader is not None
            if not (read.few and reader.layout.raw)  # scattered rows: what lies between them will not be read
        ]

    def _begin(self, turn: _Turn) -> None:
        with self._lock:
            turn.begun = True
            self._ahead -= turn.asked
        if not turn.asked:
            _advise(turn, os.POSIX_FADV_WILLNEED)
        while (following := self._next()) is not None:
            asked = _advise(following, os.POSIX_FADV_WILLNEED)
            with self._lock:
                if not following.begun:
                    following.asked = asked
                    self._ahead += asked

    def _next(self) -> _Turn | None:
        """The next job to ask for, if there is room for more."""
        with self._lock:
            while self._turns and self._ahead < self._ahead_bytes:
                turn = self._turns.popleft()
                if not turn.begun:
                    return turn
            return None

    def _leave(self, turn: _Turn) -> None:
        if self._leaves_nothing:
            _advise(turn, os.POSIX_FADV_DONTNEED)


def _near(feed: Feed) -> Advised | None:
    """What reads the feed's array from files, the disk cache first; None where it is elsewhere."""
    return under(KeptReader, feed.reader) or under(LocalReader, feed.reader)


def _advise(turn: _Turn, advice: int) -> int:
    """Tell the kernel of all that this job reads; how many bytes."""
    return sum(reader.advise(chunk, rows, advice) for reader, chunk, rows in turn.stretches)
