"""What each file of an array is: its size and checksum, in one file beside them that is mapped and never loaded whole.

Its law: nothing in it is believed before its own checksum, and nothing in it holds for other metadata than it was
written for. `ARRAY/.streamtrain/manifest` is little-endian, and the same files always give the same bytes:

    0      magic, 8 bytes; length and crc32c of the header, 4 bytes each
    16     header: canonical JSON, zeros up to byte 512
    512    crc32c of each page of PAGE records (the header holds the crc32c of all of these), zeros up to 64 bytes
    ...    records of 16 bytes, size, crc32c and crc32: of each file in C order of the grid; then, where files are
           shards, of each inner chunk, shard by shard. A size of 2^64-1 vouches that it was never written.

A lookup touches one page: a million chunks cost 16 MB on disk, and memory for the pages that were touched.

Why two checksums: the crc32c of bytes that end with their own crc32c is the same for all bytes of that length, so that
chunks with a crc32c codec, and shards, whose indexes have one, could take each other's place unseen. Of these, and
these alone (`doubly`), the crc32 of zlib is kept too, which has another polynomial.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from streamtrain.data.layout import ABSENT, ALONE, ArrayLayout
from streamtrain.errors import DataError

PLACE = ".streamtrain/manifest"
"""Within the folder of an array: zarr lists groups, and warns of what it does not know there, but never arrays."""
MAGIC = b"STMANIF1"
HEADER = 512
PAGE = 4096
RECORD = np.dtype([("size", "<u8"), ("crc32c", "<u4"), ("crc32", "<u4")])
HINT = "restore it, or vouch for the files as they are: `streamtrain verify DATA --write-manifest`"
SLICE = 1 << 20
"""The checksum is taken of so many bytes at once: it holds the interpreter's lock, for 60 us each."""

Bytes = NDArray[np.uint8]


class Record(NamedTuple):
    """What a file or chunk was when it was written."""

    size: int
    """In bytes; ABSENT where it was left out."""
    crc32c: int
    crc32: int = 0
    """Of bytes that may hold a crc32c of their own; else 0."""


NOTHING = Record(0, 0)


def describe(data: Bytes, *, both: bool, before: Record = NOTHING) -> Record:
    """What these bytes are, or those before and these; `both` checksums or crc32c alone."""
    return Record(
        before.size + len(data), crc32c(data, before.crc32c), zlib.crc32(data.data, before.crc32) if both else 0
    )


def doubly(layout: ArrayLayout, *, files: bool) -> bool:
    """Whether the array's files (or else the chunks in its shards) may hold a crc32c of their own bytes."""
    if files and (layout.shard_shape is not None or layout.slow is not None):
        return True
    return any(codec.name == "crc32c" for codec in layout.codecs)


def crc32c(data: Bytes, crc: int = 0) -> int:
    """The checksum of these bytes (Castagnoli; RFC 3720), or of those before, whose is `crc`, and these."""
    for start in range(0, len(data), SLICE):
        crc = google_crc32c.extend(crc, data[start : start + SLICE])
    return crc


def unaddressable(layout: ArrayLayout) -> str | None:
    """Why the files of an array can't be told from its metadata; None if they can."""
    slow = layout.slow or ""
    return slow if slow.endswith("chunk grid") or slow.startswith(("chunk key", "storage transformers")) else None


def file_grid(layout: ArrayLayout) -> tuple[int, ...]:
    """Files along each axis."""
    return tuple(-(-s // f) for s, f in zip(layout.shape, layout.file_shape, strict=True))


def inner_slots(layout: ArrayLayout) -> int:
    """Chunks in a file that have records of their own; 0 where a file is one chunk, or its index unknown to us."""
    return math.prod(layout.inner) if layout.shard_shape is not None and layout.slow is None else 0


def first_chunk(layout: ArrayLayout, number: int) -> tuple[int, ...]:
    """The first chunk of the file of this number."""
    where = np.unravel_index(number, file_grid(layout)) if layout.ndim else ()
    return tuple(int(w) * per for w, per in zip(where, layout.inner, strict=True))


def metadata_digest(folder: Path) -> str:
    """SHA-256 of an array's metadata but for its attributes, which may change. Raises OSError or ValueError."""
    path = folder / "zarr.json"
    if not path.exists():
        path = folder / ".zarray"
    return digest_of(path.read_bytes())


def digest_of(text: bytes) -> str:
    """The same of the metadata's own bytes. Raises ValueError."""
    metadata = json.loads(text)
    metadata.pop("attributes", None)
    return hashlib.sha256(_canonical(metadata)).hexdigest()


def _canonical(tree: object) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


def _records_at(records: int) -> int:
    return -(-(HEADER + 4 * -(-records // PAGE)) // 64) * 64


class Pages:
    """The records of a manifest, page by page: what is common to one that is mapped and one that is elsewhere."""

    path: Path | str
    """What messages call it."""

    def begin(self, head: Bytes) -> None:
        """Take in its first HEADER bytes. Raises DataError where they are damaged."""
        header = self._header(head)
        try:
            self.files, self.slots, self.bytes = int(header["files"]), int(header["slots"]), int(header["bytes"])
            """Files; inner chunks with records of their own in each; bytes of all files."""
            self.metadata, table_crc = str(header["metadata"]), int(header["table"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged("its header lacks what it must have") from error
        self._table_crc = table_crc
        self.count = self.files * (1 + self.slots)
        """Records."""
        self.start = _records_at(self.count)
        """The byte where they begin."""

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self.start + self.count * RECORD.itemsize

    @property
    def contents(self) -> str:
        """`metadata-table`: the same for the same files, whose metadata and checksums the parts stand for."""
        return f"{self.metadata[:8]}-{self._table_crc:08x}"

    def _tabled(self, table: Bytes) -> None:
        """Take in the bytes from HEADER to `start`. Raises DataError where they are damaged."""
        self._table = table[: 4 * -(-self.count // PAGE)].view("<u4")
        if crc32c(table) != self._table_crc:
            raise self._damaged("the checksum of its table does not match")

    def _header(self, head: Bytes) -> dict[str, Any]:
        if len(head) < HEADER or head[:8].tobytes() != MAGIC:
            raise self._damaged("it does not begin as a manifest does")
        length, crc = (int(n) for n in head[8:16].view("<u4"))
        if length > HEADER - 16 or crc32c(head[16:HEADER]) != crc:
            raise self._damaged("the checksum of its header does not match")
        try:
            header: dict[str, Any] = json.loads(head[16 : 16 + length].tobytes())
        except ValueError as error:  # no checksum covers the length itself
            raise self._damaged("its header has another length than it says") from error
        return header

    def _damaged(self, why: str) -> DataError:
        return DataError(f"the manifest {self.path} is damaged: {why}", hint=HINT)

    def check_same(self, layout: ArrayLayout, digest: str) -> None:
        """Raise DataError if it was written for other metadata than this array has now, whose digest this is."""
        same = (self.files, self.slots) == (math.prod(file_grid(layout)), inner_slots(layout))
        if not same or digest != self.metadata:
            raise DataError(
                f"the manifest {self.path} was written for other metadata than those of {layout.name or ALONE!r}: "
                "they are damaged, or the array was resized or written anew",
                hint=HINT,
            )

    def file(self, number: int) -> Record:
        """Of the file of this number. Raises DataError where that part of the manifest is damaged."""
        return self._record(number)

    def slot(self, number: int, slot: int) -> Record:
        """Of an inner chunk of the shard of this number."""
        return self._record(self.files + number * self.slots + slot)

    def _record(self, at: int) -> Record:
        record = self._page(at // PAGE)[at % PAGE]
        return Record(int(record["size"]), int(record["crc32c"]), int(record["crc32"]))

    def check(self) -> None:
        """Read it whole. Raises DataError where it is damaged."""
        for page in range(len(self._table)):
            self._page(page)

    def _page(self, page: int) -> NDArray[np.void]:
        """The records of a page that is sound."""
        raise NotImplementedError

    def _sound_page(self, page: int, records: Bytes) -> NDArray[np.void]:
        """These bytes as the records of a page. Raises DataError where they are damaged."""
        if crc32c(records) != int(self._table[page]):
            raise self._damaged(f"the checksum of its page {page} does not match")
        return records.view(RECORD)


class Manifest(Pages):
    """A manifest that was opened. Thread-safe: what it keeps are pages known to be sound."""

    path: Path

    def __init__(self, path: Path) -> None:
        """Raises DataError where it is damaged."""
        self.path = path
        self._sound: set[int] = set()
        try:
            with path.open("rb") as file:
                self._memory: Bytes = np.frombuffer(
                    mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED), dtype=np.uint8
                )
        except (OSError, ValueError) as error:
            raise self._damaged(getattr(error, "strerror", None) or "it is empty") from error
        self.begin(self._memory[:HEADER])
        if len(self._memory) != self.size:
            raise self._damaged(f"it has {len(self._memory)} bytes, expected {self.size}")
        self._tabled(self._memory[HEADER : self.start])
        self._records: NDArray[np.void] = self._memory[self.start :].view(RECORD)

    def check_fits(self, layout: ArrayLayout, folder: Path) -> None:
        """Raise DataError if it was written for other metadata than this array, in this folder, has now."""
        self.check_same(layout, metadata_digest(folder))

    def _page(self, page: int) -> NDArray[np.void]:
        records = self._records[page * PAGE : (page + 1) * PAGE]
        if page not in self._sound:
            self._sound_page(page, records.view(np.uint8))
            self._sound.add(page)
        return records


class Draft:
    """A manifest that is being written: `with Draft(...) as draft`, records in any order, `commit` at the end."""

    def __init__(self, folder: Path, layout: ArrayLayout) -> None:
        """For the array in this folder. Raises OSError, or DataError where its files can't be told."""
        why = unaddressable(layout)
        if why is not None:
            raise DataError(f"array {layout.name or ALONE!r} can't have a manifest: {why}", hint="convert it first")
        self._folder, self._target = folder, folder / PLACE
        self.files, self.slots = math.prod(file_grid(layout)), inner_slots(layout)
        count = self.files * (1 + self.slots)
        self._start = _records_at(count)
        self._part = self._target.with_name(f"manifest.{os.getpid()}.part")
        self._target.parent.mkdir(exist_ok=True)
        with self._part.open("wb") as file:
            file.truncate(self._start + count * RECORD.itemsize)
        self._memory = np.memmap(self._part, dtype=np.uint8, mode="r+")
        self._records: NDArray[np.void] = self._memory[self._start :].view(RECORD)
        self._records["size"] = ABSENT

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self._part.unlink(missing_ok=True)

    def put(self, number: int, record: Record, slots: Sequence[Record] = ()) -> None:
        """What the file of this number is, and the chunks in it."""
        self._records[number] = record
        for slot, inner in enumerate(slots):
            self._records[self.files + number * self.slots + slot] = inner

    def commit(self) -> Path:
        """Make it durable, then visible. Raises OSError."""
        sizes, table = self._records["size"][: self.files], self._memory[HEADER : self._start]
        total = sum(int(some[some != ABSENT].sum()) for some in _pages(sizes))
        sums = [crc32c(page.view(np.uint8)) for page in _pages(self._records)]
        table[: 4 * len(sums)] = np.array(sums, dtype="<u4").view(np.uint8)
        header = _canonical(
            {
                "files": self.files,
                "slots": self.slots,
                "bytes": total,
                "metadata": metadata_digest(self._folder),
                "table": crc32c(table),
            }
        )
        self._memory[:8] = np.frombuffer(MAGIC, dtype=np.uint8)
        self._memory[16 : 16 + len(header)] = np.frombuffer(header, dtype=np.uint8)
        self._memory[8:16].view("<u4")[:] = len(header), crc32c(self._memory[16:HEADER])
        self._memory.flush()
        fsync(self._part)
        os.replace(self._part, self._target)
        fsync(self._target.parent)
        fsync(self._folder)
        return self._target


def _pages(records: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(records), PAGE):
        yield records[start : start + PAGE]


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
