"""What both caches promise of ragged and sparse rows, and of crops: the same samples, decoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from streamtrain.data.batch import Batch
from streamtrain.data.stream import ZarrStream
from tests.data.sparse import random_sparse, sparse_store

MATRIX = random_sparse(203, 40, 12)
WAYS: dict[str, dict[str, Any]] = {
    "sparse": {"inputs": "X"},
    "crops": {"inputs": "f", "crop": {1: 3, 2: 4}},
    "windows": {"inputs": "f", "window": 5},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = sparse_store(tmp_path_factory.mktemp("rows") / "s.zarr", MATRIX)
    field = np.arange(203 * 8 * 9, dtype=np.float32).reshape(203, 8, 9)
    zarr.open_group(path).create_array("f", data=field, chunks=(20, 4, 5))
    return path


async def listed(source: ZarrStream) -> list[Batch]:
    return [batch async for batch in source]


@pytest.mark.parametrize("shuffle", [False, "block"])
@pytest.mark.parametrize("name", WAYS)
async def test_the_same_samples_come_and_nothing_is_decoded_twice(
    store: Path, tmp_path: Path, name: str, shuffle: Any
) -> None:
    given: dict[str, Any] = {"batch_size": 16, "memory": "16MiB", "output": "numpy", "shuffle": shuffle, **WAYS[name]}
    plain = ZarrStream(store, cache=0, **given)
    disk = ZarrStream(store, cache=0, disk_cache=tmp_path / "kept", disk_cache_bytes="4MiB", **given)
    memory = ZarrStream(store, cache="4MiB", cache_transform=False, **given)
    counted: list[tuple[int, int]] = []
    for _ in range(2):
        expected = await listed(plain)
        for source in (disk, memory):
            got = await listed(source)
            assert [batch.cursor for batch in got] == [batch.cursor for batch in expected]
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_array_equal(one.index, other.index)
                np.testing.assert_array_equal(one.inputs, other.inputs)
        on_disk, kept = disk.statistics().disk_cache, memory.statistics().cache
        assert on_disk is not None
        assert kept is not None
        counted.append((on_disk.misses, kept.misses))
    if name != "crops":  # each epoch touches other chunks
        assert counted[0] == counted[1]
    assert counted[0][0] > 0
    for source in (plain, disk, memory):
        await source.aclose()
