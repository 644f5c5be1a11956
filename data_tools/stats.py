"""Mean, deviation, extremes and quantiles of arrays, into their attributes: `stats`.

Law: one pass, bounded memory, and the numbers of the whole: NaN and infinities are counted and left out, and the error
that quantiles may have is written beside them. Means and deviations are merged band by band as Chan, Golub and LeVeque
1983 do ("Algorithms for computing the sample variance"), in float64, which loses nothing where the mean is large.
"""

from __future__ import annotations

import base64
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.convert import Progress
from data_tools.sketch import Sketch
from data_tools.source import Source, SourceArray
from streamtrain.data.budget import format_bytes, parse_bytes
from streamtrain.data.manifest import fsync
from streamtrain.errors import ConfigError

SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
LEVELS = 28
"""Buffers of a sketch for 10^12 numbers."""
LARGEST, SMALLEST = 1 << 14, 64
"""Numbers in a buffer of a sketch: an error of at most 0.05 %, and of at most 20 %, of 10^9 numbers."""

Floats = NDArray[np.float64]


@dataclass
class Moments:
    """Of each channel: how many finite numbers, their mean, the sum of squares about it, the extremes."""

    count: Floats
    mean: Floats
    squares: Floats
    least: Floats
    most: Floats
    nan: int = 0
    infinite: int = 0

    @classmethod
    def none(cls, channels: int) -> Moments:
        """Of nothing yet."""
        zero, high = np.zeros(channels), np.full(channels, np.inf)
        return cls(zero, zero.copy(), zero.copy(), high, -high)

    def add(self, values: Floats, finite: NDArray[np.bool_]) -> None:
        """Take in a band, (channels, n)."""
        if not values.size:
            return
        self.nan += int(np.isnan(values).sum())
        self.infinite += int(np.isinf(values).sum())
        count = finite.sum(axis=1).astype(np.float64)
        some = np.maximum(count, 1)
        mean = np.where(finite, values, 0.0).sum(axis=1) / some
        squares = np.square(np.where(finite, values - mean[:, None], 0.0)).sum(axis=1)
        both = np.maximum(self.count + count, 1)
        apart = mean - self.mean
        self.mean = self.mean + apart * count / both
        self.squares = self.squares + squares + np.square(apart) * self.count * count / both
        self.count = self.count + count
        self.least = np.minimum(self.least, np.where(finite, values, np.inf).min(axis=1))
        self.most = np.maximum(self.most, np.where(finite, values, -np.inf).max(axis=1))


def stats(
    store: str | Path,
    *,
    arrays: Sequence[str] | None = None,
    axis: int | None = None,
    rows: tuple[float, float] = (0.0, 1.0),
    decode_cf: bool = True,
    memory: str | int = "1GiB",
    write: bool = True,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Statistics of the arrays named (all that hold real numbers), by name; `write` puts them into the attributes.

    There they are `streamtrain.stats`: `mean`, `std` (of the population), `min`, `max`, `count` (of finite numbers),
    `quantiles` (by share), `quantile_error` (of a rank, as a share of the count; 0: exact), `nan`, `infinite`, `rows`,
    `decoded` and `axis`. With `axis`, each but the last is a list along that axis of the array; null where a channel
    has no finite number. `rows`: the part of axis 0 that counts, as two fractions: that which will be trained on.
    `decode_cf`: `_FillValue` and `missing_value` count as NaN, then `scale_factor` and `add_offset` are applied.
    Raises ConfigError for names, axes or memory that do not fit, DataError for damage.
    """
    limit = parse_bytes(memory)
    if not 0 <= rows[0] < rows[1] <= 1:
        raise ConfigError(f"rows={rows} must be two fractions 0 <= a < b <= 1")
    with Source(Path(store), only=arrays or None) as source:
        chosen = [_one(source, name) for name in arrays] if arrays else list(_real(source))
        found = {}
        for done, array in enumerate(chosen, 1):
            found[array.layout.name] = _of(array, axis, rows, decode_cf, limit)
            if write:
                write_stats(Path(store), array.layout.name, found[array.layout.name])
            if progress:
                progress(done, len(chosen))
    return found


def _one(source: Source, name: str) -> SourceArray:
    if name in source.others:
        raise source.others[name].why
    if name not in source.arrays:
        raise ConfigError(f"{source.path} has no array {name!r}", hint=f"there are: {', '.join(source.arrays)}")
    if source.arrays[name].layout.dtype.kind == "c":
        raise ConfigError(f"array {name!r} is complex: it has no order", hint="take its parts first")
    return source.arrays[name]


def _real(source: Source) -> Iterator[SourceArray]:
    return (array for array in source.arrays.values() if array.layout.dtype.kind != "c")


def _of(
    array: SourceArray, axis: int | None, rows: tuple[float, float], decode_cf: bool, memory: int
) -> dict[str, Any]:
    layout = array.layout
    if axis is not None and not 0 < axis < layout.ndim:
        raise ConfigError(f"axis={axis}: array {layout.name!r} has axes 1 to {layout.ndim - 1} beside that of samples")
    channels = 1 if axis is None else layout.shape[axis]
    size = min(LARGEST, memory // 4 // (8 * LEVELS * max(1, channels)))
    if size < SMALLEST:
        least = 4 * 8 * LEVELS * SMALLEST * channels
        raise ConfigError(
            f"memory={format_bytes(memory)} is too small for the quantiles of {channels} channels of {layout.name!r}",
            hint=f"memory={-(-least // 2**20)}MiB",
        )
    moments, sketches = Moments.none(channels), [Sketch(size) for _ in range(channels)]
    read = decoding(array.node.attrs) if decode_cf else None
    for band in _bands(array, rows, memory // 2):
        values = read(band) if read is not None else band.astype(np.float64)
        values = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(channels, -1)
        finite = np.isfinite(values)
        moments.add(values, finite)
        for sketch, some, good in zip(sketches, values, finite, strict=True):
            sketch.add(some[good])
    return _report(moments, sketches, axis) | {"rows": list(rows), "decoded": read is not None}


def _bands(array: SourceArray, rows: tuple[float, float], memory: int) -> Iterator[NDArray[Any]]:
    """Bands of rows; float64 and what is made of it takes about six times 8 bytes a number."""
    layout = array.layout
    if not layout.ndim:
        yield array.region(()).reshape(1)
        return
    start, stop = (math.floor(share * layout.shape[0]) for share in rows)
    each = math.prod(layout.shape[1:]) * 48
    chunk = layout.chunk_shape[0]
    band = max(0, memory - array.chunk_memory) // max(1, each)
    if not band:
        raise ConfigError(f"memory is too small for a row of array {layout.name!r}", hint="give more")
    band = band // chunk * chunk or band
    for first in range(start, stop, band):
        yield array.rows(first, min(first + band, stop))


def _report(moments: Moments, sketches: Sequence[Sketch], axis: int | None) -> dict[str, Any]:
    count = moments.count
    some = count > 0
    std = np.sqrt(moments.squares / np.maximum(count, 1))
    shares = np.array([sketch.quantiles(SHARES) for sketch in sketches]).T

    def plain(values: Floats, whole: bool = False) -> Any:
        listed = [(int(v) if whole else float(v)) if ok or whole else None for v, ok in zip(values, some, strict=True)]
        return listed[0] if axis is None else listed

    return {
        "mean": plain(moments.mean),
        "std": plain(std),
        "min": plain(moments.least),
        "max": plain(moments.most),
        "count": plain(count, whole=True),
        "quantiles": {str(share): plain(values) for share, values in zip(SHARES, shares, strict=True)},
        "quantile_error": max(sketch.error for sketch in sketches),
        "nan": moments.nan,
        "infinite": moments.infinite,
        "axis": axis,
    }


def decoding(attributes: Mapping[str, Any]) -> Any:
    """A function from stored numbers to float64 as the CF conventions say; None where the attributes say nothing."""
    names = ("_FillValue", "missing_value", "scale_factor", "add_offset")
    if not any(name in attributes for name in names):
        return None
    missing = [_number(attributes[name]) for name in names[:2] if name in attributes]
    scale, offset = (_number(attributes.get(name, default)) for name, default in zip(names[2:], (1, 0), strict=True))

    def decode(values: NDArray[Any]) -> Floats:
        gone = np.isin(values, np.array([m for m in missing if _fits(m, values.dtype)]).astype(values.dtype))
        found: Floats = values.astype(np.float64) * scale + offset
        found[gone] = np.nan
        return found

    return decode


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Whether a number of this dtype can be equal to it."""
    if dtype.kind in "iu":
        return value.is_integer() and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
    return not math.isnan(value)


def _number(value: Any) -> float:
    """Of an attribute; xarray writes fill values of floats as base64 of a double."""
    if isinstance(value, str):
        return float(struct.unpack("<d", base64.standard_b64decode(value))[0])
    return float(value[0] if isinstance(value, list) else value)


def write_stats(root: Path, name: str, found: Mapping[str, Any]) -> None:
    """Put statistics into an array's attributes, durably, and into consolidated metadata where there are any."""
    folder = root / name
    if (folder / "zarr.json").exists():
        _edit(folder / "zarr.json", lambda tree: _own(tree.setdefault("attributes", {}), found))
        _edit(root / "zarr.json", lambda tree: _consolidated(tree, name, found))
        return
    _edit(folder / ".zattrs", lambda tree: _own(tree, found), empty=True)
    _edit(root / ".zmetadata", lambda tree: _own(tree["metadata"].setdefault(f"{name}/.zattrs".lstrip("/"), {}), found))


def _own(attributes: dict[str, Any], found: Mapping[str, Any]) -> None:
    own = attributes.get("streamtrain")
    attributes["streamtrain"] = {**(own if isinstance(own, dict) else {}), "stats": dict(found)}


def _consolidated(tree: dict[str, Any], name: str, found: Mapping[str, Any]) -> None:
    members = ((tree.get("consolidated_metadata") or {}).get("metadata")) or {}
    if name in members:
        _own(members[name].setdefault("attributes", {}), found)


def _edit(path: Path, change: Any, *, empty: bool = False) -> None:
    """Change a JSON file in one step: a new file beside it, made durable, takes its name."""
    if not path.exists() and not empty:
        return
    before = path.read_text() if path.exists() else "{}"
    tree = json.loads(before)
    change(tree)
    after = json.dumps(tree, indent=2)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(after)
        fsync(part)
        os.replace(part, path)
        fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)
