"""What any zarr store promises: in memory, zipped, by fsspec or wrapped, it gives what a folder gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore, WrapperStore, ZipStore

from streamtrain.data.stream import ZarrStream

DAYS, LAT, LON = 24, 6, 5
X: NDArray[np.int32] = np.arange(DAYS * LAT * LON, dtype=np.int32).reshape(DAYS, LAT, LON)
Make = Callable[[Path], tuple[Any, Store]]
"""What to stream from, and the store to write into before."""


def write(store: Any, inner: str = "") -> None:
    group = zarr.create_group(store, path=inner or None)
    group.create_array("x", data=X, chunks=(5, 3, 5), dimension_names=("time", "lat", "lon"))
    group.create_array("raw", data=X, chunks=(5, 3, 5), shards=(10, 6, 5), compressors=None)
    group.create_array("time", data=np.arange(DAYS)).attrs["units"] = "days since 2001-01-01"
    site: Any = group.create_array("site", shape=(DAYS,), dtype=str)
    site[:] = np.array([f"s{n // 5}" for n in range(DAYS)], dtype=object)


def memory(folder: Path) -> Any:
    write(store := MemoryStore())
    return store


def zipped(folder: Path) -> Any:
    write(folder / "a")
    with ZipFile(folder / "a.zip", "w") as file:
        for path in sorted((folder / "a").rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder / "a"))
    return ZipStore(folder / "a.zip", mode="r", read_only=True)


def local(folder: Path) -> Any:
    write(folder / "a")
    return LocalStore(folder / "a", read_only=True)


def wrapped(folder: Path) -> Any:
    write(store := MemoryStore())
    return WrapperStore(store)


def fsspec(folder: Path) -> Any:
    asyn = pytest.importorskip("fsspec.implementations.asyn_wrapper")
    files = pytest.importorskip("fsspec.implementations.local")
    from zarr.storage import FsspecStore

    write(folder / "a")
    return FsspecStore(
        asyn.AsyncFileSystemWrapper(files.LocalFileSystem(), asynchronous=True), read_only=True, path=str(folder / "a")
    )


def inner_group(folder: Path) -> Any:
    store = MemoryStore()
    zarr.create_group(store)
    write(store, "deep/down")
    return zarr.open_group(store, path="deep", mode="r")["down"]


def inner_local(folder: Path) -> Any:
    zarr.create_group(folder / "a")
    write(folder / "a", "deep")
    return zarr.open_group(folder / "a", path="deep", mode="r")


STORES = [memory, zipped, local, wrapped, fsspec, inner_group, inner_local]


@pytest.fixture(params=STORES, ids=lambda make: make.__name__)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return request.param(tmp_path)


def stream(store: Any, **keywords: Any) -> ZarrStream:
    return ZarrStream(store, **{"inputs": "x", "batch_size": 7, "output": "numpy", "shuffle": "block", **keywords})


async def samples(store: Any, **keywords: Any) -> dict[int, Any]:
    """Inputs by sample number."""
    found: dict[int, Any] = {}
    async with stream(store, **keywords) as source:
        async for batch in source:
            found |= dict(zip(batch.index.tolist(), batch.inputs.copy(), strict=True))
    return found


@pytest.mark.parametrize("inputs", ["x", "raw"])
async def test_every_sample_is_that_of_the_source(store: Any, inputs: str) -> None:
    found = await samples(store, inputs=inputs)
    assert sorted(found) == list(range(DAYS))
    assert all((value == X[number]).all() for number, value in found.items())


async def test_values_windows_and_crops_work_together(store: Any) -> None:
    select = {"time": slice("2001-01-04", "2001-01-15")}
    found = await samples(store, select=select, window=3, crop={"lat": 2, "lon": 2}, crop_at="center")
    assert sorted(found) == list(range(3, 13))
    assert all((value == X[number : number + 3, 2:4, 1:3]).all() for number, value in found.items())


async def test_texts_group_samples(store: Any) -> None:
    one, other = [await samples(store, groups="site", split=split) for split in ((0.0, 0.5), (0.5, 1.0))]
    assert sorted([*one, *other]) == list(range(DAYS))
    assert not {n // 5 for n in one} & {n // 5 for n in other}


def test_samples_are_located(store: Any) -> None:
    found = stream(store, window=3).locate(5)
    assert (found.row, found.stop) == ((5,), (8,))
    assert found.coordinates == {"time": np.datetime64("2001-01-06")}


def test_one_array_is_a_store(tmp_path: Path) -> None:
    array = zarr.create_array(MemoryStore(), data=X, chunks=(5, 3, 5))
    assert (asyncio.run(samples(array, inputs=None))[23] == X[23]).all()
