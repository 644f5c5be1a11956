"""Outputs of samples put together: each at its place, and where samples overlap their mean, weighted by a Hann window.

Its law: a model that gives back what it was given leaves the source's numbers, to the bit where they are float32 or
narrower (sums are float64); memory is the bands that samples still come to, or a file where those are too many.

A sample weighs most in its middle, least at its rim, where a network sees the least around a place: `hann`. What is
kept is two arrays, sums of weight times value and sums of weights; the result is their quotient. Only the axes along
which samples are numbered have weights of their own.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.canvas import Canvas
from streamtrain.data.permutation import Ints
from streamtrain.errors import ConfigError

Shape = tuple[int, ...]
Values = NDArray[Any]
Floats = NDArray[np.float64]


def hann(length: int) -> Floats:
    """Weights of `length` places, float64, symmetric, all above 0: a Hann window taken in the middle of each place.

    sin^2(pi (i + 1/2) / length). After Harris 1978, "On the use of windows for harmonic analysis with the discrete
    Fourier transform". At half a window's stride neighbours' weights sum to 1.
    """
    weights: Floats = np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 2
    return weights


@dataclass(frozen=True)
class Band:
    """Finished rows along the first axis."""

    start: int
    values: Values
    """Of shape (rows, ...); fill where no sample came."""
    missing: bool
    """Whether there are such places."""


class Sheets(Protocol):
    """Where the two arrays lie, band by band."""

    def band(self, number: int) -> tuple[Values, Values]:
        """Sums (or values) and weights (or which places were written) of a band; zeros at first."""

    def take(self, before: int | None) -> Iterator[tuple[int, Values, Values]]:
        """The bands to which something came, up to before this number (None: all), in order; they are let go."""

    def close(self) -> None:
        """Let go of all."""


@dataclass(frozen=True)
class Plan:
    """The shapes and dtypes of a band's two arrays."""

    sums: Shape
    """Of a whole band; the last one may be shorter."""
    weights: Shape
    dtype: np.dtype[Any]
    weight: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """Of one band."""
        return math.prod(self.sums) * self.dtype.itemsize + math.prod(self.weights) * self.weight.itemsize


class InMemory:
    """Bands that come and go in order."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._bands: dict[int, tuple[Values, Values]] = {}
        self._gone = 0

    def band(self, number: int) -> tuple[Values, Values]:
        assert number >= self._gone, "a sample came to a band that was finished: their order was said to ascend"
        if number not in self._bands:
            plan = self._plan
            self._bands[number] = np.zeros(plan.sums, plan.dtype), np.zeros(plan.weights, plan.weight)
        return self._bands[number]

    def take(self, before: int | None) -> Iterator[tuple[int, Values, Values]]:
        for number in sorted(self._bands):
            if before is None or number < before:
                yield number, *self._bands.pop(number)
        self._gone = max(self._gone, before or 0)

    def close(self) -> None:
        self._bands.clear()


class OnDisk:
    """Bands in a file without a name, mapped: for samples in any order, and for more than memory should hold.

    A band's bytes are asked for before they are touched, so that a full disk is an OSError here, and no SIGBUS; where
    nothing comes, none are taken.
    """

    def __init__(self, plan: Plan, folder: Path, bands: int) -> None:
        """`bands`: how many there will be, if it is known; more make the file grow. Raises OSError."""
        self._plan = plan
        path = folder / f".{os.getpid()}.{id(self):x}.bands"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        path.unlink()
        self._map: mmap.mmap | None = None
        self._touched = np.zeros(0, dtype=bool)
        self._each = -(-plan.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._grow(max(1, bands))

    def _grow(self, bands: int) -> None:
        os.ftruncate(self._fd, bands * self._each)
        self._map = mmap.mmap(self._fd, bands * self._each)  # views keep the one before alive as long as they live
        self._touched = np.concatenate([self._touched, np.zeros(bands - len(self._touched), dtype=bool)])

    def band(self, number: int) -> tuple[Values, Values]:
        if number >= len(self._touched):
            self._grow(max(number + 1, 2 * len(self._touched)))
        if not self._touched[number]:
            self._allocate(number)
            self._touched[number] = True
        return self._views(number)

    def _allocate(self, number: int) -> None:
        """Have room on the disk, where the file system can promise that."""
        try:
            os.posix_fallocate(self._fd, number * self._each, self._each)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def _views(self, number: int) -> tuple[Values, Values]:
        assert self._map is not None
        plan, start = self._plan, number * self._each
        sums = np.frombuffer(self._map, plan.dtype, math.prod(plan.sums), start).reshape(plan.sums)
        after = start + sums.nbytes
        return sums, np.frombuffer(self._map, plan.weight, math.prod(plan.weights), after).reshape(plan.weights)

    def take(self, before: int | None) -> Iterator[tuple[int, Values, Values]]:
        if before is not None:
            return
        for number in np.flatnonzero(self._touched).tolist():
            yield number, *self._views(number)

    def close(self) -> None:
        self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Stitching:
    """The outputs of one name on their way to their places. Not thread-safe."""

    def __init__(
        self, canvas: Canvas, dtype: np.dtype[Any], fill: Any, *, height: int, folder: Path, ordered: bool, memory: int
    ) -> None:
        """`height`: rows of a band; `ordered`: samples ascend, so that bands end; `memory`: what open bands may take.

        Raises ConfigError for whole numbers, of which a mean makes no sense, where samples overlap; OSError where a
        file is needed and the disk has no room.
        """
        self.canvas, self.dtype, self.fill, self.height = canvas, dtype, fill, height
        self._blend = canvas.blends
        if self._blend and dtype.kind not in "fc":
            raise ConfigError(
                f"outputs of {dtype} overlap, and whole numbers can't be blended",
                hint="give floats, such as a score for each class; or stride= as wide as the window",
            )
        self._weighed = tuple(axis.sample is not None for axis in canvas.axes)
        shape = (height, *canvas.shape[1:])
        sums = np.dtype({"f": np.float64, "c": np.complex128}[dtype.kind]) if self._blend else dtype
        weights = tuple(size if own else 1 for size, own in zip(shape, self._weighed, strict=True))
        self._plan = Plan(shape, weights, sums, np.dtype(np.float64 if self._blend else bool))
        self._ordered = ordered and (canvas.layer // height + 2) * self._plan.bytes <= memory
        bands = -(-canvas.shape[0] // height)
        self._sheets: Sheets = InMemory(self._plan) if self._ordered else OnDisk(self._plan, folder, bands)
        self._weight = self._window()
        self._length = canvas.shape[0] if canvas.frames else None

    @property
    def in_memory(self) -> bool:
        """Whether bands are finished while samples still come."""
        return self._ordered

    def _window(self) -> Floats:
        """The weights of one sample's places: of its extent along the axes that have weights, 1 along the others."""
        weight = np.ones((1,) * len(self.canvas.axes))
        for number, axis in enumerate(self.canvas.axes):
            if axis.sample is not None and axis.extent > 1:
                shape = [1] * len(self.canvas.axes)
                shape[number] = axis.extent
                weight = weight * hann(axis.extent).reshape(shape)
        return weight

    def put(self, numbers: Ints, outputs: Values) -> Iterator[Band]:
        """Take in the outputs (B, ...) of these samples; the bands that are finished by them."""
        starts, values = self.canvas.starts(numbers), self.canvas.spread(outputs)
        if self.canvas.stitched:
            for start, value in zip(starts.tolist(), values, strict=True):
                self._put_one(start, value)
        else:
            self._put_places(starts, values)
        if self._ordered and len(numbers):
            before = self.canvas.frontier(int(numbers[-1])) // self.height
            yield from self._finished(before)

    def rest(self, length: int | None = None) -> Iterator[Band]:
        """The other bands, at the end; `length`: rows that there are in the end, of a source that did not tell."""
        self._length = self._length if length is None else length
        yield from self._finished(None)

    def close(self) -> None:
        """Let go of memory and file."""
        self._sheets.close()

    def _put_places(self, starts: Ints, values: Values) -> None:
        """Samples of one place each, which may have axes of their own."""
        count = sum(self._weighed)
        bands = starts[:, 0] // self.height
        rows = values.reshape(len(values), *values.shape[1 + count :])
        for number in np.unique(bands).tolist():
            mine = bands == number
            places = starts[mine, :count].T.copy()
            places[0] -= number * self.height
            sums, weights = self._sheets.band(number)
            sums[tuple(places)] = rows[mine]
            weights[tuple(places)] = True

    def _put_one(self, start: Sequence[int], value: Values) -> None:
        """A sample that covers some places, in as many bands as it reaches."""
        inner = tuple(slice(a, a + n) for a, n in zip(start[1:], value.shape[1:], strict=True))
        own = tuple(cut if mine else slice(None) for cut, mine in zip(inner, self._weighed[1:], strict=True))
        first, last = start[0], start[0] + len(value)
        for number in range(first // self.height, -(-last // self.height)):
            base = number * self.height
            low, high = max(first, base), min(last, base + self.height)
            rows, cut = slice(low - base, high - base), slice(low - first, high - first)
            sums, weights = self._sheets.band(number)
            if not self._blend:
                sums[(rows, *inner)] = value[cut]
                weights[(rows, *own)] = True
                continue
            weight = self._weight[cut] if len(self._weight) > 1 else self._weight
            sums[(rows, *inner)] += value[cut] * weight
            weights[(rows, *own)] += weight

    def _finished(self, before: int | None) -> Iterator[Band]:
        for number, sums, weights in self._sheets.take(before):
            start = number * self.height
            rows = self.height if self._length is None else min(self.height, max(0, self._length - start))
            yield self._band(start, sums[:rows], weights[:rows])

    def _band(self, start: int, sums: Values, weights: Values) -> Band:
        there = weights > 0
        missing = not bool(there.all())
        if not self._blend:
            values = np.where(there, sums, self.dtype.type(self.fill)) if missing else sums
            return Band(start, values, missing)
        result = np.full(sums.shape, self.fill, dtype=sums.dtype)
        np.divide(sums, weights, out=result, where=np.broadcast_to(there, sums.shape))
        return Band(start, result.astype(self.dtype), missing)
