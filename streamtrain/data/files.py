"""The files of one local store: opened only if regular and inside it, mapped and kept so within limits.

Its law: never anything but a regular file of the store, and never one that is not what it was.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import resource
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np

from streamtrain.data.budget import available_memory
from streamtrain.data.described import Described
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ArrayLayout
from streamtrain.data.reading import Version
from streamtrain.data.regions import Region, region_for
from streamtrain.data.seen import Seen, Signature, changed, signature_of, written_since

logger = logging.getLogger(__name__)

MADV_POPULATE_READ = 22
"""Linux 5.14: fault all pages in at once, with an error in place of a signal if the file is shorter."""
TICK = 10_000_000
"""Nanoseconds within which kernels before Linux 6.13 may date two changes alike (4 ms with most): what a file was just
before the opening can't be told from what it becomes just after it by size and time."""
AHEAD = 1_000_000_000
"""Nanoseconds by which a file may be younger than now, and still count as written just now: clocks are put right in
small steps."""
SPARE_DESCRIPTORS = 256
LARGE_CHUNK = 4 << 20
"""Chunks of this size cost no more by a map that is made anew each time than by pread; small ones cost twice as much
(256 KiB: 58 us against 24), and by a map that is kept as much as by pread, or less."""
SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What fails for want of descriptors or memory: no fault of any file."""
SHORT_ROW = 64
"""Bytes of a row below which it is not worth its place."""
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_REMOTE_TYPES = frozenset(
    {"nfs", "nfs4", "cifs", "smbfs", "smb3", "9p", "ceph", "lustre", "glusterfs", "afs", "gpfs", "beegfs", "autofs"}
    | {"pvfs2", "orangefs", "panfs", "wekafs", "coda", "ncpfs", "davfs", "vboxsf", "prl_fs", "drvfs"}
    | {"fuse"}  # s3fs, mount-s3, goofys and others may name themselves no further; "fuseblk" is a disk of this machine
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
        self._described = Described(root)
        self._look = False
        """Whether the metadata of all arrays are to be looked at before anything of the store is read."""
        self._said = False
        self.refused: dict[str, int] = {}
        """Why the machine refused a memory map, and how often: each time `pread` took its place."""

    def open(self, key: str) -> tuple[int, os.stat_result]:
        """A descriptor of a regular file inside the store and its status. Raises OSError or ValueError."""
        path = os.path.join(self.root, key)
        fd = _open_no_link(path)
        if fd is not None:
            status = os.fstat(fd)
            if self._seen.knows(key, signature_of(status)) or self._holds(fd):
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

    def describe(self, name: str) -> None:
        """Keep in mind what an array's metadata say, before the first of its chunks is looked for."""
        self._described.describe(name)

    def check_unchanged(self, key: str, status: os.stat_result) -> None:
        """Raise ValueError with sizes and times if the file is not what it was when first read, or when the store was
        opened."""
        signature = signature_of(status)
        known = self._noted(key, signature)
        if known != signature:
            raise ValueError(changed(known, signature))
        if self._look or status.st_mtime_ns >= self.opened_at or status.st_ctime_ns >= self.opened_at:
            self._check_opened(key, status)

    def _noted(self, key: str, signature: Signature) -> Signature:
        """What this file was when it was first seen, which may be now."""
        known = self._seen.first(key, signature)
        if known is signature:
            self._described.unlooked += signature[0]
            self._look = self._look or self._described.due
        return known

    def _check_opened(self, key: str, status: os.stat_result) -> None:
        """Raise ValueError if the store is not what it was when it was opened, as far as its metadata and the times of
        this file tell."""
        own = self._described.array_of(key)
        if self._look or own is None:
            why = self._described.any_changed()
            self._look = why is not None  # whoever asks next is told the same
        else:
            why = self._described.changed(own)
            if why is not None:
                self._look = True
        if why is not None:
            raise ValueError(why)
        if not self._written_since(status):
            return
        text = written_since(self.opened_at, status)
        set_back = self._written_by(status) > time.time_ns() + AHEAD  # nobody has written it by the clock as it is now
        if self._near and not set_back:
            raise ValueError(text)
        if not self._said:  # the clock of another machine may be ahead of ours
            self._said = True
            if set_back and self._near:
                text += ", by a clock that was set back since, or never set"
            logger.warning("%s: %s: %s; so may others be, and it is read all the same", self.root, key, text)

    def _written_since(self, status: os.stat_result) -> bool:
        """Whether this content is younger than the opening; not so a file whose content was dated into the future
        before, nor one that only changed its owner, mode or name."""
        return self._written_by(status) >= self.opened_at

    def _written_by(self, status: os.stat_result) -> int:
        """The latest that this content can have been written, in ns."""
        return min(status.st_mtime_ns, status.st_ctime_ns)

    @cached_property
    def _near(self) -> bool:
        return is_local(self.root)

    def check_absent(self, key: str) -> None:
        """Raise ValueError if what can't be found was there before, or if a link to nothing stands in its place."""
        if key in self._seen:
            raise ValueError("it was there, and vanished during the run")
        if os.path.lexists(os.path.join(self.root, key)):
            raise ValueError("it is a link to nothing")

    def check_described(self, name: str) -> None:
        """Raise ValueError where the metadata of an array are gone or say something else: then a chunk that can't be
        found is none that was left out."""
        if why := self._described.changed(name):
            raise ValueError(f"it is not there, and {why}")

    def version(self, key: str) -> Version:
        """What a file is now; of one that is not there, that. It counts as seen: a change from now on is one."""
        path = os.path.join(self.root, key)
        try:
            now = os.stat(path)
        except OSError:
            return Version(("not there",), False)
        signature = signature_of(now)
        if not self._seen.knows(key, signature):
            if key in self._seen or (self._written_since(now) and self._near):
                return Version(("changed", self.opened_at), False)  # whoever opened it later may have kept that
            if os.path.realpath(path).startswith(self._inside):
                self._noted(key, signature)  # what lies elsewhere is never seen, for `open` asks no more of what was
        lasting = now.st_mtime_ns < self.opened_at - TICK
        return Version((*signature, now.st_ctime_ns), lasting)  # times of content can be set back, not this

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

    @staticmethod
    def _room_for(layout: ArrayLayout) -> Region | None:
        count, size = layout.num_files, layout.chunk_bytes
        if not lined_up(layout) or count < 2 or count * size > available_memory() // 2:
            return None
        return region_for(count, size)

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
            signature = signature_of(os.stat(self._stem + key))
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
                    return self._put_beside(key, fd, signature_of(status), *place)
                memory = mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
                if scattered:
                    memory.madvise(mmap.MADV_RANDOM)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in SHORT_OF:
                raise
            self._make_room(key, error.strerror or str(error))
            return None
        made = Map.of(memory, signature_of(status))
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


def lined_up(layout: ArrayLayout) -> bool:
    """Whether files that are small make up the array's rows in order when they are mapped one after another; rows so
    short that their places would take as much memory as themselves are none."""
    if layout.ndim == 0 or layout.codecs or layout.shard_shape is not None or layout.chunk_bytes == 0:
        return False
    whole = layout.chunk_shape[1:] == layout.shape[1:] and layout.axes == tuple(range(layout.ndim))
    small = layout.chunk_bytes < LARGE_CHUNK and layout.chunk_bytes % mmap.PAGESIZE == 0
    return whole and small and layout.chunk_bytes // layout.chunk_shape[0] >= SHORT_ROW
