"""Chunks of local files, by memory maps kept open or by pread.

A file that can't be trusted (missing where its writer vouches for it, cut, changed, a link out of the store, no regular
file) is a DataError naming array, chunk, rows, path and cause.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.budget import available_memory, format_bytes
from streamtrain.data.decode import Decoder
from streamtrain.data.files import SHORT_OF, Map, StoreFiles, read_into
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ABSENT, ALONE, ArrayLayout, parse_shard_index
from streamtrain.data.manifest import NOTHING, SLICE, Record, describe
from streamtrain.data.reading import ChunkName, Scratch, Version, chunk_error
from streamtrain.data.seen import Signature, changed, signature_of
from streamtrain.data.trust import Trust, Verify, trust_in
from streamtrain.errors import EnvironmentProblem

logger = logging.getLogger(__name__)

INDEX_CACHE_BYTES = 16 << 20
SMALL_CHUNK = 1 << 20
"""Chunks up to this size are decoded right out of a map of their shard: to open it for each would cost more."""
LOOKED_AT = 8
"""Files whose sizes tell about how large all of them are."""
ENCODED_SLACK = 1 << 16
"""Encoded chunks may be larger than decoded ones by 1/8 and this much; anything beyond is refused unread."""


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
        files.describe(layout.name)
        self._region = files.region(layout) if self._mapped else None
        self._ready: dict[int, tuple[str, Map]] = {}
        """Files that lie side by side, by number, with their paths: nothing is due before their rows are used."""

    def vouch(self, verify: Verify) -> str | None:
        self._trust = trust_in(self._files.root, self.layout, verify)
        self._ready = {}
        return None if self._trust is None else self._trust.manifest.contents

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
            start, size = self._extent(key, chunk, fd, signature_of(status))
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
        self,
        chunk: Sequence[int],
        rows: tuple[int, int],
        scratch: Scratch,
        *,
        few: bool = False,
        out: Bytes | None = None,
    ) -> NDArray[Any] | None:
        """`out`: where an encoded chunk is decoded, at the beginning, in place of the scratch (`layout.decode_room`
        bytes)."""
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
            room = self._out(scratch) if out is None else out
            decoded = self._decoder.view(self._decoder.decode(data, room, sound=sound))
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
            if error.errno in SHORT_OF:
                raise EnvironmentProblem(
                    f"{ChunkName(layout.name, tuple(chunk))}: {error.strerror}",
                    hint="raise `ulimit -n`, or free memory",
                ) from error
            raise chunk_error(layout, chunk, self._files.root / key, error.strerror or error) from error

    def rows_of(self, chunks: Sequence[int]) -> NDArray[Any] | None:
        """All rows of the array in one piece of memory, of which those of these chunks (numbers along the first axis)
        may be used after `check`; None where one of them is still to be read, or pages may not stay."""
        if self._region is None or self._beyond or self._touch == "always":
            return None
        if not all(map(self._ready.__contains__, chunks)):
            return None
        return self._region.data.view(self.layout.dtype).reshape(-1, *self.layout.chunk_shape[1:])

    def check(self, chunks: Sequence[int], scratch: Scratch) -> None:
        """Raise DataError unless the files of these chunks are what they were when they were first read."""
        began = time.perf_counter()
        others = (0,) * (self.layout.ndim - 1)
        scratch.reading = (ChunkName(self.layout.name, (chunks[0], *others)), time.monotonic())
        try:
            for number in chunks:
                path, file = self._ready[number]
                try:
                    same = signature_of(os.stat(path)) == file.signature
                except OSError:
                    same = False
                if not same:
                    self.read((number, *others), (0, self.layout.chunk_shape[0]), scratch)  # knows what to say
        finally:
            scratch.reading = None
        scratch.seconds["read"] += time.perf_counter() - began

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
            self._files.check_described(self.layout.name)
            return None
        try:
            self._files.check_unchanged(key, status)
            start, size = self._extent(key, chunk, fd, signature_of(status))
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
            if status is not None and (now := signature_of(status)) != file:
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
