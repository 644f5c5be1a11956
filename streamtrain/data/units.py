"""How much of an epoch is filled together, and where such units begin. Pure.

Its law: the first batch comes early. Where a unit takes many files, the first ones are small and each next one is
GROWTH times as large; the order of samples knows nothing of units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streamtrain.data.chosen import Chosen
from streamtrain.data.order import EpochOrder
from streamtrain.data.splits import Split

RAMP_CELLS = 128
"""The first unit touches about so many cells, each a file or more to open."""
GROWTH = 4
MOST_CELLS = 1 << 16
"""A unit of a scattered order touches at most about so many cells: each is a piece of work of its own."""
APART = 2
"""Batches for which there is room where they are copied out of their buffer: one is held, one is made."""
PLANNING_BYTES = 64
"""What it takes to plan a row of a scattered order, beside the row itself."""


@dataclass(frozen=True)
class Sizes:
    """What a pass takes, worked out before it starts."""

    first_unit: int
    """Blocks of the first unit; of a scattered order its rows."""
    unit_blocks: int
    """Blocks of the order that are filled together; of a scattered order 1."""
    unit_rows: int
    """Most rows of a unit."""
    buffer_bytes: int
    units: int
    """How many units an epoch has, if none were small."""
    scratch_bytes: int
    """Of one thread."""
    beside_bytes: int = 0
    """Of that: for chunks that are decoded side by side; 0 where there is none to spare."""
    room_bytes: int = 0
    """Of what is laid out only when a batch is made."""
    kept_bytes: int = 0
    """Of offsets that stay in memory."""
    buffers: int = 2
    """How many must be there at the least, if there are so many units."""
    batch_bytes: int = 0
    """Of a batch that is copied out of its buffer; 0 where none can be."""

    @property
    def least(self) -> int:
        """The least memory that works, while a batch of the pass before is still held: two buffers or three (one, if it
        holds the epoch, and another or a few batches that are copied out of it), and one thread's scratch; two batches
        that are laid out, and what stays in memory."""
        return self._without_before + self._before_at_least

    @property
    def _without_before(self) -> int:
        buffers = self.buffer_bytes * min(self.units, self.buffers)
        return buffers + self.scratch_bytes + 2 * self.room_bytes + self.kept_bytes

    @property
    def _before_at_least(self) -> int:
        """Bytes for batches of the pass before, beside the buffers that a pass needs."""
        if self.units > 1:
            return 0
        return min(self.buffer_bytes, APART * self.batch_bytes or self.buffer_bytes)

    def copies(self, total: int) -> bool:
        """Whether batches are copied out of their buffer before they are handed over: it holds the epoch, and there is
        no other one for the next in `total` bytes, while one of them is still held."""
        short = self._without_before + self.buffer_bytes > total
        return self.units == 1 and short and self._before_at_least < self.buffer_bytes

    def threads_within(self, total: int, threads: int, cache_bytes: int) -> int:
        """How many of these threads have room in `total` bytes, beside the buffers and what is cached; at least 1."""
        while threads > 1 and self.needed(total, threads) + cache_bytes > total:
            threads -= 1
        return threads

    def needed(self, total: int, threads: int = 1) -> int:
        """Bytes of `total` with which a pass of so many threads gets on, while a batch of the pass before is held."""
        before = self.buffer_bytes if self.units == 1 and not self.copies(total) else self._before_at_least
        return self._without_before + before + (threads - 1) * self.scratch_bytes


def least_buffers(split: Split | Chosen, unit_cells: int, batch: int) -> int:
    """Two: one that is consumed, one that is filled. Three where a unit of so many cells may hold no whole batch.

    Then all that it holds goes on in the next unit, and waits for that, while the batch before is still looked at.
    """
    if isinstance(split, Chosen):
        return 3  # some units may have next to nothing, of weighted samples above all
    short = split.exceptions
    rows = unit_cells * split.num_samples // max(1, 2 * split.num_cells)  # of uneven cells at least half the mean
    if short is not None:
        rows = unit_cells * split.grid.full - sum(short.values())
    return 2 if rows >= 2 * batch - 1 else 3


def first_rows(unit_rows: int, batch: int, samples: int, cells: int) -> int:
    """Rows of a scattered order's first unit, whole batches; all where that is the epoch, or cells are few."""
    if unit_rows >= samples or cells <= RAMP_CELLS:
        return unit_rows
    return min(unit_rows, -(-max(RAMP_CELLS, batch) // batch) * batch)


def first_blocks(unit_blocks: int, batch: int, block_rows: int, blocks: int, cells_per_block: int) -> int:
    """Blocks of the first unit, at least two batches; all where that is the epoch."""
    if unit_blocks >= blocks:
        return unit_blocks
    return min(unit_blocks, max(-(-RAMP_CELLS // cells_per_block), -(-2 * batch // block_rows)))


def growing(first: int, most: int) -> Iterator[int]:
    """The sizes of units one after another, without end."""
    size = first
    while True:
        yield min(size, most)
        size = min(size * GROWTH, most)


def unit_spans(order: EpochOrder, sizes: Sizes, origin: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
    """Start, stop and blocks of the units from a position on. A function, since a generator would keep its pass alive.

    Positions of a scattered order belong to no blocks.
    """
    end = min(end, order.num_samples)
    if origin >= end:
        return
    if order.scattered:
        yield from _runs(sizes, origin, end)
        return
    block = order.block_of(origin)
    for size in growing(sizes.first_unit, sizes.unit_blocks):
        if block >= order.num_blocks or (start := order.block_start(block)) >= end:
            return
        following = min(block + size, order.num_blocks)
        yield start, order.block_start(following), list(range(block, following))
        block = following


def _runs(sizes: Sizes, start: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
    for rows in growing(sizes.first_unit, sizes.unit_rows):
        if start >= end:
            return
        yield start, min(start + rows, end), []
        start += rows


def rows_of_units(sizes: Sizes, samples: int) -> Iterator[tuple[int, int]]:
    """Of a whole epoch in a scattered order: rows of a unit, and how many units have so many. A handful of pairs."""
    left = samples
    for rows in growing(sizes.first_unit, sizes.unit_rows):
        if rows == sizes.unit_rows or left <= rows:
            if left // rows:
                yield rows, left // rows
            if left % rows:
                yield left % rows, 1
            return
        yield rows, 1
        left -= rows
