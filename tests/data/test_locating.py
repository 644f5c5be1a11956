"""What `locate` promises: the store, the rows and the coordinates of a sample are where its numbers came from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from streamtrain.data.batch import Batch
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError

DAYS, LAT, LON = 30, 8, 6
X: NDArray[np.int32] = np.arange(DAYS * LAT * LON, dtype=np.int32).reshape(DAYS, LAT, LON)
LATS = np.linspace(70, 0, LAT)


def write(path: Path, first: int, last: int) -> Path:
    group = zarr.create_group(path)
    group.create_array("x", data=X[first:last], chunks=(7, 4, 4), dimension_names=("time", "lat", "lon"))
    group.create_array("y", data=np.arange(first, last), dimension_names=("time",))
    group.create_array("time", data=np.arange(first, last)).attrs["units"] = "days since 2001-01-01"
    group.create_array("lat", data=LATS)
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("located")
    return [write(folder / "a", 0, 11), write(folder / "b", 11, DAYS)]


def stream(stores: Any, **keywords: Any) -> ZarrStream:
    return ZarrStream(stores, **{"inputs": "x", "batch_size": 5, "output": "numpy", "shuffle": "block", **keywords})


def batches(source: ZarrStream) -> list[Batch]:
    async def read() -> list[Batch]:
        async with source:
            return [Batch(batch.inputs.copy(), None, batch.index.copy()) async for batch in source]

    return asyncio.run(read())


def test_one_number_gives_one_place(stores: list[Path]) -> None:
    source = stream(stores)
    found = source.locate(13)
    assert (found.store, found.row, found.stop) == (str(stores[1]), (2,), (3,))
    assert found.coordinates == {"time": np.datetime64("2001-01-14")}
    assert found.crop == {}


CASES: list[dict[str, Any]] = [
    {},
    {"window": 4, "stride": 2},
    {"window": 3, "horizon": 2, "targets": "y"},
    {"window": {"lat": 3, "lon": 2}},
    {"split": (0.3, 0.8)},
    {"split": (0.3, 0.8), "split_by": "chunk"},
    {"indices": [3, 17, 21]},
    {"select": {"lat": slice(60, 30), "time": slice("2001-01-05", None)}},
    {"sample_axes": (0, 1)},
    {"crop": {"lat": 3, "lon": 2}},
    {"window": 4, "stride": 4, "jitter": 3},
]


@pytest.mark.parametrize("keywords", CASES, ids=str)
def test_every_sample_of_a_pass_is_found_again(stores: list[Path], keywords: dict[str, Any]) -> None:
    source = stream(stores, **keywords)
    firsts = {str(stores[0]): 0, str(stores[1]): 11}
    for batch in batches(source):
        for inputs, at in zip(batch.inputs, source.locate(batch.index, epoch=0), strict=True):
            day, lat, lon = (int(n) for n in np.unravel_index(int(np.ravel(inputs)[0]), X.shape))
            assert at.row[0] == day - firsts[at.store]
            assert at.coordinates["time"] == np.datetime64("2001-01-01") + np.timedelta64(day, "D")
            if "lat" in at.coordinates:
                assert at.coordinates["lat"] == LATS[lat]
            assert at.crop == ({"lat": lat, "lon": lon} if "crop" in keywords else {})
            assert at.row[1:] == ((lat, lon) if len(at.row) == 3 else (lat,))[: len(at.row) - 1]


def test_a_window_ends_behind_its_target(stores: list[Path]) -> None:
    assert stream(stores, window=3, horizon=2, targets="y").locate(1).stop == (6,)


def test_arrays_without_names_are_found_by_their_rows(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "s", data=X, chunks=(7, 8, 6))
    source = ZarrStream(tmp_path / "s", batch_size=4, crop={1: 2}, output="numpy")
    assert source.locate([4])[0].row == (4,)
    assert source.locate([4], epoch=1)[0].crop.keys() == {1}
    assert source.locate([]) == []


def test_rows_of_different_lengths_are_told_no_coordinate_of_another_rows_element(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    for name, values in (("tokens", np.arange(40)), ("pos", np.arange(40) * 10)):
        group.create_array(name, data=values, dimension_names=("pos",))
    group.create_array("ends", data=np.arange(0, 41, 10))
    source = stream(tmp_path / "s", inputs="tokens", ragged={"tokens": "ends"})
    found = source.locate(3)
    assert (found.row, found.stop, found.coordinates) == ((3,), (4,), {})


@pytest.mark.parametrize("index", [-1, DAYS, 0.5, "a", [[1]]], ids=str)
def test_what_is_no_sample_is_refused(stores: list[Path], index: Any) -> None:
    with pytest.raises(ConfigError, match="locate takes"):
        stream(stores).locate(index)


async def test_it_is_asked_from_a_thread_beside_a_loop(stores: list[Path]) -> None:
    async with stream(stores) as source:
        found = await asyncio.to_thread(source.locate, [0, 29])
    assert [at.row for at in found] == [(0,), (18,)]
