"""What readers promise: zarr's own numbers by every lane, and nothing but regular, unchanged files of the store."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import mmap
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.api import asynchronous as zarr_api
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

from streamtrain.data import described, readers
from streamtrain.data.files import StoreFiles, is_local, populate, read_into
from streamtrain.data.layout import ABSENT, ArrayLayout, parse_array, parse_shard_index
from streamtrain.data.readers import LocalReader
from streamtrain.data.reading import Scratch, anonymous, chunk_error
from streamtrain.data.seen import Seen
from streamtrain.data.zarr_codecs import within_bounds
from streamtrain.data.zarr_lane import ZarrLoop, ZarrReader
from streamtrain.errors import DataError, EnvironmentProblem
from tests.data.stores import CASES, FAST, Case, chunks_of, layout_of, part, within, write
from tests.data.test_layout import index_bytes

VOUCHED: dict[str, Any] = {"streamtrain": {"complete": True}}
LANES = ("mmap", "pread")
lanes = pytest.mark.parametrize("lane", LANES)


def settle(folder: Path) -> None:
    """Date all files an hour back, as those of a store that nobody writes."""
    for path in folder.rglob("*"):
        if path.is_file():
            _date(path, 1_700_000_000_000_000_000)


def _date(path: Path, ns: int) -> None:
    os.utime(path, ns=(ns, ns))


def reader(folder: Path, lane: str = "pread", files: StoreFiles | None = None) -> LocalReader:
    return LocalReader(layout_of(folder), files or StoreFiles(folder), mapped=lane == "mmap")


def rows(layout: ArrayLayout) -> tuple[int, int]:
    return (0, layout.chunk_shape[0]) if layout.ndim else (0, 1)


def read(lane: LocalReader | ZarrReader, chunk: tuple[int, ...], scratch: Scratch | None = None) -> Any:
    return lane.read(chunk, rows(lane.layout), scratch or Scratch())


def raw(folder: Path, *, shape: tuple[int, ...] = (8, 3), **options: Any) -> NDArray[Any]:
    """A small uncompressed array `x` of int32 in chunks of 2 rows."""
    case = Case("raw", {"chunks": (2, *shape[1:]), "compressors": None, **options}, shape)
    data = write(case, folder)
    settle(folder)
    return data


def sharded(folder: Path, **sharding: Any) -> NDArray[Any]:
    data = write(Case("sharded", {"chunks": (4, 3)}, (8, 3), sharding={"chunk_shape": (2, 3), **sharding}), folder)
    settle(folder)
    return data


@pytest.fixture
def loop() -> Iterator[ZarrLoop]:
    private = ZarrLoop()
    yield private
    private.close()


def zarr_reader(folder: Path, loop: ZarrLoop, timeout: float = 30.0, *, files: StoreFiles | None = None) -> ZarrReader:
    array = within_bounds(loop.run(zarr_api.open_array(store=str(folder), path="x", mode="r"), 30))
    layout = parse_array(array.path, array.metadata.to_dict(), array.dtype, array.metadata.fill_value)
    return ZarrReader(layout, array, loop, timeout=timeout, files=files or StoreFiles(folder))


# The same numbers


@lanes
@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_fast_lanes_read_what_zarr_reads(case: Case, lane: str, tmp_path: Path) -> None:
    data = write(case, tmp_path)
    settle(tmp_path)
    fast, scratch = reader(tmp_path, lane), Scratch()
    mapped = fast.layout.raw or fast.layout.shard_shape is not None
    assert fast.lane == ("mmap" if lane == "mmap" and mapped else "pread")
    assert np.array_equal(zarr.open_array(str(tmp_path), path="x", mode="r")[...], data)
    for chunk in chunks_of(fast.layout):
        found = read(fast, chunk, scratch)
        assert found.shape == fast.layout.chunk_shape
        assert np.array_equal(found[within(fast.layout, chunk)], data[part(fast.layout, chunk)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_zarrs_lane_reads_all_there_is(case: Case, loop: ZarrLoop, tmp_path: Path) -> None:
    data = write(case, tmp_path)
    lane = zarr_reader(tmp_path, loop)
    assert lane.lane == "zarr"
    for chunk in chunks_of(lane.layout):
        assert np.array_equal(read(lane, chunk)[within(lane.layout, chunk)], data[part(lane.layout, chunk)])


@lanes
def test_only_the_rows_that_are_asked_for_must_be_right(lane: str, tmp_path: Path) -> None:
    data = raw(tmp_path, shape=(8, 3), chunks=(8, 3))
    found = reader(tmp_path, lane).read((0, 0), (2, 5), Scratch())
    assert found is not None
    assert np.array_equal(found[2:5], data[2:5])


def test_a_pread_fetches_only_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    data, scratch = raw(tmp_path, shape=(8, 3), chunks=(8, 3)), Scratch()
    scratch.take("encoded", data.nbytes)[:] = 0xA5
    found = reader(tmp_path).read((0, 0), (2, 5), scratch)
    assert found is not None
    assert np.array_equal(found[2:5], data[2:5])
    assert {*found[:2].tobytes(), *found[5:].tobytes()} == {0xA5}


def test_rows_of_a_checked_chunk_are_read_whole(tmp_path: Path) -> None:
    data = raw(tmp_path, shape=(8, 3), chunks=(8, 3), compressors=Crc32cCodec())
    found = reader(tmp_path).read((0, 0), (2, 5), Scratch())
    assert found is not None
    assert np.array_equal(found, data)


@lanes
def test_an_absent_chunk_is_none(lane: str, tmp_path: Path) -> None:
    raw(tmp_path)
    (tmp_path / "x/c/2/0").unlink()
    assert read(reader(tmp_path, lane), (2, 0)) is None
    assert read(reader(tmp_path, lane), (3, 0)) is not None


@lanes
def test_an_absent_chunk_within_a_shard_is_none(lane: str, tmp_path: Path) -> None:
    array = zarr.create_array(
        str(tmp_path), name="x", shape=(4, 3), chunks=(2, 3), shards=(4, 3), dtype="i4", compressors=None
    )
    array[:2] = 7
    settle(tmp_path)
    assert read(reader(tmp_path, lane), (0, 0)).tolist() == [[7, 7, 7]] * 2
    assert read(reader(tmp_path, lane), (1, 0)) is None


# What can't be trusted


@lanes
@pytest.mark.parametrize("sharding", [False, True])
def test_where_the_writer_vouches_for_every_chunk_an_absent_one_is_damage(
    lane: str, sharding: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"shards": (4, 3)} if sharding else {}
    zarr.create_array(
        str(tmp_path),
        name="x",
        shape=(8, 3),
        chunks=(2, 3),
        dtype="i4",
        compressors=None,
        attributes=dict(VOUCHED),
        **options,
    )[:2] = 1
    with pytest.raises(DataError, match=r"chunk 3.0 \(rows \[6:8, 0:3\]\) in .*: it is missing, and its writer"):
        read(reader(tmp_path, lane), (3, 0))


def test_zarrs_lane_takes_no_missing_file_for_fill_where_its_writer_vouches(loop: ZarrLoop, tmp_path: Path) -> None:
    array = zarr.create_array(
        str(tmp_path), name="x", shape=(8, 3), chunks=(2, 3), dtype="i4", attributes=dict(VOUCHED)
    )
    array[:2] = 1
    assert read(zarr_reader(tmp_path, loop), (0, 0)).tolist() == [[1, 1, 1]] * 2
    with pytest.raises(DataError, match=r"chunk 3.0 .* it is missing, and its writer left no chunk out"):
        read(zarr_reader(tmp_path, loop), (3, 0))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"12345")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_out(path: Path) -> None:
    outside = path.parents[4] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def _folder_linked_out(path: Path) -> None:
    outside = path.parents[4] / "outside"
    path.parent.rename(outside)
    path.parent.symlink_to(outside)


def _link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def _link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _file_for_a_folder(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()
    path.parent.write_bytes(b"no folder")


def _unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


DAMAGE = [
    (_cut, "it has 19 bytes, expected 24"),
    (_grow, "it has 29 bytes, expected 24"),
    (_empty, "it has 0 bytes, expected 24"),
    (_folder, "it is not a regular file"),
    (_fifo, "it is not a regular file"),
    (_link_out, "it is a link out of the store, to /"),
    (_folder_linked_out, "it is a link out of the store, to /"),
    (_link_to_nothing, "it is a link to nothing"),
    (_link_to_itself, "Too many levels of symbolic links"),
    (_file_for_a_folder, "Not a directory"),
    (_unreadable, "it is a link out of the store, to /dev/null"),
]


@lanes
@pytest.mark.parametrize(("damage", "cause"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_is_named_with_array_chunk_rows_path_and_cause(
    damage: Callable[[Path], None], cause: str, lane: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    raw(store)
    path = store / "x/c/1/0"
    damage(path)
    with pytest.raises(DataError) as caught:
        read(reader(store, lane), (1, 0))
    assert str(caught.value).startswith(f"array 'x': chunk 1.0 (rows [2:4, 0:3]) in {path}: {cause}")
    assert caught.value.hint


@lanes
@pytest.mark.parametrize("linked", ["x/c/1", "x/c", "x"])
def test_a_folder_that_leads_out_of_the_store_is_refused(linked: str, lane: str, tmp_path: Path) -> None:
    raw(tmp_path / "store")
    path, outside = tmp_path / "store" / linked, tmp_path / "outside"
    one = reader(tmp_path / "store", lane)
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(DataError, match=r"chunk 1\.0 .*it is a link out of the store, to .*outside"):
        read(one, (1, 0))


@pytest.mark.parametrize("linked", ["x/c/1/0", "x/c/1"])
def test_what_turns_into_a_link_out_of_the_store_is_refused_though_it_was_read(linked: str, tmp_path: Path) -> None:
    data = raw(tmp_path / "store")
    path, one = tmp_path / "store" / linked, reader(tmp_path / "store")
    assert np.array_equal(read(one, (1, 0)), data[2:4])
    shutil.copytree(path, tmp_path / "outside") if path.is_dir() else shutil.copy(path, tmp_path / "outside")
    settle(tmp_path)
    path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=r"it is a link out of the store, to .*outside"):
        read(one, (1, 0))


@pytest.mark.parametrize("linked", ["x/c/1/0", "x/c/1", "x"])
def test_who_has_asked_for_its_version_has_not_seen_what_lies_out_of_the_store(linked: str, tmp_path: Path) -> None:
    raw(tmp_path / "store")
    path, files = tmp_path / "store" / linked, StoreFiles(tmp_path / "store")
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    assert files.version("x/c/1/0").mark[0] == 24
    with pytest.raises(ValueError, match="it is a link out of the store"):
        files.open("x/c/1/0")


@lanes
def test_a_folder_that_leads_elsewhere_in_the_store_is_followed(lane: str, tmp_path: Path) -> None:
    data = raw(tmp_path)
    (tmp_path / "x/c/1").rename(tmp_path / "elsewhere")
    (tmp_path / "x/c/1").symlink_to(tmp_path / "elsewhere")
    assert np.array_equal(read(reader(tmp_path, lane), (1, 0)), data[2:4])


@lanes
def test_links_within_the_store_are_followed(lane: str, tmp_path: Path) -> None:
    data = raw(tmp_path)
    (tmp_path / "x/c/1/0").rename(tmp_path / "elsewhere")
    (tmp_path / "x/c/1/0").symlink_to(tmp_path / "elsewhere")
    assert np.array_equal(read(reader(tmp_path, lane), (1, 0)), data[2:4])


def test_a_store_reached_by_a_link_is_a_store(tmp_path: Path) -> None:
    data = raw(tmp_path / "store")
    (tmp_path / "link").symlink_to("store")
    assert np.array_equal(read(reader(tmp_path / "link"), (1, 0)), data[2:4])


@pytest.mark.parametrize("key", ["../outside", "x/../../outside", "/etc/passwd", "x"])
def test_nothing_but_a_file_of_the_store_is_opened(key: str, tmp_path: Path) -> None:
    raw(tmp_path / "store")
    (tmp_path / "outside").write_bytes(b"secret")
    with pytest.raises(ValueError, match=r"out of the store|not a regular file"):
        StoreFiles(tmp_path / "store").open(key)


def test_a_compressed_chunk_far_larger_than_it_decodes_to_is_refused_unread(tmp_path: Path) -> None:
    raw(tmp_path, compressors=ZstdCodec())
    os.truncate(tmp_path / "x/c/1/0", 1 << 40)
    with pytest.raises(DataError, match="has 1099511627776 encoded bytes, a chunk decodes to 24"):
        read(reader(tmp_path), (1, 0))


@pytest.mark.parametrize("codec", [None, ZstdCodec()], ids=["raw", "zstd"])
def test_an_empty_file_is_no_chunk(codec: Any, tmp_path: Path) -> None:
    raw(tmp_path, compressors=codec)
    _empty(tmp_path / "x/c/1/0")
    with pytest.raises(DataError, match=r"it is empty|it has 0 bytes"):
        read(reader(tmp_path), (1, 0))


def _index(path: Path, entries: list[tuple[int, int]], *, at_start: bool = False) -> None:
    data, index = path.read_bytes(), index_bytes(entries)
    path.write_bytes(index + data[len(index) :] if at_start else data[: -len(index)] + index)
    settle(path.parent)


@lanes
@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        ((1000, 24), "its shard ends at byte 84, the chunk at 1024"),
        ((20, 25), "it has 25 bytes, expected 24"),
        ((24, 0), "it has 0 bytes, expected 24"),
        ((ABSENT, 24), "its shard ends at byte 84"),
        ((24, ABSENT), "its shard ends at byte 84"),
        ((40, 24), "it would lie over the index of its shard, at bytes 40 to 64"),
    ],
    ids=str,
)
def test_an_index_that_points_nowhere_is_damage(entry: tuple[int, int], cause: str, lane: str, tmp_path: Path) -> None:
    sharded(tmp_path, codecs=[BytesCodec()])
    _index(tmp_path / "x/c/0/0", [(0, 24), entry])
    lane_ = reader(tmp_path, lane)
    assert read(lane_, (0, 0)) is not None
    with pytest.raises(DataError, match=cause):
        read(lane_, (1, 0))


def test_a_chunk_over_an_index_at_the_start_is_damage(tmp_path: Path) -> None:
    sharded(tmp_path, codecs=[BytesCodec()], index_location="start")
    _index(tmp_path / "x/c/0/0", [(36, 24), (30, 24)], at_start=True)
    with pytest.raises(DataError, match="over the index of its shard, at bytes 30 to 54"):
        read(reader(tmp_path), (1, 0))


@lanes
@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"", "its shard has 0 bytes, fewer than its index of 36"), (b"x" * 100, "checksum .* of its index")],
    ids=["empty", "garbage"],
)
def test_a_damaged_shard_is_named(content: bytes, cause: str, lane: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "x/c/0/0").write_bytes(content)
    settle(tmp_path)
    with pytest.raises(DataError, match=cause):
        read(reader(tmp_path, lane), (1, 0))


# What changes during the run


@lanes
@pytest.mark.parametrize("change", [_cut, _grow, _empty], ids=lambda change: change.__name__)
def test_a_file_that_changes_after_its_first_read_is_noticed(
    change: Callable[[Path], None], lane: str, tmp_path: Path
) -> None:
    raw(tmp_path)
    lane_ = reader(tmp_path, lane)
    read(lane_, (1, 0))
    change(tmp_path / "x/c/1/0")
    with pytest.raises(DataError, match=r"chunk 1.0 .* it changed during the run: 24 bytes of 2023-.* before, \d+ byt"):
        read(lane_, (1, 0))


@lanes
def test_another_content_of_the_same_size_is_noticed_by_its_time(lane: str, tmp_path: Path) -> None:
    data = raw(tmp_path)
    lane_ = reader(tmp_path, lane)
    read(lane_, (1, 0))
    (tmp_path / "x/c/1/0").write_bytes(data[:2].tobytes())
    with pytest.raises(DataError, match="changed during the run"):
        read(lane_, (1, 0))


@lanes
def test_another_file_in_its_place_is_noticed(lane: str, tmp_path: Path) -> None:
    raw(tmp_path)
    lane_ = reader(tmp_path, lane)
    read(lane_, (1, 0))
    path = tmp_path / "x/c/1/0"
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    _date(other, path.stat().st_mtime_ns)
    other.rename(path)
    with pytest.raises(DataError, match="changed during the run"):
        read(lane_, (1, 0))


@lanes
def test_a_file_that_vanishes_after_its_first_read_is_no_fill(lane: str, tmp_path: Path) -> None:
    raw(tmp_path)
    lane_ = reader(tmp_path, lane)
    read(lane_, (1, 0))
    (tmp_path / "x/c/1/0").unlink()
    with pytest.raises(DataError, match="it was there, and vanished during the run"):
        read(lane_, (1, 0))


def test_a_change_is_noticed_also_after_its_map_was_let_go(tmp_path: Path) -> None:
    raw(tmp_path)
    lane = reader(tmp_path, "mmap", StoreFiles(tmp_path, maps=1))
    for chunk in (1, 2):
        read(lane, (chunk, 0))
    _date(tmp_path / "x/c/1/0", 1_700_000_001_000_000_000)
    with pytest.raises(DataError, match="changed during the run"):
        read(lane, (1, 0))


def test_a_shard_that_changes_is_noticed_though_its_index_is_kept(tmp_path: Path) -> None:
    sharded(tmp_path)
    lane = reader(tmp_path)
    read(lane, (0, 0))
    _grow(tmp_path / "x/c/0/0")
    with pytest.raises(DataError, match="changed during the run"):
        read(lane, (1, 0))


@lanes
def test_a_shard_replaced_between_advice_and_read_is_never_read_by_the_old_index(lane: str, tmp_path: Path) -> None:
    sharded(tmp_path / "a", codecs=[BytesCodec()])
    sharded(tmp_path / "b", codecs=[BytesCodec()])
    _index(tmp_path / "b/x/c/0/0", [(24, 24), (0, 24)])
    lane_ = reader(tmp_path / "a", lane)
    assert lane_.advise((1, 0), (0, 2), os.POSIX_FADV_WILLNEED) == 24
    os.replace(tmp_path / "b/x/c/0/0", tmp_path / "a/x/c/0/0")
    with pytest.raises(DataError, match="changed during the run"):
        read(lane_, (1, 0))


def test_of_files_beyond_those_kept_in_mind_an_index_goes_by_what_the_file_is(tmp_path: Path) -> None:
    data = sharded(tmp_path, codecs=[BytesCodec()])
    files = StoreFiles(tmp_path)
    files._seen = Seen(tmp_path, files=0)
    lane, path = reader(tmp_path, files=files), tmp_path / "x/c/0/0"
    assert np.array_equal(read(lane, (0, 0)), data[0:2])
    _index(path, [(24, 24), (0, 24)])
    _date(path, 1_700_000_001_000_000_000)
    assert np.array_equal(read(lane, (0, 0)), data[2:4])


def test_the_index_of_a_shard_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, parsed = sharded(tmp_path), []

    def count(index: bytes, chunks: int) -> Any:
        parsed.append(chunks)
        return parse_shard_index(index, chunks)

    monkeypatch.setattr(readers, "parse_shard_index", count)
    lane = reader(tmp_path)
    for _ in range(2):
        for chunk in range(4):
            assert np.array_equal(read(lane, (chunk, 0)), data[2 * chunk : 2 * chunk + 2])
    assert parsed == [2, 2]


def test_kept_indexes_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)
    monkeypatch.setattr(readers, "INDEX_CACHE_BYTES", 40)
    lane = reader(tmp_path)
    for chunk in range(4):
        read(lane, (chunk, 0))
    assert list(lane._indexes) == ["x/c/1/0"]


# What is not as it was when the store was opened


def earlier(folder: Path) -> StoreFiles:
    """The files of a store that was opened a minute ago."""
    files = StoreFiles(folder)
    files.opened_at -= 60 * 10**9
    return files


@pytest.fixture(params=[*LANES, "zarr"])
def opened(request: pytest.FixtureRequest, loop: ZarrLoop, tmp_path: Path) -> Callable[[], LocalReader | ZarrReader]:
    """A reader of the store `s`, opened a minute ago, by each lane."""
    folder = tmp_path / "s"

    def open_lane() -> LocalReader | ZarrReader:
        if request.param == "zarr":
            return zarr_reader(folder, loop, files=earlier(folder))
        return reader(folder, request.param, earlier(folder))

    return open_lane


Opened = Callable[[], LocalReader | ZarrReader]


def test_a_chunk_written_since_the_opening_is_noticed_though_it_was_never_read(opened: Opened, tmp_path: Path) -> None:
    data = raw(tmp_path / "s")
    lane, path = opened(), tmp_path / "s/x/c/1/0"
    path.write_bytes(path.read_bytes())
    for _ in range(2):
        with pytest.raises(DataError, match=r"chunk 1\.0 .*it changed during the run: it was written at .* opened at"):
            read(lane, (1, 0))
    assert np.array_equal(read(lane, (2, 0)), data[4:6])


def test_a_clock_that_was_set_back_makes_no_file_one_that_was_written_since_which_is_said_once(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, now = raw(tmp_path / "s"), time.time_ns()
    for file in (tmp_path / "s/x/c").glob("*/*"):
        os.utime(file)
    monkeypatch.setattr(time, "time_ns", lambda: now - 10 * 86400 * 10**9)
    lane = opened()
    for chunk in range(4):
        assert np.array_equal(read(lane, (chunk, 0)), data[2 * chunk : 2 * chunk + 2])
    (said,) = [record.getMessage() for record in caplog.records]
    assert "by a clock that was set back since, or never set; so may others be, and it is read all the same" in said
    path = tmp_path / "s/x/c/1/0"
    path.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"chunk 1\.0 .*it changed during the run: \d+ bytes of"):
        read(lane, (1, 0))


def test_an_array_replaced_by_another_is_noticed_by_its_metadata(opened: Opened, tmp_path: Path) -> None:
    raw(tmp_path / "s")
    lane = opened()
    read(lane, (0, 0))
    shutil.rmtree(tmp_path / "s")
    zarr.create_group(tmp_path / "s").create_array("x", data=np.ones((8, 3), "f4"), chunks=(2, 3), compressors=None)
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"chunk 1\.0 .*the metadata of array 'x' have changed: the store was moved"
        ):
            read(lane, (1, 0))


def test_another_store_moved_into_its_place_is_noticed_though_its_files_are_old(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw(tmp_path / "s")
    raw(tmp_path / "other", shape=(10, 3))
    lane = opened()
    monkeypatch.setattr(described, "LOOK_BYTES", 48)
    read(lane, (0, 0))
    (tmp_path / "s").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "s")
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"chunk 1\.0 .*the metadata of array 'x' have changed: the store was moved"
        ):
            read(lane, (1, 0))


def test_who_only_gave_advice_hides_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw(tmp_path / "s")
    raw(tmp_path / "other", shape=(10, 3))
    lane = reader(tmp_path / "s", files=earlier(tmp_path / "s"))
    monkeypatch.setattr(described, "LOOK_BYTES", 24)
    (tmp_path / "s").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "s")
    assert lane.advise((1, 0), (0, 2), os.POSIX_FADV_WILLNEED) == 0
    for chunk in (1, 2):
        with pytest.raises(DataError, match="the metadata of array 'x' have changed"):
            read(lane, (chunk, 0))


def test_once_a_change_was_noticed_nothing_is_read_any_more(tmp_path: Path) -> None:
    raw(tmp_path / "s")
    raw(tmp_path / "other", shape=(10, 3))
    lane = reader(tmp_path / "s", files=StoreFiles(tmp_path / "s"))
    (tmp_path / "s").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "s")
    _date(tmp_path / "s/x/c/1/0", time.time_ns() + 10**12)
    for chunk in (1, 2):
        with pytest.raises(DataError, match="the metadata of array 'x' have changed"):
            read(lane, (chunk, 0))


def test_the_files_of_one_array_hide_no_change_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = raw(tmp_path)
    group: Any = zarr.open_group(tmp_path)
    group.create_array("y", data=data, chunks=(2, 3), compressors=None)
    settle(tmp_path)
    files = StoreFiles(tmp_path)
    lane = reader(tmp_path, files=files)
    files.describe("y")
    monkeypatch.setattr(described, "LOOK_BYTES", 48)
    (tmp_path / "y").rename(tmp_path / "old")
    group.create_array("y", data=data.astype("f4"), chunks=(2, 3), compressors=None)
    settle(tmp_path)
    files.version("y/c/0/0")
    read(lane, (0, 0))
    files.version("y/c/1/0")
    with pytest.raises(DataError, match="the metadata of array 'y' have changed"):
        read(lane, (1, 0))


def test_a_file_of_another_mode_or_owner_is_what_it_was(opened: Opened, tmp_path: Path) -> None:
    data = raw(tmp_path / "s")
    lane = opened()
    (tmp_path / "s/x/c/1/0").chmod(0o600)
    os.link(tmp_path / "s/x/c/2/0", tmp_path / "backup")
    for chunk in (1, 2):
        assert np.array_equal(read(lane, (chunk, 0)), data[2 * chunk : 2 * chunk + 2])


def test_where_another_machines_clock_dates_files_a_later_one_is_read_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = raw(tmp_path)
    monkeypatch.setattr("streamtrain.data.files.is_local", lambda path: False)
    lane = reader(tmp_path, files=earlier(tmp_path))
    for chunk in (1, 2):
        path = tmp_path / f"x/c/{chunk}/0"
        path.write_bytes(path.read_bytes())
        assert np.array_equal(read(lane, (chunk, 0)), data[2 * chunk : 2 * chunk + 2])
    [message] = caplog.messages
    assert re.search(r": x/c/1/0: it changed during the run: it was written at .*; so may others be", message)


def test_what_changed_has_no_version_that_another_has_kept(tmp_path: Path) -> None:
    raw(tmp_path)
    before = earlier(tmp_path)
    assert before.version("x/c/1/0").mark == StoreFiles(tmp_path).version("x/c/1/0").mark
    for number in (1, 2):  # read before, and not
        path = tmp_path / f"x/c/{number}/0"
        path.write_bytes(bytes(24))
        mark = before.version(f"x/c/{number}/0").mark
        assert mark != StoreFiles(tmp_path).version(f"x/c/{number}/0").mark


# Maps


def test_files_dated_after_the_opening_are_not_mapped(tmp_path: Path) -> None:
    data = raw(tmp_path)
    _date(tmp_path / "x/c/1/0", time.time_ns() + 10**12)
    files = StoreFiles(tmp_path)
    assert files.map("x/c/1/0") is None
    assert files.map("x/c/2/0") is not None
    assert np.array_equal(read(reader(tmp_path, "mmap", files), (1, 0)), data[2:4])


def test_maps_keep_within_their_limit_and_give_descriptors_back(tmp_path: Path) -> None:
    raw(tmp_path, shape=(200, 3))
    files = StoreFiles(tmp_path, maps=5)
    lane, before = reader(tmp_path, "mmap", files), len(os.listdir("/proc/self/fd"))
    for chunk in range(100):
        read(lane, (chunk, 0))
        assert len(os.listdir("/proc/self/fd")) <= before + 6
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_limit_of_maps_is_below_that_of_descriptors(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 8 // 2 <= StoreFiles(tmp_path).max_maps < soft // 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        assert StoreFiles(tmp_path).max_maps == 22
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_files_are_mapped_where_all_of_them_can_stay_mapped_or_chunks_are_large(tmp_path: Path) -> None:
    raw(tmp_path, shape=(20, 3))
    few, files = layout_of(tmp_path), StoreFiles(tmp_path, maps=25)
    many, large = replace(few, shape=(32, 3)), replace(few, shape=(1 << 20, 1 << 19), chunk_shape=(2, 1 << 19))
    assert (few.num_files, many.num_files, large.chunk_bytes) == (10, 16, 4 << 20)
    assert [files.worth_mapping(layout) for layout in (few, many, few, few, large)] == [True, False, True, False, True]


@contextlib.contextmanager
def descriptors(free: int) -> Iterator[None]:
    """So many can be opened meanwhile, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken = [os.open("/dev/null", os.O_RDONLY)]
    while taken[-1] < highest:
        taken.append(os.open("/dev/null", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1 + free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def test_without_descriptors_maps_give_way_to_pread_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Others may take the descriptors that the limit of maps counted on."""
    data = raw(tmp_path, shape=(200, 3))
    lane = reader(tmp_path, "mmap", StoreFiles(tmp_path, maps=1000))
    with descriptors(20):
        for chunk in range(100):
            assert np.array_equal(read(lane, (chunk, 0)), data[2 * chunk : 2 * chunk + 2])
    (said,) = [record.getMessage() for record in caplog.records]
    assert "(Too many open files): they are let go, and files are read by pread" in said
    assert re.fullmatch(r"mmap \(\d+ by pread: Too many open files\)", lane.lane)


def test_without_descriptors_for_opening_either_maps_make_room(tmp_path: Path) -> None:
    data = raw(tmp_path, shape=(20, 3))
    lane = reader(tmp_path, "mmap")
    read(lane, (0, 0))
    with descriptors(0):
        assert np.array_equal(read(lane, (1, 0)), data[2:4])


def test_a_map_lives_as_long_as_somebody_reads_it(tmp_path: Path) -> None:
    data = raw(tmp_path)
    files = StoreFiles(tmp_path, maps=1)
    found = read(reader(tmp_path, "mmap", files), (1, 0))
    files.close()
    assert np.array_equal(found, data[2:4])
    assert not found.flags.writeable


def test_a_file_cut_between_its_opening_and_its_map_is_an_error_and_no_signal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    os.truncate(path, 0)
    with pytest.raises(ValueError, match="cut short while it was mapped"):
        populate(memory.madvise, 0, 1 << 16)


def test_threads_share_a_reader(tmp_path: Path) -> None:
    data = raw(tmp_path, shape=(400, 3))
    lane = reader(tmp_path, "mmap", StoreFiles(tmp_path, maps=8))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [(chunk, pool.submit(read, lane, (chunk, 0))) for chunk in [*range(200), *range(199, -1, -1)]]
        for chunk, job in jobs:
            assert np.array_equal(job.result(), data[2 * chunk : 2 * chunk + 2])


# Pieces


def test_scratch_grows_and_is_kept() -> None:
    scratch = Scratch()
    first = scratch.take("a", 100)
    first[:] = 7
    assert np.shares_memory(scratch.take("a", 50), first)
    assert not np.shares_memory(scratch.take("b", 100), first)
    larger = scratch.take("a", 5000)
    assert len(larger) == 5000
    assert larger.ctypes.data % 4096 == 0


@pytest.mark.parametrize("size", [0, 1, 4096, 5 << 20])
def test_anonymous_memory_is_zeroed_and_aligned(size: int) -> None:
    memory = anonymous(size)
    assert (len(memory), memory.ctypes.data % 4096, bool(memory.any())) == (size, 0, False)
    memory[:] = 1


def test_reading_stops_at_the_end_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        out = np.zeros(6, dtype=np.uint8)
        assert (read_into(fd, out, 2), out.tobytes()) == (6, b"234567")
        assert (read_into(fd, out, 7), out[:3].tobytes()) == (3, b"789")
        assert read_into(fd, out, 100) == 0
    finally:
        os.close(fd)


def test_a_chunk_error_says_where(tmp_path: Path) -> None:
    write(Case("edge", {"chunks": (4, 4)}, (6, 6)), tmp_path)
    error = chunk_error(layout_of(tmp_path), (1, 1), "/p", "it is cut")
    assert str(error) == "array 'x': chunk 1.1 (rows [4:6, 4:6]) in /p: it is cut"
    write(Case("scalar", {}, ()), tmp_path, "s")
    assert str(chunk_error(layout_of(tmp_path, "s"), (), "/p", "why")) == "array 's': chunk 0 (rows []) in /p: why"


def test_this_machines_own_file_systems_are_local(tmp_path: Path) -> None:
    assert is_local(tmp_path)
    assert is_local(Path("/"))
    assert is_local(tmp_path / "not" / "there")


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/data /data nfs4 rw 0 0
tmpfs /data/fast tmpfs rw 0 0
server:/x /my\\040disk cifs rw 0 0
sshfs /far fuse.sshfs rw 0 0
s3fs /s3 fuse.s3fs rw 0 0
bucket /gcs fuse.gcsfuse rw 0 0
remote: /rclone fuse.rclone rw 0 0
mountpoint-s3 /bare fuse rw 0 0
/dev/sdc1 /ntfs fuseblk rw 0 0
/etc/auto /auto autofs rw 0 0
server:/y /auto/y nfs rw 0 0
/dev/sdb1 /database xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("/home/x", True),
        ("/data", False),
        ("/data/x", False),
        ("/data/fast/x", True),
        ("/database/x", True),
        ("/my disk/x", False),
        ("/far/x", False),
        ("/s3/x", False),
        ("/gcs/x", False),
        ("/rclone/x", False),
        ("/bare/x", False),
        ("/ntfs/x", True),
        ("/auto/y/x", False),
        ("/auto/z", False),
    ],
)
def test_the_mount_that_a_path_lies_on_tells_whether_it_is_local(path: str, local: bool, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    assert is_local(Path(path), tmp_path / "mounts") is local
    assert is_local(Path(path), tmp_path / "absent")


# zarr's loop


def ours() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("streamtrain-zarr")}


def test_the_private_loop_starts_on_first_use_and_is_joined_with_its_executor() -> None:
    private = ZarrLoop()
    assert ours() == set()
    assert private.run(asyncio.to_thread(lambda: threading.current_thread().name), 30) == "streamtrain-zarr-io-0"
    assert ours() == {"streamtrain-zarr", "streamtrain-zarr-io-0"}
    private.close()
    private.close()
    assert ours() == set()


async def test_the_callers_loop_and_its_executor_are_not_touched(tmp_path: Path) -> None:
    data, private = await asyncio.to_thread(raw, tmp_path), ZarrLoop()
    lane = await asyncio.to_thread(zarr_reader, tmp_path, private)
    assert np.array_equal(await asyncio.to_thread(read, lane, (1, 0)), data[2:4])
    assert {name.partition("-io")[0] for name in ours()} == {"streamtrain-zarr"}
    await asyncio.to_thread(private.close)
    assert ours() == set()


def test_a_closed_loop_can_be_used_again(loop: ZarrLoop) -> None:
    for _ in range(2):
        assert loop.run(_answer(7), 30) == 7
        loop.close()


async def _answer(value: int) -> int:
    return value


def test_failures_come_through(loop: ZarrLoop) -> None:
    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        loop.run(fail(), 30)


def test_closing_the_loop_ends_what_waits_there() -> None:
    private, started = ZarrLoop(), threading.Event()

    async def wait_for_ever() -> None:
        started.set()
        await asyncio.Event().wait()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(private.run, wait_for_ever(), None)
        started.wait(30)
        private.close()
        with pytest.raises(concurrent.futures.CancelledError):
            waiting.result(30)


async def test_closing_from_a_task_that_is_cancelled_ends_the_thread_all_the_same() -> None:
    private, inside, gate = ZarrLoop(), threading.Event(), threading.Event()

    def read() -> None:
        inside.set()
        gate.wait()

    reading = private.submit(asyncio.to_thread(read))
    await asyncio.to_thread(inside.wait, 30)
    closing = asyncio.create_task(private.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.sleep(0)
    closing.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert ours() == set()
    assert reading.done()


class Hanging:
    """An array whose reads never end."""

    store_path = "memory://hanging/x"

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    async def getitem(self, selection: tuple[slice, ...]) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


class Failing(Hanging):
    async def getitem(self, selection: tuple[slice, ...]) -> Any:
        raise RuntimeError("the disk is on fire")


def test_a_read_that_hangs_is_given_up_with_its_chunk_and_its_seconds(loop: ZarrLoop, tmp_path: Path) -> None:
    raw(tmp_path)
    hanging = Hanging()
    with pytest.raises(EnvironmentProblem, match=r"array 'x': chunk 1\.0 .*was not read within 0\.05 s"):
        read(ZarrReader(layout_of(tmp_path), hanging, loop, timeout=0.05), (1, 0))
    assert hanging.cancelled.wait(30)


def test_whatever_zarr_raises_gets_a_place(loop: ZarrLoop, tmp_path: Path) -> None:
    raw(tmp_path)
    with pytest.raises(
        DataError, match=r"chunk 1.0 \(rows \[2:4, 0:3\]\) in memory://hanging/x: RuntimeError: the disk"
    ):
        read(ZarrReader(layout_of(tmp_path), Failing(), loop, timeout=30), (1, 0))


def test_a_damaged_chunk_of_zarrs_lane_gets_a_place(loop: ZarrLoop, tmp_path: Path) -> None:
    raw(tmp_path, compressors=GzipCodec())
    (tmp_path / "x/c/1/0").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"array 'x': chunk 1.0 \(rows \[2:4, 0:3\]\)"):
        read(zarr_reader(tmp_path, loop), (1, 0))


@pytest.mark.parametrize(("damage", "cause"), DAMAGE[3:], ids=lambda value: getattr(value, "__name__", ""))
def test_zarrs_lane_reads_nothing_but_regular_files_of_the_store_either(
    damage: Callable[[Path], None], cause: str, loop: ZarrLoop, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    raw(store)
    path = store / "x/c/1/0"
    damage(path)
    with pytest.raises(DataError) as caught:
        read(zarr_reader(store, loop), (1, 0))
    assert str(caught.value).startswith(f"array 'x': chunk 1.0 (rows [2:4, 0:3]) in {path}: {cause}")


class Harmed:
    """An array one of whose files is harmed after it was looked at and before zarr reads it."""

    def __init__(self, array: Any, harm: Callable[[], object]) -> None:
        self.metadata, self.store_path, self._array, self._harm = array.metadata, array.store_path, array, harm

    async def getitem(self, selection: tuple[slice, ...]) -> Any:
        self._harm()
        return await self._array.getitem(selection)


def _swap(path: Path) -> None:
    """Another file of the same size in its place."""
    path.with_name("new").write_bytes(bytes(path.stat().st_size))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [_swap, Path.unlink], ids=lambda change: change.__name__)
def test_zarrs_lane_gives_nothing_of_a_file_that_changes_while_zarr_reads_it(
    change: Callable[[Path], None], loop: ZarrLoop, tmp_path: Path
) -> None:
    raw(tmp_path)
    lane = zarr_reader(tmp_path, loop)
    lane._array = Harmed(lane._array, lambda: change(tmp_path / "x/c/1/0"))
    with pytest.raises(DataError, match=r"chunk 1\.0 .*it (changed during|was there, and vanished)"):
        read(lane, (1, 0))


def test_zarrs_lane_refuses_a_file_far_larger_than_it_decodes_to_unread(loop: ZarrLoop, tmp_path: Path) -> None:
    raw(tmp_path, compressors=ZstdCodec())
    os.truncate(tmp_path / "x/c/1/0", 1 << 40)
    with pytest.raises(DataError, match=r"chunk 1.0 .*it has 1099511627776 bytes, far more than its part of the array"):
        read(zarr_reader(tmp_path, loop), (1, 0))


def test_zarrs_lane_looks_at_the_file_of_the_shard(loop: ZarrLoop, tmp_path: Path) -> None:
    sharded(tmp_path / "store")
    _folder(tmp_path / "store/x/c/1/0")
    with pytest.raises(DataError, match=r"chunk 3.0 \(rows \[6:8, 0:3\]\) in .*/x/c/1/0: it is not a regular file"):
        read(zarr_reader(tmp_path / "store", loop), (3, 0))


@pytest.mark.parametrize("case", [case for case in CASES if case.slow], ids=lambda case: case.name)
def test_zarrs_lane_knows_the_file_of_each_chunk_of_every_layout(case: Case, loop: ZarrLoop, tmp_path: Path) -> None:
    write(case, tmp_path)
    lane = zarr_reader(tmp_path, loop)
    for path in [path for path in (tmp_path / "x").rglob("*") if path.is_file() and path.name[0] not in ".z"]:
        _folder(path)
    for chunk in chunks_of(lane.layout):
        with pytest.raises(DataError, match="it is not a regular file"):
            read(lane, chunk)


@pytest.mark.parametrize("change", [_cut, _grow, Path.unlink], ids=lambda change: change.__name__)
def test_zarrs_lane_notices_a_file_that_changes_after_its_first_read(
    change: Callable[[Path], None], loop: ZarrLoop, tmp_path: Path
) -> None:
    raw(tmp_path)
    lane = zarr_reader(tmp_path, loop)
    read(lane, (1, 0))
    change(tmp_path / "x/c/1/0")
    with pytest.raises(DataError, match=r"chunk 1.0 .* it (changed|was there, and vanished) during the run"):
        read(lane, (1, 0))


FIFO = """
import sys, time
from pathlib import Path
from zarr.api import asynchronous as zarr_api
from streamtrain.data import daemons, zarr_lane
from streamtrain.data.reading import Scratch
from streamtrain.data.layout import parse_array
daemons.LEAVE_SECONDS = 0.05
loop = zarr_lane.ZarrLoop()
array = loop.run(zarr_api.open_array(store=sys.argv[1], path="x", mode="r"), 30)
layout = parse_array(array.path, array.metadata.to_dict(), array.dtype, array.metadata.fill_value)
reader = zarr_lane.ZarrReader(layout, array, loop, timeout=0.2)
try:
    reader.read((1, 0), (0, 2), Scratch())
except Exception as error:
    print(type(error).__name__)
loop.close()
"""


def test_a_pipe_in_a_chunks_place_keeps_neither_the_reader_nor_the_process(tmp_path: Path) -> None:
    """Nobody looked first: zarr opens it and waits in a thread for ever, and that thread must not be waited for."""
    raw(tmp_path)
    _fifo(tmp_path / "x/c/1/0")
    done = subprocess.run(
        [sys.executable, "-c", FIFO, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("EnvironmentProblem\n", 0), done.stderr
