"""What a stream comes to, worked out from metadata alone: cells, sizes of buffers, what a pass will cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data import entropy
from streamtrain.data.block import Column, block_bytes
from streamtrain.data.budget import format_bytes, format_enough
from streamtrain.data.cells import CellGrid, Cells, joined
from streamtrain.data.choosing import Choice, Draw, draw, pick
from streamtrain.data.chosen import Chosen
from streamtrain.data.feed import Site
from streamtrain.data.framing import Field, Frame, Framing, take_frames, whole
from streamtrain.data.layout import decoded_whole
from streamtrain.data.order import BLOCK_BYTES, EpochOrder, Shuffle, default_cells_per_block
from streamtrain.data.ragged import RaggedColumn
from streamtrain.data.ragged_site import RaggedSite
from streamtrain.data.ragged_sizes import Extents, extents_of, fitted, room_bytes, row_cost, table_bytes
from streamtrain.data.ranks import Ranks
from streamtrain.data.splits import Split, SplitBy, split_bounds
from streamtrain.data.units import (
    MOST_CELLS,
    PLANNING_BYTES,
    Sizes,
    first_blocks,
    first_rows,
    least_buffers,
    rows_of_units,
)
from streamtrain.errors import ConfigError, DataError

UNIT_BYTES = 16 << 20
"""Small blocks are filled together until they have so many bytes, or a quarter of the memory."""
WORTH_BESIDE = 64
"""Chunks are decoded side by side where memory is at least so many times what that takes of a thread."""


@dataclass(frozen=True)
class Place:
    """Where the rows of an array go."""

    column: int
    part: tuple[int, ...]
    """The channel of a stack; empty for a column of its own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pass costs, told before it."""

    samples: int
    batches: int
    cells: int
    """Parts of the store (usually chunks) that rows come from."""
    cells_per_block: int
    """Cells whose rows are permuted together."""
    chunks: int
    """Chunks read in a pass, counted as often as they are."""
    bytes_used: int
    """Decoded bytes of the samples themselves; of an array that is inputs and targets once."""
    bytes_read: int
    """Decoded bytes of the chunks read for them."""
    read_amplification: float
    """`bytes_read / bytes_used`: above 1 where chunks are read for a part of their rows, or more than once."""
    shuffle_quality: float
    """From 0 (a batch lies in one cell) to 1 (a full shuffle): how evenly a batch's rows come from the cells. Expected
    entropy over that of a full shuffle; more `shuffle_blocks` raise it. It takes each cell for a kind of its own: where
    cells are alike (a few classes, say), batches are better than this."""
    buffer_bytes: int
    memory_least: int
    """The least `memory` that works."""
    memory: int
    samples_cut: int
    """Windows that cross a border between splits by chunk, and are in none: the fewer, the larger the chunks."""


@dataclass(frozen=True)
class Survey:
    """What metadata and arguments come to."""

    frames: list[Frame]
    """One for each store."""
    split: Split | Chosen
    """The samples of an epoch; which of them come how often is the epoch's where there are weights."""
    drawn: Draw | None
    """Set where samples are chosen or weighted."""
    shuffle: Shuffle
    cells_per_block: int
    columns: list[Column]
    """One for each part of a batch, then the sample numbers'."""
    places: list[Place]
    """Where each array's rows go, and the sample numbers."""
    sizes: Sizes
    memory_least: int
    """The least `memory` that works, with units cut for it and nothing kept."""
    cache_bytes: int
    """For decoded chunks that several cells share; 0 where none do."""
    batches: int
    batch_size: int
    memory: int
    cut: int
    """Samples that cross a border between splits."""
    read: Sequence[Sequence[Site]]
    """Store by store: the arrays that are read; one that several columns are made of in one way is so once."""

    def epoch(self, seed: int, epoch: int) -> Split | Chosen:
        """What this epoch goes through."""
        return self.split if self.drawn is None else self.drawn.split(seed, epoch)

    def plan(self) -> Plan:
        """What a pass costs."""
        used = read = chunks = 0
        total = self.split.grid.num_samples
        shares = [math.prod(frame.sample_shape) / total for frame in self.frames]
        for share, site in ((share, site) for share, sites in zip(shares, self.read, strict=True) for site in sites):
            touched = round(chunks_read(site, self.split, self.shuffle, self.sizes, share))
            rows = round(self.split.num_samples * site.row_bytes * share)
            used += rows
            chunks += touched
            read += max(rows, touched * site.layout.chunk_bytes if decoded_whole(site.layout) else 0)
        return Plan(
            samples=self.split.num_samples,
            batches=self.batches,
            cells=self.split.num_cells,
            cells_per_block=min(self.cells_per_block, self.split.num_cells) if self.shuffle == "block" else 1,
            chunks=chunks,
            bytes_used=used,
            bytes_read=read,
            read_amplification=read / used,
            shuffle_quality=shuffle_quality(self.shuffle, self.split, self.cells_per_block, self.batch_size),
            buffer_bytes=self.sizes.buffer_bytes,
            memory_least=self.memory_least,
            memory=self.memory,
            samples_cut=self.cut,
        )


def take_survey(
    stores: Sequence[Sequence[Field]],
    *,
    framings: Sequence[Framing],
    stack: bool,
    choice: Choice,
    values: Callable[[list[Frame]], Mapping[str, NDArray[Any]]],
    batch_size: int,
    ranks: Ranks,
    drop_last: bool,
    shuffle: Shuffle,
    shuffle_blocks: int | None,
    split: Sequence[float] | None,
    split_by: SplitBy,
    split_seed: int,
    memory: int,
    cache: int | None,
    prefetch: int | None,
    store: str,
    names: Sequence[str],
    change_bytes: int = 0,
) -> Survey:
    """Work out all that can be known before any data is read.

    `names` are what messages call each store, and `store` all of them. `values` gives what the choice's arrays say of
    each sample, `change_bytes` is one thread's scratch for what is done
    to rows on their way.
    Raises DataError where arrays and arguments do not fit together, ConfigError where the memory is too small.
    """
    frames = take_frames(stores, framings, names)
    fields, sites = stores[0], [site for frame in frames for site in frame.sites]
    grid = joined([CellGrid(frame.sample_shape, frame.cell) for frame in frames])
    drawn: Draw | None = None
    part: Split | Chosen
    cut = 0
    overlaps = split is not None and frames[0].overlaps
    if choice.all and not any(frame.cut_out for frame in frames) and not (overlaps and split_by == "chunk"):
        part = cut_split(grid, frames, split, split_by, split_seed, store, ascending=shuffle == "none")
    else:
        found = values(frames)
        picked = pick(choice, found, grid, frames, split, split_by, split_seed)
        cut, run = picked.cut, picked.run if choice.all else None
        if run is None:
            drawn = draw(choice, found, grid, picked.numbers, split_by)
            part = drawn.chosen
        else:  # arithmetic does, without a table
            part = Split(grid, *run)
    count = part.num_samples
    if drop_last and count < batch_size:
        raise DataError(
            f"{store}: {count} samples are fewer than a batch of {batch_size}, and drop_last drops them all",
            hint="lower batch_size, or leave drop_last out",
        )
    k = shuffle_blocks or default_cells_per_block(
        sum(site.row_bytes for site in frames[0].sites) * grid.full, grid.full
    )
    columns, places = columns_of(fields, frames[0], ranks.share(batch_size), stack=stack)
    for column in columns:
        if column.row_bytes == 0:
            raise DataError(f"array {column.name!r}: samples of shape {column.row_shape} hold nothing")
    columns.append(Column("index", (), np.dtype(np.int64), ranks.share(batch_size)))
    places.append(Place(len(columns) - 1, ()))
    extents = extents_of(columns, frames, drawn)
    scattered = shuffle == "global" or (shuffle == "none" and grid.scattered)
    cache_bytes = _cache_bytes(sites, shuffle, scattered, memory, cache)
    order = EpochOrder(part, shuffle, k, 0, 0)
    one = block_bytes(columns, 1) + batch_size * row_cost(columns, extents)
    wanted = min(memory // 4, (prefetch or memory) * one)
    ways = [
        _sizes(order, columns, extents, frames, batch_size, change_bytes, most, (part if drawn is None else drawn).most)
        for most in (wanted, max(UNIT_BYTES, BLOCK_BYTES), one, 1)
    ]
    least = min(way.least for way, _ in ways[1:])  # those that are the same for any memory: it must do what this says
    sizes, columns = next((way for way in ways if way[0].least <= memory), ways[-1])
    if sizes.least > memory:
        raise ConfigError(
            f"memory={format_bytes(memory)} is too small: a block of {min(k, part.num_cells)} chunks takes "
            f"{format_bytes(sizes.buffer_bytes)}, and the least that works is {format_enough(least)}",
            hint=f"memory={math.ceil(least / 2**20)}MiB, or a smaller shuffle_blocks= or batch_size=",
        )
    beside = max(((site.layout.together - 1) * site.layout.chunk_bytes for site in sites if site.one_chunk), default=0)
    useful = ranks.alone and not (scattered or cache_bytes)
    if useful and WORTH_BESIDE * beside <= memory and sizes.least + beside <= memory:
        sizes = replace(sizes, beside_bytes=beside, scratch_bytes=sizes.scratch_bytes + beside)
    batches = count // batch_size if drop_last else -(-count // batch_size)
    cache_bytes = min(cache_bytes, memory - sizes.needed(memory))
    return Survey(
        frames,
        part,
        drawn,
        shuffle,
        k,
        columns,
        places,
        sizes,
        least,
        cache_bytes,
        batches,
        batch_size,
        memory,
        cut,
        read=[frame.sites for frame in frames],
    )


def columns_of(
    fields: Sequence[Field], frame: Frame, batch_size: int, *, stack: bool
) -> tuple[list[Column], list[Place]]:
    """The columns of a batch, and where each array goes; with `stack` all inputs make one, as its channels."""
    columns = [
        site.column(f.name, batch_size)
        if isinstance(site, RaggedSite)
        else Column(f.name, site.row_shape, f.dtype, batch_size)
        for f, site in zip(fields, frame.sites, strict=True)
    ]
    inputs = sum(not field.target for field in fields)
    for column in columns if stack else ():
        if isinstance(column, RaggedColumn):
            raise ConfigError(f"stack=True: rows of {column.name!r} have different lengths", hint="leave stack= out")
    if not stack or inputs == len(columns) == 0:
        return columns, [Place(number, ()) for number in range(len(columns))]
    first = columns[0]
    for other in columns[1:inputs]:
        if (other.row_shape, other.dtype) != (first.row_shape, first.dtype):
            raise DataError(
                f"stack=True: samples of {first.name!r} are {first.dtype}{list(first.row_shape)}, of {other.name!r} "
                f"{other.dtype}{list(other.row_shape)}",
                hint="stack arrays of one shape and dtype (dtype='float32' casts them)",
            )
    stacked = Column("+".join(c.name for c in columns[:inputs]), (inputs, *first.row_shape), first.dtype, batch_size)
    places = [Place(0, (channel,)) for channel in range(inputs)]
    return [stacked, *columns[inputs:]], places + [Place(1 + n, ()) for n in range(len(columns) - inputs)]


def cut_split(
    grid: Cells,
    frames: Sequence[Frame],
    split: Sequence[float] | None,
    by: SplitBy,
    seed: int,
    store: str,
    *,
    ascending: bool,
) -> Split:
    """The part of the samples that `split` names; DataError where it holds none.

    Where samples share places, it divides the places along the first sample axis, and holds those that lie in it whole.
    """
    overlaps = frames[0].overlaps and split is not None
    if overlaps and by != "range":
        raise ConfigError(
            f"split_by={by!r} of windows that overlap would put the same places into both parts",
            hint="split_by='range' or 'chunk', or a stride of at least what a sample covers",
        )
    try:
        if overlaps:
            lower, upper = whole(frames, *split_bounds(split, sum(frame.places[0] for frame in frames)))
        else:
            lower, upper = split_bounds(split, grid.num_samples)
    except ValueError as error:
        raise DataError(f"{store}: {error}", hint="split=(0.0, 0.9), or two sample numbers") from error
    if lower == upper:
        raise DataError(
            f"{store}: no samples (split {split} of {grid.num_samples})", hint="choose a wider split, or data with rows"
        )
    return Split(grid, lower, upper, by, seed, ascending=ascending)


def _cache_bytes(sites: Sequence[Site], shuffle: Shuffle, scattered: bool, memory: int, given: int | None) -> int:
    """Bytes for decoded chunks, out of the budget: as many as were asked for; or enough for those that are read for
    more than one cell, and for all where a quarter holds them (of an unshuffled epoch finished batches are kept)."""
    whole = [site for site in sites if decoded_whole(site.layout)]
    if given is not None:
        return min(given, memory // 2) if whole else 0
    shared = [site for site in whole if scattered or not site.cell_holds_chunks]
    part = min(2 * sum(map(_decoded_bytes, shared)), memory // (4 if scattered else 8))
    every = sum(map(_decoded_bytes, whole))
    return max(part, every) if every <= memory // 4 and shuffle != "none" else part


def _decoded_bytes(site: Site) -> int:
    """Of all chunks of an array."""
    layout = site.layout
    return math.prod(-(-s // c) for s, c in zip(layout.shape, layout.chunk_shape, strict=True)) * layout.chunk_bytes


def _sizes(
    order: EpochOrder,
    columns: Sequence[Column],
    extents: Extents,
    frames: Sequence[Frame],
    size: int,
    change_bytes: int,
    most: int,
    rows_of: Callable[[int], int],
) -> tuple[Sizes, list[Column]]:
    """The sizes, and the columns with room for all that may come. `size`: samples of a batch; `most`: bytes up to which
    small blocks may be filled together."""
    split = order.split
    row = max(1, block_bytes(columns, 1) // size + row_cost(columns, extents))
    cells = None
    if order.scattered:
        blocks, wanted = 1, max(1, min(BLOCK_BYTES, most))
        wanted //= row + PLANNING_BYTES
        if split.num_cells > MOST_CELLS:
            wanted = min(wanted, MOST_CELLS)
        rows = min(split.num_samples, max(1, wanted // size) * size)
        units = -(-split.num_samples // rows)
        first = first_rows(rows, size, split.num_samples, split.num_cells)
        buffers = 2
    else:
        full = max(1, min(split.num_samples, rows_of(-(-split.num_cells // order.num_blocks))))
        blocks = max(1, min(order.num_blocks, min(UNIT_BYTES, most) // (full * row)))
        rows = min(split.num_samples, blocks * full)
        units = -(-order.num_blocks // blocks)
        cells = blocks * -(-split.num_cells // order.num_blocks)
        first = first_blocks(blocks, size, full, order.num_blocks, -(-split.num_cells // order.num_blocks))
        buffers = least_buffers(split, blocks * (split.num_cells // order.num_blocks), size)
    made = fitted(columns, extents, cells, rows)
    sizes = Sizes(
        first_unit=first,
        unit_blocks=blocks,
        unit_rows=rows,
        buffer_bytes=block_bytes(made, -(-rows // size)),
        units=units,
        buffers=buffers,
        scratch_bytes=change_bytes + max(scratch_bytes(site, frame.cell) for frame in frames for site in frame.sites),
        room_bytes=room_bytes(made),
        kept_bytes=table_bytes(frames),
        batch_bytes=0 if any(column.area_bytes for column in made) else block_bytes(made, 1),
    )
    return sizes, made


def scratch_bytes(site: Site, cell_shape: Sequence[int]) -> int:
    """Bytes that one thread takes for reading a cell of this array."""
    if isinstance(site, RaggedSite):
        return site.scratch_bytes
    layout = site.layout
    cell = math.prod(cell_shape) * math.prod(site.row_shape) * max(site.dtype.itemsize, layout.dtype.itemsize)
    copies = cell if site.selection or site.dtype != layout.dtype or layout.axes != tuple(range(layout.ndim)) else 0
    if not decoded_whole(layout):
        return min(layout.chunk_bytes, 2 * cell) + copies + site.region_bytes
    return layout.chunk_bytes + max(layout.chunk_bytes, layout.decode_room) + copies + site.region_bytes


def chunks_read(site: Site, split: Split | Chosen, shuffle: Shuffle, sizes: Sizes, share: float) -> float:
    """About how many chunks of an array a pass reads that has this share of the samples."""
    grid = split.grid
    if shuffle == "global":
        chunks = max(1, round(share * grid.num_samples) // site.rows_per_chunk)
        touched = sum(
            units * (chunks * (1 - (1 - 1 / chunks) ** max(1, round(share * rows))) if chunks > 1 else 1)
            for rows, units in rows_of_units(sizes, split.num_samples)
        )
        return touched * site.chunks_of_row
    return split.num_cells * share * site.chunks_per_cell


def shuffle_quality(shuffle: Shuffle, split: Split | Chosen, k: int, batch: int) -> float:
    """Expected entropy of the cells that a batch's rows come from, over that of a full shuffle."""
    cells, batch = split.num_cells, min(batch, split.num_samples)
    rows = split.num_samples / max(1, cells)
    full = entropy.drawn(batch, cells, rows)
    blocks = max(1, cells // k)
    if full <= 0 or (shuffle == "block" and blocks == 1):
        return 0.0 if shuffle == "none" else 1.0
    if shuffle == "global":
        return 1.0
    if shuffle == "none":
        cells, blocks, rows = 1, 1, rows if split.grid.line else split.grid.run
    return min(1.0, entropy.of_blocks(batch, cells / blocks, rows, split.num_samples // max(1, batch)) / full)
