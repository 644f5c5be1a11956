"""What streams of one budget promise each other: a chunk of a store is decoded and kept once for all, never stale."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.storage import MemoryStore, ObjectStore

from streamtrain.data.budget import Budget
from streamtrain.data.cache import CacheStatistics
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import DataError

pytestmark = pytest.mark.usefixtures("old_files")
ROWS, WIDTH, CHUNK = 400, 8, 20
CHUNKS = ROWS // CHUNK
DATA: NDArray[np.float32] = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = write(tmp_path_factory.mktemp("stores") / "s.zarr", DATA)
    return path


def write(where: Any, data: NDArray[Any]) -> Any:
    zarr.create_group(where).create_array("x", data=data, chunks=(CHUNK, WIDTH))
    return where


def stream(path: Any, budget: Budget | str, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "batch_size": 32, "output": "numpy", "cache": "1MiB"}
    return ZarrStream(path, memory=budget, **{**given, **keywords})


async def epoch(source: ZarrStream, data: NDArray[Any] = DATA) -> int:
    """Samples of one epoch, checked."""
    seen = 0
    async for batch in source:
        np.testing.assert_array_equal(batch.inputs, data[batch.index])
        seen += len(batch)
        del batch
    return seen


def told(source: ZarrStream) -> CacheStatistics:
    found = source.statistics().cache
    assert found is not None
    return found


SHUFFLES = st.sampled_from([False, "block", "global"])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    SHUFFLES, SHUFFLES, st.sampled_from(["range", "chunk", "sample"]), st.floats(0.1, 0.9), st.integers(0, 9), st.data()
)
def test_two_streams_together_decode_each_chunk_at_most_once(
    store: Path, one: Any, other: Any, by: Any, bound: float, seed: int, data: st.DataObject
) -> None:
    together, epochs = data.draw(st.booleans(), label="at the same time"), data.draw(st.integers(1, 3), label="epochs")
    split: dict[str, Any] = {"split_by": by, "seed": seed, "cache_transform": False}

    async def scenario() -> None:
        budget = Budget("8MiB")
        train = stream(store, budget, shuffle=one, split=(0.0, bound), **split)
        valid = stream(store, budget, shuffle=other, split=(bound, 1.0), **split)
        for _ in range(epochs):
            if together:
                seen = sum(await asyncio.gather(epoch(train), epoch(valid)))
            else:
                seen = await epoch(train) + await epoch(valid)
            assert seen == ROWS
        first, second = told(train), told(valid)
        assert first.misses + second.misses == CHUNKS
        assert first.bytes == second.bytes == CHUNKS * CHUNK * WIDTH * 4
        assert budget.statistics().peak <= budget.total
        await train.aclose()
        assert told(valid).bytes == first.bytes
        before = told(valid).misses
        await epoch(valid)
        assert told(valid).misses == before
        await valid.aclose()
        assert budget.statistics().used == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("keywords", [{}, {"cache": "auto"}, {"shuffle": False, "cache_transform": False}])
async def test_the_second_epoch_of_one_stream_decodes_nothing(store: Path, keywords: dict[str, Any]) -> None:
    source = stream(store, "8MiB", **{"shuffle": "block", **keywords})
    for _ in range(3):
        assert await epoch(source) == ROWS
        assert told(source).misses == CHUNKS
    assert source.statistics().bytes_read == 0
    await source.aclose()
    assert source.budget.statistics().used == 0
    assert told(source).bytes == 0
    assert await epoch(source) == ROWS  # once more, from the beginning
    assert told(source).misses == 2 * CHUNKS
    await source.aclose()


async def test_more_than_a_quarter_of_the_memory_is_not_kept_unasked(store: Path) -> None:
    for memory, cache in (("40KiB", "auto"), ("8MiB", 0)):
        source = stream(store, memory, cache=cache, batch_size=8, shuffle="block", shuffle_blocks=2)
        assert await epoch(source) == ROWS
        assert source.statistics().cache is None
        await source.aclose()


async def test_other_budgets_other_stores_and_other_checks_share_nothing(store: Path, tmp_path: Path) -> None:
    budget = Budget("8MiB")
    other = write(tmp_path / "s.zarr", -DATA)
    sources = [
        (stream(store, budget, shuffle="block"), DATA),
        (stream(store, Budget("8MiB"), shuffle="block"), DATA),
        (stream(other, budget, shuffle="block"), -DATA),
        (stream(store, budget, shuffle="block", verify="never"), DATA),
        (stream(store, budget, shuffle="block", on_bad_chunk="skip"), DATA),
        (stream(write(MemoryStore(), DATA + 1), budget, shuffle="block"), DATA + 1),
        (stream(write(MemoryStore(), DATA + 2), budget, shuffle="block"), DATA + 2),
    ]
    for source, data in sources:
        assert await epoch(source, data) == ROWS
        assert (told(source).hits, told(source).misses) == (0, CHUNKS)
    for source, _ in sources:
        await source.aclose()
    assert budget.statistics().used == 0


async def test_the_same_store_by_other_names_is_the_same(store: Path, tmp_path: Path) -> None:
    budget, link = Budget("8MiB"), tmp_path / "link.zarr"
    link.symlink_to(store)
    for one, other in ((store, link), (str(store), zarr.open_group(store, mode="r"))):
        first, second = stream(one, budget), stream(other, budget)
        assert await epoch(first) == await epoch(second) == ROWS
        assert (told(second).hits, told(second).misses) == (CHUNKS, 0)
        await first.aclose()
        await second.aclose()


async def test_what_was_kept_of_a_file_that_changed_is_not_given(tmp_path: Path) -> None:
    path, budget = write(tmp_path / "s.zarr", DATA), Budget("8MiB")
    train = stream(path, budget, shuffle="block")
    assert await epoch(train) == ROWS
    changed = DATA.copy()
    changed[3 * CHUNK : 4 * CHUNK] += 1
    file = path / "x" / "c" / "3" / "0"
    before = file.stat().st_mtime_ns
    zarr.open_array(str(path), path="x", mode="r+")[3 * CHUNK : 4 * CHUNK] = changed[3 * CHUNK : 4 * CHUNK]
    assert file.stat().st_mtime_ns != before
    valid = stream(path, budget, shuffle="block")
    assert await epoch(valid, changed) == ROWS
    assert (told(valid).hits, told(valid).misses) == (CHUNKS - 1, 1)
    with pytest.raises(DataError, match=r"chunk 3\.0 .*changed during the run"):
        await epoch(train)
    os.unlink(path / "x" / "c" / "5" / "0")
    with pytest.raises(DataError, match=r"chunk 5\.0 .*vanished during the run"):
        await epoch(valid, changed)
    await train.aclose()
    await valid.aclose()


def far_store() -> Any:
    """A store elsewhere that tells versions."""
    obstore = pytest.importorskip("obstore")
    return write(ObjectStore(obstore.store.MemoryStore()), DATA)


async def changed_chunk(store: Any) -> NDArray[Any]:
    """Write the fourth chunk anew; what the array holds then."""
    data = DATA.copy()
    data[3 * CHUNK : 4 * CHUNK] += 1
    array = zarr.open_array(store, path="x", mode="r+")
    await asyncio.to_thread(lambda: array.set_basic_selection(slice(None), data))
    return data


async def test_an_object_is_decoded_once_for_all_and_asked_after_by_a_byte() -> None:
    far, budget = far_store(), Budget("8MiB")
    async with (
        stream(far, budget, shuffle="block") as first,
        stream(zarr.open_group(far), budget, shuffle="block") as second,
    ):
        assert await epoch(first) == ROWS
        for _ in range(2):
            assert await epoch(second) == ROWS
            fetch = second.statistics().fetch
            assert fetch is not None
            assert (told(second).misses, fetch.bytes) in ((0, CHUNKS), (0, 0))
        assert told(second).hits == 2 * CHUNKS


async def test_what_was_kept_of_an_object_that_changed_is_not_given() -> None:
    far, budget = far_store(), Budget("8MiB")
    async with stream(far, budget, shuffle="block") as train:
        assert await epoch(train) == ROWS
        changed = await changed_chunk(far)
        async with stream(far, budget, shuffle="block") as valid:
            assert await epoch(valid, changed) == ROWS
            misses = told(valid).misses
            assert 1 <= misses <= CHUNKS
            assert await epoch(valid, changed) == ROWS
            assert told(valid).misses == misses


async def test_an_object_that_vanished_is_not_given_from_the_cache() -> None:
    far, budget = far_store(), Budget("8MiB")
    async with stream(far, budget, shuffle="block") as train:
        assert await epoch(train) == ROWS
        await far.delete("x/c/3/0")
        async with stream(far, budget, shuffle="block") as valid:
            emptied = DATA.copy()
            emptied[3 * CHUNK : 4 * CHUNK] = 0
            assert await epoch(valid, emptied) == ROWS


async def test_of_stores_that_tell_no_versions_each_stream_keeps_its_own() -> None:
    far, budget = write(MemoryStore(), DATA), Budget("8MiB")
    async with stream(far, budget, shuffle="block") as train:
        assert await epoch(train) == ROWS
        changed = await changed_chunk(far)
        async with stream(far, budget, shuffle="block") as valid:
            for _ in range(2):
                assert await epoch(valid, changed) == ROWS
            assert (told(valid).hits, told(valid).misses) == (CHUNKS, CHUNKS)


async def test_a_stream_that_is_dropped_leaves_nothing(store: Path) -> None:
    budget, size = Budget("8MiB"), CHUNK * WIDTH * 4
    train, valid = (stream(store, budget, shuffle="block", cache=12 * size) for _ in range(2))
    assert await epoch(train) == await epoch(valid) == ROWS
    assert told(valid).bytes == CHUNKS * size
    del train
    assert await epoch(valid) == ROWS
    assert told(valid).bytes <= 12 * size
    del valid
    assert budget.statistics().used == 0


async def test_a_smaller_cache_keeps_to_its_bytes(store: Path) -> None:
    budget, size = Budget("8MiB"), CHUNK * WIDTH * 4
    train, valid = (stream(store, budget, shuffle="global", cache=3 * size) for _ in range(2))
    for _ in range(2):
        await asyncio.gather(epoch(train), epoch(valid))
        assert told(train).bytes == told(valid).bytes <= 6 * size
    assert told(train).evictions == told(valid).evictions > 0
    await train.aclose()
    assert told(valid).bytes <= 3 * size
    await valid.aclose()
    assert budget.statistics().used == 0
