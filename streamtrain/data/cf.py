"""What the CF conventions say of an array: packed numbers, and values that stand for missing ones. Pure.

Its law: the result has the dtype and the values that xarray gives for the same store, missing ones as NaN. Only
`scale_factor`, `add_offset`, `_FillValue`, `missing_value` and `_Unsigned` are applied; times stay numbers. (Two
differ: a whole scale_factor alone gives float64 here, int64 in xarray, which then has no place for NaN; and `_Unsigned`
wraps `missing_value` too.)
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamtrain.data.layout import ArrayLayout
from streamtrain.errors import DataError

PACKING = ("scale_factor", "add_offset")
MISSING = ("missing_value", "_FillValue")


@dataclass(frozen=True)
class Packing:
    """How stored numbers become values: NaN where they equal one of `missing`, then `x * scale + offset`."""

    stored: np.dtype[Any]
    """What the stored bytes are taken for (`_Unsigned` may differ from the array's dtype), in native byte order."""
    dtype: np.dtype[Any]
    """Of the values."""
    scale: float | None = None
    offset: float | None = None
    missing: tuple[float, ...] = ()

    def __str__(self) -> str:
        parts = [f"as {self.stored}"] if self.stored.kind == "u" else []
        parts += [f"* {self.scale!r}"] if self.scale is not None else []
        parts += [f"+ {self.offset!r}"] if self.offset is not None else []
        parts += [f"NaN for {', '.join(map(repr, self.missing))}"] if self.missing else []
        return f"{' '.join(parts)} ({self.dtype})"


def packing(layout: ArrayLayout) -> Packing | None:
    """What the array's attributes ask for; None where they ask for nothing.

    Raises DataError where they are no numbers.
    """
    attributes, dtype = layout.attributes, layout.native
    if dtype.kind not in "iuf":
        return None
    scale, offset = (_number(layout, attributes, name) for name in PACKING)
    stored, named = _stored(attributes, dtype), False
    missing: list[float] = []
    for name in MISSING:
        values = _missing(layout, name)
        found = [value for value in values if not math.isnan(value)]
        named |= bool(found) or (bool(values) and dtype.kind == "f")
        missing += [_as_stored(value, dtype, stored) for value in found if value not in missing]
    if scale is None and offset is None:
        if not missing and stored == dtype:
            return None
        result = _promoted(stored) if missing else stored
    elif named and not missing:  # a float array whose missing values are NaN already stays as it is
        result = stored
    else:
        result = np.dtype(np.float64)  # JSON's numbers are Python's own: xarray takes them for float64
    return Packing(stored, result, scale, offset, tuple(missing))


def _stored(attributes: Mapping[str, Any], dtype: np.dtype[Any]) -> np.dtype[Any]:
    unsigned = attributes.get("_Unsigned")
    if dtype.kind == "i" and unsigned == "true":
        return np.dtype(f"u{dtype.itemsize}")
    if dtype.kind == "u" and unsigned == "false":
        return np.dtype(f"i{dtype.itemsize}")
    return dtype


def _as_stored(value: float, dtype: np.dtype[Any], stored: np.dtype[Any]) -> float:
    """A missing value as the numbers that it is compared with; `_Unsigned` wraps it as it wraps them."""
    if stored == dtype or not isinstance(value, int):
        return value
    bits = value % (1 << 8 * stored.itemsize)
    return bits - (1 << 8 * stored.itemsize) if stored.kind == "i" and bits >> 8 * stored.itemsize - 1 else bits


def _promoted(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The least float in which all its numbers and NaN have a place."""
    if dtype.kind == "f":
        return dtype
    return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


def _number(layout: ArrayLayout, attributes: Mapping[str, Any], name: str) -> float | None:
    value: object = attributes.get(name)
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    if isinstance(value, np.number):
        value = value.item()
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    raise DataError(
        f"array {layout.name!r}: its attribute {name} is {value!r}, not a finite number",
        hint="correct the attribute, or give decode_cf=False",
    )


def _missing(layout: ArrayLayout, name: str) -> list[float]:
    value = layout.attributes.get(name)
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [_one_missing(layout, name, each) for each in values]


def _one_missing(layout: ArrayLayout, name: str, value: object) -> float:
    """A number; in Zarr 3 xarray writes floats as base64 of eight bytes, and JSON has no NaN of its own."""
    if isinstance(value, np.number):
        value = value.item()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return struct.unpack("<d", base64.b64decode(value, validate=True))[0] if len(value) == 12 else float(value)
        except (ValueError, struct.error):
            pass
    raise DataError(
        f"array {layout.name!r}: its attribute {name} is {value!r}, not a number",
        hint="correct the attribute, or give decode_cf=False",
    )
