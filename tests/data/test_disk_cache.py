"""What the disk cache promises: decoded chunks come back as they were or not at all, within its bytes, to one owner."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data.disk_cache import TAG, DiskCache, DiskCacheStatistics, Folder, default_place, disk_cache_of
from streamtrain.data.kept_chunks import KeptReader
from streamtrain.data.opening import locate, open_arrays
from streamtrain.data.reading import Scratch, under
from streamtrain.data.segments import ROW_BYTES, Segment
from streamtrain.data.stream import ZarrStream
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import ConfigError, DataError, EnvironmentProblem
from tests.data import small
from tests.data.stores import CASES, Case, chunks_of, part, within, write

pytestmark = pytest.mark.usefixtures("old_files")
ROWS, WIDTH, CHUNK = 640, 16, 64
CHUNKS, CHUNK_BYTES = ROWS // CHUNK, CHUNK * WIDTH * 4


def numbers(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((ROWS, WIDTH), dtype=np.float32)


def store(path: Path, seed: int = 0, **options: Any) -> Path:
    """Ten chunks of 4 KiB, by zarr's default codec."""
    zarr.create_array(str(path), data=numbers(seed), chunks=(CHUNK, WIDTH), **options)
    return path


def stream(path: Path, folder: Path, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"batch_size": 50, "shuffle": "block", "output": "numpy", "memory": "8MiB", "cache": 0}
    return ZarrStream(path, disk_cache=folder, **{"disk_cache_bytes": "1MiB", **given, **keywords})


async def rows_of(source: ZarrStream) -> NDArray[Any]:
    """An epoch's rows, by their numbers."""
    batches = [batch async for batch in source]
    assert len(np.unique(np.concatenate([batch.index for batch in batches]))) == sum(map(len, batches))
    rows = np.empty((source.num_samples, *batches[0].inputs.shape[1:]), dtype=batches[0].inputs.dtype)
    for batch in batches:
        rows[batch.index] = batch.inputs
    return rows


def told(source: ZarrStream) -> DiskCacheStatistics:
    found = source.statistics().disk_cache
    assert found is not None
    return found


def size_of(cache: Path) -> int:
    """Bytes of its chunks and indexes."""
    return sum(path.stat().st_size for path in cache.glob("*.*") if path.name != TAG)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def loop() -> Iterator[ZarrLoop]:
    made = ZarrLoop()
    yield made
    made.close()


# ---- what comes back


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layout_comes_back_as_it_was(case: Case, tmp_path: Path, folder: Path, loop: ZarrLoop) -> None:
    data = write(case, tmp_path / "s.zarr")
    for life in range(2):
        cache = DiskCache(str(folder), 1 << 20)
        found = loop.run(open_arrays(locate(tmp_path / "s.zarr"), ["x"], io="auto", loop=loop, timeout=30), 30)["x"]
        kept = KeptReader(found.reader, found.layout, cache, "s", verify="once", inodes=True)
        scratch, every = Scratch(), (0, found.layout.chunk_shape[0] if found.layout.ndim else 1)
        for chunk in chunks_of(found.layout) * 2:
            got = kept.read(chunk, every, scratch)
            assert got is not None
            np.testing.assert_array_equal(got[within(found.layout, chunk)], data[part(found.layout, chunk)])
        now, count = cache.statistics(), len(chunks_of(found.layout))
        assert now is not None
        assert (now.hits, now.misses) == ((2 * count, 0) if life else (count, count))
        cache.close()


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"shuffle": "global"},
        {"shuffle": False, "sample_axes": (0, 1)},
        {"window": 7, "stride": 3, "cache": "auto"},
        {"on_bad_chunk": "skip"},
        {"io": "store"},
        {"verify": "always"},
        {"select": {1: [3, 1]}},
    ],
    ids=str,
)
async def test_the_second_epoch_and_the_next_life_decode_nothing(
    tmp_path: Path, folder: Path, keywords: dict[str, Any]
) -> None:
    path = store(tmp_path / "s.zarr")
    expected = await rows_of(ZarrStream(path, **{"batch_size": 50, "output": "numpy", "cache": 0, **keywords}))
    for life in range(2):
        async with stream(path, folder, **keywords) as source:
            np.testing.assert_array_equal(await rows_of(source), expected)
            before = told(source)
            np.testing.assert_array_equal(await rows_of(source), expected)
            now = told(source)
            assert before.misses == now.misses == (0 if life else CHUNKS)
            assert now.hits >= CHUNKS or "cache" in keywords
            assert (now.refused, now.evictions, now.damaged, now.off) == (0, 0, 0, None)
            assert now.bytes == size_of(folder) <= now.capacity
            assert next(iter(source.statistics().lanes.values())).startswith("disk cache over ")


def test_advice_goes_to_what_will_be_read(tmp_path: Path, folder: Path, loop: ZarrLoop) -> None:
    path = store(tmp_path / "s.zarr")
    cache = DiskCache(str(folder), 1 << 20)
    found = loop.run(open_arrays(locate(path), None, io="auto", loop=loop, timeout=30), 30)["array"]
    kept = KeptReader(found.reader, found.layout, cache, "s", verify="once", inodes=True)
    encoded = (path / "c" / "3" / "0").stat().st_size
    assert kept.advise((3, 0), (0, 1), os.POSIX_FADV_WILLNEED) == encoded
    kept.read((3, 0), (0, 1), Scratch())
    assert kept.advise((3, 0), (0, 1), os.POSIX_FADV_WILLNEED) == CHUNK_BYTES != encoded
    cache.close()


async def test_several_arrays_and_stores_share_a_folder(tmp_path: Path, folder: Path) -> None:
    paths = [small.write(tmp_path / f"{name}.zarr", compressed=True) for name in "ab"]
    given: dict[str, Any] = {"output": "numpy", "disk_cache": folder, "disk_cache_bytes": "1MiB", "cache": 0}
    async with small.stream(paths, **given) as source:  # type: ignore[arg-type]
        for _ in range(2):
            async for batch in source:
                np.testing.assert_array_equal(batch.inputs, small.X[batch.index % small.ROWS])
                np.testing.assert_array_equal(batch.targets, small.Y[batch.index % small.ROWS])
        assert told(source).misses == 2 * (16 + 10)


async def test_raw_chunks_of_this_machine_are_left_where_they_are(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr", compressors=None)
    async with stream(path, folder) as source:
        np.testing.assert_array_equal(await rows_of(source), numbers(0))
        assert set(source.statistics().lanes.values()) == {"mmap"}
        assert told(source).bytes == 0


async def test_what_is_left_out_stays_fill(tmp_path: Path, folder: Path) -> None:
    array = zarr.create_array(str(tmp_path / "s.zarr"), shape=(ROWS, 4), chunks=(CHUNK, 4), dtype="int16", fill_value=7)
    array[CHUNK : 2 * CHUNK] = 1
    async with stream(tmp_path / "s.zarr", folder) as source:
        for _ in range(2):
            np.testing.assert_array_equal(await rows_of(source), array[...])
        assert told(source).bytes > 0


# ---- sources that change


async def test_what_was_written_just_before_the_opening_is_kept_for_that_run_alone(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamtrain.data.files.TICK", 3600 * 10**9)
    path = store(tmp_path / "s.zarr")
    for _ in range(2):
        async with stream(path, folder) as source:
            for _ in range(2):
                await rows_of(source)
            assert (told(source).misses, told(source).hits) == (CHUNKS, CHUNKS)


async def test_a_chunk_that_was_written_anew_is_decoded_anew(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    async with stream(path, folder) as source:
        await rows_of(source)
    array = zarr.open_array(str(path), mode="r+")
    array[:CHUNK] = 5.0
    async with stream(path, folder) as source:
        rows = await rows_of(source)
        assert (rows[:CHUNK] == 5).all()
        np.testing.assert_array_equal(rows[CHUNK:], numbers(0)[CHUNK:])
        assert (told(source).hits, told(source).misses) == (CHUNKS - 1, 1)
        await rows_of(source)
        assert told(source).misses == 1


async def test_a_chunk_that_was_written_over_with_its_time_kept_is_decoded_anew(tmp_path: Path, folder: Path) -> None:
    for value in (1, 2):
        data = np.full((ROWS, WIDTH), value, dtype=np.uint8)
        zarr.create_array(str(tmp_path / f"{value}.zarr"), data=data, chunks=(CHUNK, WIDTH))
    file, other = (tmp_path / name / "c" / "3" / "0" for name in ("1.zarr", "2.zarr"))
    before = file.stat()
    async with stream(tmp_path / "1.zarr", folder) as source:
        assert (await rows_of(source) == 1).all()
    file.write_bytes(other.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_ino) == (before.st_size, before.st_ino)
    async with stream(tmp_path / "1.zarr", folder) as source:
        assert ((await rows_of(source))[3 * CHUNK : 4 * CHUNK] == 2).all()


async def test_a_chunk_that_changes_during_the_run_is_an_error_kept_or_not(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    async with stream(path, folder) as source:
        await rows_of(source)
        file = path / "c" / "3" / "0"
        os.utime(file, ns=(1, 1))
        with pytest.raises(DataError, match=r"chunk 3\.0 .*changed during the run"):
            await rows_of(source)


async def test_a_file_that_vanishes_after_it_was_given_from_the_cache_is_an_error(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    for life in range(2):
        async with stream(path, folder) as source:
            await rows_of(source)
            if life:
                os.unlink(path / "c" / "3" / "0")
                with pytest.raises(DataError, match=r"chunk 3\.0 .*vanished during the run"):
                    await rows_of(source)


async def test_the_same_chunks_of_another_store_are_others(tmp_path: Path, folder: Path) -> None:
    for seed in range(2):
        path = store(tmp_path / f"{seed}.zarr", seed)
        for file in path.glob("c/*/*"):
            os.utime(file, ns=(10**18, 10**18))
        async with stream(path, folder) as source:
            np.testing.assert_array_equal(await rows_of(source), numbers(seed))


# ---- its bytes


@limits(max_examples=25)
@given(
    st.integers(0, 300_000),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=60),
    st.booleans(),
    st.integers(0, 7),
)
def test_it_stays_within_its_bytes_and_gives_what_was_kept(
    tmp_path_factory: pytest.TempPathFactory, capacity: int, asked: list[tuple[int, int]], again: bool, odd: int
) -> None:
    path = tmp_path_factory.mktemp("kept")
    owner = Folder(str(path), capacity)
    for number, (array, chunk) in enumerate(asked):
        if again and number == len(asked) // 2:
            owner.close()
            owner = Folder(str(path), capacity)
        shelf, data = (
            owner.shelf(array, 10, 10 * CHUNK_BYTES),
            np.full((5, 1024 * (1 + chunk) + odd), array * 10.0 + chunk),
        )
        got = owner.get(shelf, chunk, 1, data.nbytes, Scratch(), "once")
        if got is None:
            owner.keep(shelf, chunk, 1, data)
        else:
            np.testing.assert_array_equal(got.view(np.float64).reshape(data.shape), data)
        assert owner.bytes == size_of(path) <= max(capacity, 0)
    owner.close()


def test_chunks_of_any_size_fill_a_segment_to_its_end_and_no_further(folder: Path) -> None:
    size = (1 << 20) + 1
    capacity = 4 * (3 * size + 63)  # the padding of two chunks leaves no room for the third
    owner = Folder(str(folder), capacity)
    shelf = owner.shelf(1, 8, 8 * size)
    for number in range(8):
        owner.keep(shelf, number, 1, np.full(size, number, dtype=np.uint8))
    for number in range(8):
        got = owner.get(shelf, number, 1, size, Scratch(), "once")
        assert got is not None
        np.testing.assert_array_equal(got, np.full(size, number, dtype=np.uint8))
    assert owner.bytes == size_of(folder) <= capacity
    owner.close()


async def test_a_cache_smaller_than_the_epoch_still_serves_its_part(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    async with stream(path, folder, disk_cache_bytes=5 * CHUNK_BYTES) as source:
        for _ in range(4):
            np.testing.assert_array_equal(await rows_of(source), numbers(0))
            assert size_of(folder) <= 5 * CHUNK_BYTES
        now = told(source)
        assert (now.hits, now.misses) == (3 * 4, 10 + 3 * 6)  # four and their records fit
        assert (now.refused, now.evictions) == (4 * 6, 0)


async def test_what_is_used_no_more_makes_room_for_what_is(tmp_path: Path, folder: Path) -> None:
    first, second = store(tmp_path / "1.zarr", 1), store(tmp_path / "2.zarr", 2)
    async with stream(first, folder, disk_cache_bytes=12 * CHUNK_BYTES) as source:
        await rows_of(source)
    async with stream(second, folder, disk_cache_bytes=12 * CHUNK_BYTES) as source:
        for _ in range(2):
            np.testing.assert_array_equal(await rows_of(source), numbers(2))
            assert size_of(folder) <= 12 * CHUNK_BYTES
        now = told(source)
        assert (now.hits, now.misses, now.refused) == (10, 10, 0)
        assert now.evictions >= 8


async def test_less_room_than_before_gives_up_the_oldest(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    async with stream(path, folder, disk_cache_bytes=40 * CHUNK_BYTES) as source:
        await rows_of(source)
    async with stream(path, folder, disk_cache_bytes=3 * CHUNK_BYTES) as source:
        np.testing.assert_array_equal(await rows_of(source), numbers(0))
        assert size_of(folder) <= 3 * CHUNK_BYTES


# ---- damage, kills, full disks


def filled(path: Path) -> Path:
    """A cache with six chunks of array 1 in it, number n full of n."""
    owner = Folder(str(path), 1 << 20)
    shelf = owner.shelf(1, 6, 6000)
    for number in range(6):
        owner.keep(shelf, number, 3, np.full(1000, number, dtype=np.uint8))
    owner.close()
    return path


def spoil(file: Path, *places: int) -> None:
    """Write eight other bytes at each of these places."""
    with file.open("r+b") as opened:
        for place in places:
            opened.seek(place)
            opened.write(b"\xff" * 8)


@limits(max_examples=40)
@given(
    st.sampled_from(["00000001.data", "00000001.index"]),
    st.sampled_from(["cut", "flip", "zero", "grow", "gone"]),
    st.integers(0, 1 << 20),
)
def test_no_damage_to_its_files_is_ever_given(
    tmp_path_factory: pytest.TempPathFactory, name: str, how: str, where: int
) -> None:
    path = filled(tmp_path_factory.mktemp("kept"))
    file = path / name
    data = bytearray(file.read_bytes())
    at = where % len(data)
    if how == "cut":
        del data[at:]
    elif how == "flip":
        data[at] ^= 1 << where % 8
    elif how == "zero":
        data[at : at + 500] = bytes(len(data[at : at + 500]))
    elif how == "grow":
        data += random.Random(where).randbytes(3000)
    file.write_bytes(data)
    if how == "gone":
        file.unlink()
    for _ in range(2):
        owner = Folder(str(path), 1 << 20)
        shelf = owner.shelf(1, 6, 6000)
        for number in range(6):
            got = owner.get(shelf, number, 3, 1000, Scratch(), "once")
            expected = np.full(1000, number, dtype=np.uint8)
            if got is None:
                owner.keep(shelf, number, 3, expected)
                got = owner.get(shelf, number, 3, 1000, Scratch(), "once")
            assert got is not None
            np.testing.assert_array_equal(got, expected)
        assert owner.bytes == size_of(path)
        owner.close()


def test_a_record_that_names_another_chunk_is_none(tmp_path: Path) -> None:
    path = filled(tmp_path / "kept")
    index = path / "00000001.index"
    rows = bytearray(index.read_bytes())
    rows[5 * ROW_BYTES + 8] ^= 1  # the last row, of chunk 5, says 4
    index.write_bytes(rows)
    owner = Folder(str(path), 1 << 20)
    shelf = owner.shelf(1, 6, 6000)
    assert [owner.holds(shelf, number) for number in range(6)] == [True] * 5 + [False]
    got = owner.get(shelf, 4, 3, 1000, Scratch(), "once")
    assert got is not None
    assert set(got.tolist()) == {4}
    owner.close()


async def test_an_entry_that_rots_is_said_and_decoded_again(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store(tmp_path / "s.zarr")
    async with stream(path, folder) as source:
        await rows_of(source)
    spoil(folder / "00000001.data", 100, 5000)
    async with stream(path, folder) as source:
        for _ in range(2):
            np.testing.assert_array_equal(await rows_of(source), numbers(0))
        assert (told(source).damaged, told(source).misses) == (2, 2)
    assert sum("is damaged" in record.message for record in caplog.records) == 1


async def test_a_file_that_is_cut_under_the_map_is_noticed(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    async with stream(path, folder) as source:
        await rows_of(source)
        os.truncate(folder / "00000001.data", 3 * CHUNK_BYTES)
        np.testing.assert_array_equal(await rows_of(source), numbers(0))
        assert told(source).damaged == CHUNKS


FILL = """
import asyncio, os, resource, sys
from streamtrain.data.stream import ZarrStream

async def main(store, cache, limit):
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    async with ZarrStream(
        store, batch_size=50, output="numpy", memory="8MiB", cache=0, disk_cache=cache, disk_cache_bytes="1MiB"
    ) as source:
        for epoch in range(1000):
            count = 0
            async for batch in source:
                count += len(batch)
            now = source.statistics().disk_cache
            print(count, now.bytes, now.hits, now.off, os.getpid(), flush=True)
            if limit or sys.stdin.readline() == "end\\n":
                break

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def started(path: Path, cache: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FILL, str(path), str(cache), str(limit)]
    root, pipe = Path(__file__).parents[2], subprocess.PIPE
    return subprocess.Popen(command, text=True, cwd=root, stdin=pipe, stdout=pipe, stderr=pipe)


async def test_a_kill_leaves_nothing_torn_and_frees_the_folder(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    process = started(path, folder)
    assert process.stdout is not None
    first = process.stdout.readline().split()
    assert first[0] == "640"
    with pytest.raises(EnvironmentProblem, match=rf"belongs to another process .*pid {process.pid} on "):
        await stream(path, folder).open()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    for cut in (0, 7):  # and where the machine went down before all was on the disk
        if cut:
            os.truncate(folder / "00000001.index", CHUNKS * ROW_BYTES - cut)
        async with stream(path, folder) as source:
            np.testing.assert_array_equal(await rows_of(source), numbers(0))
            assert told(source).misses == (1 if cut else 0)


async def test_a_full_disk_switches_it_off_and_the_epoch_ends(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    process = started(path, folder, limit=300_000)
    out, err = process.communicate(timeout=60)
    count, size, _, off = out.split(maxsplit=4)[:4]
    assert (count, off) == ("640", "None"), err
    shutil.rmtree(folder)
    process = started(path, folder, limit=6 * CHUNK_BYTES)
    out, err = process.communicate(timeout=60)
    count, size, _, off = out.split(maxsplit=4)[:4]
    assert (count, off) == ("640", "File"), err  # "File too large": the limit stands for the disk's end
    assert int(size) <= 7 * CHUNK_BYTES
    assert err.count("nothing more is kept") == 1
    async with stream(path, folder) as source:
        np.testing.assert_array_equal(await rows_of(source), numbers(0))
        assert told(source).off is None


# ---- one owner


async def test_streams_of_one_process_share_a_folder_of_one_size(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    train, valid = stream(path, folder, split=(0.0, 0.5)), stream(path, folder, split=(0.0, 0.5), shuffle=False)
    await train.open()
    await valid.open()
    for source in (train, valid):
        async for _ in source:
            pass
    assert (told(train).hits, told(train).misses) == (5, 5)
    with pytest.raises(ConfigError, match=r"in use with 1\.0 MiB, and can't have 2\.0 MiB"):
        await stream(path, folder, disk_cache_bytes="2MiB").open()
    await train.aclose()
    async for _ in valid:
        pass
    assert told(valid).misses == 5
    await valid.aclose()
    async with stream(path, folder, disk_cache_bytes="2MiB") as other:
        await rows_of(other)


def open_in(folder: Path) -> list[str]:
    """The files in a folder that this process has open or mapped."""
    names = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [name for name in names if name.startswith(str(folder))]


async def test_a_closed_stream_has_let_go_and_takes_the_folder_again(tmp_path: Path, folder: Path) -> None:
    path = store(tmp_path / "s.zarr")
    source = stream(path, folder)
    await rows_of(source)
    before = told(source)
    await source.aclose()
    assert told(source) == before
    (await asyncio.to_thread(Folder, str(folder), 1 << 20)).close()  # nobody else has it
    await rows_of(source)
    assert told(source).misses == 0
    await source.aclose()
    assert not open_in(folder)


async def test_a_stream_that_is_dropped_lets_go_too(tmp_path: Path, folder: Path) -> None:
    source = stream(store(tmp_path / "s.zarr"), folder)
    await source.open()
    assert under(KeptReader, object()) is None
    del source
    (await asyncio.to_thread(Folder, str(folder), 1 << 20)).close()


def in_a_fork(job: Callable[[], str]) -> Callable[[], str]:
    """Begin a job in a forked child; what is returned ends it, and tells what it said."""
    told, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads run, and the child does without them
        pid = os.fork()
    if not pid:
        try:
            os.write(tell, job().encode())
        finally:
            os._exit(0)
    os.close(tell)

    def said() -> str:
        with open(told, encoding="utf-8") as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        return text

    return said


def test_a_fork_is_told_that_the_folder_is_its_parents_and_writes_nothing_there(folder: Path) -> None:
    cache = DiskCache(str(folder), 1 << 20)
    owner = cache.open()
    shelf = owner.shelf(1, 6, 6000)

    def worker() -> str:
        owner.keep(shelf, 2, 3, np.full(1000, 2, dtype=np.uint8))
        try:
            cache.open()
        except EnvironmentProblem as error:
            return str(error)
        return "it was opened"

    said = in_a_fork(worker)
    owner.keep(shelf, 1, 3, np.full(1000, 1, dtype=np.uint8))
    assert re.search(rf"belongs to another process that is running: pid {os.getpid()} on ", said())
    got = owner.get(shelf, 1, 3, 1000, Scratch(), "once")
    assert got is not None
    assert set(got.tolist()) == {1}
    cache.close()


def test_a_fork_that_lives_on_does_not_hold_its_parents_folder(folder: Path) -> None:
    cache = DiskCache(str(folder), 1 << 20)
    held = cache.open()  # as a thread of the parent might hold it, which is never let go of in the child
    wait, go = os.pipe()

    def lives_on() -> str:
        os.close(go)
        return f"{os.read(wait, 1)!r} {held.off}"

    said = in_a_fork(lives_on)
    os.close(wait)
    with open(go, "wb") as end:
        cache.close()
        again = DiskCache(str(folder), 1 << 20)
        again.open()
        end.write(b"x")
    assert said() == "b'x' it is closed"
    again.close()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        Folder(str(tmp_path), 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["00000007.data", "00000007.index", "owner"])
def test_a_link_in_its_folder_is_refused_and_what_it_leads_to_is_left_alone(folder: Path, name: str) -> None:
    Folder(str(folder), 1 << 20).close()
    precious = folder.parent / "precious"
    precious.write_text("x" * 100)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(precious)
    with pytest.raises(EnvironmentProblem, match=rf"can't be used: .*{name} is a link"):
        Folder(str(folder), 1 << 20)
    assert precious.read_text() == "x" * 100
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(EnvironmentProblem, match=rf"can't be used: .*{name} is no regular file"):
        Folder(str(folder), 1 << 20)


def test_advice_on_an_entry_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *advice: given.append(advice))
    segment = Segment(str(tmp_path), 1, 1 << 12, mapped=True, owner=None)
    for number in range(2):
        segment.write(*segment.reserve(64), (1, number, 1), np.zeros(64, dtype=np.uint8))
    segment.forget(0)
    assert [segment.advise(row, os.POSIX_FADV_WILLNEED) for row in range(2)] == [0, 64]
    assert given == [(64, 64, os.POSIX_FADV_WILLNEED)]


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentProblem, match=r"disk_cache='.*file/cache' can't be used: Not a directory"):
        Folder(str(tmp_path / "file" / "cache"), 1 << 20)


@pytest.mark.parametrize(
    ("given", "size", "place", "capacity"),
    [
        ("20GiB", None, None, 20 << 30),
        (1 << 20, None, None, 1 << 20),
        ("/x/y", None, "/x/y", 50 << 30),
        ("/x/y", "1GB", "/x/y", 10**9),
        (Path("/x/50GiB"), 5, "/x/50GiB", 5),
    ],
)
def test_a_size_alone_means_the_users_own_cache(
    given: Any, size: Any, place: str | None, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/caches")
    made = disk_cache_of(given, size)
    assert made is not None
    assert (made.path, made.capacity) == (place or "/home/me/caches/streamtrain/chunks", capacity)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_place() == "/home/me/.cache/streamtrain/chunks"


@pytest.mark.parametrize("given", [None, 0, "0", False])
def test_nothing_asked_for_is_nothing(given: Any) -> None:
    assert disk_cache_of(given, None) is None
