"""Shuffled batches of 256 x 512 float32 from chunks of 4096 x 512, warm: against the least that must be done.

Over more data than any processor caches, again and again. `raw`: pread of the same chunks and a copy into permuted
rows, by two threads and nothing else; `zarr.Array[...]` reading the chunks in order; and, as a note, the same a chunk
at a time, where malloc hands out the same pages again and zarr pays for no page faults. `zstd`: numcodecs decoding
bytes that are in memory already, and one copy; as a note, the same with the bytes read from files, as we must.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray

from data_tools.synth import synth
from streamtrain import ZarrStream
from streamtrain.data.reading import anonymous
from tests.bench.measure import Measure, Options, ratios

CHUNK_ROWS, COLUMNS, BATCH = 4096, 512, 256
CHUNK = CHUNK_ROWS * COLUMNS * 4
BLOCK_CHUNKS = 8
"""Chunks that are permuted together: 64 MiB."""
THREADS = 2
ROW = np.dtype((np.void, COLUMNS * 4))
"""A row as one element: numpy moves it by one memcpy, the quickest way that it has."""

Bytes = NDArray[np.uint8]
Fetch = Callable[[int, Bytes], None]


def run(options: Options) -> Iterator[Measure]:
    """The three ratios, and the rates behind them."""
    chunks = 32 if options.quick else 160
    with options.room() as room:
        stores = {codec: room / f"{codec}.zarr" for codec in ("raw", "zstd")}
        for codec, store in stores.items():
            synth(store, rows=chunks * CHUNK_ROWS, columns=COLUMNS, chunk_rows=CHUNK_ROWS, codec=codec)  # type: ignore[arg-type]
        rates = asyncio.run(_measured(stores, chunks, options.rounds))
    yield Measure(name="raw: over pread + gather", values=ratios(rates["raw"], rates["pread"]), at_least=0.75)
    yield Measure(name="raw: over zarr.Array[...]", values=ratios(rates["raw"], rates["zarr"]), at_least=6)
    yield Measure(name="raw: over zarr, a chunk at a time", values=ratios(rates["raw"], rates["zarr by chunk"]))
    yield Measure(name="zstd: over numcodecs + one copy", values=ratios(rates["zstd"], rates["decode"]), at_least=0.85)
    read = rates["decode, bytes read"]
    yield Measure(name="zstd: over the same with the bytes read", values=ratios(rates["zstd"], read))
    for name, values in rates.items():
        yield Measure(name=f"  {name}", values=tuple(values), unit=" GB/s")


async def _measured(stores: dict[str, Path], chunks: int, rounds: int) -> dict[str, list[float]]:
    streams = {codec: _stream(store) for codec, store in stores.items()}
    files = {codec: [store / "x" / "c" / str(i) / "0" for i in range(chunks)] for codec, store in stores.items()}
    encoded = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in files["zstd"]]
    blocks = [anonymous(BLOCK_CHUNKS * CHUNK) for _ in range(3)]  # as many as a stream has in use at most
    array: zarr.Array[Any] = zarr.open_group(stores["raw"], mode="r")["x"]  # type: ignore[assignment]
    work: dict[str, Callable[[], object]] = {
        "pread": lambda: _gathered(chunks, blocks, lambda i, out: _pread(files["raw"][i], out)),
        "decode": lambda: _gathered(chunks, blocks, lambda i, out: numcodecs.Zstd().decode(encoded[i], out)),
        "decode, bytes read": lambda: _gathered(chunks, blocks, _read_and_decode(files["zstd"])),
        "zarr": lambda: array[...],
        "zarr by chunk": lambda: _in_order(array),
    }
    names = ("raw", "pread", "zarr", "zarr by chunk", "zstd", "decode", "decode, bytes read")
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            began = time.perf_counter()
            if name in streams:
                await _pass(streams[name])
            else:
                work[name]()
            if number:  # before that all is warmed: files in memory, maps made, buffers touched
                rates[name].append(chunks * CHUNK / (time.perf_counter() - began) / 1e9)
    for stream in streams.values():
        await stream.aclose()
    return rates


def _stream(store: Path) -> ZarrStream:
    return ZarrStream(store, inputs="x", batch_size=BATCH, shuffle="block", threads=THREADS, cache=0)


async def _pass(stream: ZarrStream) -> None:
    async for batch in stream:
        assert len(batch) == BATCH


def _pread(path: Path, out: Bytes) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.preadv(fd, [out.data], 0)
    os.close(fd)


def _read_and_decode(files: list[Path]) -> Fetch:
    local = threading.local()

    def fetch(i: int, out: Bytes) -> None:
        if not hasattr(local, "encoded"):
            local.encoded = anonymous(CHUNK)
        size = files[i].stat().st_size
        _pread(files[i], local.encoded[:size])
        numcodecs.Zstd().decode(local.encoded[:size], out)

    return fetch


def _in_order(array: zarr.Array[Any]) -> None:
    """What zarr costs at its best: each chunk into memory that the one before has left."""
    for start in range(0, array.shape[0], CHUNK_ROWS):
        array[start : start + CHUNK_ROWS]


def _gathered(chunks: int, blocks: list[Bytes], fetch: Fetch) -> None:
    """All chunks, by two threads, each row to its place in one of the blocks."""
    rows = [block.view(ROW) for block in blocks]
    places = np.random.default_rng(0).permutation(BLOCK_CHUNKS * CHUNK_ROWS).reshape(BLOCK_CHUNKS, CHUNK_ROWS)
    numbers = itertools.count()

    def work() -> None:
        chunk = anonymous(CHUNK)
        while (i := next(numbers)) < chunks:
            fetch(i, chunk)
            rows[i // BLOCK_CHUNKS % len(rows)][places[i % BLOCK_CHUNKS]] = chunk.view(ROW)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
