"""What gathering whole units promises: the batches of chunk by chunk, and no change of a file goes unseen."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import TransposeCodec

from data_tools.synth import synth
from streamtrain.data import regions
from streamtrain.data.batch import Batch
from streamtrain.data.files import StoreFiles
from streamtrain.data.readers import LocalReader
from streamtrain.data.regions import Region
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import DataError, EnvironmentProblem
from tests.data.stores import layout_of

ROWS, CHUNK = 203, 8
X = np.random.default_rng(0).integers(0, 1 << 30, (ROWS, 64, 2)).astype("i8")
"""Chunks of two pages, the last of which is not full."""
Y = np.arange(ROWS * 512, dtype="f4").reshape(ROWS, 512) / 7


def write(path: Path) -> Path:
    """Two arrays chunked alike, without compression."""
    group = zarr.create_group(path)
    for name, values in {"x": X, "y": Y}.items():
        group.create_array(name, data=values, chunks=(CHUNK, *values.shape[1:]), compressors=None)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("stores") / "data.zarr")


class Read:
    """How many chunks were read one by one."""

    def __init__(self) -> None:
        self.chunks = 0


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    counted, reads = Read(), LocalReader.read

    def noted(self: LocalReader, *given: Any, **named: Any) -> Any:
        counted.chunks += 1
        return reads(self, *given, **named)

    monkeypatch.setattr(LocalReader, "read", noted)
    return counted


def stream(path: Path, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 10, "shuffle": "block", "output": "numpy"}
    return ZarrStream(path, **{**given, "shuffle_blocks": 4, "memory": "16MiB", **keywords})


async def listed(source: ZarrStream) -> list[Batch]:
    return [batch async for batch in source]


def right(batches: list[Batch]) -> None:
    for batch in batches:
        np.testing.assert_array_equal(batch.inputs, X[batch.index])
        np.testing.assert_array_equal(batch.targets, Y[batch.index])


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    """What says which of 203 samples come, and in what batches and order."""
    given: dict[str, Any] = {
        "shuffle": draw(st.sampled_from([False, "block", "global"])),
        "batch_size": draw(st.integers(1, 90)),
        "drop_last": draw(st.booleans()),
        "split": draw(st.sampled_from([None, (0.0, 0.7), (13, 150), (60, 160)])),
        "split_by": draw(st.sampled_from(["range", "chunk", "sample"])),
        "seed": draw(st.integers(0, 3)),
    }
    blocks = draw(st.integers(1, 30))
    return given | ({"shuffle_blocks": blocks} if given["shuffle"] == "block" else {})


async def go_alike(
    source: ZarrStream, plain: ZarrStream, right: Callable[[list[Batch]], None], *, epochs: int, left_at: int
) -> None:
    """Two streams give the same right batches, for so many epochs and from where the first is left in the next."""

    async def alike() -> None:
        ours, theirs = await listed(source), await listed(plain)
        right(ours)
        assert [batch.index.tolist() for batch in ours] == [batch.index.tolist() for batch in theirs]

    async with source, plain:
        for _ in range(epochs):
            await alike()
        taken = 0
        async for _ in source:
            taken += 1
            if taken > left_at:
                break
        place = source.state_dict()
        for each in (source, plain):
            each.load_state_dict(place)
        await alike()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(orders(), st.integers(0, 20))
def test_gathered_batches_are_those_of_chunk_by_chunk(store: Path, order: dict[str, Any], left_at: int) -> None:
    source, plain = stream(store, **order), stream(store, io="pread", **order)
    asyncio.run(go_alike(source, plain, right, epochs=3, left_at=left_at))


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
async def test_after_an_epoch_no_chunk_is_read_by_itself_and_counts_go_on(
    store: Path, read: Read, shuffle: Any
) -> None:
    async with stream(store, shuffle=shuffle) as source:
        await listed(source)
        before, told = read.chunks, source.statistics()
        right(await listed(source))
        assert read.chunks == before
        assert (source.statistics().chunks, source.statistics().bytes_read) == (told.chunks, told.bytes_read)


@pytest.mark.parametrize("keywords", [{"dtype": "float64"}, {"io": "pread"}, {"verify": "always"}, {"inputs": ["x"]}])
async def test_what_is_changed_on_the_way_or_asked_for_otherwise_is_right_too(
    store: Path, keywords: dict[str, Any]
) -> None:
    async with stream(store, targets="y", **keywords) as source:
        for _ in range(2):
            for batch in await listed(source):
                inputs = batch.inputs["x"] if isinstance(batch.inputs, dict) else batch.inputs
                np.testing.assert_array_equal(inputs, X[batch.index])
                np.testing.assert_array_equal(batch.targets, Y[batch.index])


@pytest.mark.parametrize("harm", [lambda chunk: os.utime(chunk, ns=(0, 0)), os.unlink])
async def test_a_file_that_changes_or_goes_between_two_epochs_is_an_error(tmp_path: Path, harm: Any) -> None:
    path = write(tmp_path / "x.zarr")
    async with stream(path) as source:
        await listed(source)
        harm(path / "x/c/3/0/0")
        with pytest.raises(DataError, match=r"chunk 3\.0\.0"):
            await listed(source)


async def test_an_absent_chunk_is_filled_in_each_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zarr")
    (path / "y/c/2/0").unlink()
    async with stream(path) as source:
        for _ in range(2):
            for batch in await listed(source):
                gone = (batch.index >= 2 * CHUNK) & (batch.index < 3 * CHUNK)
                np.testing.assert_array_equal(batch.targets, np.where(gone[:, None], 0, Y[batch.index]))


async def test_each_chunk_is_counted_once_where_one_of_another_array_is_absent(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zarr")
    (path / "y/c/2/0").unlink()
    async with stream(path) as source, stream(path, io="pread") as plain:
        for _ in range(2):
            await listed(source)
            await listed(plain)
            assert source.statistics().chunks == plain.statistics().chunks


@pytest.mark.parametrize("lanes", [None, 3])
@pytest.mark.parametrize("size", [10, 33, 700])
async def test_batches_with_padding_between_them_and_lanes_are_right(
    tmp_path: Path, read: Read, size: int, lanes: int | None
) -> None:
    rows = np.random.default_rng(1).integers(0, 1 << 30, (3000, 9))
    kept: dict[str, Any] = {"chunks": (512, 9), "compressors": None}
    zarr.create_group(tmp_path / "x.zarr").create_array("x", data=rows, **kept)
    given: dict[str, Any] = {"inputs": "x", "targets": None, "batch_size": size, "shuffle_blocks": 2, "lanes": lanes}
    async with (
        stream(tmp_path / "x.zarr", **given) as source,
        stream(tmp_path / "x.zarr", io="pread", **given) as plain,
    ):
        for epoch in range(3):
            before = read.chunks
            ours = await listed(source)
            assert epoch == 0 or read.chunks == before
            theirs = await listed(plain)
            assert [batch.index.tolist() for batch in ours] == [batch.index.tolist() for batch in theirs]
            for batch in ours:
                np.testing.assert_array_equal(batch.inputs, rows[batch.index])


async def test_a_look_at_files_that_hangs_is_named(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file system that does not answer, as a dead server's, holds who looks; here a pipe does that has no writer."""
    pipe, there = tmp_path / "pipe", os.stat
    os.mkfifo(pipe)
    async with stream(store, read_timeout=1.0) as source:
        await listed(source)

        def look(path: Any, **named: Any) -> os.stat_result:
            if str(path).startswith(str(store)):
                os.close(os.open(pipe, os.O_RDONLY))
            return there(path, **named)

        monkeypatch.setattr(os, "stat", look)
        with pytest.raises(EnvironmentProblem, match=r"was not read within 1 s"):
            await listed(source)
        monkeypatch.undo()
        for _ in range(20):  # let them go: each that waits has opened its end
            try:
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                break


async def test_what_a_manifest_vouches_for_is_checked_before_it_is_gathered(tmp_path: Path, read: Read) -> None:
    path = synth(tmp_path / "s.zarr", rows=1000, columns=512, chunk_rows=50, codec="raw")
    chunk = path / "x/c/7/0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    for verify, fails in {"once": True, "never": False}.items():
        async with stream(path, inputs="x", targets=None, verify=verify) as source:
            if fails:
                with pytest.raises(DataError, match="checksum"):
                    await listed(source)
            else:
                await listed(source)
                before = read.chunks
                await listed(source)
                assert read.chunks == before


async def test_small_files_take_no_descriptors_and_their_memory_is_let_go_of(store: Path) -> None:
    process = psutil.Process()
    before = process.num_fds()
    source = stream(store)
    kept = await listed(source)
    mine = [each for each in process.memory_maps(grouped=False) if str(store) in each.path]
    assert len({each.path for each in mine}) == 2 * -(-ROWS // CHUNK)
    open_fds = process.num_fds()
    await source.aclose()
    del source
    gc.collect()
    right(kept)
    assert not [each for each in process.memory_maps(grouped=False) if str(store) in each.path]
    assert open_fds - before < ROWS // CHUNK


async def test_what_the_kernel_allows_is_one_account_for_all_streams_and_comes_back(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = -(-ROWS // CHUNK)
    monkeypatch.setattr(regions, "most_maps", lambda: 2 * files)
    monkeypatch.setattr(regions, "_ACCOUNT", regions._Account())

    def mapped() -> int:
        maps = psutil.Process().memory_maps(grouped=False)
        return len({each.path for each in maps if str(store) in each.path})

    first, second = stream(store), stream(store)
    for _ in range(2):
        right(await listed(first))
        right(await listed(second))
    assert mapped() == 2 * files
    assert regions.region_for(1, mmap.PAGESIZE) is None
    for each in (first, second):
        await each.aclose()
    del first, second, each
    gc.collect()
    assert regions.region_for(2 * files, mmap.PAGESIZE) is not None


def test_a_region_refuses_what_it_has_no_room_for_and_tells_why() -> None:
    with pytest.raises(OSError, match="memory"):
        Region(1 << 40, 1 << 20)
    region = Region(2, mmap.PAGESIZE)
    with pytest.raises(OSError, match="descriptor"):
        region.place(0, -1)


def test_a_system_that_does_not_say_how_many_maps_it_allows_gets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "MAPS", str(tmp_path / "none"))
    assert regions.most_maps.__wrapped__() == 0


@pytest.mark.parametrize(
    ("shape", "chunks", "more", "fits"),
    [
        ((64, 512), (8, 512), {"dtype": "f4"}, True),
        ((64, 512), (8, 256), {"dtype": "f4"}, False),
        ((64, 500), (8, 500), {"dtype": "f4"}, False),
        ((64, 512), (64, 512), {"dtype": "f4"}, False),
        ((64, 512), (8, 512), {"dtype": "f4", "shards": (16, 512)}, False),
        ((64, 512), (8, 512), {"dtype": "f4", "compressors": "auto"}, False),
        ((512, 64), (512, 8), {"dtype": "f4", "filters": [TransposeCodec(order=(1, 0))]}, False),
    ],
)
def test_side_by_side_lie_small_files_of_whole_rows_that_fill_pages(
    tmp_path: Path, shape: Any, chunks: Any, more: dict[str, Any], fits: bool
) -> None:
    given: dict[str, Any] = {"compressors": None, **more}
    zarr.create_group(tmp_path).create_array("x", shape=shape, chunks=chunks, **given)
    assert (StoreFiles(tmp_path).region(layout_of(tmp_path)) is not None) == fits
