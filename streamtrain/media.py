"""What can be logged beside numbers: images, tables and histograms, taken in as they are at the moment of the call.

Its law: what is made here is a small copy on the host. Whoever logged an array may go on writing into it, and no graph,
device memory or block of a stream is kept alive. No torch here: a tensor is known by its methods.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamtrain.errors import ConfigError

CHANNELS = (1, 3, 4)
"""Grey, RGB and RGBA."""
MOST_ROWS = 10_000
"""Rows of a table; who has more wants a file."""
Cell: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An image; `Image.of` takes arrays and tensors."""

    pixels: NDArray[np.uint8]
    """(height, width, channels), with 1, 3 or 4 channels."""

    @classmethod
    def of(cls, value: Any, name: str = "an image", *, layout: str = "auto") -> Image:
        """From (H, W), (C, H, W) or (H, W, C), an array or a tensor of any number dtype.

        `layout`: `"CHW"`, `"HWC"`, or `"auto"`: by which axis has 1, 3 or 4 entries, and where both have, as tensors
        and arrays usually lie (tensors CHW, arrays HWC). uint8 is taken as it is, bool as black and white; others
        from 0 to 1 (or whole ones from 0 to 255) too, and others are scaled from their least to their greatest, which
        is what fields of data want. What is not finite is black. Raises ConfigError.
        """
        array = _array(value, name)
        if array.ndim == 2:
            array = array[:, :, None]
        if array.ndim != 3 or array.size == 0:
            raise ConfigError(f"{name}: an image is (H, W), (C, H, W) or (H, W, C), not {array.shape}")
        if layout == "auto" and np.ndim(value) == 3:
            first, last = array.shape[0] in CHANNELS, array.shape[2] in CHANNELS
            layout = "CHW" if first and (not last or hasattr(value, "detach")) else "HWC"
        if layout == "CHW" and np.ndim(value) == 3:
            array = array.transpose(1, 2, 0)
        if array.shape[2] not in CHANNELS:
            raise ConfigError(
                f"{name}: {array.shape[2]} channels make no image, of shape {tuple(np.shape(value))}",
                hint="Log 1, 3 or 4 of them; one array (H, W) for each.",
            )
        return cls(np.ascontiguousarray(_bytes(array)))

    def png(self) -> bytes:
        """The image as a PNG (ISO/IEC 15948: 8 bits, no filter, not interlaced)."""
        height, width, channels = self.pixels.shape
        rows = np.zeros((height, 1 + width * channels), np.uint8)  # each row begins with its filter's number, 0
        rows[:, 1:] = self.pixels.reshape(height, -1)
        colour = {1: 0, 3: 2, 4: 6}[channels]
        head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
        parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
        chunks = (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts
        )
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Rows of cells under named columns; `Table.of` takes columns by name, or rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of(cls, value: Any, name: str = "a table") -> Table:
        """From `{column: cells}`, or a list of `{column: cell}`, of at most 10,000 rows. Raises ConfigError."""
        if isinstance(value, Mapping):
            cells = {str(column): _cells(column_of, f"{name}: {column}") for column, column_of in value.items()}
            lengths = {column: len(each) for column, each in cells.items()}
            if len(set(lengths.values())) > 1:
                raise ConfigError(f"{name}: the columns of a table are of one length, not {lengths}")
            columns, rows = tuple(cells), tuple(zip(*cells.values(), strict=True))
        else:
            columns = tuple(dict.fromkeys(str(column) for row in value for column in row))
            rows = tuple(tuple(_cell(row.get(column)) for column in columns) for row in value)
        if len(rows) > MOST_ROWS:
            raise ConfigError(
                f"{name}: a table of {len(rows)} rows is more than the {MOST_ROWS} that are logged",
                hint="Log a part of it, and write the whole to a file of its own.",
            )
        return cls(columns, rows)


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """How values are distributed; `Histogram.of` counts them."""

    edges: NDArray[np.float64]
    """(bins + 1,), growing."""
    counts: NDArray[np.int64]
    """(bins,)"""
    total: float = 0.0
    """Sum of the values."""
    squares: float = 0.0
    """Sum of their squares."""
    left_out: int = 0
    """Values that are not finite."""

    @classmethod
    def of(cls, value: Any, name: str = "a histogram", *, bins: int = 64) -> Histogram:
        """Of an array or a tensor of any shape, in bins of equal width. Raises ConfigError."""
        values = _array(value, name).astype(np.float64).ravel()
        known = values[np.isfinite(values)]
        counts, edges = _counted(known, bins) if known.size else (np.zeros(bins), np.linspace(0, 1, bins + 1))
        with np.errstate(over="ignore"):
            total, squares = float(known.sum()), float(np.square(known).sum())
        return cls(edges.astype(np.float64), counts.astype(np.int64), total, squares, values.size - known.size)


Medium: TypeAlias = Image | Table | Histogram


def medium(value: Any, name: str) -> Medium:
    """What a logged value is: a mapping, or a list of them, is a table; one axis makes a histogram, more an image.

    Raises ConfigError for what is none of them.
    """
    if isinstance(value, Image | Table | Histogram):
        return value
    if isinstance(value, Mapping) or (
        isinstance(value, Sequence) and value and all(isinstance(row, Mapping) for row in value)
    ):
        return Table.of(value, name)
    axes = getattr(value, "ndim", None)
    if axes is None and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        axes = np.ndim(_array(value, name))
    if axes == 1:
        return Histogram.of(value, name)
    if axes in (2, 3):
        return Image.of(value, name)
    raise ConfigError(
        f"log_media: {name} must be an image, a table or a histogram, not {type(value).__name__}"
        + (f" of {axes} axes" if axes is not None else ""),
        hint="Give (H, W) or (C, H, W) for an image, {column: cells} for a table, (N,) for a histogram of N values; "
        "numbers go to log_metrics.",
    )


def _array(value: Any, name: str) -> NDArray[Any]:
    if hasattr(value, "detach"):  # of torch: numpy lacks bfloat16, and shares memory with what lies on the CPU
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    if array.dtype.kind not in "buif":
        raise ConfigError(f"{name}: numbers are needed, not {array.dtype}")
    return array


def _counted(known: NDArray[np.float64], bins: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Counts and edges from the least value to the greatest; from further apart where so many bins would have no width
    between them, which numpy refuses, as it does a width beyond what a number can be."""
    half = 0.5 * known  # two of which are never too far apart
    low, high = float(half.min()), float(half.max())
    least = 2 * bins * float(np.spacing(max(-low, high)))
    if high - low < least or low == high:
        more = max(least, 0.25 if low == high else 0.0)
        low, high = low - more, high + more
    counts, edges = np.histogram(half, bins, (low, high))
    most = np.finfo(np.float64).max / 2
    return counts, 2.0 * np.clip(edges, -most, most)


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array.copy()
    values = array.astype(np.float64)
    known = np.isfinite(values)
    low, high = (float(values[known].min()), float(values[known].max())) if known.any() else (0.0, 1.0)
    if array.dtype.kind in "ui" and low >= 0 and high <= 255:
        return values.astype(np.uint8)
    if low < 0 or high > 1:
        values = (values - low) / (high - low if high > low else 1.0)
    return np.where(known, np.rint(values * 255), 0).astype(np.uint8)


def _cells(column: Any, name: str) -> list[Cell]:
    if isinstance(column, str) or not (isinstance(column, Sequence) or hasattr(column, "ndim")):
        raise ConfigError(f"{name} must be the cells of a column, not {column!r:.60}")
    if hasattr(column, "tolist"):
        column = column.tolist()
    return [_cell(cell) for cell in column]


def _cell(value: Any) -> Cell:
    """As JSON can hold it: a number that is not finite, and all that is no number, as text."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
