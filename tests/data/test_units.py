"""What is filled together: small units first, and whatever they are, each position in just one of them."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.data.batch import Batch
from streamtrain.data.cells import CellGrid
from streamtrain.data.order import EpochOrder, Shuffle
from streamtrain.data.permutation import SPAN_TILE, TABLE_LIMIT, Permutation, Spans, derive_key
from streamtrain.data.splits import Split
from streamtrain.data.stream import ZarrStream
from streamtrain.data.units import (
    GROWTH,
    MOST_CELLS,
    RAMP_CELLS,
    Sizes,
    first_blocks,
    first_rows,
    growing,
    rows_of_units,
    unit_spans,
)


def sizes(first: int, blocks: int, rows: int) -> Sizes:
    return Sizes(first_unit=first, unit_blocks=blocks, unit_rows=rows, buffer_bytes=1, units=9, scratch_bytes=1)


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(1, 9), st.sampled_from(["none", "block", "global"]), st.data())
def test_units_follow_each_other_from_any_position_to_the_end(
    samples: int, cell: int, shuffle: Shuffle, data: st.DataObject
) -> None:
    grid = CellGrid((samples,), (cell,))
    order = EpochOrder(Split(grid, 0, samples), shuffle, data.draw(st.integers(1, 5)), 1, 2)
    origin = data.draw(st.integers(0, samples))
    first = data.draw(st.integers(1, 5))
    made = sizes(first, first * data.draw(st.integers(1, 9)), first * data.draw(st.integers(1, 9)))
    spans = list(unit_spans(order, made, origin, samples))
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    if origin == samples:
        assert spans == []
        return
    assert spans[0][0] <= origin < spans[0][1]
    assert spans[-1][1] == samples
    if order.scattered:
        assert [stop - start for start, stop, _ in spans[:-1]] == list(
            itertools.islice(growing(first, made.unit_rows), len(spans) - 1)
        )
    else:
        blocks = [block for *_, mine in spans for block in mine]
        assert blocks == list(range(blocks[0], order.num_blocks))
        assert max(len(mine) for *_, mine in spans) <= made.unit_blocks


def test_units_grow_until_they_are_whole() -> None:
    assert list(itertools.islice(growing(3, 40), 5)) == [3, 3 * GROWTH, 40, 40, 40]


@settings(max_examples=40)
@given(st.integers(1, 10**9), st.integers(1, 1000), st.integers(1, 1000))
def test_the_rows_of_all_units_are_the_epoch_and_few_to_tell(samples: int, first: int, times: int) -> None:
    told = list(rows_of_units(sizes(first, 1, first * times), samples))
    assert sum(rows * units for rows, units in told) == samples
    assert len(told) < 16
    few = list(itertools.islice(unit_spans_of(samples, sizes(first, 1, first * times)), 6))
    assert few == list(itertools.islice((rows for rows, units in told for _ in range(units)), 6))


def unit_spans_of(samples: int, made: Sizes) -> list[int]:
    order = EpochOrder(Split(CellGrid((samples,), (1,)), 0, samples), "global", 1, 0, 0)
    return [stop - start for start, stop, _ in itertools.islice(unit_spans(order, made, 0, samples), 6)]


def test_the_first_unit_is_small_only_where_many_cells_would_be_opened() -> None:
    assert first_rows(MOST_CELLS, 100, 10**9, 10**6) == 200
    assert first_rows(MOST_CELLS, 1000, 10**9, 10**6) == 1000
    assert first_rows(MOST_CELLS, 100, 10**9, RAMP_CELLS) == MOST_CELLS
    assert first_rows(MOST_CELLS, 100, MOST_CELLS, 10**6) == MOST_CELLS
    assert first_blocks(100, 32, 16, 10**6, 16) == RAMP_CELLS // 16
    assert first_blocks(100, 640, 16, 10**6, 16) == 80
    assert first_blocks(3, 32, 16, 10**6, 16) == 3
    assert first_blocks(100, 32, 16, 100, 16) == 100


@settings(max_examples=30)
@given(
    st.integers(TABLE_LIMIT // 2, TABLE_LIMIT * 3), st.lists(st.tuples(st.integers(0), st.integers(0, 2 * SPAN_TILE)))
)
def test_short_spans_are_cut_from_the_same_permutation(n: int, wanted: list[tuple[int, int]]) -> None:
    permutation = Permutation(n, derive_key("spans"))
    spans = Spans(permutation)
    for place, length in wanted:
        start = place % (n + 1)
        stop = min(n, start + length)
        assert np.array_equal(spans.span(start, stop), permutation.forward(np.arange(start, stop)))


@pytest.mark.parametrize(("rows", "window", "blocks", "batch"), [(900, 4, 1, 33), (900, 4, 2, 33), (900, 24, 1, 50)])
def test_the_least_memory_works_while_the_last_batch_is_held(
    tmp_path: Path, rows: int, window: int, blocks: int, batch: int
) -> None:
    """Blocks that hold hardly more than a batch: most batches go on in the next one."""
    data = np.arange(rows * 8, dtype=np.float32).reshape(rows, 8)
    zarr.create_group(tmp_path).create_array("x", data=data, chunks=(8, 8), compressors=None)

    def made(memory: int) -> ZarrStream:
        return ZarrStream(
            tmp_path,
            inputs="x",
            window={0: window},
            batch_size=batch,
            shuffle="block",
            shuffle_blocks=blocks,
            memory=memory,
            cache=0,
            output="numpy",
        )

    async def read(stream: ZarrStream) -> list[int]:
        async with stream:
            return [int(number) for _ in range(2) async for batch in stream for number in batch.index]

    least = made(1 << 30).plan().memory_least
    found = asyncio.run(read(made(least)))
    assert sorted(found) == sorted([*range(rows - window + 1)] * 2)


def doubled(batch: Batch) -> Batch:
    batch.inputs *= 2
    return batch


@pytest.mark.parametrize("transform", [None, doubled], ids=["plain", "transform"])
@pytest.mark.parametrize("batch", [7, 33, 250, 400])
@pytest.mark.parametrize("over", [0, 1, 2, 3])
def test_any_memory_that_is_enough_is_so_in_the_next_epoch_where_one_block_is_the_epoch(
    tmp_path: Path, batch: int, over: int, transform: Any
) -> None:
    """A plain loop holds its last batch, or the one that it was left with, when the next epoch begins."""
    rows = 400
    data = np.arange(rows * 64, dtype=np.float64).reshape(rows, 64)
    zarr.create_group(tmp_path).create_array("x", data=data, chunks=(40, 64))

    def made(memory: int) -> ZarrStream:
        options: dict[str, Any] = {"inputs": "x", "shuffle": "block", "cache": 0, "output": "numpy", "threads": 3}
        return ZarrStream(tmp_path, batch_size=batch, memory=memory, transform=transform, **options)

    async def read(stream: ZarrStream) -> list[int]:
        found: list[int] = []
        async with stream:
            async for held in stream:
                if held.cursor.position > rows // 2:
                    break
            for _ in range(2):
                async for held in stream:
                    expected = data[held.index] * (1 if transform is None else 2)
                    assert np.array_equal(held.inputs, expected)
                    assert held.inputs.ctypes.data % 64 == 0
                    found += held.index.tolist()
        return found

    plan = made(1 << 30).plan()
    memory = plan.memory_least + over * plan.buffer_bytes // 3
    assert sorted(asyncio.run(read(made(memory)))) == sorted([*range(rows)] * 2)


@pytest.mark.parametrize("shuffle", ["global", "block", False])
def test_the_first_batch_of_a_billion_samples_waits_for_few_chunks(tmp_path: Path, shuffle: Any) -> None:
    group = zarr.create_group(tmp_path)
    group.create_array("x", shape=(10**9,), chunks=(1000,), dtype="float32", compressors=None)

    async def first(stream: ZarrStream) -> int:
        async with stream:
            batches = aiter(stream)
            assert len(await anext(batches)) == 100
            await batches.aclose()
            return stream.statistics().chunks

    stream = ZarrStream(
        tmp_path, inputs="x", batch_size=100, shuffle=shuffle, shuffle_blocks=8, prefetch=1, output="numpy"
    )
    assert asyncio.run(first(stream)) <= 2 * RAMP_CELLS
    assert (stream.plan().batches, len(stream)) == (10**7, 10**7)
    stream.load_state_dict({**stream.state_dict(), "position": 987_654_321})
    assert asyncio.run(first(stream)) <= 2 * RAMP_CELLS
