"""Small encoded chunks decoded side by side, so that the rows of several are put to their places by one call.

Numpy keeps other threads waiting while it copies fewer than 500 rows, and what lets them go on costs the wait for the
next turn at the interpreter: with a call for each chunk of 256 KiB two threads are hardly faster than one.

Its law: the rows, and their places, are those that chunk by chunk would be put there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from streamtrain.data.block import Column, Places
from streamtrain.data.feed import Feed, Part, Rows
from streamtrain.data.order import EpochOrder, Piece
from streamtrain.data.permutation import Ints, numbers_in
from streamtrain.data.reading import Scratch
from streamtrain.data.routes import Route


class Filled(Protocol):
    """Where rows go."""

    def put(self, number: int, at: Places, values: Any, part: Part | None) -> None:
        """Copy rows of one column to their places in the blocks."""


class _Read(NamedTuple):
    """Rows of a cell, and where they go."""

    piece: Piece
    store: int
    cell: int
    rows: Rows
    at: Ints


@dataclass(frozen=True)
class Together:
    """The arrays of a pass, of each of which a cell is one chunk."""

    feeds: Sequence[Sequence[Feed]]
    """One for each array, store by store."""
    columns: Sequence[Sequence[int]]
    """Those that each array's rows go to."""
    numbers: int
    """The column of the samples' numbers."""
    most: int
    """Cells that may be read together."""

    @classmethod
    def of(cls, routes: Sequence[Sequence[Route]], columns: Sequence[Column], numbers: int) -> Together | None:
        """None where one of the arrays does not allow it, nothing would be gained, or stores differ in which arrays
        are read once for several columns. `routes`: store by store."""
        if any([places for _, places in store] != [places for _, places in routes[0]] for store in routes):
            return None
        counts = []
        for feed, places in itertools.chain.from_iterable(routes):
            for place in places:
                reader = None if place.part else feed.lined_up(columns[place.column].dtype)
                if reader is None or not feed.in_order:
                    return None
            if feed.layout.decode_room:
                counts.append(feed.layout.together)
        most = min(counts, default=1)
        if most <= 1:
            return None
        into = [[place.column for place in places] for _, places in routes[0]]
        return cls([[feed for feed, _ in store] for store in routes], into, numbers, most)

    def fill(
        self,
        unit: Filled,
        order: EpochOrder,
        since: int,
        pieces: Sequence[Piece],
        scratch: Scratch,
        over: Callable[[], bool],
    ) -> None:
        """Put these pieces' rows and numbers to their places, from position `since` on; stop where it is `over`. Raises
        as `Feed.fill` does."""
        grid = order.split.grid
        for group in self._groups(order, since, pieces):
            if over():
                return
            for array, columns in enumerate(self.columns):
                _fill(unit, columns, [(self.feeds[each.store][array], each) for each in group], scratch)
            numbers = [grid.numbers(each.piece.cell, numbers_in(each.rows)) for each in group]
            unit.put(self.numbers, _joined([each.at for each in group]), _joined(numbers), None)

    def _groups(self, order: EpochOrder, since: int, pieces: Sequence[Piece]) -> Iterator[list[_Read]]:
        for first in range(0, len(pieces), self.most):
            group = []
            for piece in pieces[first : first + self.most]:
                if (found := order.place_since(piece, since)) is not None:
                    rows, at = found
                    store, cell, _ = order.split.grid.part(piece.cell)
                    group.append(_Read(piece, store, cell, rows, numbers_in(at)))
            if group:
                yield group


def _fill(unit: Filled, columns: Sequence[int], reads: Sequence[tuple[Feed, _Read]], scratch: Scratch) -> None:
    """One array's rows of a few cells."""
    encoded = [feed.layout for feed, _ in reads if feed.layout.decode_room]
    room = sum(each.chunk_bytes for each in encoded) + max((each.spill for each in encoded), default=0)
    area = scratch.take("together", room)
    start, whole = 0, True
    decoded = []
    for feed, read in reads:
        layout = feed.layout
        values = feed.whole(read.cell, area[start : start + layout.decode_room], scratch)
        if not layout.decode_room:  # it may lie in what the next read overwrites
            _put(unit, columns, read.at, values[read.rows], scratch)
            continue
        start += layout.chunk_bytes
        whole = whole and isinstance(read.rows, slice) and read.rows.indices(len(values)) == (0, len(values), 1)
        decoded.append((read, values))
    if whole and len(decoded) > 1:
        values = area[:start].view(values.dtype).reshape(-1, *values.shape[1:])
        _put(unit, columns, _joined([read.at for read, _ in decoded]), values, scratch)
        return
    for read, values in decoded:
        _put(unit, columns, read.at, values[read.rows], scratch)


def _put(unit: Filled, columns: Sequence[int], at: Ints, values: Any, scratch: Scratch) -> None:
    began = time.perf_counter()
    for column in columns:
        unit.put(column, at, values, None)
    scratch.seconds["gather"] += time.perf_counter() - began


def _joined(parts: Sequence[Ints]) -> Ints:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
