"""From stored numbers to those that a model is given: decode_cf, then normalize, then the cast, in our threads.

Its law: rows are changed tile by tile between the decoded chunk and their places in the block, so that each is read
and written once, and a tile's intermediate numbers never leave the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.cf import Packing, packing
from streamtrain.data.feed import Part, Put, Rows
from streamtrain.data.layout import ArrayLayout
from streamtrain.data.permutation import Ints, derive_key
from streamtrain.data.reading import Scratch
from streamtrain.errors import ConfigError, DataError

TILE_BYTES = 128 << 10
"""Of a tile's widest form; a row that is larger is one tile."""
BUFFERS = 3
"""Tiles that a thread keeps: unpacked, their missing places, normalised."""
Normalize = str | Mapping[str, Any]

SHOWN = 120
"""Characters of figures that a position shows; longer ones as a digest."""


@dataclass(frozen=True)
class Normalization:
    """`(x - mean) / std` of one array; both broadcast against its rows."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def undo(self, values: Any) -> Any:
        """Values as they were, from normalised ones (arrays or tensors of rows)."""
        return values * self.std + self.mean

    def __str__(self) -> str:
        text = f"{self.mean.reshape(-1).tolist()} {self.std.reshape(-1).tolist()} {self.mean.shape}"
        return text if len(text) <= SHOWN else f"digest {derive_key(text):016x}"


@dataclass(frozen=True)
class Change:
    """What is done to the rows of one array on their way into the block."""

    packing: Packing | None
    normal: Normalization | None
    dtype: np.dtype[Any]
    """Of the result."""
    row_shape: tuple[int, ...]

    @cached_property
    def _work(self) -> np.dtype[Any]:
        """In which a mean is taken off: a large number of float64 or int32 keeps its small differences."""
        source = self.packing.dtype if self.packing is not None else None
        wide = self.dtype.itemsize == 8 or (source is not None and source.itemsize == 8)
        return np.dtype(np.float64 if wide else np.float32)

    @property
    def plain(self) -> bool:
        """Whether nothing is done but a cast, which the block does while it copies."""
        return self.packing is None and self.normal is None

    @property
    def scratch_bytes(self) -> int:
        """Bytes that one thread takes for it."""
        return BUFFERS * max(TILE_BYTES, math.prod(self.row_shape) * max(8, self.dtype.itemsize))

    def on(self, taken: Mapping[int, Ints], row_axes: Sequence[int], row_shape: tuple[int, ...]) -> Change:
        """The same where some places of an axis are taken only, or a window moves over it: then one figure serves."""
        normal = self.normal
        if normal is not None:
            figures = []
            for each in (normal.mean, normal.std):
                for k, axis in enumerate(row_axes):
                    if axis in taken and each.shape[k] > 1:
                        each = each.take(taken[axis], axis=k)
                    if each.shape[k] not in (1, row_shape[k]):
                        raise ConfigError(
                            f"normalize= has {each.shape[k]} figures along axis {axis}, along which samples move",
                            hint="give one figure, or one for each entry of another axis",
                        )
                figures.append(each)
            normal = Normalization(*figures)
        return replace(self, normal=normal, row_shape=row_shape)

    def around(self, put: Put, scratch: Scratch) -> Put:
        """A `put` that changes values, and hands tiles of them to this one."""

        def change(wanted: Rows, values: NDArray[Any], part: Part | None) -> None:
            normal = self._part(values.dtype, values.shape, part)
            widest = max(8, self.dtype.itemsize) * math.prod(values.shape[1:])
            step = max(1, TILE_BYTES // max(1, widest))
            for start in range(0, len(values), step):
                tile = values[start : start + step]
                put(_rows(wanted, start, start + len(tile)), self._changed(tile, normal, scratch), part)

        return change

    def _changed(
        self, tile: NDArray[Any], normal: tuple[NDArray[Any], NDArray[Any]] | None, scratch: Scratch
    ) -> NDArray[Any]:
        if self.packing is not None:
            tile = _unpacked(tile, self.packing, scratch)
        if normal is None:
            return tile  # the block casts while it copies
        mean, std = normal
        work = _buffer(scratch, "normalised", tile.shape, mean.dtype)
        np.subtract(tile, mean, out=work, casting="same_kind")
        np.divide(work, std, out=work)
        return work

    def _part(
        self, dtype: np.dtype[Any], shape: tuple[int, ...], part: Part | None
    ) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Mean and deviation for these columns of the rows, in the dtype that is worked in."""
        if self.normal is None:
            return None
        wide = dtype.itemsize >= 8 or (dtype.kind in "iu" and dtype.itemsize >= 4)
        work = np.dtype(np.float64) if wide and self.packing is None else self._work
        mean, std = self.normal.mean, self.normal.std
        if part is not None:
            cut = tuple(
                each if size > 1 else slice(None)
                for each, size in zip(part[len(part) - mean.ndim :], mean.shape, strict=True)
            )
            mean, std = mean[cut], std[cut]
        return mean.astype(work), std.astype(work)


def _unpacked(tile: NDArray[Any], packing: Packing, scratch: Scratch) -> NDArray[Any]:
    values = _buffer(scratch, "unpacked", tile.shape, packing.dtype)
    tile = _as_stored(tile, packing.stored)
    np.copyto(values, tile, casting="unsafe")
    if packing.missing:
        missing = _buffer(scratch, "missing", tile.shape, np.dtype(bool))
        for number in packing.missing:
            np.equal(tile, number, out=missing)
            if missing.any():
                np.copyto(values, np.nan, where=missing)
    if packing.scale is not None:
        np.multiply(values, packing.scale, out=values)
    if packing.offset is not None:
        np.add(values, packing.offset, out=values)
    return values


def _as_stored(tile: NDArray[Any], stored: np.dtype[Any]) -> NDArray[Any]:
    if tile.dtype.kind == stored.kind:
        return tile
    return tile.view(stored.newbyteorder(tile.dtype.byteorder))


def _buffer(scratch: Scratch, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    return scratch.take(name, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def _rows(wanted: Rows, start: int, stop: int) -> Rows:
    if isinstance(wanted, slice):
        first = wanted.start or 0
        return slice(first + start, first + stop)
    return wanted[start:stop]


def normalization(layout: ArrayLayout, given: object, row_axes: tuple[int, ...]) -> Normalization:
    """The figures of one array: `given` is "stats", or (mean, std), or (mean, std, axis).

    Raises DataError where "stats" are not there, ConfigError for figures that do not fit the array's rows.
    """
    name = layout.name
    mean, std, axis = _stats(layout) if given == "stats" else _given(layout, given)
    figures = [_fitting(layout, what, value, axis, row_axes) for what, value in (("mean", mean), ("std", std))]
    mean_, std_ = np.broadcast_arrays(*figures)
    if not (np.isfinite(mean_).all() and np.isfinite(std_).all() and (std_ > 0).all()):
        raise ConfigError(
            f"normalize= of array {name!r}: a mean of {_shown(mean)} with a std of {_shown(std)}",
            hint="each must be finite and std above 0; give normalize={name: (mean, std)} with 1 for what is constant",
        )
    return Normalization(np.array(mean_, dtype=np.float64), np.array(std_, dtype=np.float64))


def _stats(layout: ArrayLayout) -> tuple[object, object, int | None]:
    own = layout.attributes.get("streamtrain")
    stats = own.get("stats") if isinstance(own, Mapping) else None
    if not isinstance(stats, Mapping) or "mean" not in stats or "std" not in stats:
        raise DataError(
            f'normalize="stats": array {layout.name!r} has no statistics among its attributes',
            hint="`python -m data_tools stats STORE` computes and writes them; or give {name: (mean, std)}",
        )
    axis = stats.get("axis")
    if isinstance(axis, list) and len(axis) == 1:
        axis = axis[0]
    return stats["mean"], stats["std"], axis if isinstance(axis, int) and not isinstance(axis, bool) else None


def _given(layout: ArrayLayout, given: object) -> tuple[object, object, int | None]:
    name = layout.name
    if not isinstance(given, list | tuple) or len(given) not in (2, 3):
        raise ConfigError(
            f"normalize= of array {name!r} must be (mean, std) or (mean, std, axis), not {given!r:.80}",
            hint="normalize={'t2m': (280.0, 20.0)}",
        )
    axis = given[2] if len(given) == 3 else None
    if isinstance(axis, str) and layout.dims.count(axis) == 1:
        axis = layout.dims.index(axis)
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
        there = ", ".join(repr(dim) for dim in layout.dims if dim) or "no names"
        raise ConfigError(
            f"normalize= of array {name!r}: its axis must be the number or the name of an axis, not {axis!r}",
            hint=f"its {layout.ndim} axes have {there}: normalize={{{name!r}: (mean, std, 1)}}",
        )
    return given[0], given[1], axis


def _fitting(
    layout: ArrayLayout, what: str, value: Any, axis: int | None, row_axes: tuple[int, ...]
) -> NDArray[np.float64]:
    """The figures with as many axes as a row has, each of its length or 1."""
    try:
        figures = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"normalize= of array {layout.name!r}: its {what} is {value!r:.80}, no numbers") from error
    row = tuple(layout.shape[a] for a in row_axes)
    if figures.ndim == 1 and figures.size != 1:
        return _along(layout, what, figures, axis, row_axes)
    shape = (1,) * (len(row) - figures.ndim) + figures.shape
    if figures.size == 1:
        return figures.reshape((1,) * len(row))
    if len(shape) != len(row) or any(own not in (1, length) for own, length in zip(shape, row, strict=True)):
        raise ConfigError(
            f"normalize= of array {layout.name!r}: its {what} of shape {figures.shape} fits no row of shape {row}",
            hint="give numbers, or one for each entry of one axis",
        )
    return figures.reshape(shape)


def _along(
    layout: ArrayLayout, what: str, figures: NDArray[np.float64], axis: int | None, row_axes: tuple[int, ...]
) -> NDArray[np.float64]:
    """One figure for each entry of one axis: the one that is named, or the only one of that length."""
    fitting = [a for a in row_axes if layout.shape[a] == len(figures) and axis in (None, a, a - layout.ndim)]
    if len(fitting) != 1:
        axes = ", ".join(f"{a} (of length {layout.shape[a]})" for a in row_axes) or "none"
        raise ConfigError(
            f"normalize= of array {layout.name!r}: its {what} has {len(figures)} figures, "
            f"{'and several axes are' if fitting else 'and no axis of a row is'} of that length"
            + (f" (axis {axis} was named)" if axis is not None else ""),
            hint=f"the axes of a row are {axes}; name one: (mean, std, axis)",
        )
    return figures.reshape([-1 if a == fitting[0] else 1 for a in row_axes])


def _shown(figures: object) -> str:
    text = str(figures)
    return text if len(text) < 60 else f"{text[:57]}..."


def check_normalize(normalize: object) -> Normalize | None:
    """Raise ConfigError for what can't be `normalize=`."""
    if normalize is None or (isinstance(normalize, str) and normalize == "stats"):
        return normalize
    if isinstance(normalize, Mapping) and normalize and all(isinstance(name, str) for name in normalize):
        return normalize
    raise ConfigError(
        f"normalize must be 'stats' or {{name: (mean, std)}}, not {normalize!r:.80}",
        hint="normalize='stats', or normalize={'t2m': (280.0, 20.0)}",
    )


@dataclass(frozen=True)
class Wishes:
    """What a stream's keywords ask of its arrays' numbers."""

    decode_cf: bool
    normalize: Normalize | None
    dtype: np.dtype[Any] | Mapping[str, np.dtype[Any]] | None

    def check(self, names: Sequence[str]) -> None:
        """Raise ConfigError where a keyword names an array that the stream does not have."""
        for keyword, given in (("dtype", self.dtype), ("normalize", self.normalize)):
            if isinstance(given, Mapping) and (unknown := sorted(given.keys() - set(names))):
                raise ConfigError(f"{keyword}= names {', '.join(unknown)}; the stream has {', '.join(names)}")

    def change(self, name: str, layout: ArrayLayout, row_axes: tuple[int, ...], *, is_input: bool) -> Change:
        """What is done to one array; its dtype is that of the batch.

        Raises DataError for attributes that can't be used, ConfigError for keywords that do not fit the array.
        """
        packed = packing(layout) if self.decode_cf else None
        given: object = None
        if isinstance(self.normalize, Mapping):
            given = self.normalize.get(name)
        elif is_input:
            given = self.normalize
        normal = None if given is None else normalization(layout, given, row_axes)
        own = layout.native if packed is None else packed.dtype
        if normal is not None:
            if own.kind == "c":
                raise ConfigError(f"normalize= of array {name!r}: it is {own}, and only real numbers are normalised")
            own = np.dtype(np.float32)
        dtype = self._cast(name, own, is_input)
        if dtype.kind != "f" and (normal is not None or (packed is not None and packed.missing and dtype.kind != "c")):
            why = "it is normalised" if normal is not None else "missing values become NaN (decode_cf)"
            raise ConfigError(
                f"dtype= of array {name!r} is {dtype}, but {why}", hint="give a float dtype, or turn the other off"
            )
        if layout.dtype.kind == "c" and dtype.kind != "c":
            raise ConfigError(
                f"array {name!r} is {layout.native}: a cast to {dtype} would drop its imaginary part",
                hint="leave dtype= out, or take the part that you want in a transform",
            )
        return Change(packed, normal, dtype, tuple(layout.shape[a] for a in row_axes))

    def _cast(self, name: str, own: np.dtype[Any], is_input: bool) -> np.dtype[Any]:
        if isinstance(self.dtype, Mapping):
            return self.dtype.get(name, own)
        if self.dtype is None:
            return own
        return self.dtype if is_input or own.kind == self.dtype.kind else own
