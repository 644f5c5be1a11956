"""Coordinates as they are stored, to be written beside something else: values, dimensions, attributes.

Its law: nothing is decoded, so that whoever opens the copy sees what the source says (times of several stores are
counted from one date, as the first says); what can be held against a manifest is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.columns import names_beside, texts, whole
from streamtrain.data.layout import trainable
from streamtrain.data.opening import Located, array_at, check_whole, open_arrays
from streamtrain.data.times import counted_since, is_since
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import DataError

logger = logging.getLogger(__name__)

OWN = ("streamtrain", "_ARRAY_DIMENSIONS")
"""Attributes that tell of an array's files or its format, not of its values."""
PACKED = frozenset({"scale_factor", "add_offset", "_FillValue", "missing_value"})
"""Attributes that make other values of the stored numbers."""


@dataclass(frozen=True)
class Stored:
    """An array as it is stored, whole."""

    values: NDArray[Any]
    dims: tuple[str | None, ...]
    attributes: Mapping[str, Any]


async def read_stored(
    where: Located, name: str, beside: str, *, loop: ZarrLoop, timeout: float, retries: int
) -> Stored | None:
    """The array of this name in the group of the array `beside`, or at the root; None without one. Any dtype that zarr
    knows: texts come as objects. Raises DataError where it can't be read."""
    for found in names_beside(where, name, beside):
        array = await array_at(where, found)
        if array is None or not array.shape:
            continue
        check_whole(where, array, found)
        attributes = {key: value for key, value in array.metadata.attributes.items() if key not in OWN}
        if not trainable(array.dtype):
            values = await texts(where, found, array)
            return Stored(values, _dims(array), attributes)
        opened = (await open_arrays(where, [found], io="auto", loop=loop, timeout=timeout, retries=retries))[found]
        opened.reader.vouch("once")
        values = await asyncio.get_running_loop().run_in_executor(None, whole, opened)  # the private loop's own threads
        return Stored(values, _dims(array), attributes)
    return None


def _dims(array: Any) -> tuple[str | None, ...]:
    names = getattr(array.metadata, "dimension_names", None) or array.metadata.attributes.get("_ARRAY_DIMENSIONS")
    if isinstance(names, list | tuple) and len(names) == len(array.shape):
        return tuple(names)
    return (None,) * len(array.shape)


def counted_alike(stored: Stored, first: Stored, name: str) -> Stored:
    """The same times as numbers of the units of `first`, where these alone differ among their attributes and numbers of
    this dtype tell them: each year of a series has a date of its own to count from. Else `stored` as it is."""
    units, since = stored.attributes.get("units"), first.attributes.get("units")
    alike = {**stored.attributes, "units": since} == {**first.attributes, "units": since}
    if units == since or not alike or not (is_since(units) and is_since(since)) or PACKED & stored.attributes.keys():
        return stored
    if stored.values.dtype.kind not in "iuf":
        return stored
    try:
        made = counted_since(stored.values, str(units), str(since), stored.attributes.get("calendar"), name)
    except DataError as error:
        logger.warning("coordinate %s of another store counts from another date: %s", name, error)
        return stored
    return stored if made is None else Stored(made, stored.dims, first.attributes)


def as_texts(values: NDArray[Any]) -> NDArray[Any]:
    """Texts as Python's own strings, which Zarr 3 has a dtype for; all else as it is."""
    if values.dtype.kind not in "USTO":
        return values
    return np.array([str(value) for value in values.reshape(-1)], dtype=object).reshape(values.shape)
