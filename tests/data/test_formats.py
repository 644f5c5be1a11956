"""What the formats promise: whoever wrote a store, its samples are what numpy would give, and what can't be is refused.

Each writer runs in a process of its own (tests/data/writers.py).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.dtype import Float16, data_type_registry
from zarr.storage import MemoryStore

from streamtrain import DataError, ZarrStream
from streamtrain.data.layout import parse_array
from tests.data.writers import SHAPE, WRITERS, numbers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stores of one writer, beside what is in them."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "tests.data.writers", request.param, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def stores(folder: Path) -> list[tuple[Path, dict[str, NDArray[Any]]]]:
    """Each store, and what is in it by array."""
    return [(path.with_suffix(""), contents(path)) for path in sorted(folder.glob("*.npz"))]


def contents(expected: Path) -> dict[str, NDArray[Any]]:
    with np.load(expected) as found:
        return {name.replace("|", "/"): found[name] for name in found.files}


async def check(store: Any, names: list[str], arrays: dict[str, NDArray[Any]], **keywords: Any) -> None:
    """All batches of a pass are these arrays at their index."""
    seen: list[int] = []
    given: dict[str, Any] = {"batch_size": 5, "output": "numpy", "memory": "32MiB", "threads": 2, **keywords}
    async with ZarrStream(store, inputs=names, **given) as stream:
        async for batch in stream:
            seen += batch.index.tolist()
            for name in names:
                assert batch.inputs[name].dtype == arrays[name].dtype.newbyteorder("=")
                np.testing.assert_array_equal(batch.inputs[name], arrays[name][batch.index])
    assert sorted(seen) == list(range(len(arrays[names[0]])))


def by_length(arrays: dict[str, NDArray[Any]]) -> Iterator[list[str]]:
    """Names of arrays that have the same number of samples."""
    lengths = {len(values) for values in arrays.values()}
    return ([name for name, values in arrays.items() if len(values) == length] for length in lengths)


async def test_samples_are_numpys_whoever_wrote_the_store(written: Path) -> None:
    assert stores(written)
    for store, arrays in stores(written):
        for names in by_length(arrays):
            await check(store, names, arrays)
            await check(store, names, arrays, shuffle="block", batch_size=7)


async def test_any_axis_may_number_the_samples_of_what_others_wrote(written: Path) -> None:
    for store, arrays in stores(written):
        for name in [name for name, values in arrays.items() if values.ndim > 1]:
            await check(store, [name], {name: np.moveaxis(arrays[name], 1, 0)}, sample_axes=1, shuffle="global")


async def test_with_io_store_zarr_gives_the_same(written: Path) -> None:
    for store, arrays in stores(written):
        await check(store, next(by_length(arrays)), arrays, io="store")


# Fill values


FILLS: list[tuple[str, Any]] = [
    ("float32", np.nan),
    ("float64", -0.0),
    ("float16", np.inf),
    ("float32", -np.inf),
    ("float32", "0x7fc00001"),
    ("float64", "0xfff8000000000001"),
    ("complex64", complex(np.nan, -0.0)),
    ("int64", -(2**63)),
    ("uint64", 2**64 - 1),
    ("bool", True),
]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("dtype", "fill"), FILLS, ids=[f"{dtype}-{fill}" for dtype, fill in FILLS])
async def test_absent_chunks_are_the_fill_value_to_the_bit(
    tmp_path: Path, dtype: str, fill: Any, zarr_format: Any
) -> None:
    if isinstance(fill, str):
        if zarr_format == 2:
            pytest.skip("Zarr 2 has no such fill values")
        array = zarr.create_array(tmp_path, name="x", shape=(10, 2), chunks=(3, 2), dtype=dtype, fill_value=0)
        file = tmp_path / "x" / "zarr.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "fill_value": fill}))
        expected = np.array([int(fill, 16)], f"u{np.dtype(dtype).itemsize}").view(dtype)[0]
    else:
        array = zarr.create_array(
            tmp_path, name="x", shape=(10, 2), chunks=(3, 2), dtype=dtype, fill_value=fill, zarr_format=zarr_format
        )
        expected = np.dtype(dtype).type(fill)
    array[3:6] = 1
    values = np.full((10, 2), expected, dtype)
    values[3:6] = 1
    async with ZarrStream(tmp_path, inputs="x", batch_size=10, output="numpy", memory="8MiB") as stream:
        [batch] = [batch async for batch in stream]
    assert batch.inputs.tobytes() == values.tobytes()


async def test_fill_that_zarr_2_leaves_open_is_zero(tmp_path: Path) -> None:
    zarr.create_array(tmp_path, name="x", shape=(4,), chunks=(2,), dtype="f4", zarr_format=2, fill_value=None)
    await check(tmp_path, ["x"], {"x": np.zeros(4, "f4")})


# Metadata in one place


def consolidated(folder: Path, zarr_format: Any) -> dict[str, NDArray[Any]]:
    root = zarr.create_group(folder, zarr_format=zarr_format)
    arrays = {"x": numbers(), "deep/er/y": numbers("int16")}
    for name, values in arrays.items():
        root.create_array(name, shape=SHAPE, chunks=(4, 5, 6), dtype=values.dtype)[...] = values
    zarr.consolidate_metadata(folder)
    return arrays


def remove(folder: Path, names: list[str]) -> None:
    for path in [path for name in names for path in folder.rglob(name)]:
        path.unlink()


@pytest.mark.parametrize("removed", [[], [".zarray"], [".zarray", ".zgroup", ".zattrs"]])
async def test_a_store_of_which_only_the_consolidated_metadata_were_kept_is_read(
    tmp_path: Path, removed: list[str]
) -> None:
    arrays = consolidated(tmp_path, 2)
    remove(tmp_path, removed)
    await check(tmp_path, list(arrays), arrays)
    await check(tmp_path, list(arrays), arrays, io="store")
    with pytest.raises(DataError, match="has no array 'z'; there are: deep/er/y, x"):
        await ZarrStream(tmp_path, inputs="z", batch_size=1).open()


async def test_a_damaged_copy_that_is_all_there_is_is_said(tmp_path: Path) -> None:
    consolidated(tmp_path, 2)
    (tmp_path / ".zgroup").unlink()
    (tmp_path / ".zmetadata").write_text('{"zarr_consolidated_format": 1}')
    with pytest.raises(DataError, match="zmetadata: its metadata can't be used: KeyError"):
        await ZarrStream(tmp_path, inputs="x", batch_size=1).open()


@pytest.mark.parametrize("zarr_format", [2, 3])
async def test_an_arrays_own_metadata_count_where_the_consolidated_are_stale(
    tmp_path: Path, zarr_format: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an append by a program that knows nothing of the copy."""
    arrays = consolidated(tmp_path, zarr_format)
    await check(tmp_path, ["x"], arrays)
    assert not caplog.records
    zarr.open_array(tmp_path / "x").append(numbers()[:4])
    grown = {"x": np.concatenate([arrays["x"], numbers()[:4]])}
    await check(tmp_path, ["x"], grown)
    [said] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("the consolidated metadata are out of date for array x (shape); its own are used")


async def test_an_array_that_the_copy_does_not_know_is_found(tmp_path: Path) -> None:
    consolidated(tmp_path, 3)
    zarr.open_array(tmp_path / "late", mode="w", shape=SHAPE, chunks=SHAPE, dtype="f4")[...] = numbers()
    await check(tmp_path, ["late"], {"late": numbers()})


async def test_consolidated_metadata_of_any_store_are_used(tmp_path: Path) -> None:
    store = MemoryStore()
    root = zarr.create_group(store, zarr_format=2)
    root.create_array("x", shape=SHAPE, chunks=(4, 5, 6), dtype="f4")[...] = numbers()
    zarr.consolidate_metadata(store)
    for key in (".zgroup", "x/.zarray", "x/.zattrs"):
        store._store_dict.pop(key, None)
    await check(store, ["x"], {"x": numbers()})


# What can't be trained on


REFUSED: list[tuple[Any, str, str]] = [
    (str, "StringDType|object", "encode texts as integers"),
    ("S5", "S5", "encode texts as integers"),
    ("U3", "<U3", "encode texts as integers"),
    ("M8[s]", r"datetime64\[s\]", "times are no numbers"),
    ("m8[D]", r"timedelta64\[D\]", "times are no numbers"),
    ([("a", "i4"), ("b", "f4")], r"\[\('a'", "supported: bool"),
    ("V4", "V4", "supported: bool"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("dtype", "name", "hint"), REFUSED, ids=[str(dtype) for dtype, *_ in REFUSED])
async def test_what_has_no_tensor_is_refused_by_name(
    tmp_path: Path, dtype: Any, name: str, hint: str, zarr_format: Any
) -> None:
    given = dtype if dtype is str else np.dtype(dtype)
    zarr.create_array(tmp_path, name="x", shape=(6,), chunks=(2,), dtype=given, zarr_format=zarr_format)
    with pytest.raises(DataError, match=rf"array 'x' has dtype .*({name}).* which can't be trained on") as told:
        await ZarrStream(tmp_path, inputs="x", batch_size=2).open()
    assert hint in told.value.hint


async def test_objects_are_refused_by_name(tmp_path: Path) -> None:
    zarr.create_array(tmp_path, name="x", shape=(6,), chunks=(2,), dtype="i4", zarr_format=2)
    file = tmp_path / "x" / ".zarray"
    pickled = {"dtype": "|O", "filters": [numcodecs.Pickle().get_config()], "fill_value": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **pickled}))
    with pytest.raises(DataError, match=r"x: its metadata can't be used: .*data type.*O"):
        await ZarrStream(tmp_path, inputs="x", batch_size=2).open()


# bfloat16


class BFloat16(Float16):
    """What a package that teaches zarr bfloat16 would register."""

    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))
    _zarr_v3_name = "bfloat16"
    _zarr_v2_names = ("bfloat16",)  # type: ignore[assignment]


@pytest.fixture
def _zarr_knows_bfloat16() -> Iterator[None]:
    before = dict(data_type_registry.contents)
    data_type_registry.register("bfloat16", BFloat16)
    yield
    data_type_registry.contents.clear()
    data_type_registry.contents.update(before)


def bfloats(folder: Path) -> NDArray[Any]:
    """An array that another package has written."""
    zarr.create_array(folder, name="x", shape=(10, 3), chunks=(4, 3), dtype="float16", fill_value=0)
    file = folder / "x" / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "data_type": "bfloat16"}))
    values = np.arange(30).reshape(10, 3).astype(ml_dtypes.bfloat16)
    zarr.open_array(folder / "x", mode="r+")[...] = values if "bfloat16" in data_type_registry.contents else 0
    return values


@pytest.mark.usefixtures("_zarr_knows_bfloat16")
@pytest.mark.parametrize("io", ["auto", "store"])
async def test_bfloat16_is_a_tensor_of_bfloat16_where_zarr_knows_it(tmp_path: Path, io: Any) -> None:
    torch = pytest.importorskip("torch")
    values = bfloats(tmp_path)
    async with ZarrStream(tmp_path, inputs="x", batch_size=3, shuffle=True, memory="8MiB", io=io) as stream:
        async for batch in stream:
            assert batch.inputs.dtype == torch.bfloat16
            assert batch.inputs.float().tolist() == values[batch.index.numpy()].astype("f4").tolist()
    await check(tmp_path, ["x"], {"x": values.astype("f4")}, dtype="float32")


async def test_bfloat16_that_zarr_does_not_know_is_said(tmp_path: Path) -> None:
    zarr.create_array(tmp_path, name="x", shape=(10, 3), chunks=(4, 3), dtype="float16")
    file = tmp_path / "x" / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "data_type": "bfloat16"}))
    with pytest.raises(DataError, match=r"x: its metadata can't be used: .*bfloat16") as told:
        await ZarrStream(tmp_path, inputs="x", batch_size=2).open()
    assert "knows no such data type" in told.value.hint


# Chunk grids


async def test_uneven_chunks_are_read_where_zarr_knows_them_and_refused_where_it_does_not(tmp_path: Path) -> None:
    zarr.create_array(tmp_path, name="x", shape=(10, 3), chunks=(4, 3), dtype="int32", compressors=None)
    file = tmp_path / "x" / "zarr.json"
    shapes = {"kind": "inline", "chunk_shapes": [[3, 1, 6], [2, 1]]}
    grid = {"name": "rectilinear", "configuration": shapes}
    file.write_text(json.dumps({**json.loads(file.read_text()), "chunk_grid": grid}))
    values = np.arange(30, dtype="int32").reshape(10, 3)
    rows, columns = np.split(values, [3, 4]), [2]
    for i, band in enumerate(rows):
        for j, part in enumerate(np.split(band, columns, axis=1)):
            path = tmp_path / "x" / "c" / str(i) / str(j)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(part.tobytes())
    if not hasattr(zarr.Array, "read_chunk_sizes"):  # zarr before 3.2
        with pytest.raises(DataError, match=r"x: its metadata can't be used: .*rectilinear"):
            await ZarrStream(tmp_path, inputs="x", batch_size=2).open()
        return
    with zarr.config.set({"array.rectilinear_chunks": True}):
        for shuffle in (False, "block", "global"):
            await check(tmp_path, ["x"], {"x": values}, shuffle=shuffle)
            await check(tmp_path, ["x"], {"x": values.T}, sample_axes=1, shuffle=shuffle)
        assert parse_array("x", metadata_of(tmp_path), values.dtype, 0).chunk_shape == (6, 2)


def metadata_of(folder: Path) -> dict[str, Any]:
    return dict(zarr.open_array(folder, path="x", mode="r").metadata.to_dict())
