"""Stores of sparse and ragged rows, written by hand as AnnData lays them out, and the numbers that are in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sparse:
    """A sparse matrix by its three arrays."""

    data: NDArray[Any]
    indices: NDArray[Any]
    indptr: NDArray[Any]
    width: int

    @property
    def dense(self) -> NDArray[Any]:
        """The matrix, repeated columns added up."""
        rows = len(self.indptr) - 1
        out = np.zeros((rows, self.width), dtype=self.data.dtype)
        np.add.at(out, (np.repeat(np.arange(rows), np.diff(self.indptr)), self.indices.astype(np.int64)), self.data)
        return out


def random_sparse(rows: int, width: int, most: int, seed: int = 0, dtype: str = "float32") -> Sparse:
    """Rows of 0 to `most` numbers each, in rising columns."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, most + 1, rows)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    parts = [np.sort(rng.choice(width, n, replace=False)) for n in lengths]
    indices = np.concatenate([*parts, np.zeros(0, dtype=np.int64)]).astype(np.int32)
    data = rng.integers(1, 100, int(indptr[-1])).astype(dtype)
    return Sparse(data, indices, indptr, width)


def write_arrays(group: zarr.Group, arrays: dict[str, NDArray[Any]], chunk: int, **options: Any) -> None:
    """Arrays of a group, in chunks of so many along the first axis."""
    for name, values in arrays.items():
        chunks = (max(1, min(chunk, len(values))), *values.shape[1:])
        array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, **options)
        array[...] = values


def write_sparse(root: zarr.Group, name: str, matrix: Sparse, chunk: int = 64, **options: Any) -> zarr.Group:
    """A sparse matrix as AnnData writes it."""
    group = root.create_group(name)
    shape = [len(matrix.indptr) - 1, matrix.width]
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
    write_arrays(group, {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr}, chunk, **options)
    return group


def sparse_store(path: Path, matrix: Sparse, chunk: int = 64, **options: Any) -> Path:
    """A store with the matrix as X, and y, the rows' numbers."""
    root = zarr.open_group(path, mode="w", zarr_format=options.pop("zarr_format", 3))
    write_sparse(root, "X", matrix, chunk, **options)
    write_arrays(root, {"y": np.arange(len(matrix.indptr) - 1)}, 50)
    return path
