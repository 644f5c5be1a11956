"""Inner chunks of 64 KiB in shards of 8 MiB, warm, in shuffled order, against zarr's own pipeline and zarrs'.

Ours: shuffled batches of 256 rows. Theirs: the same inner chunks in random order, a slice each, by two threads, with
nothing gathered; fewer of them, since that takes long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from data_tools.convert import Codec
from data_tools.synth import synth
from streamtrain import ZarrStream
from tests.bench.measure import Measure, Options, ratios

COLUMNS, CHUNK_ROWS, SHARD_ROWS, BATCH, THREADS = 512, 32, 4096, 256, 2
CHUNK = CHUNK_ROWS * COLUMNS * 4
CODECS: tuple[Codec, ...] = ("raw", "zstd")
ZARRS = "zarrs.ZarrsCodecPipeline"


def run(options: Options) -> Iterator[Measure]:
    """The ratios, and the rates behind them."""
    shards, theirs = (8, 200) if options.quick else (64, 1500)
    for codec in CODECS:
        with options.room() as room:
            rows = shards * SHARD_ROWS
            store = synth(
                room / "s.zarr", rows=rows, columns=COLUMNS, chunk_rows=CHUNK_ROWS, shard_rows=SHARD_ROWS, codec=codec
            )
            rates = asyncio.run(_measured(store, rows, theirs, options.rounds))
        yield Measure(
            name=f"{codec}: over zarr {zarr.__version__}", values=ratios(rates["ours"], rates["zarr"]), at_least=10
        )
        yield Measure(
            name=f"{codec}: over the zarrs pipeline", values=ratios(rates["ours"], rates["zarrs"]), at_least=3
        )
        for name, values in rates.items():
            yield Measure(name=f"  {codec}, {name}", values=tuple(values), unit=" GB/s")


async def _measured(store: Path, rows: int, theirs: int, rounds: int) -> dict[str, list[float]]:
    default = zarr.open_array(store, path="x", mode="r")
    with zarr.config.set({"codec_pipeline.path": ZARRS}):
        fast = zarr.open_array(store, path="x", mode="r")
    rates: dict[str, list[float]] = {"ours": [], "zarr": [], "zarrs": []}
    order = np.random.default_rng(0).permutation(rows // CHUNK_ROWS)[:theirs]
    stream = ZarrStream(store, inputs="x", batch_size=BATCH, shuffle="block", threads=THREADS, cache=0, output="numpy")
    async with stream:
        for number in range(rounds + 1):
            for name in rates if number % 2 else reversed(rates):
                began = time.perf_counter()
                if name == "ours":
                    async for batch in stream:
                        assert len(batch) <= BATCH
                    size = rows * COLUMNS * 4
                else:
                    size = _slices(default if name == "zarr" else fast, order)
                if number:  # before that files are read into memory
                    rates[name].append(size / (time.perf_counter() - began) / 1e9)
    return rates


def _slices(array: Any, order: Any) -> int:
    """Read these inner chunks, by two threads; their bytes."""
    with ThreadPoolExecutor(THREADS) as threads:
        return sum(threads.map(lambda i: array[i * CHUNK_ROWS : (i + 1) * CHUNK_ROWS].nbytes, map(int, order)))
