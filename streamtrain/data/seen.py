"""What each file of a store was when it was first read: compact, so that a change is noticed a million files on.

Its law: 32 bytes a file, and nothing is ever forgotten; where the record is full, new files are not taken in, which is
said once.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time

logger = logging.getLogger(__name__)

Signature = tuple[int, int, int]
"""Size, time of the last change in ns, inode."""

FILES = 1 << 20
"""Files that are kept in mind, in about 55 MB. Those beyond are read all the same; a change of one is then noticed only
where its size no longer fits, or while its memory map is kept."""
_RECORD = struct.Struct("=qQqQ")
_BUCKETS = 1 << 16


class Seen:
    """Signatures by key; thread-safe. Keys are known by hashes of 64 bits: two in a million agree once in 10^7 runs."""

    def __init__(self, store: object, files: int = FILES) -> None:
        self._store, self._limit = store, files
        self._lock = threading.Lock()
        self._buckets: dict[int, bytes] = {}
        """Records one after another, of the keys whose hashes end alike."""
        self._count = 0
        self._said = False

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return self._find(hash(key)) is not None

    def knows(self, key: str, now: Signature) -> bool:
        """Whether this file was seen before, and was then what it is now."""
        with self._lock:
            return self._find(hash(key)) == now

    def first(self, key: str, now: Signature) -> Signature:
        """What this file was when it was first asked about; `now` if that is now, or if the record is full."""
        code = hash(key)
        with self._lock:
            known = self._find(code)
            if known is not None:
                return known
            if self._count < self._limit:
                place = code % _BUCKETS
                self._buckets[place] = self._buckets.get(place, b"") + _RECORD.pack(code, *now)
                self._count += 1
                return now
            told, self._said = self._said, True
        if not told:
            logger.warning(
                "%s: %d files are kept in mind, and no more; whether files beyond them change during the run is not "
                "checked. Larger chunks, or shards, make fewer files",
                self._store,
                self._limit,
            )
        return now

    def _find(self, code: int) -> Signature | None:
        for known, size, changed, inode in _RECORD.iter_unpack(self._buckets.get(code % _BUCKETS, b"")):
            if known == code:
                return size, changed, inode
        return None


def signature_of(status: os.stat_result) -> Signature:
    """What tells a file from what it was."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def changed(old: Signature, new: Signature) -> str:
    """What to say of a file that is no longer what it was: both sizes and times."""
    return f"it changed during the run: {old[0]} bytes of {_when(old[1])} before, {new[0]} bytes of {_when(new[1])} now"


def written_since(opened_at: int, status: os.stat_result) -> str:
    """What to say of a file that was written after its store was opened (a time in ns)."""
    written = _when(status.st_mtime_ns)
    return f"it changed during the run: it was written at {written}, the store was opened at {_when(opened_at)}"


def _when(ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ns / 1e9)) + f".{ns % 10**9 // 10**6:03d}"
