"""Shuffled batches of 256 x 512 float32, warm, against the least that memory and codecs allow: two threads that copy.

Stores of four budgets in 128 files (8 MiB chunks) and in 4,096 (256 KiB), nothing kept decoded. `raw`: the same bytes
copied from memory into three buffers that take turns, as a stream's do, in order and nothing else. `zstd` and `blosc`
(lz4, bitshuffle): encoded bytes that are in memory already decoded by numcodecs, and each chunk's rows moved to their
places, permuted over as many chunks as a block of the stream has. Ours reads files, checks sizes, times and checksums,
and hands batches over.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

from data_tools.convert import Codec
from data_tools.synth import synth
from streamtrain import ZarrStream
from streamtrain.data.reading import anonymous
from tests.bench.measure import Measure, Options, ratios

COLUMNS, BATCH, THREADS = 512, 256, 2
BUDGET = "256MiB"
ROWS = 1 << 19
"""1 GiB of float32, four budgets."""
FILES = (128, 4096)
BLOCKS = 3
ROW = np.dtype((np.void, COLUMNS * 4))
"""A row as one element: numpy moves it by one memcpy, the quickest way that it has."""
BARS: dict[Codec, float] = {"raw": 0.5, "zstd": 0.9, "blosc": 0.9}
CRC = {"raw": 0, "zstd": 0, "blosc": 4}
"""Bytes of the checksum that our writers put behind what the codec gives."""

Bytes = NDArray[np.uint8]
Do = Callable[[int, Bytes], None]
"""Handles the chunk of this number, with a thread's own room for one."""


def run(options: Options) -> Iterator[Measure]:
    """A ratio for each codec and number of files, and the rates behind it."""
    part = 8 if options.quick else 1
    for codec, bar in BARS.items():
        for rows, files in ((ROWS // count, count // part) for count in FILES):
            with options.room() as room:
                store = synth(room / "s.zarr", rows=files * rows, columns=COLUMNS, chunk_rows=rows, codec=codec)
                rates = asyncio.run(_measured(store, codec, files, rows, options.rounds))
            what = "copying" if codec == "raw" else "decoding and copying"
            values = ratios(rates["ours"], rates["theirs"])
            yield Measure(name=f"{codec}, {files} files: over {what}", values=values, at_least=bar)
            yield Measure(name="  ours", values=tuple(rates["ours"]), unit=" GB/s")
            yield Measure(name=f"  {what}", values=tuple(rates["theirs"]), unit=" GB/s")


async def _measured(store: Path, codec: Codec, files: int, rows: int, rounds: int) -> dict[str, list[float]]:
    stream = ZarrStream(store, inputs="x", batch_size=BATCH, shuffle="block", memory=BUDGET, threads=THREADS, cache=0)
    async with stream:
        encoded = [_bytes(store / f"x/c/{number}/0", CRC[codec]) for number in range(files)]
        theirs = _copy(encoded) if codec == "raw" else _decode(encoded, codec, rows, stream.plan().cells_per_block)
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(rounds + 1):
            for name in rates if number % 2 else reversed(rates):
                began = time.perf_counter()
                if name == "ours":
                    await _pass(stream)
                else:
                    _in_threads(theirs, files, rows * ROW.itemsize)
                if number:  # before that all is warmed: files in memory, maps made, buffers touched
                    rates[name].append(files * rows * ROW.itemsize / (time.perf_counter() - began) / 1e9)
    return rates


async def _pass(stream: ZarrStream) -> None:
    async for batch in stream:
        assert len(batch) <= BATCH


def _bytes(path: Path, checksum: int) -> Bytes:
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    return data[: len(data) - checksum]


def _copy(chunks: list[Bytes]) -> Do:
    per_block = max(1, (64 << 20) // len(chunks[0]))
    buffers = [anonymous(per_block * len(chunks[0])).reshape(per_block, -1) for _ in range(BLOCKS)]

    def copy(number: int, room: Bytes) -> None:
        np.copyto(buffers[number // per_block % BLOCKS][number % per_block], chunks[number])

    return copy


def _decode(encoded: list[Bytes], codec: str, rows: int, per_block: int) -> Do:
    block = min(per_block, len(encoded))
    count = min(BLOCKS, math.ceil(len(encoded) / block))
    buffers = [anonymous(block * rows * ROW.itemsize).view(ROW) for _ in range(count)]
    places = np.random.default_rng(0).permutation(block * rows).reshape(block, rows)
    decoder: Any = numcodecs.get_codec({"id": codec})

    def decode(number: int, room: Bytes) -> None:
        decoder.decode(encoded[number], out=room)
        buffers[number // block % len(buffers)][places[number % block]] = room.view(ROW)

    return decode


def _in_threads(do: Do, count: int, size: int) -> None:
    """All chunks, by two threads, each with room for one."""
    numbers = itertools.count()

    def work() -> None:
        room = anonymous(size)
        while (number := next(numbers)) < count:
            do(number, room)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
