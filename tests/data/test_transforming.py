"""What the transform stage promises: order, bounds, exact resume and clear errors, wherever a transform runs."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamtrain.data.batch import Batch
from streamtrain.data.options import Crew, transform_crew
from streamtrain.errors import ConfigError, UserCodeError
from tests.data import small
from tests.data.small import ours, stream, until_failure


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = small.write(tmp_path_factory.mktemp("stores") / "data.zarr")
    return path


def same(one: Any, other: Any) -> bool:
    """Whether two nests of tensors hold the same numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


async def batches(store: Path, **keywords: Any) -> list[Batch]:
    async with stream(store, **keywords) as source:
        return [batch async for batch in source]


async def failing(store: Path, **keywords: Any) -> list[int]:
    """Positions of the batches before the failure, which names its rows."""
    positions, error = await until_failure(stream(store, shuffle=False, **keywords))
    assert isinstance(error, UserCodeError)
    assert "samples 66...98" in str(error)
    assert error.__cause__ is not None
    assert ours() == []
    return positions


PAIRS = [
    (small.in_place, small.awaited_in_place),
    (small.noisy, small.awaited_noisy),
    (small.thinned, small.awaited_thinned),
    (small.grown, small.awaited_grown),
]


@pytest.mark.parametrize("workers", [1, 3, "thread:2"])
@pytest.mark.parametrize("memory", ["128KiB", "8MiB"])
@pytest.mark.parametrize(("plain", "awaited"), PAIRS, ids=lambda pair: pair.__name__)
async def test_threads_and_tasks_give_the_same_batches(
    store: Path, plain: Any, awaited: Any, memory: str, workers: Any
) -> None:
    expected = await batches(store, transform=plain)
    for transform in (plain, awaited):
        got = await batches(store, transform=transform, transform_workers=workers, memory=memory)
        assert [batch.cursor for batch in got] == [batch.cursor for batch in expected]
        for one, other in zip(got, expected, strict=True):
            assert same([one.inputs, one.targets, one.index], [other.inputs, other.targets, other.index])
    assert ours() == []


@pytest.mark.parametrize("transform", [small.thinned, small.awaited_thinned])
async def test_a_filter_resumes_in_any_place(store: Path, transform: Any) -> None:
    whole = await batches(store, transform=transform)
    for taken in (1, 7, 30):
        async with stream(store, transform=transform) as source:
            passing = aiter(source)
            for _ in range(taken):
                await anext(passing)
            state = source.state_dict()
        async with stream(store, transform=transform, transform_workers=2, prefetch=3) as other:
            other.load_state_dict(state)
            rest = [batch.index.tolist() async for batch in other]
        assert rest == [batch.index.tolist() for batch in whole[taken:]]


async def _awaited_failure(batch: Batch) -> Batch:
    await asyncio.sleep(0)
    return small.fails_at_99(batch)


@pytest.mark.parametrize("prefetch", [None, 2])
@pytest.mark.parametrize("transform", [small.fails_at_99, _awaited_failure])
async def test_the_good_batches_before_a_failure_are_given_first(store: Path, transform: Any, prefetch: Any) -> None:
    assert await failing(store, transform=transform, prefetch=prefetch) == [33, 66]


async def test_the_good_batches_of_the_very_group_are_given_first(store: Path) -> None:
    """Batches are small here: after the first, all of a unit go in groups of 16."""

    def fails(batch: Batch) -> Batch:
        if batch.cursor.position == 33 * 7:
            raise ValueError("no")
        return batch

    positions, error = await until_failure(stream(store, shuffle=False, threads=1, transform=fails))
    assert "samples 198" in str(error)
    assert positions == [33 * number for number in range(1, 7)]


async def test_async_transforms_run_side_by_side_and_no_more_than_told(store: Path) -> None:
    running, most = 0, 0
    full = asyncio.Event()

    async def meets(batch: Batch) -> Batch:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 4:
            full.set()
        if batch.cursor.position > 33:  # the first goes alone: it tells how much is made
            await asyncio.wait_for(full.wait(), 10)
        await asyncio.sleep(0)
        running -= 1
        return batch

    assert len(await batches(store, transform=meets, transform_workers=4)) == 31
    assert most == 4


async def test_later_ones_that_are_ready_first_wait_for_their_turn(store: Path) -> None:
    first = asyncio.Event()

    async def overtaken(batch: Batch) -> Batch:
        if batch.cursor.position == 66:
            await first.wait()
        if batch.cursor.position == 132:
            first.set()
        return batch

    got = await batches(store, transform=overtaken, shuffle=False, transform_workers=3)
    assert [batch.cursor.position for batch in got] == [*range(33, 1000, 33), 1000]


async def test_async_transforms_are_cancelled_and_awaited_with_their_pass(store: Path) -> None:
    begun, ended = asyncio.Event(), []

    async def waits(batch: Batch) -> Batch:
        if batch.cursor.position == 33:
            return batch
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(batch.cursor.position)
        raise AssertionError

    source = stream(store, transform=waits, shuffle=False, transform_workers=2)
    passing = aiter(source)
    await anext(passing)
    await begun.wait()
    await source.aclose()
    assert 66 in ended
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "streamtrain-transform"]
    assert source.budget.statistics().used == 0


async def test_a_transform_that_is_cancelled_by_itself_is_an_error(store: Path) -> None:
    async def cancels(batch: Batch) -> Batch:
        raise asyncio.CancelledError

    with pytest.raises(UserCodeError, match="transform was cancelled"):
        await batches(store, transform=cancels)


async def test_an_exit_in_an_async_transform_ends_no_loop(store: Path) -> None:
    async def leaves(batch: Batch) -> Batch:
        raise SystemExit(3)

    with pytest.raises(UserCodeError, match="transform raised SystemExit: 3"):
        await batches(store, transform=leaves)


async def test_a_coroutine_from_a_plain_function_is_said(store: Path) -> None:
    with pytest.raises(UserCodeError, match="transform returned a coroutine"):
        await batches(store, transform=lambda batch: small.awaited_in_place(batch))
    expected = await batches(store, transform=small.in_place)
    got = await batches(store, transform=partial(small.awaited_in_place))
    assert all(same(a.inputs, b.inputs) for a, b in zip(got, expected, strict=True))


async def test_threads_of_their_own_transform_beside_those_that_read(store: Path) -> None:
    names: set[str] = set()

    def told(batch: Batch) -> Batch:
        names.add(threading.current_thread().name)
        return batch

    await batches(store, transform=told, transform_workers=1)
    assert names == {"streamtrain-transform-0"}
    names.clear()
    await batches(store, transform=told)
    assert {name.rpartition("-")[0] for name in names} == {"streamtrain-data"}


@pytest.mark.parametrize("workers", [None, 1])
async def test_a_pass_that_ends_waits_for_the_batch_in_hand_and_for_no_more(store: Path, workers: Any) -> None:
    begun, go_on = threading.Event(), threading.Event()
    late: list[int] = []

    def slow(batch: Batch) -> Batch:
        if batch.cursor.position >= 396:  # the first ones come alone, those after them in groups
            late.append(batch.cursor.position)
            begun.set()
            go_on.wait(30)
        return batch

    async def eat() -> int:
        return len([batch async for batch in source])

    source = stream(store, shuffle=False, threads=1, transform=slow, transform_workers=workers)
    eating = asyncio.ensure_future(eat())
    assert await asyncio.to_thread(begun.wait, 30)
    assert source._pass is not None
    source._pass.stop()
    go_on.set()
    await source.aclose()
    assert len(late) == 1
    assert await eating <= 12


@pytest.mark.parametrize(
    ("given", "crew"),
    [
        (None, Crew()),
        (3, Crew("thread", 3)),
        (np.int64(3), Crew("thread", 3)),
        ("thread:2", Crew("thread", 2)),
        ("process:4", Crew("process", 4)),
        ("process", Crew("process")),
    ],
)
def test_transform_workers_are_read(given: Any, crew: Crew) -> None:
    assert transform_crew(given) == crew


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "thread", "process:0", "process:x", "fork:2", "4", "process:"])
def test_transform_workers_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="transform_workers must be"):
        transform_crew(given)


def test_workers_without_a_transform_are_refused(store: Path) -> None:
    with pytest.raises(ConfigError, match="transform_workers= without transform="):
        stream(store, transform_workers=2)


async def test_a_filter_that_forgets_the_targets_is_told_so(store: Path) -> None:
    async with stream(store, transform=lambda batch: (batch.inputs[:5], batch.targets)) as source:
        with pytest.raises(UserCodeError, match="5 rows of inputs and 33 of targets, on samples"):
            await anext(aiter(source))
