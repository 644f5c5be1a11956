"""What the order promises: arithmetic that counts each sample once, in O(1) memory, the same for ever."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.data.cells import CellGrid
from streamtrain.data.chosen import Chosen
from streamtrain.data.order import (
    BLOCK_BYTES,
    LARGE_BLOCK_BYTES,
    MIN_CELLS,
    EpochOrder,
    Shuffle,
    default_cells_per_block,
)
from streamtrain.data.permutation import SPAN_TILE, TABLE_LIMIT, Ints, Permutation, Spans, derive_key
from streamtrain.data.splits import Split, SplitBy, split_bounds

SPLITS: tuple[SplitBy, ...] = ("range", "chunk", "sample")
GOLDEN_SMALL = [6, 3, 1, 5, 8, 4, 0, 2, 7]
GOLDEN_LARGE = [907216558369, 303321951623, 532205829958, 656947107774]
GOLDEN_ORDER = [0, 11, 10, 2, 7, 8, 5, 4, 3, 6]
SHUFFLES: tuple[Shuffle, ...] = ("none", "block", "global")


@st.composite
def grids(draw: st.DrawFn) -> CellGrid:
    """Small grids over 1 to 3 axes: half of them even; of the others cells may be larger than the axis, and cut."""
    axes, even = draw(st.integers(1, 3)), draw(st.booleans())
    largest = (60, 12, 6)[axes - 1]
    if even:
        cell = tuple(draw(st.integers(1, largest // 3)) for _ in range(axes))
        return CellGrid(tuple(size * draw(st.integers(1, 3)) for size in cell), cell)
    shape = tuple(draw(st.integers(1, largest)) for _ in range(axes))
    return CellGrid(shape, tuple(draw(st.integers(1, size + 2)) for size in shape))


@st.composite
def splits(draw: st.DrawFn, by: SplitBy | None = None) -> Split:
    """Bounds anywhere, or where a band of cells begins or ends."""
    grid = draw(grids())
    band = grid.cell[0] * grid.num_samples // grid.shape[0]
    bounds = st.integers(0, grid.num_samples) | st.integers(0, grid.num_samples // band).map(lambda k: k * band)
    lower, upper = sorted([draw(bounds), draw(bounds)])
    kind = by if by is not None else draw(st.sampled_from(SPLITS))
    return Split(grid, lower, upper, kind, draw(st.integers(0, 9)), ascending=draw(st.booleans()))


@st.composite
def orders(draw: st.DrawFn, shuffle: Shuffle | None = None) -> EpochOrder:
    kind = shuffle if shuffle is not None else draw(st.sampled_from(SHUFFLES))
    return EpochOrder(draw(splits()), kind, draw(st.integers(1, 9)), draw(st.integers(0, 9)), draw(st.integers(0, 9)))


def numbers_of(split: Split | Chosen) -> list[Ints]:
    """The sample numbers that each of the split's cells contributes."""
    ids, lower, upper = split.cells(np.arange(split.num_cells))
    result = []
    for cell, a, b in zip(ids.tolist(), lower.tolist(), upper.tolist(), strict=True):
        size = int(split.grid.sizes(np.array([cell]))[0])
        result.append(split.grid.numbers(cell, np.arange(size)[split.rows(cell, a, b)]))
    return result


def whole(split: Split | Chosen) -> Ints:
    return np.concatenate([np.empty(0, dtype=np.int64), *numbers_of(split)])


def pieces_of(order: EpochOrder, step: int) -> Iterator[Any]:
    if order.scattered:
        for start in range(0, order.num_samples, step):
            yield from order.run(start, min(start + step, order.num_samples))
    else:
        for block in range(order.num_blocks):
            yield from order.pieces(block)


def sequence(order: EpochOrder, step: int = 7) -> Ints:
    """The whole epoch: sample numbers by position; checks that each position is filled exactly once."""
    result = np.full(order.num_samples, -1, dtype=np.int64)
    for piece in pieces_of(order, step):
        rows, places = order.place(piece)
        size = int(order.split.grid.sizes(np.array([piece.cell]))[0])
        assert (result[places] == -1).all()
        result[places] = order.split.grid.numbers(piece.cell, np.arange(size)[rows])
    assert (result >= 0).all()
    return result


# Keys and permutations


def test_keys_are_the_same_on_every_machine() -> None:
    assert derive_key(0, 1, "cells") == 6239072627642725783
    several: list[tuple[int | str, ...]] = [(0, 1), (1, 0), ("01",), (0, 1, "a"), (-1,)]
    assert len({derive_key(*parts) for parts in several}) == 5


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_is_a_bijection_and_the_inverse_inverts_it(n: int, key: int) -> None:
    permutation, all_of_them = Permutation(n, key), np.arange(n)
    images = permutation.forward(all_of_them)
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), all_of_them)
    assert np.array_equal(permutation.inverse(images), all_of_them)


@pytest.mark.parametrize("n", [TABLE_LIMIT, TABLE_LIMIT + 1, 2 * TABLE_LIMIT, 2 * TABLE_LIMIT + 1, 100_003])
def test_a_permutation_is_a_bijection_on_both_sides_of_the_table_limit(n: int) -> None:
    permutation, all_of_them = Permutation(n, derive_key(n)), np.arange(n)
    images = permutation.forward(all_of_them)
    assert np.array_equal(np.bincount(images, minlength=n), np.ones(n))
    assert np.array_equal(permutation.inverse(images), all_of_them)
    assert np.array_equal(permutation.span(5, 5000), images[5:5000])


@given(st.integers(TABLE_LIMIT + 1, 2**48), st.integers(0, 2**64 - 1), st.data())
def test_large_permutations_invert_and_stay_inside(n: int, key: int, data: st.DataObject) -> None:
    some = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    permutation = Permutation(n, key)
    images = permutation.forward(some)
    assert ((images >= 0) & (images < n)).all()
    assert np.array_equal(permutation.inverse(images), some)
    assert np.array_equal(permutation.forward(permutation.inverse(some)), some)


@settings(max_examples=40)
@given(st.integers(0, 2**64 - 1), st.data())
def test_short_spans_of_a_large_permutation_are_its_own_images(key: int, data: st.DataObject) -> None:
    """They come from slices, of which few are kept: asked for in any order, up to the very end."""
    n = TABLE_LIMIT + data.draw(st.integers(1, 5 * SPAN_TILE))
    permutation = Permutation(n, key)
    spans = Spans(permutation)
    for start in data.draw(st.lists(st.integers(0, n - 1) | st.integers(n - 9, n - 1), min_size=1, max_size=12)):
        stop = min(n, start + data.draw(st.sampled_from([0, 1, 7, 64, SPAN_TILE // 4, SPAN_TILE])))
        assert np.array_equal(spans.span(start, stop), permutation.forward(np.arange(start, stop)))


@pytest.mark.parametrize("n", [1000, TABLE_LIMIT + 1000])
def test_keys_and_places_decide_where_an_element_goes(n: int) -> None:
    images = np.array([Permutation(n, derive_key(key)).forward(np.arange(64)) for key in range(50)])
    assert len({tuple(row) for row in images.tolist()}) == 50
    chosen = np.bincount(images.ravel() * 10 // n, minlength=10)
    assert chi_square(chosen, images.size / 10) < 27.9  # 9 degrees of freedom, p = 0.001


def test_neighbours_in_a_large_permutation_have_nothing_in_common() -> None:
    """Too few rounds would leave what two elements share visible in their images."""
    images = Permutation(1 << 20, derive_key("neighbours")).forward(np.arange(20_000))
    apart = images[::2] ^ images[1::2]
    for bits in (apart & 1023, apart >> 10):
        assert chi_square(np.bincount(bits, minlength=1024), len(apart) / 1024) < 1168  # 1023 degrees, p = 0.001


def test_orders_are_the_same_in_every_version() -> None:
    """Checkpoints hold positions in them."""
    assert Permutation(9, derive_key("golden")).forward(np.arange(9)).tolist() == GOLDEN_SMALL
    assert Permutation(10**12, derive_key("golden")).forward(np.arange(4)).tolist() == GOLDEN_LARGE
    order = EpochOrder(Split(CellGrid((12,), (3,)), 1, 11, "sample", 5), "block", 2, 3, 4)
    assert sequence(order).tolist() == GOLDEN_ORDER


def chi_square(observed: Any, expected: float) -> float:
    return float(((np.asarray(observed) - expected) ** 2).sum() / expected)


# Cells


@given(grids(), st.data())
def test_locating_and_numbering_are_inverse(grid: CellGrid, data: st.DataObject) -> None:
    numbers = np.arange(grid.num_samples)
    ids, local = grid.locate(numbers)
    assert (local < grid.sizes(ids)).all()
    cell = data.draw(st.integers(0, grid.num_cells - 1))
    mine = numbers[ids == cell]
    assert np.array_equal(grid.numbers(cell, local[ids == cell]), mine)
    assert np.array_equal(np.sort(local[ids == cell]), np.arange(grid.sizes(np.array([cell]))[0]))


@given(grids())
def test_cells_tile_the_samples(grid: CellGrid) -> None:
    ids = np.arange(grid.num_cells)
    sizes = grid.sizes(ids)
    assert np.array_equal(sizes, np.bincount(grid.locate(np.arange(grid.num_samples))[0], minlength=grid.num_cells))
    assert sizes.max() <= grid.full
    assert grid.even == (len(set(sizes.tolist())) == 1)
    origins, extents = grid.boxes(ids)
    assert np.array_equal(np.prod(extents, axis=0), sizes)
    every = [tuple(tuple(int(a[cell]) for a in axes) for axes in (origins, extents)) for cell in ids]
    assert [grid.box(cell) for cell in ids.tolist()] == every
    assert all((o + e <= s).all() for o, e, s in zip(origins, extents, grid.shape, strict=True))


@given(grids(), st.data())
def test_samples_below_a_bound_are_counted_as_by_hand(grid: CellGrid, data: st.DataObject) -> None:
    bound = data.draw(st.integers(0, grid.num_samples))
    expected = np.bincount(grid.locate(np.arange(bound))[0], minlength=grid.num_cells)
    assert np.array_equal(grid.below(np.arange(grid.num_cells), bound), expected)


# Splits


@given(splits())
def test_a_split_holds_what_its_bounds_say_and_no_sample_twice(split: Split) -> None:
    numbers = whole(split)
    assert len(numbers) == split.num_samples == split.upper - split.lower
    assert len(np.unique(numbers)) == len(numbers)
    counts = split.counts(np.arange(split.num_cells))
    assert (counts >= 0).all()
    assert np.array_equal(split.starts, np.concatenate([[0], np.cumsum(counts)]))


@given(grids(), st.sampled_from(SPLITS), st.integers(0, 9), st.data())
def test_complementary_splits_share_all_out(grid: CellGrid, by: SplitBy, seed: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, grid.num_samples), max_size=3)))
    bounds = [0, *cuts, grid.num_samples]
    parts = [whole(Split(grid, a, b, by, seed)) for a, b in itertools.pairwise(bounds)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(grid.num_samples))


@given(splits(by="range"))
def test_a_split_by_range_is_the_range(split: Split) -> None:
    assert np.array_equal(np.sort(whole(split)), np.arange(split.lower, split.upper))
    assert split.contiguous


@given(splits(by="chunk"))
def test_a_split_by_chunk_cuts_at_most_two_cells(split: Split) -> None:
    counts = split.counts(np.arange(split.num_cells))
    ids = split.cells(np.arange(split.num_cells))[0]
    assert len(np.unique(ids)) == len(ids)
    assert (counts != split.grid.sizes(ids)).sum() <= 2


@given(splits(by="sample"))
def test_a_split_by_sample_takes_of_each_cell_its_share(split: Split) -> None:
    """By a binary tree: off by less than one sample a level."""
    if split.by != "sample":  # the whole is no split
        return
    sizes = split.grid.sizes(np.arange(split.num_cells))
    fair = sizes * (split.num_samples / split.grid.num_samples)
    levels = 2 * math.ceil(math.log2(split.num_cells + 1))
    assert (np.abs(split.counts(np.arange(split.num_cells)) - fair) <= levels).all()


@given(splits(by="sample"), st.integers(1, 5))
def test_shares_grow_with_the_bound_by_one_at_most(split: Split, more: int) -> None:
    ids = np.arange(split.grid.num_cells)
    bound = min(split.lower + more, split.grid.num_samples)
    grown = split._share(ids, bound) - split._share(ids, split.lower)
    assert grown.sum() == bound - split.lower
    assert ((grown >= 0) & (grown <= more)).all()
    assert (split._share(ids, bound) <= split.grid.sizes(ids)).all()


@given(splits())
def test_exceptions_are_the_cells_that_are_short(split: Split) -> None:
    exceptions = split.exceptions
    if exceptions is not None:
        missing = split.grid.full - split.counts(np.arange(split.num_cells))
        assert exceptions == {j: int(m) for j, m in enumerate(missing) if m}
        assert len(exceptions) <= 3


@given(grids(), st.integers(0, 9), st.data())
def test_ascending_changes_the_order_of_cells_alone(grid: CellGrid, seed: int, data: st.DataObject) -> None:
    a = data.draw(st.integers(0, grid.num_samples))
    b = data.draw(st.integers(a, grid.num_samples))
    plain, sorted_ = (Split(grid, a, b, "chunk", seed, ascending=up) for up in (False, True))
    ids = sorted_.cells(np.arange(sorted_.num_cells))[0]
    assert (np.diff(ids) > 0).all()
    assert np.array_equal(np.sort(whole(plain)), np.sort(whole(sorted_)))


@pytest.mark.parametrize("by", ["chunk", "sample"])
def test_the_seed_decides_which_samples_a_split_holds(by: SplitBy) -> None:
    grid = CellGrid((1000,), (10,))
    parts = {tuple(np.sort(whole(Split(grid, 0, 500, by, seed))).tolist()) for seed in range(5)}
    assert len(parts) == 5


def test_shares_of_more_samples_than_int64_can_square_are_exact() -> None:
    grid = CellGrid((1 << 45,), (1 << 30,))
    split = Split(grid, 12345, (1 << 45) // 3, "sample")
    ids = np.arange(grid.num_cells)
    assert split.counts(ids).sum() == split.num_samples
    assert split.counts(ids).min() > 0


def test_a_grid_without_samples_has_an_empty_order() -> None:
    for by in SPLITS:
        order = EpochOrder(Split(CellGrid((0, 3), (4, 2)), 0, 0, by), "block", 2, 0, 0)
        assert (order.num_samples, order.num_blocks) == (0, 0)


# Epochs


@settings(max_examples=300)
@given(orders())
def test_an_epoch_fills_each_position_once_and_shows_each_sample_once(order: EpochOrder) -> None:
    assert np.array_equal(np.sort(sequence(order)), np.sort(whole(order.split)))


@given(orders())
def test_a_position_lies_in_the_block_that_its_bounds_say(order: EpochOrder) -> None:
    if order.scattered:
        return
    starts = [order.block_start(block) for block in range(order.num_blocks + 1)]
    assert (starts[0], starts[-1]) == (0, order.num_samples)
    for position in range(order.num_samples):
        block = order.block_of(position)
        assert starts[block] <= position < starts[block + 1]


@given(orders())
def test_a_block_is_closed_its_pieces_fill_its_positions_and_no_other(order: EpochOrder) -> None:
    if order.scattered:
        return
    for block in range(order.num_blocks):
        filled = [np.arange(order.num_samples)[order.place(piece)[1]] for piece in order.pieces(block)]
        expected = np.arange(order.block_start(block), order.block_start(block + 1))
        assert np.array_equal(np.sort(np.concatenate([np.empty(0, dtype=np.int64), *filled])), expected)


@given(orders(), st.data())
def test_a_run_of_a_scattered_order_is_a_part_of_the_whole(order: EpochOrder, data: st.DataObject) -> None:
    if not order.scattered or not order.num_samples:
        return
    start = data.draw(st.integers(0, order.num_samples - 1))
    stop = data.draw(st.integers(start + 1, order.num_samples))
    pieces = order.run(start, stop)
    cells = [piece.cell for piece in pieces]
    assert len(set(cells)) == len(cells)
    result = np.full(stop - start, -1)
    for piece in pieces:
        rows, places = order.place(piece)
        result[np.asarray(places) - start] = order.split.grid.numbers(piece.cell, np.asarray(rows))
    assert np.array_equal(result, sequence(order)[start:stop])


@given(splits(), st.integers(0, 9), st.integers(0, 9))
def test_a_global_order_is_the_keyed_permutation_of_the_split(split: Split, seed: int, epoch: int) -> None:
    order = EpochOrder(split, "global", 1, seed, epoch)
    ranks = Permutation(split.num_samples, derive_key(seed, epoch, "samples")).forward(np.arange(split.num_samples))
    members = np.arange(split.lower, split.upper) if split.contiguous else whole(split)
    assert np.array_equal(sequence(order), members[ranks])


@given(grids(), st.sampled_from(SPLITS), st.integers(0, 9), st.data())
def test_without_shuffling_samples_ascend(grid: CellGrid, by: SplitBy, seed: int, data: st.DataObject) -> None:
    """Over one axis, and for ranges over any; other splits over several axes go cell by cell."""
    lower = data.draw(st.integers(0, grid.num_samples))
    upper = data.draw(st.integers(lower, grid.num_samples))
    split = Split(grid, lower, upper, by, seed, ascending=True)
    numbers = sequence(EpochOrder(split, "none", 8, 3, 4))
    if split.contiguous or len(grid.shape) == 1:
        assert np.array_equal(numbers, np.sort(numbers))
    else:
        ids, local = grid.locate(numbers)
        assert np.array_equal(np.lexsort((local, ids)), np.arange(len(ids)))


@given(orders("block"), st.integers(1, 3), st.integers(1, 3))
def test_seed_and_epoch_are_all_that_an_order_depends_on(order: EpochOrder, more: int, later: int) -> None:
    again = EpochOrder(order.split, "block", order_cells(order), order.seed, order.epoch)
    for block in reversed(range(again.num_blocks)):  # asked in another order, by fresh objects
        for piece in again.pieces(block):
            again.place(piece)
    assert np.array_equal(sequence(again), sequence(order))


def order_cells(order: EpochOrder) -> int:
    """A K that gives as many blocks."""
    return max(1, order.split.num_cells // max(1, order.num_blocks))


@pytest.mark.parametrize("shuffle", ["block", "global"])
def test_epochs_and_seeds_differ(shuffle: Shuffle) -> None:
    split = Split(CellGrid((4000,), (100,)), 0, 4000)
    seen = [sequence(EpochOrder(split, shuffle, 8, seed, epoch), 99) for seed in range(3) for epoch in range(3)]
    assert len({tuple(numbers.tolist()) for numbers in seen}) == 9
    same = [(a == b).mean() for i, a in enumerate(seen) for b in seen[:i]]
    assert max(same) < 0.01


@pytest.mark.parametrize("shuffle", ["block", "global"])
def test_positions_of_rows_pass_a_chi_square_test(shuffle: Shuffle) -> None:
    """Where ten watched rows of a block and of the epoch come over 500 epochs: each tenth is as likely."""
    split = Split(CellGrid((640,), (10,)), 0, 640)
    watched = np.arange(0, 640, 64)
    where = np.empty((500, len(watched)), dtype=np.int64)
    for epoch in range(500):
        numbers = sequence(EpochOrder(split, shuffle, 8, 0, epoch), 640)
        inverse = np.empty_like(numbers)
        inverse[numbers] = np.arange(len(numbers))
        where[epoch] = inverse[watched]
    for column in where.T:
        assert chi_square(np.bincount(column * 10 // 640, minlength=10), 50) < 33.7  # 9 degrees, p = 0.0001
        assert chi_square(np.bincount(column % 80 // 8, minlength=10), 50) < 33.7  # and within a block
    assert chi_square(np.bincount(where.ravel() * 64 // 640, minlength=64), 5000 / 64) < 120  # 63 degrees, p < 0.0001


@pytest.mark.parametrize("cells", [2, 8, 32])
def test_each_batch_of_a_block_draws_from_many_cells(cells: int) -> None:
    split = Split(CellGrid((32 * 128,), (128,)), 0, 32 * 128)
    numbers = sequence(EpochOrder(split, "block", cells, 0, 0))
    for start in range(0, len(numbers), 64):
        assert len(np.unique(numbers[start : start + 64] // 128)) >= min(cells, 8)


def test_blocks_of_one_size_are_permuted_differently() -> None:
    order = EpochOrder(Split(CellGrid((800,), (10,)), 0, 800), "block", 8, 0, 0)
    firsts = [(order.block_start(block), order.pieces(block)[0]) for block in range(10)]
    places = [np.asarray(order.place(piece)[1]) - start for start, piece in firsts]
    assert len({tuple(place.tolist()) for place in places}) == 10


def test_blocks_hold_k_cells_or_a_few_more() -> None:
    for cells in range(1, 40):
        order = EpochOrder(Split(CellGrid((390,), (10,)), 0, 390), "block", 8, 0, 0)
        sizes = [len(order.pieces(block)) for block in range(order.num_blocks)]
        assert min(sizes) >= min(8, cells)
        assert max(sizes) <= 16


# Size


@pytest.mark.parametrize("by", ["range", "chunk"])
@pytest.mark.parametrize("shape", [(10**12,), (10**12 - 7,), (10**6, 10**6)], ids=str)
def test_seeking_in_1e12_samples_takes_neither_time_nor_memory(shape: tuple[int, ...], by: SplitBy) -> None:
    tracemalloc.start()
    try:
        began = time.perf_counter()
        grid = CellGrid(shape, tuple(1000 for _ in shape))
        upper = grid.num_samples if len(shape) == 1 else grid.num_samples // 2
        split = Split(grid, grid.num_samples // 4, upper, by)
        order = EpochOrder(split, "block", 8, 0, 5)
        for position in range(0, order.num_samples, order.num_samples // 7):
            block = order.block_of(position)
            assert order.block_start(block) <= position < order.block_start(block + 1)
            pieces = order.pieces(block)
            assert sum(piece.upper - piece.lower for piece in pieces) == order.block_start(block + 1) - (
                order.block_start(block)
            )
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        assert time.perf_counter() - began < 5
    finally:
        tracemalloc.stop()


def test_a_global_order_of_1e12_samples_takes_no_table() -> None:
    tracemalloc.start()
    try:
        order = EpochOrder(Split(CellGrid((10**12,), (1000,)), 10**11, 10**12), "global", 8, 0, 0)
        found = np.concatenate([np.asarray(piece.rows) for piece in order.run(5 * 10**11, 5 * 10**11 + 1000)])
        assert len(found) == 1000
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_table_of_uneven_cells_costs_8_bytes_a_block() -> None:
    grid = CellGrid((100_003, 10), (10, 7))
    order = EpochOrder(Split(grid, 0, grid.num_samples), "block", 8, 0, 0)
    order.block_of(order.num_samples // 2)
    assert order._table.nbytes == 8 * (order.num_blocks + 1)


# K and bounds


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 20))
def test_a_block_is_large_but_not_too_large(cell_bytes: int, cell_samples: int) -> None:
    cells = default_cells_per_block(cell_bytes, cell_samples)
    cost = cell_bytes + 16 * cell_samples
    assert cells >= 2
    assert cells >= MIN_CELLS or MIN_CELLS * cost > LARGE_BLOCK_BYTES
    assert cells <= MIN_CELLS or cells * cost <= BLOCK_BYTES


@given(st.integers(0, 10**9), st.floats(0, 1), st.floats(0, 1))
def test_fractions_are_floors_and_neighbours_meet(n: int, a: float, b: float) -> None:
    a, b = sorted((a, b))
    assert split_bounds((a, b), n) == (math.floor(a * n), math.floor(b * n))
    assert split_bounds((0.0, a), n)[1] == split_bounds((a, 1.0), n)[0]
    assert split_bounds((0.0, 1.0), n) == split_bounds(None, n) == (0, n)


def test_whole_numbers_are_sample_numbers() -> None:
    assert split_bounds((3, 7), 10) == (3, 7)
    assert split_bounds([0, 10], 10) == (0, 10)
    assert split_bounds((0, 1), 10) == (0, 1)


def test_beside_a_fraction_0_and_1_are_fractions() -> None:
    assert split_bounds((0, 0.5), 10) == (0, 5)
    assert split_bounds([0.5, 1], 10) == (5, 10)


@pytest.mark.parametrize(
    "split",
    [
        *[(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (0.0, float("nan")), (3, 2), (-1, 4), (0, 11), (2, 0.5), (0.5, 2)],
        *[(True, 1), (0.5, True), (False, 0.5), (1, 0.5), (0.5, 0)],
        *[(0.1,), (0.1, 0.2, 0.3), "ab", 0.5, 7, ("0", "1")],
    ],
    ids=repr,
)
def test_other_splits_are_refused_with_the_value(split: Any) -> None:
    with pytest.raises(ValueError, match=r"split"):
        split_bounds(split, 10)
