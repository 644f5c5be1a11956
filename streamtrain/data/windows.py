"""Windows and patches: which places of an array one sample covers, and how overlapping samples come out of chunks.

Its law: a region is put together once for all the samples of a cell that lie in it, and a sample is a view of it; where
a region lies in one chunk, it is a view of the chunk. Chunks of which nothing is selected are not read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from streamtrain.data.feed import Box, Feed, Put, Rows, Site
from streamtrain.data.permutation import Ints
from streamtrain.data.reading import BadChunk, Scratch

PIECE_BYTES = 4 << 20
"""Scattered samples of a cell are copied so much at a time."""


@dataclass(frozen=True)
class Reach:
    """What sample number s covers along one sample axis: places from `s * stride + offset` on."""

    axis: int | None
    """Of this array; None where it has no such axis: all samples see the same."""
    stride: int = 1
    offset: int = 0
    length: int | None = None
    """Places in a row; None is a single one, whose axis is gone from the sample."""

    @property
    def span(self) -> int:
        """Places from the sample's own on."""
        return self.offset + (self.length or 1)

    def bounds(self, first: int, count: int) -> tuple[int, int]:
        """The places that `count` samples from number `first` on cover."""
        start = first * self.stride + self.offset
        return start, start + (count - 1) * self.stride + (self.length or 1)


@dataclass(frozen=True)
class ReachingSite(Site):
    """How an array lies under cells of samples that cover more than one place, or places of their own."""

    reaches: tuple[Reach, ...] = ()
    """One for each sample axis."""

    @cached_property
    def row_axes(self) -> tuple[int, ...]:
        """The axes of one sample: those that do not number samples, and those that windows keep."""
        gone = {reach.axis for reach in self.reaches if reach.length is None}
        return tuple(axis for axis in range(self.layout.ndim) if axis not in gone)

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        lengths = {reach.axis: reach.length for reach in self.reaches}
        return tuple(lengths.get(axis) or self.length(axis) for axis in self.row_axes)

    @cached_property
    def one_chunk(self) -> bool:
        """Never: samples are put together."""
        return False


@dataclass(frozen=True)
class WindowSite(ReachingSite):
    """How an array lies under cells of windows."""

    @cached_property
    def cell_holds_chunks(self) -> bool:
        """Never: neighbouring cells overlap, or chunks reach over them."""
        return False

    @cached_property
    def region_bytes(self) -> int:
        """Bytes of what a whole cell covers."""
        return math.prod(self.region_shape(self._cell_bounds)) * self.layout.dtype.itemsize

    def region_shape(self, bounds: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """The shape of a region within these bounds: along some axes it has what is selected alone."""
        return tuple(
            len(self.taken[axis]) if axis in self.taken else stop - start for axis, (start, stop) in enumerate(bounds)
        )

    @property
    def _cell_bounds(self) -> list[tuple[int, int]]:
        return self.bounds(Box((0,) * len(self.cell), self.cell))

    @cached_property
    def chunks_per_cell(self) -> int:
        """Chunks that a whole cell touches."""
        return math.prod(
            len(self.chunks_along(axis)) if axis in self.taken else -(-(stop - start) // self.layout.chunk_shape[axis])
            for axis, (start, stop) in enumerate(self._cell_bounds)
        )

    def bounds(self, box: Box) -> list[tuple[int, int]]:
        """The bounds of what the samples of a box cover, along each of the array's axes."""
        result = [(0, length) for length in self.layout.shape]
        for axis, places in self.taken.items():
            result[axis] = int(places.min()), int(places.max()) + 1
        for reach, first, count in zip(self.reaches, box.origin, box.extent, strict=True):
            if reach.axis is not None:
                result[reach.axis] = reach.bounds(first, count)
        return result

    def touching(self, box: Box, chunk: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
        """Which samples of a box cover a place of this chunk."""
        found = np.ones(box.extent, dtype=bool)
        for k, (reach, first, count) in enumerate(zip(self.reaches, box.origin, box.extent, strict=True)):
            if reach.axis is None:
                continue
            start = np.arange(first, first + count) * reach.stride + reach.offset
            low, high = chunk[reach.axis]
            inside = (start < high) & (start + (reach.length or 1) > low)
            found &= inside.reshape([-1 if axis == k else 1 for axis in range(len(box.extent))])
        return found

    def view(self, region: NDArray[Any], extent: Sequence[int]) -> NDArray[Any]:
        """A region as its samples: shape (*extent, *row_shape); no copy."""
        steps = [0 if r.axis is None else region.strides[r.axis] * r.stride for r in self.reaches]
        inner = [region.strides[axis] for axis in self.row_axes]
        return as_strided(region, shape=(*extent, *self.row_shape), strides=(*steps, *inner), writeable=False)


class WindowFeed(Feed):
    """One array's windows, cell by cell."""

    site: WindowSite

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over these samples of a cell. Raises DataError for chunks that can't be used."""
        if self.change is not None:
            put = self.change.around(put, scratch)
        box, rows = _narrowed(box, rows)
        bounds = self.site.bounds(box)
        bad = len(scratch.damages)
        region = self._region(bounds, scratch)
        if region is None:
            return
        if len(scratch.damages) > bad:
            damages = [damage for _, damage in scratch.damages[bad:]]
            self._put_damaged(box, rows, region, damages, put, scratch)
            del scratch.damages[bad:]  # their samples are told: nobody else's are lost for them
            return
        samples = self.site.view(region, box.extent)
        for wanted, values in _samples(samples, box.extent, rows, self.site.row_bytes):
            self._put(put, wanted, values, None, scratch)

    def _put_damaged(
        self,
        box: Box,
        rows: Rows,
        region: NDArray[Any],
        damages: list[BadChunk],
        put: Put,
        scratch: Scratch,
    ) -> None:
        """The same where chunks of the region are bad: samples that touch one are put apart, and told as lost."""
        tainted = np.zeros(box.extent, dtype=bool)
        for damage in damages:
            tainted |= self.site.touching(box, self.layout.box(damage.chunk))
        samples = self.site.view(region, box.extent)
        numbers = np.arange(*rows.indices(math.prod(box.extent))) if isinstance(rows, slice) else rows
        lost = tainted.reshape(-1)[numbers]
        for which, reasons in ((~lost, []), (lost, damages)):
            scratch.tainted = reasons
            try:
                wanted = np.flatnonzero(which)
                for part, values in _samples(samples, box.extent, numbers[wanted], self.site.row_bytes):
                    self._put(put, wanted[part], values, None, scratch)
            finally:
                scratch.tainted = None

    def _region(self, bounds: Sequence[tuple[int, int]], scratch: Scratch) -> NDArray[Any] | None:
        """What is selected of the array within these bounds, in the order of its axes; None where it is read and no
        more."""
        chunks, taken = self.layout.chunk_shape, self.site.taken
        spans = [
            self.site.chunks_along(axis) if axis in taken else range(start // c, -(-stop // c))
            for axis, ((start, stop), c) in enumerate(zip(bounds, chunks, strict=True))
        ]
        if self.checked and all(len(span) == 1 for span in spans):
            part = self._part(tuple(span[0] for span in spans), bounds, scratch)
            for axis in taken:
                part = self.site.chosen(part, axis, axis, bounds[axis][0])
            return part
        shape = self.site.region_shape(bounds)
        size = math.prod(shape) * self.layout.dtype.itemsize
        region = scratch.take("region", size).view(self.layout.native).reshape(shape) if self.checked else None
        for chunk in itertools.product(*spans):
            inside = [
                (max(start, n * c), min(stop, (n + 1) * c))
                for n, c, (start, stop) in zip(chunk, chunks, bounds, strict=True)
            ]
            place = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inside, bounds, strict=True))
            part = self._part(chunk, inside, scratch)
            if region is not None and taken:
                self._put_selected(part, chunk, region, place)
            elif region is not None:
                region[place] = part
        return region

    def _put_selected(
        self, part: NDArray[Any], chunk: tuple[int, ...], region: NDArray[Any], place: tuple[slice, ...]
    ) -> None:
        """Copy what is selected of a part of a chunk; `place`: where it lies along the other axes."""
        whole = slice(None)
        ways = [
            self._cuts[axis][number] if axis in self._cuts else [(whole, place[axis])]
            for axis, number in enumerate(chunk)
        ]
        for way in itertools.product(*ways):
            values = part
            for axis, (source, _) in enumerate(way):
                if isinstance(source, slice):
                    values = values[(*(whole,) * axis, source)]
                else:
                    values = values.take(source, axis=axis)
            region[tuple(at for _, at in way)] = values

    @cached_property
    def _cuts(self) -> dict[int, dict[int, list[tuple[slice | Ints, slice]]]]:
        """Of each selected axis and each chunk along it: places of its part within the bounds, and where they go
        among all that are selected."""
        found: dict[int, dict[int, list[tuple[slice | Ints, slice]]]] = {}
        for axis, places in self.site.taken.items():
            size, low = self.layout.chunk_shape[axis], int(places.min())
            owners, found[axis] = places // size, {}
            for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(owners)) + 1):
                number = int(owners[run[0]])
                inside = places[run] - max(low, number * size)
                in_a_row = bool((np.diff(inside) == 1).all())
                source = slice(int(inside[0]), int(inside[-1]) + 1) if in_a_row else inside
                found[axis].setdefault(number, []).append((source, slice(int(run[0]), int(run[-1]) + 1)))
        return found

    def _part(self, chunk: tuple[int, ...], bounds: Sequence[tuple[int, int]], scratch: Scratch) -> NDArray[Any]:
        """A part of one chunk; the bounds are the array's."""
        first = [n * c for n, c in zip(chunk, self.layout.chunk_shape, strict=True)]
        rows = (bounds[0][0] - first[0], bounds[0][1] - first[0]) if first else (0, 1)
        data = self.chunk(chunk, rows, scratch, few=False)
        if data is None:
            shape = tuple(stop - start for start, stop in bounds)
            return np.broadcast_to(np.asarray(self.layout.fill_value, self.layout.native), shape)
        return data[tuple(slice(a - f, b - f) for (a, b), f in zip(bounds, first, strict=True))]


def _narrowed(box: Box, rows: Rows) -> tuple[Box, Rows]:
    """The least box that holds these samples, where that is plain to see, and their numbers in it."""
    if len(box.extent) > 1:
        return box, rows
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(box.extent[0])
        return Box((box.origin[0] + start,), (stop - start,)), slice(None)
    start, stop = int(rows.min()), int(rows.max()) + 1
    return Box((box.origin[0] + start,), (stop - start,)), rows - start


def _samples(
    samples: NDArray[Any], extent: tuple[int, ...], rows: Rows, row_bytes: int
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Samples by the handful: which of the wanted ones they are, and their values."""
    last = extent[-1]
    if isinstance(rows, slice) and rows == slice(None):
        for number, place in enumerate(np.ndindex(*extent[:-1])):
            yield slice(number * last, (number + 1) * last), samples[place]
        return
    numbers = np.arange(*rows.indices(math.prod(extent))) if isinstance(rows, slice) else rows
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, len(numbers), step):
        where = np.unravel_index(numbers[start : start + step], extent)
        yield slice(start, start + len(where[0])), samples[where]
