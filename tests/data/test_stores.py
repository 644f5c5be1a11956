"""What several stores as one dataset promise: each sample of each once an epoch, shuffled across them, in any split."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError, DataError

quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def write(folder: Path, rows: list[int], chunks: list[int], columns: int = 3) -> NDArray[np.float32]:
    """A store for each number of rows; the rows of all, one after another."""
    start, parts = 0, []
    for number, (count, chunk) in enumerate(zip(rows, chunks, strict=True)):
        part = np.arange(start, start + count * columns, dtype=np.float32).reshape(count, columns)
        group = zarr.create_group(folder / f"part-{number:02}.zarr")
        group.create_array("x", data=part, chunks=(chunk, columns))
        group.create_array("y", data=part[:, 0].astype(np.int64), chunks=(max(1, chunk // 2),))
        start += part.size
        parts.append(part)
    return np.concatenate(parts)


def stream(store: Any, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 7, "shuffle": "block", "output": "numpy"}
    return ZarrStream(store, **{**given, **keywords})


async def epoch(source: ZarrStream) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Numbers, inputs and targets of a pass."""
    found = [(batch.index.copy(), batch.inputs.copy(), batch.targets.copy()) async for batch in source]
    numbers, inputs, targets = (np.concatenate(part) for part in zip(*found, strict=True))
    return numbers, inputs, targets


@quick
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=4),
    st.sampled_from([False, "block", "global"]),
    st.sampled_from(["range", "chunk", "sample"]),
    st.tuples(st.integers(0, 8), st.integers(0, 8)),
    st.integers(1, 5),
)
def test_both_sides_of_a_split_are_all_samples_of_all_stores_once(
    stores: list[tuple[int, int]], shuffle: Any, split_by: Any, cut: tuple[int, int], blocks: int
) -> None:
    async def scenario(folder: Path) -> None:
        rows = write(folder, [count for count, _ in stores], [chunk for _, chunk in stores])
        at = min(len(rows) - 1, 1 + cut[0] * len(rows) // 9) if len(rows) > 1 else 0
        seen: list[int] = []
        for split in [(0, at), (at, len(rows))] if at else [(0, len(rows))]:
            given = {"shuffle": shuffle, "split": split, "split_by": split_by, "shuffle_blocks": blocks}
            async with stream(str(folder / "part-*.zarr"), **given) as source:
                numbers, inputs, targets = await epoch(source)
            assert len(numbers) == split[1] - split[0]
            assert (inputs == rows[numbers]).all()
            assert (targets == rows[numbers, 0]).all()
            seen += numbers.tolist()
        assert sorted(seen) == list(range(len(rows)))

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(Path(folder)))


async def test_a_block_draws_from_several_stores(tmp_path: Path) -> None:
    write(tmp_path, [40, 40, 40, 40], [10, 10, 10, 10])
    async with stream([tmp_path / f"part-{n:02}.zarr" for n in range(4)], batch_size=40, shuffle_blocks=16) as source:
        async for batch in source:
            assert len({int(number) // 40 for number in batch.index}) == 4


async def test_a_position_goes_on_and_knows_other_stores(tmp_path: Path) -> None:
    write(tmp_path, [23, 5, 31], [4, 4, 10])
    glob = str(tmp_path / "part-*")
    async with stream(glob) as source:
        whole = [batch.index.tolist() async for batch in source]
    async with stream(glob) as source:
        passing = aiter(source)
        first = [(await anext(passing)).index.tolist() for _ in range(3)]
        state = json.loads(json.dumps(source.state_dict()))
    async with stream(glob) as source:
        source.load_state_dict(state)
        assert first + [batch.index.tolist() async for batch in source] == whole
    async with stream([tmp_path / "part-00.zarr", tmp_path / "part-02.zarr"]) as source:
        with pytest.raises(DataError, match="the dataset changed since"):
            source.load_state_dict(state)


def test_a_position_in_a_thousand_stores_is_small(tmp_path: Path) -> None:
    write(tmp_path, [3] * 60, [2] * 60)
    assert len(json.dumps(stream(str(tmp_path / "part-*")).state_dict())) <= 1024


async def test_windows_never_cross_a_stores_edge_and_stay_in_their_split(tmp_path: Path) -> None:
    rows = write(tmp_path, [20, 3, 30], [6, 6, 6])
    edges = [0, 20, 23, 53]
    starts = [edges[s] + n for s, count in ((0, 16), (2, 26)) for n in range(count)]
    seen = []
    for split in ((0.0, 0.6), (0.6, 1.0)):
        async with stream([tmp_path / "part-00.zarr", tmp_path / "part-02.zarr"], window=5, split=split) as source:
            numbers, inputs, _ = await epoch(source)
        for number, window in zip(numbers, inputs, strict=True):
            assert (window == rows[starts[number] : starts[number] + 5]).all()
        seen.append(numbers)
    assert not set(seen[0]) & set(seen[1])
    assert len(seen[0]) + len(seen[1]) == 42 - 4


async def test_stores_of_other_samples_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [5], [5])
    write(tmp_path / "b", [5], [5], columns=4)
    with pytest.raises(DataError, match=r"float32\[3\] in the first store, of float32\[4\] in store number 2"):
        await stream([tmp_path / "a" / "part-00.zarr", tmp_path / "b" / "part-00.zarr"]).open()


async def test_a_glob_that_matches_nothing_and_an_empty_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no store matches"):
        await stream(str(tmp_path / "nothing-*")).open()
    with pytest.raises(ConfigError, match="empty list"):
        stream([])


async def test_inputs_are_stacked_as_channels(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    data = {name: np.random.default_rng(n).random((25, 4, 6), dtype=np.float32) for n, name in enumerate("uvw")}
    for number, (name, values) in enumerate(data.items()):
        group.create_array(name, data=values, chunks=(3 + number, 4 - number, 6))
    group.create_array("y", data=np.arange(25))
    async with stream(tmp_path / "s", inputs=["u", "v", "w"], targets="y", stack=True) as source:
        numbers, inputs, targets = await epoch(source)
    assert (inputs == np.stack([data[name] for name in "uvw"], axis=1)[numbers]).all()
    assert (targets == numbers).all()


async def test_what_differs_cannot_be_stacked(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("u", data=np.zeros((5, 2), dtype=np.float32))
    group.create_array("v", data=np.zeros((5, 3), dtype=np.float32))
    with pytest.raises(DataError, match="stack=True"):
        await stream(tmp_path / "s", inputs=["u", "v"], targets=None, stack=True).open()


async def test_an_empty_store_among_several_is_named(tmp_path: Path) -> None:
    for name, rows in (("one", 3), ("none", 0), ("two", 3)):
        zarr.create_group(tmp_path / name).create_array("x", shape=(rows, 2), chunks=(2, 2), dtype="f4")
    with pytest.raises(DataError, match=r"none: arrays 'x' have 0 samples") as caught:
        await ZarrStream([tmp_path / name for name in ("one", "none", "two")], inputs="x", batch_size=2).open()
    assert "leave it out" in caught.value.hint
