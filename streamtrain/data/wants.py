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
from streamtrain.data.readers import Scratch, Version, under
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

    def vouch(self, verify: Verify) -> None:
        """There is nothing to be checked."""

    def version(self, chunk: Sequence[int]) -> Version | None:
        """Nothing is known of it."""
        return None

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        self.reads.append(Noted(tuple(chunk), rows, few))
        return None


def reads_of(feed: Feed, box: Box, rows: Rows) -> list[Noted]:
    """The reads that `feed.fill` will make for these rows of a cell; none of chunks that are kept decoded already."""
    dry, noting = copy.copy(feed), _Noting()
    dry.reader, dry.cache = noting, None
    dry.fill(box, rows, _nowhere, Scratch())
    if feed.cache is None:
        return noting.reads
    return [read for read in noting.reads if feed.key(read.chunk) not in feed.cache]


def wants_of(feed: Feed, box: Box, rows: Rows) -> list[Want]:
    """The chunks that have to be fetched for these rows; none of an array that is read in another way, nor those that
    are kept decoded already, in memory or on the disk."""
    reader = under(KeptReader, feed.reader) or under(RemoteReader, feed.reader)
    if reader is None or under(RemoteReader, reader) is None:
        return []
    wants = (reader.want(read.chunk, read.rows) for read in reads_of(feed, box, rows))
    return [want for want in wants if want is not None]


def _nowhere(wanted: Rows, values: NDArray[Any], part: Part | None) -> None:
    """Where rows go that nobody reads."""
