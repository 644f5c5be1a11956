"""Shuffled batches of sparse rows, dense, warm, against annbatch 0.3 on the same store, made dense by its `toarray`.

The store is laid out as AnnData does it, of cells with about a thousand of 20,000 genes, four budgets in size. Both mix
as many runs of rows into a batch; a round is both of them for some seconds each, in turn, in processes of their own,
annbatch in an environment of its own (see `peers`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

import run as environments
from tests.bench import peers
from tests.bench.measure import Measure, Options

COLUMNS, EACH = 20_000, 1_000
"""Of a row: its length, and how many numbers it has on average."""
ROWS = 1 << 17
"""1 GiB of values and columns, four budgets."""
CHUNK = 1 << 16
"""Elements of a chunk."""
BAR = 1.5
CODECS: dict[str, Any] = {"raw": None, "zstd": ZstdCodec(level=1)}


def run(options: Options) -> Iterator[Measure]:
    """The ratios, and the rates behind them, in bytes of dense rows."""
    found = environments.interpreter("3.12")
    if found is None:
        print("  no Python 3.12 is found: annbatch 0.3 needs it, and is not measured", flush=True)
        return
    python = environments.environment(found, "3.12-annbatch", peers.WANTED)
    rows, seconds = (ROWS // 16, 0.5) if options.quick else (ROWS, 4.0)
    for name, codec in CODECS.items():
        with options.room() as room:
            store = make(room / "s.zarr", rows, codec)
            yield from peers.measured(store, "X", str(python), name, BAR, seconds, options.rounds)


def make(path: Path, rows: int, codec: Any) -> Path:
    """A sparse matrix as AnnData writes it, row by row from a few hundred different ones."""
    rng = np.random.default_rng(0)
    some = [np.sort(rng.choice(COLUMNS, n, replace=False)) for n in rng.integers(EACH // 2, 3 * EACH // 2, 512)]
    picked = rng.integers(0, len(some), rows)
    indptr = np.concatenate([[0], np.cumsum([len(some[row]) for row in picked])]).astype(np.int64)
    root = zarr.open_group(path, mode="w")
    group = root.create_group("X")
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [rows, COLUMNS]})
    shape, made = (int(indptr[-1]),), {"chunks": (CHUNK,), "compressors": codec}
    data = group.create_array("data", shape=shape, dtype="float32", **made)
    indices = group.create_array("indices", shape=shape, dtype="int32", **made)
    group.create_array("indptr", data=indptr, chunks=(len(indptr),))
    step = 1 << 12
    for first in range(0, rows, step):
        part = slice(int(indptr[first]), int(indptr[min(first + step, rows)]))
        indices[part] = np.concatenate([some[row] for row in picked[first : first + step]])
        data[part] = np.log1p(rng.poisson(1.0, part.stop - part.start) + 1).astype(np.float32)
    return path
