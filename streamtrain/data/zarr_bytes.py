"""Bytes of any zarr Store (in memory, zip, fsspec, ...) by its own `get`, with byte ranges.

Its law: a store is somebody else's code; it is asked on our private loop only, and what it raises is judged by what
Python's own errors mean.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from streamtrain.data.fetch import Heading, Range
from streamtrain.data.filters import Bytes

FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class StoreBytes:
    """The objects of one store."""

    lane = "store"

    def __init__(self, store: Store) -> None:
        self._store, self._prototype = store, default_buffer_prototype()

    async def get(self, key: str, wanted: Range, headed: Callable[[Heading], None]) -> Bytes:
        """As `ByteSource.get` says; how much it is is known with the bytes only."""
        request: ByteRequest | None = None
        if isinstance(wanted, tuple):
            request = RangeByteRequest(*wanted)
        elif wanted is not None:
            request = SuffixByteRequest(wanted)
        answer = await self._store.get(key, self._prototype, request)
        if answer is None:
            raise FileNotFoundError(key)
        data: Bytes = np.asarray(answer.as_numpy_array()).reshape(-1).view(np.uint8)
        headed(Heading(len(data), len(data) if wanted is None else None, None))
        return data

    def transient(self, error: Exception) -> bool:
        """Errors of the system, and what names itself a time-out, a lost connection, or a status of 5xx."""
        status = getattr(error, "status", None)
        named = any(word in type(error).__name__ for word in ("Timeout", "Connection", "Disconnected"))
        passing = isinstance(status, int) and (status >= 500 or status in (408, 425, 429))
        return named or passing or (isinstance(error, OSError) and not isinstance(error, FINAL))

    def url(self, key: str) -> str:
        """As `ByteSource.url` says."""
        return f"{str(self._store).rstrip('/')}/{key}"
