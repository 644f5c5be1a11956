"""Random crops of 256 x 256 places out of fields of 1024 x 1024, in zstd chunks of 128 x 128, warm and shuffled.

Ours: `crop=`, which reads the chunks that a crop touches. Against the same stream without it and a transform that cuts
the same patch out of each whole field; and against zarr's own API, a slice of each field, by two threads.
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
from zarr.codecs import ZstdCodec

from streamtrain import ZarrStream
from streamtrain.data.batch import Batch
from tests.bench.measure import Measure, Options, ratios

SIDE, CROP, CHUNK, BATCH, THREADS = 1024, 256, 128, 16, 2


def run(options: Options) -> Iterator[Measure]:
    """The ratios, and the rates behind them."""
    fields = 24 if options.quick else 192
    with options.room() as room:
        store = _write(room / "fields.zarr", fields)
        rates = asyncio.run(_measured(store, fields, options.rounds))
    yield Measure(
        name="over cutting whole fields in a transform", values=ratios(rates["crop"], rates["cut"]), at_least=2
    )
    yield Measure(
        name=f"over slices by zarr {zarr.__version__}", values=ratios(rates["crop"], rates["zarr"]), at_least=1
    )
    for name, values in rates.items():
        yield Measure(name=f"  {name}", values=tuple(values), unit=" samples/s")


def _write(path: Path, fields: int) -> Path:
    array: Any = zarr.create_array(
        path, shape=(fields, SIDE, SIDE), chunks=(1, CHUNK, CHUNK), dtype="float32", compressors=ZstdCodec(level=1)
    )
    rng = np.random.default_rng(0)
    for number in range(fields):
        array[number] = np.cumsum(rng.integers(-3, 4, (SIDE, SIDE)), axis=1, dtype=np.float32)
    return path


def _cut(batch: Batch) -> tuple[Any, None]:
    assert batch.rng is not None
    result = np.empty((len(batch.inputs), CROP, CROP), dtype=np.float32)
    for out, field, (a, b) in zip(
        result, batch.inputs, batch.rng.integers(0, SIDE - CROP + 1, (len(result), 2)), strict=True
    ):
        out[:] = field[a : a + CROP, b : b + CROP]
    return result, None


async def _measured(store: Path, fields: int, rounds: int) -> dict[str, list[float]]:
    given: dict[str, Any] = {"batch_size": BATCH, "shuffle": "block", "threads": THREADS, "cache": 0, "output": "numpy"}
    array = zarr.open_array(store, mode="r")
    rates: dict[str, list[float]] = {"crop": [], "cut": [], "zarr": []}
    async with (
        ZarrStream(store, crop={1: CROP, 2: CROP}, memory="1GiB", **given) as crop,
        ZarrStream(store, transform=_cut, cache_transform=False, memory="1GiB", **given) as cut,
    ):
        for number in range(rounds + 1):
            for name in rates if number % 2 else reversed(rates):
                began = time.perf_counter()
                if name == "zarr":
                    _slices(array, fields, number)
                else:
                    async for batch in crop if name == "crop" else cut:
                        assert batch.inputs.shape[1:] == (CROP, CROP)
                if number:  # before that files are read into memory
                    rates[name].append(fields / (time.perf_counter() - began))
    return rates


def _slices(array: Any, fields: int, seed: int) -> None:
    places = np.random.default_rng(seed).integers(0, SIDE - CROP + 1, (fields, 2)).tolist()

    def one(number: int) -> None:
        a, b = places[number]
        assert array[number, a : a + CROP, b : b + CROP].shape == (CROP, CROP)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(one, range(fields)))
