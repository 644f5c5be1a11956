"""What is on its way from a store elsewhere: for which jobs, in which request, and the bytes granted for it.

Its law: a chunk that several jobs want comes once; the bytes of a request are granted, and given back, together.
"""

from __future__ import annotations

import threading

from streamtrain.data.budget import Share
from streamtrain.data.filters import Bytes
from streamtrain.data.remote import RemoteReader, Want
from streamtrain.data.spans import BUDGET_SHARE
from streamtrain.data.workers import Job


class Parcel:
    """A want on its way, and how many jobs wait for it."""

    __slots__ = ("begun", "data", "error", "haul", "jobs", "there", "users")

    def __init__(self) -> None:
        self.begun = self.there = False
        """Whether its answer has begun to come, and whether it has come whole."""
        self.data: Bytes | None = None
        self.error: Exception | None = None
        self.haul: Haul | None = None
        self.jobs: list[Order] = []
        self.users = 0

    def take(self) -> Bytes | None:
        """What came, in a worker's thread."""
        if self.error is not None:
            raise self.error
        return self.data


class Haul:
    """What one request has brought: its bytes are granted, and given back, together."""

    __slots__ = ("granted", "left")

    def __init__(self, granted: int, parcels: int) -> None:
        self.granted, self.left = granted, parcels


class Order:
    """A job, and what it still waits for."""

    __slots__ = ("job", "parcels", "waiting")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.parcels: dict[Want, Parcel] = {}
        self.waiting = 0


class Group:
    """What is wanted of one object by one unit."""

    __slots__ = ("key", "reader", "unit", "wants")

    def __init__(self, reader: RemoteReader, key: str, unit: int) -> None:
        self.reader, self.key, self.unit = reader, key, unit
        self.wants: list[Want] = []


Request = tuple[RemoteReader, str, int, "int | None", int, tuple[tuple[int, int, Want], ...]]
"""Reader, key, start, stop (None: the whole object), bytes at most, and whose bytes these are."""


class Grants:
    """Bytes granted to what was fetched ahead. Thread-safe; after `close` all are given back, and none granted."""

    def __init__(self, share: Share) -> None:
        self._share, self._lock, self._closed = share, threading.Lock(), False
        self.bytes = 0

    def acquire(self, size: int) -> bool:
        """Grant so many, out of the part of the memory that read-ahead may take."""
        with self._lock:
            if self._closed or (self.bytes and self.bytes + size > self._share.total // BUDGET_SHARE):
                return False
            if not self._share.try_acquire(size):
                return False
            self.bytes += size
            return True

    def release(self, size: int) -> None:
        """Give so many back."""
        with self._lock:
            if not self._closed:
                self.bytes -= size
                self._share.release(size)

    def close(self, *, finalizing: bool = False) -> None:
        """Give all back; `finalizing` where no lock may be taken."""
        if finalizing:
            if not self._closed:
                self._closed = True
                self._share.release_from_finalizer(self.bytes)
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._share.release(self.bytes)
