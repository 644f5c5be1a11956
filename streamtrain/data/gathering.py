"""A unit's rows gathered at once, out of arrays whose small files are mapped side by side.

A call for each chunk costs more than copying it where chunks are small: threads then wait for one another's turn at
the interpreter. Here a unit's places are worked out, its files looked at, and then each thread copies a part of the
unit by one call for each array.

Its law: the rows, and their places, are those that chunk by chunk would be put there.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.block import Block, Column, Places
from streamtrain.data.feed import Part
from streamtrain.data.order import EpochOrder, Piece
from streamtrain.data.permutation import Ints, numbers_in
from streamtrain.data.readers import LocalReader
from streamtrain.data.reading import Scratch
from streamtrain.data.routes import Route

FRESH = 0.01
"""Seconds for which a look at files counts."""
TOGETHER = 1 << 15
"""Rows whose numbers are put to their places together, at least."""
Fill = Callable[[Scratch], None]


class Filled(Protocol):
    """Where the rows of consecutive positions go: those before `edge` into the head, if there is one."""

    start: int
    stop: int
    edge: int
    block: Block | None
    head: Block | None

    def put(self, number: int, at: Places, values: Any, part: Part | None) -> None:
        """Copy rows of one column to their places in the blocks."""


class _Look:
    """The chunks of a unit, looked at before they are gathered from: again where that was a while ago."""

    def __init__(self, chunks: Sequence[int], readers: Sequence[LocalReader]) -> None:
        self._chunks, self._readers = chunks, readers
        self._lock, self._at = threading.Lock(), -math.inf

    def check(self, scratch: Scratch) -> None:
        """Raise DataError where a file is not what it was."""
        if time.monotonic() - self._at < FRESH:
            return
        with self._lock:
            if time.monotonic() - self._at < FRESH:
                return
            if self._at == -math.inf:
                scratch.chunks += len(self._chunks) * len(self._readers)
                scratch.bytes_read += len(self._chunks) * sum(reader.layout.chunk_bytes for reader in self._readers)
            for reader in self._readers:
                reader.check(self._chunks, scratch)
            self._at = time.monotonic()


@dataclass(frozen=True)
class Gathering:
    """The arrays of a pass, all of which allow it."""

    readers: Sequence[tuple[Sequence[int], LocalReader]]
    """Of each array: the columns that its rows go to, and what has them."""
    numbers: int
    """The column of the samples' numbers."""

    @classmethod
    def of(cls, routes: Sequence[Sequence[Route]], columns: Sequence[Column], numbers: int) -> Gathering | None:
        """None where one of the arrays does not allow it, or there are several stores. `routes`: store by store."""
        if len(routes) != 1 or not columns[numbers].pitch:
            return None
        found: list[tuple[Sequence[int], LocalReader]] = []
        for feed, places in routes[0]:
            into = [columns[place.column] for place in places]
            readers = [feed.lined_up(column.dtype) for column in into]
            if readers[0] is None or None in readers or not all(column.pitch for column in into):
                return None
            if any(place.part for place in places):
                return None
            found.append(([place.column for place in places], readers[0]))
        return cls(found, numbers)

    def jobs(self, order: EpochOrder, unit: Filled, pieces: Sequence[Piece], rows: int) -> list[Fill] | None:
        """What fills the unit, `rows` at a time; None where some chunk has to be read by itself."""
        cells = np.array([piece.cell for piece in pieces], dtype=np.int64)
        chunks = (np.unique(cells) if order.scattered else cells).tolist()
        sources: dict[int, NDArray[Any]] = {}
        for into, reader in self.readers:
            found = reader.rows_of(chunks)
            if found is None:
                return None
            sources |= dict.fromkeys(into, found)
        self._number(order, unit, pieces)
        look = _Look(chunks, [reader for _, reader in self.readers])
        return [
            partial(self._fill, unit, sources, look, first, min(first + rows, unit.stop))
            for first in range(unit.start, unit.stop, rows)
        ]

    def _number(self, order: EpochOrder, unit: Filled, pieces: Sequence[Piece]) -> None:
        """Put the number of each position's sample, which is that of its row, into its place."""
        places: dict[int, list[Ints]] = {}
        found: list[tuple[Ints, Ints]] = []
        count = total = 0
        for piece in pieces:
            if piece.block < 0:
                rows, at = order.place(piece)
                where = numbers_in(at)
            else:
                rows = order.split.rows(piece.cell, piece.lower, piece.upper)
                if piece.block not in places:  # one by one their places would take five times as long
                    places = {piece.block: order.places(piece.block)}
                where = places[piece.block][piece.lane][piece.offset : piece.offset + piece.upper - piece.lower]
            found.append((where, order.split.grid.numbers(piece.cell, numbers_in(rows))))
            count += len(where)
            total += len(where)
            if count >= TOGETHER or piece is pieces[-1]:
                where, numbers = (np.concatenate(parts) for parts in zip(*found, strict=True))
                unit.put(self.numbers, where, numbers, None)
                found, count = [], 0
        assert total == unit.stop - unit.start, "what no piece fills would be gathered from anywhere"

    def _fill(
        self,
        unit: Filled,
        sources: Mapping[int, NDArray[Any]],
        look: _Look,
        start: int,
        stop: int,
        scratch: Scratch,
    ) -> None:
        look.check(scratch)
        began = time.perf_counter()
        layout = self.readers[0][1].layout
        scratch.reading = (f"array {layout.name!r}: rows for positions {start} to {stop}", time.monotonic())
        for block, first, last in (
            (unit.head, start, min(stop, unit.edge)),
            (unit.block, max(start, unit.edge), stop),
        ):
            if block is not None and first < last:
                block.gather(sources, self.numbers, first, last)
        scratch.reading = None
        scratch.seconds["gather"] += time.perf_counter() - began
