"""Samples that lie each at places of its own, as random crops do, put together out of chunks.

Its law: only chunks that a sample of the piece touches are read, each once for all of them.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from streamtrain.data.cache import ChunkCache
from streamtrain.data.crops import Crop, Shift
from streamtrain.data.feed import Box, Change, Feed, Put, Rows, Site
from streamtrain.data.permutation import Ints, derive_key
from streamtrain.data.reading import BadChunk, ChunkReader, Scratch
from streamtrain.data.windows import PIECE_BYTES, ReachingSite, WindowFeed, WindowSite

LARGE_SAMPLE = 1024
"""Samples of more bytes are copied one by one, which costs 2 us each, and smaller ones by one gather, which copies them
twice."""
Cut = tuple[slice, ...]


@dataclass(frozen=True)
class CropSite(ReachingSite):
    """How an array lies under cells of samples that are cropped or shifted."""

    crops: tuple[Crop, ...] = ()
    shifts: tuple[Shift, ...] = ()
    """One for each sample axis."""
    samples: tuple[int, ...] = ()
    """Samples of the store along each sample axis: what numbers them."""

    @cached_property
    def cropped(self) -> dict[int, Crop]:
        """The crops by axis."""
        return {crop.axis: crop for crop in self.crops}

    def length(self, axis: int) -> int:
        """Places of a sample along one of its axes."""
        return self.cropped[axis].length if axis in self.cropped else super().length(axis)

    @cached_property
    def random(self) -> bool:
        """Whether an epoch's samples lie at other places than those of the one before."""
        return any(crop.at == "random" for crop in self.crops) or any(shift.most for shift in self.shifts)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Places of a sample along each of the array's axes."""
        own = {reach.axis: reach.length or 1 for reach in self.reaches}
        return tuple(own.get(axis) or self.length(axis) for axis in range(self.layout.ndim))

    @cached_property
    def moving(self) -> tuple[int, ...]:
        """The axes along which samples begin at different places."""
        sampled = {reach.axis for reach in self.reaches if reach.axis is not None}
        return tuple(sorted(sampled | self.cropped.keys()))

    @cached_property
    def cell_holds_chunks(self) -> bool:
        """Whether no chunk reaches over more than one cell: as for plain samples, where each is one place."""
        if any(reach.axis is None or reach.length or reach.stride > 1 for reach in self.reaches):
            return False
        return Site(self.layout, self.sample_axes, self.cell, self.dtype).cell_holds_chunks

    @cached_property
    def region_bytes(self) -> int:
        """Bytes of a cell's samples, and of some on their way."""
        size = math.prod(self.cell) * self.row_bytes
        return size + min(size, PIECE_BYTES)

    @cached_property
    def chunks_of_row(self) -> int:
        """Chunks from which one sample is taken, about."""
        chunks = self.layout.chunk_shape
        return math.prod(
            1 + round((self.length(a) - 1) / chunks[a]) if a in self.cropped else len(self.chunks_along(a))
            for a in self.row_axes
        )

    @cached_property
    def chunks_per_cell(self) -> int:
        """Chunks that a whole cell touches, about."""
        total = touched = 1.0
        for axis, (length, chunk) in enumerate(zip(self.lengths, self.layout.chunk_shape, strict=True)):
            if axis in self.cropped:
                crop = self.cropped[axis]
                total *= -(-crop.high // chunk) - crop.low // chunk
                touched *= 1 + (length - 1) / chunk
        share = min(1.0, touched / total)
        cropped = total * (1 - (1 - share) ** math.prod(self.cell))
        others = [len(self.chunks_along(a)) for a in range(self.layout.ndim) if a not in self.moving]
        for reach, cell in zip(self.reaches, self.cell, strict=True):
            if reach.axis is not None:
                others.append(-(-(reach.bounds(0, cell)[1] - reach.offset) // self.layout.chunk_shape[reach.axis]))
        return math.ceil(cropped * math.prod(others))

    def starts(self, box: Box, rows: Ints, key: int) -> Ints:
        """The first place of these samples of a cell along each axis of the array: (n, ndim)."""
        where = [w + o for w, o in zip(np.unravel_index(rows, box.extent), box.origin, strict=True)]
        numbers = np.ravel_multi_index(where, self.samples).astype(np.int64)
        result = np.zeros((len(rows), self.layout.ndim), dtype=np.int64)
        for number, (reach, place, shift) in enumerate(zip(self.reaches, where, self.shifts, strict=True)):
            if reach.axis is not None:
                begin = place * reach.stride
                moved = shift.of(derive_key(key, "shift", number), numbers, begin) if shift.most else 0
                result[:, reach.axis] = begin + moved + reach.offset
        for crop in self.crops:
            result[:, crop.axis] = crop.starts(key, numbers)
        return result


class CropFeed(Feed):
    """One array's crops, cell by cell."""

    site: CropSite
    epoch_key = 0
    number = 0
    """Of the store among those of the stream."""

    def during(self, seed: int, epoch: int) -> Feed:
        """The same for one epoch, whose samples lie at places of their own."""
        if not self.site.random:
            return self
        mine = copy.copy(self)
        mine.epoch_key = derive_key(seed, epoch, "crops", self.number)
        return mine

    def fill(self, box: Box, rows: Rows, put: Put, scratch: Scratch) -> None:
        """Hand over these rows of a cell. Raises DataError for chunks that can't be used."""
        if self.change is not None:
            put = self.change.around(put, scratch)
        numbers = np.arange(*rows.indices(math.prod(box.extent))) if isinstance(rows, slice) else rows
        starts = self.site.starts(box, numbers, self.epoch_key)
        region = self._room(len(numbers), scratch) if self.checked else None
        bad: list[tuple[Ints, BadChunk]] = []
        told = len(scratch.damages)
        for chunk, mine in self._touched(starts):
            before = len(scratch.damages)
            self._copy(chunk, starts, mine, region, scratch)
            bad += [(mine, damage) for _, damage in scratch.damages[before:]]
        if region is None:
            return
        samples = region.reshape(len(numbers), *self.site.row_shape)
        if not bad:
            self._put(put, slice(None), samples, None, scratch)
            return
        lost = np.zeros(len(numbers), dtype=bool)
        for mine, _ in bad:
            lost[mine] = True
        for which, reasons in ((~lost, []), (lost, [damage for _, damage in bad])):
            scratch.tainted = reasons
            try:
                wanted = np.flatnonzero(which)
                if len(wanted):
                    self._put(put, wanted, samples[wanted], None, scratch)
            finally:
                scratch.tainted = None
        del scratch.damages[told:]  # their samples are told: nobody else's are lost for them

    def _room(self, samples: int, scratch: Scratch) -> NDArray[Any]:
        """Where so many samples are put together."""
        region = scratch.take("region", samples * self.site.row_bytes)
        return region.view(self.layout.native).reshape(samples, *self.site.lengths)

    def _touched(self, starts: Ints) -> Iterator[tuple[tuple[int, ...], Ints]]:
        """The chunks in which samples begin or go on, each with those samples."""
        site, shape, sizes = self.site, self.layout.shape, self.layout.chunk_shape
        grid = tuple(-(-length // size) for length, size in zip(shape, sizes, strict=True))
        first = starts // sizes
        last = (starts + np.array(site.lengths, dtype=np.int64) - 1) // sizes
        ways = [
            range(int((last[:, axis] - first[:, axis]).max()) + 1) if axis in site.moving else site.chunks_along(axis)
            for axis in range(len(grid))
        ]
        for axis in range(len(grid)):
            if axis not in site.moving:
                first[:, axis], last[:, axis] = 0, grid[axis] - 1
        owners: list[Ints] = []
        chunks: list[Ints] = []
        for way in itertools.product(*ways):
            where = first + np.array(way, dtype=np.int64)
            mine = np.flatnonzero((where <= last).all(axis=1))
            owners.append(mine)
            chunks.append(_flat(where[mine], grid))
        flat, owner = np.concatenate(chunks), np.concatenate(owners)
        order = np.argsort(flat, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(flat[order])) + 1):
            number = int(flat[part[0]])
            yield tuple(int(n) for n in np.unravel_index(number, grid)) if grid else (), owner[part]

    def _copy(
        self, chunk: tuple[int, ...], starts: Ints, mine: Ints, region: NDArray[Any] | None, scratch: Scratch
    ) -> None:
        """Copy what these samples take of one chunk; without a region it is read and nothing else."""
        site, box = self.site, self.layout.box(chunk)
        begin = np.array([low for low, _ in box], dtype=np.int64)
        end = np.array([high for _, high in box], dtype=np.int64)
        low = np.maximum(starts[mine], begin) - begin
        high = np.minimum(starts[mine] + np.array(site.lengths, dtype=np.int64), end) - begin
        for axis in site.taken.keys() - site.cropped.keys():
            low[:, axis], high[:, axis] = 0, end[axis] - begin[axis]
        shape = tuple(int(n) for n in end - begin)
        volume = math.prod(shape)
        few = 4 * float((high - low).prod(axis=1).sum()) < volume
        rows = (int(low[:, 0].min()), int(high[:, 0].max())) if shape else (0, 1)
        data = self.chunk(chunk, rows, scratch, few=few)
        if region is None:
            return
        if data is None:
            data = np.broadcast_to(np.asarray(self.layout.fill_value, self.layout.native), shape)
        data = data[tuple(slice(0, n) for n in shape)]
        for source, place in self._runs_of(chunk):
            _gather(data[source], low, high, starts[mine] - begin, mine, region[(slice(None), *place)], site.moving)

    def _runs_of(self, chunk: tuple[int, ...]) -> Iterator[tuple[Cut, Cut]]:
        """Of the axes that do not move: which places of a chunk go to which of the samples, run by run."""
        ways = [
            [(slice(None), slice(None))] if axis in self.site.moving else list(self._runs(axis, number))
            for axis, number in enumerate(chunk)
        ]
        for way in itertools.product(*ways):
            yield tuple(_slice(source) for source, _ in way), tuple(_slice(place) for _, place in way)


def _slice(cut: slice | int) -> slice:
    return cut if isinstance(cut, slice) else slice(cut, cut + 1)


def _flat(where: Ints, grid: tuple[int, ...]) -> Ints:
    flat = np.zeros(len(where), dtype=np.int64)
    for axis, count in enumerate(grid):
        flat = flat * count + where[:, axis]
    return flat


def _gather(
    data: NDArray[Any],
    low: Ints,
    high: Ints,
    starts: Ints,
    mine: Ints,
    region: NDArray[Any],
    moving: tuple[int, ...],
) -> None:
    """Copy the places low..high (in the chunk) of each sample; `region` is (samples, *lengths)."""
    axes = list(moving)
    lengths = np.array(region.shape[1:], dtype=np.int64)
    whole = ((high - low)[:, axes] == lengths[axes]).all(axis=1)
    if math.prod(region.shape[1:]) * data.itemsize > LARGE_SAMPLE:
        whole[:] = False
    inside = np.flatnonzero(whole)
    if len(inside):
        _gather_whole(data, low[inside][:, axes], mine[inside], region, axes)
    for row in np.flatnonzero(~whole).tolist():
        source = [slice(None)] * data.ndim
        place = list(source)
        for axis in axes:
            a, b, start = int(low[row, axis]), int(high[row, axis]), int(starts[row, axis])
            source[axis], place[axis] = slice(a, b), slice(a - start, b - start)
        region[int(mine[row])][tuple(place)] = data[tuple(source)]


def _gather_whole(data: NDArray[Any], low: Ints, mine: Ints, region: NDArray[Any], axes: list[int]) -> None:
    """Samples that lie in one chunk along all axes that move: one gather for many."""
    lengths = region.shape[1:]
    counts = [data.shape[axis] - lengths[axis] + 1 for axis in axes]
    view = as_strided(
        data,
        shape=(*counts, *lengths),
        strides=(*(data.strides[axis] for axis in axes), *data.strides),
        writeable=False,
    )
    step = max(1, PIECE_BYTES // max(1, math.prod(lengths) * data.itemsize))
    for start in range(0, len(mine), step):
        some = slice(start, start + step)
        region[mine[some]] = view[tuple(low[some].T)]


def feed_of(
    site: Site, reader: ChunkReader, cache: ChunkCache | None, store: Hashable, change: Change | None, *, number: int
) -> Feed:
    """What reads an array that lies so, in a stream's store of this number; `store` names it in the cache."""
    if isinstance(site, CropSite):
        crops = CropFeed(site, reader, cache, store, change=change)
        crops.number = number
        return crops
    return (WindowFeed if isinstance(site, WindowSite) else Feed)(site, reader, cache, store, change=change)
