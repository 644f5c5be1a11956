"""What skipping promises: the rows of bad chunks, no others, every time the same, counted, said, and not too many."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain import ZarrStream, mix
from streamtrain.data.mix import Mix
from streamtrain.data.skipping import Skips, compact
from streamtrain.errors import ConfigError, DataError

ROWS, CHUNK = 240, 12
X = np.arange(ROWS * 3, dtype="float32").reshape(ROWS, 3)
Y = np.arange(ROWS, dtype="int64") * 10


def store(folder: Path, *, bad: tuple[int, ...] = (2, 7), bad_targets: tuple[int, ...] = (), codec: Any = None) -> Path:
    """`x` in chunks of 12 rows, `y` in chunks of 30; the named ones are cut."""
    group = zarr.create_group(str(folder), overwrite=True)
    group.create_array("x", data=X, chunks=(CHUNK, 3), compressors=codec)
    group.create_array("y", data=Y, chunks=(30,), compressors="auto")
    for path in [*(folder / f"x/c/{i}/0" for i in bad), *(folder / f"y/c/{i}" for i in bad_targets)]:
        path.write_bytes(path.read_bytes()[:-3])
    return folder


def lost(*chunks: int, of: int = CHUNK) -> set[int]:
    return {row for chunk in chunks for row in range(chunk * of, (chunk + 1) * of)}


def stream(path: Path, **options: Any) -> ZarrStream:
    given = {"batch_size": 7, "output": "numpy", "memory": "8MiB", "on_bad_chunk": "skip", "max_skipped": 0.5}
    return ZarrStream(path, inputs="x", targets="y", **{**given, **options})


def checked(batch: Any) -> list[int]:
    """The batch's samples, each with its own values."""
    assert 0 < len(batch) == len(batch.inputs) == len(batch.targets)
    assert np.array_equal(batch.inputs, X[batch.index])
    assert np.array_equal(batch.targets, Y[batch.index])
    assert batch.inputs.ctypes.data % 64 == 0
    found: list[int] = batch.index.tolist()
    return found


async def rows(path: Path, **options: Any) -> list[int]:
    async with stream(path, **options) as source:
        return [row for batch in [checked(batch) async for batch in source] for row in batch]


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
@pytest.mark.parametrize("codec", [None, "auto"])
async def test_the_rows_of_bad_chunks_and_no_others_are_left_out(shuffle: Any, codec: Any, tmp_path: Path) -> None:
    path = store(tmp_path / "s", bad_targets=(3,), codec=codec)
    async with stream(path, shuffle=shuffle) as source:
        found = [row for batch in [checked(batch) async for batch in source] for row in batch]
        statistics = source.statistics()
    expected = lost(2, 7) | lost(3, of=30)
    assert sorted(found) == sorted(set(range(ROWS)) - expected)
    assert (statistics.chunks_skipped, statistics.rows_skipped) == (3, len(expected))


@settings(max_examples=30)
@given(data=st.data())
async def test_the_order_is_that_of_the_whole_without_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """For any memory, threads, batches and prefetch."""
    folder = tmp_path_factory.mktemp("s")
    bad = tuple(sorted(data.draw(st.sets(st.integers(0, 19), max_size=6))))
    shuffle, seed = data.draw(st.sampled_from([False, "block", "global"])), data.draw(st.integers(0, 9))
    options: dict[str, Any] = {"shuffle": shuffle, "seed": seed, "shuffle_blocks": data.draw(st.integers(1, 9))}
    whole = await rows(store(folder / "whole", bad=()), **options)
    ways: dict[str, Any] = {
        "batch_size": data.draw(st.integers(1, 50)),
        "threads": data.draw(st.integers(1, 3)),
        "memory": data.draw(st.sampled_from(["256KiB", "8MiB"])),
        "prefetch": data.draw(st.none() | st.integers(1, 5)),
        "io": data.draw(st.sampled_from(["mmap", "pread", "store"])),
    }
    found = await rows(store(folder / "bad", bad=bad), **options, **ways, max_skipped=1.0)
    assert found == [row for row in whole if row not in lost(*bad)]


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
async def test_resuming_is_exact_and_the_cursor_counts_what_was_skipped(shuffle: Any, tmp_path: Path) -> None:
    path = store(tmp_path / "s", bad=(0, 1, 5, 19))
    whole = await rows(path, shuffle=shuffle)
    async with stream(path, shuffle=shuffle) as source:
        done: list[int] = []
        states: list[tuple[int, dict[str, Any]]] = []
        async for batch in source:
            done += checked(batch)
            states.append((len(done), source.state_dict()))
        assert source.state_dict()["epoch"] == 1
    assert all(state["position"] % 7 == 0 for _, state in states[:-1])
    for count, state in states[:-1:5]:
        async with stream(path, shuffle=shuffle, batch_size=11) as source:
            source.load_state_dict(state)
            rest = [row for batch in [checked(batch) async for batch in source] for row in batch]
        assert whole == whole[:count] + rest


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
async def test_a_run_that_goes_on_may_lose_no_more_of_an_epoch_than_one_that_was_never_cut(
    shuffle: Any, tmp_path: Path
) -> None:
    options = {"shuffle": shuffle, "shuffle_blocks": 2, "memory": "256KiB"}
    path = store(tmp_path / "s", bad=(1, 5, 12, 19))
    async with stream(path, **options, max_skipped=1.0) as source:
        states = [source.state_dict() async for _ in source]
        assert "skipped" not in source.state_dict()  # of a new epoch
        whole = source.statistics().rows_skipped
    assert max(state.get("skipped", 0) for state in states) > 24
    for state in states[:-1]:
        async with stream(path, **options, batch_size=11, max_skipped=1.0) as source:
            source.load_state_dict(state)
            assert source.state_dict() == state
            async for _ in source:
                pass
            assert state.get("skipped", 0) + source.statistics().rows_skipped == whole
        if state.get("skipped", 0) < whole:
            async with stream(path, **options, max_skipped=0.19) as source:
                source.load_state_dict(state)
                with pytest.raises(DataError, match=r"were skipped, more than 0\.19 of the epoch \(45 samples\)"):
                    assert [batch async for batch in source]


async def test_in_a_fit_the_position_tells_what_was_skipped_before_the_last_step(tmp_path: Path) -> None:
    path = store(tmp_path / "s", bad=(1, 5, 12, 19))
    async with stream(path, shuffle="block") as source:
        told = [(batch.cursor, source.state_dict()) async for batch in source][:-1]
    async with stream(path, shuffle="block") as source:
        source.follow(True)
        assert len([batch async for batch in source]) == len(told) + 1  # read ahead of what is trained
        for cursor, state in told:
            source.trained(cursor)
            assert source.state_dict() == state


async def test_a_mix_goes_anywhere_with_what_its_sources_have_skipped(tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{"shuffle": "block", "shuffle_blocks": 3}, {"shuffle": False}]
    paths = [store(tmp_path / "a", bad=(1, 5, 12)), store(tmp_path / "b", bad=(3,))]

    def mixed() -> Mix:
        return mix(
            [stream(path, **how) for path, how in zip(paths, options, strict=True)], weights=[1, 1], stop="first"
        )

    async with mixed() as source:
        states = [source.state_dict() async for _ in source][:-1]
        assert [len(each) for each in states[-1]["sources"]] == [4, 4]
        for state in (states[-1], states[2], states[0]):  # back, in one process
            source.load_state_dict(state)
            assert source.state_dict() == state
            assert len([batch async for batch in source]) == len(states) - states.index(state)
    for state in states[::4]:
        async with mixed() as source:
            source.load_state_dict(state)
            assert [source.state_dict() async for _ in source][:-1] == states[states.index(state) + 1 :]


@pytest.mark.parametrize("skipped", [-1, 8, True, "1"])
async def test_a_position_that_has_skipped_what_cannot_be_is_none(skipped: Any, tmp_path: Path) -> None:
    async with stream(store(tmp_path / "s")) as source:
        with pytest.raises(DataError, match="'skipped' is"):
            source.load_state_dict({**source.state_dict(), "position": 7, "skipped": skipped})


async def test_a_transform_sees_only_what_is_left(tmp_path: Path) -> None:
    seen: list[int] = []

    def transform(batch: Any) -> Any:
        seen.append(len(batch))
        batch.inputs[:] = X[batch.index]
        return batch

    path = store(tmp_path / "s", bad=(1, 2, 3))
    found = await rows(path, transform=transform, shuffle=False)
    assert found == sorted(set(range(ROWS)) - lost(1, 2, 3))
    assert min(seen) > 0


async def test_each_bad_chunk_is_said_once_however_many_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store(tmp_path / "s", bad_targets=(1,))
    with caplog.at_level(logging.WARNING, "streamtrain"):
        async with stream(path) as source:
            for _ in range(3):
                assert sum([len(batch) async for batch in source]) == ROWS - len(lost(2, 7) | lost(1, of=30))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert any(re.match(r"skipped, with all its rows: array 'x': chunk 2\.0 \(rows \[24:36", text) for text in said)


async def test_too_many_stop_the_pass_at_the_same_batch_each_time(tmp_path: Path) -> None:
    path = store(tmp_path / "s", bad=(2, 7, 11))
    given: list[list[int]] = []

    async def read() -> None:
        given.append([])
        async with stream(path, max_skipped=0.1, memory="256KiB") as source:
            async for batch in source:
                given[-1].extend(checked(batch))

    for _ in range(3):
        with pytest.raises(DataError, match=r"36 samples in 3 bad chunks were skipped, more than 0\.1 .*array 'x'"):
            await read()
    assert given[0] == given[1] == given[2]
    assert len(await rows(path, max_skipped=0.15)) == ROWS - 36


async def test_by_default_a_twentieth_may_be_lost_and_one_bad_chunk_ends_a_pass_that_does_not_skip(
    tmp_path: Path,
) -> None:
    path = store(tmp_path / "s", bad=(4,))
    options: dict[str, Any] = {"inputs": "x", "batch_size": 8, "output": "numpy"}
    async with ZarrStream(path, **options, on_bad_chunk="skip") as source:
        assert sum([len(batch) async for batch in source]) == ROWS - CHUNK
    async with ZarrStream(path, **options) as source:
        with pytest.raises(DataError, match=r"chunk 4\.0"):
            [batch async for batch in source]


async def test_a_split_whose_chunks_are_all_bad_gives_no_batch(tmp_path: Path) -> None:
    assert await rows(store(tmp_path / "s", bad=(2, 3)), split=(24, 48), max_skipped=1.0) == []


async def test_a_chunk_that_recovers_stays_left_out_while_the_stream_lives(tmp_path: Path) -> None:
    path = store(tmp_path / "s", bad=(2,))
    async with stream(path) as source:
        first = [checked(batch) async for batch in source]
        (path / "x/c/2/0").write_bytes(X[24:36].tobytes())
        assert [checked(batch) async for batch in source] == first
    assert await rows(path) == list(range(ROWS))


async def test_chunks_of_a_part_of_the_row_cost_the_row(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "s"))
    group.create_array("x", data=X, chunks=(CHUNK, 1), compressors=None)
    (tmp_path / "s/x/c/3/1").write_bytes(b"short")
    async with ZarrStream(tmp_path / "s", inputs="x", batch_size=7, output="numpy", on_bad_chunk="skip") as source:
        found = [row async for batch in source for row in batch.index.tolist()]
    assert found == sorted(set(range(ROWS)) - lost(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_chunk": "ignore"}, "on_bad_chunk must be one of"),
        ({"max_skipped": 1.5}, "max_skipped must be a share"),
        ({"max_skipped": True}, "max_skipped must be a share"),
        ({"verify": "twice"}, "verify must be one of"),
    ],
    ids=str,
)
def test_arguments_are_checked(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(tmp_path, **options)


@given(
    columns=st.integers(1, 30).flatmap(
        lambda n: st.tuples(st.just(np.arange(n * 2).reshape(n, 2)), st.sets(st.integers(0, n - 1)))
    )
)
def test_rows_move_up_in_place(columns: tuple[NDArray[Any], set[int]]) -> None:
    column, dropped = columns
    expected = np.delete(column, sorted(dropped), axis=0)
    (found,) = compact([column], np.array(sorted(dropped), dtype=np.int64))
    assert np.array_equal(found, expected)
    assert found.base is not None
    assert np.shares_memory(found, column) or not len(found)


def test_a_resumed_pass_counts_only_what_it_would_have_given() -> None:
    skips = Skips(origin=10, end=20, samples=25, most=1.0)
    assert len(skips.within(0, 100, 100)) == skips.rows == skips.chunks == 0
