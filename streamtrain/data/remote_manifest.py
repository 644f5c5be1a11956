"""The manifest of an array that is elsewhere: its header and table are read once, its records a page at a time.

Its law: as that of manifests; and an array that has none costs one request.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.fetch import REFUSALS, Fetcher, FetchFailed, Heading, differ
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ALONE, ArrayLayout
from streamtrain.data.manifest import HEADER, HINT, PAGE, PLACE, RECORD, Pages, digest_of, unaddressable
from streamtrain.data.trust import Trust, Verify
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import DataError, EnvironmentProblem

T = TypeVar("T")
logger = logging.getLogger(__name__)

SMALL = 1 << 20
"""A manifest up to this size is read whole at once."""
KEPT_PAGES = 256
"""Pages that are kept, 64 KiB each: those of the last million chunks."""

Fetch = Callable[[int, int], Bytes]
"""The bytes of the manifest from one to before another. Raises DataError or EnvironmentProblem."""


class RemoteManifest(Pages):
    """A manifest whose pages are fetched when a record of theirs is asked for. Thread-safe."""

    def __init__(self, url: str, head: Bytes, fetch: Fetch) -> None:
        """Raises DataError where it is damaged."""
        self.path = url
        self._fetch = fetch
        self._lock = threading.Lock()
        self._pages: OrderedDict[int, NDArray[np.void]] = OrderedDict()
        self.begin(head)
        if self.size > SMALL:
            self._tabled(fetch(HEADER, self.start))
            return
        rest = fetch(HEADER, self.size)
        self._tabled(rest[: self.start - HEADER])
        for page in range(len(self._table)):
            first, last = self._extent(page)
            self._pages[page] = self._sound_page(page, rest[first - HEADER : last - HEADER])

    def _extent(self, page: int) -> tuple[int, int]:
        size = PAGE * RECORD.itemsize
        return self.start + page * size, min(self.start + (page + 1) * size, self.size)

    def _page(self, page: int) -> NDArray[np.void]:
        with self._lock:
            known = self._pages.get(page)
            if known is None:
                known = self._sound_page(page, self._fetch(*self._extent(page)))
                self._pages[page] = known
                while len(self._pages) > KEPT_PAGES:
                    self._pages.popitem(last=False)
            self._pages.move_to_end(page)
            return known


class LateTrust:
    """What holds an array's chunks against its manifest, which is asked for when the first of them is. Thread-safe."""

    def __init__(self, layout: ArrayLayout, fetcher: Fetcher, loop: ZarrLoop, *, whole_files: bool = False) -> None:
        self._layout, self._fetcher, self._loop, self._whole_files = layout, fetcher, loop, whole_files
        self._lock = threading.Lock()
        self._verify: Verify = "never"
        self._trust: Trust | None = None
        self._known = True
        """Whether nobody need be asked."""
        self._head: Head | None = None
        """Its first bytes, if they were asked for already."""

    def set(self, verify: Verify) -> None:
        """Check so from now on."""
        with self._lock:
            self._verify, self._trust, self._head = verify, None, None
            self._known = verify == "never" or unaddressable(self._layout) is not None

    async def foretold(self) -> str | None:
        """What the manifest's first bytes say of all files; None where there is none, or they can't be had now, or
        nothing is to be checked. On the private loop; what was asked for is not asked for again."""
        if self._known:
            return None
        with contextlib.suppress(FetchFailed, ValueError):
            self._head = await _beginning(self._layout, self._fetcher)
        if self._head is None or self._head.data is None:
            return None
        header = Pages()
        header.path = self._fetcher.source.url(_key(self._layout))
        try:
            header.begin(self._head.data)
        except DataError:  # the first chunk says so
            return None
        return header.contents

    def get(self) -> Trust | None:
        """What is to be asked; None where there is no manifest, or nothing is to be checked. In a worker's thread.

        Raises as `open_manifest` does.
        """
        if self._known:
            return self._trust
        with self._lock:
            if not self._known:
                manifest = open_manifest(self._layout, self._fetcher, self._loop, self._head)
                if manifest is not None:
                    self._trust = Trust(self._layout, manifest, self._verify, whole_files=self._whole_files)
                self._known = True
            return self._trust


@dataclass(frozen=True, slots=True)
class Head:
    """How a manifest begins."""

    data: Bytes | None
    """None where there is no manifest."""
    version: str | None = None


def _key(layout: ArrayLayout) -> str:
    return f"{layout.name}/{PLACE}" if layout.name else PLACE


def _own(data: Bytes) -> Bytes:
    """A copy that is aligned, and keeps nothing else alive."""
    return np.array(data)


async def _part(fetcher: Fetcher, key: str, start: int, stop: int) -> Head:
    """Bytes of a manifest, and of which version of it they are."""
    versions: list[str | None] = []

    def headed(heading: Heading) -> None:
        versions.append(heading.version)
        if heading.length != stop - start:
            raise ValueError(f"it ends after {heading.length} of the bytes from {start} to {stop}")

    return Head(_own(await fetcher.fetch(key, (start, stop), headed)), versions[-1])


async def _beginning(layout: ArrayLayout, fetcher: Fetcher) -> Head:
    """The manifest's header, if there is a manifest, or the store lets nobody see one."""
    key = _key(layout)
    try:
        return await _part(fetcher, key, 0, HEADER)
    except FileNotFoundError:
        return Head(None)
    except FetchFailed as error:
        if not _refused(error):
            raise
        logger.info("array %s: %s: %s", layout.name or ALONE, fetcher.source.url(key), error)
        return Head(None)


def open_manifest(
    layout: ArrayLayout, fetcher: Fetcher, loop: ZarrLoop, head: Head | None = None
) -> RemoteManifest | None:
    """The manifest of this array; None where there is none. Blocks: in a worker's thread. `head`: if it is known.

    Raises DataError where it is damaged or belongs to other metadata, EnvironmentProblem where it can't be had.
    """
    key, prefix = _key(layout), f"{layout.name}/" if layout.name else ""
    url = fetcher.source.url(key)
    first = _had(url, loop, lambda: _beginning(layout, fetcher), fetcher.longest * 2) if head is None else head

    async def part(start: int, stop: int) -> Bytes:
        found = await _part(fetcher, key, start, stop)
        if differ(first.version, found.version):
            raise ValueError("it changed during the run")
        assert found.data is not None
        return found.data

    def fetch(start: int, stop: int) -> Bytes:
        return _had(url, loop, lambda: part(start, stop), fetcher.longest * 2)

    if first.data is None:
        if layout.manifest:
            name = layout.name or ALONE
            logger.warning("array %s: its manifest is gone (%s), so that damage may go unseen", name, url)
        return None
    manifest = RemoteManifest(url, first.data, fetch)
    text = _had(url, loop, lambda: _metadata(fetcher, prefix), fetcher.longest * 2)
    manifest.check_same(layout, digest_of(text))
    return manifest


async def _metadata(fetcher: Fetcher, prefix: str) -> bytes:
    """The array's own, in whichever format; a store may refuse to say that the other's are absent."""
    try:
        return (await fetcher.fetch(f"{prefix}zarr.json", None, _any)).tobytes()
    except (FileNotFoundError, FetchFailed) as error:
        if isinstance(error, FetchFailed) and not _refused(error):
            raise
        return (await fetcher.fetch(f"{prefix}.zarray", None, _any)).tobytes()


def _any(heading: Heading) -> None:
    """Any answer will do."""


def _refused(error: FetchFailed) -> bool:
    """Whether the store says no: many do, of names that begin with a dot, or of what is not there."""
    return isinstance(error.__cause__, PermissionError) or type(error.__cause__).__name__ in REFUSALS


def _had(url: str, loop: ZarrLoop, ask: Callable[[], Coroutine[Any, Any, T]], timeout: float) -> T:
    """What a coroutine on the private loop gives, its failures told as those of the manifest."""
    try:
        return loop.run(ask(), timeout)
    except FetchFailed as error:
        raise EnvironmentProblem(f"the manifest {url} can't be read: {error}", hint=error.hint) from error
    except TimeoutError as error:
        raise EnvironmentProblem(f"the manifest {url} was not read in time", hint="check the storage") from error
    except (ValueError, FileNotFoundError) as error:
        raise DataError(f"the manifest {url} is damaged: {error}", hint=HINT) from error
    except concurrent.futures.CancelledError as error:
        raise DataError(f"the reading of the manifest {url} was ended", hint="") from error
