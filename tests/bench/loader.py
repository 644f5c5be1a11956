"""`as_loader()` against `async for` over the same stream: what a synchronous face costs.

Raw shuffled batches of 256 x 512 float32, warm, as in `rates`, where a batch costs the least; each with nothing done to
a batch, and with a step of about a millisecond (a matrix product in torch) between two.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.synth import synth
from streamtrain import ZarrStream
from tests.bench.measure import Measure, Options, ratios

CHUNK_ROWS, COLUMNS, BATCH = 4096, 512, 256


def run(options: Options) -> Iterator[Measure]:
    """The two ratios, and the rates behind them."""
    import torch

    chunks = 16 if options.quick else 80
    weights = torch.zeros(COLUMNS, COLUMNS)
    steps: dict[str, Callable[[Any], object]] = {"bare": lambda x: None, "with a step": lambda x: x @ weights}
    with options.room() as room:
        store = synth(room / "raw.zarr", rows=chunks * CHUNK_ROWS, columns=COLUMNS, chunk_rows=CHUNK_ROWS, codec="raw")
        for name, step in steps.items():
            rates = _measured(store, chunks, options.rounds, step)
            yield Measure(name=f"as_loader over async, {name}", values=ratios(*rates.values()), at_least=0.95)
            for what, values in rates.items():
                yield Measure(name=f"  {what}", values=tuple(values), unit=" batches/s")


def _measured(store: Path, chunks: int, rounds: int, step: Callable[[Any], object]) -> dict[str, list[float]]:
    stream, other = (ZarrStream(store, inputs="x", batch_size=BATCH, shuffle="block", threads=2) for _ in range(2))
    loader = other.as_loader()
    ways: dict[str, Callable[[], object]] = {
        "as_loader": lambda: _pull(loader, step),
        "async": lambda: asyncio.run(_pass(stream, step)),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in ways if number % 2 else reversed(ways):
            began = time.perf_counter()
            ways[name]()
            if number:  # before that all is warmed
                rates[name].append(chunks * CHUNK_ROWS / BATCH / (time.perf_counter() - began))
    return rates


def _pull(loader: Any, step: Callable[[Any], object]) -> None:
    for batch in loader:
        step(batch.inputs)


async def _pass(stream: ZarrStream, step: Callable[[Any], object]) -> None:
    async for batch in stream:
        step(batch.inputs)
