"""What all readers of chunks have in common: what they give, what they know of it, and how they fail.

A reader gives one decoded chunk at a time, to a worker thread with buffers of its own.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ALONE, ArrayLayout
from streamtrain.data.trust import Verify
from streamtrain.errors import DataError, EnvironmentProblem

T = TypeVar("T")


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
        self.thread = threading.get_ident()
        """The worker's own."""
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

    def vouch(self, verify: Verify) -> str | None:
        """Hold chunks against the array's manifest from now on, if it has one; its `contents` where it is at hand.

        Raises DataError if it is damaged.
        """

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


def file_damage(layout: ArrayLayout, first: Sequence[int], path: object, cause: object) -> str:
    """What is said of a whole file that begins with this chunk: of a shard the rows of all its chunks."""
    if layout.shard_shape is None:
        return str(chunk_error(layout, first, path, cause))
    grid = [-(-size // step) for size, step in zip(layout.shape, layout.chunk_shape, strict=True)]
    last = [min(at + per, along) - 1 for at, per, along in zip(first, layout.inner, grid, strict=True)]
    rows = ", ".join(f"{a}:{b}" for (a, _), (_, b) in zip(layout.box(first), layout.box(last), strict=True))
    return f"{ChunkName(layout.name, tuple(first))} and the others of its shard (rows [{rows}]) in {path}: {cause}"
