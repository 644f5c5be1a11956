"""Chunks of one array out of objects that are elsewhere: where their bytes lie, and what is made of them.

Its law: a shard's index is read once and kept; an object that was there stays what it was, or that is an error. Bytes
that were fetched ahead are taken from the scratch; what is missing there is fetched on the spot, by the thread that
needs it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.decode import Decoder
from streamtrain.data.described import GONE, METADATA, said_by
from streamtrain.data.fetch import (
    DATED,
    LONGEST_PAUSE,
    Fetcher,
    FetchFailed,
    FetchStatistics,
    Heading,
    differ,
    tells,
)
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ABSENT, ArrayLayout, parse_shard_index
from streamtrain.data.readers import ENCODED_SLACK, INDEX_CACHE_BYTES
from streamtrain.data.reading import ChunkUnreadable, Scratch, Version, chunk_error, under
from streamtrain.data.remote_manifest import LateTrust
from streamtrain.data.trust import Verify
from streamtrain.data.zarr_lane import SERIALS, ZarrLoop

logger = logging.getLogger(__name__)

SEEN = 1 << 16
"""Of so many objects it is kept what they were."""
CONSOLIDATED = ("zarr.json", ".zmetadata")
"""At a store's root, objects that may describe its arrays where they don't themselves."""
GLANCE = (0, 0)
"""The part of a chunk that is wanted where only its object's version is."""
NOTHING: Bytes = np.empty(0, dtype=np.uint8)


Asking = Callable[[], None] | None
"""Called before each request, so that one made again counts as new."""


Sized = Callable[[int], None] | None
"""Told how many bytes come, before they do."""


class Want(NamedTuple):
    """A chunk that is wanted: all of it, or these bytes of an uncompressed one, or (GLANCE) word of its object."""

    reader: RemoteReader
    chunk: tuple[int, ...]
    part: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where encoded bytes lie."""

    key: str
    start: int
    stop: int | None
    """None: the whole object."""
    bound: int
    """Bytes that these are at most."""


class RemoteReader:
    """Chunks of one array, by requests for their bytes. Its coroutines run on the private loop."""

    def __init__(self, layout: ArrayLayout, fetcher: Fetcher, loop: ZarrLoop) -> None:
        assert layout.slow is None
        self.layout, self.fetcher, self.loop = layout, fetcher, loop
        self.lane = fetcher.source.lane
        self._decoder = Decoder(layout)
        self._indexes: OrderedDict[str, NDArray[np.uint64] | None] = OrderedDict()
        self._reading: dict[str, asyncio.Future[None]] = {}
        self._seen: dict[str, tuple[int | None, str | None]] = {}
        plain = layout.raw and not layout.codecs and layout.ndim and layout.axes[0] == 0
        self._row_bytes = layout.chunk_bytes // layout.chunk_shape[0] if plain else 0
        self._bound = layout.chunk_bytes + 4 * len(layout.codecs) if layout.raw else self._most
        self._index_bytes = 16 * math.prod(layout.inner) + 4
        self.late = LateTrust(layout, fetcher, loop)
        self._looking, self._looked = asyncio.Lock(), -math.inf
        self._said: object = None
        """What the array's metadata said when they were first asked for, and whether they say so still."""
        self._changed = False
        self._serial = next(SERIALS)
        self._said_dated = False

    def vouch(self, verify: Verify) -> str | None:
        """Hold chunks against the array's manifest, if it has one: that is asked for with the first chunk."""
        self.late.set(verify)
        return None

    def version(self, chunk: Sequence[int]) -> Version | None:
        """What the object of a chunk was when it was first seen in this run; None where it was not seen.

        Where its store tells no version, or one by which other bytes may go too, nobody else's is taken for the same.
        """
        seen = self._seen.get(self.layout.key(chunk))
        if seen is None:
            return None
        return Version(seen, True) if tells(seen[1]) else Version((*seen, self._serial), False)

    def glance(self, chunk: Sequence[int]) -> Want:
        """The least that tells what the object of a chunk is: a byte of it, or a shard's index."""
        return Want(self, tuple(chunk), GLANCE)

    def look(self, chunk: Sequence[int], scratch: Scratch) -> None:
        """See to it that its version is known, if it is there. Raises as `read` does."""
        want = self.glance(chunk)
        with self._naming(chunk):
            ahead = scratch.fetched.get(want)
            if ahead is not None:
                ahead()
            if self.version(chunk) is None:
                self._now(want, scratch)

    @contextlib.contextmanager
    def _naming(self, chunk: Sequence[int]) -> Iterator[None]:
        """Failures as errors that name the chunk."""
        try:
            yield
        except FetchFailed as error:
            damage = chunk_error(self.layout, chunk, self.url(chunk), error)
            raise ChunkUnreadable(damage.array, damage.chunk, str(damage), hint=error.hint) from error
        except ValueError as error:
            raise chunk_error(self.layout, chunk, self.url(chunk), error) from error

    @property
    def _most(self) -> int:
        return self.layout.chunk_bytes + self.layout.chunk_bytes // 8 + ENCODED_SLACK

    def want(self, chunk: Sequence[int], rows: tuple[int, int]) -> Want:
        """What has to be fetched for these rows (of the first axis) of a chunk; all of it where it is to be checked."""
        part, trust = None, self.late.get()
        due = trust is not None and trust.due(chunk)
        if self._row_bytes and not due and rows != (0, self.layout.chunk_shape[0]):
            part = (rows[0] * self._row_bytes, rows[1] * self._row_bytes)
        return Want(self, tuple(chunk), part)

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        """As `ChunkReader.read` says. Raises DataError, or EnvironmentProblem where the bytes can't be had."""
        layout, want, trust = self.layout, self.want(chunk, rows), self.late.get()
        began = time.perf_counter()
        with self._naming(chunk):
            ahead = scratch.fetched.get(want)
            if ahead is None and (all_of_it := want._replace(part=None)) in scratch.fetched:
                want = all_of_it  # it was still to be checked when it was asked for
                ahead = scratch.fetched[want]
            data = ahead() if ahead is not None else self._now(want, scratch)
            if data is None:
                if layout.complete:
                    raise ValueError("it is missing, and its writer left no chunk out")
                if trust is not None:
                    trust.check_absent(chunk)
                return None
            due = trust is not None and want.part is None and trust.due(chunk)
            if trust is not None and due:
                trust.check(chunk, data)
                scratch.checked += 1
            fetched = time.perf_counter()
            scratch.seconds["read"] += fetched - began
            scratch.bytes_read += len(data)
            if want.part is not None:
                whole = scratch.take("encoded", layout.chunk_bytes)
                whole[want.part[0] : want.part[1]] = data
                data = whole
            out = scratch.take("decoded", layout.chunk_bytes) if self._decoder.compressed else NOTHING
            decoded = self._decoder.view(self._decoder.decode(data, out))
            if trust is not None and due:
                trust.found_good(chunk)
            scratch.seconds["decode"] += time.perf_counter() - fetched
            return decoded

    def url(self, chunk: Sequence[int]) -> str:
        """What messages call the object that holds a chunk."""
        return self.fetcher.source.url(self.layout.key(chunk))

    def _now(self, want: Want, scratch: Scratch) -> Bytes | None:
        """In a worker's thread: fetch on the spot, into memory that the thread's scratch stands for."""
        name = scratch.reading[0] if scratch.reading is not None else ""

        def asking() -> None:  # a request made again is no hung read, nor is the pause before it
            scratch.reading = (name, time.monotonic() + 2 * LONGEST_PAUSE)

        try:
            return self.loop.run(self.fetch(want, asking), self.fetcher.longest * 2)
        except TimeoutError as error:
            raise FetchFailed("it was not read in time", "check the storage, or raise read_timeout") from error
        except concurrent.futures.CancelledError as error:
            raise ValueError("its reading was ended") from error

    async def fetch(self, want: Want, asking: Asking = None) -> Bytes | None:
        """The encoded bytes of one want; None where the chunk is absent."""
        if self.layout.shard_shape is not None:
            await self.read_index(self.layout.key(want.chunk), asking)
        place = self.place(want)
        if place is None:
            return None
        return await self.bytes_at(place.key, place.start, place.stop, asking=asking)

    def knows(self, key: str) -> bool:
        """Whether it is known where chunks lie in this object."""
        return self.layout.shard_shape is None or key in self._indexes

    def place(self, want: Want) -> Place | None:
        """Where a want's bytes lie, in an object that is known; None where the chunk is absent, or all is told.

        Raises ValueError where the index of its shard can't be right.
        """
        layout, key = self.layout, self.layout.key(want.chunk)
        first, last = want.part or (0, self._bound)
        if want.part == GLANCE:
            return Place(key, 0, 1, 1) if layout.shard_shape is None else None
        if layout.shard_shape is None:
            return Place(key, first, last if want.part else None, last - first)
        index = self._indexes[key]
        if index is None:
            return None
        start, size = (int(number) for number in index[layout.slot(want.chunk)])
        if start == ABSENT and size == ABSENT:
            return None
        self._check_extent(key, start, size)
        stop = start + (last if want.part else size)
        return Place(key, start + first, stop, stop - start - first)

    def _check_extent(self, key: str, start: int, size: int) -> None:
        layout, whole = self.layout, self._seen.get(key, (None, None))[0]
        if layout.raw and size != self._bound:
            raise ValueError(f"it has {size} bytes, expected {self._bound}")
        if size > self._most:
            raise ValueError(f"it has {size} encoded bytes, a chunk decodes to {layout.chunk_bytes}")
        if size == 0:
            raise ValueError("it is empty")
        if whole is not None and start + size > whole:
            raise ValueError(f"its shard ends at byte {whole}, the chunk at {start + size}")
        beyond = whole is not None and not layout.index_at_start and start + size > whole - self._index_bytes
        if beyond or (layout.index_at_start and start < self._index_bytes):
            raise ValueError(f"it would lie over the index of its shard, at bytes {start} to {start + size}")

    async def read_index(self, key: str, asking: Asking = None) -> None:
        """Have the index of a shard, read once however many ask."""
        while key not in self._indexes:
            other = self._reading.get(key)
            if other is not None:
                await asyncio.wait([other])
                continue
            self._reading[key] = mine = asyncio.get_running_loop().create_future()
            try:
                index = await self._index(key, asking)
            finally:
                del self._reading[key]
                mine.cancel()
            self._indexes[key] = index
            while len(self._indexes) > max(1, INDEX_CACHE_BYTES // self._index_bytes):
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(key)

    async def _index(self, key: str, asking: Asking) -> NDArray[np.uint64] | None:
        count = self._index_bytes

        def headed(heading: Heading) -> None:
            self._same(key, heading)
            if heading.length != count:
                raise ValueError(f"its shard has {heading.length} bytes, fewer than its index of {count}")

        try:
            data = await self.fetcher.fetch(key, (0, count) if self.layout.index_at_start else count, headed, asking)
        except FileNotFoundError:
            await self._check_absent(key, asking)
            return None
        return parse_shard_index(data.tobytes(), math.prod(self.layout.inner))

    async def bytes_at(
        self, key: str, start: int, stop: int | None, *, sized: Sized = None, asking: Asking = None
    ) -> Bytes | None:
        """Bytes of an object, to its end where `stop` is None; None if there is no object. `sized` is told how many.

        Raises ValueError where they can't be right, FetchFailed where they can't be had.
        """

        def headed(heading: Heading) -> None:
            self._same(key, heading)
            self._check_heading(heading, start, stop)
            if sized is not None:
                sized(heading.length)

        try:
            return await self.fetcher.fetch(key, None if stop is None else (start, stop), headed, asking)
        except FileNotFoundError:
            await self._check_absent(key, asking)
            return None

    def _check_heading(self, heading: Heading, start: int, stop: int | None) -> None:
        layout = self.layout
        if layout.shard_shape is None and layout.raw and heading.size not in (None, self._bound):
            raise ValueError(f"it has {heading.size} bytes, expected {self._bound}")
        if stop is not None and heading.length != stop - start:
            raise ValueError(f"it ends after {heading.length} of the {stop - start} bytes that belong to it")
        if stop is None and heading.length > self._most:
            raise ValueError(f"it has {heading.length} encoded bytes, a chunk decodes to {layout.chunk_bytes}")
        if heading.length == 0:
            raise ValueError("it is empty")

    def _same(self, key: str, heading: Heading) -> None:
        """Raise ValueError if an object is not what it was when first seen.

        Of a date alone it is said once: some servers date each answer, or disagree behind one address.
        """
        now = (heading.size, heading.version)
        known = self._seen.setdefault(key, now)
        if len(self._seen) > SEEN:
            self._seen.clear()
        if (None not in (known[0], now[0]) and known[0] != now[0]) or differ(known[1], now[1]):
            raise ValueError(f"it changed during the run: {_told(known)} before, {_told(now)} now")
        if known[1] != now[1] and not self._said_dated and _dated(known[1]) and _dated(now[1]):
            self._said_dated = True
            logger.warning(
                "%s may have changed during the run: %s before, %s now; nothing else tells its versions apart, and it "
                "is read all the same, as others are",
                self.fetcher.source.url(key),
                _told(known),
                _told(now),
            )

    async def _check_absent(self, key: str, asking: Asking) -> None:
        """Raise ValueError if what is not there was there before, or if the array itself is no longer what it was.

        That is asked for after the answer about the object, once for all that were answered before.
        """
        if key in self._seen:
            raise ValueError("it was there, and vanished during the run")
        since = time.monotonic()
        async with self._looking:
            if self._looked < since:
                began = time.monotonic()
                said = await self._description(asking)
                self._said = said if self._said is None else self._said
                self._looked, self._changed = began, said is None or said != self._said
        if self._changed:
            raise ValueError(f"it is not there, and the metadata of its array are gone or changed: {GONE}")

    async def _description(self, asking: Asking) -> object:
        """What the array's metadata say, or that others tell of it; None where nobody does."""
        stem = f"{self.layout.name}/" if self.layout.name else ""
        for key in (*(stem + file for file in METADATA), *CONSOLIDATED):
            with contextlib.suppress(FileNotFoundError):
                data = await self.fetcher.fetch(key, None, _nothing, asking)
                return said_by(data.tobytes()) if key not in CONSOLIDATED else "consolidated"
        return None


def _nothing(heading: Heading) -> None:
    """Takes whatever comes."""


def _dated(version: str | None) -> bool:
    return version is not None and version.startswith(DATED)


def _told(version: tuple[int | None, str | None]) -> str:
    said = "" if version[1] is None else f" {'' if _dated(version[1]) else 'of version '}{version[1]}"
    return f"{version[0]} bytes{said}"


def fetch_statistics(readers: Iterable[object]) -> FetchStatistics | None:
    """How the requests of these readers do, which share their account; None where none of them makes any."""
    far = (under(RemoteReader, reader) for reader in readers)
    return next((reader.fetcher.account.statistics() for reader in far if reader is not None), None)
