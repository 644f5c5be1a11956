"""The disk cache: decoded chunks in a folder, given back out of memory maps; an LRU in bytes that one process owns.

Its law: what it gives is what the source was decoded to, or nothing. A chunk goes by its array's metadata, its number
and what its source was (size and time of a file, ETag of an object); files that a kill left half written hold nothing
that their checksums vouch for. What fails here costs time, never a pass: it is said once, and the source is read.

An LRU smaller than an epoch that is read in a circle would never hit. So what the last two epochs asked for is not
given up for more; what then finds no room is decoded each time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.budget import UNITS, format_bytes, parse_bytes
from streamtrain.data.files import is_local
from streamtrain.data.filters import Bytes
from streamtrain.data.reading import Scratch
from streamtrain.data.segments import Record, Segment, SegmentCut, Touch, open_own, room_for
from streamtrain.errors import ConfigError, EnvironmentProblem

logger = logging.getLogger(__name__)

DEFAULT_BYTES = "50GiB"
SEGMENTS = 32
"""A cache is made of about so many files; the least used of them is given up whole."""
LEAST_SEGMENT = 4 << 20
LEFT_FREE = 1 << 30
"""The cache stops growing where its file system has less than this free, or than 2 % of it: others write there too."""
LOOK = 64 << 20
"""Bytes written between two looks at what is free."""
PAGE = 1 << 15
"""Places are kept in pages of so many chunks."""
OLD = -(1 << 60)
TAG = "CACHEDIR.TAG"
TAG_TEXT = b"""Signature: 8a477f597d28d172789f06886806bc55
# A disk cache of streamtrain: decoded chunks, made again when they are gone. Delete it whenever nobody uses it.
"""
LOCK = "owner"
_NAME = re.compile(r"([0-9a-f]{8})\.(?:data|index)")
_SIZE = re.compile(r"\s*[0-9]+(\.[0-9]+)?\s*([kmgt]i?b?|b)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DiskCacheStatistics:
    """How a disk cache does, for all streams of this process that share it."""

    hits: int
    """Chunks given from the disk."""
    misses: int
    """Chunks that were decoded. After the first epoch there should be none, unless `refused` grows."""
    refused: int
    """Of those, chunks that found no room: `disk_cache_bytes` is less than an epoch takes."""
    evictions: int
    """Chunks given up for others."""
    damaged: int
    """Entries whose bytes were not what their record says: the disk loses data, or the machine went down."""
    bytes: int
    """Size of its files."""
    capacity: int
    off: str | None
    """Why nothing is kept any more (a full disk, say); None while all is well."""


class Shelf:
    """Where one array's chunks lie: segment and row of each, in pages made when the first of them is kept."""

    def __init__(self, array: int, chunks: int) -> None:
        self.array, self._chunks = array, chunks
        self._pages: dict[int, NDArray[np.int64]] = {}

    def place(self, number: int) -> tuple[int, int] | None:
        """Segment and row of a chunk; None where it is not kept."""
        page = self._pages.get(number // PAGE)
        found = -1 if page is None else int(page[number % PAGE])
        return None if found < 0 else (found >> 32, found & 0xFFFFFFFF)

    def put(self, numbers: NDArray[np.int64], segment: int, rows: NDArray[np.int64]) -> None:
        """These chunks lie there now."""
        inside = (numbers >= 0) & (numbers < self._chunks)
        numbers, rows = numbers[inside], rows[inside]
        for page in np.unique(numbers // PAGE).tolist():
            if page not in self._pages:
                self._pages[page] = np.full(min(PAGE, self._chunks - page * PAGE), -1, dtype=np.int64)
            mine = numbers // PAGE == page
            self._pages[page][numbers[mine] % PAGE] = (segment << 32) + rows[mine]

    def drop(self, number: int, place: tuple[int, int]) -> None:
        """This chunk lies there no more."""
        if self.place(number) == place:
            self._pages[number // PAGE][number % PAGE] = -1


class Folder:
    """A folder that this process owns. Thread-safe; all its methods but `statistics` may wait for the disk."""

    def __init__(self, path: str, capacity: int) -> None:
        """Raises EnvironmentProblem where another process owns it, or it can't be used; ConfigError for no cache."""
        self.path, self.capacity = path, capacity
        self.users = 0
        self.off: str | None = None
        self.bytes = 0
        self._lock, self._tally = threading.Lock(), threading.Lock()
        self._segments: dict[int, Segment] = {}
        self._current: Segment | None = None
        self._shelves: dict[int, tuple[Shelf, int]] = {}
        self._flights: dict[tuple[int, int], threading.Event] = {}
        """Chunks that are being decoded."""
        self._clock = self._since_look = 0
        self._hits = self._misses = self._refused = self._evictions = self._damaged = 0
        self._segment_bytes = max(min(LEAST_SEGMENT, capacity // 4), capacity // SEGMENTS)
        self._owner: Lock | None = _owned(path)
        try:
            self._mapped = is_local(Path(path))
            self._next = 1
            self._load()
        except OSError as error:
            raise _unusable(path, error) from error

    def _load(self) -> None:
        """Take over what lives before this one have left."""
        found = [match for entry in os.scandir(self.path) if (match := _NAME.fullmatch(entry.name))]
        numbers = sorted({int(match[1], 16) for match in found})
        old: list[tuple[int, Segment]] = []
        for number in numbers:
            segment = self._segment(number, self._segment_bytes if number == numbers[-1] else 0)
            if not segment.live:
                segment.remove()
                continue
            self._segments[number] = segment
            self.bytes += segment.bytes
            old.append((os.stat(segment.paths[1]).st_mtime_ns, segment))
        for place, (_, segment) in enumerate(sorted(old, key=lambda pair: pair[0])):
            segment.used = OLD + place
        while self.bytes > self.capacity:
            self._evict(min(self._segments.values(), key=lambda segment: segment.used))
        last = self._segments.get(numbers[-1]) if numbers else None
        if last is not None and last.size < self._segment_bytes:
            self._current = last

    def _segment(self, number: int, room: int) -> Segment:
        assert self._owner is not None
        self._next = max(self._next, number + 1)
        return Segment(self.path, number, room, mapped=self._mapped, owner=self._owner)

    def close(self) -> None:
        """Let go of all files. The next process may have the folder when the last thread that writes there is done."""
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        self.off = self.off or "it is closed"
        self._segments, self._current, self._owner = {}, None, None

    def forked(self) -> None:
        """In a forked child: it stays the parent's, for as long as that one wants it and no longer."""
        if self._owner is not None:
            self._owner.release()  # here: what threads of the parent held is never let go of in a child
        self._let_go()  # without the lock, which a thread may have held that is not here

    def shelf(self, array: int, chunks: int, size: int) -> Shelf:
        """The places of an array of so many chunks, which are of `size` bytes together."""
        with self._lock:
            if array in self._shelves:
                return self._shelves[array][0]
            shelf = Shelf(array, chunks)
            for number in sorted(self._segments):
                rows, chunk_numbers = self._segments[number].rows_of(array)
                if len(rows):
                    shelf.put(chunk_numbers, number, rows)
                    self._segments[number].used = max(self._segments[number].used, self._clock)
                    self._segments[number].used_now()
            self._shelves[array] = shelf, size
            return shelf

    # ---- reading

    def holds(self, shelf: Shelf, number: int) -> bool:
        """Whether a chunk is kept, of whatever version."""
        place = shelf.place(number)
        return place is not None and place[0] in self._segments

    def advise(self, shelf: Shelf, number: int, advice: int) -> int | None:
        """Give the kernel advice (os.POSIX_FADV_...) on a kept chunk; how many bytes it has, None if it is not kept."""
        place = shelf.place(number)
        segment = self._segments.get(place[0]) if place is not None else None
        return segment.advise(place[1], advice) if place is not None and segment is not None else None

    def get(
        self,
        shelf: Shelf,
        number: int,
        version: int,
        size: int,
        scratch: Scratch,
        touch: Touch,
        *,
        check: bool = False,
    ) -> Bytes | None:
        """The decoded chunk of this version; None where it is not kept. `check`: look at its checksum again."""
        place = shelf.place(number)
        segment = self._segments.get(place[0]) if place is not None else None
        data: Bytes | None = None
        if place is not None and segment is not None:
            record = segment.record(place[1])
            if record[:3] == (shelf.array, number, version) and record.size == size:
                data = self._read(segment, place[1], record, scratch, touch, check=check)
            if data is None:
                self._drop(shelf, number, place, segment)
        if data is not None and segment is not None:
            with self._tally:
                self._clock += size
                self._hits += 1
                segment.used = self._clock
        return data

    def _read(
        self,
        segment: Segment,
        row: int,
        record: Record,
        scratch: Scratch,
        touch: Touch,
        *,
        check: bool,
    ) -> Bytes | None:
        try:
            return segment.read(row, record, scratch, touch, check=check)
        except SegmentCut as error:
            self._discard(segment, error)
        except (ValueError, OSError) as error:
            self._tell(segment, 1, error)
        return None

    def _discard(self, segment: Segment, error: Exception) -> None:
        """Give up a segment in which nothing can be relied on."""
        with self._lock:
            if self._segments.get(segment.number) is segment:
                self._remove(segment)
                self._tell(segment, segment.live, error)

    def _tell(self, segment: Segment, chunks: int, error: Exception) -> None:
        with self._tally:
            first = not self._damaged
            self._damaged += chunks
        if first:
            logger.warning(
                "disk_cache %s: %s is damaged (%s); its chunks are decoded again from their source, and counted in "
                "statistics().disk_cache.damaged",
                self.path,
                segment.paths[0],
                getattr(error, "strerror", None) or str(error),  # no traceback in it, which would keep the files
            )

    def _drop(self, shelf: Shelf, number: int, place: tuple[int, int], segment: Segment) -> None:
        """Forget an entry that is no longer what its source is; a segment without others goes."""
        with self._lock:
            if shelf.place(number) != place or segment.number not in self._segments:
                return
            shelf.drop(number, place)
            try:
                segment.forget(place[1])
                if segment is not self._current and not segment.live:
                    self._remove(segment)
            except OSError as error:
                self._stop(error)

    def begin(self, shelf: Shelf, number: int) -> bool:
        """Whether the caller is the one to decode a chunk, and then says `end`; else another has just done it."""
        claim = (shelf.array, number)
        with self._lock:
            other = self._flights.get(claim)
            if other is None:
                self._flights[claim] = threading.Event()
        if other is not None:
            other.wait()
        return other is None

    def miss(self, size: int) -> None:
        """A chunk of this size is not kept, and is decoded."""
        with self._tally:
            self._clock += size
            self._misses += 1

    def end(self, shelf: Shelf, number: int) -> None:
        """What was begun is done, or has failed."""
        with self._lock:
            flight = self._flights.pop((shelf.array, number))
        flight.set()

    # ---- writing

    def keep(self, shelf: Shelf, number: int, version: int, data: NDArray[Any]) -> None:
        """Keep a decoded chunk, where there is room for it."""
        with self._lock:
            if self.off is not None:
                return
            try:
                found = self._room(data.nbytes)
            except OSError as error:
                self._stop(error)
                return
            if found is None:
                self._refused += 1
                return
        segment, row, offset = found
        try:
            segment.write(row, offset, (shelf.array, number, version), data)
        except SegmentCut as error:
            self._discard(segment, error)
            return
        except OSError as error:
            with self._lock:
                self._stop(error)
            return
        with self._lock, self._tally:
            segment.used = max(segment.used, self._clock)
            shelf.put(np.array([number]), segment.number, np.array([row]))

    def _room(self, size: int) -> tuple[Segment, int, int] | None:
        """Segment, row and offset for a chunk of this size; None where it would be too much. Raises OSError."""
        need = room_for(size)
        if not size or need > self.capacity:
            return None
        while self.bytes + need > self.capacity:
            stale = [s for s in self._segments.values() if s.used + self._horizon < self._clock or s.used < 0]
            if not stale:
                return None
            self._evict(min(stale, key=lambda segment: segment.used))
        segment = self._current
        if segment is None or (segment.size and segment.end + size > self._segment_bytes):
            self._look_around()
            segment = self._current = self._segment(self._next, max(self._segment_bytes, size))
            segment.used = self._clock
            self._segments[segment.number] = segment
        self._since_look += need
        if self._since_look > LOOK:
            self._look_around()
        before = segment.bytes
        row, offset = segment.reserve(size)
        self.bytes += segment.bytes - before
        return segment, row, offset

    @property
    def _horizon(self) -> int:
        """Bytes asked for in about two epochs."""
        return 2 * sum(size for _, size in self._shelves.values())

    def _look_around(self) -> None:
        """Raise OSError where others need what is left of the disk."""
        self._since_look = 0
        there = os.statvfs(self.path)
        least = min(LEFT_FREE, there.f_blocks * there.f_frsize // 50)
        free = there.f_bavail * there.f_frsize
        if free < least:
            raise OSError(errno.ENOSPC, f"{format_bytes(free)} are free there, and {format_bytes(least)} are left so")

    def _evict(self, segment: Segment) -> None:
        self._evictions += segment.live
        self._remove(segment)

    def _remove(self, segment: Segment) -> None:
        if segment is self._current:
            self._current = None
        del self._segments[segment.number]
        self.bytes -= segment.bytes
        segment.remove()

    def _stop(self, error: OSError) -> None:
        """Keep nothing more; what is there goes on to be given."""
        if self.off is None:
            self.off = error.strerror or str(error)
            logger.warning(
                "disk_cache %s: nothing more is kept, and what is not kept is decoded each time: %s (%s there)",
                self.path,
                self.off,
                format_bytes(self.bytes),
            )

    def statistics(self) -> DiskCacheStatistics:
        """How it does now. Waits for nothing."""
        return DiskCacheStatistics(
            self._hits,
            self._misses,
            self._refused,
            self._evictions,
            self._damaged,
            self.bytes,
            self.capacity,
            self.off,
        )


class Lock:
    """Holds a folder's lock as long as anything of it is in use."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd
        self._pid = os.getpid()

    def release(self) -> None:
        """Let go of it; in a fork, of what that one has of it, so that it ends with its owner."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        if os.getpid() == self._pid:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone leaves it locked until a fork has closed its own
        os.close(fd)

    def __del__(self) -> None:
        self.release()


def _owned(path: str) -> Lock:
    """Make this process the owner of a folder. Raises as `Folder` says."""
    try:
        os.makedirs(path, exist_ok=True)
        tag = os.path.join(path, TAG)
        if os.listdir(path) and not os.path.lexists(tag):
            raise ConfigError(
                f"disk_cache={path!r} holds other files, and no cache of ours ({TAG})",
                hint="name a folder of its own, new or empty",
            )
        with contextlib.suppress(FileExistsError), open(tag, "xb") as file:
            file.write(TAG_TEXT)
        fd = open_own(os.path.join(path, LOCK))
        lock = Lock(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 300, 0).decode(errors="replace").strip() or "unknown"
            raise EnvironmentProblem(
                f"disk_cache={path!r} belongs to another process that is running: pid {owner}",
                hint="wait for its end, or give each process (each rank, each forked worker) a folder of its own",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        raise _unusable(path, error) from error
    return lock


def _unusable(path: str, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"disk_cache={path!r} can't be used: {error.strerror or error}",
        hint="name a folder on a disk of this machine that may be written",
    )


# ---- who uses which folder


_FOLDERS: dict[str, Folder] = {}
_LEFT: deque[Folder] = deque()
"""Folders that streams left which nobody closed; `_settle` counts them."""
_REGISTRY = threading.Lock()


def _settle() -> None:
    while _LEFT:
        folder = _LEFT.popleft()
        folder.users -= 1
        if not folder.users:
            del _FOLDERS[folder.path]
            folder.close()


class DiskCache:
    """One stream's use of a folder, which all streams of this process that name it share."""

    def __init__(self, path: str, capacity: int) -> None:
        """Touches nothing."""
        self.path, self.capacity = path, capacity
        self._lock = threading.Lock()
        self._folder: Folder | None = None
        self._last: DiskCacheStatistics | None = None
        _USES.add(self)

    def forked(self) -> None:
        """In a forked child: the next `open` asks for the folder, and hears whose it is."""
        self._lock, self._folder, self._last = threading.Lock(), None, None

    def open(self) -> Folder:
        """The folder, taken over at the first call, which waits for the disk. Raises as `Folder` says."""
        folder = self._folder
        if folder is not None:
            return folder
        with self._lock:
            if self._folder is None:
                self._folder = self._enter(os.path.realpath(self.path))
            return self._folder

    def _enter(self, path: str) -> Folder:
        with _REGISTRY:
            _settle()
            folder = _FOLDERS.get(path)
            if folder is None:
                folder = _FOLDERS[path] = Folder(path, self.capacity)
            elif folder.capacity != self.capacity:
                raise ConfigError(
                    f"disk_cache={path!r} is in use with {format_bytes(folder.capacity)}, and can't have "
                    f"{format_bytes(self.capacity)} too",
                    hint="give streams that share a folder the same disk_cache_bytes",
                )
            folder.users += 1
            return folder

    def close(self) -> None:
        """Leave the folder; the last one closes it. May wait for the disk; a later `open` takes it over again."""
        with self._lock:
            folder, self._folder = self._folder, None
        if folder is not None:
            self._last = folder.statistics()
            with _REGISTRY:
                _LEFT.append(folder)
                _settle()

    def __del__(self) -> None:
        if self._folder is not None:
            _LEFT.append(self._folder)
            if _REGISTRY.acquire(blocking=False):  # else this very thread may hold it; who comes next settles
                try:
                    _settle()
                finally:
                    _REGISTRY.release()

    def statistics(self) -> DiskCacheStatistics | None:
        """How the folder does, or did; None before its first use. Waits for nothing."""
        folder = self._folder
        return folder.statistics() if folder is not None else self._last


_USES: weakref.WeakSet[DiskCache] = weakref.WeakSet()


def _forked() -> None:
    """In a forked child: forget what is its parent's, for two that write by the same record overwrite each other."""
    global _REGISTRY
    _REGISTRY = threading.Lock()
    for use in _USES:
        use.forked()
    for folder in _FOLDERS.values():
        folder.forked()
    _FOLDERS.clear()
    _LEFT.clear()


os.register_at_fork(after_in_child=_forked)


def disk_cache_of(given: object, size: str | int | None) -> DiskCache | None:
    """What `disk_cache=` and `disk_cache_bytes=` ask for: a folder, or a size alone for the user's cache folder.

    Raises ConfigError. Touches nothing.
    """
    if given is None or given is False or given in (0, "0"):
        if size is not None:
            raise ConfigError("disk_cache_bytes= without disk_cache=", hint="name a folder: disk_cache='/data/cache'")
        return None
    if isinstance(given, int) or (isinstance(given, str) and _SIZE.fullmatch(given)):
        if size is not None:
            raise ConfigError(
                f"disk_cache={given!r} is a size, and so is disk_cache_bytes={size!r}",
                hint="name a folder in disk_cache, or leave disk_cache_bytes out",
            )
        place, size = default_place(), given
    elif isinstance(given, str | os.PathLike) and os.fspath(given):
        place = os.path.abspath(os.path.expanduser(os.fspath(given)))
    else:
        raise ConfigError(
            f"disk_cache must be a folder, or a size such as {DEFAULT_BYTES!r}, not {given!r}",
            hint=f"disk_cache='/data/cache', or '20GiB' for the user's own; {UNITS}",
        )
    capacity = parse_bytes(DEFAULT_BYTES if size is None else size, "disk_cache_bytes")
    return DiskCache(place, capacity) if capacity else None


def default_place() -> str:
    """The folder where the user's caches lie has one for ours."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(os.path.abspath(base), "streamtrain", "chunks")
