"""Decoded chunks that several cells share: an LRU in bytes, single-flight. What is not granted is not kept.

Used where an array's compressed chunks reach over more than one cell, so that each is decoded once per residence.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.budget import Share


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """How a cache does."""

    hits: int
    misses: int
    """Many misses beside many evictions: the cache is too small for what is read again."""
    evictions: int
    bytes: int
    capacity: int


class ChunkCache:
    """`get(key, load)`: the kept array, or what `load()` gives; concurrent callers of one key load it once."""

    def __init__(self, capacity: int, share: Share) -> None:
        """At most `capacity` bytes are kept, each granted by the share before."""
        self.capacity = capacity
        self._share = share
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, NDArray[Any]] = OrderedDict()
        self._loading: dict[Hashable, threading.Event] = {}
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, key: Hashable, load: Callable[[], NDArray[Any] | None]) -> NDArray[Any] | None:
        """The array of this key; `load` may return None (absent), which is not kept."""
        mine = threading.Event()
        while True:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    self._hits += 1
                    return self._kept[key]
                other = self._loading.get(key)
                if other is None:
                    self._loading[key] = mine
                    self._misses += 1
                    break
            other.wait()
        try:
            loaded = load()
            if loaded is not None and loaded.nbytes <= self.capacity:
                self._keep(key, loaded)
            return loaded
        finally:
            with self._lock:
                del self._loading[key]
            mine.set()

    def __contains__(self, key: Hashable) -> bool:
        """Whether it is kept now."""
        with self._lock:
            return key in self._kept

    def _keep(self, key: Hashable, array: NDArray[Any]) -> None:
        """Keep a copy, in place of what was used least recently."""
        with self._lock:
            while self._kept and self._bytes + array.nbytes > self.capacity:
                self._evict()
            while not self._share.try_acquire(array.nbytes):
                if not self._kept:
                    return
                self._evict()
            self._kept[key] = np.array(array)
            self._bytes += array.nbytes

    def _evict(self) -> None:
        _, evicted = self._kept.popitem(last=False)
        self._bytes -= evicted.nbytes
        self._share.release(evicted.nbytes)
        self._evictions += 1

    def clear(self) -> None:
        """Forget all that is kept."""
        with self._lock:
            self._kept.clear()
            self._share.release(self._bytes)
            self._bytes = 0

    def __del__(self) -> None:
        self._share.release_from_finalizer(self._bytes)

    def statistics(self) -> CacheStatistics:
        """How the cache does now."""
        with self._lock:
            return CacheStatistics(self._hits, self._misses, self._evictions, self._bytes, self.capacity)
