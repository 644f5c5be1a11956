"""How late a task that wants to run each 2 ms is, beside `fit` and beside a bare loop that runs in one other thread.

What a service feels whose event loop hosts a training.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tests.bench.loops import bare, fitted, near
from tests.bench.measure import Measure, Options, percentile

EVERY = 0.002


def run(options: Options) -> Iterator[Measure]:
    """The 99th percentile beside `fit`, over 1.25 times that beside the bare loop and 1 ms."""
    steps = 500 if options.quick else 5000
    size = near(500e-6)
    batches = size.batches(steps)
    lags: dict[str, list[float]] = {"alone": [], "bare": [], "fit": []}
    with options.room() as room, ThreadPoolExecutor(1) as executor:

        async def turn(name: str, number: int) -> None:
            if name == "alone":
                await beaten(asyncio.sleep(0.2 if options.quick else 1.0), lags[name])
            elif name == "bare":
                loop = asyncio.get_running_loop()
                await beaten(loop.run_in_executor(executor, partial(bare, size, batches, fused=True)), lags[name])
            else:
                await beaten(fitted(size, batches, room / str(number)), lags[name])

        asyncio.run(turn("bare", 0))  # warm
        lags["bare"].clear()
        for number in range(options.rounds):
            for name in lags if number % 2 else reversed(lags):
                asyncio.run(turn(name, number))
    limits = [1.25 * lag + 1e-3 for lag in lags["bare"]]
    over = tuple(lag / limit for lag, limit in zip(lags["fit"], limits, strict=True))
    yield Measure(name="p99 of the lag, over 1.25 x bare + 1 ms", values=over, at_most=1)
    for name, values in lags.items():
        yield Measure(name=f"  p99 {name}", values=tuple(lag * 1e3 for lag in values), unit=" ms")


async def beaten(work: Awaitable[object], p99: list[float]) -> None:
    """Await this beside a heartbeat; add the 99th percentile of its lag."""
    lags: list[float] = []

    async def beat() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(EVERY)
            lags.append(time.perf_counter() - began - EVERY)

    heart = asyncio.create_task(beat())
    try:
        await work
    finally:
        heart.cancel()
    p99.append(percentile(lags, 0.99))
