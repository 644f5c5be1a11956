"""Chunks that only zarr's own API can read, of a store elsewhere: each object is held against the manifest before.

Its law: zarr fetches for itself, so that an object that is to be checked comes twice, once while the stream lives.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from streamtrain.data.fetch import Fetcher, FetchFailed
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ArrayLayout
from streamtrain.data.reading import ChunkUnreadable, Scratch, chunk_error
from streamtrain.data.remote_manifest import LateTrust
from streamtrain.data.trust import Trust, Verify
from streamtrain.data.zarr_lane import ZarrLoop, ZarrReader


class RemoteZarrReader(ZarrReader):
    """zarr's own API, over a store elsewhere."""

    def __init__(self, layout: ArrayLayout, array: Any, loop: ZarrLoop, fetcher: Fetcher, *, timeout: float) -> None:
        super().__init__(layout, array, loop, timeout=timeout)
        self._fetcher = fetcher
        self.late = LateTrust(layout, fetcher, loop, whole_files=True)

    def vouch(self, verify: Verify) -> str | None:
        """Hold objects against the array's manifest, if it has one: that is asked for with the first chunk."""
        self.late.set(verify)
        return None

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        """As `ChunkReader.read` says."""
        self._trust = self.late.get()
        return super().read(chunk, rows, scratch, few=few)

    def _check(self, trust: Trust, chunk: Sequence[int], scratch: Scratch) -> None:
        """Hold the object of this chunk against the manifest: what is in it, zarr alone knows."""
        key = self._key(chunk)
        url = self._fetcher.source.url(key)
        try:
            fitting = trust.size_check(chunk)  # in this thread: the manifest's page may have to be fetched by the loop
            data = self._loop.run(self._object(key, fitting), self._fetcher.longest * 2)
            if data is None:
                trust.check_absent(chunk)
                return
            trust.check(chunk, data)
            trust.found_good(chunk)
            scratch.checked += 1
        except FetchFailed as error:
            damage = chunk_error(self.layout, chunk, url, error)
            raise ChunkUnreadable(damage.array, damage.chunk, str(damage), hint=error.hint) from error
        except (ValueError, TimeoutError, concurrent.futures.CancelledError) as error:
            raise chunk_error(self.layout, chunk, url, str(error) or "it was not read in time") from error

    async def _object(self, key: str, fitting: Callable[[int], None]) -> Bytes | None:
        """All of it, if its size is fitting; None where it is absent."""
        try:
            return await self._fetcher.fetch(key, None, lambda heading: fitting(heading.length))
        except FileNotFoundError:
            return None
