"""What several ranks promise: together each step's samples once, the same in any number of ranks, from any position."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data.batch import Batch
from streamtrain.data.ranks import Ranks
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError

quick = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
Steps = list[list[int]]


def write(path: Any, rows: int, chunk: int, **options: Any) -> Any:
    data = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    zarr.create_group(path).create_array("x", data=data, chunks=(chunk, 2), **options)
    return path


def stream(store: Any, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "batch_size": 8, "shuffle": "block", "output": "numpy", "memory": "8MiB"}
    return ZarrStream(store, **{**given, **keywords})


async def steps(source: ZarrStream) -> Steps:
    """The samples of each batch; their inputs are the source's."""
    found: Steps = []
    async for batch in source:
        assert (batch.inputs[:, 0] == 2 * batch.index).all()
        found.append(batch.index.tolist())
    return found


async def union(store: Any, world: int, state: dict[str, Any] | None = None, **keywords: Any) -> Steps:
    """Each step's samples of all ranks together, sorted."""
    parts = []
    for rank in range(world):
        async with stream(store, rank=rank, world_size=world, **keywords) as source:
            if state is not None:
                source.load_state_dict(state)
            parts.append(await steps(source))
    assert len({len(part) for part in parts}) == 1
    return [sorted(itertools.chain.from_iterable(same)) for same in zip(*parts, strict=True)]


@quick
@given(
    st.integers(1, 90),
    st.integers(1, 20),
    st.integers(1, 13),
    st.integers(1, 4),
    st.sampled_from([False, "block", "block", "global"]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
)
def test_the_union_of_a_step_is_the_same_in_any_number_of_ranks(
    rows: int, chunk: int, size: int, world: int, shuffle: Any, blocks: int, lanes: int, drop_last: bool
) -> None:
    async def scenario(store: Any) -> None:
        how: dict[str, Any] = {
            "drop_last": drop_last and size <= rows,
            "batch_size": size,
            "shuffle": shuffle,
            "shuffle_blocks": blocks,
            "lanes": lanes,
        }
        alone = await union(store, 1, **how)
        seen = sorted(itertools.chain.from_iterable(alone))
        assert len(set(seen)) == len(seen) == (rows - rows % size if how["drop_last"] else rows)
        assert await union(store, world, **how) == alone

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(write(folder, rows, chunk)))


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 6))
def test_a_position_goes_on_in_any_other_number_of_ranks(before: int, after: int, size: int, taken: int) -> None:
    async def scenario(store: Any) -> None:
        whole = await union(store, before, batch_size=size)
        async with stream(store, rank=0, world_size=before, batch_size=size) as source:
            passing = aiter(source)
            for _ in range(min(taken, len(whole) - 1)):
                await anext(passing)
            state = json.loads(json.dumps(source.state_dict()))
        rest = await union(store, after, state, batch_size=size)
        assert whole[: min(taken, len(whole) - 1)] + rest == whole

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(write(folder, 47, 5)))


async def test_with_lanes_a_rank_reads_little_but_its_own_chunks(tmp_path: Path) -> None:
    write(tmp_path / "s", 64 * 32, 32)
    read = []
    for lanes in (1, 4):
        async with stream(tmp_path / "s", rank=1, world_size=4, lanes=lanes, shuffle_blocks=16) as source:
            await steps(source)
            read.append(source.statistics().chunks)
    assert read == [64, 16]


async def test_ranks_draw_other_random_numbers_in_their_transforms(tmp_path: Path) -> None:
    write(tmp_path / "s", 32, 8)
    drawn: list[NDArray[Any]] = []

    def draws(batch: Batch) -> Batch:
        assert batch.rng is not None
        drawn.append(batch.rng.random(4))
        return batch

    for rank in range(2):
        async with stream(tmp_path / "s", rank=rank, world_size=2, transform=draws, batch_size=32) as source:
            async for _ in source:
                pass
    assert not (drawn[0] == drawn[1]).any()


async def test_a_rank_without_a_part_of_the_last_batch_gets_an_empty_one_transformed_or_not(tmp_path: Path) -> None:
    write(tmp_path / "s", 9, 3)
    for transform in (None, lambda batch: batch):
        async with stream(tmp_path / "s", rank=3, world_size=4, transform=transform) as source:
            assert [len(step) for step in await steps(source)] == [2, 0]


def test_a_rank_beyond_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ranks are numbered from 0 to 1"):
        stream(tmp_path, rank=2, world_size=2)


@given(st.integers(0, 50), st.integers(0, 90), st.integers(1, 9), st.integers(1, 7), st.data())
def test_places_are_dense_in_each_batch(origin: int, length: int, size: int, world: int, data: st.DataObject) -> None:
    ranks = Ranks(data.draw(st.integers(0, world - 1)), world)
    at = np.arange(origin, origin + length)
    mine = at[at % world == ranks.rank]
    places = ranks.places(mine, origin, size)
    for batch in range(-(-length // size)):
        start, stop = origin + batch * size, min(origin + (batch + 1) * size, origin + length)
        inside = places[(mine >= start) & (mine < stop)] - batch * ranks.share(size)
        assert inside.tolist() == list(range(ranks.count(start, stop)))
