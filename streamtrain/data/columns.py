"""Small arrays that are read whole when a stream opens: labels of samples, and coordinates along axes.

Its law: they may be of any dtype that zarr knows, also texts and times, which can't be trained on; what can be goes
through the same readers, and is held against the same manifests, as the data.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.budget import format_bytes
from streamtrain.data.cf import Packing, packing
from streamtrain.data.layout import ArrayLayout, trainable
from streamtrain.data.opening import Located, OpenArray, array_at, open_arrays
from streamtrain.data.readers import Scratch, ZarrLoop
from streamtrain.data.selecting import Coordinate
from streamtrain.data.times import decode_times, is_since
from streamtrain.data.trust import Verify
from streamtrain.errors import DataError

Values = NDArray[Any]
LABELS = "MmSUTO"
"""Kinds of dtypes that label samples and axes, and are no numbers."""
MOST_BYTES = 4 << 30
"""A coordinate is no larger."""


@dataclass(frozen=True)
class Labels:
    """An array that was read whole."""

    name: str
    values: Values
    attributes: Mapping[str, Any]


async def read_labels(where: Located, names: Sequence[str]) -> dict[str, Labels]:
    """Those of these arrays that hold texts or times, by name. Raises DataError for one that can't be read."""
    found: dict[str, Labels] = {}
    for name in dict.fromkeys(names):
        array = await array_at(where, name)
        if array is not None and not trainable(array.dtype) and array.dtype.kind in LABELS:
            found[name] = await _texts(where, name, array)
    return found


async def _texts(where: Located, name: str, array: Any) -> Labels:
    try:
        values = np.asarray(await array.getitem(Ellipsis))
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
    return Labels(name, values, dict(array.metadata.attributes))


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
        beside = next((array.layout.name for array in arrays.values() if dim in array.layout.dims), None)
        if beside is not None:
            known = await read_coordinate(
                where, dim, beside, loop=loop, timeout=timeout, retries=retries, verify=verify
            )
            if known is not None:
                found[dim] = known
    return found


async def read_coordinate(
    where: Located, dim: str, beside: str, *, loop: ZarrLoop, timeout: float, retries: int, verify: Verify
) -> Coordinate | None:
    """The 1-D array named as a dimension, in the group of the array `beside` or at the root; None without one.

    Its values are numbers (unpacked as CF says), times (datetime64) or texts. Raises DataError where it can't be used.
    """
    group = beside.removeprefix(f"{where.path}/").rpartition("/")[0]
    for name in dict.fromkeys([f"{group}/{dim}" if group else dim, dim]):
        array = await array_at(where, name)
        if array is None or len(array.shape) != 1:
            continue
        if array.shape[0] * max(1, array.dtype.itemsize) > MOST_BYTES:
            raise DataError(f"the coordinate {name!r} has {array.shape[0]} values, over {format_bytes(MOST_BYTES)}")
        if not trainable(array.dtype):
            column = await _texts(where, name, array)
            return Coordinate(dim, column.values)
        opened = (await open_arrays(where, [name], io="auto", loop=loop, timeout=timeout, retries=retries))[name]
        opened.reader.vouch(verify)
        values = await asyncio.get_running_loop().run_in_executor(None, whole, opened)  # the private loop's own threads
        return Coordinate(dim, _decoded(opened.layout, values))
    return None


def _decoded(layout: ArrayLayout, values: Values) -> Values:
    packed = packing(layout)
    if packed is not None:
        values = _unpacked(values, packed)
    units = layout.attributes.get("units")
    if isinstance(units, str) and is_since(units):
        return decode_times(values, units, layout.attributes.get("calendar"), layout.name)
    return values


def _unpacked(values: Values, packed: Packing) -> Values:
    stored = values.view(packed.stored) if packed.stored.kind != values.dtype.kind else values
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
