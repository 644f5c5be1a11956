"""From a sample's number back to its place: which store, which rows, and what the coordinates say of them.

Its law: it is what the numbers were made from, read backwards; coordinates are read when they are first asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamtrain.data.columns import read_coordinate
from streamtrain.data.cropping import CropFeed
from streamtrain.data.feed import Box, Feed
from streamtrain.data.framing import Frame
from streamtrain.data.layout import ArrayLayout
from streamtrain.data.opening import Located
from streamtrain.data.permutation import Ints
from streamtrain.data.ragged_site import RaggedSite
from streamtrain.data.selecting import Coordinate
from streamtrain.data.trust import Verify
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import ConfigError

Read = Callable[[Located, str, int, str], Coordinate | None]
"""Gives the coordinate of a dimension of this length beside an array."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a sample lies."""

    store: str
    row: tuple[int, ...]
    """The place where it begins along each axis that numbers samples."""
    stop: tuple[int, ...]
    """The place after the last that it covers along each, its target included: `row + 1` without windows."""
    coordinates: Mapping[str, Any]
    """By dimension name, the value at the place where it begins: a number, datetime64 or text; only of dimensions that
    have a coordinate array. None of rows of different lengths: their array's dimension numbers elements, not rows."""
    crop: Mapping[str | int, int]
    """Where its crop begins, by the axis' name, or its number in the first array; empty unless an epoch was named."""


def sample_numbers(index: object, count: int) -> Ints:
    """What was asked for, as 1-D int64. Raises ConfigError for what are no numbers of samples."""
    numbers = np.asarray(index)
    if (numbers.size and numbers.dtype.kind not in "iu") or numbers.ndim > 1:
        raise ConfigError(f"locate takes sample numbers such as those of batch.index, not {index!r:.80}")
    numbers = np.atleast_1d(numbers)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < count):
        raise ConfigError(f"locate takes numbers from 0 to {count - 1}, not {numbers.min()} to {numbers.max()}")
    return numbers.astype(np.int64)


class Locator:
    """Finds the samples of some stores again. Not thread-safe; it keeps the coordinates that it has read."""

    def __init__(
        self,
        where: Sequence[Located],
        frames: Sequence[Frame],
        feeds: Sequence[Feed],
        read: Read,
    ) -> None:
        """`feeds`: of the first array in each store."""
        self._where, self._frames, self._feeds, self._read = where, frames, feeds, read
        self._starts = np.cumsum([0, *(math.prod(frame.sample_shape) for frame in frames)])
        self._known: dict[tuple[int, str], Coordinate | None] = {}

    def locate(self, numbers: Ints, seed: int, epoch: int | None) -> list[Location]:
        """Where these samples lie; those of `epoch`, where it is named."""
        stores = np.searchsorted(self._starts, numbers, side="right") - 1
        found: list[Location | None] = [None] * len(numbers)
        for store in np.unique(stores).tolist():
            mine = np.flatnonzero(stores == store)
            there = self._located(store, numbers[mine] - self._starts[store], seed, epoch)
            for place, location in zip(mine.tolist(), there, strict=True):
                found[place] = location
        return [location for location in found if location is not None]

    def _located(self, store: int, local: Ints, seed: int, epoch: int | None) -> list[Location]:
        frame, feed = self._frames[store], self._feeds[store]
        layout, axes = feed.layout, feed.site.sample_axes
        places = np.stack(np.unravel_index(local, frame.sample_shape), axis=1) * np.array(frame.strides)
        begin = {axis: places[:, k] for k, axis in enumerate(axes)}
        crops: dict[str | int, Ints] = {}
        if epoch is not None and isinstance(mine := feed.during(seed, epoch), CropFeed):
            box = Box((0,) * len(frame.sample_shape), frame.sample_shape)
            starts = mine.site.starts(box, local, mine.epoch_key)
            begin |= {axis: starts[:, axis] for axis in (*axes, *mine.site.cropped)}
            crops = {_dim(layout, axis) or axis: starts[:, axis] for axis in mine.site.cropped}
        named = {} if isinstance(feed.site, RaggedSite) else {_dim(layout, axis): at for axis, at in begin.items()}
        values = {dim: self._values(store, dim, at) for dim, at in named.items() if dim is not None}
        rows = np.stack([begin[axis] for axis in axes], axis=1)
        stops = np.minimum(rows + np.array(frame.spans), np.array(frame.places))
        return [
            Location(
                self._where[store].name,
                tuple(rows[n].tolist()),
                tuple(stops[n].tolist()),
                {dim: some[n] for dim, some in values.items() if some is not None},
                {axis: int(at[n]) for axis, at in crops.items()},
            )
            for n in range(len(local))
        ]

    def _values(self, store: int, dim: str, places: Ints) -> Any:
        """What the coordinate says at these places; None without one."""
        key = (store, dim)
        if key not in self._known:
            layout = self._feeds[store].layout
            length = layout.shape[layout.dims.index(dim)]
            self._known[key] = self._read(self._where[store], dim, length, layout.name)
        coordinate = self._known[key]
        return None if coordinate is None else coordinate.values[places]


def _dim(layout: ArrayLayout, axis: int) -> str | None:
    return layout.dims[axis] if layout.dims else None


def coordinates_at(timeout: float, retries: int, verify: Verify) -> Read:
    """What reads a coordinate, on a loop of its own, and blocks for up to `timeout` seconds."""

    def read(where: Located, dim: str, length: int, beside: str) -> Coordinate | None:
        loop, reading = ZarrLoop(), ZarrLoop()
        try:
            return loop.run(
                read_coordinate(
                    where, dim, length, beside, loop=reading, timeout=timeout, retries=retries, verify=verify
                ),
                timeout,
            )
        finally:
            loop.close()
            reading.close()

    return read
