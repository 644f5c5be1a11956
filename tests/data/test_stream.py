"""What a stream promises: the rules of a pass, its position, its memory, its errors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import zarr
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from data_tools.synth import synth
from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.block import Pool
from streamtrain.data.budget import Budget, BudgetHeld
from streamtrain.data.mix import mix
from streamtrain.data.stream import POISON, ZarrStream
from streamtrain.data.workers import Workers
from streamtrain.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem, UserCodeError
from tests.data import small

torch: Any = None
with contextlib.suppress(ImportError):  # the room needs none: then its tests see numpy arrays
    import torch

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
ROWS = 1000
X: NDArray[np.float32] = np.arange(ROWS * 6, dtype=np.float32).reshape(ROWS, 6)
Y: NDArray[np.int64] = np.arange(ROWS, dtype=np.int64) * 7


def write(where: Any, *, rows: int = ROWS) -> Any:
    group = zarr.create_group(where)
    group.create_array("x", data=X[:rows], chunks=(64, 6), compressors=None, config={"write_empty_chunks": True})
    group.create_array("y", data=Y[:rows], chunks=(100,))
    return where


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = write(tmp_path_factory.mktemp("stores") / "data.zarr")
    return path


def stream(store: Any, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 33, "shuffle": "block", "shuffle_blocks": 3}
    given["output"] = "numpy" if torch is None else "torch"
    return ZarrStream(store, **{**given, "memory": "8MiB", **keywords})


async def indices(source: ZarrStream) -> list[list[int]]:
    return [batch.index.tolist() async for batch in source]


def flat(lists: list[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamtrain-")]


# ---- the rules of a pass


@needs_torch
async def test_an_epoch_is_each_sample_once_with_its_target(store: Path) -> None:
    seen: list[int] = []
    async for x, y in stream(store):
        assert torch.equal(y, x[:, 0].long() // 6 * 7)
        seen += (y // 7).tolist()
    assert sorted(seen) == list(range(ROWS))


async def test_a_finished_pass_moves_to_the_next_epoch_and_set_epoch_goes_back(store: Path) -> None:
    source = stream(store)
    first, second = await indices(source), await indices(source)
    assert source.epoch == 2
    assert first != second
    assert sorted(flat(first)) == sorted(flat(second))
    source.set_epoch(0)
    assert await indices(source) == first


async def test_a_pass_that_was_left_starts_over(store: Path) -> None:
    source = stream(store)
    first = (await indices(source))[0]
    source.set_epoch(0)
    async for batch in source:
        assert batch.index.tolist() == first
        break
    async for batch in source:
        assert batch.index.tolist() == first
        break
    await source.aclose()


async def test_a_new_pass_ends_the_old_one(store: Path) -> None:
    async with stream(store) as source:
        old = source.__aiter__()
        await anext(old)
        new = source.__aiter__()
        await anext(new)
        with pytest.raises(StopAsyncIteration):
            await anext(old)
        await anext(new)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("opened", [False, True])
async def test_a_pass_that_another_one_ended_says_so_once_when_it_is_asked_for_more(
    store: Path, caplog: pytest.LogCaptureFixture, kept: bool, opened: bool
) -> None:
    def said() -> list[str]:
        return [message for message in caplog.messages if "another one over this stream began" in message]

    source = stream(store, shuffle=False, cache_transform=kept)
    if opened:
        await source.open()
    old = source.__aiter__()
    if opened:
        await anext(old)
    new = source.__aiter__()
    await anext(new)
    assert said() == []
    assert [batch async for batch in old] == []
    assert [batch async for batch in old] == []
    assert len(said()) == 1
    await new.aclose()
    assert [batch async for batch in new] == []
    assert len([batch async for batch in source]) > 0
    assert [batch async for batch in new] == []
    assert len(said()) == 1
    await source.aclose()


async def test_going_elsewhere_ends_the_live_pass(store: Path) -> None:
    whole = flat(await indices(stream(store)))
    async with stream(store) as source:
        passing = source.__aiter__()
        for _ in range(3):
            await anext(passing)
        source.load_state_dict({**source.state_dict(), "position": 660})
        assert [batch async for batch in passing] == []
        assert flat(await indices(source)) == whole[660:]


async def test_zarrs_lane_leaves_no_thread_behind_its_pass(store: Path) -> None:
    source = stream(store, io="store")
    await indices(source)
    assert ours() == []


async def test_a_pass_serves_one_consumer_at_a_time(store: Path) -> None:
    async with stream(store) as source:
        passing = source.__aiter__()
        first = asyncio.ensure_future(anext(passing))
        await asyncio.sleep(0)
        with pytest.raises(UserCodeError, match="two consumers"):
            await anext(passing)
        await first


async def test_nobody_ends_the_pass_of_a_fit(store: Path) -> None:
    async with stream(store) as source:
        source.follow(True)
        passing = source.__aiter__()
        await anext(passing)
        with pytest.raises(ConfigError, match="a fit is reading this stream"):
            source.__aiter__()
        with pytest.raises(ConfigError, match="another fit"):
            source.follow(True)
        await anext(passing)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"position": 1.5}, "'position' is 1.5, not a whole number"),
        ({"position": -1}, "'position' is -1, not a whole number"),
        ({"epoch": True}, "'epoch' is True, not a whole number"),
        ({"epoch": 2**70}, "'epoch' is 1180591620717411303424, not a whole number from 0"),
        ({"epcoh": 1}, "it has an unknown key 'epcoh'"),
        ({"of": 3}, "'of' is 3"),
    ],
    ids=str,
)
async def test_a_position_is_whole_numbers_and_what_of(store: Path, state: dict[str, Any], said: str) -> None:
    async with stream(store) as source:
        with pytest.raises(DataError, match=f"no position of a ZarrStream: {said}"):
            source.load_state_dict({**source.state_dict(), **state})
        with pytest.raises(DataError, match="it has no key 'of'"):
            source.load_state_dict({"epoch": 0, "position": 0})
        assert source.epoch == 0


async def test_a_loaded_position_is_continued_once_and_then_epochs_start_over(store: Path) -> None:
    whole = await indices(stream(store))
    source = stream(store)
    source.set_epoch(0)
    passing = source.__aiter__()
    for _ in range(7):
        await anext(passing)
    state = json.loads(json.dumps(source.state_dict()))
    await source.aclose()
    other = stream(store, memory="64MiB", threads=1, prefetch=1)
    await other.open()
    other.load_state_dict(state)
    assert await indices(other) == whole[7:]
    other.set_epoch(0)
    assert await indices(other) == whole
    await other.aclose()


async def test_another_batch_size_continues_at_the_same_sample(store: Path) -> None:
    whole = flat(await indices(stream(store)))
    source = stream(store)
    await anext(source.__aiter__())
    state = source.state_dict()
    await source.aclose()
    other = stream(store, batch_size=50)
    await other.open()
    other.load_state_dict(state)
    assert flat(await indices(other)) == whole[33:]


async def test_a_state_is_small(store: Path) -> None:
    source = stream(store, split=(0.1, 0.9), split_by="sample")
    await source.open()
    assert len(json.dumps(source.state_dict())) <= 1024


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"split": (0, 999)}, "split"),
        ({"shuffle": "global"}, "shuffle"),
        ({"shuffle_blocks": 4}, "shuffle_blocks"),
        ({"split": (0.0, 0.5), "split_by": "chunk"}, "split_by"),
        ({"inputs": "x", "targets": None}, "arrays"),
        ({"sample_axes": (0, 1), "targets": None}, "sample_axes"),
        ({"window": 4}, "window"),
        ({"indices": list(range(10))}, "chosen"),
    ],
    ids=str,
)
async def test_a_position_of_another_order_is_refused_by_its_difference(
    store: Path, change: dict[str, Any], named: str
) -> None:
    source, other = stream(store), stream(store, **change)
    await source.open()
    await other.open()
    with pytest.raises(CheckpointError, match=f"another order: .*{named}"):
        other.load_state_dict(source.state_dict())


@pytest.mark.parametrize("change", [{"rows": 900}, {"chunks": (50, 6)}, {"dtype": "float64"}], ids=str)
async def test_a_position_in_data_that_changed_since_is_no_fault_of_the_checkpoint(
    store: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    rows, chunks = change.get("rows", 1000), change.get("chunks", (64, 6))
    group = zarr.create_group(tmp_path / "other.zarr")
    group.create_array("x", data=X[:rows].astype(change.get("dtype", X.dtype)), chunks=chunks)
    group.create_array("y", data=Y[:rows], chunks=(100,))
    source, other = stream(store, split=(0.0, 0.9)), stream(tmp_path / "other.zarr", split=(0.0, 0.9))
    await source.open()
    await other.open()
    with pytest.raises(DataError, match=r"the dataset changed since the position was saved: (arrays|cells): .* then, "):
        other.load_state_dict(source.state_dict())


async def test_in_a_fit_the_position_is_what_was_trained(store: Path) -> None:
    source = stream(store)
    source.follow(True)
    async for batch in source:
        if batch.cursor.position == 66:
            source.trained(batch.cursor)
    assert source.state_dict()["position"] == 66
    assert source.state_dict()["epoch"] == 0


async def test_len_counts_batches(store: Path) -> None:
    for keywords, batches in (({}, 31), ({"drop_last": True}, 30), ({"batch_size": 2000}, 1)):
        source = stream(store, **keywords)
        await source.open()
        assert len(source) == batches == len(await indices(source))


async def test_cursors_count_source_samples(store: Path) -> None:
    source = stream(store, batch_size=400)
    assert [batch.cursor async for batch in source] == [Cursor(0, 400), Cursor(0, 800), Cursor(0, 1000)]


# ---- what batches are


@needs_torch
async def test_batches_are_aligned_tensors_that_stay_valid(store: Path) -> None:
    source = stream(store, memory="64MiB")
    kept = [batch async for batch in source]
    await source.aclose()
    for batch in kept:
        assert batch.inputs.data_ptr() % 64 == batch.targets.data_ptr() % 64 == batch.index.data_ptr() % 64 == 0
        assert np.array_equal(batch.inputs.numpy(), X[batch.index.numpy()])
    kept[0].inputs.zero_()
    assert np.array_equal(kept[1].inputs.numpy(), X[kept[1].index.numpy()])


@needs_torch
async def test_lists_of_names_give_dicts_and_one_array_may_be_both(store: Path) -> None:
    async for batch in stream(store, inputs=["x"], targets=["y", "x"], output="numpy"):
        assert set(batch.inputs) == {"x"}
        assert np.array_equal(batch.inputs["x"], batch.targets["x"])
        assert isinstance(batch.targets["y"], np.ndarray)
    async for batch in stream(store, targets="x"):
        assert torch.equal(batch.inputs, batch.targets)


@needs_torch
async def test_a_dtype_casts_inputs_and_leaves_labels_alone(store: Path) -> None:
    async for batch in stream(store, dtype="float64"):
        assert (batch.inputs.dtype, batch.targets.dtype) == (torch.float64, torch.int64)
        assert np.array_equal(batch.inputs.numpy(), X[batch.index.numpy()])
    async for batch in stream(store, dtype={"y": "float32"}):
        assert (batch.inputs.dtype, batch.targets.dtype) == (torch.float32, torch.float32)


@needs_torch
async def test_poisoned_buffers_show_in_no_batch(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POISON, "1")
    source = stream(store)
    for _ in range(2):
        async for batch in source:
            assert np.array_equal(batch.inputs.numpy(), X[batch.index.numpy()])
    await source.aclose()


async def test_stores_of_any_kind_are_streamed(store: Path) -> None:
    memory = write(MemoryStore())
    expected = await indices(stream(store))
    for given in (memory, zarr.open_group(memory, mode="r"), zarr.open_group(store, mode="r"), str(store)):
        source = stream(given)
        assert await indices(source) == expected
        await source.aclose()
    async for batch in ZarrStream(zarr.open_array(store / "x", mode="r"), batch_size=100, output="numpy"):
        assert batch.targets is None


# ---- memory


async def test_holding_everything_raises_at_once_and_letting_go_goes_on(store: Path) -> None:
    source = stream(store, memory="64KiB")
    kept: list[Batch] = []
    passing = source.__aiter__()
    with pytest.raises(BudgetHeld, match="you hold batches in"):
        await _keep(passing, kept)
    count = len(kept)
    kept.clear()
    async for _ in passing:
        count += 1
    assert count == 31


async def test_a_budget_too_small_names_the_least_that_works(store: Path) -> None:
    with pytest.raises(ConfigError, match="the least that works is") as caught:
        await stream(store, memory="4KiB").open()
    least = caught.value.hint.split(",")[0].removeprefix("memory=")
    assert sorted(flat(await indices(stream(store, memory=least)))) == list(range(ROWS))


@hypothesis.given(
    rows=st.integers(1, 60),
    chunk=st.integers(1, 9),
    batch_size=st.integers(1, 12),
    prefetch=st.sampled_from([None, 1, 3]),
    shuffle=st.sampled_from([False, "block", "global"]),
)
@hypothesis.example(rows=5, chunk=1, batch_size=4, prefetch=1, shuffle=False)
@hypothesis.settings(max_examples=40, deadline=None)
def test_what_a_plan_calls_the_least_memory_is_accepted_whatever_memory_the_plan_was_made_with(
    rows: int, chunk: int, batch_size: int, prefetch: int | None, shuffle: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        zarr.create_array(Path(folder, "s.zarr"), data=np.zeros((rows, 3), np.float32), chunks=(chunk, 3))
        given: dict[str, Any] = {"shuffle": shuffle, "output": "numpy"}
        options: dict[str, Any] = {**given, "batch_size": batch_size, "prefetch": prefetch}
        for memory in ("64MiB", 20_000):
            least = ZarrStream(Path(folder, "s.zarr"), memory=memory, **options).plan().memory_least
            assert ZarrStream(Path(folder, "s.zarr"), memory=least, **options).plan().memory == least


@pytest.mark.parametrize("batch_size", [33, 50, 66, 100, 150])
@pytest.mark.parametrize("transform", [None, lambda batch: batch], ids=["plain", "transform"])
def test_the_least_memory_works_where_blocks_hold_less_than_two_batches(
    tmp_path: Path, batch_size: int, transform: Any
) -> None:
    array = zarr.create_array(tmp_path / "s.zarr", shape=(2000, 9), chunks=(66, 9), dtype="float32")
    array[...] = np.arange(2000)[:, None]
    given: dict[str, Any] = {"shuffle": True, "shuffle_blocks": 1, "output": "numpy"}
    options: dict[str, Any] = {**given, "batch_size": batch_size, "transform": transform}
    least = ZarrStream(tmp_path / "s.zarr", **options).plan().memory_least

    async def read() -> list[int]:
        found: list[int] = []
        async with ZarrStream(tmp_path / "s.zarr", **options, memory=least) as source:
            async for batch in source:  # it is held while the next is asked for
                assert np.array_equal(batch.inputs[:, 0], batch.index)
                found += batch.index.tolist()
        return found

    assert sorted(asyncio.run(read())) == list(range(2000))


async def test_all_memory_is_given_back(store: Path) -> None:
    budget = Budget("8MiB")
    async with stream(store, memory=budget) as source:
        kept = [batch async for batch in source][-1]
        assert budget.statistics().used > 0
    used = budget.statistics().used
    assert 0 < used < 1 << 20  # the buffer that the kept batch lies in
    del kept
    assert budget.statistics().used == 0


async def test_a_batch_that_outlives_its_stream_gives_its_bytes_back_when_it_dies(store: Path) -> None:
    """Also if garbage was collected meanwhile, which takes what only a dead stream looked at."""
    budget = Budget("8MiB")
    async with stream(store, memory=budget) as source:
        batch = await anext(aiter(source))
    del source
    gc.collect()
    assert budget.statistics().used > 0
    del batch
    assert budget.statistics().used == 0


async def test_a_batch_that_dies_in_a_cycle_with_its_stream_gives_its_bytes_back(store: Path) -> None:
    budget = Budget("8MiB")
    source = stream(store, memory=budget)
    batch = await anext(aiter(source))
    await source.aclose()
    cycle: list[Any] = [source, batch]
    cycle.append(cycle)
    del source, batch, cycle
    gc.collect()
    assert budget.statistics().used == 0


@pytest.mark.parametrize("kind", ["read", "kept", "mixed"])
async def test_an_error_is_told_though_whoever_waited_for_it_was_cancelled(
    store: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next question would be answered by the end of the epoch."""
    closing, joined = asyncio.Event(), Workers.joined

    async def slow(self: Workers, timeout: float) -> bool:
        closing.set()
        await asyncio.sleep(0)
        return await joined(self, timeout)

    monkeypatch.setattr(Workers, "joined", slow)
    source: Any = stream(store, transform=small.fails_at_99, shuffle=kind == "read" and "block")
    source = mix([source]) if kind == "mixed" else source
    passing = aiter(source)
    for _ in range(2):
        await anext(passing)
    waiting = asyncio.ensure_future(anext(passing))
    await closing.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(UserCodeError, match="99"):
        await anext(passing)
    with pytest.raises(StopAsyncIteration):
        await anext(passing)
    await source.aclose()
    assert ours() == []


async def test_passes_that_are_left_cost_no_memory(store: Path) -> None:
    source = stream(store)
    for _ in range(10):
        async for batch in source:
            del batch
            break
    await source.aclose()
    assert source.budget.statistics().used == 0


async def test_a_pass_closed_in_the_middle_of_transforms_gives_their_memory_back(store: Path) -> None:
    going = threading.Event()

    def waits(batch: Batch) -> tuple[Any, Any]:
        if batch.cursor.position > 99:
            going.wait(5)
        return batch.inputs + 1, batch.targets + 1

    source = stream(store, threads=2, transform=waits)
    async for batch in source:
        if batch.cursor.position == 99:
            break
    del batch
    asyncio.get_running_loop().call_later(0.1, going.set)
    await source.aclose()
    assert source.budget.statistics().used == 0


async def test_a_pass_that_had_no_room_to_start_starts_once_there_is(store: Path) -> None:
    budget = Budget("8MiB")
    source = stream(store, memory=budget)
    await source.open()
    passing = source.__aiter__()
    others = budget.free
    assert budget.try_acquire(others)
    with pytest.raises(BudgetHeld):
        await anext(passing)
    budget.release(others)
    assert len([batch async for batch in passing]) == 31


async def test_a_shared_budget_serves_two_streams(store: Path) -> None:
    budget = Budget("1MiB")
    one, other = stream(store, memory=budget), stream(store, memory=budget, seed=1)
    async with one, other:
        assert sorted(flat(await indices(one))) == sorted(flat(await indices(other)))
    assert budget.statistics().used == 0
    assert budget.statistics().peak <= budget.total


async def test_a_stream_that_was_dropped_without_aclose_gives_its_share_back(store: Path) -> None:
    budget = Budget("8MiB")
    source = stream(store, memory=budget, shuffle="global", cache="1MiB")
    passing = aiter(source)
    await anext(passing)
    assert budget.statistics().used
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("streamtrain-")]
    del source, passing
    for thread in threads:  # the job that each has in hand holds the pass
        await asyncio.to_thread(thread.join, 5)
    assert budget.statistics().used == 0


def test_what_lies_idle_in_one_pool_is_lent_to_another() -> None:
    budget = Budget(2 << 12)
    accounts = [budget.join() for _ in range(2)]
    for account in accounts:
        account.least = 0
    one, other = (Pool(1 << 12, account) for account in accounts)
    kept, left = one.take(), one.take()
    assert left is not None
    assert other.take() is None
    del left
    got = other.take()
    assert got is not None
    assert one.take() is None
    del kept, got
    assert one.take() is not None


async def standing_still(source: ZarrStream) -> None:
    """Until it has read ahead as far as it can."""
    before = None
    while before != (before := source.statistics().queue):  # noqa: ASYNC110  (nobody tells of it)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("transform", [None, lambda batch: (batch.inputs + 1, None)], ids=["plain", "transform"])
async def test_a_stream_that_stands_still_keeps_no_other_of_its_budget_from_its_epoch(
    tmp_path: Path, transform: Any
) -> None:
    """As a fit does in the middle of an epoch: training has read ahead as far as there is memory, then validates."""
    array = zarr.create_array(tmp_path / "s.zarr", shape=(20000, 64), chunks=(1000, 64), dtype="float32")
    array[...] = 1
    given: dict[str, Any] = {"batch_size": 32, "memory": Budget("6MiB"), "output": "numpy", "shuffle_blocks": 4}
    train = ZarrStream(tmp_path / "s.zarr", split=(0.0, 0.6), shuffle="block", transform=transform, **given)
    valid = ZarrStream(tmp_path / "s.zarr", split=(0.6, 1.0), transform=transform, **given)
    async with train, valid:
        count = 0
        async for batch in train:
            count += len(batch)
            if count % 3200 == 0:
                await standing_still(train)
                async with asyncio.timeout(20):
                    assert sum([len(each) async for each in valid]) == 8000
        assert count == 12000


async def test_a_stream_waits_for_what_another_one_holds(store: Path) -> None:
    budget = Budget("1MiB")
    other = budget.join()
    assert other.try_acquire(budget.total)
    source = stream(store, memory=budget)
    waiting = asyncio.ensure_future(indices(source))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    other.release(budget.total)
    assert len(flat(await waiting)) == ROWS


async def test_a_stream_that_waited_in_vain_says_that_others_hold_its_memory(store: Path) -> None:
    budget = Budget("1MiB")
    other = budget.join()
    assert other.try_acquire(budget.total)
    source = stream(store, memory=budget, read_timeout=2)
    with pytest.raises(BudgetHeld, match="other streams keep what this one needs"):
        await indices(source)


# ---- threads


async def test_threads_live_as_long_as_their_pass(store: Path) -> None:
    source = stream(store, threads=2)
    passing = source.__aiter__()
    await anext(passing)
    assert len(ours()) == 2
    await passing.aclose()
    assert ours() == []


async def test_letting_go_of_a_pass_ends_its_threads(store: Path) -> None:
    source = stream(store)
    async for _ in source:
        break
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("streamtrain-")]
    del source
    gc.collect()
    for thread in threads:
        await asyncio.to_thread(thread.join, 5)
    assert ours() == []


async def test_a_paused_stream_reads_no_further(store: Path) -> None:
    async with stream(store, memory="64KiB", prefetch=1) as source:
        passing = source.__aiter__()
        await anext(passing)
        await source.pause()
        rest = asyncio.create_task(_drain(passing))
        await asyncio.wait([rest], timeout=0.05)
        assert not rest.done()
        source.resume()
        assert await rest == 30


async def _keep(passing: Any, kept: list[Batch]) -> None:
    async for batch in passing:
        kept.append(batch)  # noqa: PERF401 (what came before an error is to be kept)


async def _drain(passing: Any) -> int:
    count = 0
    async for _ in passing:
        count += 1
    return count


# ---- transforms


def noisy(batch: Batch) -> tuple[Any, Any]:
    assert batch.rng is not None
    return batch.inputs + batch.rng.standard_normal(batch.inputs.shape, dtype=np.float32), batch.targets


@needs_torch
async def test_a_transform_draws_the_same_after_a_resume(store: Path) -> None:
    whole = [batch.inputs async for batch in stream(store, transform=noisy)]
    source = stream(store, transform=noisy)
    passing = source.__aiter__()
    for _ in range(5):
        await anext(passing)
    state = source.state_dict()
    await source.aclose()
    other = stream(store, transform=noisy, threads=1, prefetch=2)
    await other.open()
    other.load_state_dict(state)
    rest = [batch.inputs async for batch in other]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in rest)


async def test_a_filter_drops_rows_and_keeps_the_position(store: Path) -> None:
    def even(batch: Batch) -> Batch:
        keep = batch.index % 2 == 0
        return Batch(batch.inputs[keep], batch.targets[keep], batch.index[keep])

    batches = [batch async for batch in stream(store, transform=even)]
    assert sorted(flat([batch.index.tolist() for batch in batches])) == list(range(0, ROWS, 2))
    assert batches[0].cursor.position == 33


async def test_batches_without_rows_are_passed_over(store: Path) -> None:
    def early(batch: Batch) -> tuple[Any, Any]:
        keep = batch.index < 40
        return batch.inputs[keep], batch.targets[keep]

    batches = [batch async for batch in stream(store, shuffle=False, transform=early)]
    assert [len(batch) for batch in batches] == [33, 7]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda batch: 1 / 0, "transform raised ZeroDivisionError.*samples 0...32"),
        (lambda batch: sys.exit(3), "transform raised SystemExit: 3"),
        (lambda batch: batch.inputs, "transform returned ndarray"),
        (lambda batch: ([1, 2], [3, 4]), "no batch of arrays"),
        (lambda batch: (batch.inputs.astype(object), None), "an array of dtype object"),
        (lambda batch: (np.concatenate([batch.inputs] * 2), None), "made 66 rows out of 33"),
    ],
)
async def test_a_transform_that_fails_is_named_with_its_rows(store: Path, transform: Any, message: str) -> None:
    with pytest.raises(UserCodeError, match=message):
        await indices(stream(store, shuffle=False, transform=transform))


async def test_nothing_follows_a_batch_whose_transform_failed(store: Path) -> None:
    later = threading.Event()

    def fails(batch: Batch) -> Batch:
        if batch.cursor.position == 99:
            later.wait(5)
            raise ValueError("no")
        if batch.cursor.position > 99:
            later.set()
        return batch

    positions: list[int] = []

    async def slowly() -> None:
        async for batch in stream(store, shuffle=False, threads=2, prefetch=3, transform=fails):
            positions.append(batch.cursor.position)
            await asyncio.sleep(0.05 if len(positions) == 2 else 0)  # what was made meanwhile has arrived by then

    with pytest.raises(UserCodeError):
        await slowly()
    assert positions == [33, 66]


# ---- errors


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"shuffle": "blok"}, "shuffle must be one of"),
        ({"split": (0.5, 0.1)}, "split"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': streams hand over numpy's dtypes, and bfloat16 is none of them"),
        *(
            [({"dtype": {"x": torch.bfloat16}}, "dtype=torch.bfloat16: streams hand over numpy's dtypes")]
            if torch is not None
            else []
        ),
        ({"split_by": "row"}, "split_by"),
        ({"memory": "much"}, "memory"),
        ({"targets": "y", "inputs": None}, "targets= without inputs="),
        ({"disk_cache_bytes": "1GiB"}, "disk_cache_bytes= without disk_cache="),
        ({"disk_cache": "1GiB", "disk_cache_bytes": "1GiB"}, "is a size, and so is"),
        ({"disk_cache": ["x"]}, "disk_cache must be a folder, or a size"),
        ({"suffle": True}, "takes no suffle="),
        ({"sample_axes": ("time", "lat")}, r"sample_axes are numbers, such as \(0, 1\), not names: \('time', 'lat'\)"),
        ({"transform": 3}, "transform must be a function"),
        ({"dtype": "string"}, "dtype"),
        ({"read_timeout": 0}, "read_timeout"),
        ({"read_timeout": 1e300}, "read_timeout must be a number of seconds above 0 and up to 1e.09, not 1e.300"),
        ({"threads": 100_000}, "threads must be at most 256, not 100000"),
        ({"transform_workers": 100_000}, "transform_workers must be at most 256"),
        ({"transform_workers": "process:257"}, "transform_workers must be at most 256"),
        ({"transform_workers": "process:" + "9" * 5000}, "transform_workers must be a number"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_arguments_are_checked_when_given(store: Path, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(store, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"inputs": "z"}, "has no array 'z'; there are: x, y"),
        ({"inputs": None, "targets": None}, "holds x, y"),
        ({"sample_axes": (0, 1)}, "no axis 1"),
        ({"split": (0, 5000)}, "ends beyond the 1000 samples"),
        ({"split": (0.0, 0.0)}, "no samples"),
        ({"batch_size": 2000, "drop_last": True}, "1000 samples are fewer than a batch of 2000"),
    ],
    ids=str,
)
async def test_what_does_not_fit_the_data_is_said_on_opening(
    store: Path, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        await stream(store, **keywords).open()


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Path]:
    path = write(tmp_path / "damaged.zarr", rows=640)
    chunk = path / "x" / "c" / "5" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    return path  # type: ignore[no-any-return]


async def test_damage_is_named_and_what_came_before_is_served(damaged: Path) -> None:
    source = stream(damaged, shuffle=False, batch_size=64, prefetch=1)
    kept: list[Batch] = []
    with pytest.raises(DataError, match=r"array 'x': chunk 5\.0 .*rows \[320:384, 0:6\].*1532 bytes, expected 1536"):
        await _keep(source.__aiter__(), kept)
    assert len(kept) <= 5
    assert ours() == []


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
async def test_a_flipped_bit_in_what_our_writers_wrote_is_noticed(tmp_path: Path, codec: Any) -> None:
    path = synth(tmp_path / "made.zarr", rows=512, columns=4, chunk_rows=64, codec=codec)
    chunk = path / "x" / "c" / "3" / "0"
    data = bytearray(chunk.read_bytes())
    for at in range(0, len(data), max(1, len(data) // 40)):
        data[at] ^= 4
        chunk.write_bytes(data)
        with pytest.raises(DataError, match=r"array 'x': chunk 3\.0"):
            await indices(stream(path))
        data[at] ^= 4


async def test_a_cast_that_drops_a_part_of_the_numbers_is_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "c.zarr").create_array("x", data=np.ones((8, 2), dtype=np.complex64))
    with pytest.raises(ConfigError, match="would drop its imaginary part"):
        await stream(tmp_path / "c.zarr", targets=None, dtype="float32").open()


class Stuck(MemoryStore):
    """A store whose chunks never come."""

    async def get(self, key: str, *arguments: Any, **keywords: Any) -> Any:
        if "/c/" in key:
            await asyncio.Event().wait()
        return await super().get(key, *arguments, **keywords)


async def test_a_read_that_hangs_is_an_error_with_the_chunk() -> None:
    write(filled := MemoryStore())
    source = stream(Stuck(store_dict=filled._store_dict), read_timeout=0.2)
    with pytest.raises(EnvironmentProblem, match=r"chunk .* was not read within 0.2 s"):
        await indices(source)
    await source.aclose()


# ---- how it does


async def test_statistics_tell_lanes_and_work(store: Path) -> None:
    source = stream(store)
    await indices(source)
    told = source.statistics()
    assert told.lanes["y"] == "pread"
    assert told.chunks == 16 + sum(
        1 for cell in range(16) for _ in {cell * 64 // 100, (min(cell * 64 + 63, 999)) // 100}
    )
    assert told.queue is not None
    assert told.queue.put == 31
    await source.aclose()


async def test_a_plan_tells_what_a_pass_costs(store: Path) -> None:
    source = stream(store)
    await source.open()
    plan = source.plan()
    assert (plan.samples, plan.batches, plan.cells, plan.cells_per_block) == (1000, 31, 16, 3)
    assert plan.bytes_used == 1000 * (24 + 8)
    assert plan.memory_least <= plan.memory
    qualities = []
    for shuffle in (False, "block", "global"):
        other = stream(store, shuffle=shuffle)
        await other.open()
        qualities.append(other.plan().shuffle_quality)
    assert qualities == sorted(qualities)
    assert 0 < qualities[0] < 0.2  # a batch of 33 lies in one or two of the 16 cells
    assert qualities[2] == 1
