"""Bytes held against the manifest of their array: once for each chunk, each time, or never.

Its law: what the manifest does not vouch for is an error with its cause, and a chunk that was found good is not looked
at again (`once`): what changes later is noticed by sizes and times. The checksum runs at 10 to 19 GB/s where gathering
runs at 3.5, so that only the first pass of a stream pays; what was checked is kept as a bit a chunk.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from streamtrain.data.layout import ABSENT, ArrayLayout
from streamtrain.data.manifest import (
    PLACE,
    Bytes,
    Manifest,
    Pages,
    Record,
    describe,
    doubly,
    file_grid,
    inner_slots,
    unaddressable,
)

logger = logging.getLogger(__name__)

Verify = Literal["once", "always", "never"]
BITS = 1 << 15
"""Bits are kept in pages of so many chunks, made when the first of them is checked."""


def trust_in(root: Path, layout: ArrayLayout, verify: Verify, *, whole_files: bool = False) -> Trust | None:
    """What holds this array's chunks against its manifest; None where there is none, or nothing is to be checked.

    `whole_files`: shards are checked whole, whichever chunk of them is asked for.
    Reads the manifest's header; raises DataError where it is damaged or belongs to other metadata.
    """
    folder = root / layout.name
    if verify == "never" or unaddressable(layout) is not None:
        return None
    if not os.path.lexists(folder / PLACE):
        if layout.manifest:
            logger.warning("array %s: its manifest is gone (%s), so that damage may go unseen", layout.name, folder)
        return None
    manifest = Manifest(folder / PLACE)
    manifest.check_fits(layout, folder)
    return Trust(layout, manifest, verify, whole_files=whole_files)


class Trust:
    """Checks chunks of one array. Thread-safe: a bit that two threads set at once costs one more check."""

    def __init__(self, layout: ArrayLayout, manifest: Pages, verify: Verify, *, whole_files: bool = False) -> None:
        self.manifest = manifest
        self._always = verify == "always"
        self._slots = 0 if whole_files else inner_slots(layout)
        self.both = doubly(layout, files=not self._slots)
        self._inner = layout.inner
        self._grid, self._in_grid = _strides(file_grid(layout)), _strides(layout.inner)
        self._checked: dict[int, bytearray] = {}

    def _place(self, chunk: Sequence[int]) -> tuple[int, int]:
        """Number of the file, and slot in it."""
        number = slot = 0
        for c, per, over_files, over_slots in zip(chunk, self._inner, self._grid, self._in_grid, strict=True):
            if per == 1:
                number += c * over_files
            else:
                number += c // per * over_files
                slot += c % per * over_slots
        return number, slot

    def _bit(self, chunk: Sequence[int]) -> tuple[int, int]:
        number, slot = self._place(chunk)
        return divmod(number * self._slots + slot if self._slots else number, BITS)

    def due(self, chunk: Sequence[int]) -> bool:
        """Whether this chunk is still to be checked."""
        if self._always:
            return True
        page, bit = self._bit(chunk)
        bits = self._checked.get(page)
        return bits is None or not bits[bit >> 3] & 1 << (bit & 7)

    def _record(self, chunk: Sequence[int]) -> Record:
        number, slot = self._place(chunk)
        return self.manifest.slot(number, slot) if self._slots else self.manifest.file(number)

    def check(self, chunk: Sequence[int], data: Bytes) -> None:
        """Raise ValueError with the cause if these are not the chunk's bytes (where shards are unknown: its file's)."""
        self.check_record(chunk, len(data), lambda: describe(data, both=self.both))

    def size_check(self, chunk: Sequence[int]) -> Callable[[int], None]:
        """What raises ValueError for bytes of a size that the chunk has not; it asks the manifest nothing any more."""
        return partial(_check_size, self._record(chunk))

    def check_record(self, chunk: Sequence[int], size: int, look: Callable[[], Record]) -> None:
        """The same where the bytes are not at hand; `look` is called if the size is right."""
        check_same(self._record(chunk), size, look)

    def found_good(self, chunk: Sequence[int]) -> None:
        """It was checked and decoded: not before, for a manifest may vouch for bytes that were damaged already."""
        page, bit = self._bit(chunk)
        self._checked.setdefault(page, bytearray(BITS // 8))[bit >> 3] |= 1 << (bit & 7)

    def check_absent(self, chunk: Sequence[int]) -> None:
        """Raise ValueError if this chunk, which is not there, was written."""
        record = self._record(chunk)
        if record.size != ABSENT:
            raise ValueError(f"it is missing; its manifest says {record.size} bytes")


def check_same(record: Record, size: int, look: Callable[[], Record]) -> None:
    """Raise ValueError with the cause if what is there is not what was written."""
    _check_size(record, size)
    found = look()
    if found.crc32c != record.crc32c:
        raise ValueError(f"its checksum (crc32c) is {found.crc32c:08x}, its manifest says {record.crc32c:08x}")
    if found.crc32 != record.crc32:
        raise ValueError(f"its checksum (crc32) is {found.crc32:08x}, its manifest says {record.crc32:08x}")


def _check_size(record: Record, size: int) -> None:
    if record.size == ABSENT:
        raise ValueError("its manifest says that it was never written")
    if size != record.size:
        raise ValueError(f"it has {size} bytes, its manifest says {record.size}")


def _strides(grid: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(grid[axis + 1 :]) for axis in range(len(grid)))
