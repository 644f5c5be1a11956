"""Small arrays that are read whole when a stream opens: labels of samples, and coordinates along axes.

Its law: they may be of any dtype that zarr knows, also texts and times, which can't be trained on; what can be goes
through the same readers, and is held against the same manifests, as the data.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.cf import Packing, packing
from streamtrain.data.layout import ArrayLayout, trainable
from streamtrain.data.opening import Located, OpenArray, array_at, check_whole, open_arrays
from streamtrain.data.reading import Scratch
from streamtrain.data.selecting import Coordinate
from streamtrain.data.times import NOT_A_TIME, decode_times, is_since
from streamtrain.data.trust import Verify
from streamtrain.data.zarr_codecs import within_bounds
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import DataError, EnvironmentProblem

Values = NDArray[Any]
LABELS = "MmSUTO"
"""Kinds of dtypes that label samples and axes, and are no numbers."""


@dataclass(frozen=True)
class Labels:
    """An array of texts or times, which is read once its shape is known to be right."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Values]
    """Give all its values. Blocks: off the event loop. Raises DataError, or EnvironmentProblem where it hangs."""


async def open_labels(where: Located, names: Sequence[str], *, timeout: float) -> dict[str, Labels]:
    """Those of these arrays that hold texts or times, by name; they are read on loops of their own."""
    found: dict[str, Labels] = {}
    for name in dict.fromkeys(names):
        array = await array_at(where, name)
        if array is not None and not trainable(array.dtype) and array.dtype.kind in LABELS:
            found[name] = Labels(name, array.shape, partial(_read, where, name, array, timeout))
    return found


def _read(where: Located, name: str, array: Any, timeout: float) -> Values:
    loop = ZarrLoop()
    try:
        return loop.run(texts(where, name, array), timeout)
    except TimeoutError:
        raise EnvironmentProblem(
            f"{where.name}: array {name!r} was not read within {timeout:g} s",
            hint="check the storage, or raise read_timeout",
        ) from None
    finally:
        loop.close()


async def texts(where: Located, name: str, array: Any) -> Values:
    """All values of an array of texts or times. Raises DataError."""
    check_whole(where, array, name)
    try:
        values = np.asarray(await within_bounds(array).getitem(Ellipsis))
    except Exception as error:
        if isinstance(error, asyncio.CancelledError):
            raise
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(
            f"{where.name}: array {name!r} can't be read: {cause}", hint="restore it, or convert the data again"
        ) from error
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "backslashreplace")
    if values.dtype.kind == "O":
        values = np.array([str(value) for value in values.reshape(-1)], dtype=object).reshape(values.shape)
    return values


async def read_coordinates(
    where: Located,
    arrays: Mapping[str, OpenArray],
    dims: Sequence[str],
    *,
    loop: ZarrLoop,
    timeout: float,
    retries: int,
    verify: Verify,
) -> dict[str, Coordinate]:
    """The coordinates of those of these dimensions that have any, by dimension; as `read_coordinate` says."""
    found: dict[str, Coordinate] = {}
    for dim in dims:
        beside = next((array.layout for array in arrays.values() if dim in array.layout.dims), None)
        if beside is not None:
            known = await read_coordinate(
                where,
                dim,
                beside.shape[beside.dims.index(dim)],
                beside.name,
                loop=loop,
                timeout=timeout,
                retries=retries,
                verify=verify,
            )
            if known is not None:
                found[dim] = known
    return found


def names_beside(where: Located, name: str, beside: str) -> list[str]:
    """Where an array of this name may lie: in the group of the array `beside`, then at the root."""
    group = beside.removeprefix(f"{where.path}/").rpartition("/")[0]
    return list(dict.fromkeys([f"{group}/{name}" if group else name, name]))


async def read_coordinate(
    where: Located, dim: str, length: int, beside: str, *, loop: ZarrLoop, timeout: float, retries: int, verify: Verify
) -> Coordinate | None:
    """The 1-D array named as a dimension, in the group of the array `beside` or at the root; None without one.

    Its values are numbers (unpacked as CF says), times (datetime64) or texts. Raises DataError where it can't be used,
    or has not the dimension's length.
    """
    for name in names_beside(where, dim, beside):
        array = await array_at(where, name)
        if array is None or len(array.shape) != 1:
            continue
        if array.shape[0] != length:
            raise DataError(
                f"{where.name}: the coordinate array {name!r} has {array.shape[0]} values for {length} places",
                hint="correct it, or rename it: an array named as a dimension tells its places' values",
            )
        if not trainable(array.dtype):
            return Coordinate(dim, await texts(where, name, array))
        check_whole(where, array, name)
        opened = (await open_arrays(where, [name], io="auto", loop=loop, timeout=timeout, retries=retries))[name]
        opened.reader.vouch(verify)
        values = await asyncio.get_running_loop().run_in_executor(None, whole, opened)  # the private loop's own threads
        return Coordinate(dim, _decoded(opened.layout, values))
    return None


def _decoded(layout: ArrayLayout, values: Values) -> Values:
    packed, units = packing(layout), layout.attributes.get("units")
    if not isinstance(units, str) or not is_since(units):
        return values if packed is None else _unpacked(values, packed)
    calendar = layout.attributes.get("calendar")
    if packed is None or packed.stored.kind == "f" or packed.scale is not None or packed.offset is not None:
        return decode_times(values if packed is None else _unpacked(values, packed), units, calendar, layout.name)
    counts = _stored(values, packed).copy()  # not as floats: they have no place for nanoseconds
    gone = np.logical_or.reduce([counts == number for number in packed.missing], initial=False)
    counts[gone] = 0
    times = decode_times(counts, units, calendar, layout.name)
    times.view(np.int64)[gone] = NOT_A_TIME
    return times


def _stored(values: Values, packed: Packing) -> Values:
    return values.view(packed.stored) if packed.stored.kind != values.dtype.kind else values


def _unpacked(values: Values, packed: Packing) -> Values:
    stored = _stored(values, packed)
    result = stored.astype(packed.dtype)
    for number in packed.missing:
        result[stored == number] = np.nan
    if packed.scale is not None:
        result = result * packed.scale
    if packed.offset is not None:
        result = result + packed.offset
    return result


def whole(array: OpenArray) -> Values:
    """All values of an array. Blocks: off the event loop. Raises DataError."""
    layout, scratch = array.layout, Scratch()
    result = np.empty(layout.shape, dtype=layout.native)
    grid = [range(-(-s // c)) for s, c in zip(layout.shape, layout.chunk_shape, strict=True)]
    for chunk in itertools.product(*grid):
        box = layout.box(chunk)
        place = tuple(slice(a, b) for a, b in box)
        data = array.reader.read(chunk, (0, layout.chunk_shape[0]), scratch)
        inside = tuple(slice(0, b - a) for a, b in box)
        result[place] = layout.fill_value if data is None else data[inside]
    return result
