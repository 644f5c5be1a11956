"""Whether shuffling is real: orders differ, batches mix cells, and every row may come at every position."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.synth import synth
from streamtrain import ZarrStream
from tests.bench.measure import Measure, Options

CELL, CELLS, BATCH = 64, 40, 100
BINS = 10
LEAST_P = 1e-3
"""A fair shuffle falls below this once in a thousand tries; seeds are fixed, so it does or does not for good."""

Ints = NDArray[np.int64]


def run(options: Options) -> Iterator[Measure]:
    """All of it, by the orders that streams give."""
    passes = 100 if options.quick else 400
    with options.room() as room:
        store = synth(room / "store.zarr", rows=CELL * CELLS, columns=1, chunk_rows=CELL)
        for blocks in (4, 16):
            orders = asyncio.run(drawn(store, passes, blocks))
            same = passes - len({order.tobytes() for order in orders})
            name = f"K={blocks}:"
            yield Measure(name=f"{name} orders that occur again among {passes}", values=(same,), at_most=0)
            whole = all(np.array_equal(np.sort(order), np.arange(CELL * CELLS)) for order in orders)
            yield Measure(name=f"{name} passes that miss or repeat samples", values=(float(not whole),), at_most=0)
            fewest = min(cells_of_batches(order, BATCH) for order in orders)
            yield Measure(name=f"{name} cells in a batch, fewest", values=(fewest,), at_least=min(blocks, 8))
            yield Measure(name=f"{name} p, rows over positions", values=(p_of_positions(orders),), at_least=LEAST_P)
            p = p_of_places(orders, CELL * blocks)
            yield Measure(name=f"{name} p, rows of cells over their blocks", values=(p,), at_least=LEAST_P)


async def drawn(store: Path, passes: int, blocks: int) -> list[Ints]:
    """Orders of samples: some epochs each of several seeds."""
    orders: list[Ints] = []
    for seed in range(4):
        stream = ZarrStream(
            store, inputs="x", batch_size=BATCH, shuffle="block", seed=seed, shuffle_blocks=blocks, output="numpy"
        )
        async with stream:
            orders += [await order_of(stream) for _ in range(passes // 4)]
    return orders


async def order_of(stream: ZarrStream) -> Ints:
    """Sample numbers of one epoch, in the order in which they come."""
    return np.concatenate([np.asarray(batch.index) async for batch in stream])


def cells_of_batches(order: Ints, size: int) -> int:
    """The fewest cells from which a whole batch is drawn."""
    batches = [order[start : start + size] // CELL for start in range(0, len(order) - size + 1, size)]
    return min(len(np.unique(batch)) for batch in batches)


def p_of_positions(orders: list[Ints]) -> float:
    """Whether certain rows come equally often in each tenth of the epoch: p of a chi-square test.

    Rows of cells far apart, so that one says little about another; each is counted in every order.
    """
    rows = np.arange(CELLS // 2) * 2 * CELL + np.arange(CELLS // 2) * 3 % CELL
    counts = np.zeros((len(rows), BINS))
    for order in orders:
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        counts[np.arange(len(rows)), position[rows] * BINS // len(order)] += 1
    return p_of_even(counts)


def p_of_places(orders: list[Ints], block: int) -> float:
    """Whether a row's place in its block does not depend on its place in its cell."""
    counts = np.zeros((8, 8))
    for order in orders:
        whole = order[: len(order) // block * block]
        place = np.arange(len(whole)) % block
        np.add.at(counts, (whole % CELL * 8 // CELL, place * 8 // block), 1)
    return p_of_even(counts)


def p_of_even(counts: NDArray[Any]) -> float:
    """p of these counts, rows of a table each of which should be even, by a chi-square test."""
    expected = counts.sum(axis=1, keepdims=True) / counts.shape[1]
    return chi_square_p(float(((counts - expected) ** 2 / expected).sum()), counts.shape[0] * (counts.shape[1] - 1))


def chi_square_p(value: float, freedom: int) -> float:
    """The chance of a chi-square of at least `value` (Wilson and Hilferty 1931: its cube root is about normal)."""
    spread = 2 / (9 * freedom)
    return 0.5 * math.erfc(((value / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(2 * spread))
