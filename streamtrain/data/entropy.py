"""How well batches are mixed: the entropy, in nats, of the cells that a batch's rows come from. Pure.

Its law: expectations are of the very draw that an order makes (so many rows of a block without replacement), so that
what is told before a pass is what its batches have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

WIDTH = 12
"""Deviations to both sides of the mean beyond which chances are no longer summed."""
PLACES = 48
"""Places of a batch's beginning within a block that are looked at; the others lie between."""


def drawn(batch: float, cells: float, rows: float) -> float:
    """Expected entropy of a batch drawn without replacement from `cells` cells of `rows` rows each.

    Numbers need not be whole: they are means where cells differ.
    """
    everything = cells * rows
    if batch <= 1 or cells <= 1:
        return 0.0
    if batch >= everything:
        return math.log(cells)
    mean = batch / cells
    spread = math.sqrt(mean * (1 - 1 / cells) * (everything - batch) / max(1.0, everything - 1))
    first = max(0, math.ceil(batch - (everything - rows)), math.floor(mean - WIDTH * spread))
    last = max(first, min(math.floor(batch), math.floor(rows), math.ceil(mean + WIDTH * spread) + 1))
    n = np.arange(first, last, dtype=np.float64)
    steps = np.log((rows - n) * (batch - n)) - np.log((n + 1) * (everything - rows - batch + n + 1))
    chances = np.exp(np.concatenate([[0.0], np.cumsum(steps)]) - max(0.0, float(np.cumsum(steps).max(initial=0.0))))
    counts = np.arange(first, last + 1, dtype=np.float64)
    mass = counts * np.log(np.maximum(counts, 1))
    return max(0.0, math.log(batch) - cells / batch * float((chances * mass).sum() / chances.sum()))


def of_blocks(batch: float, cells: float, rows: float, batches: int) -> float:
    """Expected entropy of the epoch's first batches where blocks of so many cells are permuted one by one.

    Where blocks end within a batch, several have a part in it. With one cell to a block this is of rows as they lie.
    """
    return float(np.mean([_of_parts(batch, first, cells, rows) for first in _firsts(batch, cells * rows, batches)]))


def _firsts(batch: float, block: float, batches: int) -> Iterator[float]:
    """Rows that are left of the block where a batch begins: of each batch, or some spread evenly among all."""
    step = math.gcd(int(batch), int(block)) if float(batch).is_integer() and float(block).is_integer() else 0
    count = int(block) // step if step else 0
    if batches <= PLACES:
        yield from (block - number * batch % block for number in range(max(1, batches)))
    elif 0 < count <= PLACES:
        yield from (step * number for number in range(1, count + 1))
    else:
        yield from ((number + 0.5) / PLACES * block for number in range(PLACES))


def _of_parts(batch: float, first: float, cells: float, rows: float) -> float:
    """Of a batch whose first block gives at most `first` rows: which block, and then which of its cells."""
    first = min(first, batch)
    whole, rest = divmod(batch - first, cells * rows)
    total = 0.0
    for count, size in ((1, first), (whole, cells * rows), (1, rest)):
        if count and size > 0:
            share = size / batch
            total += count * share * (drawn(size, cells, rows) - math.log(share))
    return total
