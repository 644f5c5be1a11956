"""What a stream's data are known by again: manifests, and where there is none the beginnings of a few files.

Its law: it costs a round trip and a few reads, however large the data and however many the stores, and is no reason
not to open: what can't be had soon is not known. Bytes that are copied are the same; times and ETags are not looked at.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from streamtrain.data.contents import SAMPLED, joined
from streamtrain.data.fetch import Fetcher, Heading
from streamtrain.data.files import StoreFiles
from streamtrain.data.layout import ALONE
from streamtrain.data.manifest import unaddressable
from streamtrain.data.opening import Located, OpenArray
from streamtrain.data.reading import under
from streamtrain.data.remote import RemoteReader
from streamtrain.data.remote_zarr import RemoteZarrReader

logger = logging.getLogger(__name__)

LOOKS = 64
"""Files that are looked at, of all arrays together, but one of each at least; and manifests at the same time."""
OF_ONE = 8
"""Of one array, in all its stores together."""
BEGINNING = 16 << 10
"""Bytes of each, from its beginning."""
SECONDS = 1.0
"""For all that is asked for elsewhere; a quarter of `read_timeout`, if that is less."""

Look = Callable[[str], Awaitable[bytes | None]]
"""The beginning of a file; None where there is none. Raises what tells that it can't be had."""


@dataclass(frozen=True, slots=True)
class Held:
    """The arrays of a batch in one store, in their order, and what the manifests at hand say of each."""

    where: Located
    arrays: Sequence[OpenArray]
    manifests: Sequence[str | None]


async def known_by(stores: Sequence[Held], seconds: float = SECONDS) -> list[list[str | None]]:
    """What a position says of each array, in each store, as `contents.told` takes it. On the private loop.

    Manifests of stores elsewhere are asked for here. `seconds`: the most that all of it may take.
    """
    found = [list(each) for each in zip(*(held.manifests for held in stores), strict=True)]
    try:
        async with asyncio.timeout(seconds):
            far = [(at, n) for at, held in enumerate(stores) for n, array in enumerate(held.arrays) if _late(array)]
            few = asyncio.Semaphore(LOOKS)
            told = await asyncio.gather(*(_foretold(stores[at].arrays[number], few) for at, number in far))
            for (at, number), text in zip(far, told, strict=True):
                found[number][at] = text
            without = [number for number, each in enumerate(found) if None in each]
            most = max(1, min(OF_ONE, LOOKS // max(1, len(without))))
            looking = [_look_into(held.where, seconds) for held in stores]
            made = await asyncio.gather(
                *(_sample([held.arrays[number] for held in stores], looking, most) for number in without)
            )
            for number, text in zip(without, made, strict=True):
                found[number] = [text]
    except TimeoutError:
        name = stores[0].where.name
        logger.info("%s: no beginnings of its files came within %g s: changed values may go unnoticed", name, seconds)
    return found


def _late(array: OpenArray) -> bool:
    """Whether its manifest is elsewhere."""
    return any(under(kind, array.reader) is not None for kind in (RemoteReader, RemoteZarrReader))


async def _foretold(array: OpenArray, few: asyncio.Semaphore) -> str | None:
    """What the manifests of an array, and of those beside it, say of all their files."""
    found = []
    for each in (array, *array.beside):
        reader = under(RemoteReader, each.reader) or under(RemoteZarrReader, each.reader)
        async with few:
            found.append(None if reader is None else await reader.late.foretold())
    return joined(found)


async def _sample(arrays: Sequence[OpenArray], looking: Sequence[Look], most: int) -> str | None:
    """A digest of the beginnings of some of an array's files, spread over all of its stores; None where that can't be
    told."""
    parts = [(each, look) for array, look in zip(arrays, looking, strict=True) for each in (array, *array.beside)]
    if any(unaddressable(each.layout) is not None for each, _ in parts):
        return None
    encoded, begun = hashlib.sha256(), hashlib.sha256()
    for each, _ in parts:
        encoded.update(hashlib.sha256(each.metadata.encode()).digest())
    for start in await asyncio.gather(*(look(key) for key, look in _spread(parts, most)), return_exceptions=True):
        if isinstance(start, BaseException):
            name = arrays[0].layout.name or ALONE
            logger.info("array %s: changed values may go unnoticed when a run is resumed: %s", name, start)
            return None
        begun.update(b"-" if start is None else hashlib.sha256(start).digest())
    return f"{SAMPLED}{encoded.hexdigest()[:7]}-{begun.hexdigest()[:8]}"


def _spread(parts: Sequence[tuple[OpenArray, Look]], most: int) -> list[tuple[str, Look]]:
    """Keys of at most so many of the parts' files, the first and the last among them."""
    total = sum(each.layout.num_files for each, _ in parts)
    count = min(most, total)
    numbers = sorted({n * (total - 1) // max(1, count - 1) for n in range(count)})
    keys, before = [], 0
    for each, look in parts:
        files = each.layout.num_files
        keys += [(each.layout.file_key(n - before), look) for n in numbers if before <= n < before + files]
        before += files
    return keys


def _look_into(where: Located, seconds: float) -> Look:
    source = where.source
    if source is None:
        assert where.root is not None
        return _local(StoreFiles(where.root))
    fetcher = Fetcher(source, retries=0, timeout=seconds)

    async def look(key: str) -> bytes | None:
        try:
            data = await fetcher.fetch(key, (0, BEGINNING), _any)
        except FileNotFoundError:
            return None
        return data.tobytes()

    return look


def _local(files: StoreFiles) -> Look:
    async def look(key: str) -> bytes | None:
        await asyncio.sleep(0)  # a disk of a network may be slow: the time is looked at between two files
        try:
            fd, _ = files.open(key)
        except FileNotFoundError:
            return None
        try:
            return os.pread(fd, BEGINNING, 0)
        finally:
            os.close(fd)

    return look


def _any(heading: Heading) -> None:
    """Any answer will do."""
