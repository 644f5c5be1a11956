"""What selecting places of samples promises: these places, in this order, of the arrays that have the axis."""

from __future__ import annotations

import asyncio
import logging
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

quick = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
DATA: NDArray[np.float32] = np.arange(20 * 6 * 4, dtype=np.float32).reshape(20, 6, 4)


def write(path: Any, chunks: tuple[int, ...]) -> Any:
    group = zarr.create_group(path)
    group.create_array("x", data=DATA, chunks=chunks, dimension_names=("time", "level", "lon"))
    group.create_array("y", data=DATA[:, 0, 0], dimension_names=("time",))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = write(tmp_path_factory.mktemp("selected") / "data.zarr", (7, 2, 4))
    return path


async def epoch(store: Any, **keywords: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs and targets in the order of their numbers."""
    given: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 3, "shuffle": "block", "output": "numpy"}
    async with ZarrStream(store, **{**given, **keywords}) as source:
        found = [(batch.index.copy(), batch.inputs.copy(), batch.targets.copy()) async for batch in source]
    numbers, inputs, targets = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(numbers)
    return inputs[order], targets[order]


@quick
@given(
    st.tuples(st.integers(1, 21), st.integers(1, 7), st.integers(1, 5)),
    st.lists(st.integers(-6, 5), min_size=1, max_size=7),
    st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.booleans(),
)
def test_exactly_these_places_in_this_order(
    chunks: tuple[int, ...], levels: list[int], lons: list[int] | None, windows: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(folder, chunks)
        select: dict[int | str, list[int]] = {"level": levels} if lons is None else {"level": levels, 2: lons}
        more: dict[str, Any] = {"window": {"time": 3}} if windows else {}
        inputs, targets = asyncio.run(epoch(folder, select=select, **more))
    expected = DATA[:, levels] if lons is None else DATA[:, levels][:, :, lons]
    if windows:
        starts = np.arange(18)[:, None] + np.arange(3)
        assert (targets == DATA[:, 0, 0][starts]).all()
        expected = expected[starts]
    assert inputs.shape == expected.shape
    assert (inputs == expected).all()


async def test_chunks_from_which_nothing_is_taken_are_not_read(store: Path) -> None:
    async with ZarrStream(store, inputs="x", select={"level": [4]}, batch_size=20, output="numpy") as source:
        async for _ in source:
            pass
        assert source.statistics().chunks == 3


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"level": [6]}, "axis 'level', which has 6 places"),
        ({"lvl": [0]}, "names the axis 'lvl'"),
        ({3: [0]}, r"names axis 3; array 'x' has shape \(20, 6, 4\)"),
        ({"level": []}, "takes nothing"),
        ({"level": ["a"]}, "the store has no coordinate array of it"),
        ({2: [0.5]}, "an axis by number takes positions"),
        ({"level": slice(0, 3)}, "the store has no coordinate array of it"),
        ({2: slice(0, 3, -1)}, "step of a slice must be"),
        ({2: slice(9, 12)}, "takes nothing of axis 2"),
        ({"level": [True]}, "must be places or values, not True"),
        (3, "must be a dict"),
    ],
    ids=str,
)
async def test_what_cannot_be_selected_is_refused(store: Path, select: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        await epoch(store, select=select)


CUBE: NDArray[np.float32] = np.arange(6 * 6 * 4, dtype=np.float32).reshape(6, 6, 4)
MASK: NDArray[np.int64] = np.arange(24).reshape(6, 4)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six times of a map beside arrays of its places: as many latitudes as times."""
    path: Path = tmp_path_factory.mktemp("static") / "data.zarr"
    group = zarr.create_group(path)
    group.create_array("x", data=CUBE, chunks=(4, 3, 3), dimension_names=("time", "lat", "lon"))
    group.create_array("mask", data=MASK, chunks=(4, 3), dimension_names=("lat", "lon"))
    group.create_array("turned", data=MASK.repeat(2, axis=1)[:, :6], dimension_names=("lat", "time"))
    group.create_array("obs", data=MASK, dimension_names=("obs", "lon"))
    group.create_array("short", data=MASK[:5], dimension_names=("obs", "lon"))
    group.create_array("nameless", data=MASK)
    return path


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
async def test_an_array_without_the_sample_axis_is_the_same_for_all_samples(static: Path, shuffle: Any) -> None:
    inputs, targets = await epoch(static, targets="mask", shuffle=shuffle)
    assert (inputs == CUBE).all()
    assert targets.shape == (6, 6, 4)
    assert (targets == MASK).all()


async def test_of_several_sample_axes_an_array_has_those_of_its_names(static: Path) -> None:
    inputs, targets = await epoch(static, targets="mask", sample_axes=(0, 1))
    assert (inputs == CUBE.reshape(36, 4)).all()
    assert (targets == np.tile(MASK, (6, 1))).all()


async def test_samples_are_found_along_the_axis_of_their_name(static: Path) -> None:
    _, targets = await epoch(static, targets="turned")
    assert (targets == MASK.repeat(2, axis=1)[:, :6].T).all()


async def test_an_array_without_the_sample_axis_is_cut_like_the_others(static: Path) -> None:
    inputs, targets = await epoch(static, targets="mask", crop={"lat": 2}, select={"lon": [3, 1]})
    rows = inputs[:, :, 0] // 4 % 6  # the latitudes of each sample's crop
    assert (targets == MASK[rows.astype(int)][:, :, [3, 1]]).all()
    selected, beside = await epoch(static, targets="mask", select={"lat": [1, 5], "time": [0, 2]})
    assert (selected == CUBE[[0, 2]][:, [1, 5]]).all()
    assert (beside == MASK[[1, 5]]).all()


@pytest.mark.parametrize(
    "keywords",
    [{}, {"sample_axes": (0, 1)}, {"window": {"time": 2}}, {"crop": {"lat": 2}}, {"select": {1: [0, 2]}, "cache": 0}],
    ids=str,
)
@pytest.mark.parametrize("dims", [("time", "lat"), None])
async def test_an_array_without_any_axis_is_the_same_for_all_samples(
    tmp_path: Path, dims: Any, keywords: dict[str, Any]
) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("x", data=MASK, chunks=(2, 3), dimension_names=dims)
    group.create_array("one", data=np.array(2.5))
    if dims is None and keywords.keys() & {"window", "crop"}:
        keywords = {name: {("time", "lat").index(axis): n for axis, n in v.items()} for name, v in keywords.items()}
    _, found = await epoch(tmp_path / "s", targets="one", **keywords)
    assert found.shape == (24 if "sample_axes" in keywords else 5 if "window" in keywords else 6,)
    assert (found == 2.5).all()
    with pytest.raises(DataError, match=r"'one' has shape \(\)") as caught:
        await epoch(tmp_path / "s", inputs="one", targets="x")
    assert "the first one named" in caught.value.hint


async def test_pairing_by_rows_against_the_names_is_said_once(static: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "streamtrain"):
        _, targets = await epoch([static, static], targets="obs")
        await epoch(static, targets="nameless")
        await epoch(static, targets="mask")
    assert (targets == np.concatenate([MASK, MASK])).all()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["array 'obs' is paired with 'x' row by row, though its axis 0 is named 'obs' and not 'time'"]


async def test_other_numbers_of_samples_hint_at_the_names(static: Path) -> None:
    with pytest.raises(DataError, match="numbers of samples: x: 6, short: 5") as caught:
        await epoch(static, targets="short")
    assert "the same for all samples where the names of its dimensions say so" in caught.value.hint


async def test_a_number_takes_nothing_of_an_axis_that_only_has_its_place(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("x", data=MASK)
    group.create_array("y", data=np.arange(30).reshape(6, 5))
    group.create_array("like", data=-MASK)
    group.create_array("flat", data=MASK[:, 0])
    with pytest.raises(DataError, match="axis 1: array 'x' has 4 places there, 'y' 5, and the same are taken of both"):
        await epoch(tmp_path / "s", select={1: [0, 2]})
    with pytest.raises(DataError, match="array 'x' has 4 places there, 'y' 5"):
        await epoch(tmp_path / "s", targets=["like", "y"], select={1: [0, 2]}, window={0: 2})
    inputs, targets = await epoch(tmp_path / "s", targets="like", select={1: [0, 2], 0: [1, 4]})
    assert (inputs == MASK[[1, 4]][:, [0, 2]]).all()
    assert (targets == -inputs).all()
    assert (await epoch(tmp_path / "s", targets="flat", select={1: [0, 2]}))[1].shape == (6,)


async def test_a_number_takes_of_the_axis_of_its_name_alone(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("x", data=MASK, dimension_names=("time", "lat"))
    group.create_array("y", data=np.arange(30).reshape(6, 5), dimension_names=("time", "level"))
    inputs, targets = await epoch(tmp_path / "s", select={1: [0, 2]})
    assert (inputs == MASK[:, [0, 2]]).all()
    assert (targets == np.arange(30).reshape(6, 5)).all()
