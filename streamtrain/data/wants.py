"""What a job will read of arrays that are elsewhere, known before it runs.

Its law: `Feed.fill` itself is asked, over a reader that reads nothing, so that what is fetched ahead and what is read
never differ, however rows come to lie in chunks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from streamtrain.data.feed import Box, Feed, Part, Rows
from streamtrain.data.readers import Scratch
from streamtrain.data.remote import RemoteReader, Want
from streamtrain.data.trust import Verify


class _Noting:
    """A reader that reads nothing and notes what it is asked for."""

    lane = "none"

    def __init__(self, reader: RemoteReader) -> None:
        self._reader = reader
        self.wants: list[Want] = []

    def vouch(self, verify: Verify) -> None:
        """There is nothing to be checked."""

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        self.wants.append(self._reader.want(chunk, rows))
        return None


def wants_of(feed: Feed, box: Box, rows: Rows) -> list[Want]:
    """The chunks that `feed.fill` will read for these rows of a cell: it is asked itself, so that both never differ.

    None for an array that is read in another way; nor those that are kept decoded already.
    """
    reader = getattr(feed.reader, "inner", feed.reader)  # what a reader that skips bad chunks wraps
    if not isinstance(reader, RemoteReader):
        return []
    dry, noting = copy.copy(feed), _Noting(reader)
    dry.reader, dry.cache = noting, None
    dry.fill(box, rows, _nowhere, Scratch())
    if feed.cache is None:
        return noting.wants
    return [want for want in noting.wants if feed.key(want.chunk) not in feed.cache]


def _nowhere(wanted: Rows, values: NDArray[Any], part: Part | None) -> None:
    """Where rows go that nobody reads."""
