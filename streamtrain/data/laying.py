"""Room in blocks for rows of different lengths, set aside before any of them is read. Pure.

Its law: rows lie in the order of their positions, whoever reads them and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from streamtrain.data.block import Column, Places
from streamtrain.data.feed import Box, Feed, Rows
from streamtrain.data.permutation import Ints, numbers_in
from streamtrain.data.ragged import RaggedColumn
from streamtrain.data.ragged_site import RaggedSite, numbers_of
from streamtrain.data.survey import Place


@dataclass(frozen=True)
class Laid:
    """Rows of one cell, and the positions where they go."""

    store: int
    box: Box
    rows: Rows
    at: Places


class Blocks(Protocol):
    """What is filled."""

    def lay(self, number: int, first: int, lengths: Ints) -> None:
        """Set aside room for rows of these lengths, at the positions from `first` on."""


class Reads(Protocol):
    """What a pass reads, and where it goes."""

    @property
    def feeds(self) -> Sequence[Sequence[Feed]]: ...

    @property
    def columns(self) -> Sequence[Column]: ...

    @property
    def places(self) -> Sequence[Place]: ...


def lay(blocks: Blocks, rows: Sequence[Laid], reads: Reads) -> None:
    """Set aside room for these rows, which are all of their positions from the first to the last."""
    if not rows:
        return
    at = np.concatenate([numbers_in(each.at) for each in rows])
    first = int(at.min())
    for index, place in enumerate(reads.places[:-1]):
        if isinstance(reads.columns[place.column], RaggedColumn):
            lengths = np.zeros(int(at.max()) + 1 - first, dtype=np.int64)
            lengths[at - first] = np.concatenate([_lengths(each, reads.feeds[each.store][index]) for each in rows])
            blocks.lay(place.column, first, lengths)


def _lengths(rows: Laid, feed: Feed) -> Ints:
    assert isinstance(feed.site, RaggedSite)
    return feed.site.table.of(numbers_of(rows.box, rows.rows))[1]
