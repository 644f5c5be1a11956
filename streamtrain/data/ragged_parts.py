"""Which elements of which chunk belong to wanted rows of different lengths.

Its law: a chunk is read once for all the rows that a piece wants of it, and what it has of them is handed on as it lies
there.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.feed import Feed, Rows
from streamtrain.data.layout import ArrayLayout
from streamtrain.data.permutation import Ints, numbers_in
from streamtrain.data.ragged import Table, copy_runs
from streamtrain.data.reading import Scratch


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
    def joined(self) -> bool:
        """Whether their elements follow one another, so that those of a chunk are one run of it."""
        ends = self.starts + self.lengths
        return self.rising and len(ends) > 0 and bool((ends[:-1] == self.starts[1:]).all())

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

    def of_chunks(self, numbers: Sequence[int], size: int) -> list[slice]:
        """The same for chunks of `size` elements, all at once, where the rows are `joined`."""
        lows = np.array(numbers, dtype=np.int64) * size
        firsts = np.searchsorted(self.starts, lows, side="right") - 1
        lasts = np.searchsorted(self.starts, lows + size, side="left")
        return [slice(max(0, a), b) for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)]

    def rows(self, which: slice | Ints) -> Rows:
        """The same for a put; a slice without bounds stands for all."""
        everything = isinstance(which, slice) and (which.start, which.stop) == (0, len(self.starts))
        return slice(None) if everything else which

    def numbers_at(self, which: slice | Ints) -> Ints:
        """Numbers of the rows, in their store."""
        return numbers_in(self.numbers)[which]

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
    joined: bool = False
    """Whether the elements follow one another, row after row."""


def parts_of(
    feed: Feed, wanted: Wanted, scratch: Scratch, inner: tuple[int, ...] = (), cut: tuple[slice, ...] = ()
) -> Iterator[Stretch]:
    """What each chunk has of the wanted rows; `inner`, `cut`: which part of an element's axes, and the places of it."""
    layout, size, shape = feed.layout, feed.layout.chunk_shape[0], tuple(c.stop - c.start for c in cut)
    for number, which, lie in _lying(wanted, size, layout.shape[0]):
        low, high = number * size, min((number + 1) * size, layout.shape[0])
        damages = len(scratch.damages)
        data = feed.chunk((number, *inner), lie.reach, scratch, few=4 * lie.total < high - low)
        if len(scratch.damages) > damages:
            wanted.bad.append((low, high))
            continue
        if data is None:
            data = np.broadcast_to(np.asarray(layout.fill_value, layout.native), (high - low, *shape))
        if shape:
            data = data[(slice(None), *(slice(0, length) for length in shape))]
        yield Stretch(which, data, lie.starts, lie.lengths, lie.skipped, number, wanted.joined)


class _Lie(NamedTuple):
    """Where some rows' elements lie in a chunk."""

    starts: Ints
    lengths: Ints
    skipped: Ints
    reach: tuple[int, int]
    """From the first of them to the end of the last."""
    total: int


def _lying(wanted: Wanted, size: int, end: int) -> Iterator[tuple[int, slice | Ints, _Lie]]:
    """The chunks of `size` elements that have some of the rows, which rows those are, and where in the chunk they lie;
    `end`: elements of the array."""
    numbers = _chunks(wanted, size)
    if not wanted.joined:
        for number in numbers:
            low, high = number * size, min((number + 1) * size, end)
            which = wanted.within(low, high)
            starts, lengths = wanted.starts[which], wanted.lengths[which]
            first = np.maximum(starts, low)
            counts = np.maximum(np.minimum(starts + lengths, high) - first, 0)
            inside = first - low
            reach = int(inside.min()), int((inside + counts).max())
            yield number, which, _Lie(inside, counts, first - starts, reach, int(counts.sum()))
        return
    none = np.zeros(len(wanted.starts), dtype=np.int64)
    for number, rows in zip(numbers, wanted.of_chunks(numbers, size), strict=True):
        low, high = number * size, min((number + 1) * size, end)
        starts, lengths, skipped = wanted.starts[rows] - low, wanted.lengths[rows], none[rows]
        reach = int(starts[0]), int(starts[-1]) + int(lengths[-1])
        if reach[0] < 0 or reach[1] > high - low:  # the first has begun in the chunk before, or the last goes on
            skipped, lengths = np.maximum(-starts, 0), np.minimum(starts + lengths, high - low)
            starts = np.maximum(starts, 0)
            lengths = np.maximum(lengths - starts, 0)
            reach = int(starts[0]), int(starts[-1]) + int(lengths[-1])
        yield number, rows, _Lie(starts, lengths, skipped, reach, reach[1] - reach[0])


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


def _chunks(wanted: Wanted, size: int) -> list[int]:
    """Numbers of the chunks that have elements of the rows."""
    starts, lengths = wanted.starts, wanted.lengths
    if wanted.joined:
        first, last = int(starts[0]), int(starts[-1]) + int(lengths[-1])
        return list(range(first // size, -(-last // size))) if last > first else []
    some = lengths > 0
    if not some.any():
        return []
    firsts, lasts = starts[some] // size, (starts[some] + lengths[some] - 1) // size
    low = int(firsts.min())
    edges = np.zeros(int(lasts.max()) - low + 2, dtype=np.int64)
    np.add.at(edges, firsts - low, 1)
    np.add.at(edges, lasts - low + 1, -1)
    return (np.flatnonzero(np.cumsum(edges) > 0) + low).tolist()


def inner_chunks(layout: ArrayLayout) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The chunks into which elements are cut: their numbers, and what they hold of one."""
    counts = [range(-(-s // c)) for s, c in zip(layout.shape[1:], layout.chunk_shape[1:], strict=True)]
    for chunk in itertools.product(*counts):
        yield chunk, tuple(slice(a, b) for a, b in layout.box((0, *chunk))[1:])
