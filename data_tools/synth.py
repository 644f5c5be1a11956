"""Made-up data of any size, to measure and to try: `synth`.

Law: the same arguments give the same bytes, and memory holds one band of rows at a time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from data_tools.convert import Codec, Progress, check_size, create_array
from streamtrain.data.whole import whole_or_nothing
from streamtrain.errors import ConfigError


def synth(
    target: str | Path,
    *,
    rows: int,
    columns: int = 512,
    chunk_rows: int = 4096,
    shard_rows: int | None = None,
    codec: Codec = "raw",
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write the group `target` with `x`, float32 of shape (rows, columns), and `y`, float32 of shape (rows,).

    x is standard normal, rounded to 1/64 so that it compresses like measured data (to about a half); y is a fixed
    linear function of x's row plus noise of 0.1, so that a model has something to learn. Chunks are whole rows.
    """
    if min(rows, columns, chunk_rows) < 1:
        given = f"rows={rows}, columns={columns}, chunk_rows={chunk_rows}"
        raise ConfigError(f"{given}: all must be at least 1", hint="give positive sizes")
    if seed < 0:
        raise ConfigError(f"seed={seed} must be at least 0", hint="any number from 0 on will do")
    if shard_rows and (shard_rows < 0 or shard_rows % chunk_rows):
        raise ConfigError(
            f"shard_rows={shard_rows} is no multiple of chunk_rows={chunk_rows}", hint="a shard holds whole chunks"
        )
    target, width = Path(target), np.dtype("float32").itemsize
    need = check_size((rows, columns), width, (chunk_rows, columns), codec) + check_size(
        (rows,), width, (chunk_rows,), codec
    )
    weights = np.random.default_rng([seed, 0]).standard_normal(columns, dtype=np.float32) / np.float32(columns) ** 0.5
    with whole_or_nothing(target, need=need) as part:
        group = zarr.create_group(part)
        float32, band_rows = np.dtype("float32"), shard_rows or chunk_rows
        x = create_array(
            group,
            name="x",
            shape=(rows, columns),
            dtype=float32,
            chunks=(chunk_rows, columns),
            shards=(shard_rows, columns) if shard_rows else None,
            codec=codec,
        )
        y = create_array(
            group,
            name="y",
            shape=(rows,),
            dtype=float32,
            chunks=(chunk_rows,),
            shards=(shard_rows,) if shard_rows else None,
            codec=codec,
        )
        for start in range(0, rows, band_rows):
            rng = np.random.default_rng([seed, 1, start])
            values = rng.standard_normal((min(band_rows, rows - start), columns), dtype=np.float32)
            np.multiply(values, 64, out=values)
            np.divide(np.rint(values, out=values), 64, out=values)
            noise = rng.standard_normal(len(values), dtype=np.float32)
            x[start : start + len(values)] = values
            y[start : start + len(values)] = values @ weights + np.float32(0.1) * noise
            if progress:
                progress(start + len(values), rows)
    return target
