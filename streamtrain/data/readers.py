"""Bytes from files: memory maps kept open, pread, or zarr's own API; never anything but a regular file of the store.

A reader gives one decoded chunk at a time, to a worker thread. A file that can't be trusted (missing where its writer
vouches for it, cut, changed, a link out of the store, no regular file) is a DataError naming array, chunk, rows, path
and cause.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import itertools
import logging
import math
import mmap
import os
import queue
import re
import resource
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.budget import available_memory, format_bytes
from streamtrain.data.decode import Decoder
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ABSENT, ALONE, ArrayLayout, parse_shard_index
from streamtrain.data.manifest import NOTHING, SLICE, Record, describe, unaddressable
from streamtrain.data.regions import Region, most_maps
from streamtrain.data.seen import Seen, Signature, changed
from streamtrain.data.trust import Trust, Verify, trust_in
from streamtrain.errors import DataError, EnvironmentProblem

T = TypeVar("T")
logger = logging.getLogger(__name__)

MADV_POPULATE_READ = 22
"""Linux 5.14: fault all pages in at once, with an error in place of a signal if the file is shorter."""
INDEX_CACHE_BYTES = 16 << 20
SMALL_CHUNK = 1 << 20
"""Chunks up to this size are decoded right out of a map of their shard: to open it for each would cost more."""
SPARE_DESCRIPTORS = 256
LARGE_CHUNK = 4 << 20
"""Chunks of this size cost no more by a map that is made anew each time than by pread; small ones cost twice as much
(256 KiB: 58 us against 24), and by a map that is kept as much as by pread, or less."""
LOOKED_AT = 8
"""Files whose sizes tell about how large all of them are."""
ENCODED_SLACK = 1 << 16
"""Encoded chunks may be larger than decoded ones by 1/8 and this much; anything beyond is refused unread."""
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
LEAVE_SECONDS = 2.0
"""How long `ZarrLoop.close` waits for reads that are under way."""
CLOSE_SECONDS = 5.0
"""How long it waits for all that it does."""
_REMOTE_TYPES = frozenset(
    {"nfs", "nfs4", "cifs", "smbfs", "smb3", "9p", "ceph", "lustre", "glusterfs", "afs", "gpfs", "beegfs", "autofs"}
    | {"pvfs2", "orangefs", "panfs", "wekafs", "coda", "ncpfs", "davfs", "vboxsf", "prl_fs", "drvfs"}
    | {"fuse"}  # s3fs, mount-s3, goofys and others may name themselves no further; "fuseblk" is a disk of this machine
)


class Scratch:
    """A worker's own buffers, kept between chunks."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}
        self.seconds: dict[str, float] = {"read": 0.0, "decode": 0.0, "gather": 0.0, "transform": 0.0}
        """Where this worker's time went."""
        self.chunks = 0
        self.bytes_read = 0
        """Encoded bytes fetched (of a memory map: touched)."""
        self.checked = 0
        """Chunks whose bytes were held against a manifest."""
        self.reading: tuple[object, float] | None = None
        """The chunk that is being read (`str` of it names it), and since when (`time.monotonic`)."""
        self.fetched: Mapping[object, Callable[[], Bytes | None]] = {}
        """Of chunks that are elsewhere: what gives the bytes that were fetched ahead for the job in hand, None where
        the chunk is absent, or raises why they could not be had."""
        self.damages: list[tuple[int, BadChunk]] = []
        """Of the piece in hand, the chunks that are skipped: `chunks` when each was asked for, and why."""
        self.tainted: list[BadChunk] | None = None
        """Why the rows that are being put are lost (empty: they are not), where the feed tells; else None."""

    def take(self, name: str, size: int) -> Bytes:
        """A buffer of `size` bytes, aligned to pages; its last content is undefined."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = anonymous(size)
        return buffer[:size]


def anonymous(size: int) -> Bytes:
    """Private zeroed memory of `size` bytes from the kernel, aligned to pages, in huge pages where there are any."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= 4 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:size]


class ChunkName(NamedTuple):
    """What messages call a chunk, put together when it is asked for: of most chunks it never is."""

    array: str
    chunk: tuple[int, ...]

    def __str__(self) -> str:
        return f"array {self.array or ALONE!r}: chunk {'.'.join(map(str, self.chunk)) or '0'}"


class Version(NamedTuple):
    """What the source of a chunk is: equal as long as nobody has changed it."""

    mark: tuple[int | str | None, ...]
    """Of a file size, time of its content in ns, inode and time of the last change; of an object size and ETag."""
    lasting: bool
    """Whether a later run may go by it: it tells contents apart, and they were settled when the store was opened."""


def under(kind: type[T], reader: object) -> T | None:
    """The reader of this kind that a reader is, or wraps; None where there is none."""
    while reader is not None and not isinstance(reader, kind):
        reader = getattr(reader, "inner", None)
    return reader


class ChunkReader(Protocol):
    """Reads one array's chunks."""

    @property
    def lane(self) -> str:
        """`mmap`, `pread`, `obstore`, `store` or `zarr`; `mmap` with the reads that fell back to `pread`, and why;
        `pread` with what maps serve of arrays that memory can't hold."""

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        """The decoded chunk, valid until the scratch is used again; None if it is absent.

        It has the chunk's shape, or ends with the array. `rows` are the first axis' rows that will be used: a lane may
        leave the others undefined.
        """

    def vouch(self, verify: Verify) -> None:
        """Hold chunks against the array's manifest from now on, if it has one. Raises DataError if that is damaged."""

    def version(self, chunk: Sequence[int]) -> Version | None:
        """What a chunk's source is now; None where nothing is known of it yet. Asks nobody who is far away."""

    def look(self, chunk: Sequence[int], scratch: Scratch) -> None:
        """See to it that its version is known, where who is far away must be asked. Raises as `read` does."""


class ChunkDamage(DataError):
    """A chunk that can't be used."""

    def __init__(self, array: str, chunk: tuple[int, ...], message: str, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.array, self.chunk = array, chunk


class ChunkUnreadable(EnvironmentProblem):
    """A chunk that storage does not give, however often it is asked."""

    def __init__(self, array: str, chunk: tuple[int, ...], message: str, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.array, self.chunk = array, chunk


BadChunk = ChunkDamage | ChunkUnreadable
"""What `on_bad_chunk="skip"` leaves out."""


def chunk_error(layout: ArrayLayout, chunk: Sequence[int], path: object, cause: object) -> ChunkDamage:
    """The error for a chunk that can't be used: array, chunk, rows, path and cause."""
    rows = ", ".join(f"{a}:{b}" for a, b in layout.box(chunk))
    name = ChunkName(layout.name, tuple(chunk))
    return ChunkDamage(
        *name,
        f"{name} (rows [{rows}]) in {path}: {cause}",
        hint="restore the file from its source, or convert the data again",
    )


def is_local(path: Path, table: Path = Path("/proc/self/mounts")) -> bool:
    """Whether this path lies on a file system of this machine (and may be memory-mapped)."""
    best, kind = "", ""
    real = os.path.realpath(path)  # first: looking there may be what mounts it
    try:
        mounts = os.fsdecode(table.read_bytes())
    except OSError:
        return True
    for line in mounts.splitlines():
        _, point, fstype, *_ = line.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point)  # blanks stand there as \040
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fstype
    return kind not in _REMOTE_TYPES and not kind.startswith("fuse.")


class StoreFiles:
    """The files of one local store: opened only if regular and inside it, mapped within a limit of descriptors."""

    def __init__(self, root: Path, *, maps: int | None = None) -> None:
        self.root = root
        self._stem = os.path.join(root, "")
        self._inside = os.path.join(os.path.realpath(root), "")
        """What the real paths of all its files begin with."""
        self._lock = threading.Lock()
        self._maps: OrderedDict[str, Map] = OrderedDict()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.max_maps = max(8, limit - SPARE_DESCRIPTORS) // 2 if maps is None else maps
        self._promised = 0
        """Of these, taken by arrays whose files all stay mapped."""
        self._regions: dict[str, Region | None] = {}
        """Of each array that was asked about: room for its files side by side, if there is."""
        self._placed: dict[str, Map] = {}
        """Files that lie there."""
        self.opened_at = time.time_ns()
        self._seen = Seen(root)
        self.refused: dict[str, int] = {}
        """Why the machine refused a memory map, and how often: each time `pread` took its place."""

    def open(self, key: str) -> tuple[int, os.stat_result]:
        """A descriptor of a regular file inside the store and its status. Raises OSError or ValueError."""
        path = os.path.join(self.root, key)
        fd = _open_no_link(path)
        if fd is not None:
            status = os.fstat(fd)
            if self._seen.knows(key, _signature(status)) or self._holds(fd):
                return _regular(fd, status)
            os.close(fd)
        real = os.path.realpath(path)
        if not real.startswith(self._inside):
            raise ValueError(f"it is a link out of the store, to {real}")
        fd = os.open(real, _OPEN)
        return _regular(fd, os.fstat(fd))

    def _holds(self, fd: int) -> bool:
        """Whether this open file lies inside, as the kernel tells (3 us); no where it can't tell, or what lies outside.

        To follow the links of its path step by step takes 16 us, and is left for what looks like one.
        """
        try:
            return os.readlink(f"/proc/self/fd/{fd}").startswith(self._inside)
        except OSError:
            return False

    def check_unchanged(self, key: str, status: os.stat_result) -> None:
        """Raise ValueError with sizes and times if the file is not what it was when first read."""
        signature = _signature(status)
        known = self._seen.first(key, signature)
        if known != signature:
            raise ValueError(changed(known, signature))

    def check_absent(self, key: str) -> None:
        """Raise ValueError if what can't be found was there before, or if a link to nothing stands in its place."""
        if key in self._seen:
            raise ValueError("it was there, and vanished during the run")
        if os.path.lexists(os.path.join(self.root, key)):
            raise ValueError("it is a link to nothing")

    def version(self, key: str) -> Version:
        """What a file is now; of one that is not there, that. It counts as seen: a change from now on is one."""
        path = os.path.join(self.root, key)
        try:
            now = os.stat(path)
        except OSError:
            return Version(("not there",), False)
        signature = _signature(now)
        if key not in self._seen and os.path.realpath(path).startswith(self._inside):
            self._seen.first(key, signature)  # what lies elsewhere is never seen, for `open` asks no more of what was
        return Version((*signature, now.st_ctime_ns), self.settled(now))  # times of content can be set back, not this

    def settled(self, status: os.stat_result) -> bool:
        """Whether the file was not modified since this store was opened."""
        return status.st_mtime_ns < self.opened_at

    def worth_mapping(self, layout: ArrayLayout) -> bool:
        """Whether this array is better mapped: its chunks are large, or all its files can stay mapped beside those of
        the arrays that were asked about before."""
        if layout.chunk_bytes >= LARGE_CHUNK or self.region(layout) is not None:
            return True
        fitting = self._promised + layout.num_files <= self.max_maps
        if fitting:
            self._promised += layout.num_files
        return fitting

    def region(self, layout: ArrayLayout) -> Region | None:
        """Room for all files of an array side by side, where each is a few of its rows and nothing else, they are too
        small to be worth a call each, and the kernel allows so many maps."""
        with self._lock:
            if layout.name not in self._regions:
                self._regions[layout.name] = self._room_for(layout)
            return self._regions[layout.name]

    def _room_for(self, layout: ArrayLayout) -> Region | None:
        taken = sum(region.count for region in self._regions.values() if region is not None)
        if not lined_up(layout) or not 1 < layout.num_files <= most_maps() - taken:
            return None
        try:
            return Region(layout.num_files, layout.chunk_bytes)
        except OSError:  # a limit of address space
            return None

    def map(self, key: str, *, scattered: bool = False, place: tuple[Region, int] | None = None) -> Map | None:
        """The file as a kept read-only map; None if it is not settled. Raises OSError or ValueError.

        `scattered`: a fault shall bring its own page alone, for memory can't hold the pages around it. `place`: where
        it is mapped, if it has the size for that.
        """
        with self._lock:
            kept = self._placed.get(key) or self._maps.get(key)
            if key in self._maps:
                self._maps.move_to_end(key)
        if kept is not None:
            signature = _signature(os.stat(self._stem + key))
            if signature != kept.signature:
                raise ValueError(changed(kept.signature, signature))
            return kept
        try:
            fd, status = self.open(key)
            try:
                if not self.settled(status) or status.st_size == 0:
                    return None
                self.check_unchanged(key, status)
                if place is not None and status.st_size == place[0].size:
                    return self._put_beside(key, fd, _signature(status), *place)
                memory = mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
                if scattered:
                    memory.madvise(mmap.MADV_RANDOM)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            self._make_room(key, error.strerror or str(error))
            return None
        made = Map.of(memory, _signature(status))
        with self._lock:
            self._maps[key] = made
            while len(self._maps) > self.max_maps:
                self._maps.popitem(last=False)
        return made

    def placed(self, key: str) -> Map | None:
        """The map of a file that lies beside others."""
        return self._placed.get(key)

    def _put_beside(self, key: str, fd: int, signature: Signature, region: Region, number: int) -> Map:
        made = Map(region.place(number, fd), signature, partial(region.advise, number))
        with self._lock:
            return self._placed.setdefault(key, made)

    def _make_room(self, key: str, reason: str) -> None:
        """Others took the descriptors or the address space: forget all maps, and have this file read by pread."""
        with self._lock:
            kept = len(self._maps)
            self._maps.clear()
            first = reason not in self.refused
            self.refused[reason] = self.refused.get(reason, 0) + 1
        if first:
            logger.warning(
                "%s: no memory map of %s beside %d others (%s): they are let go, and files are read by pread where a "
                "map is refused, which is slower. `ulimit -n`, or larger chunks, mend that; io='pread' asks for no map",
                self.root,
                key,
                kept,
                reason,
            )

    def close(self) -> None:
        """Forget all maps; each is unmapped when nobody reads it any more."""
        with self._lock:
            self._maps.clear()
            self._placed.clear()
            self._regions.clear()


def _open_no_link(path: str) -> int | None:
    """Open a file without waiting for a writer; None where a link stands in its place."""
    try:
        return os.open(path, _OPEN | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None


def _regular(fd: int, status: os.stat_result) -> tuple[int, os.stat_result]:
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise ValueError("it is not a regular file")
    return fd, status


def _signature(status: os.stat_result) -> Signature:
    return status.st_size, status.st_mtime_ns, status.st_ino


class Map:
    """A file's memory map, kept open, and what the file was when it was mapped."""

    def __init__(self, data: Bytes, signature: Signature, advise: Callable[[int, int, int], None]) -> None:
        """`advise`: gives the kernel advice on a part of it, as `mmap.madvise` does: which, from where on, how much."""
        self.signature = signature
        self._advise = advise
        self._data = data
        self._touched: set[int] = set()

    @classmethod
    def of(cls, memory: mmap.mmap, signature: Signature) -> Map:
        """A map with a descriptor of its own."""
        return cls(np.frombuffer(memory, dtype=np.uint8), signature, memory.madvise)

    def __len__(self) -> int:
        return len(self._data)

    def view(self, start: int, size: int, touch: Literal["no", "once", "always"]) -> Bytes:
        """These bytes, their pages faulted in at once: the first time, each time, or left to faults.

        Touching pages that are there already costs a tenth of gathering from them; once is enough where they stay.
        """
        if touch == "always" or (touch == "once" and start not in self._touched):
            self._touched.add(start)
            populate(self._advise, start, size)
        return self._data[start : start + size]


def populate(advise: Callable[[int, int, int], None], start: int, size: int) -> None:
    """Fault these bytes of a map in at once where the kernel can. Raises ValueError if the file has lost them."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        advise(MADV_POPULATE_READ, first, start + size - first)
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise ValueError("it was cut short while it was mapped") from error


def read_into(fd: int, out: Bytes, offset: int) -> int:
    """Fill `out` from the file at `offset`; the bytes read, fewer only at the file's end."""
    done = os.preadv(fd, [out.data], offset)
    if done == len(out) or not done:
        return done
    view = out.data
    while done < len(out):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def shard_index(layout: ArrayLayout, fd: int, file_size: int) -> NDArray[np.uint64]:
    """The index of the shard in this file: offset and length of each chunk, (chunks, 2). Raises ValueError, OSError."""
    chunks = math.prod(layout.inner)
    length = 16 * chunks + 4
    if file_size < length:
        raise ValueError(f"its shard has {file_size} bytes, fewer than its index of {length}")
    buffer = np.empty(length, dtype=np.uint8)
    read_into(fd, buffer, 0 if layout.index_at_start else file_size - length)
    return parse_shard_index(buffer.tobytes(), chunks)


def describe_part(fd: int, start: int, size: int, scratch: Scratch, *, both: bool) -> Record:
    """What a part of a file is, in the memory of one slice. Raises ValueError if the file ends before, or OSError."""
    buffer, found = scratch.take("slice", SLICE), NOTHING
    for at in range(start, start + size, SLICE):
        part = buffer[: min(SLICE, start + size - at)]
        if read_into(fd, part, at) != len(part):
            raise ValueError("it was cut short while it was read")
        found = describe(part, both=both, before=found)
    return found


def lined_up(layout: ArrayLayout) -> bool:
    """Whether files that are small make up the array's rows in order when they are mapped one after another."""
    whole = layout.chunk_shape[1:] == layout.shape[1:] and layout.axes == tuple(range(layout.ndim))
    plain = layout.raw and not layout.codecs and layout.shard_shape is None and layout.ndim > 0
    return plain and whole and 0 < layout.chunk_bytes < LARGE_CHUNK and layout.chunk_bytes % mmap.PAGESIZE == 0


def maps_serve(layout: ArrayLayout) -> bool:
    """Whether chunks can be used right out of a map of their file."""
    return layout.raw or (layout.shard_shape is not None and layout.chunk_bytes <= SMALL_CHUNK)


class LocalReader:
    """Chunks of one array in local files, by memory map where that is safe and fast, else by pread."""

    def __init__(self, layout: ArrayLayout, files: StoreFiles, *, mapped: bool, memory: int | None = None) -> None:
        """`memory`: bytes that this process may use; None asks the system."""
        assert layout.slow is None
        self.layout, self._files, self._decoder = layout, files, Decoder(layout)
        self._mapped = mapped and maps_serve(layout)
        self._indexes: OrderedDict[str, tuple[Signature, NDArray[np.uint64]]] = OrderedDict()
        """Of shards, each with what its file was."""
        self._lock = threading.Lock()
        self._by_rows = layout.raw and not layout.codecs and layout.ndim > 0 and layout.axes[0] == 0
        """Whether a chunk's rows lie one after another in its file, and nothing must be known of all of them."""
        self._most = layout.chunk_bytes + layout.chunk_bytes // 8 + ENCODED_SLACK
        self._exact = layout.chunk_bytes + 4 * len(layout.codecs) if layout.raw else None
        self._row_bytes = layout.chunk_bytes // layout.chunk_shape[0] if self._by_rows else 0
        self.memory = available_memory() if memory is None else memory
        self._beyond = False
        """Whether memory can't hold the files: then only scattered rows are read from maps."""
        self.beside(self.decoded_bytes)
        self._trust: Trust | None = None
        self._region = files.region(layout) if self._mapped else None
        self._ready: dict[int, tuple[str, Map]] = {}
        """Files that lie side by side, by number, with their paths: nothing is due before their rows are used."""

    def vouch(self, verify: Verify) -> None:
        self._trust = trust_in(self._files.root, self.layout, verify)

    def beside(self, total: int) -> None:
        """All arrays that are read together have so many bytes: pages may not stay, nor even be worth mapping."""
        self._touch: Literal["once", "always"] = "always" if total > self.memory // 2 else "once"
        beyond = self.layout.raw and total > self.memory
        if beyond and self._mapped and not self._beyond:
            logger.info(
                "array %s: %s are read together, more than the memory (%s): by pread, maps serve scattered rows alone",
                self.layout.name or ALONE,
                format_bytes(total),
                format_bytes(self.memory),
            )
        self._beyond = beyond

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.layout.shape) * self.layout.dtype.itemsize

    def stored_bytes(self) -> int:
        """About how many bytes its files have; of encoded ones a few are looked at, and one that is absent has none."""
        if self.layout.raw:
            return self.decoded_bytes
        sizes, step = [], max(1, self.layout.num_files // LOOKED_AT)
        for number in range(0, self.layout.num_files, step):
            try:
                sizes.append(os.stat(os.path.join(self._files.root, self.layout.file_key(number))).st_size)
            except OSError:
                sizes.append(0)
        return sum(sizes) * self.layout.num_files // max(1, len(sizes))

    def advise(self, chunk: Sequence[int], rows: tuple[int, int], advice: int) -> int:
        """Give the kernel advice (os.POSIX_FADV_...) on what `read` takes of a chunk; how many bytes that is.

        0 where they can't be found: the read will say why.
        """
        key = self.layout.key(chunk)
        try:
            fd, status = self._files.open(key)
        except (OSError, ValueError):
            return 0
        try:
            self._files.check_unchanged(key, status)
            start, size = self._extent(key, chunk, fd, _signature(status))
            first, last = self._part(size, rows)
            if last > first:
                os.posix_fadvise(fd, start + first, last - first, advice)
            return max(0, last - first)
        except (OSError, ValueError):
            return 0
        finally:
            os.close(fd)

    def _part(self, size: int, rows: tuple[int, int]) -> tuple[int, int]:
        """Which of a chunk's bytes hold these rows, as far as it can be read in parts."""
        if self._by_rows:
            return rows[0] * self._row_bytes, min(size, rows[1] * self._row_bytes)
        return 0, size

    def version(self, chunk: Sequence[int]) -> Version | None:
        return self._files.version(self.layout.key(chunk))

    def look(self, chunk: Sequence[int], scratch: Scratch) -> None:
        """Nobody is far away."""

    @property
    def lane(self) -> str:
        if not self._mapped:
            return "pread"
        if self._beyond:
            return "pread (mmap for scattered rows)"
        refused = ", ".join(f"{count} by pread: {reason}" for reason, count in self._files.refused.copy().items())
        return f"mmap ({refused})" if refused else "mmap"

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        layout, trust = self.layout, self._trust
        key = layout.key(chunk)
        due = trust is not None and trust.due(chunk)
        began = time.perf_counter()
        try:
            data = self._encoded(key, chunk, rows, scratch, few=few, due=due)
            if data is None:
                if layout.complete:
                    raise ValueError("it is missing, and its writer left no chunk out")
                if trust is not None:
                    trust.check_absent(chunk)
                return None
            fetched = time.perf_counter()
            sound = trust is not None and not due
            decoded = self._decoder.view(self._decoder.decode(data, self._out(scratch), sound=sound))
            if trust is not None and due:
                trust.found_good(chunk)
            if self._region is not None and chunk[0] not in self._ready:
                self._note_ready(key, chunk)
            scratch.seconds["read"] += fetched - began
            scratch.seconds["decode"] += time.perf_counter() - fetched
            scratch.bytes_read += len(data)
            return decoded
        except ValueError as error:
            raise chunk_error(layout, chunk, self._files.root / key, error) from error
        except OSError as error:
            raise chunk_error(layout, chunk, self._files.root / key, error.strerror or error) from error

    def rows_of(self, chunks: Sequence[int], scratch: Scratch) -> NDArray[Any] | None:
        """All rows of the array in one piece of memory, of which those of these chunks (numbers along the first axis)
        are as they were when they were first read; None where `read` has to see to one of them, or to pages."""
        if self._region is None or self._beyond or self._touch == "always":
            return None
        ready = self._ready
        found = [ready[number] for number in chunks if number in ready]
        if len(found) < len(chunks):
            return None
        began = time.perf_counter()
        try:
            if any(_signature(os.stat(path)) != file.signature for path, file in found):
                return None
        except OSError:
            return None
        scratch.chunks += len(found)
        scratch.bytes_read += len(found) * self.layout.chunk_bytes
        scratch.seconds["read"] += time.perf_counter() - began
        return self._region.data.view(self.layout.dtype).reshape(-1, *self.layout.chunk_shape[1:])

    def _out(self, scratch: Scratch) -> Bytes:
        return scratch.take("decoded", self._decoder.room) if self._decoder.compressed else _NOTHING

    def _note_ready(self, key: str, chunk: Sequence[int]) -> None:
        """This chunk was read, and found good where that is asked for once."""
        placed = self._files.placed(key)
        if placed is not None and (self._trust is None or not self._trust.due(chunk)):
            self._ready[chunk[0]] = os.path.join(self._files.root, key), placed

    def _encoded(
        self, key: str, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool, due: bool
    ) -> Bytes | None:
        """The chunk's bytes as they are stored, held against the manifest where that is `due`; None if absent."""
        try:
            if self._mapped and (few or not self._beyond):
                place = None if self._region is None or self._beyond else (self._region, chunk[0])
                memory = self._files.map(key, scattered=self._beyond, place=place)
                if memory is not None:
                    start, size = self._extent(key, chunk, None, memory.signature)
                    if size < 0:
                        return None
                    data = memory.view(start, size, "no" if few and not due else self._touch)
                    return self._held_good(chunk, data, scratch) if due else data
            fd, status = self._files.open(key)
        except FileNotFoundError:
            self._files.check_absent(key)
            return None
        try:
            self._files.check_unchanged(key, status)
            start, size = self._extent(key, chunk, fd, _signature(status))
            if size < 0:
                return None
            return self._pread(fd, start, size, chunk, rows, scratch, due=due)
        finally:
            os.close(fd)

    def _pread(
        self,
        fd: int,
        start: int,
        size: int,
        chunk: Sequence[int],
        rows: tuple[int, int],
        scratch: Scratch,
        *,
        due: bool,
    ) -> Bytes:
        buffer = scratch.take("encoded", size)
        first, last = self._part(size, rows)
        if last - first < size and due and self._trust is not None:  # there is memory for the rows alone
            both = self._trust.both
            self._trust.check_record(chunk, size, lambda: describe_part(fd, start, size, scratch, both=both))
            scratch.checked += 1
            due = False
        part = buffer if last - first == size else buffer[first:last]
        if read_into(fd, part, start + first) != len(part):
            raise ValueError("it was cut short while it was read")
        return self._held_good(chunk, buffer, scratch) if due else buffer

    def _held_good(self, chunk: Sequence[int], data: Bytes, scratch: Scratch) -> Bytes:
        """The bytes of a chunk, held against the manifest."""
        assert self._trust is not None
        self._trust.check(chunk, data)
        scratch.checked += 1
        return data

    def _extent(self, key: str, chunk: Sequence[int], fd: int | None, file: Signature) -> tuple[int, int]:
        """Offset and size of the encoded chunk in its file, checked; a size of -1 means that it is absent."""
        layout, file_size = self.layout, file[0]
        if layout.shard_shape is None:
            start, size = 0, file_size
        else:
            start, size = self._index(key, fd, file)[layout.slot(chunk)].tolist()
            if start == ABSENT and size == ABSENT:
                return 0, -1
            if start + size > file_size:
                raise ValueError(f"its shard ends at byte {file_size}, the chunk at {start + size}")
            index = layout.index_bytes
            if start < index if layout.index_at_start else start + size > file_size - index:
                raise ValueError(f"it would lie over the index of its shard, at bytes {start} to {start + size}")
        if self._exact is not None and size != self._exact:
            raise ValueError(f"it has {size} bytes, expected {self._exact}")
        if size > self._most:
            raise ValueError(f"it has {size} encoded bytes, a chunk decodes to {layout.chunk_bytes}")
        if size == 0:
            raise ValueError("it is empty")
        return start, size

    def _index(self, key: str, fd: int | None, file: Signature) -> NDArray[np.uint64]:
        """The index of this file as it was then; one that is kept of what the file was before is not used."""
        with self._lock:
            of, known = self._indexes.get(key, (None, None))
            if known is not None and of == file:
                self._indexes.move_to_end(key)
                return known
        own, status = (fd, None) if fd is not None else self._files.open(key)
        try:
            if status is not None and (now := _signature(status)) != file:
                raise ValueError(changed(file, now))
            index = shard_index(self.layout, own, file[0])
        finally:
            if status is not None:
                os.close(own)
        with self._lock:
            self._indexes[key] = file, index
            while len(self._indexes) > max(1, INDEX_CACHE_BYTES // (index.nbytes + 4)):
                self._indexes.popitem(last=False)
        return index


_NOTHING: Bytes = np.empty(0, dtype=np.uint8)


class _DaemonExecutor(concurrent.futures.ThreadPoolExecutor):
    """Daemon threads in place of the pool's own, so that a read that hangs for ever keeps no process alive."""

    def __init__(self, max_workers: int, name: str) -> None:
        super().__init__(max_workers)  # a loop takes nothing else; it starts no thread before its own `submit`
        self._name, self._limit, self._ended = name, max_workers, False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._daemons: list[threading.Thread] = []

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        if len(self._daemons) < self._limit:
            name = f"{self._name}-{len(self._daemons)}"
            self._daemons.append(threading.Thread(target=self._serve, name=name, daemon=True))
            self._daemons[-1].start()
        return future

    def _serve(self) -> None:
        while call := self._calls.get():
            call()
            del call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads; the first call waits for those that end within LEAVE_SECONDS."""
        waited, self._ended = self._ended, True
        for _ in self._daemons:
            self._calls.put(None)
        deadline = time.monotonic() + LEAVE_SECONDS
        for thread in self._daemons if wait and not waited else ():
            thread.join(max(0.0, deadline - time.monotonic()))


class ZarrLoop:
    """A private event loop in a thread of its own, with an executor of its own, for zarr's asynchronous API.

    Started on first use, joined by `close`: the caller's loop, its default executor and zarr's own threads are not
    touched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        """Settled by the thread as the last thing it does."""

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None) -> T:
        """Run a coroutine there and wait for its result, from any other thread.

        Raises TimeoutError, or concurrent.futures.CancelledError where `close` came first.
        """
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have a plain function called there; it is dropped where `close` comes first."""
        self._running().call_soon_threadsafe(function, *arguments)

    def tell(self, fn: Callable[[], Any]) -> None:
        """Have a plain function run there soon. Raises RuntimeError where the loop has ended."""
        loop = self._loop
        if loop is None:
            raise RuntimeError("the loop has ended")
        loop.call_soon_threadsafe(fn)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop, self._ended = asyncio.new_event_loop(), concurrent.futures.Future()
                self._ended.set_running_or_notify_cancel()  # nobody who waits for it can cancel it from now on
                serve = (self._loop, self._ended)
                self._thread = threading.Thread(target=self._serve, args=serve, name="streamtrain-zarr", daemon=True)
                self._thread.start()
            return self._loop

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop, ended: concurrent.futures.Future[None]) -> None:
        asyncio.set_event_loop(loop)
        executor = _DaemonExecutor(4, "streamtrain-zarr-io")
        loop.set_default_executor(executor)
        try:
            loop.run_forever()
        finally:
            waiting = asyncio.all_tasks(loop)
            for task in waiting:
                task.cancel()
            if waiting:
                loop.run_until_complete(asyncio.wait(waiting))
            loop.run_until_complete(loop.shutdown_asyncgens())
            executor.shutdown(wait=True)
            loop.close()
            ended.set_result(None)

    async def aclose(self) -> None:
        """The same from another loop, which is not blocked meanwhile; a cancellation is raised at the end."""
        thread, ended = self._stop()
        cancelled: asyncio.CancelledError | None = None
        if thread is not None:
            here = asyncio.get_running_loop()
            over, deadline = asyncio.wrap_future(ended), here.time() + CLOSE_SECONDS
            while not over.done() and here.time() < deadline:
                try:
                    await asyncio.wait([over], timeout=deadline - here.time())
                except asyncio.CancelledError as error:
                    cancelled = error
            self._join(thread, 0.0 if not over.done() else CLOSE_SECONDS)
        if cancelled is not None:
            raise cancelled

    def __del__(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)

    def close(self) -> None:
        """End the thread and its executor, and wait for both (but not for a read that hangs)."""
        thread, _ = self._stop()
        if thread is not None:
            self._join(thread, CLOSE_SECONDS)

    def _stop(self) -> tuple[threading.Thread | None, concurrent.futures.Future[None]]:
        """Have the thread end; it, if there was one, and what tells that it has."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
        return thread, self._ended

    @staticmethod
    def _join(thread: threading.Thread, timeout: float) -> None:
        thread.join(timeout)
        if thread.is_alive():
            logger.error("storage has not answered within %g s; the thread that waits is left behind", CLOSE_SECONDS)


SERIALS = itertools.count()
"""Tell readers apart whose chunks tell no version."""


class ZarrReader:
    """Chunks of one array by zarr's own API: any codec, layout or store that zarr knows.

    `files`: the store's, where it is a folder of this machine: zarr would take a folder for fill, follow a link to
    anywhere and wait for a pipe, so each file is looked at first.
    """

    lane = "zarr"

    def __init__(
        self, layout: ArrayLayout, array: Any, loop: ZarrLoop, *, timeout: float, files: StoreFiles | None = None
    ) -> None:
        self.layout, self._array, self._loop, self._timeout, self._files = layout, array, loop, timeout, files
        self._serial = next(SERIALS)
        self._trust: Trust | None = None

    def vouch(self, verify: Verify) -> None:
        if self._files is not None:
            self._trust = trust_in(self._files.root, self.layout, verify, whole_files=True)

    def version(self, chunk: Sequence[int]) -> Version | None:
        """Of the file that holds it; what is not one file's, or no file's, is never the same as anybody else's."""
        if self._files is None or unaddressable(self.layout) is not None:
            return Version(("reader", self._serial), False)
        return self._files.version(self._key(chunk))

    def look(self, chunk: Sequence[int], scratch: Scratch) -> None:
        """Its version is known at once."""

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        layout = self.layout
        box = layout.box(chunk)
        if self._files is not None:
            self._check_file(self._files, chunk)
        if self._trust is not None and self._trust.due(chunk):
            self._check(self._trust, chunk, scratch)
        try:
            data = self._loop.run(self._get(chunk, tuple(slice(a, b) for a, b in box)), self._timeout)
        except TimeoutError:
            raise EnvironmentProblem(
                f"{ChunkName(layout.name, tuple(chunk))} was not read within {self._timeout:g} s",
                hint="check the storage, or raise read_timeout",
            ) from None
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise chunk_error(layout, chunk, getattr(self._array, "store_path", layout.name), cause) from error
        result: NDArray[Any] = np.asarray(data)
        return result

    def _check(self, trust: Trust, chunk: Sequence[int], scratch: Scratch) -> None:
        """Hold the file of this chunk against the manifest: what is in it, zarr alone knows."""
        assert self._files is not None
        layout, key = self.layout, self.layout.key(chunk)
        try:
            fd, status = self._files.open(key)
            try:
                size = status.st_size
                trust.check_record(chunk, size, lambda: describe_part(fd, 0, size, scratch, both=trust.both))
                trust.found_good(chunk)
                scratch.checked += 1
            finally:
                os.close(fd)
        except FileNotFoundError:
            try:
                trust.check_absent(chunk)
            except ValueError as error:
                raise chunk_error(layout, chunk, self._files.root / key, error) from error
        except (ValueError, OSError) as error:
            cause = getattr(error, "strerror", None) or error
            raise chunk_error(layout, chunk, self._files.root / key, cause) from error

    def _check_file(self, files: StoreFiles, chunk: Sequence[int]) -> None:
        """Raise DataError unless it is a regular file of the store, as it was when first seen, or rightly absent."""
        key = self._key(chunk)
        try:
            try:
                fd, status = files.open(key)
            except FileNotFoundError:
                files.check_absent(key)
                if self.layout.complete:
                    raise ValueError("it is missing, and its writer left no chunk out") from None
                return
            os.close(fd)
            files.check_unchanged(key, status)
        except ValueError as error:
            raise chunk_error(self.layout, chunk, files.root / key, error) from error
        except OSError as error:
            raise chunk_error(self.layout, chunk, files.root / key, error.strerror or error) from error

    def _key(self, chunk: Sequence[int]) -> str:
        """Key of its file as zarr itself spells it, for it may know encodings that layouts don't."""
        name = self._array.metadata.encode_chunk_key(self.layout.file(chunk))
        return f"{self.layout.name}/{name}" if self.layout.name else str(name)

    async def _get(self, chunk: Sequence[int], selection: tuple[slice, ...]) -> Any:
        """What zarr reads; it takes a missing file for fill, which it is not where the writer left no chunk out."""
        if self.layout.complete and not await self._array.store_path.store.exists(self.layout.key(chunk)):
            raise FileNotFoundError("it is missing, and its writer left no chunk out")
        return await self._array.getitem(selection)
