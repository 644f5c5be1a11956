"""What CF attributes promise: the values and dtypes that xarray gives for the same store."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain import DataError, ZarrStream
from streamtrain.data.cf import packing
from tests.data.stores import layout_of

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]
FLOATS = ["float16", "float32", "float64"]


def rows(folder: Path | str, **keywords: Any) -> NDArray[Any]:
    """The whole of array x, in order."""

    async def scenario() -> NDArray[Any]:
        stream = ZarrStream(folder, inputs="x", batch_size=7, output="numpy", memory="8MiB", **keywords)
        async with stream:
            return np.concatenate([batch.inputs.copy() async for batch in stream])

    return asyncio.run(scenario())


def make(folder: Path | str, data: NDArray[Any], attributes: dict[str, Any], **options: Any) -> None:
    """Array x, in two columns, with these attributes."""
    group = zarr.open_group(folder, mode="w", zarr_format=options.pop("zarr_format", 3))
    names: dict[str, Any] = {"dimension_names": ["row", "column"]} if group.metadata.zarr_format == 3 else {}
    array = group.create_array("x", shape=data.shape, dtype=data.dtype, chunks=(3, 1), **names, **options)
    array[...] = data
    own = {} if names else {"_ARRAY_DIMENSIONS": ["row", "column"]}
    array.attrs.update({**own, **attributes})


def theirs(folder: Path | str) -> NDArray[Any]:
    with xarray.open_zarr(folder, consolidated=False, decode_times=False, chunks=None) as dataset:
        found: NDArray[Any] = dataset["x"].values
        return found


@st.composite
def packed(draw: st.DrawFn) -> tuple[NDArray[Any], dict[str, Any], int]:
    """Numbers few of which are missing, the attributes that say which, and the format."""
    dtype = np.dtype(draw(st.sampled_from(INTEGERS + FLOATS)))
    limit = 100 if dtype.kind != "u" else 200
    low = 0 if dtype.kind == "u" else -limit
    data = np.array(draw(st.lists(st.integers(low, limit), min_size=10, max_size=20)), dtype=dtype)
    attributes: dict[str, Any] = {}
    if draw(st.booleans()):
        attributes["scale_factor"] = draw(st.sampled_from([0.01, 2.5, -1.0]))
    if draw(st.booleans()):
        attributes["add_offset"] = draw(st.sampled_from([273.15, -3, 7]))
    zarr_format = draw(st.sampled_from([2, 3]))
    number = int(draw(st.sampled_from(list(data))))
    if dtype.kind != "f" and draw(st.booleans()):
        attributes["missing_value"] = number
    elif dtype.kind != "f" and draw(st.booleans()):
        attributes["_Unsigned"] = draw(st.sampled_from(["true", "false"]))
        told_apart = number >= 0 or dtype.itemsize < 8  # of large uint64 xarray's floats are equal, see below
        if zarr_format == 3 and number < 128 and told_apart and draw(st.booleans()):  # it overflows on others
            attributes["_FillValue"] = number
    return data.repeat(2).reshape(-1, 2), attributes, zarr_format


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60)
@given(packed())
def test_values_and_dtype_are_those_of_xarray(drawn: tuple[NDArray[Any], dict[str, Any], int]) -> None:
    data, attributes, zarr_format = drawn
    with tempfile.TemporaryDirectory() as folder:
        make(folder, data, attributes, zarr_format=zarr_format, fill_value=None if zarr_format == 2 else 0)
        expected, found = theirs(folder), rows(folder)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["int16", "int32", "uint8", "float32", "float64"])
@pytest.mark.parametrize("encoding", [{}, {"scale_factor": 0.5}, {"scale_factor": 0.5, "add_offset": 10.0}])
def test_what_xarray_wrote_with_a_fill_value_comes_back_as_it_reads_it(
    tmp_path: Path, dtype: str, encoding: dict[str, float], zarr_format: Any
) -> None:
    """In format 2 it keeps the missing value as the chunks' fill value; in 3 as base64 among the attributes."""
    values = np.arange(20, dtype=float).reshape(10, 2) * encoding.get("scale_factor", 1)
    values[3, 1] = values[8] = np.nan
    dataset = xarray.Dataset({"x": (("row", "column"), values + encoding.get("add_offset", 0))})
    store, told = tmp_path / "s.zarr", {"dtype": dtype, "_FillValue": np.dtype(dtype).type(99), **encoding}
    dataset.to_zarr(store, encoding={"x": told}, zarr_format=zarr_format, consolidated=False)
    found = rows(store)
    assert found.dtype == theirs(store).dtype
    np.testing.assert_array_equal(found, theirs(store))
    assert np.isnan(found).sum() == 3


def test_chunks_of_fill_are_missing_where_the_fill_value_says_so(tmp_path: Path) -> None:
    make(tmp_path, np.full((6, 2), 9, "int16"), {}, zarr_format=2, fill_value=9)
    assert not list(tmp_path.rglob("x/0.*"))
    assert np.isnan(rows(tmp_path)).all()


def test_the_fill_value_of_a_store_that_is_not_xarrays_is_a_number(tmp_path: Path) -> None:
    """Zeros are zeros, though Zarr 2 fills with them."""
    zarr.create_array(str(tmp_path), name="x", shape=(6, 2), dtype="int16", fill_value=0, zarr_format=2)[...] = 0
    found = rows(tmp_path)
    assert found.dtype == np.int16
    assert not found.any()


def test_false_leaves_numbers_as_they_are_stored(tmp_path: Path) -> None:
    data = np.arange(12, dtype="int16").reshape(6, 2)
    make(tmp_path, data, {"scale_factor": 0.1, "_FillValue": 3})
    np.testing.assert_array_equal(rows(tmp_path, decode_cf=False), data)
    assert rows(tmp_path, decode_cf=False).dtype == np.int16


def test_unsigned_numbers_wrap_and_so_does_what_is_missing(tmp_path: Path) -> None:
    make(tmp_path, np.array([[0, -1], [-2, 127]], "int8"), {"_Unsigned": "true", "missing_value": -1})
    np.testing.assert_array_equal(rows(tmp_path), [[0, np.nan], [254, 127]])


def test_signed_numbers_wrap_where_xarray_overflows(tmp_path: Path) -> None:
    make(tmp_path, np.array([[0, 128], [255, 127]], "uint8"), {"_Unsigned": "false", "_FillValue": 128})
    np.testing.assert_array_equal(rows(tmp_path), [[0, np.nan], [-1, 127]])


def test_of_large_numbers_only_the_missing_one_is_missing(tmp_path: Path) -> None:
    """xarray compares them as floats, to which 2**64 - 1 and 2**64 - 2 are the same."""
    make(tmp_path, np.array([[-2, -1], [-3, 0]], "int64"), {"_Unsigned": "true", "_FillValue": -2})
    np.testing.assert_array_equal(np.isnan(rows(tmp_path)), [[True, False], [False, False]])


def test_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, np.arange(12, dtype="int16").reshape(6, 2), {"scale_factor": 0.1, "_FillValue": 3})
    with caplog.at_level(logging.INFO, logger="streamtrain.data"):
        rows(tmp_path)
        assert [record.message for record in caplog.records] == [
            "array x is decoded as CF says: * 0.1 NaN for 3 (float64); decode_cf=False leaves it alone"
        ]
        caplog.clear()
        rows(tmp_path, decode_cf=False)
        assert not caplog.records


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"scale_factor": "two"}, "scale_factor is 'two', not a finite number"),
        ({"add_offset": [1, 2]}, "add_offset is .1, 2., not a finite number"),
        ({"add_offset": float("nan")}, "add_offset is nan"),
        ({"missing_value": {"a": 1}}, "missing_value is .* not a number"),
        ({"_FillValue": "none"}, "_FillValue is 'none', not a number"),
        ({"_FillValue": True}, "_FillValue is True"),
    ],
)
def test_attributes_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, attributes: dict[str, Any], message: str
) -> None:
    make(tmp_path, np.zeros((6, 2), "int16"), {})
    zarr.open_array(tmp_path, path="x").attrs.update(attributes)
    with pytest.raises(DataError, match=message) as told:
        packing(layout_of(tmp_path))
    assert "decode_cf=False" in told.value.hint


def test_arrays_without_such_attributes_are_left_alone(tmp_path: Path) -> None:
    for number, dtype in enumerate(["bool", "int8", "float16", "complex64"]):
        make(tmp_path / str(number), np.zeros((6, 2), dtype), {"units": "days since 2000-01-01", "comment": "none"})
        assert packing(layout_of(tmp_path / str(number))) is None
