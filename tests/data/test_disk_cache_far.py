"""What the disk cache promises of stores elsewhere: fetched once, asked after once a run, and never given stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from streamtrain.data.disk_cache import DiskCacheStatistics
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import EnvironmentProblem
from tests.data.cloud import Proxy, made, options, put

pytestmark = pytest.mark.usefixtures("old_files")
DATA = np.random.default_rng(0).integers(0, 1000, (600, 16)).astype(np.int32)
CHUNK = 50
LAYOUTS: dict[str, dict[str, Any]] = {
    "raw": {"chunks": (CHUNK, 16), "compressors": None},
    "zstd": {"chunks": (CHUNK, 16)},
    "shards": {"chunks": (CHUNK, 16), "shards": (200, 16)},
}


def stream(url: Any, proxy: Proxy | None, cache: Path, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"batch_size": 32, "output": "numpy", "memory": "16MiB", "inputs": "zstd", "cache": 0}
    far = {"storage_options": options(proxy.url)} if proxy is not None else {}
    return ZarrStream(url, disk_cache=cache, disk_cache_bytes="2MiB", shuffle="block", **{**given, **far, **keywords})


async def epoch(source: ZarrStream, data: NDArray[Any] = DATA) -> None:
    """One epoch, its samples checked."""
    seen = 0
    async for batch in source:
        np.testing.assert_array_equal(batch.inputs, data[batch.index])
        seen += len(batch)
    assert seen == source.num_samples


def told(source: ZarrStream) -> DiskCacheStatistics:
    found = source.statistics().disk_cache
    assert found is not None
    return found


def chunk_requests(proxy: Proxy) -> list[tuple[str, str]]:
    return [(path, wanted) for path, wanted in proxy.requests if "/c/" in path]


@pytest.mark.parametrize("name", LAYOUTS)
async def test_the_second_epoch_asks_for_nothing_and_the_next_run_for_a_byte(
    s3: str, proxy: Proxy, tmp_path: Path, name: str
) -> None:
    url = put(s3, made({name: {"data": DATA, **LAYOUTS[name]}}))
    async with stream(url, proxy, tmp_path / "cache", inputs=name) as source:
        await epoch(source)
        asked = len(chunk_requests(proxy))
        await epoch(source)
        assert len(chunk_requests(proxy)) == asked
        assert (told(source).misses, told(source).hits) == (12, 12)
        assert source.statistics().lanes == {name: "disk cache over obstore"}
    async with stream(url, proxy, tmp_path / "cache", inputs=name) as source:
        await source.open()
        proxy.forget()
        for _ in range(2):
            await epoch(source)
        assert told(source).misses == 0
        fetch = source.statistics().fetch
        assert fetch is not None
        index = 16 * 4 + 4  # of a shard, the first thing that is asked for
        bytes_each = {"bytes=0-0"} if name != "shards" else {f"bytes=-{index}"}
        assert {wanted for _, wanted in chunk_requests(proxy)} == bytes_each
        assert len(chunk_requests(proxy)) == (3 if name == "shards" else 12)  # once each


async def test_an_object_of_another_version_is_fetched_anew(s3: str, proxy: Proxy, tmp_path: Path) -> None:
    url = put(s3, made({"zstd": {"data": DATA, **LAYOUTS["zstd"]}}))
    async with stream(url, proxy, tmp_path / "cache") as source:
        await epoch(source)
    changed = DATA.copy()
    changed[:CHUNK] = -1
    put(s3, made({"zstd": {"data": changed, **LAYOUTS["zstd"]}}), url.rpartition("/")[2])
    async with stream(url, proxy, tmp_path / "cache") as source:
        for _ in range(2):
            await epoch(source, changed)
        assert told(source).misses == 1


async def test_what_is_kept_is_asked_after_ahead_of_the_threads(s3: str, proxy: Proxy, tmp_path: Path) -> None:
    url = put(s3, made({"zstd": {"data": DATA, **LAYOUTS["zstd"]}}))
    async with stream(url, proxy, tmp_path / "cache") as source:
        await epoch(source)
    async with stream(url, proxy, tmp_path / "cache", threads=1) as source:
        proxy.most_at_once, proxy.fault = 0, lambda path, before: 0.2
        await epoch(source)
        assert told(source).misses == 0
    assert proxy.most_at_once > 1


async def test_what_cannot_be_asked_after_is_an_error_not_a_guess(s3: str, proxy: Proxy, tmp_path: Path) -> None:
    url = put(s3, made({"zstd": {"data": DATA, **LAYOUTS["zstd"]}}))
    async with stream(url, proxy, tmp_path / "cache") as source:
        await epoch(source)
    proxy.fault = lambda path, before: "403" if path.endswith("/c/3/0") else None
    async with stream(url, proxy, tmp_path / "cache") as source:
        with pytest.raises(EnvironmentProblem, match=r"array 'zstd': chunk 3\.0 .*it can't be had"):
            await epoch(source)


@pytest.mark.parametrize("far", ["memory", "path"])
async def test_other_stores_are_kept_by_what_they_tell(tmp_path: Path, far: str) -> None:
    store: Any = MemoryStore() if far == "memory" else tmp_path / "s.zarr"
    zarr.create_group(store).create_array("zstd", data=DATA, chunks=(CHUNK, 16))
    for life in range(2):
        async with stream(store, None, tmp_path / "cache") as source:
            for _ in range(2):
                await epoch(source)
            assert told(source).misses == (0 if life and far == "path" else 12)
            assert told(source).hits == (24 if life and far == "path" else 12)
