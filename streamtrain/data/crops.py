"""Where a random crop, or a window that is shifted, begins: a keyed function of seed, epoch and sample number. Pure.

Its law: a sample's places depend on nothing else, so that they are the same for any batch size, threads and memory,
after a resume, and in all arrays that have the axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.layout import ArrayLayout
from streamtrain.data.permutation import Ints, derive_key, keyed
from streamtrain.errors import ConfigError, DataError

Axis = int | str
CropAt = Literal["random", "center"]


@dataclass(frozen=True)
class Crop:
    """So many places in a row that are taken of one axis of each sample."""

    axis: int
    """Of the array."""
    key: str
    """Crops of the same key begin at the same place: the axis as it is named, or its number."""
    length: int
    low: int
    high: int
    """They lie from place `low` on, before place `high`."""
    at: CropAt

    def starts(self, key: int, numbers: Ints) -> Ints:
        """The first place for each of these samples; `key` is that of the epoch."""
        room = self.high - self.low - self.length
        if self.at == "center":
            return np.full(len(numbers), self.low + room // 2, dtype=np.int64)
        return self.low + drawn(derive_key(key, "axis", self.key), numbers, np.int64(room))


@dataclass(frozen=True)
class Shift:
    """By how much the windows along one sample axis may begin later."""

    most: int = 0
    last: int = 0
    """The last place where a window can begin."""
    lasts: Ints | None = field(default=None, compare=False)
    """The same for each place where one may begin without a shift, of an axis of which only some places are taken."""

    def of(self, key: int, numbers: Ints, starts: Ints) -> Ints:
        """The shift of each of these samples, which would begin at `starts`."""
        last = self.last if self.lasts is None else self.lasts[starts]
        return drawn(key, numbers, np.minimum(self.most, last - starts))


def shift_along(most: int, length: int, span: int, kept: NDArray[np.bool_] | None) -> Shift:
    """Of windows of so many places along an axis; they stay within the run of places that are kept."""
    if kept is None:
        return Shift(most, length - span)
    return Shift(most, length - span, np.maximum(run_ends(kept) - span, np.arange(length)))


def run_ends(kept: NDArray[np.bool_]) -> Ints:
    """For each place the end of the run of kept places in which it lies; itself, if it is not kept."""
    gaps = np.where(kept, len(kept), np.arange(len(kept), dtype=np.int64))
    return np.minimum.accumulate(gaps[::-1])[::-1]


def drawn(key: int, numbers: Ints, most: Ints | np.int64) -> Ints:
    """A number from 0 to `most` for each sample, all equally likely."""
    result: Ints = (keyed(key, numbers) % (np.asarray(most).astype(np.uint64) + np.uint64(1))).astype(np.int64)
    return result


def crops_of(
    layout: ArrayLayout,
    first: ArrayLayout,
    wanted: Mapping[Axis, int],
    at: CropAt,
    select: Mapping[Axis, Ints],
    sampled: Sequence[int | None],
) -> tuple[Crop, ...]:
    """What is cropped of an array; `first` is the one whose axes are numbered, `sampled` are this one's sample axes.

    Raises DataError or ConfigError for what can't be.
    """
    found = []
    taken = {axis_of(axis, layout, first): places for axis, places in select.items()}
    for axis, length in wanted.items():
        number = axis_of(axis, layout, first)
        if number is None:
            continue
        if number in sampled:
            raise ConfigError(
                f"crop= names axis {axis!r}, along which samples are numbered",
                hint="crop axes of one sample; window= and jitter= take places of sample axes",
            )
        low, high = _bounds(axis, layout, number, taken.get(number))
        if high - low < length:
            there = f"array {layout.name!r} has {high - low} there"
            raise DataError(f"crop= takes {length} places of axis {axis!r}; {there}")
        found.append(Crop(number, _name(axis, first), length, low, high, at))
    return tuple(found)


def axis_of(axis: Axis, layout: ArrayLayout, first: ArrayLayout) -> int | None:
    """The number of an axis of this array; numbers are the first array's, whose names decide where both have names."""
    if isinstance(axis, int):
        name = first.dims[axis] if axis < len(first.dims) else None
        if name is None or layout is first or not layout.dims or not all(layout.dims):
            return axis if axis < layout.ndim else None
        axis = name
    return layout.dims.index(axis) if axis in layout.dims else None


def _name(axis: Axis, first: ArrayLayout) -> str:
    if isinstance(axis, int) and axis < len(first.dims) and first.dims[axis] is not None:
        return str(first.dims[axis])
    return str(axis)


def _bounds(axis: Axis, layout: ArrayLayout, number: int, places: Ints | None) -> tuple[int, int]:
    """Between which places a crop lies: those that `select` takes, where it takes some in a row."""
    length = layout.shape[number]
    if places is None:
        return 0, length
    low, high = int(places[0]), int(places[-1]) + 1
    if places.tolist() != list(range(low, high)):
        raise ConfigError(
            f"crop= takes places in a row of axis {axis!r}, of which select= takes some that are not",
            hint="select a range of places there, or crop other axes",
        )
    return low, high


def check_alike(crops: Sequence[tuple[str, Sequence[Crop]]], wanted: Mapping[Axis, int]) -> None:
    """Raise DataError where arrays (by name) can't be cropped alike, or none has an axis."""
    first: dict[str, tuple[str, Crop]] = {}
    for name, mine in crops:
        for crop in mine:
            other, known = first.setdefault(crop.key, (name, crop))
            if (crop.low, crop.high) != (known.low, known.high):
                raise DataError(
                    f"crop= along axis {crop.key!r}: array {other!r} has places {known.low} to {known.high}, {name!r} "
                    f"{crop.low} to {crop.high}, and both are cropped alike",
                    hint="all arrays that have the axis need the same length",
                )
    if len(first) < len(wanted):
        there = ", ".join(map(repr, first)) or "none"
        raise DataError(
            f"crop= names the axes {', '.join(map(repr, wanted))}; the arrays have {there} of them",
            hint="give axes by their dimensions' names, or their numbers",
        )
