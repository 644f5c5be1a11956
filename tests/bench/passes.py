"""Two hundred passes in one process: descriptors, threads, tasks and memory must not grow.

Whole passes, passes broken off in the middle, and passes from a loaded position take turns, on one stream that stays
open and on streams that are made, used and closed. `python -m tests.bench.passes STORE PASSES` is the process.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.synth import synth
from tests import warm
from tests.bench.measure import Measure, Options
from tests.bench.memory import resident

PASSES, EARLY, LOOKS = 200, 50, 20
"""What is there after EARLY passes, when all is warm, is what there may be after all; memory is the median of LOOKS."""
MIB = 1 << 20


@dataclass(frozen=True)
class Stock:
    """What a process holds."""

    descriptors: int
    threads: int
    tasks: int
    memory: int


def run(options: Options) -> Iterator[Measure]:
    """Growth of each from early on to the end."""
    passes = 12 if options.quick else PASSES
    with options.room() as room:
        store = synth(
            room / "s.zarr", rows=1 << (12 if options.quick else 15), columns=64, chunk_rows=256, codec="zstd"
        )
        done = warm.run(["-m", "tests.bench.passes", str(store), str(passes)], timeout=None)
        done.check_returncode()
    yield from growth(f"{passes} passes", [Stock(**each) for each in json.loads(done.stdout)])


def growth(what: str, stocks: Sequence[Stock], *, memory: float = 2) -> Iterator[Measure]:
    """How much more of each there is at the end than early on; at most so many MiB of `memory`."""
    early, looks = min(EARLY, len(stocks) // 3), min(LOOKS, len(stocks) // 3)
    for name in ("descriptors", "threads", "tasks"):
        grown = max(getattr(stock, name) for stock in stocks[early:]) - getattr(stocks[early - 1], name)
        yield Measure(name=f"{what}: {name} more", values=(grown,), at_most=0)
    held = [stock.memory for stock in stocks]
    grown = statistics.median(held[-looks:]) - statistics.median(held[early : early + looks])
    yield Measure(name=f"{what}: memory more", values=(grown / MIB,), at_most=memory, unit=" MiB")
    yield Measure(name="  memory", values=(held[-1] / MIB,), unit=" MiB")


# ---- in the process


async def main(store: Path, passes: int) -> list[Stock]:
    """What is held after each pass."""
    from streamtrain import ZarrStream

    def made() -> ZarrStream:
        return ZarrStream(store, inputs="x", targets="y", batch_size=100, shuffle="block", memory="32MiB")

    kept, stocks = made(), []
    for number in range(passes):
        stream = kept if number % 4 < 2 else made()
        if number % 3 == 2:
            await stream.open()
            stream.load_state_dict({**stream.state_dict(), "position": 1234})
        await _pass(stream, 7 if number % 3 == 1 else 1 << 30)
        await stream.aclose()
        del stream
        stocks.append(stock())
    return stocks


async def _pass(stream: object, most: int) -> None:
    count = 0
    async for _ in stream:  # type: ignore[attr-defined]
        count += 1
        if count == most:
            return


def stock() -> Stock:
    """What this process holds now, after a collection."""
    gc.collect()
    tasks = len(asyncio.all_tasks())
    return Stock(len(os.listdir("/proc/self/fd")), threading.active_count(), tasks, resident(os.getpid()))


if __name__ == "__main__":
    print(json.dumps([asdict(stock) for stock in asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))]))
