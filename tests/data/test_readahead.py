"""Arrays that memory can't hold: what will be read is asked for a little ahead, and what was read is let go."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data.cells import CellGrid
from streamtrain.data.disk_cache import DiskCache
from streamtrain.data.feed import Box, Feed, Rows, Site
from streamtrain.data.files import StoreFiles
from streamtrain.data.kept_chunks import KeptReader
from streamtrain.data.readahead import LEAST_CHUNK, LEFT_BEHIND, Readahead
from streamtrain.data.readers import LocalReader
from streamtrain.data.reading import Scratch
from streamtrain.data.stream import ZarrStream
from tests.data.stores import layout_of

ROWS = LEAST_CHUNK // 4
"""Of float32 in the smallest chunk that is asked for."""
CHUNKS = 6
KNOWN = (os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED)


class Telling(LocalReader):
    """Notes the advice that it gives."""

    def __init__(self, folder: Path, memory: int, **keywords: Any) -> None:
        super().__init__(layout_of(folder), StoreFiles(folder), mapped=False, memory=memory, **keywords)
        self.asked: list[int] = []
        self.left: list[int] = []

    def advise(self, chunk: Any, rows: tuple[int, int], advice: int) -> int:
        (self.asked if advice == os.POSIX_FADV_WILLNEED else self.left).append(chunk[0])
        return super().advise(chunk, rows, advice)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six chunks in `x`, raw."""
    folder = tmp_path_factory.mktemp("readahead")
    data = np.arange(CHUNKS * ROWS, dtype=np.float32)
    zarr.create_group(folder).create_array("x", data=data, chunks=(ROWS,), compressors=None)
    return folder


def feed(reader: LocalReader) -> Feed:
    return Feed(Site(reader.layout, (0,), (ROWS,), np.dtype("float32")), reader, None, 0)


def cell(of: Feed, number: int, rows: Rows = slice(None)) -> Iterable[tuple[Feed, Box, Rows]]:
    grid = CellGrid(of.layout.shape, (ROWS,))
    return [(of, Box.of(grid, number), slice(0, ROWS) if isinstance(rows, slice) else rows)]


def nothing(scratch: Scratch) -> None:
    """A job."""


def over(reader: LocalReader) -> Readahead:
    made = Readahead.over([feed(reader)])
    assert made is not None
    return made


@pytest.mark.parametrize(("times", "advised"), [(1, False), (0.9, True)])
def test_only_arrays_that_memory_cannot_hold_get_advice(store: Path, times: float, advised: bool) -> None:
    reader = Telling(store, int(CHUNKS * LEAST_CHUNK * times))
    assert (Readahead.over([feed(reader)]) is not None) == advised


def test_arrays_that_are_read_together_count_together(store: Path) -> None:
    memory = CHUNKS * LEAST_CHUNK
    assert Readahead.over([feed(Telling(store, memory)), feed(Telling(store, memory))]) is not None


def test_chunks_in_the_disk_cache_are_asked_for_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr.create_group(tmp_path / "s").create_array("x", data=np.arange(CHUNKS * ROWS, dtype=np.float32), chunks=(ROWS,))
    monkeypatch.setattr("streamtrain.data.kept_chunks.available_memory", lambda: LEAST_CHUNK)
    inner, cache = Telling(tmp_path / "s", LEAST_CHUNK), DiskCache(str(tmp_path / "kept"), 8 << 20)
    reader = KeptReader(inner, inner.layout, cache, "s", verify="once", inodes=True)
    for kept in (False, True):
        of = Feed(Site(inner.layout, (0,), (ROWS,), np.dtype("float32")), reader, None, 0)
        advice, found = Readahead.over([of]), list[float]()
        assert advice is not None

        def job(scratch: Scratch, of: Feed = of, found: list[float] = found) -> None:
            of.fill(Box((2 * ROWS,), (ROWS,)), slice(0, ROWS), lambda _, values, __: found.extend(values), scratch)

        inner.asked = []
        advice.around(cell(of, 2), job)(Scratch())
        assert found == list(range(2 * ROWS, 3 * ROWS))
        assert inner.asked == ([] if kept else [2])
    cache.close()


def test_small_chunks_get_none(tmp_path: Path) -> None:
    zarr.create_group(tmp_path).create_array("x", data=np.zeros(1000, dtype=np.float32), chunks=(10,), compressors=None)
    assert Readahead.over([feed(Telling(tmp_path, 1))]) is None


@settings(max_examples=30)
@given(st.permutations(range(CHUNKS)), st.integers(1, 6 * 16 * LEAST_CHUNK - 1), st.data())
def test_a_job_is_asked_for_before_its_turn_but_not_long_before(
    store: Path, order: list[int], memory: int, data: st.DataObject
) -> None:
    reader = Telling(store, memory)
    advice = Readahead([reader])
    jobs = {number: advice.around(cell(feed(reader), number), nothing) for number in order}
    if memory >= CHUNKS * LEAST_CHUNK:
        assert jobs == dict.fromkeys(order, nothing)
        return
    room = -(-max(LEAST_CHUNK, memory // 16) // LEAST_CHUNK)
    turns = list(order)
    if data.draw(st.booleans()):  # two threads: neighbours may overtake each other
        turns[1::2], turns[::2] = turns[::2], turns[1::2]
    for done, number in enumerate(turns, 1):
        jobs[number](Scratch())
        assert number in reader.asked
        assert len(set(reader.asked) - set(turns[:done])) <= room
    assert Counter(reader.asked).keys() == set(order)
    leaves_nothing = LEFT_BEHIND * memory < CHUNKS * LEAST_CHUNK
    assert reader.left == (turns if leaves_nothing else [])


def test_scattered_rows_of_raw_chunks_are_not_asked_for(store: Path) -> None:
    reader = Telling(store, 1)
    few, many = np.arange(0, ROWS, 5), np.arange(0, ROWS, 2)
    assert over(reader).around(cell(feed(reader), 0, few), nothing) is nothing
    over(reader).around(cell(feed(reader), 1, many), nothing)(Scratch())
    assert reader.asked == reader.left == [1]


def test_a_job_that_fails_leaves_nothing_behind_either(store: Path) -> None:
    def fail(scratch: Scratch) -> None:
        raise ValueError("no")

    reader = Telling(store, 1)
    with pytest.raises(ValueError, match="no"):
        over(reader).around(cell(feed(reader), 3), fail)(Scratch())
    assert reader.left == [3]


def test_advice_is_on_the_bytes_that_are_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: told.append((start, size)))
    reader = Telling(store, 1)
    assert reader.advise((0,), (0, ROWS), os.POSIX_FADV_WILLNEED) == LEAST_CHUNK
    assert reader.advise((0,), (100, 300), os.POSIX_FADV_WILLNEED) == 800
    assert reader.advise((77,), (0, ROWS), os.POSIX_FADV_WILLNEED) == 0
    assert told == [(0, LEAST_CHUNK), (400, 800)]


def test_advice_on_a_chunk_in_a_shard_is_on_its_part_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.arange(400, dtype=np.float32)
    zarr.create_group(tmp_path).create_array("x", data=data, chunks=(100,), shards=(400,), compressors=None)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: told.append((start, size)))
    reader = Telling(tmp_path, 1)
    assert [reader.advise((number,), (0, 100), os.POSIX_FADV_WILLNEED) for number in range(4)] == [400] * 4
    content = (tmp_path / "x/c/0").read_bytes()
    assert [np.frombuffer(content[a : a + n], "<f4")[0] for a, n in told] == [0, 100, 200, 300]


def test_stored_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    zeros = np.zeros((4000, 10), dtype=np.float32)
    written: Any = {"write_empty_chunks": True}
    codecs: dict[str, Any] = {"raw": None, "zstd": "auto"}
    for name, compressors in codecs.items():
        group = zarr.create_group(tmp_path / name)
        group.create_array("x", data=zeros, chunks=(100, 5), compressors=compressors, config=written)
        real = sum(path.stat().st_size for path in (tmp_path / name / "x" / "c").rglob("*") if path.is_file())
        assert Telling(tmp_path / name, 1).stored_bytes() == real
    zarr.create_group(tmp_path / "none").create_array("x", shape=(4000,), dtype="f4", chunks=(100,))
    assert Telling(tmp_path / "none", 1).stored_bytes() == 0


def test_what_memory_cannot_hold_is_mapped_only_for_scattered_rows(store: Path) -> None:
    files = StoreFiles(store)
    files.opened_at *= 2  # its files count as settled
    reader = LocalReader(layout_of(store), files, mapped=True, memory=1000)
    for few, kept in ((False, 0), (True, 1)):
        found = reader.read((2,), (0, ROWS), Scratch(), few=few)
        assert found is not None
        assert found[0] == 2 * ROWS
        assert len(files._maps) == kept
    assert reader.lane == "pread (mmap for scattered rows)"
    reader.beside(10)
    assert reader.lane == "mmap"
    reader.read((3,), (0, ROWS), Scratch())
    assert len(files._maps) + len(files._placed) == 2


# A whole pass


def terabytes(folder: Path) -> NDArray[np.float32]:
    """An array of 64 TiB; all but the first chunks are absent."""
    group = zarr.create_group(folder)
    group.create_array("x", shape=(1 << 44,), dtype="float32", chunks=(ROWS,), compressors=None)
    data = np.arange(CHUNKS * ROWS, dtype=np.float32)
    (folder / "x" / "c").mkdir()
    for number in range(CHUNKS):
        (folder / "x" / "c" / str(number)).write_bytes(
            data[number * ROWS : (number + 1) * ROWS].astype("<f4").tobytes()
        )
    return data


@pytest.mark.parametrize("shuffle", ["block", False])
def test_a_pass_asks_for_what_it_reads_and_leaves_it(
    tmp_path: Path, shuffle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, told = terabytes(tmp_path), {advice: Counter[str]() for advice in KNOWN}

    def note(fd: int, start: int, size: int, advice: int) -> None:
        told[advice][os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))] += 1
        assert (start, size) == (0, LEAST_CHUNK)

    monkeypatch.setattr(os, "posix_fadvise", note)
    stream = ZarrStream(
        tmp_path, inputs="x", batch_size=1000, shuffle=shuffle, split=(0, len(data)), memory="32MiB", output="numpy"
    )

    async def read() -> tuple[NDArray[Any], NDArray[Any]]:
        async with stream:
            batches = [(batch.inputs.copy(), batch.index.copy()) async for batch in stream]
        values, index = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return values, index

    values, index = asyncio.run(read())
    assert np.array_equal(values, data[index])
    assert np.array_equal(np.sort(index), np.arange(len(data)))
    files = {str(number) for number in range(CHUNKS)}
    assert told[os.POSIX_FADV_WILLNEED].keys() == files
    assert told[os.POSIX_FADV_DONTNEED] == Counter(files)
