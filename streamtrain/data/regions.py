"""Small files of an array, mapped side by side: its rows as one piece of memory, from which many chunks' are gathered
by one call.

Its law: what is not mapped is never touched; the memory is let go of with the last array that looks at it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_NONE, _FIXED, _NORESERVE = 0, 0x10, 0x4000
"""PROT_NONE, MAP_FIXED and MAP_NORESERVE of Linux, which `mmap` does not name."""
_FAILED = ctypes.c_void_p(-1).value
MAPS = "/proc/sys/vm/max_map_count"
SHARE = 4
"""Of all maps that the kernel allows a process, one in so many is ours."""


@cache
def most_maps() -> int:
    """Files that may be mapped in this way; 0 where the system does not say."""
    try:
        with open(MAPS) as file:
            return int(file.read()) // SHARE
    except (OSError, ValueError):
        return 0


class Region:
    """Address space for `count` files of `size` bytes each, a multiple of a page's."""

    def __init__(self, count: int, size: int) -> None:
        """Raises OSError where there is no such room."""
        assert size % mmap.PAGESIZE == 0
        self.count, self.size = count, size
        self._address = _map(None, count * size, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1)
        memory = (ctypes.c_ubyte * (count * size)).from_address(self._address)
        weakref.finalize(memory, _libc().munmap, self._address, count * size).atexit = False
        self.data: Bytes = np.frombuffer(memoryview(memory), dtype=np.uint8)
        """All of it; to read where no file was mapped kills the process."""
        self.data.flags.writeable = False

    def place(self, number: int, fd: int) -> Bytes:
        """Map a file of `size` bytes to its place; its bytes. Raises OSError."""
        flags = mmap.MAP_SHARED | _FIXED
        _map(self._address + number * self.size, self.size, mmap.PROT_READ, flags, fd)
        return self.data[number * self.size : (number + 1) * self.size]

    def advise(self, number: int, advice: int, start: int, size: int) -> None:
        """`madvise` on a part of a file, from a page's beginning on. Raises OSError."""
        if _libc().madvise(self._address + number * self.size + start, size, advice):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = (pointer, size, number, number, number, ctypes.c_longlong), pointer
    libc.munmap.argtypes, libc.munmap.restype = (pointer, size), number
    libc.madvise.argtypes, libc.madvise.restype = (pointer, size, number), number
    return libc


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    found = _libc().mmap(address, size, protection, flags, fd, 0)
    if found == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(found)
