"""A unit's rows gathered at once, out of arrays whose small files are mapped side by side.

A call for each chunk costs more than copying it where chunks are small: threads then wait for one another's turn at
the interpreter. Here a unit's places are worked out, its files looked at, and then each thread copies a part of the
unit by one call for each array.

Its law: the rows, and their places, are those that chunk by chunk would be put there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.block import Block, Column
from streamtrain.data.feed import Feed
from streamtrain.data.order import EpochOrder, Piece
from streamtrain.data.permutation import Ints
from streamtrain.data.readers import LocalReader
from streamtrain.data.reading import Scratch
from streamtrain.data.survey import Place

Fill = Callable[[Scratch], None]


class Filled(Protocol):
    """Where the rows of consecutive positions go: those before `edge` into the head, if there is one."""

    start: int
    stop: int
    edge: int
    block: Block | None
    head: Block | None


@dataclass(frozen=True)
class Gathering:
    """The arrays of a pass, all of which allow it."""

    readers: Sequence[tuple[int, LocalReader]]
    """Of each array: its column, and what has its rows."""
    numbers: int
    """The column of the samples' numbers."""

    @classmethod
    def of(
        cls, feeds: Sequence[Sequence[Feed]], columns: Sequence[Column], places: Sequence[Place]
    ) -> Gathering | None:
        """None where one of the arrays does not allow it, or there are several stores."""
        last, found = places[-1].column, []
        if len(feeds) != 1 or not columns[last].pitch:
            return None
        for feed, place in zip(feeds[0], places, strict=False):
            column = columns[place.column]
            reader = feed.lined_up(column.dtype) if column.pitch and not place.part else None
            if reader is None:
                return None
            found.append((place.column, reader))
        return cls(found, last)

    def jobs(
        self, order: EpochOrder, unit: Filled, pieces: Sequence[Piece], scratch: Scratch, rows: int
    ) -> list[Fill] | None:
        """What fills the unit, `rows` at a time; None where some chunk has to be read by itself."""
        cells = np.array([piece.cell for piece in pieces], dtype=np.int64)
        chunks = (np.unique(cells) if order.scattered else cells).tolist()
        sources: list[tuple[int, NDArray[Any]]] = []
        for column, reader in self.readers:
            found = reader.rows_of(chunks, scratch)
            if found is None:
                return None
            sources.append((column, found))
        numbers = _numbers(order, unit.start, unit.stop, pieces)
        return [
            partial(self._fill, unit, sources, numbers, first, min(first + rows, unit.stop))
            for first in range(unit.start, unit.stop, rows)
        ]

    def _fill(
        self,
        unit: Filled,
        sources: Sequence[tuple[int, NDArray[Any]]],
        numbers: Ints,
        start: int,
        stop: int,
        scratch: Scratch,
    ) -> None:
        began = time.perf_counter()
        for block, first, last in (
            (unit.head, start, min(stop, unit.edge)),
            (unit.block, max(start, unit.edge), stop),
        ):
            if block is None or first >= last:
                continue
            which = numbers[first - unit.start : last - unit.start]
            for column, source in sources:
                block.gather(column, first, source, which)
            block.put(self.numbers, slice(first, last), which)
        scratch.seconds["gather"] += time.perf_counter() - began


def _numbers(order: EpochOrder, start: int, stop: int, pieces: Sequence[Piece]) -> Ints:
    """Of each position from `start` to `stop`: the number of its sample, which is that of its row."""
    numbers = np.empty(stop - start, dtype=np.int64)
    places: dict[int, list[Ints]] = {}
    found: list[tuple[Ints, Ints]] = []
    for piece in pieces:
        if piece.block < 0:
            rows, at = order.place(piece)
            where = _array(at)
        else:
            rows = order.split.rows(piece.cell, piece.lower, piece.upper)
            if piece.block not in places:  # one by one their places would take five times as long
                places[piece.block] = order.places(piece.block)
            where = places[piece.block][piece.lane][piece.offset : piece.offset + piece.upper - piece.lower]
        found.append((where, order.split.grid.numbers(piece.cell, _array(rows))))
    numbers[np.concatenate([where for where, _ in found]) - start] = np.concatenate([which for _, which in found])
    return numbers


def _array(rows: slice | Ints) -> Ints:
    return np.arange(rows.start, rows.stop, dtype=np.int64) if isinstance(rows, slice) else rows
