"""What labels that are no numbers promise: texts and times group and balance samples as integers do."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from streamtrain.data.stream import ZarrStream
from streamtrain.errors import DataError

ROWS = 60
KIND = np.arange(ROWS) // 7
RARE = np.arange(ROWS) % 10 == 0
LABELS: dict[str, NDArray[Any]] = {
    "text": np.array([f"patient {n}" for n in KIND], dtype=object),
    "fixed": np.array([f"p{n:02}" for n in KIND]),
    "bytes": np.array([f"p{n:02}".encode() for n in KIND]),
    "time": np.datetime64("2000-01-01", "D") + KIND.astype("timedelta64[D]"),
}


@pytest.fixture(scope="module", params=[2, 3])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "data.zarr"
    group = zarr.create_group(path, zarr_format=request.param)
    group.create_array("x", data=np.arange(ROWS * 2, dtype=np.float32).reshape(ROWS, 2), chunks=(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's, of dtypes that Zarr 3 does not specify
        for name, values in LABELS.items():
            dtype: Any = str if values.dtype == object else values.dtype
            group.create_array(name, shape=(ROWS,), dtype=dtype, chunks=(25,))[:] = values
        rare: Any = group.create_array("rare", shape=(ROWS,), dtype=str, chunks=(11,))
        rare[:] = np.where(RARE, "rare", "common").astype(object)
    return path


def stream(store: Any, **keywords: Any) -> ZarrStream:
    return ZarrStream(store, **{"inputs": "x", "batch_size": 7, "output": "numpy", "shuffle": "block", **keywords})


async def numbers(source: ZarrStream) -> NDArray[np.int64]:
    return np.concatenate([batch.index.copy() async for batch in source])


@pytest.mark.parametrize("name", LABELS)
async def test_a_group_of_texts_or_times_lies_in_one_split_whole(store: Path, name: str) -> None:
    async with (
        stream(store, groups=name, split=(0.0, 0.5)) as one,
        stream(store, groups=name, split=(0.5, 1.0)) as other,
    ):
        first, second = await numbers(one), await numbers(other)
    assert sorted([*first, *second]) == list(range(ROWS))
    assert not {*KIND[first]} & {*KIND[second]}


async def test_texts_are_balanced(store: Path) -> None:
    async with stream(store, balance="rare") as source:
        assert abs(RARE[await numbers(source)].mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"weights": "time"}, "weights='time': the array is datetime64.*, no numbers"),
        ({"indices": "fixed"}, "indices='fixed': the array is .*, not bool"),
        ({"inputs": "text"}, "which can't be trained on"),
        ({"balance": "txt"}, "has no array 'txt'"),
    ],
    ids=str,
)
async def test_labels_where_numbers_belong_are_refused(store: Path, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        await stream(store, **keywords).open()


async def test_labels_of_another_shape_are_refused_before_they_are_read(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("x", data=np.arange(9.0), dimension_names=("row",))
    for name in ("label", "row"):
        labels: Any = group.create_array(name, shape=(10,), chunks=(10,), dtype="M8[s]")
        labels[:] = np.arange(10).astype("M8[s]")
        (tmp_path / "s" / name / "c" / "0").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"array 'label' has shape \(10,\), not one value for each of"):
        await stream(tmp_path / "s", balance="label").open()
    with pytest.raises(DataError, match="the coordinate array 'row' has 10 values for 9 places"):
        await stream(tmp_path / "s", select={"row": ["1970"]}).open()
    with pytest.raises(DataError, match="the coordinate array 'row' has 10 values"):
        await asyncio.to_thread(stream(tmp_path / "s").locate, 0)


async def test_labels_that_claim_more_than_is_read_whole_are_refused(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    rows: int = 1 << 30
    group.create_array("x", shape=(rows,), chunks=(1 << 20,), dtype="u1", dimension_names=("time",))
    group.create_array("time", shape=(rows,), chunks=(1 << 20,), dtype="M8[s]")
    for keywords in ({"balance": "time"}, {"select": {"time": ["1970"]}}):
        with pytest.raises(DataError, match=r"'time' claims 1073741824 values of 8\.0 GiB in all; at most 4\.0 GiB is"):
            await stream(tmp_path / "s", **keywords).open()


async def test_categories_that_claim_more_than_is_read_whole_are_refused(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s").create_group("kind", attributes={"encoding-type": "categorical"})
    group.create_array("codes", data=np.zeros(9, dtype="i1"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's, of dtypes that Zarr 3 does not specify
        group.create_array("categories", shape=(1 << 30,), chunks=(1 << 20,), dtype="<U2")
    with pytest.raises(DataError, match="claims 1073741824 values"):
        await stream(tmp_path / "s", inputs="kind").open()


async def test_damaged_labels_are_named(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("x", data=np.arange(9.0))
    labels: Any = group.create_array("label", shape=(9,), dtype=str)
    labels[:] = np.array(list("abcabcabc"), dtype=object)
    (tmp_path / "s" / "label" / "c" / "0").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="array 'label' can't be read"):
        await stream(tmp_path / "s", groups="label").open()
