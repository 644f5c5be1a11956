"""Small files of an array, mapped side by side: its rows as one piece of memory, from which many chunks' are gathered
by one call.

Its law: what is not mapped is never touched; the memory is let go of with the last array that looks at it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_NONE, _FIXED = 0, 0x10
"""PROT_NONE and MAP_FIXED of Linux, which `mmap` does not name."""
_FAILED = ctypes.c_void_p(-1).value
MAPS = "/proc/sys/vm/max_map_count"
"""Where Linux says how many maps a process may have."""
SHARE = 4
"""Of all maps that the kernel allows a process, one in so many is ours."""


@cache
def most_maps() -> int:
    """Files that may be mapped in this way; 0 where the system does not say."""
    try:
        with open(MAPS, encoding="ascii") as file:
            return int(file.read()) // SHARE
    except (OSError, ValueError):
        return 0


class _Account:
    """The files for which all regions of this process have room."""

    def __init__(self) -> None:
        self._lock, self._taken = threading.RLock(), 0  # a finalizer may run while it is held

    def take(self, count: int) -> bool:
        """Whether so many more may be mapped."""
        with self._lock:
            if self._taken + count > most_maps():
                return False
            self._taken += count
            return True

    def give_back(self, count: int) -> None:
        """They are mapped no more."""
        with self._lock:
            self._taken -= count


_ACCOUNT = _Account()


def region_for(count: int, size: int) -> Region | None:
    """Room for so many files, if the kernel allows it beside all others that this process has."""
    if not _ACCOUNT.take(count):
        return None
    try:
        made = Region(count, size)
    except OSError:  # a limit of address space
        _ACCOUNT.give_back(count)
        return None
    made.at_end(partial(_ACCOUNT.give_back, count))
    return made


class Region:
    """Address space for `count` files of `size` bytes each, a multiple of a page's."""

    def __init__(self, count: int, size: int) -> None:
        """Raises OSError where there is no such room."""
        assert size % mmap.PAGESIZE == 0
        self.count, self.size = count, size
        self._address = _map(None, count * size, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        memory = (ctypes.c_ubyte * (count * size)).from_address(self._address)
        self._memory = weakref.ref(memory)
        weakref.finalize(memory, _libc().munmap, self._address, count * size).atexit = False
        self.data: Bytes = np.frombuffer(memoryview(memory), dtype=np.uint8)
        """All of it; to read where no file was mapped kills the process."""
        self.data.flags.writeable = False

    def at_end(self, call: Callable[[], None]) -> None:
        """Call this once the last array that looks at it is gone."""
        memory = self._memory()
        assert memory is not None
        weakref.finalize(memory, call).atexit = False

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
