"""What normalising promises: numpy's own figures, in one pass, the same for any memory; figures that can be undone."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain import ConfigError, DataError, ZarrStream
from streamtrain.data import values
from streamtrain.data.batch import Batch
from streamtrain.errors import CheckpointError

SHAPE = (23, 3, 5, 4)
DATA = (np.random.default_rng(0).random(SHAPE) * 200).astype("float32")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    group = zarr.create_group(tmp_path / "s.zarr")
    for name, dtype in (("x", "float32"), ("i", "int16"), ("d", "float64"), ("c", "complex64")):
        array = group.create_array(name, shape=SHAPE, chunks=(4, 2, 5, 3), dtype=dtype)
        array[...] = DATA.astype(dtype)
    group.create_array("y", shape=(23,), chunks=(4,), dtype="float32")[...] = DATA[:, 0, 0, 0]
    return tmp_path / "s.zarr"


def stats(store: Path, name: str, **figures: Any) -> None:
    zarr.open_array(store, path=name).attrs["streamtrain"] = {"stats": figures}


def stream(store: Path | str, **keywords: Any) -> ZarrStream:
    return ZarrStream(store, **{"inputs": "x", "batch_size": 6, "output": "numpy", "memory": "16MiB", **keywords})


def batches(store: Path | str, **keywords: Any) -> list[Batch]:
    async def scenario() -> list[Batch]:
        async with stream(store, **keywords) as source:
            return [
                Batch(b.inputs.copy(), None if b.targets is None else b.targets.copy(), b.index.copy())
                async for b in source
            ]

    return asyncio.run(scenario())


def inputs(store: Path | str, **keywords: Any) -> NDArray[Any]:
    return np.concatenate([batch.inputs for batch in batches(store, **keywords)])


@pytest.mark.parametrize("name", ["x", "i", "d"])
@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ((100, 50), 100, 50),
        ([100.0, 50.0], 100, 50),
        (([1, 2, 3], [4, 5, 6]), [[[1]], [[2]], [[3]]], [[[4]], [[5]], [[6]]]),
        (([1, 2, 3, 4], 5), [1, 2, 3, 4], 5),
        ((7, [1, 2, 3, 4, 5], 2), 7, [[1], [2], [3], [4], [5]]),
        ((np.arange(15).reshape(3, 5, 1), 2), np.arange(15).reshape(3, 5, 1), 2),
    ],
)
def test_figures_are_taken_off_and_divided_by(store: Path, name: str, given: Any, mean: Any, std: Any) -> None:
    expected = (DATA.astype(zarr.open_array(store, path=name).dtype).astype("f8") - np.array(mean)) / np.array(std)
    for shuffle in (False, True):
        for batch in batches(store, inputs=name, normalize={name: given}, shuffle=shuffle):
            assert batch.inputs.dtype == np.float32
            np.testing.assert_allclose(batch.inputs, expected[batch.index], rtol=1e-6, atol=1e-5)


def test_figures_go_along_the_axis_of_their_name(tmp_path: Path) -> None:
    square = DATA[:, 0, :4, :4]
    zarr.create_group(tmp_path / "s").create_array("x", data=square, dimension_names=("time", "lat", "lon"))
    figures = [1.0, 2.0, 3.0, 4.0]
    expected = (square - np.array(figures)[:, None]) / 2
    np.testing.assert_allclose(inputs(tmp_path / "s", normalize={"x": (figures, 2, "lat")}), expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="not 'level'") as caught:
        inputs(tmp_path / "s", normalize={"x": (figures, 2, "level")})
    assert "'time', 'lat', 'lon'" in caught.value.hint


def test_float32_is_worked_out_in_float32_as_numpy_does(store: Path) -> None:
    expected = (DATA - np.float32(100.3)) / np.float32(33.7)
    np.testing.assert_array_equal(inputs(store, normalize={"x": (100.3, 33.7)}), expected)


def test_small_differences_of_large_numbers_survive(tmp_path: Path) -> None:
    large = 1e9 + np.arange(10.0).reshape(10, 1)
    for dtype in ("float64", "int32", "int64"):
        zarr.create_array(str(tmp_path / dtype), name="x", data=large.astype(dtype))
        found = inputs(tmp_path / dtype, normalize={"x": (1e9, 1.0)})
        np.testing.assert_array_equal(found, np.arange(10, dtype="f4").reshape(10, 1))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_result_has_the_dtype_that_was_asked_for(store: Path, dtype: str) -> None:
    found = inputs(store, normalize={"x": (100, 50)}, dtype=dtype)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, ((DATA - 100) / 50).astype(dtype), rtol=1e-3 if dtype == "float16" else 1e-6)


def test_numbers_are_decoded_then_normalised_then_cast_then_transformed(store: Path) -> None:
    zarr.open_array(store, path="i").attrs.update({"scale_factor": 0.5, "add_offset": 10.0, "_FillValue": 7})
    seen = np.zeros(SHAPE, "float16")

    def transform(batch: Batch) -> Any:
        seen[batch.index] = batch.inputs
        return batch.inputs * 0, batch.targets

    whole = inputs(store, inputs="i", normalize={"i": (20, 4)}, dtype="float16", transform=transform)
    stored = DATA.astype("int16")
    decoded = np.where(stored == 7, np.nan, stored * 0.5 + 10.0)
    np.testing.assert_array_equal(seen, ((decoded - 20) / 4).astype("float32").astype("float16"))
    assert np.isnan(seen).any()
    assert whole.shape == SHAPE


def test_statistics_of_the_attributes_serve_inputs_alone(store: Path) -> None:
    stats(store, "x", mean=[90.0, 100.0, 110.0], std=[10.0, 20.0, 30.0], axis=1, min=0, max=200, count=23)
    [first, *_] = batches(store, targets="y", normalize="stats", batch_size=23)
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ([90.0, 100, 110], [10.0, 20, 30]))
    np.testing.assert_allclose(first.inputs, (DATA - mean) / std, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(first.targets, DATA[:, 0, 0, 0])


def test_targets_are_normalised_where_they_are_named(store: Path) -> None:
    [first, *_] = batches(store, targets="y", normalize={"y": (100, 50)}, batch_size=23)
    np.testing.assert_array_equal(first.inputs, DATA)
    np.testing.assert_array_equal(first.targets, (DATA[:, 0, 0, 0] - 100) / 50)


def test_the_figures_are_readable_and_undo_what_was_done(store: Path) -> None:
    source = stream(store, targets="y", normalize={"y": (100, 50), "x": ([1, 2, 3], 4)})
    figures = source.normalization
    assert set(figures) == {"x", "y"}
    assert figures["x"].mean.shape == (3, 1, 1)
    np.testing.assert_allclose(figures["x"].undo((DATA - figures["x"].mean) / figures["x"].std), DATA, rtol=1e-6)
    assert stream(store).normalization == {}


def test_a_position_belongs_to_its_figures(store: Path) -> None:
    def state(**keywords: Any) -> dict[str, Any]:
        return stream(store, **keywords).state_dict()

    plain = state()
    assert "normalize" not in plain["of"]
    given: Any
    for given in [(1, 2), (1, 3), ([1, 2, 3], [4, 5, 6])]:
        with pytest.raises(CheckpointError, match="normalize"):
            stream(store, normalize={"x": given}).load_state_dict(plain)
        stream(store, normalize={"x": given}).load_state_dict(state(normalize={"x": given}))
    with pytest.raises(CheckpointError, match=r"normalize: .*1.0.*2.0.* then, .*3.0"):
        stream(store, normalize={"x": (1, 3)}).load_state_dict(state(normalize={"x": (1, 2)}))
    big = tuple(np.random.default_rng(1).random((2, 3, 5, 4)) + 1)
    assert len(str(state(normalize={"x": big}))) < 1024


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"normalize": "mean"}, ConfigError, "normalize must be 'stats' or"),
        ({"normalize": {}}, ConfigError, "normalize must be"),
        ({"normalize": (1, 2)}, ConfigError, "normalize must be"),
        ({"normalize": {"z": (1, 2)}}, ConfigError, "normalize= names z; the stream has x"),
        ({"normalize": {"x": 1}}, ConfigError, r"'x' must be \(mean, std\)"),
        ({"normalize": {"x": (1, 0)}}, ConfigError, "a mean of 1 with a std of 0"),
        ({"normalize": {"x": (1, -2)}}, ConfigError, "a std of -2"),
        ({"normalize": {"x": (float("nan"), 1)}}, ConfigError, "a mean of nan"),
        ({"normalize": {"x": ("a", 1)}}, ConfigError, "its mean is 'a', no numbers"),
        ({"normalize": {"x": ([1, 2], 1)}}, ConfigError, "2 figures, and no axis of a row is of that length"),
        ({"normalize": {"x": ([1, 2, 3], 1, 2)}}, ConfigError, r"3 figures.*\(axis 2 was named\)"),
        ({"normalize": {"x": (1, 2, "time")}}, ConfigError, "the number or the name of an axis, not 'time'"),
        ({"normalize": {"x": (np.ones((2, 2)), 1)}}, ConfigError, r"shape \(2, 2\) fits no row of shape \(3, 5, 4\)"),
        ({"normalize": {"x": (1, 2)}, "dtype": "int32"}, ConfigError, "is int32, but it is normalised"),
        ({"inputs": "c", "normalize": {"c": (1, 2)}}, ConfigError, "it is complex64"),
        ({"inputs": "i", "dtype": "int8"}, ConfigError, "is int8, but missing values become NaN"),
        ({"normalize": "stats"}, DataError, "array 'x' has no statistics among its attributes"),
        ({"decode_cf": "yes"}, ConfigError, "decode_cf must be 'auto' or False, not 'yes'"),
    ],
)
def test_what_can_not_be_done_is_said(
    store: Path, keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    zarr.open_array(store, path="i").attrs["_FillValue"] = 3
    with pytest.raises(error, match=message):
        stream(store, **keywords).open_blocking()


def test_without_statistics_the_hint_is_the_command_that_writes_them(store: Path) -> None:
    with pytest.raises(DataError) as told:
        stream(store, normalize="stats").open_blocking()
    assert "python -m data_tools stats" in told.value.hint


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tile=st.sampled_from([1, 100, 1000, 1 << 20]),
    axes=st.sampled_from([(0,), (1,), (0, 1), (3, 0)]),
    shuffle=st.sampled_from([False, "block", "global"]),
    threads=st.integers(1, 3),
)
def test_tiles_memory_and_axes_of_samples_change_no_number(
    monkeypatch: pytest.MonkeyPatch, tile: int, axes: tuple[int, ...], shuffle: Any, threads: int
) -> None:
    row = tuple(SHAPE[a] for a in range(4) if a not in axes)
    mean = np.arange(np.prod(row)).reshape(row) * 1.5
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.setattr(values, "TILE_BYTES", tile)
        zarr.create_array(folder, name="x", data=DATA, chunks=(4, 2, 5, 3))
        flat = np.moveaxis(DATA, axes, range(len(axes))).reshape(-1, *row)
        expected = (flat - mean.astype("f4")) / np.float32(3)
        keywords: dict[str, Any] = {"normalize": {"x": (mean, 3)}, "sample_axes": axes, "shuffle": shuffle}
        for batch in batches(folder, **keywords, threads=threads, memory="4MiB"):
            np.testing.assert_array_equal(batch.inputs, expected[batch.index])
