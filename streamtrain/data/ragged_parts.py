"""Which elements of which chunk belong to wanted rows of different lengths.

Its law: a chunk is read once for all the rows that a piece wants of it, and what it has of them is handed on as it lies
there.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.feed import Feed, Rows
from streamtrain.data.layout import ArrayLayout
from streamtrain.data.permutation import Ints
from streamtrain.data.ragged import Table, copy_runs
from streamtrain.data.ragged_site import number_array
from streamtrain.data.readers import Scratch


@dataclass
class Wanted:
    """The rows that a piece wants: where their elements lie, and which of them bad chunks have touched."""

    numbers: slice | Ints
    starts: Ints
    lengths: Ints
    bad: list[tuple[int, int]] = field(default_factory=list)
    """Bounds of the chunks that could not be used."""

    @cached_property
    def last_columns(self) -> Ints:
        """Of each row the last column that was seen; -1 before the first."""
        return np.full(len(self.starts), -1, dtype=np.int64)

    @classmethod
    def of(cls, table: Table, numbers: slice | Ints) -> Wanted:
        """These rows of an array."""
        return cls(numbers, *table.of(numbers))

    @cached_property
    def rising(self) -> bool:
        """Whether the rows follow one another, so that those of a chunk are a run of them."""
        return isinstance(self.numbers, slice)

    def within(self, low: int, high: int) -> slice | Ints:
        """Which of them have elements between these bounds."""
        if self.rising:
            first = int(np.searchsorted(self.starts, low, side="right")) - 1
            return slice(max(0, first), int(np.searchsorted(self.starts, high, side="left")))
        return np.flatnonzero((self.starts < high) & (self.starts + self.lengths > low))

    def rows(self, which: slice | Ints) -> Rows:
        """The same for a put; a slice without bounds stands for all."""
        everything = isinstance(which, slice) and (which.start, which.stop) == (0, len(self.starts))
        return slice(None) if everything else which

    def numbers_at(self, which: slice | Ints) -> Ints:
        """Numbers of the rows, in their store."""
        return number_array(self.numbers)[which]

    @property
    def lost(self) -> NDArray[np.bool_]:
        """Which rows a bad chunk has touched."""
        lost = np.zeros(len(self.starts), dtype=bool)
        for low, high in self.bad:
            lost |= (self.starts < high) & (self.starts + self.lengths > low) & (self.lengths > 0)
        return lost


@dataclass(frozen=True)
class Stretch:
    """What one chunk has of the wanted rows."""

    rows: slice | Ints
    """Which of them."""
    elements: NDArray[Any]
    starts: Ints
    """In `elements`."""
    lengths: Ints
    skipped: Ints
    """Elements of each row before these."""
    chunk: int


def parts_of(
    feed: Feed, wanted: Wanted, scratch: Scratch, inner: tuple[int, ...] = (), cut: tuple[slice, ...] = ()
) -> Iterator[Stretch]:
    """What each chunk has of the wanted rows; `inner`, `cut`: which part of an element's axes, and the places of it."""
    layout, size, shape = feed.layout, feed.layout.chunk_shape[0], tuple(c.stop - c.start for c in cut)
    for number in _chunks(wanted.starts, wanted.lengths, size):
        low, high = number * size, min((number + 1) * size, layout.shape[0])
        which = wanted.within(low, high)
        starts, lengths = wanted.starts[which], wanted.lengths[which]
        first = np.maximum(starts, low)
        counts = np.maximum(np.minimum(starts + lengths, high) - first, 0)
        inside = first - low
        reach = int(inside.min()), int((inside + counts).max())
        damages = len(scratch.damages)
        data = feed.chunk((number, *inner), reach, scratch, few=4 * int(counts.sum()) < high - low)
        if len(scratch.damages) > damages:
            wanted.bad.append((low, high))
            continue
        if data is None:
            data = np.broadcast_to(np.asarray(layout.fill_value, layout.native), (high - low, *shape))
        data = data[(slice(None), *(slice(0, length) for length in shape))]
        yield Stretch(which, data, inside, counts, first - starts, number)


def gathered(feed: Feed, wanted: Wanted, scratch: Scratch) -> NDArray[Any]:
    """The elements of the wanted rows one after another."""
    layout = feed.layout
    inner, total = layout.shape[1:], int(wanted.lengths.sum())
    size = total * math.prod(inner) * layout.dtype.itemsize
    out = scratch.take(f"ragged {layout.name}", size).view(layout.native).reshape(total, *inner)
    to = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(wanted.lengths)])[:-1]
    for chunk, cut in inner_chunks(layout):
        for part in parts_of(feed, wanted, scratch, chunk, cut):
            began = time.perf_counter()
            places = to[part.rows] + part.skipped
            copy_runs(out[(slice(None), *cut)], places, part.elements, part.starts, part.lengths)
            scratch.seconds["gather"] += time.perf_counter() - began
    return out


def _chunks(starts: Ints, lengths: Ints, size: int) -> Iterator[int]:
    """Numbers of the chunks that these runs touch."""
    some = lengths > 0
    if not some.any():
        return iter(())
    first, last = starts[some] // size, (starts[some] + lengths[some] - 1) // size
    low = int(first.min())
    edges = np.zeros(int(last.max()) - low + 2, dtype=np.int64)
    np.add.at(edges, first - low, 1)
    np.add.at(edges, last - low + 1, -1)
    return iter((np.flatnonzero(np.cumsum(edges) > 0) + low).tolist())


def inner_chunks(layout: ArrayLayout) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The chunks into which elements are cut: their numbers, and what they hold of one."""
    counts = [range(-(-s // c)) for s, c in zip(layout.shape[1:], layout.chunk_shape[1:], strict=True)]
    for chunk in itertools.product(*counts):
        yield chunk, tuple(slice(a, b) for a, b in layout.box((0, *chunk))[1:])
