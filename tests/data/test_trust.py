"""What a manifest gives a stream: no damage of any file goes unseen, on any lane; and a good chunk is checked once."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from data_tools.convert import Layout, convert
from streamtrain import ZarrStream
from streamtrain.data.manifest import PLACE
from streamtrain.data.vouching import vouch
from streamtrain.errors import DataError
from tests.data.stores import CASES, Case, write

Damage = Callable[[Path, Path], None]
DATA = np.arange(32 * 4, dtype="float32").reshape(32, 4)
LAYOUTS = {
    "raw": Layout(chunks=(4, 4), codec="raw"),
    "zstd": Layout(chunks=(4, 4), codec="zstd"),
    "shards of raw": Layout(chunks=(4, 4), shards=(8, 4), codec="raw"),
    "shards of blosc": Layout(chunks=(4, 4), shards=(8, 4), codec="blosc"),
}


def store(folder: Path, layout: Layout = LAYOUTS["raw"]) -> Path:
    np.save(folder / "x.npy", DATA)
    return convert(folder / "x.npy", folder / "x.zarr", layout=layout)


def stream(path: Path, **options: Any) -> ZarrStream:
    return ZarrStream(path, **{"batch_size": 4, "output": "numpy", "memory": "8MiB", **options})


async def read(path: Path, **options: Any) -> Any:
    async with stream(path, **options) as source:
        return np.concatenate([batch.inputs async for batch in source])


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 4
    path.write_bytes(content)


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def grow(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def lose(path: Path, other: Path) -> None:
    path.unlink()


def replace(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def swap(path: Path, other: Path) -> None:
    os.rename(path, path.with_suffix(".tmp"))
    os.rename(other, path)
    os.rename(path.with_suffix(".tmp"), other)


@pytest.mark.parametrize("io", ["mmap", "pread", "store"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", [flip, cut, grow, lose, replace, swap], ids=lambda damage: damage.__name__)
async def test_every_damage_is_an_error_that_names_it(damage: Damage, layout: str, io: str, tmp_path: Path) -> None:
    path = store(tmp_path, LAYOUTS[layout])
    assert np.array_equal(await read(path, io=io), DATA)
    damage(path / "c/2/0", path / "c/1/0")
    with pytest.raises(
        DataError, match=r"array 'array': chunk \d\.0 \(rows \[\d+:\d+, 0:4\]\) in .*/c/[12]/0: .*\bits?\b"
    ):
        await read(path, io=io)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_every_layout_reads_the_same_with_a_manifest(case: Case, tmp_path: Path) -> None:
    data = write(case, tmp_path)
    if not data.ndim:
        return
    vouch(tmp_path)
    for io in ("auto", "pread", "store"):
        assert np.array_equal(await read(tmp_path, inputs="x", io=io, verify="always"), data)


async def test_absent_chunks_are_fill_where_the_manifest_says_so(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path), name="x", shape=(8,), chunks=(2,), dtype="int32", fill_value=9)
    array[2:6] = 7
    vouch(tmp_path)
    expected = [9, 9, 7, 7, 7, 7, 9, 9]
    assert (await read(tmp_path, inputs="x")).tolist() == expected
    (tmp_path / "x/c/2").rename(tmp_path / "x/c/3")
    for io in ("auto", "store"):
        with pytest.raises(DataError, match=r"chunk [23] .*: it(s manifest says that it was never| is missing)"):
            await read(tmp_path, inputs="x", io=io)


@given(data=st.data())
async def test_a_flipped_bit_anywhere_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("t")
    path = store(folder, LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))])
    file = data.draw(st.sampled_from(sorted(file for file in path.glob("c/*/0"))))
    content = bytearray(file.read_bytes())
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[at] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(DataError, match="chunk"):
        await read(path, io=data.draw(st.sampled_from(["mmap", "pread", "store"])))


async def test_a_chunk_is_checked_once_a_stream_or_always_or_never(tmp_path: Path) -> None:
    path = store(tmp_path)
    for verify, expected in [("once", [8, 0]), ("always", [8, 8]), ("never", [0, 0])]:
        async with stream(path, verify=verify, shuffle="block") as source:
            counts = []
            for _ in range(2):
                assert sum([len(batch) async for batch in source]) == 32
                counts.append(source.statistics().chunks_checked)
            assert counts == expected


def flip_own_checksum(path: Path) -> None:
    """Of the chunk that is the file, unseen by its date."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


async def test_a_manifest_that_vouches_for_damage_hides_it_from_no_pass(tmp_path: Path) -> None:
    path = store(tmp_path, Layout(chunks=(4, 4), codec="blosc"))
    flip_own_checksum(path / "c/2/0")
    vouch(path)
    async with stream(path, cache=0) as source:
        for _ in range(2):
            with pytest.raises(DataError, match=r"chunk 2\.0 .*checksum \(crc32c\) does not match"):
                [batch async for batch in source]
    async with stream(path, on_bad_chunk="skip", max_skipped=0.5, cache=0) as source:
        for _ in range(2):
            assert sum([len(batch) async for batch in source]) == 28


@pytest.mark.parametrize("verify", ["once", "always", "never"])
async def test_a_chunks_own_checksum_is_left_alone_once_a_manifest_has_vouched_for_it(
    verify: Any, tmp_path: Path
) -> None:
    path = store(tmp_path, Layout(chunks=(4, 4), codec="blosc"))
    async with stream(path, verify=verify, cache=0) as source:
        assert np.array_equal(np.concatenate([batch.inputs async for batch in source]), DATA)
        flip_own_checksum(path / "c/2/0")
        if verify == "once":
            assert np.array_equal(np.concatenate([batch.inputs async for batch in source]), DATA)
            return
        with pytest.raises(DataError, match=r"chunk 2\.0 .*checksum"):
            [batch async for batch in source]


@pytest.mark.parametrize("verify", ["once", "always"])
async def test_what_was_decoded_unchecked_is_kept_for_those_alone_who_ask_for_no_check(
    verify: Any, tmp_path: Path
) -> None:
    path = store(tmp_path, LAYOUTS["zstd"])
    given: dict[str, Any] = {"cache": 0, "disk_cache": tmp_path / "kept", "disk_cache_bytes": "4MiB"}
    replace(path / "c/2/0", path / "c/1/0")
    for _ in range(2):
        assert len(await read(path, verify="never", **given)) == 32
        with pytest.raises(DataError, match=r"chunk 2\.0 .*manifest says"):
            await read(path, verify=verify, **given)


async def test_what_no_manifest_vouched_for_is_decoded_anew_once_there_is_one(tmp_path: Path) -> None:
    path = store(tmp_path, LAYOUTS["zstd"])
    given: dict[str, Any] = {"cache": 0, "disk_cache": tmp_path / "kept", "disk_cache_bytes": "4MiB"}
    replace(path / "c/2/0", path / "c/1/0")
    (path / PLACE).rename(tmp_path / "manifest")
    assert len(await read(path, **given)) == 32
    (tmp_path / "manifest").rename(path / PLACE)
    with pytest.raises(DataError, match=r"chunk 2\.0 .*manifest says"):
        await read(path, **given)


async def test_parts_of_a_chunk_are_checked_as_a_whole(tmp_path: Path) -> None:
    path = store(tmp_path, Layout(chunks=(16, 4), codec="raw"))
    flip(path / "c/1/0", path)
    for io in ("mmap", "pread"):
        assert len(await read(path, io=io, split=(0, 16))) == 16
        with pytest.raises(DataError, match="checksum"):
            await read(path, io=io, split=(20, 24))
    assert len(await read(path, verify="never")) == 32


@pytest.mark.parametrize("damage", [flip, cut, lose], ids=lambda damage: damage.__name__)
async def test_a_damaged_manifest_is_an_error_and_a_lost_one_is_said(
    damage: Damage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store(tmp_path)
    damage(path / PLACE, path)
    if damage is lose:
        with caplog.at_level(logging.WARNING, "streamtrain"):
            assert len(await read(path)) == 32
        assert "its manifest is gone" in caplog.text
        return
    with pytest.raises(DataError, match=r"the manifest .* is damaged"):
        await read(path)
    assert len(await read(path, verify="never")) == 32


async def test_an_array_that_was_written_anew_does_not_fit_its_old_manifest(tmp_path: Path) -> None:
    path = store(tmp_path)
    zarr.open_array(str(path), mode="r+").resize((40, 4))
    with pytest.raises(DataError, match="was written for other metadata"):
        await read(path)


@pytest.mark.parametrize("compressors", [None, "auto"])
@pytest.mark.parametrize("io", ["auto", "pread", "store"])
@pytest.mark.parametrize("harm", ["moved", "removed", "replaced"])
async def test_a_store_that_vanishes_in_its_first_epoch_is_no_fill(
    tmp_path: Path, harm: str, io: Any, compressors: Any
) -> None:
    path = tmp_path / "x.zarr"

    def make(rows: int) -> None:
        zarr.create_array(path, shape=(rows, 8), dtype="f4", chunks=(50, 8), compressors=compressors)[:50] = 1

    make(4000)
    given: dict[str, Any] = {"shuffle": "block", "shuffle_blocks": 2, "memory": "200KiB", "cache": 0, "io": io}
    async with ZarrStream(path, batch_size=50, output="numpy", **given) as stream:
        passing = aiter(stream)
        for _ in range(3):
            await anext(passing)
        if harm == "moved":
            path.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(path)
        if harm == "replaced":
            make(400)
        with pytest.raises(DataError, match=r"the metadata of (its )?array.*moved, removed or replaced during the run"):
            async for _ in passing:
                pass


@pytest.mark.parametrize("compressors", [None, "auto"])
@pytest.mark.parametrize("io", ["auto", "pread", "store"])
@pytest.mark.parametrize("harm", ["rewritten", "another dtype", "other rows"])
async def test_of_a_store_that_changes_in_its_first_epoch_nothing_new_is_served(
    tmp_path: Path, harm: str, io: Any, compressors: Any
) -> None:
    path, data = tmp_path / "x.zarr", np.arange(4000 * 8, dtype="i4").reshape(4000, 8)
    zarr.create_array(path, data=data, chunks=(50, 8), compressors=compressors)
    given: dict[str, Any] = {"memory": "200KiB", "cache": 0, "prefetch": 1, "threads": 1, "io": io}
    async with ZarrStream(path, batch_size=50, output="numpy", **given) as stream:
        passing = aiter(stream)
        for _ in range(3):
            await anext(passing)
        _wait_for_a_tick(tmp_path / "clock")
        if harm == "rewritten":
            zarr.open_array(str(path), mode="r+")[2000:] = -1
        else:
            shutil.rmtree(path)
            new = data.astype("f4") if harm == "another dtype" else data.reshape(2000, 16)
            zarr.create_array(path, data=new, chunks=(50, 8), compressors=compressors)
        with pytest.raises(DataError, match=r"it was (written|there, and vanished)|its array (have changed|are gone)"):
            await _all_as_before(passing, data)


async def _all_as_before(passing: Any, data: Any) -> None:
    async for batch in passing:
        assert np.array_equal(batch.inputs, data[batch.index])


def _wait_for_a_tick(probe: Path) -> None:
    """Until files are dated later than now: the kernel's clock for them goes by steps of some ms."""
    now = time.time_ns()
    probe.touch()
    while probe.stat().st_mtime_ns <= now:
        probe.touch()


async def test_attributes_may_change_and_chunks_may_be_left_out_all_the_while(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "x.zarr", shape=(4000, 8), dtype="f4", chunks=(50, 8), fill_value=7)
    given: dict[str, Any] = {"memory": "200KiB", "cache": 0, "batch_size": 50, "output": "numpy"}
    async with ZarrStream(tmp_path / "x.zarr", **given) as stream:
        seen = 0
        async for batch in stream:
            array.attrs["mean"] = seen
            assert (batch.inputs == 7).all()
            seen += len(batch)
    assert seen == 4000
