"""Decoded chunks in memory: an LRU in bytes, single-flight, one for all streams that share a budget.

Its law: a chunk is decoded once for all who want it, and kept once, granted by the budget before; what is not granted
is not kept. It goes by its store, its array's metadata and what its source was: of a file that changed, what was kept
is not given. A stream brings its part of the capacity, and takes it along when it closes; the last one leaves nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.budget import Budget, Share

Load = Callable[[], NDArray[Any] | None]
VersionOf = Callable[[], Hashable]
"""What the source of a chunk is now; None where that is not known (yet): what is kept of a known one is not given."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """How the cache of decoded chunks does."""

    hits: int
    """Chunks that this stream found there; another stream of the same budget may have decoded them."""
    misses: int
    """Chunks that this stream decoded. Many beside many evictions: the cache is too small for what is read again."""
    evictions: int
    """Chunks given up for others, by all streams of the budget."""
    bytes: int
    """Of all that is kept, each chunk once, whoever decoded it."""
    capacity: int
    """Of this stream's part, which the others use too."""


class _Entry(NamedTuple):
    version: Hashable
    array: NDArray[Any]


class _Shared:
    """What the streams of one budget keep together."""

    def __init__(self, budget: Budget) -> None:
        self.share = budget.join()
        self.share.active, self.share.keeps = False, True
        self.lock = threading.Lock()
        self.kept: OrderedDict[Hashable, _Entry] = OrderedDict()
        self.loading: dict[Hashable, threading.Event] = {}
        self.capacity = self.bytes = self.evictions = 0
        self.left: deque[int] = deque()
        """Parts of the capacity that streams took along which nobody closed."""

    def find(self, key: Hashable, version: Hashable) -> NDArray[Any] | None:
        """What is kept of this version. Under the lock."""
        entry = self.kept.get(key)
        if entry is None:
            return None
        if version != entry.version:
            if version is not None:
                self._drop(key)
            return None
        self.kept.move_to_end(key)
        return entry.array

    def keep(self, key: Hashable, version: Hashable, array: NDArray[Any]) -> None:
        """Keep a copy, in place of what was used least recently."""
        with self.lock:
            self.fit(array.nbytes)
            if array.nbytes > self.capacity:
                return
            while self.share.free < array.nbytes or not self.share.try_acquire(array.nbytes):
                if not self.kept:  # and nobody is asked to give something up for it
                    return
                self._evict()
            if key in self.kept:
                self._drop(key)
            self.kept[key] = _Entry(version, np.array(array))
            self.bytes += array.nbytes

    def fit(self, more: int = 0) -> None:
        """Give up what is too much beside `more` bytes. Under the lock."""
        while self.left:
            self.capacity -= self.left.popleft()
        while self.kept and self.bytes + more > self.capacity:
            self._evict()

    def _evict(self) -> None:
        self.evictions += 1
        self._drop(next(iter(self.kept)))

    def _drop(self, key: Hashable) -> None:
        size = self.kept.pop(key).array.nbytes
        self.bytes -= size
        self.share.release(size)

    def __del__(self) -> None:
        self.share.release_from_finalizer(self.bytes)


_MAKING = threading.Lock()


def _shared(budget: Budget) -> _Shared:
    """The one of this budget, which lives as long as a stream has a part in it."""
    with _MAKING:
        found = budget.cache() if budget.cache is not None else None
        if not isinstance(found, _Shared):
            found = _Shared(budget)
            budget.cache = weakref.ref(found)
        return found


def _no_version() -> None:
    return None


class ChunkCache:
    """One stream's part. `get(key, load)`: the kept array, or what `load()` gives; those who want one key load it
    once."""

    def __init__(self, capacity: int, share: Share) -> None:
        """At most `capacity` bytes are kept (and those of the budget's other streams), each granted before."""
        self.capacity = capacity
        self._shared = _shared(share.budget)
        self._joined = False
        self._hits = self._misses = 0

    def get(self, key: Hashable, load: Load, version: VersionOf = _no_version) -> NDArray[Any] | None:
        """The array of this key and version; `load` may return None (absent), which is not kept."""
        shared, mine = self._shared, threading.Event()
        while True:
            now = version()
            with shared.lock:
                self._join()
                if shared.left:
                    shared.fit()
                found = shared.find(key, now)
                if found is not None:
                    self._hits += 1
                    return found
                other = shared.loading.get(key)
                if other is None:
                    shared.loading[key] = mine
                    self._misses += 1
                    break
            other.wait()
        try:
            loaded = load()
            if loaded is not None and loaded.nbytes <= shared.capacity:
                shared.keep(key, version() if now is None else now, loaded)
            return loaded
        finally:
            with shared.lock:
                del shared.loading[key]
            mine.set()

    def __contains__(self, key: Hashable) -> bool:
        """Whether it is kept now, of whatever version."""
        with self._shared.lock:
            return key in self._shared.kept

    def _join(self) -> None:
        if not self._joined:
            self._joined = True
            self._shared.capacity += self.capacity

    def close(self) -> None:
        """Take this part away; a later `get` brings it again."""
        with self._shared.lock:
            if self._joined:
                self._joined = False
                self._shared.capacity -= self.capacity
            self._shared.fit()

    def __del__(self) -> None:
        if self._joined:
            self._shared.left.append(self.capacity)

    def statistics(self) -> CacheStatistics:
        """How it does now."""
        shared = self._shared
        return CacheStatistics(self._hits, self._misses, shared.evictions, shared.bytes, self.capacity)
