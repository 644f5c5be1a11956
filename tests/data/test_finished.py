"""What the cache of finished batches promises: the same batches, private, without the work, within the budget."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from streamtrain.data.batch import Batch
from streamtrain.data.budget import Budget
from tests.data import small
from tests.data.small import ours, stream


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = small.write(tmp_path_factory.mktemp("stores") / "data.zarr")
    return path


class Counted:
    """A transform that counts what it was asked."""

    def __init__(self, inner: Any = small.in_place) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, batch: Batch) -> Any:
        self.calls += 1
        return self.inner(batch)


def plain(store: Path, **keywords: Any) -> Any:
    return stream(store, **{"shuffle": False, **keywords})


async def listed(source: Any) -> list[Batch]:
    return [batch async for batch in source]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and torch.equal(a.index, b.index)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("inner", [small.in_place, small.thinned])
async def test_the_second_pass_costs_no_reading_and_no_transform(store: Path, inner: Any) -> None:
    transform = Counted(inner)
    source = plain(store, transform=transform)
    first = await listed(source)
    calls, chunks = transform.calls, source.statistics().chunks
    assert chunks
    second = await listed(source)
    assert same(first, second)
    assert [batch.cursor.position for batch in first] == [batch.cursor.position for batch in second]
    assert {batch.epoch for batch in second} == {1}
    assert source.epoch == 2
    assert transform.calls == calls
    told = source.statistics()
    assert told.finished is not None
    assert (told.finished.hits, told.finished.misses, told.chunks) == (31, 31, 0)
    del first, second  # an untouched index is a view of its block
    await source.aclose()
    assert source.budget.statistics().used == 0
    assert ours() == []


async def test_kept_batches_are_private_and_writable(store: Path) -> None:
    source = plain(store, transform=small.in_place)
    expected = await listed(plain(store, transform=small.in_place, cache_transform=False))
    for _ in range(3):
        got = await listed(source)
        assert same(got, expected)
        for batch in got:
            assert batch.inputs.data_ptr() % 64 == 0
            batch.inputs.zero_()
            batch.targets.zero_()
    await source.aclose()


async def test_a_position_within_what_is_kept_is_gone_on_from(store: Path) -> None:
    source = plain(store, transform=Counted())
    whole = await listed(source)
    passing = aiter(source)
    for _ in range(7):
        await anext(passing)
    state = source.state_dict()
    assert (state["epoch"], state["position"]) == (1, 231)
    source.load_state_dict(state)
    assert same(await listed(source), whole[7:])
    await source.aclose()


@pytest.mark.parametrize(
    "keywords",
    [
        {"cache": "0"},
        {"cache": 0},
        {"cache_transform": False},
        {"shuffle": "block"},
        {"transform_workers": "process:1"},
    ],
    ids=str,
)
async def test_what_is_not_to_be_kept_is_not(store: Path, keywords: dict[str, Any]) -> None:
    source = plain(store, transform=small.in_place, **keywords)
    await listed(source)
    assert source.statistics().finished is None
    await source.aclose()


async def test_a_transform_that_draws_is_not_kept_unless_told(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for transform in (small.noisy, small.awaited_noisy):
        caplog.clear()
        source, never = plain(store, transform=transform), plain(store, transform=transform, cache_transform=False)
        for _ in range(2):
            assert same(await listed(source), await listed(never))
        assert "the transform draws random numbers" in caplog.text
        told = source.statistics().finished
        assert told is not None
        assert (told.hits, told.bytes) == (0, 0)
        await source.aclose()
    source = plain(store, transform=small.noisy, cache_transform=True)
    assert same(await listed(source), await listed(source))
    await source.aclose()


async def test_what_cannot_be_copied_is_not_kept_and_said_once(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    source = plain(store, transform=lambda batch: ({"x": batch.inputs, "s": {1}}, batch.targets))
    for _ in range(2):
        assert len(await listed(source)) == 31
    told = source.statistics().finished
    assert told is not None
    assert (told.hits, told.bytes) == (0, 0)
    assert caplog.text.count("finished batches are not kept: the transform makes what can't be copied: a set") == 1
    await source.aclose()


async def test_a_shuffled_stream_gives_kept_batches_where_the_same_epoch_comes_again(store: Path) -> None:
    transform = Counted(small.noisy)
    source = stream(store, transform=transform, cache_transform=True)
    first, second = await listed(source), await listed(source)
    assert not same(first, second)
    calls = transform.calls
    source.set_epoch(0)
    assert same(await listed(source), first)
    assert transform.calls == calls
    await source.aclose()


async def test_an_epoch_larger_than_the_cache_still_hits_in_its_first_part(store: Path) -> None:
    transform = Counted()
    source = plain(store, transform=transform, cache="12KiB")
    expected = await listed(source)
    for _ in range(3):
        before = transform.calls
        assert same(await listed(source), expected)
        assert transform.calls - before < 31 - 5
    told = source.statistics().finished
    assert told is not None
    assert 0 < told.bytes <= told.capacity <= 12 << 10
    assert told.refused
    await source.aclose()


async def test_other_streams_get_its_bytes_when_they_ask(store: Path) -> None:
    budget = Budget("1MiB")
    source, other = plain(store, transform=small.in_place, memory=budget), budget.join()
    await listed(source)
    told = source.statistics().finished
    assert told is not None
    assert told.bytes > 0
    source._share.least = 0  # of what keeps it going nothing is lent
    asked = budget.total - (16 << 10)
    assert other.try_acquire(asked)
    told = source.statistics().finished
    assert told is not None
    assert told.bytes == 0
    other.release(asked)
    assert len(await listed(source)) == 31
    await source.aclose()


async def test_compressed_data_are_kept_without_a_transform_and_raw_ones_are_not(tmp_path: Path) -> None:
    packed = plain(small.write(tmp_path / "packed.zarr", compressed=True))
    assert same(await listed(packed), await listed(packed))
    told = packed.statistics()
    assert told.finished is not None
    assert told.finished.hits == 31
    await packed.aclose()
    raw = plain(small.write(tmp_path / "raw.zarr"), targets=None, inputs="x")
    await raw.open()
    assert raw.statistics().finished is None


async def test_a_transform_that_looks_at_the_epoch_is_not_kept(store: Path) -> None:
    def by_epoch(batch: Batch) -> tuple[Any, Any]:
        return batch.inputs + batch.epoch, batch.targets

    source, never = plain(store, transform=by_epoch), plain(store, transform=by_epoch, cache_transform=False)
    for _ in range(2):
        assert same(await listed(source), await listed(never))
    await source.aclose()


async def test_who_waits_in_a_pass_that_another_ends_is_told_so(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An end without a word would pass for the end of the epoch."""
    held = threading.Event()

    def slow(batch: Batch) -> Any:
        held.wait(30)
        return batch

    source = plain(store, transform=slow, batch_size=10)
    first = aiter(source)
    waiting = asyncio.ensure_future(anext(first))
    await asyncio.sleep(0)
    second = aiter(source)
    held.set()
    with pytest.raises(StopAsyncIteration):
        await waiting
    assert [record for record in caplog.records if "another one over this stream began" in record.getMessage()]
    assert len(await anext(second)) == 10
    await source.aclose()


async def test_who_is_cancelled_before_a_kept_batch_comes_loses_none(store: Path) -> None:
    source = plain(store, transform=small.in_place)
    whole = await listed(source)
    passing, found = aiter(source), list[Batch]()
    while True:
        waiting = asyncio.ensure_future(anext(passing, None))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        batch = await anext(passing, None)
        if batch is None:
            break
        found.append(batch)
    assert same(found, whole)
    await source.aclose()
