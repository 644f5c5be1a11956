"""What opening promises: whatever a store's metadata say, it gives arrays that can be read, or tells what is wrong."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import resource
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, TransposeCodec, ZstdCodec

from streamtrain.data.block import Pool
from streamtrain.data.feed import Feed
from streamtrain.data.files import Map, StoreFiles
from streamtrain.data.opening import locate
from streamtrain.data.passes import ZarrPass
from streamtrain.data.readers import LocalReader
from streamtrain.data.stream import ZarrStream
from streamtrain.data.zarr_lane import ZarrLoop, ZarrReader
from streamtrain.errors import ConfigError, DataError, EnvironmentProblem

ARRAYS: dict[str, dict[str, Any]] = {
    "plain": {"chunks": (3, 4), "dtype": "f4"},
    "sharded": {
        "chunks": (2, 4),
        "shards": (4, 4),
        "dtype": "i4",
        "compressors": [ZstdCodec(), Crc32cCodec()],
        "filters": [TransposeCodec(order=(1, 0))],
    },
    "old": {"chunks": (3, 4), "dtype": ">i2", "zarr_format": 2},
}
SCALARS = st.sampled_from(
    [None, True, 0, -1, 3, 2.5, 1e308, 10**30, "", "x", "float32", "int8", "NaN", "bytes", "../.."]
)
VALUES = SCALARS | st.lists(st.sampled_from([-5, 0, 1, 3, 10**12, "x", None]), max_size=3) | st.just({"name": "x"})
REMOVED = object()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for name, options in ARRAYS.items():
        array = zarr.create_array(str(folder / name), name="x", shape=(10, 4), **options)
        array[...] = np.arange(40).reshape(10, 4)
    return folder


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values in a tree of JSON."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: object) -> Any:
    node = tree
    for key in path[:-1]:
        node = node[key]
    if value is REMOVED:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree


async def count(store: Path) -> int:
    async with ZarrStream(store, inputs="x", batch_size=4, memory="16MiB", output="numpy", read_timeout=30) as stream:
        return sum([len(batch) async for batch in stream])


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(ARRAYS)), st.data())
def test_metadata_that_lie_give_samples_or_an_error_of_one_line(
    stores: Path, tmp_path: Path, name: str, data: st.DataObject
) -> None:
    shutil.copytree(stores / name, tmp_path / "s", dirs_exist_ok=True)
    file = tmp_path / "s" / "x" / (".zarray" if name == "old" else "zarr.json")
    tree = json.loads(file.read_text())
    path = data.draw(st.sampled_from(list(places(tree))), label="place")
    file.write_text(json.dumps(replaced(tree, path, data.draw(VALUES | st.just(REMOVED), label="value"))))
    try:
        found = asyncio.run(count(tmp_path / "s"))
    except (DataError, ConfigError) as error:
        text = str(error)
    else:
        text = f"{found} samples"
        assert found > 0
    assert len(text.splitlines()) == 1
    shutil.rmtree(tmp_path / "s")


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(ARRAYS)), st.binary(max_size=40), st.integers(0, 2000), st.booleans())
def test_metadata_of_any_bytes_give_samples_or_an_error_with_the_file(
    stores: Path, tmp_path: Path, name: str, noise: bytes, at: int, cut: bool
) -> None:
    shutil.copytree(stores / name, tmp_path / "s", dirs_exist_ok=True)
    file = tmp_path / "s" / "x" / (".zarray" if name == "old" else "zarr.json")
    text = file.read_bytes()
    at %= len(text)
    file.write_bytes(text[:at] + noise + (b"" if cut else text[at + len(noise) :]))
    try:
        found = asyncio.run(count(tmp_path / "s"))
    except (DataError, ConfigError) as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        assert "x" in str(error)  # noqa: PT017
    else:
        assert found > 0
    shutil.rmtree(tmp_path / "s")


@pytest.mark.parametrize("rows", [20, 100])
async def test_small_files_are_read_by_pread_where_they_are_more_than_maps_can_be_kept(
    rows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    zarr.create_array(str(tmp_path), name="x", shape=(rows, 2), chunks=(1, 2), dtype="f4", compressors=None)[...] = 1
    caplog.set_level(logging.INFO, "streamtrain")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (300, 300))  # a real one could be below what is open already
    for io in ("auto", "mmap"):
        async with ZarrStream(str(tmp_path), inputs="x", batch_size=8, output="numpy", io=io) as source:
            assert sum([len(batch) async for batch in source]) == rows
            assert source.statistics().lanes["x"] == ("pread" if (rows, io) == (100, "auto") else "mmap")
    said = [record.getMessage() for record in caplog.records if "by pread" in record.getMessage()]
    assert len(said) == (rows == 100)
    assert all("array x has 100 files, and 22 maps can be kept" in text for text in said)


def held() -> Counter[str]:
    """What lives of all that has threads, descriptors, maps or buffers to give back."""
    kinds = (ZarrStream, ZarrPass, Feed, Pool, StoreFiles, Map, LocalReader, ZarrReader, ZarrLoop)
    return Counter(type(each).__name__ for each in gc.get_objects() if issubclass(type(each), kinds))


@pytest.mark.parametrize("io", ["auto", "store"])
@pytest.mark.parametrize("name", sorted(ARRAYS))
@pytest.mark.parametrize("closed", [True, False])
def test_a_stream_leaves_nothing_to_the_garbage_collector(name: str, io: Any, closed: bool, stores: Path) -> None:
    """A cycle would keep a private thread and its loop until whenever the next collection is."""

    async def three_batches() -> None:
        source = ZarrStream(str(stores / name), inputs="x", batch_size=2, shuffle="block", output="numpy", io=io)
        passing = aiter(source)
        for _ in range(3):
            await anext(passing)
        if closed:
            await source.aclose()

    gc.collect()
    before = held()
    gc.disable()
    try:
        asyncio.run(three_batches())
        for thread in threading.enumerate():  # one may still have a job in hand
            if thread.name.startswith("streamtrain-"):
                thread.join(5)
        assert held() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["../x/y", "./x", "x/..", "x\0"])
@pytest.mark.parametrize("role", ["inputs", "targets", "indices"])
async def test_a_name_that_leads_out_of_the_store_is_no_damage(tmp_path: Path, name: str, role: str) -> None:
    zarr.create_group(tmp_path / "s").create_array("x", data=np.arange(6))
    given: dict[str, Any] = {"inputs": "x", "batch_size": 2, role: name}
    with pytest.raises(DataError, match=r"has no array .*, without '\.' and '\.\.'") as caught:
        await ZarrStream(tmp_path / "s", **given).open()
    assert "restore" not in caught.value.hint


def test_where_one_store_is_meant_it_is_said_who_takes_several() -> None:
    with pytest.raises(ConfigError, match="one store is meant here, not a list of 2") as told:
        locate(["a.zarr", "b.zarr"])
    assert "ZarrStream alone takes several" in told.value.hint


@pytest.mark.parametrize("damaged", [".zattrs", ".zarray"])
async def test_damaged_metadata_beside_a_copy_of_them_are_named(damaged: str, tmp_path: Path) -> None:
    zarr.create_group(tmp_path, zarr_format=2).create_array("x", data=np.arange(8))
    zarr.consolidate_metadata(str(tmp_path))
    (tmp_path / "x" / damaged).write_text('{"a": 1,}')
    with pytest.raises(DataError, match=r"/x.*(Expecting property name|Illegal trailing comma)"):
        await ZarrStream(tmp_path, inputs="x", batch_size=2).open()


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), OSError(errno.EMFILE, "Too many open files")], ids=str
)
async def test_a_process_at_its_limits_says_so_and_nothing_of_the_data(
    error: Exception, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr("streamtrain.data.opening.zarr_api.open", refuse)
    with pytest.raises(EnvironmentProblem, match=f"can't be opened: {type(error).__name__}: ") as caught:
        await ZarrStream(stores / "old", batch_size=2).open()
    assert "ulimit" in caught.value.hint
