"""A billion samples in a million chunks: how long until the first batch, and what position and order take.

Only the metadata and the chunk files that first batches touch are written; all else is absent, which is fill. Each
round is a process of its own; its clock starts when everything is imported. `python -m tests.bench.huge STORE SHUFFLE
POSITION` is one of them.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr

from streamtrain import ZarrStream
from streamtrain.data.cells import CellGrid
from streamtrain.data.order import EpochOrder, Shuffle, default_cells_per_block
from streamtrain.data.splits import Split
from tests import warm
from tests.bench.measure import Measure, Options

SAMPLES, CHUNK, BATCH, SEED = 10**9, 1000, 256, 3
SHUFFLES: tuple[Shuffle, ...] = ("block", "global")
MIB = 1 << 20


def run(options: Options) -> Iterator[Measure]:
    """Seconds to the first batch, from the start and from anywhere; CPU, bytes and memory of position and order."""
    samples = SAMPLES // 1000 if options.quick else SAMPLES
    with options.room() as room:
        store = _store(room / "huge.zarr", samples)
        for shuffle in SHUFFLES:
            places = [random.Random(number).randrange(samples) for number in range(options.rounds)]
            rounds = [_round(store, samples, shuffle, place) for place in places]
            yield from _measures(shuffle, {name: tuple(each[name] for each in rounds) for name in rounds[0]})


def _measures(shuffle: Shuffle, values: dict[str, tuple[float, ...]]) -> Iterator[Measure]:
    yield Measure(name=f"{shuffle}: start to first batch", values=values["first"], at_most=0.3, unit=" s")
    yield Measure(name=f"{shuffle}: the same from a random position", values=values["there"], at_most=0.3, unit=" s")
    yield Measure(name=f"{shuffle}: CPU of state_dict + load_state_dict", values=values["cpu"], at_most=50, unit=" ms")
    yield Measure(name=f"{shuffle}: state_dict", values=values["size"], at_most=1023, unit=" B")
    yield Measure(name=f"{shuffle}: most memory of the order", values=values["order"], at_most=10, unit=" MiB")
    yield Measure(name=f"{shuffle}: CPU of len and plan", values=values["plan"], at_most=50, unit=" ms")


def _store(path: Path, samples: int) -> Path:
    group = zarr.create_group(path)
    group.create_array("x", shape=(samples,), chunks=(CHUNK,), dtype="float32", compressors=None)
    return path


def _order(samples: int, shuffle: Shuffle) -> EpochOrder:
    """As a stream makes it."""
    blocks = default_cells_per_block(4 * CHUNK, CHUNK)
    return EpochOrder(Split(CellGrid((samples,), (CHUNK,)), 0, samples), shuffle, blocks, SEED, 0)


def _touched(order: EpochOrder, position: int) -> set[int]:
    """The cells that the batch from this position on waits for."""
    if order.scattered:
        return {piece.cell for piece in order.run(position, min(position + BATCH, order.num_samples))}
    return {piece.cell for piece in order.pieces(order.block_of(position))}


def touch(store: Path, order: EpochOrder, place: int) -> None:
    """Write the chunks that the first batches from the start and from this position wait for."""
    (store / "x" / "c").mkdir(exist_ok=True)
    for cell in _touched(order, 0) | _touched(order, place):
        (store / "x" / "c" / str(cell)).write_bytes(np.ones(CHUNK, dtype="<f4").tobytes())


def _round(store: Path, samples: int, shuffle: Shuffle, place: int) -> dict[str, float]:
    touch(store, _order(samples, shuffle), place)
    done = warm.run(["-m", "tests.bench.huge", str(store), shuffle, str(place)], timeout=None)
    done.check_returncode()
    found: dict[str, float] = json.loads(done.stdout)
    return found


# ---- in a process of its own


def _stream(store: str, shuffle: Shuffle) -> ZarrStream:
    mode = shuffle if shuffle != "none" else False
    return ZarrStream(store, inputs="x", batch_size=BATCH, shuffle=mode, seed=SEED)


async def _seconds(stream: ZarrStream) -> float:
    """Until the first batch."""
    began = time.perf_counter()
    async for batch in stream:
        assert len(batch) == BATCH
        break
    took = time.perf_counter() - began
    await stream.aclose()
    return took


def _milliseconds(began: float) -> float:
    return 1e3 * (time.process_time() - began)


def measured(store: str, shuffle: Shuffle, place: int) -> dict[str, float]:
    """What one round comes to."""
    import torch  # noqa: F401 (its import is no part of the time)

    began = time.perf_counter()
    stream = _stream(store, shuffle)
    made = time.perf_counter() - began
    first = made + asyncio.run(_seconds(stream))
    began = time.process_time()
    length, plan = len(stream), stream.plan()
    planned = _milliseconds(began)
    assert length == -(-plan.samples // BATCH)
    began = time.process_time()
    state = json.dumps(stream.state_dict())
    stream.load_state_dict({**json.loads(state), "position": place})
    moved = json.dumps(stream.state_dict())
    stream.load_state_dict(json.loads(moved))
    cpu = _milliseconds(began)
    there = asyncio.run(_seconds(stream))
    order = memory_of_order(plan.samples, shuffle, place)
    size = max(len(state), len(moved))
    return {"first": first, "there": there, "cpu": cpu, "size": size, "order": order / MIB, "plan": planned}


def memory_of_order(samples: int, shuffle: Shuffle, place: int) -> int:
    """Most bytes that an order takes while blocks are placed from there on: all that it keeps and works with."""
    tracemalloc.start()
    try:
        order = _order(samples, shuffle)
        if order.scattered:
            for piece in order.run(place, min(place + 64 * BATCH, samples)):
                order.place(piece)
        else:
            first = order.block_of(place)
            for block in range(first, min(first + 2, order.num_blocks)):
                for piece in order.pieces(block):
                    order.place(piece)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    kind: Shuffle = "global" if sys.argv[2] == "global" else "block"
    print(json.dumps(measured(sys.argv[1], kind, int(sys.argv[3]))))
