"""Segments of the disk cache: files of many decoded chunks in a row, each with an index of what lies where.

Its law: a record is written after the bytes that it tells of. What a life before this one has left is looked at once,
record and bytes, before it is given; what does not match its checksums was never there. Nothing is synced: a lost page
costs a chunk decoded again, no more.

    00000012.data     decoded chunks in C order and this machine's byte order, each at a multiple of 64 bytes
    00000012.index    48 bytes for each of them, little-endian: array, number, version, offset, size, crc32c of the
                      bytes, crc32 of all before it; zeros where there is none (any more)
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.files import Map, read_into
from streamtrain.data.filters import Bytes
from streamtrain.data.manifest import SLICE, crc32c
from streamtrain.data.reading import Scratch

Touch = Literal["no", "once", "always", "pread"]
"""How pages of a map are faulted in (see `Map.view`); or that a copy is read, where memory can't hold them anyway."""
ALIGNED = 64
_FIELDS = struct.Struct("<QQQQQI")
_OWN = struct.Struct("<I")
ROW_BYTES = _FIELDS.size + _OWN.size
ROWS = np.dtype(
    [(name, "<u8") for name in ("array", "number", "version", "offset", "size")] + [("crc32c", "<u4"), ("own", "<u4")]
)


class Record(NamedTuple):
    """Where a chunk lies, and what it is."""

    array: int
    """Digest of its array: store, name and what its metadata make of its bytes."""
    number: int
    """In C order of the chunk grid."""
    version: int
    """Digest of what its source was."""
    offset: int
    size: int
    crc32c: int

    def pack(self) -> bytes:
        """As it lies in an index."""
        fields = _FIELDS.pack(*self)
        return fields + _OWN.pack(zlib.crc32(fields))


_NONE = bytes(ROW_BYTES)


class SegmentCut(ValueError):
    """A file was cut by somebody else: nothing in it can be relied on."""


def room_for(size: int) -> int:
    """The most bytes that an entry of this size takes on the disk."""
    return size + ALIGNED - 1 + ROW_BYTES


def slices(data: NDArray[Any]) -> Iterator[Bytes]:
    """The elements in C order and this machine's byte order, in pieces of at most SLICE bytes (or one element)."""
    if data.flags.c_contiguous and data.dtype.isnative:
        flat = data.reshape(-1).view(np.uint8)
        for start in range(0, len(flat), SLICE):
            yield flat[start : start + SLICE]
    elif data.nbytes <= SLICE:
        yield from slices(data.astype(data.dtype.newbyteorder("="), order="C"))
    elif len(data) == 1:
        yield from slices(data[0])
    else:
        step = max(1, SLICE * len(data) // data.nbytes)
        for start in range(0, len(data), step):
            yield from slices(data[start : start + step])


def open_own(path: str) -> int:
    """A file of ours, opened or made. Raises OSError for what is none: a link in its place may lead to anything."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, f"{path} is a link, and is not followed") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, f"{path} is no regular file")
    return fd


class Segment:
    """One segment. `reserve` and `forget` are for one thread at a time; reading and writing what is there for many."""

    def __init__(self, folder: str, number: int, room: int, *, mapped: bool, owner: object) -> None:
        """Open the segment of this number, or make it, for up to `room` bytes of chunks. Raises OSError.

        `owner` is kept as long as anybody may write here.
        """
        self.number, self._owner = number, owner
        self.used = 0
        """When something in it was last asked for, on its owner's clock."""
        base = os.path.join(folder, f"{number:08x}")
        self.paths = base + ".data", base + ".index"
        self._memory: Map | None = None
        self._open: list[int] = []
        self._open += map(open_own, self.paths)
        self._data, self._rows = self._open
        self._index = bytearray(self._read_index())
        self.live = 0
        """How many chunks it holds, or has room made for."""
        self.size = self._written = self._believed()
        self._sound = bytearray(len(self._index) // ROW_BYTES)
        """Of each row: whether its bytes are known to be what it says."""
        try:
            if mapped:
                self._memory = self._map(max(room, self.size, 1))
        finally:
            os.ftruncate(self._data, self.size)
            os.ftruncate(self._rows, len(self._index))

    def _read_index(self) -> bytes:
        size = os.fstat(self._rows).st_size // ROW_BYTES * ROW_BYTES
        buffer = np.empty(size, dtype=np.uint8)
        return buffer[: read_into(self._rows, buffer, 0)].tobytes()

    def _believed(self) -> int:
        """Clear rows that are none, or tell of bytes that are not there; where the last chunk of the others ends."""
        del self._index[len(self._index) // ROW_BYTES * ROW_BYTES :]
        there, end = os.fstat(self._data).st_size, 0
        for row in range(len(self._index) // ROW_BYTES):
            at = row * ROW_BYTES
            fields = self._index[at : at + _FIELDS.size]
            record = self.record(row)
            last = record.offset + record.size
            right = zlib.crc32(fields) == _OWN.unpack_from(self._index, at + _FIELDS.size)[0]
            if right and record.size and last <= there:
                end, self.live = max(end, last), self.live + 1
            else:
                self._index[at : at + ROW_BYTES] = _NONE
        return end

    def _map(self, room: int) -> Map:
        """The file and the room after it: memory beyond its end is there, and not touched before it is written."""
        os.ftruncate(self._data, room)
        return Map.of(mmap.mmap(self._data, room, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED), (0, 0, 0))

    @property
    def bytes(self) -> int:
        """What it takes on the disk."""
        return self.size + len(self._index)

    def _table(self) -> NDArray[np.void]:
        return np.frombuffer(bytes(self._index), dtype=ROWS)

    def rows_of(self, array: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows that tell of this array's chunks, and the chunks' numbers."""
        table = self._table()
        rows = np.flatnonzero((table["array"] == np.uint64(array)) & (table["size"] > 0))
        return rows, table["number"][rows].astype(np.int64)

    def record(self, row: int) -> Record:
        """What a row says; of one that was cleared all zeros."""
        return Record(*_FIELDS.unpack_from(self._index, row * ROW_BYTES))

    @property
    def end(self) -> int:
        """Where the next chunk begins."""
        return -(-self.size // ALIGNED) * ALIGNED

    def reserve(self, size: int) -> tuple[int, int]:
        """Row and offset for so many bytes more."""
        row, offset = len(self._index) // ROW_BYTES, self.end
        self._index += _NONE
        self._sound += b"\0"
        self.size, self.live = offset + size, self.live + 1
        return row, offset

    def write(self, row: int, offset: int, what: tuple[int, int, int], data: NDArray[Any]) -> None:
        """Write a chunk of (array, number, version) where there is room for it, then its row.

        Raises OSError, or SegmentCut.
        """
        self._check_whole()
        crc, at = 0, offset
        for part in slices(data):
            crc = crc32c(part, crc)
            _write(self._data, part.data, at)
            at += len(part)
        record = Record(*what, offset, at - offset, crc)
        _write(self._rows, memoryview(record.pack()), row * ROW_BYTES)
        self._index[row * ROW_BYTES : (row + 1) * ROW_BYTES] = record.pack()
        self._sound[row], self._written = 1, max(self._written, at)

    def _check_whole(self) -> None:
        """What is written later would fill the gap with zeros that look like chunks."""
        written = self._written  # first: it grows after the file does
        if os.fstat(self._data).st_size < written:
            raise SegmentCut("its file was cut short")

    def read(self, row: int, record: Record, scratch: Scratch, touch: Touch, *, check: bool) -> Bytes:
        """The bytes of a row: a view of the map, or the scratch's. Raises ValueError with the cause, or OSError."""
        self._check_whole()
        due = check or not self._sound[row]
        if self._memory is not None and touch != "pread":
            if record.offset + record.size > len(self._memory):
                raise ValueError("its bytes lie beyond its map")
            data = self._memory.view(record.offset, record.size, "always" if due else touch)
        else:
            data = scratch.take("decoded", record.size)
            if read_into(self._data, data, record.offset) != record.size:
                raise SegmentCut("its file was cut short")
        if due:
            found = crc32c(data)
            if found != record.crc32c:
                raise ValueError(f"its checksum (crc32c) is {found:08x}, its record says {record.crc32c:08x}")
            self._sound[row] = 1
        return data

    def advise(self, row: int, advice: int) -> int:
        """Give the kernel advice on the bytes of a row; how many they are."""
        record = self.record(row)
        if record.size:  # of no bytes the kernel understands all
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._data, record.offset, record.size, advice)
        return record.size

    def forget(self, row: int) -> None:
        """Clear a row. Raises OSError."""
        self.live -= 1
        self._index[row * ROW_BYTES : (row + 1) * ROW_BYTES] = _NONE
        _write(self._rows, memoryview(_NONE), row * ROW_BYTES)

    def used_now(self) -> None:
        """Let a later life know that it was used in this one."""
        with contextlib.suppress(OSError):
            os.utime(self.paths[1])

    def __del__(self) -> None:
        for fd in self._open:  # not before: a thread that still writes must not meet somebody else's file
            os.close(fd)

    def remove(self) -> None:
        """Delete its files: the index first, without which the other is nothing. Whoever still reads may go on."""
        for path in reversed(self.paths):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
