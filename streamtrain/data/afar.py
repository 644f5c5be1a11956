"""A look at objects that are elsewhere: is each there, and is it what its manifest says?

Its law: an object is read in slices, so that a look takes the same memory however large it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from streamtrain.data.fetch import Fetcher, FetchFailed, Heading
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ABSENT, ArrayLayout
from streamtrain.data.manifest import NOTHING, Pages, Record, describe, doubly, first_chunk
from streamtrain.data.reading import chunk_error, file_damage
from streamtrain.data.spans import SPAN_BYTES
from streamtrain.data.trust import check_same
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import EnvironmentProblem


class Objects:
    """The objects of one array. Thread-safe."""

    def __init__(self, layout: ArrayLayout, fetcher: Fetcher, loop: ZarrLoop) -> None:
        self.layout, self._fetcher, self._loop = layout, fetcher, loop

    def damages(self, manifest: Pages, number: int) -> tuple[int, list[str]]:
        """Bytes of the object of this number (-1: it is not there), and what is wrong with it.

        Raises EnvironmentProblem where it can't be had, DataError where that part of the manifest is damaged.
        """
        chunk, record = first_chunk(self.layout, number), manifest.file(number)
        key = self.layout.key(chunk)
        url = self._fetcher.source.url(key)
        try:
            found = self._described(key, record)
            if found is None:
                if record.size != ABSENT:
                    raise ValueError(f"it is missing; its manifest says {record.size} bytes")
                return -1, []
            check_same(record, found.size, lambda: found)
            return found.size, []
        except ValueError as error:
            return 0, [file_damage(self.layout, chunk, url, error)]
        except FetchFailed as error:
            raise EnvironmentProblem(str(chunk_error(self.layout, chunk, url, error)), hint=error.hint) from error

    def _described(self, key: str, record: Record) -> Record | None:
        """What the object is now; None where there is none."""
        both, found = doubly(self.layout, files=True), NOTHING
        if record.size in (ABSENT, 0):
            data = self._part(key, None, None)
            return None if data is None else describe(data, both=both)
        for start, stop in _slices(record.size):
            data = self._part(key, (start, stop), record.size)
            if data is None:
                return None
            found = describe(data, both=both, before=found)
        return found

    def _part(self, key: str, wanted: tuple[int, int] | None, size: int | None) -> Bytes | None:
        def headed(heading: Heading) -> None:
            if wanted is not None and heading.size not in (None, size):
                raise ValueError(f"it has {heading.size} bytes, its manifest says {size}")
            if wanted is not None and heading.length != wanted[1] - wanted[0]:
                raise ValueError(f"it ends at byte {wanted[0] + heading.length}, its manifest says {size} bytes")

        async def fetch() -> Bytes | None:
            try:
                return await self._fetcher.fetch(key, wanted, headed)
            except FileNotFoundError:
                return None

        return self._loop.run(fetch(), self._fetcher.longest * 2)


def _slices(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, SPAN_BYTES):
        yield start, min(start + SPAN_BYTES, size)
