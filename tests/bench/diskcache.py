"""Zstd data out of the disk cache, decoded, against the same data raw: the second epoch of one, any epoch of the other.

Shuffled batches of 256 x 512 float32 from chunks of 4096 x 512, warm, as in `rates`; nothing is kept in memory. As a
note: the first epoch, which decodes and fills the cache, over one that decodes alone; and what 64 KiB chunks give.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.convert import Codec
from data_tools.synth import synth
from streamtrain import ZarrStream
from tests.bench.measure import Measure, Options, ratios

COLUMNS, BATCH, THREADS = 512, 256, 2
CODECS: tuple[Codec, ...] = ("raw", "zstd")
SIZES = {"": 4096, ", chunks of 64 KiB": 32}
"""Rows of a chunk."""


def run(options: Options) -> Iterator[Measure]:
    """The ratio for each size of chunk, the cost of filling, and the rates behind them."""
    rows = (32 if options.quick else 160) * 4096
    for name, chunk_rows in SIZES.items():
        some = rows if chunk_rows == 4096 else rows // 8
        with options.room() as room:
            for codec in CODECS:
                synth(room / f"{codec}.zarr", rows=some, columns=COLUMNS, chunk_rows=chunk_rows, codec=codec)
            rates = asyncio.run(_measured(room, some, options.rounds))
        ratio = ratios(rates["cached"], rates["raw"])
        yield Measure(name=f"second epoch over the raw lane{name}", values=ratio, at_least=None if name else 0.9)
        yield Measure(name=f"first epoch over decoding alone{name}", values=ratios(rates["filling"], rates["decoding"]))
        for what, values in rates.items():
            yield Measure(name=f"  {what}{name}", values=tuple(values), unit=" GB/s")


async def _measured(room: Path, rows: int, rounds: int) -> dict[str, list[float]]:
    kept = _stream(room / "zstd.zarr", disk_cache=room / "kept", disk_cache_bytes="8GiB")
    streams = {"raw": _stream(room / "raw.zarr"), "cached": kept, "decoding": _stream(room / "zstd.zarr")}
    rates: dict[str, list[float]] = {name: [] for name in (*streams, "filling")}
    for pair in (
        ("raw", "cached"),
        ("decoding", "filling"),
    ):  # what filling leaves to be written is last
        for number in range(rounds + 1):
            for name in pair if number % 2 else reversed(pair):
                new = {"disk_cache": room / "new", "disk_cache_bytes": "8GiB"}
                stream = streams.get(name) or _stream(room / "zstd.zarr", **new)
                began = time.perf_counter()
                async for batch in stream:
                    assert len(batch) == BATCH
                if number:  # before that all is warmed: files in memory, the cache filled, maps made, buffers touched
                    rates[name].append(rows * COLUMNS * 4 / (time.perf_counter() - began) / 1e9)
                if name == "filling":
                    await stream.aclose()
                    shutil.rmtree(room / "new")
    told = kept.statistics().disk_cache
    assert told is not None
    assert (told.refused, told.off) == (0, None), told
    for stream in streams.values():
        await stream.aclose()
    return rates


def _stream(store: Path, **keywords: Any) -> ZarrStream:
    return ZarrStream(
        store, inputs="x", batch_size=BATCH, shuffle="block", threads=THREADS, cache=0, output="numpy", **keywords
    )
