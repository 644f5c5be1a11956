"""What streams over stores elsewhere promise, by the real S3 protocol: the same samples, whatever the way does."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.storage import MemoryStore, ObjectStore, ZipStore

from streamtrain.data.budget import Budget
from streamtrain.data.stream import ZarrStream
from streamtrain.data.zarr_lane import ZarrReader
from streamtrain.errors import ConfigError, DataError, EnvironmentProblem
from tests.data.cloud import Proxy, bucket, made, options, put
from tests.data.test_stream_properties import Drawn, check_counting, check_values, collect, numbers, read, streams

DATA = np.random.default_rng(0).integers(0, 1000, (2000, 16)).astype(np.int32)
LAYOUTS: dict[str, dict[str, Any]] = {
    "raw": {"chunks": (50, 16), "compressors": None},
    "zstd": {"chunks": (50, 16)},
    "tiled": {"chunks": (50, 5), "compressors": [ZstdCodec(), Crc32cCodec()]},
    "shards": {"chunks": (20, 16), "shards": (400, 16)},
    "raw-shards": {"chunks": (20, 16), "shards": (400, 16), "compressors": None},
}


@pytest.fixture(scope="module")
def url(s3: str) -> str:
    return put(s3, made({name: {"data": DATA, **options} for name, options in LAYOUTS.items()}))


def stream(url: Any, server: str | Proxy, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"batch_size": 32, "output": "numpy", "memory": "64MiB", "inputs": "zstd", **keywords}
    endpoint = server if isinstance(server, str) else server.url
    return ZarrStream(url, storage_options=options(endpoint), **given)


async def epoch(source: ZarrStream, data: NDArray[Any] = DATA) -> list[int]:
    """The order of one epoch, its samples checked."""
    order: list[int] = []
    async for batch in source:
        assert np.array_equal(batch.inputs, data[batch.index])
        order += batch.index.tolist()
        del batch
    return order


async def until(true: Any) -> None:
    """Wait for a state."""
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110  (what a kernel or another thread does sends no event)
            await asyncio.sleep(0.005)


def sockets() -> int:
    """Open sockets of this process."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return sum(link.startswith("socket:") for link in links)


# The same samples


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
@pytest.mark.parametrize("name", LAYOUTS)
async def test_an_epoch_from_s3_is_the_source(s3: str, url: str, name: str, shuffle: Any) -> None:
    async with stream(url, s3, inputs=name, shuffle=shuffle) as source:
        order = await epoch(source)
        assert sorted(order) == list(range(len(DATA)))
        assert source.statistics().lanes == {name: "obstore"}
    assert source.budget.statistics().used == 0


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@settings(max_examples=20, suppress_health_check=SLOW)
@given(streams())
def test_any_store_from_s3_gives_the_samples_and_the_order_that_it_gives_from_memory(s3: str, drawn: Drawn) -> None:
    store = MemoryStore()
    group = zarr.create_group(store, zarr_format=drawn.zarr_format)  # type: ignore[arg-type]
    for one in drawn.sources:
        one.write(group)

    async def scenario(far: str) -> None:
        async with stream(far, s3, **drawn.keywords) as source:
            found = await collect(source)
            check_counting(found, source, drawn)
            check_values(found, read(store, drawn), drawn)
        async with ZarrStream(store, output="numpy", memory="64MiB", **drawn.keywords) as source:
            assert numbers(await collect(source)) == numbers(found)

    asyncio.run(scenario(put(s3, store)))


async def test_a_position_saved_here_goes_on_there(s3: str, url: str) -> None:
    async with stream(url, s3, shuffle="block") as source:
        whole = numbers(await collect(source))
    async with stream(url, s3, shuffle="block") as source:
        before = numbers(await collect(source, 20))
        state = source.state_dict()
    async with stream(url, s3, shuffle="block", batch_size=48) as source:
        source.load_state_dict(state)
        assert before + numbers(await collect(source)) == whole


async def test_with_the_least_memory_it_works_too(s3: str, url: str) -> None:
    async with stream(url, s3, inputs="tiled", shuffle="block") as source:
        order = await epoch(source)
        least = source.plan().memory_least
    async with stream(url, s3, inputs="tiled", shuffle="block", memory=least) as source:
        assert await epoch(source) == order
        assert source.statistics().budget.peak <= least


@pytest.mark.parametrize("kind", ["memory", "zip", "zarrs-object-store", "group"])
async def test_any_store_of_zarr_is_read_by_ranges(kind: str, s3: str, url: str, tmp_path: Any) -> None:
    store: Any = made({"x": {"data": DATA, **LAYOUTS["shards"]}})
    lane = "store"
    if kind == "zip":
        memory, store = store, ZipStore(tmp_path / "a.zip", mode="w")
        await store._open()
        for key, value in memory._store_dict.items():
            await store.set(key, value)
        store.close()
        store = ZipStore(tmp_path / "a.zip", mode="r", read_only=True)
    elif kind == "zarrs-object-store":
        store, lane = ObjectStore(bucket(s3, url.rpartition("/")[2]), read_only=True), "obstore"
    elif kind == "group":
        store = await asyncio.to_thread(zarr.open_group, store, mode="r")
    async with ZarrStream(
        store, inputs="shards" if lane == "obstore" else "x", batch_size=32, output="numpy"
    ) as source:
        assert len(await epoch(source)) == len(DATA)
        assert set(source.statistics().lanes.values()) == {lane}
    if kind == "zip":
        store.close()


async def test_what_the_fast_lane_does_not_know_is_read_by_zarr(s3: str) -> None:
    index: list[Any] = [BytesCodec(endian="big"), Crc32cCodec()]
    shards = ShardingCodec(chunk_shape=(250, 16), codecs=[BytesCodec()], index_codecs=index)
    how = {"chunks": (500, 16), "serializer": shards, "compressors": None}
    far = await asyncio.to_thread(put, s3, made({"x": {"data": DATA, **how}}))
    async with stream(far, s3, inputs="x") as source:
        assert len(await epoch(source)) == len(DATA)
        assert source.statistics().lanes == {"x": "zarr (a big-endian shard index)"}
        assert source.statistics().fetch is None


# How it asks


async def test_a_shards_index_is_read_once_and_its_neighbours_share_a_request(proxy: Proxy, url: str) -> None:
    async with stream(url, proxy, inputs="shards", cache=0) as source:
        await source.open()
        proxy.forget()
        for _ in range(2):
            await epoch(source)
    asked = [(path, wanted) for path, wanted in proxy.requests if "/c/" in path]
    indexes = [path for path, wanted in asked if wanted.startswith("bytes=-")]
    assert len(indexes) == len(set(indexes)) == 5
    assert len(asked) - len(indexes) == 2 * 5  # 20 chunks each


async def test_statistics_tell_requests_bytes_and_latency(proxy: Proxy, url: str) -> None:
    proxy.fault = lambda path, before: 0.02 if "/c/" in path else None
    async with stream(url, proxy, inputs="raw") as source:
        await epoch(source)
        told = source.statistics().fetch
    assert told is not None
    assert (told.requests, told.retries, told.bytes, told.under_way) == (40, 0, DATA.nbytes, 0)
    assert told.latency >= 0.02
    assert told.seconds >= 40 * 0.02
    assert told.at_once >= 8


@pytest.mark.parametrize("shuffle", [False, "block"])
async def test_a_pass_that_begins_within_a_block_asks_for_nothing_of_rows_of_before(
    shuffle: Any, proxy: Proxy, url: str
) -> None:
    def made() -> ZarrStream:
        return stream(url, proxy, inputs="raw", shuffle=shuffle, shuffle_blocks=8 if shuffle else None, cache=0)

    async with made() as source:
        order = await epoch(source)
    async with made() as source:
        source.load_state_dict({**source.state_dict(), "position": 398})  # two rows before the end of a block
        await source.open()
        proxy.forget()
        assert await epoch(source) == order[398:]
    asked = {int(path.split("/c/")[1].split("/")[0]) for path, _ in proxy.requests if "/c/" in path}
    assert asked == {row // 50 for row in order[398:]}


async def test_many_are_asked_for_at_once_however_few_threads(proxy: Proxy, url: str) -> None:
    proxy.fault = lambda path, before: 0.05 if "/c/" in path else None
    async with stream(url, proxy, inputs="raw", threads=1) as source:
        await epoch(source)
    assert 4 <= proxy.most_at_once <= 64


async def test_bytes_that_were_not_granted_are_not_fetched(proxy: Proxy, url: str) -> None:
    """A consumer that takes nothing holds the readers back."""
    async with stream(url, proxy, inputs="raw", memory="40KiB", batch_size=8, threads=1) as source:
        reading = aiter(source)
        batch = await anext(reading)
        asked = len([path for path, _ in proxy.requests if "/c/" in path])
        assert asked < 40
        assert source.statistics().budget.peak <= source.budget.total
        del batch
        await reading.aclose()


async def test_reading_ahead_never_delays_the_first_batch(proxy: Proxy, url: str) -> None:
    """Until the first unit is there, nothing is asked for but what it needs."""
    async with stream(url, proxy, inputs="raw", memory="100KiB", batch_size=50, read_timeout=60) as source:
        await source.open()
        proxy.forget()
        proxy.fault = lambda path, before: "hang" if path.endswith("raw/c/0/0") else None
        unit = source._opened.survey.sizes.unit_rows // 50  # type: ignore[union-attr]
        assert unit < 10
        first = asyncio.create_task(anext(aiter(source)))
        await asyncio.to_thread(proxy.waiting.acquire)

        def chunks() -> list[str]:
            return [path for path, _ in proxy.requests if "/c/" in path]

        await until(lambda: len(chunks()) >= unit and proxy.at_once == 1)  # all but the one that hangs are answered
        assert len(chunks()) == unit
        proxy.ended.set()
        proxy.fault = lambda path, before: None
        await first


# What goes wrong on the way


@pytest.mark.parametrize("fault", ["503", "500", "429", "cut", "drop"])
async def test_what_may_pass_is_asked_for_again(fault: str, proxy: Proxy, url: str) -> None:
    async with stream(url, proxy, inputs="raw") as source:
        await source.open()
        proxy.forget()
        proxy.fault = lambda path, before: fault if "/c/" in path and before == 0 and path.endswith("3/0") else None
        assert len(await epoch(source)) == len(DATA)
        told = source.statistics().fetch
    assert told is not None
    assert told.retries == 4  # chunks 3, 13, 23, 33


async def test_an_epoch_with_five_percent_of_errors_shows_each_sample(proxy: Proxy, url: str) -> None:
    rng, lock = np.random.default_rng(1), threading.Lock()

    def fault(path: str, before: int) -> str | None:
        with lock:
            return str(rng.choice(["503", "cut", "drop"])) if rng.random() < 0.05 and before < 3 else None

    proxy.fault = fault
    for name in ("tiled", "shards"):
        async with stream(url, proxy, inputs=name, shuffle="block", retries=4) as source:
            assert sorted(await epoch(source)) == list(range(len(DATA)))


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("503", "it can't be had, 2 times: GenericError: .* 503"),
        ("drop", "it can't be had, 2 times: "),
        ("403", "it can't be had: PermissionDeniedError: "),
        ("400", "it can't be had: GenericError: .* 400"),
        ("hang", "it was not read within 2 s, 2 times"),
    ],
)
async def test_what_does_not_pass_is_said_with_array_chunk_rows_and_url(
    fault: str,
    cause: str,
    proxy: Proxy,
    url: str,
) -> None:
    proxy.fault = lambda path, before: fault if path.endswith("raw/c/7/0") else None
    place = rf"array 'raw': chunk 7\.0 \(rows \[350:400, 0:16\]\) in {url}/raw/c/7/0: "
    async with stream(url, proxy, inputs="raw", retries=1, read_timeout=2 if fault == "hang" else 30) as source:
        with pytest.raises(EnvironmentProblem, match=place + cause) as caught:
            await epoch(source)
    assert caught.value.hint
    assert source.budget.statistics().used == 0


async def test_a_chunk_that_is_not_there_is_fill_unless_its_writer_vouches(proxy: Proxy, s3: str) -> None:
    vouched = {"streamtrain": {"complete": True}}
    arrays = {"x": {"data": DATA, "chunks": (500, 16)}}
    whole = await asyncio.to_thread(made, {**arrays, "y": {**arrays["x"], "attributes": vouched}})
    far = await asyncio.to_thread(put, s3, whole)
    proxy.fault = lambda path, before: "404" if path.endswith("c/2/0") else None
    expected = DATA.copy()
    expected[1000:1500] = 0
    async with stream(far, proxy, inputs="x") as source:
        await epoch(source, expected)
    async with stream(far, proxy, inputs="y") as source:
        with pytest.raises(DataError, match=r"chunk 2\.0 .* it is missing, and its writer left no chunk out"):
            await epoch(source)


async def test_an_object_that_vanishes_or_changes_during_the_run_is_an_error(proxy: Proxy, s3: str) -> None:
    far = await asyncio.to_thread(put, s3, made({"x": {"data": DATA, "chunks": (500, 16)}}))
    async with stream(far, proxy, inputs="x", cache=0) as source:
        await epoch(source)
        proxy.fault = lambda path, before: "404" if path.endswith("c/2/0") else None
        with pytest.raises(DataError, match=r"chunk 2\.0 .* it was there, and vanished during the run"):
            await epoch(source)
    async with stream(far, s3, inputs="x", cache=0) as source:
        await epoch(source)
        await asyncio.to_thread(put, s3, made({"x": {"data": DATA + 1, "chunks": (500, 16)}}), far.rpartition("/")[2])
        with pytest.raises(DataError, match="it changed during the run"):
            await epoch(source)


@pytest.mark.parametrize("name", ["raw", "zstd", "shards"])
async def test_a_store_that_vanishes_in_its_first_epoch_is_no_fill(name: str, proxy: Proxy, url: str) -> None:
    asked: list[str] = []

    def fault(path: str, before: int) -> str | None:
        if "/c/" in path:
            asked.append(path)
        return "404" if len(asked) > 2 else None

    proxy.fault = fault
    async with stream(url, proxy, inputs=name, shuffle="block") as source:
        with pytest.raises(DataError, match=r"gone or changed: the store was moved|vanished during the run"):
            await epoch(source)


@pytest.mark.parametrize("name", ["raw", "zstd", "shards"])
async def test_an_object_cut_for_good_is_named(name: str, s3: str) -> None:
    whole = made({"x": {"data": DATA, **LAYOUTS[name]}})
    key = "x/c/1/0"
    value = whole._store_dict[key]
    whole._store_dict[key] = type(value).from_bytes(value.to_bytes()[:-7])
    far = await asyncio.to_thread(put, s3, whole)
    async with stream(far, s3, inputs="x") as source:
        with pytest.raises(DataError, match=rf"array 'x': chunk \d+\.0 \(rows .*\) in {far}/{key}: "):
            await epoch(source)


# Opening


async def test_a_store_that_is_not_there_cannot_be_reached_or_says_no_is_one_line(proxy: Proxy, url: str) -> None:
    with pytest.raises(DataError, match="no Zarr group or array there"):
        await stream(url + "/nothing", proxy).open()
    with pytest.raises(DataError, match="no Zarr group or array there"):
        await stream("s3://no-bucket/x", proxy).open()
    proxy.fault = lambda path, before: "403"
    with pytest.raises(EnvironmentProblem, match="can't be reached: PermissionDeniedError") as caught:
        await stream(url, proxy).open()
    assert len(str(caught.value).splitlines()) == 1
    proxy.fault = lambda path, before: "drop"
    with pytest.raises(EnvironmentProblem, match="can't be reached"):
        await stream(url, proxy, retries=0).open()


def test_the_environment_tells_endpoint_and_credentials(s3: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"AWS_ENDPOINT_URL": s3, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    for name, value in {**names, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    source = ZarrStream(url, inputs="raw", batch_size=32, output="numpy")
    assert len(asyncio.run(epoch(source))) == len(DATA)


@pytest.mark.parametrize(
    ("store", "keywords", "match"),
    [
        ("ftp://x/y", {}, "no store is known by ftp://"),
        ("s3://b/x", {"storage_options": {"nonsense": "1"}}, "storage_options: .*nonsense"),
        ("https://b/x", {"storage_options": {"region": "1"}}, "region is nothing that a store by HTTP takes"),
        ("data.zarr", {"storage_options": {"region": "x"}}, "storage_options= belong to a URL"),
        ("s3://b/x", {"storage_options": "region"}, "must be a mapping"),
        ("s3://b/x", {"retries": -1}, "retries must be an integer of at least 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(store: str, keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ZarrStream(store, batch_size=1, **keywords)


def test_without_obstore_a_url_is_an_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(EnvironmentProblem, match="obstore, which is not installed") as caught:
        ZarrStream("s3://bucket/x", batch_size=1)
    assert caught.value.hint == "pip install 'streamtrain[cloud]'"


async def test_http_serves_a_store_as_well(tmp_path: Any) -> None:
    from tests.data.cloud import Files

    await asyncio.to_thread(zarr.create_array, str(tmp_path / "x.zarr"), data=DATA, chunks=(20, 16), shards=(400, 16))
    files = Files(tmp_path)
    try:
        async with ZarrStream(f"{files.url}/x.zarr", batch_size=32, output="numpy") as source:
            assert len(await epoch(source)) == len(DATA)
            assert source.statistics().lanes == {"array": "obstore"}
    finally:
        files.close()


async def test_a_server_that_tells_no_versions_is_asked_anew_by_each_stream(tmp_path: Any) -> None:
    from tests.data.cloud import Files

    array = await asyncio.to_thread(zarr.create_array, str(tmp_path / "x.zarr"), data=DATA, chunks=(200, 16))
    given: dict[str, Any] = {"batch_size": 32, "output": "numpy", "memory": Budget("16MiB"), "cache": "1MiB"}
    files = Files(tmp_path)
    try:
        async with ZarrStream(f"{files.url}/x.zarr", **given) as train:
            assert len(await epoch(train)) == len(DATA)
            await asyncio.to_thread(lambda: array.set_basic_selection(slice(None), DATA + 1))
            async with ZarrStream(f"{files.url}/x.zarr", **given) as valid:
                async for batch in valid:
                    np.testing.assert_array_equal(batch.inputs, DATA[batch.index] + 1)
    finally:
        files.close()


async def test_the_only_array_of_a_bucket_is_found_and_others_are_listed(s3: str, url: str) -> None:
    far = await asyncio.to_thread(put, s3, made({"alone": {"data": DATA}}))
    async with stream(far, s3, inputs=None) as source:
        assert len(await epoch(source)) == len(DATA)
    with pytest.raises(DataError, match="holds raw, raw-shards, shards, tiled, zstd"):
        await stream(url, s3, inputs=None).open()
    with pytest.raises(DataError, match="has no array 'rew'") as caught:
        await stream(url, s3, inputs="rew").open()
    assert caught.value.hint == "did you mean 'raw'?"


# The end


@pytest.fixture
def threads() -> Iterator[None]:
    before = {thread.name for thread in threading.enumerate() if thread.name.startswith("streamtrain")}
    yield
    assert {thread.name for thread in threading.enumerate() if thread.name.startswith("streamtrain")} == before


async def test_after_aclose_nothing_is_left(threads: None, proxy: Proxy, url: str) -> None:
    tasks, before = asyncio.all_tasks(), sockets()
    async with stream(url, proxy, inputs="raw", shuffle="block") as source:
        await epoch(source)
        await anext(aiter(source))
    assert asyncio.all_tasks() == tasks
    await until(lambda: proxy.connections == 0)
    await until(lambda: sockets() <= before)
    assert source.budget.statistics().used == 0


async def test_closing_amid_requests_that_hang_waits_for_none_of_them(threads: None, proxy: Proxy, url: str) -> None:
    proxy.fault = lambda path, before: "hang" if "/c/" in path else None
    source = stream(url, proxy, inputs="raw")
    first = asyncio.create_task(anext(aiter(source)))
    await asyncio.to_thread(proxy.waiting.acquire)
    began = time.monotonic()
    first.cancel()
    await asyncio.wait([first])
    await source.aclose()
    assert time.monotonic() - began < 5
    assert source.budget.statistics().used == 0


async def test_letting_go_of_a_stream_gives_its_memory_back(proxy: Proxy, url: str) -> None:
    source = stream(url, proxy, inputs="raw", shuffle="block", batch_size=8)
    budget = source.budget
    reading = aiter(source)
    await anext(reading)
    del source, reading
    await until(lambda: budget.statistics().used == 0)


def test_zarrs_own_api_reads_the_same(s3: str, url: str) -> None:
    source = stream(url, s3, inputs="tiled", io="store")
    assert len(asyncio.run(epoch(source))) == len(DATA)
    assert source.statistics().lanes == {"tiled": f"{ZarrReader.lane} (io='store')"}
