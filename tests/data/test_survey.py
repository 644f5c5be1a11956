"""What a plan tells of shuffling is what batches of real orders have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data import entropy
from streamtrain.data.cells import CellGrid
from streamtrain.data.order import EpochOrder, Shuffle
from streamtrain.data.splits import Split
from streamtrain.data.survey import shuffle_quality

Ints = NDArray[np.int64]


def cells_by_position(order: EpochOrder) -> Ints:
    """From which cell the sample at each position comes."""
    found = np.full(order.num_samples, -1, dtype=np.int64)
    pieces = (
        order.run(0, order.num_samples)
        if order.scattered
        else [piece for block in range(order.num_blocks) for piece in order.pieces(block)]
    )
    for piece in pieces:
        found[order.place(piece)[1]] = piece.cell
    assert (found >= 0).all()
    return found


def measured(split: Split, shuffle: Shuffle, k: int, batch: int, epochs: int = 4) -> float:
    """Mean entropy of the cells in whole batches."""
    found: list[float] = []
    for epoch in range(epochs):
        cells = cells_by_position(EpochOrder(split, shuffle, k, 5, epoch))
        for start in range(0, len(cells) - batch + 1, batch):
            shares = np.bincount(cells[start : start + batch]) / batch
            shares = shares[shares > 0]
            found.append(float(-(shares * np.log(shares)).sum()))
    return float(np.mean(found))


def whole(samples: int, cell: int) -> Split:
    return Split(CellGrid((samples,), (cell,)), 0, samples)


@pytest.mark.parametrize("batch", [16, 100, 1000])
@pytest.mark.parametrize(("cells", "rows"), [(64, 64), (256, 16), (16, 500), (300, 7)])
@pytest.mark.parametrize("k", [1, 13, 64])
def test_the_score_is_the_entropy_of_real_batches_over_that_of_a_full_shuffle(
    batch: int, cells: int, rows: int, k: int
) -> None:
    split = whole(cells * rows, rows)
    full = measured(split, "global", k, batch)
    assert shuffle_quality("global", split, k, batch) == 1
    kinds: tuple[Shuffle, ...] = ("block", "none")
    for shuffle in kinds:
        real = measured(split, shuffle, k, batch) / full
        assert shuffle_quality(shuffle, split, k, batch) == pytest.approx(min(1, real), abs=0.02)


def test_the_score_holds_for_a_part_with_cut_cells_and_for_uneven_ones() -> None:
    split = Split(CellGrid((10_000,), (90,)), 1234, 8765, "sample")
    full = measured(split, "global", 8, 128)
    assert shuffle_quality("block", split, 8, 128) == pytest.approx(measured(split, "block", 8, 128) / full, abs=0.02)
    grid = Split(CellGrid((100, 90), (10, 9)), 0, 9000)
    kinds: tuple[Shuffle, ...] = ("block", "none")
    for shuffle in kinds:
        real = measured(grid, shuffle, 8, 64) / measured(grid, "global", 8, 64)
        assert shuffle_quality(shuffle, grid, 8, 64) == pytest.approx(real, abs=0.05)


@settings(max_examples=40)
@given(st.integers(1, 10**6), st.integers(1, 10**7), st.integers(1, 10**6), st.integers(1, 10**6))
def test_scores_lie_between_0_and_1_and_more_blocks_never_lower_them(batch: int, cells: int, rows: int, k: int) -> None:
    split = whole(cells * rows, rows)
    scores = [shuffle_quality("block", split, blocks, batch) for blocks in (k, 2 * k, cells)]
    assert all(0 <= score <= 1 for score in scores)
    assert scores[0] <= scores[1] + 1e-3 <= scores[2] + 2e-3
    assert 0 <= shuffle_quality("none", split, k, batch) <= 1
    assert scores[2] == (1 if cells > 1 and batch > 1 else shuffle_quality("global", split, k, batch))


@settings(max_examples=40)
@given(st.integers(2, 40), st.integers(1, 12), st.data())
def test_expectations_are_those_of_drawing_without_replacement(cells: int, rows: int, data: st.DataObject) -> None:
    """Against the sum over all counts that one cell may have, by exact binomials."""
    batch = data.draw(st.integers(1, cells * rows))
    counts = range(max(0, batch - (cells - 1) * rows), min(batch, rows) + 1)
    ways = [math.comb(rows, n) * math.comb((cells - 1) * rows, batch - n) for n in counts]
    mass = sum(w * n * math.log(n) for n, w in zip(counts, ways, strict=True) if n)
    exact = math.log(batch) - cells / batch * mass / math.comb(cells * rows, batch)
    assert entropy.drawn(batch, cells, rows) == pytest.approx(exact, abs=1e-9)
