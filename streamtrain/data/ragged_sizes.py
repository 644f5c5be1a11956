"""How many elements a block of rows of different lengths may come to have, known before any of them is read. Pure.

Its law: a buffer holds whatever an epoch may draw into it, so that all buffers are of one size and nothing is ever cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from streamtrain.data.block import Column
from streamtrain.data.choosing import Draw
from streamtrain.data.framing import Frame
from streamtrain.data.permutation import Ints
from streamtrain.data.ragged import RaggedColumn
from streamtrain.data.ragged_site import RaggedSite


@dataclass(frozen=True, eq=False)
class Extent:
    """The elements of one column, row by row and cell by cell."""

    rows: Ints
    """Elements of each row that an epoch may have."""
    cells: Ints
    """Most elements that each cell brings into an epoch."""
    repeats: bool = False
    """Whether a row may come several times."""

    @cached_property
    def mean(self) -> float:
        """Elements of a row."""
        return float(self.rows.mean()) if len(self.rows) else 0.0

    @cached_property
    def _largest(self) -> Ints:
        return np.cumsum(np.sort(self.cells)[::-1])

    def of_cells(self, count: int) -> int:
        """Most elements that so many cells have."""
        return int(self._largest[min(count, len(self._largest)) - 1]) if count and len(self._largest) else 0

    def of_rows(self, count: int) -> int:
        """Most elements that so many rows have."""
        if self.repeats:
            return count * int(self.rows.max(initial=0))
        if not count:
            return 0
        if count >= len(self.rows):
            return int(self.rows.sum())
        return int(np.partition(self.rows, len(self.rows) - count)[len(self.rows) - count :].sum())


Extents = dict[int, Extent]
"""By the number of the column."""


def extents_of(columns: Sequence[Column], frames: Sequence[Frame], drawn: Draw | None) -> Extents:
    """Of the columns whose rows have different lengths; sites are as many as columns, since such are not stacked."""
    found: Extents = {}
    for number, column in enumerate(columns):
        if isinstance(column, RaggedColumn):
            sites = [site for frame in frames if isinstance(site := frame.sites[number], RaggedSite)]
            found[number] = _extent(sites, drawn)
    return found


def _extent(sites: Sequence[RaggedSite], drawn: Draw | None) -> Extent:
    lengths = np.concatenate([site.table.lengths for site in sites])
    cells = [_sums(site.table.lengths, site.cell[0]) for site in sites]
    if drawn is None:
        return Extent(lengths, np.concatenate(cells))
    numbers = drawn.chosen.numbers
    mine = lengths[numbers]
    ids = np.unique(drawn.chosen.grid.locate(numbers)[0], return_inverse=True)[1]
    if drawn.weights is None:
        return Extent(mine, np.bincount(ids, mine).astype(np.int64))
    # Each row comes as often as its share, rounded up or down; all rows of a cell together do so, too.
    expected = drawn.weights * (len(drawn.weights) / drawn.weights.sum())
    each = np.bincount(ids, mine * (np.floor(expected) + 1))
    longest = np.zeros(len(each), dtype=np.int64)
    np.maximum.at(longest, ids, mine)
    together = (np.ceil(np.bincount(ids, expected)) + 1) * longest
    return Extent(mine, np.ceil(np.minimum(each, together)).astype(np.int64), repeats=True)


def _sums(lengths: Ints, rows: int) -> Ints:
    """Of so many in a row."""
    sums: Ints = np.add.reduceat(lengths, np.arange(0, len(lengths), rows))
    return sums


def row_cost(columns: Sequence[Column], extents: Extents) -> int:
    """Bytes of a block that elements of a row take, on average."""
    total = 0.0
    for number, extent in extents.items():
        column = columns[number]
        assert isinstance(column, RaggedColumn)
        total += extent.mean * sum(piece.bytes for piece in column.pieces)
    return round(total)


def fitted(columns: Sequence[Column], extents: Extents, cells: int | None, rows: int) -> list[Column]:
    """The columns with room for the elements of so many cells (None: any rows), and of a batch that begins there."""
    result = list(columns)
    for number, extent in extents.items():
        column = result[number]
        assert isinstance(column, RaggedColumn)
        most = extent.of_rows(rows)
        if cells is not None:
            most = min(most, extent.of_cells(cells))
        result[number] = replace(column, most=most + extent.of_rows(column.batch_size - 1))
    return result


def table_bytes(frames: Sequence[Frame]) -> int:
    """Bytes of the offsets that are kept."""
    tables = {id(site.table): site.table for frame in frames for site in frame.sites if isinstance(site, RaggedSite)}
    return sum(table.offsets.nbytes for table in tables.values())


def room_bytes(columns: Sequence[Column]) -> int:
    """Bytes of a batch's columns that are laid out only when it is made."""
    laid = (column for column in columns if isinstance(column, RaggedColumn) and not column.kept_sparse)
    return sum(column.batch_bytes for column in laid)
