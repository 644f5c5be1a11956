"""What a store of predictions promises: each sample at its place, in the source's coordinates, whole or not there."""

from __future__ import annotations

import logging
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data import predicted
from streamtrain.data.batch import Batch
from streamtrain.data.predicted import PredictedStore, chunk_shape
from streamtrain.data.stream import ZarrStream
from streamtrain.data.verification import verify
from streamtrain.errors import ConfigError, UserCodeError

Values = NDArray[Any]
TIMES, LATS, LONS = 40, 9, 11


def climate(where: Path, *, start: int = 0, times: int = TIMES) -> Values:
    """A store as a climate model leaves it: time, lat, lon, and rain by time; the field."""
    group = zarr.create_group(where)
    field = np.random.default_rng(start).standard_normal((times, LATS, LONS)).astype("f4") * 20 + 280
    said: Any = {"units": "K", "long_name": "temperature", "coordinates": "area station"}
    group.create_array("t2m", data=field, chunks=(7, 4, 11), dimension_names=("time", "lat", "lon"), attributes=said)
    group.create_array("rain", data=field[:, 0, 0], chunks=(7,), dimension_names=("time",), attributes={"units": "mm"})
    hours: Any = {"units": "hours since 2000-01-01", "calendar": "standard", "bounds": "time_bnds"}
    clock = np.arange(start, start + times) * 6
    group.create_array("time", data=clock, chunks=(5,), dimension_names=("time",), attributes=hours)
    bounds = np.stack([clock - 3, clock + 3], axis=1)
    group.create_array("time_bnds", data=bounds, chunks=(times, 2), dimension_names=("time", "nv"))
    group.create_array("lat", data=np.linspace(90, -90, LATS), dimension_names=("lat",), attributes={"units": "deg"})
    group.create_array("lon", data=np.linspace(0, 350, LONS), dimension_names=("lon",))
    area = np.arange(LATS * LONS).reshape(LATS, LONS)
    group.create_array("area", data=area, dimension_names=("lat", "lon"), attributes={"units": "km2"})
    names = group.create_array("station", shape=(LATS,), dtype=str, dimension_names=("lat",))
    names[:] = np.array([f"at {n}" for n in range(LATS)], dtype=object)
    return field


def stream(store: Any, **keywords: Any) -> ZarrStream:
    return ZarrStream(store, **{"inputs": "t2m", "batch_size": 7, "memory": "16MiB", "output": "numpy", **keywords})


def predict(
    source: ZarrStream, target: Path, model: Callable[[Batch], Any] = lambda batch: batch.inputs, **said: Any
) -> Path:
    """What a model makes of a stream, written."""
    source.open_blocking()
    store = PredictedStore(target, source.ground(), **said)
    store.open()
    try:
        for batch in source.as_loader():
            made = model(batch)
            outputs = made if isinstance(made, dict) else {"prediction": made}
            store.add(batch.index, {name: value.copy() for name, value in outputs.items()}, len(batch))
        return store.commit()
    finally:
        store.close()


def opened(target: Path) -> xarray.Dataset:
    """A store of ours, by its consolidated metadata."""
    with xarray.open_zarr(target) as data:
        loaded: xarray.Dataset = data.load()
    return loaded


def known(source: Path) -> xarray.Dataset:
    """A store that `climate` made."""
    with xarray.open_zarr(source, consolidated=False) as data:
        loaded: xarray.Dataset = data.load()
    return loaded


def values(target: Path, name: str = "prediction") -> Values:
    found: Values = zarr.open_array(target / name, mode="r")[...]  # type: ignore[assignment]
    return found


ORDERS: dict[str, dict[str, Any]] = {
    "as they lie": {},
    "a block shuffled": {"shuffle": "block", "shuffle_blocks": 2},
    "all shuffled": {"shuffle": "global"},
    "a part": {"split": (5, 23)},
    "a part by sample": {"split": (0.2, 0.6), "split_by": "sample"},
    "a part by chunk": {"split": (0.2, 0.6), "split_by": "chunk"},
    "some": {"indices": [33, 2, 3, 17]},
    "some shuffled": {"indices": [33, 2, 3, 17], "shuffle": "block"},
    "weighted": {"weights": np.arange(TIMES) % 3},
}


@pytest.fixture(params=["one band", "many bands"])
def _bands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 16 MiB, or of a few rows."""
    if request.param == "many bands":
        monkeypatch.setattr(predicted, "CHUNK_BYTES", 100)


@pytest.mark.usefixtures("_bands")
@pytest.mark.parametrize("order", ORDERS)
def test_each_sample_stands_at_its_own_number_and_what_no_batch_had_is_nan(tmp_path: Path, order: str) -> None:
    field = climate(tmp_path / "s")
    source = stream(tmp_path / "s", **ORDERS[order])
    came: set[int] = set()

    def model(batch: Batch) -> Values:
        came.update(batch.index.tolist())
        return np.asarray(2 * batch.inputs[:, 0])

    found = values(predict(source, tmp_path / "p", model))
    there = np.isin(np.arange(TIMES), list(came))
    assert there.any()
    np.testing.assert_array_equal(found[there], 2 * field[there, 0])
    assert np.isnan(found[~there]).all()


def test_it_opens_in_xarray_with_the_coordinates_of_its_source(tmp_path: Path) -> None:
    field = climate(tmp_path / "s")
    found = opened(predict(stream(tmp_path / "s"), tmp_path / "p"))
    source = known(tmp_path / "s")
    np.testing.assert_array_equal(found.prediction, field)
    assert found.prediction.dims == ("time", "lat", "lon")
    for name in ("time", "lat", "lon", "time_bnds", "area", "station"):
        mine, theirs = (each[name].drop_vars(each[name].coords) for each in (found, source))
        xarray.testing.assert_identical(mine, theirs)
    assert found.prediction.attrs["units"] == "K"
    assert found.prediction.attrs["long_name"] == "temperature"


def test_attributes_are_those_of_the_array_that_it_has_the_shape_of(tmp_path: Path) -> None:
    climate(tmp_path / "s")
    source = stream(tmp_path / "s", targets="rain")

    def model(batch: Batch) -> Any:
        return {"rain": batch.targets, "classes": np.ones((len(batch), 3), "f4")}

    found = opened(predict(source, tmp_path / "p", model))
    assert found.rain.attrs["units"] == "mm"
    assert "units" not in found.classes.attrs
    assert found.classes.dims == ("time", "classes_1")
    assert found.rain.dims == ("time",)


def test_numbers_of_the_packing_are_not_copied(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    packed: Any = {"scale_factor": 0.5, "add_offset": 3.0, "_FillValue": -9, "units": "K"}
    array = group.create_array("t2m", shape=(8, 3), dtype="i2", dimension_names=("time", "lat"), attributes=packed)
    array[:] = np.arange(24).reshape(8, 3)
    found = opened(predict(stream(tmp_path / "s"), tmp_path / "p")).prediction
    np.testing.assert_array_equal(found, np.arange(24).reshape(8, 3) * 0.5 + 3)
    assert found.attrs["units"] == "K"


windows = st.fixed_dictionaries(
    {},
    optional={"time": st.integers(1, 5), "lat": st.integers(1, 6), "lon": st.integers(1, 6)},
).filter(bool)


@settings(max_examples=25)
@given(windows, st.data(), st.sampled_from([False, "block", "global"]), st.integers(1, 40), st.integers(500, 9000))
def test_patches_that_a_model_gives_back_are_the_source(
    tmp_path_factory: pytest.TempPathFactory,
    window: dict[str, int],
    data: st.DataObject,
    shuffle: Any,
    batch: int,
    chunk_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("patches")
    field = climate(folder / "s", times=12)
    stride = {axis: data.draw(st.integers(1, length), axis) for axis, length in window.items()}
    said: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch, "shuffle": shuffle}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predicted, "CHUNK_BYTES", chunk_bytes)
        found = opened(predict(stream(folder / "s", **said), folder / "p")).prediction
    covered = np.ones((), dtype=bool)
    for axis, length in zip(("time", "lat", "lon"), field.shape, strict=True):
        w, s = window.get(axis, 1), stride.get(axis, 1)
        reach = np.arange(length) < ((length - w) // s) * s + w
        covered = covered[..., None] & (reach & (np.arange(length) % s < w))
    np.testing.assert_array_equal(found, np.where(covered, field, np.float32(np.nan)))
    assert found.dims == ("time", "lat", "lon")
    assert {"time", "lat", "lon"} <= {*found.coords}


def test_channels_of_patches_stand_before_the_places_that_they_cover(tmp_path: Path) -> None:
    field = climate(tmp_path / "s")
    said: dict[str, Any] = {"window": {"lat": 4, "lon": 5}, "stride": {"lat": 2, "lon": 3}}
    source = stream(tmp_path / "s", **said)
    found = opened(predict(source, tmp_path / "p", lambda b: np.stack([b.inputs, 2 * b.inputs], axis=1))).prediction
    assert found.dims == ("time", "prediction_1", "lat", "lon")
    there = np.isfinite(found.values)
    np.testing.assert_allclose(found.values[there], np.stack([field, 2 * field], axis=1)[there], rtol=1e-6)
    assert there[:, :, :8].all()


def test_what_is_told_ahead_stands_at_the_time_that_it_is_told_of(tmp_path: Path) -> None:
    field = climate(tmp_path / "s")
    source = stream(tmp_path / "s", targets="t2m", window={"time": 4}, horizon=2)
    found = opened(predict(source, tmp_path / "p", lambda batch: batch.targets))
    np.testing.assert_array_equal(found.prediction[5:], field[5:])
    assert np.isnan(found.prediction[:5]).all()
    assert found.sizes["time"] == TIMES


def test_outputs_of_another_shape_have_a_row_for_each_window_where_that_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    field = climate(tmp_path / "s")
    source = stream(tmp_path / "s", window={"time": 6, "lat": 3}, stride={"time": 4, "lat": 3})
    found = opened(predict(source, tmp_path / "p", lambda b: b.inputs.mean(axis=(1, 2, 3))[:, None]))
    assert found.prediction.dims == ("time", "lat", "prediction_2")
    assert "which is no window of the source: they have a row for each sample" in caplog.text
    whole = known(tmp_path / "s")
    assert (found.time.values == whole.time.values[:36:4]).all()
    assert (found.lat.values == whole.lat.values[::3]).all()
    np.testing.assert_allclose(found.prediction[2, 1, 0], field[8:14, 3:6].mean(), rtol=1e-6)


@pytest.mark.usefixtures("_bands")
def test_the_axis_of_the_samples_comes_first(tmp_path: Path) -> None:
    field = climate(tmp_path / "s")
    found = opened(predict(stream(tmp_path / "s", sample_axes=(1,)), tmp_path / "p")).prediction
    assert found.dims == ("lat", "time", "lon")
    np.testing.assert_array_equal(found, field.transpose(1, 0, 2))
    found = opened(predict(stream(tmp_path / "s", sample_axes=(0, 2)), tmp_path / "q")).prediction
    assert found.dims == ("time", "lon", "lat")
    np.testing.assert_array_equal(found, field.transpose(0, 2, 1))
    found = opened(predict(stream(tmp_path / "s", sample_axes=(2, 1, 0), batch_size=50), tmp_path / "r")).prediction
    np.testing.assert_array_equal(found, field.transpose(2, 1, 0))
    windows: dict[str, Any] = {"sample_axes": (1,), "window": {"lat": 3}, "batch_size": 2}
    found = opened(predict(stream(tmp_path / "s", **windows), tmp_path / "w")).prediction
    assert found.dims == ("lat", "time", "lon")
    np.testing.assert_array_equal(found, field.transpose(1, 0, 2))


def test_coordinates_are_those_of_the_places_that_are_taken(tmp_path: Path) -> None:
    field = climate(tmp_path / "s")
    source = stream(tmp_path / "s", select={"lat": [90.0, 0.0], "lon": slice(35.0, 105.0)})
    found = opened(predict(source, tmp_path / "p"))
    np.testing.assert_array_equal(found.prediction, field[:, [0, 4], 1:4])
    assert found.lat.values.tolist() == [90.0, 0.0]
    assert found.lon.values.tolist() == [35.0, 70.0, 105.0]
    assert found.area.values.tolist() == np.arange(LATS * LONS).reshape(LATS, LONS)[[0, 4], 1:4].tolist()
    source = stream(tmp_path / "s", crop={"lon": 5}, crop_at="center")
    found = opened(predict(source, tmp_path / "q"))
    np.testing.assert_array_equal(found.prediction, field[:, :, 3:8])
    assert found.lon.values.tolist() == known(tmp_path / "s").lon.values[3:8].tolist()


def test_several_stores_lie_one_after_another(tmp_path: Path) -> None:
    first, second = climate(tmp_path / "a", times=13), climate(tmp_path / "b", start=13, times=20)
    both = np.concatenate([first, second])
    names = [tmp_path / "a", tmp_path / "b"]
    for number, said in enumerate(({}, {"window": {"time": 3}}, {"shuffle": "block"})):
        found = opened(predict(stream(names, **said), tmp_path / f"p{number}"))  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.prediction, both)
        assert found.time.values.tolist() == np.concatenate([known(n).time.values for n in names]).tolist()
    source = stream(names, window={"time": 4}, stride=4)
    found = opened(predict(source, tmp_path / "q", lambda b: b.inputs.mean(axis=(1, 2, 3))[:, None]))
    begin = [known(names[0]).time.values[:12:4], known(names[1]).time.values[:20:4]]
    assert found.time.values.tolist() == np.concatenate(begin).tolist()


@pytest.mark.parametrize(
    ("units", "dtype"),
    [
        ("hours since 2000-01-04 06:00:00", "i8"),
        ("days since 2000-1-1", "i4"),
        ("minutes since 1999-12-31", "f8"),
        ("hours since 2001-01-01", "f4"),
    ],
)
def test_times_of_several_stores_that_count_from_dates_of_their_own_are_joined(
    tmp_path: Path, units: str, dtype: str
) -> None:
    names = [tmp_path / "a", tmp_path / "b"]
    for name, said in zip(names, ("hours since 2000-01-01", units), strict=True):
        climate(name, times=12)
        clock = zarr.open_array(name / "time", mode="r+")
        new: Any = {**clock.attrs.asdict(), "units": said}
        numbers = np.asarray(clock[:]).astype(dtype)
        zarr.create_array(
            name / "time", data=numbers, dimension_names=("time",), attributes=new, overwrite=True, chunks=(5,)
        )
    found = opened(predict(stream(names), tmp_path / "p"))
    assert found.time.values.tolist() == np.concatenate([known(name).time.values for name in names]).tolist()
    assert zarr.open_array(tmp_path / "p" / "time", mode="r").attrs["units"] == "hours since 2000-01-01"


@pytest.mark.parametrize(
    ("units", "more"),
    [
        ("minutes since 2000-01-01 00:30", {}),  # no whole hours
        ("hours since 2000-01-02", {"calendar": "noleap"}),
        ("hours since 2000-01-02", {"_FillValue": -1}),
        ("fortnights since 2000-01-02", {}),
    ],
)
def test_times_that_the_first_store_s_units_can_t_tell_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, units: str, more: dict[str, Any]
) -> None:
    for name in ("a", "b"):
        climate(tmp_path / name)
        zarr.open_array(tmp_path / name / "time", mode="r+").attrs.update(more)
    zarr.open_array(tmp_path / "b" / "time", mode="r+").attrs["units"] = units
    target = predict(stream([tmp_path / "a", tmp_path / "b"]), tmp_path / "p")
    assert "coordinate time is not copied: its attributes differ between the stores" in caplog.text
    assert "time" not in opened(target).coords


def test_a_coordinate_that_can_t_be_joined_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        climate(tmp_path / name)
    zarr.open_array(tmp_path / "b" / "time", mode="r+").attrs["long_name"] = "model time"
    target = predict(stream([tmp_path / "a", tmp_path / "b"]), tmp_path / "p")
    assert "coordinate time is not copied: its attributes differ between the stores" in caplog.text
    assert "lat" in opened(target).coords
    assert "time" not in opened(target).coords


def test_whole_numbers_that_no_sample_came_to_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    climate(tmp_path / "s")
    source = stream(tmp_path / "s", split=(3, 11))
    target = predict(source, tmp_path / "p", lambda batch: batch.index)
    assert values(target)[[2, 3, 10, 11]].tolist() == [-(2**63), 3, 10, -(2**63)]
    assert opened(target).prediction.isnull().sum() == TIMES - 8
    assert f"{target}: no sample came to some places of prediction, which are -9223372036854775808" in caplog.text
    whole = predict(stream(tmp_path / "s"), tmp_path / "q", lambda batch: batch.index)
    assert opened(whole).prediction.dtype == np.int64


def test_dimensions_of_one_name_and_other_places_get_names_of_their_own(tmp_path: Path) -> None:
    climate(tmp_path / "s")
    source = stream(tmp_path / "s", window={"time": 4}, stride=2)

    def model(batch: Batch) -> Any:
        return {"field": batch.inputs, "mean": batch.inputs.mean(axis=(1, 2, 3))[:, None]}

    found = opened(predict(source, tmp_path / "p", model))
    assert found.field.dims == ("time", "lat", "lon")
    assert found["mean"].dims == ("mean_time", "mean_1")
    assert found.mean_time.values.tolist() == found.time.values[:38:2].tolist()


def test_rows_of_different_lengths_have_a_row_each(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("tokens", data=np.arange(100), chunks=(30,), dimension_names=("token",))
    group.create_array("ends", data=np.array([0, 5, 5, 40, 100]), chunks=(5,))
    source = stream(tmp_path / "s", inputs="tokens", ragged={"tokens": "ends"}, batch_size=3)
    target = predict(source, tmp_path / "p", lambda b: b.inputs["tokens.lengths"].astype("f4"))
    assert values(target).tolist() == [5, 0, 35, 60]
    assert opened(target).prediction.dims == ("sample",)


def test_a_store_in_memory_has_coordinates_too(tmp_path: Path) -> None:
    group = zarr.create_group(zarr.storage.MemoryStore())
    group.create_array("t2m", data=np.arange(12.0).reshape(6, 2), dimension_names=("time", "lat"))
    group.create_array("lat", data=np.array([3, 4]), dimension_names=("lat",))
    found = opened(predict(stream(group), tmp_path / "p"))
    assert found.prediction.values.tolist() == np.arange(12.0).reshape(6, 2).tolist()
    assert found.lat.values.tolist() == [3, 4]


def test_axes_without_names_are_named(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "s", data=np.arange(12.0).reshape(6, 2), chunks=(4, 2))
    found = opened(predict(stream(tmp_path / "s", inputs=None), tmp_path / "p"))
    assert found.prediction.dims == ("sample", "prediction_1")


def test_what_is_written_can_be_verified_and_trained_on(tmp_path: Path) -> None:
    field = climate(tmp_path / "s")
    for name, said in {"whole": {}, "part": {"split": (0, 9)}}.items():
        target = predict(stream(tmp_path / "s", **said), tmp_path / name)
        assert not [line for line in verify(str(target), deep=True) if "damaged" in line or "bad" in line]
    again = [b.inputs for b in stream(tmp_path / "whole", inputs="prediction").as_loader()]
    np.testing.assert_array_equal(np.concatenate(again), field)


@pytest.mark.parametrize("dtype", ["f4", "bool"])
def test_chunks_of_nothing_but_fill_are_written_too(tmp_path: Path, dtype: str) -> None:
    climate(tmp_path / "s")
    nothing = np.float32(np.nan) if dtype == "f4" else np.False_
    target = predict(stream(tmp_path / "s"), tmp_path / "p", lambda batch: np.full(len(batch), nothing))
    assert len(list((target / "prediction" / "c").iterdir())) == 1
    (again,) = [b.inputs for b in stream(target, inputs="prediction", batch_size=TIMES).as_loader()]
    np.testing.assert_array_equal(again, np.full(TIMES, nothing))


def test_nothing_that_looks_whole_is_left_by_a_writer_that_gave_up(tmp_path: Path) -> None:
    climate(tmp_path / "s")
    before = sorted(tmp_path.iterdir())

    def model(batch: Batch) -> Values:
        if 20 in batch.index:
            raise RuntimeError("stop")
        return np.asarray(batch.inputs)

    with pytest.raises(RuntimeError, match="stop"):
        predict(stream(tmp_path / "s", shuffle="block"), tmp_path / "p", model)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("inside", ["s/p", "s", "."])
def test_a_store_is_not_written_into_its_source(tmp_path: Path, inside: str) -> None:
    climate(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"lies within|is the source itself"):
        predict(stream(tmp_path / "s"), tmp_path / inside, overwrite=True)


def test_what_lies_elsewhere_in_each_epoch_has_no_place(tmp_path: Path) -> None:
    climate(tmp_path / "s")
    for said in ({"crop": {"lon": 5}}, {"window": {"time": 3}, "jitter": 1}):
        with pytest.raises(ConfigError, match="random crops or jitter"):
            predict(stream(tmp_path / "s", **said), tmp_path / "p")
    with pytest.raises(ConfigError, match="rank 1 alone"):
        predict(stream(tmp_path / "s", rank=1, world_size=2, batch_size=8), tmp_path / "p")


def test_outputs_that_are_no_rows_of_the_samples_or_change_are_refused(tmp_path: Path) -> None:
    climate(tmp_path / "s")
    shapes: dict[str, Callable[[Batch], Any]] = {
        r"has shape \(3, 9, 11\) for a batch of 7": lambda batch: batch.inputs[:3],
        r"float32\[9, 11\] in those before": lambda b: b.inputs if 0 in b.index else b.inputs[:, 1:],
        "float64": lambda b: b.inputs if 0 in b.index else b.inputs.astype("f8"),
        "those before had a": lambda b: {"a" if 0 in b.index else "b": b.inputs},
        "an output is named 'a/b'": lambda b: {"a/b": b.inputs},
    }
    for match, model in shapes.items():
        with pytest.raises(UserCodeError, match=match):
            predict(stream(tmp_path / "s"), tmp_path / "p", model)
    assert not (tmp_path / "p").exists()


def test_a_source_that_tells_nothing_has_rows_in_the_order_in_which_they_come(tmp_path: Path) -> None:
    store = PredictedStore(tmp_path / "p", None)
    store.open()
    for start in range(0, 70_000, 10_000):
        store.add(None, {"prediction": np.arange(start, start + 10_000, dtype="f4")}, 10_000)
    store.commit()
    store.close()
    np.testing.assert_array_equal(values(tmp_path / "p"), np.arange(70_000))


FULL = """
import resource, signal, sys
from pathlib import Path
from streamtrain.errors import EnvironmentProblem
from tests.data.test_predicted import predict, stream
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sources = [stream(sys.argv[1], shuffle=shuffle) for shuffle in (False, True)]
for source in sources:
    source.open_blocking()
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for source in sources:
    try:
        predict(source, Path(sys.argv[2]))
    except EnvironmentProblem as error:
        print(error)
    print([path.name for path in Path(sys.argv[2]).parent.iterdir()])
"""
"""Files may have 3,000 bytes: as good as a full disk."""


def test_a_disk_that_refuses_is_said_and_nothing_stays(tmp_path: Path) -> None:
    climate(tmp_path / "s")
    command = [sys.executable, "-c", FULL, str(tmp_path / "s"), str(tmp_path / "p")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    in_order, left, shuffled, left_too = done.stdout.splitlines()
    assert in_order.startswith(f"cannot write {tmp_path / 'p'}: "), done.stderr
    assert shuffled.startswith(f"cannot write {tmp_path / 'p'}: "), done.stderr
    assert left == left_too == "['s']"


@pytest.mark.parametrize("said", [{}, {"window": {0: 8}, "stride": 4}], ids=["rows", "windows"])
def test_memory_does_not_grow_with_the_store(tmp_path: Path, said: dict[str, Any]) -> None:
    peaks = []
    for rows in (4000, 16_000):
        zarr.create_array(tmp_path / f"s{rows}", shape=(rows, 2048), chunks=(100, 2048), dtype="f4")
        tracemalloc.start()
        predict(stream(tmp_path / f"s{rows}", inputs=None, batch_size=64, **said), tmp_path / f"p{rows}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((100, 10), (100, 10)),
        ((1 << 24, 4), (1 << 20, 4)),
        ((9, 721, 1440), (4, 721, 1440)),
        ((9, 37, 721, 1440), (1, 37, 181, 360)),
        ((5,), (5,)),
    ],
)
def test_chunks_are_whole_rows_or_parts_of_one_up_to_16_mib(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert chunk_shape(shape, 4) == expected


def test_a_target_that_is_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    climate(tmp_path / "s")
    target = predict(stream(tmp_path / "s"), tmp_path / "p")
    with pytest.raises(ConfigError, match="exists already and is complete"):
        predict(stream(tmp_path / "s"), target, lambda batch: pytest.fail("a batch was read"))
    again = predict(stream(tmp_path / "s"), target, lambda batch: 0 * batch.inputs, overwrite=True)
    assert not values(again).any()
