"""A reader with a disk cache before it: what was decoded once comes out of a memory map from then on.

Its law: a kept chunk is given only while its source is what it was when the chunk was decoded. Files are asked by
`stat`, each time; an object elsewhere is asked once a run, by its first byte, ahead with all else that is fetched.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from streamtrain.data.budget import available_memory
from streamtrain.data.disk_cache import DiskCache, Folder, Shelf
from streamtrain.data.files import is_local
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ALONE, ArrayLayout, decoded_whole, essence
from streamtrain.data.manifest import PLACE, unaddressable
from streamtrain.data.readers import LocalReader
from streamtrain.data.reading import ChunkReader, Scratch, Version, under
from streamtrain.data.remote import RemoteReader, Want
from streamtrain.data.segments import Touch
from streamtrain.data.trust import Verify

logger = logging.getLogger(__name__)

FORMAT = "streamtrain disk cache 1"
"""Part of what chunks go by: other formats are never found, and given up as time goes by."""


class KeptReader:
    """Chunks of one array: from the disk cache, or from the reader behind it, and then kept."""

    def __init__(
        self,
        reader: ChunkReader,
        layout: ArrayLayout,
        cache: DiskCache,
        store: str,
        *,
        verify: Verify,
        inodes: bool,
        vouched: bool = False,
    ) -> None:
        """`store` names where it is, whoever asks; `inodes`: its files keep their numbers from one run to the next.

        `vouched`: chunks are held against a manifest; what was not is kept apart, and given to nobody who asks for it.
        """
        self.inner, self.layout, self._cache = reader, layout, cache
        self._far = under(RemoteReader, reader)
        self._array = _digest(FORMAT, store, vouched, *essence(layout))
        self._grid = tuple(-(-s // c) for s, c in zip(layout.shape, layout.chunk_shape, strict=True))
        self.decoded_bytes = math.prod(layout.shape) * layout.dtype.itemsize
        """Bytes of the whole array."""
        self._every = (0, layout.chunk_shape[0]) if layout.ndim else (0, 1)
        self._check, self._inodes = verify == "always", inodes
        self._token = os.urandom(16).hex()
        """Stands for what tells no version: nobody else, and no later run, takes it for the same."""
        self.memory = available_memory()
        self.beside(self.decoded_bytes)
        self._known: tuple[Folder, Shelf] | None = None

    @property
    def lane(self) -> str:
        return f"disk cache over {self.inner.lane}"

    def vouch(self, verify: Verify) -> str | None:
        """See the reader behind it."""
        return self.inner.vouch(verify)

    def version(self, chunk: Sequence[int]) -> Version | None:
        """See the reader behind it."""
        return self.inner.version(chunk)

    def look(self, chunk: Sequence[int], scratch: Scratch) -> None:
        """See the reader behind it."""
        self.inner.look(chunk, scratch)

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        folder, shelf = self._place()
        number, shape = self._number(chunk), tuple(stop - start for start, stop in self.layout.box(chunk))
        size = math.prod(shape) * self.layout.dtype.itemsize
        touch: Touch = "no" if few else self._touch
        while True:
            data = self._held(folder, shelf, number, chunk, size, scratch, touch)
            if data is not None:
                return data.view(self.layout.native).reshape(shape)
            if folder.begin(shelf, number):
                break
        try:
            data = self._held(folder, shelf, number, chunk, size, scratch, touch)  # another may have just ended
            if data is not None:
                return data.view(self.layout.native).reshape(shape)
            folder.miss(size)
            return self._fresh(folder, shelf, number, chunk, rows, shape, scratch, few=few)
        finally:
            folder.end(shelf, number)

    def _held(
        self,
        folder: Folder,
        shelf: Shelf,
        number: int,
        chunk: Sequence[int],
        size: int,
        scratch: Scratch,
        touch: Touch,
    ) -> Bytes | None:
        """What is kept of the source as it is now."""
        version = self._current(chunk, scratch) if folder.holds(shelf, number) else None
        if version is None:
            return None
        began = time.perf_counter()
        data = folder.get(shelf, number, self._mark(version), size, scratch, touch, check=self._check)
        scratch.seconds["read"] += time.perf_counter() - began
        scratch.bytes_read += 0 if data is None else size
        return data

    def _fresh(
        self,
        folder: Folder,
        shelf: Shelf,
        number: int,
        chunk: Sequence[int],
        rows: tuple[int, int],
        shape: tuple[int, ...],
        scratch: Scratch,
        *,
        few: bool,
    ) -> NDArray[Any] | None:
        """From the reader behind, and kept."""
        before = self.inner.version(chunk)
        whole = folder.off is None
        data = self.inner.read(chunk, self._every if whole else rows, scratch, few=few and not whole)
        if data is None or not whole:
            return data
        version = before or self.inner.version(chunk)
        cut = data[tuple(slice(0, length) for length in shape)]
        if version is not None and cut.shape == shape and cut.dtype.newbyteorder("=") == self.layout.native:
            began = time.perf_counter()
            folder.keep(shelf, number, self._mark(version), cut)
            scratch.seconds["read"] += time.perf_counter() - began
        return data

    def want(self, chunk: Sequence[int], rows: tuple[int, int]) -> Want | None:
        """What has to be fetched for these rows of a chunk that is elsewhere; None where it is kept."""
        assert self._far is not None
        folder, shelf = self._place()
        if not folder.holds(shelf, self._number(chunk)):
            return self._far.want(chunk, self._every if folder.off is None else rows)
        return self._far.glance(chunk) if self._far.version(chunk) is None else None

    def beside(self, total: int) -> None:
        """See `LocalReader.beside`."""
        beyond, large = total > self.memory, total > self.memory // 2
        self._touch: Touch = "pread" if beyond else "always" if large else "once"
        if isinstance(self.inner, LocalReader):
            self.inner.beside(total)

    def stored_bytes(self) -> int:
        """What the array takes where it is kept."""
        return self.decoded_bytes

    def advise(self, chunk: Sequence[int], rows: tuple[int, int], advice: int) -> int:
        """See `LocalReader.advise`, which is behind it: of a chunk that is kept on where it is kept."""
        folder, shelf = self._place()
        kept = folder.advise(shelf, self._number(chunk), advice)
        if kept is not None or not isinstance(self.inner, LocalReader):
            return kept or 0
        return self.inner.advise(chunk, self._every if folder.off is None else rows, advice)

    def _place(self) -> tuple[Folder, Shelf]:
        """The folder, and this array's places in it; after the stream was closed, once more."""
        folder, known = self._cache.open(), self._known
        if known is None or known[0] is not folder:
            known = self._known = folder, folder.shelf(self._array, math.prod(self._grid), self.decoded_bytes)
        return known

    def _number(self, chunk: Sequence[int]) -> int:
        number = 0
        for c, count in zip(chunk, self._grid, strict=True):
            number = number * count + c
        return number

    def _current(self, chunk: Sequence[int], scratch: Scratch) -> Version | None:
        """What the source of a chunk is now; asked where it is elsewhere and not known yet."""
        version = self.inner.version(chunk)
        if version is None:
            self.inner.look(chunk, scratch)
            version = self.inner.version(chunk)
        return version

    def _mark(self, version: Version) -> int:
        mark = version.mark if self._inodes else version.mark[:2]
        return _digest(*mark) if version.lasting else _digest(self._token, *mark)


def kept_reader(
    reader: ChunkReader, layout: ArrayLayout, *, cache: DiskCache, root: Path | None, address: str, verify: Verify
) -> ChunkReader:
    """The reader with the cache before it; itself where that would gain nothing, or its chunks are no files.

    `root`: the store's folder, if it is one; `address`: what it is called from run to run. Looks at mounts.
    """
    near = root is not None and is_local(root)
    if near and not decoded_whole(layout):
        return reader
    if (why := unaddressable(layout)) is not None:
        logger.info("array %s is not kept in the disk cache: %s", layout.name or ALONE, why)
        return reader
    vouched = verify != "never" and (root is None or os.path.lexists(root / layout.name / PLACE))
    return KeptReader(reader, layout, cache, address, verify=verify, inodes=near, vouched=vouched)


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
