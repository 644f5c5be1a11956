"""What a job will read, known before it runs: of arrays that are elsewhere, and of those too large to stay in memory.

Its law: `Feed.fill` itself is asked, over a reader that reads nothing, so that what is fetched ahead and what is read
never differ, however rows come to lie in chunks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from streamtrain.data.feed import Box, Feed, Part, Rows
from streamtrain.data.kept_chunks import KeptReader
from streamtrain.data.reading import Scratch, Version, under
from streamtrain.data.remote import RemoteReader, Want
from streamtrain.data.trust import Verify


class Noted(NamedTuple):
    """A read that will be made; what `ChunkReader.read` will be asked for."""

    chunk: tuple[int, ...]
    rows: tuple[int, int]
    few: bool


class _Noting:
    """A reader that reads nothing and notes what it is asked for."""

    lane = "none"

    def __init__(self) -> None:
        self.reads: list[Noted] = []

    def vouch(self, verify: Verify) -> str | None:
        """There is nothing to be checked."""
        return None

    def version(self, chunk: Sequence[int]) -> Version | None:
        """Nothing is known of it."""
        return None

    def look(self, chunk: Sequence[int], scratch: Scratch) -> None:
        """Nobody is asked."""

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        self.reads.append(Noted(tuple(chunk), rows, few))
        return None


def reads_of(feed: Feed, box: Box, rows: Rows) -> list[tuple[Feed, Noted]]:
    """The reads that `feed.fill` will make for these rows of a cell, each with the feed (itself, or one beside it) that
    makes it; none of chunks that are kept decoded already."""
    return [(each, read) for each, read in _noted(feed, box, rows) if not each.keeps(read.chunk)]


def _noted(feed: Feed, box: Box, rows: Rows) -> list[tuple[Feed, Noted]]:
    """The same with the chunks that are kept."""
    noted: list[tuple[Feed, _Noting]] = []
    _dry(feed, noted).fill(box, rows, _nowhere, Scratch())
    return [(each, read) for each, noting in noted for read in noting.reads]


def _dry(feed: Feed, noted: list[tuple[Feed, _Noting]]) -> Feed:
    """The feed, and those beside it, over readers that note; it puts nothing together, and changes nothing."""
    dry, noting = copy.copy(feed), _Noting()
    noted.append((feed, noting))
    dry.reader, dry.cache, dry.checked, dry.change = noting, None, False, None
    dry.beside = tuple(_dry(each, noted) for each in feed.beside)
    return dry


def wants_of(feed: Feed, box: Box, rows: Rows) -> list[Want]:
    """What has to be fetched for these rows; nothing of an array that is read in another way. Of chunks that are kept
    decoded already, in memory or on the disk, word of their object where its version is not known."""
    if all(under(RemoteReader, each.reader) is None for each in (feed, *feed.beside)):
        return []
    wants = (_want(each, read) for each, read in _noted(feed, box, rows))
    return [want for want in wants if want is not None]


def _want(feed: Feed, read: Noted) -> Want | None:
    """What has to be fetched for this read."""
    remote = under(RemoteReader, feed.reader)
    if remote is None:
        return None
    if feed.keeps(read.chunk):
        return remote.glance(read.chunk) if remote.version(read.chunk) is None else None
    return (under(KeptReader, feed.reader) or remote).want(read.chunk, read.rows)


def _nowhere(wanted: Rows, values: NDArray[Any], part: Part | None) -> None:
    """Where rows go that nobody reads."""
