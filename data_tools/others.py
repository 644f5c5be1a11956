"""Arrays that no tensor holds, such as texts and times: copied, cut and reordered as they are, by zarr's own API.

Its law: what can't be read or written again ends the tool by its name; nothing is lost in silence.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from streamtrain.data.budget import format_bytes
from streamtrain.data.layout import Untrainable
from streamtrain.errors import ConfigError, DataError, StreamtrainError

Values = NDArray[Any]


class OtherArray:
    """One such array: its values by row."""

    def __init__(self, name: str, node: zarr.Array[Any], why: Untrainable) -> None:
        self.name, self.node, self.why = name, node, why
        """`why`: what keeps it from being trained on."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths."""
        return self.node.shape

    @property
    def dims(self) -> tuple[str | None, ...]:
        """The axes' names; () where they have none."""
        return tuple(dimension_names(self.node) or ())

    def rows(self, start: int, stop: int) -> Values:
        """Rows along axis 0; all there is where there is none. Raises DataError for what can't be read."""
        try:
            return np.asarray(self.node[slice(start, stop) if self.shape else ...])
        except MemoryError:
            raise
        except Exception as error:
            cause = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise DataError(
                f"array {self.name!r} can't be read: {cause}", hint="restore its files, or remove the array"
            ) from error

    def bands(self, start: int, stop: int, memory: int) -> Iterator[tuple[int, Values]]:
        """The same in bands of whole chunks, each with its first row; of texts a chunk's rows at a time."""
        unit = (self.node.shards or self.node.chunks)[0]
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.node.dtype.itemsize
        band = unit if _varies(self.node.dtype) else max(1, memory // (4 * max(1, row)) // unit) * unit
        for at in range(start, stop, band):
            yield at, self.rows(at, min(at + band, stop))

    def whole(self, memory: int) -> Values:
        """All rows. Raises ConfigError where they take more than half of the memory."""
        parts, size = [], 0
        for _, band in self.bands(0, self.shape[0], memory):
            parts.append(band)
            size += band.nbytes
            if _varies(band.dtype):
                size += sum(len(text) for text in band.reshape(-1).tolist() if isinstance(text, str | bytes))
            if 2 * size > memory:
                raise ConfigError(
                    f"memory={format_bytes(memory)} is too small for array {self.name!r}, which is read whole",
                    hint="give more memory, or name the arrays to be reordered without this one: --arrays",
                )
        return np.concatenate(parts)

    def create(self, where: zarr.Group, *, rows: int | None = None) -> zarr.Array[Any]:
        """A new array like this one, in Zarr 3. Whatever zarr raises where it can't write such an array."""
        node = self.node
        shape = node.shape if rows is None else (rows, *node.shape[1:])
        kept: dict[str, Any] = {}
        if node.metadata.zarr_format == 3:
            kept = {"filters": node.filters, "compressors": node.compressors, "serializer": node.serializer}
        return where.create_array(
            self.name,
            shape=shape,
            dtype=node.metadata.dtype,
            chunks=node.chunks,
            shards=node.shards,
            fill_value=node.fill_value,
            dimension_names=dimension_names(node),
            attributes=dict(node.attrs),
            **kept,
        )


def _varies(dtype: np.dtype[Any]) -> bool:
    """Whether its values are not all of one size."""
    return dtype.kind in "TO"


def dimension_names(node: zarr.Array[Any]) -> list[str | None] | None:
    """Zarr 3's own, or those that xarray writes into the attributes of Zarr 2; None without any."""
    names = getattr(node.metadata, "dimension_names", None) or node.attrs.get("_ARRAY_DIMENSIONS")
    return list(names) if isinstance(names, list | tuple) and len(names) == node.ndim else None


def carry(array: OtherArray, where: zarr.Group, memory: int, *, bounds: tuple[int, int] | None = None) -> None:
    """Copy an array, or its rows within `bounds`, in bands."""
    start, stop = bounds or (0, array.shape[0] if array.shape else 0)
    with _written(array):
        made = array.create(where, rows=stop - start if array.shape else None)
        if not array.shape:
            made[...] = array.rows(0, 0)
            return
        for at, band in array.bands(start, stop, memory):
            made[at - start : at - start + len(band)] = band


def carry_in_order(array: OtherArray, where: zarr.Group, memory: int, order: NDArray[np.int64]) -> None:
    """Write row `order[i]` as row i."""
    with _written(array):
        array.create(where)[...] = array.whole(memory)[order]


@contextlib.contextmanager
def _written(array: OtherArray) -> Iterator[None]:
    """Raise DataError, with the array's name, for whatever zarr refuses to write again."""
    try:
        with warnings.catch_warnings():
            # Zarr 3 does not specify each dtype: its writer heard of it
            warnings.filterwarnings("ignore", "The data type .* does not have a Zarr V3 specification", FutureWarning)
            yield
    except (StreamtrainError, OSError, MemoryError):
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(
            f"array {array.name!r} can't be written again: {cause}",
            hint="write it with another dtype or codec, or copy the store without it",
        ) from error
