"""What an array that is named twice promises: it is read once, and both columns are whole and apart.

And what a pass that begins within a block promises: nothing is read for rows that were handed over before.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from streamtrain.data.batch import Batch
from streamtrain.data.readers import LocalReader
from streamtrain.data.stream import ZarrStream

ROWS, CHUNK, BATCH = 203, 8, 10
X = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("f4")
SHUFFLES = ("block", "global", False)


@pytest.fixture(params=["zstd", "plain", "rows cut", "shards"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    ways: dict[str, dict[str, Any]] = {
        "zstd": {"chunks": (CHUNK, 6), "compressors": ZstdCodec()},
        "plain": {"chunks": (CHUNK, 6), "compressors": None},
        "rows cut": {"chunks": (CHUNK, 4), "compressors": ZstdCodec()},
        "shards": {"chunks": (CHUNK, 6), "shards": (3 * CHUNK, 6), "compressors": ZstdCodec()},
    }
    zarr.create_group(tmp_path / "data.zarr").create_array("x", data=X, **ways[request.param])
    return tmp_path / "data.zarr"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    read = LocalReader.read

    def counted(self: LocalReader, chunk: Sequence[int], *given: Any, **named: Any) -> Any:
        found[tuple(chunk)] += 1
        return read(self, chunk, *given, **named)

    monkeypatch.setattr(LocalReader, "read", counted)
    return found


def stream(path: Path, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "targets": "x", "batch_size": BATCH, "output": "numpy", "cache": 0}
    return ZarrStream(path, **{**given, "shuffle_blocks": 5, "memory": "32MiB", **keywords})


async def listed(source: ZarrStream) -> list[Batch]:
    async with source:
        return [batch async for batch in source]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_inputs_that_are_the_targets_too_are_read_once_and_each_is_whole(
    store: Path, shuffle: Any, reads: Counter[tuple[int, ...]]
) -> None:
    batches = asyncio.run(listed(stream(store, shuffle=shuffle)))
    twice = reads.total()
    reads.clear()
    alone = asyncio.run(listed(stream(store, shuffle=shuffle, targets=None)))
    assert twice == reads.total()
    for batch, other in zip(batches, alone, strict=True):
        np.testing.assert_array_equal(batch.index, other.index)
        np.testing.assert_array_equal(batch.inputs, X[batch.index])
        np.testing.assert_array_equal(batch.targets, X[batch.index])
        assert not np.shares_memory(batch.inputs, batch.targets)


@pytest.mark.parametrize("shuffle", ["block", False])
def test_the_plan_and_the_account_of_each_epoch_say_that_it_is_read_once(store: Path, shuffle: Any) -> None:
    async def told(targets: str | None) -> list[Any]:
        async with stream(store, shuffle=shuffle, targets=targets) as source:
            found: list[Any] = [source.plan().chunks, source.plan().bytes_read]
            for _ in range(2):  # of the second epoch a store that is mapped is gathered from at once
                assert [batch async for batch in source]
                found += [source.statistics().chunks, source.statistics().bytes_read]
            return found

    assert asyncio.run(told("x")) == asyncio.run(told(None))


def test_an_array_whose_bad_chunks_are_skipped_is_read_once_too(
    store: Path, reads: Counter[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    for path in sorted(path for path in (store / "x" / "c").rglob("*") if path.is_file())[:1]:
        path.write_bytes(b"")
    found = []
    for targets in (None, "x"):
        reads.clear()
        caplog.clear()
        skipping = stream(store, targets=targets, on_bad_chunk="skip", max_skipped=1.0)
        batches = asyncio.run(listed(skipping))
        for batch in batches:
            np.testing.assert_array_equal(batch.inputs, X[batch.index])
        found.append((reads.total(), [batch.index.tolist() for batch in batches], caplog.messages))
    assert found[0] == found[1]


@pytest.mark.parametrize("rank", [(0, 1), (1, 3)])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_pass_that_begins_within_a_block_reads_nothing_for_rows_of_before(
    store: Path, shuffle: Any, rank: tuple[int, int], reads: Counter[tuple[int, ...]]
) -> None:
    async def rest(position: int) -> list[Batch]:
        source = stream(store, shuffle=shuffle, seed=1, lanes=3, rank=rank[0], world_size=rank[1])
        async with source:
            state = {**source.state_dict(), "position": position}
            source.load_state_dict(state)
            return [batch async for batch in source]

    every = asyncio.run(listed(stream(store, shuffle=shuffle, seed=1, lanes=3)))
    order = np.concatenate([batch.index for batch in every])
    for position in (30, 70, 190):
        reads.clear()
        found = asyncio.run(rest(position))
        mine = order[np.arange(position, ROWS)[np.arange(position, ROWS) % rank[1] == rank[0]]]
        np.testing.assert_array_equal(np.concatenate([batch.index for batch in found]), mine)
        for batch in found:
            np.testing.assert_array_equal(batch.inputs, X[batch.index])
        assert {chunk[0] for chunk in reads} == set((mine // CHUNK).tolist())
