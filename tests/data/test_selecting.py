"""What selecting by coordinates promises: the places that xarray gives, or one error that says what is meant."""

from __future__ import annotations

import asyncio
import datetime
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data.selecting import Between, Coordinate, places_of, wanted_of
from streamtrain.data.stream import ZarrStream
from streamtrain.data.times import decode_times
from streamtrain.errors import CheckpointError, ConfigError, DataError

quick = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
DAYS, LEVELS, LATS = 40, 4, 13
X: NDArray[np.float32] = np.arange(DAYS * LEVELS * LATS, dtype=np.float32).reshape(DAYS, LEVELS, LATS)
LEVEL = np.array([1000, 850, 500, 250])
LAT = np.linspace(90, -90, LATS, dtype=np.float32)
HOURS = np.arange(DAYS) * 24 * 20  # every 20 days from 1999 on
TIMES = np.datetime64("1999-01-01T12", "us") + HOURS.astype("timedelta64[h]")
YEARS = TIMES.astype("M8[Y]").astype(int) + 1970
NAMES = np.array([f"s{n:02}" for n in range(LATS)])


def write(path: Any, first: int = 0, last: int = DAYS, **coordinates: Any) -> Any:
    group = zarr.create_group(path)
    group.create_array("x", data=X[first:last], chunks=(7, 2, 5), dimension_names=("time", "level", "lat"))
    group.create_array("y", data=np.arange(first, last), dimension_names=("time",))
    time = group.create_array("time", data=HOURS[first:last], chunks=(9,), dimension_names=("time",))
    time.attrs.update({"units": "hours since 1999-1-1 12:00:00", "calendar": "proleptic_gregorian"})
    group.create_array("level", data=LEVEL, dimension_names=("level",))
    group.create_array("lat", data=LAT, dimension_names=("lat",))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = write(tmp_path_factory.mktemp("values") / "data.zarr")
    return path


@pytest.fixture(scope="module")
def data() -> xarray.DataArray:
    return xarray.DataArray(X, {"time": TIMES, "level": LEVEL, "lat": LAT}, ("time", "level", "lat"))


def stream(store: Any, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 6, "output": "numpy"}
    return ZarrStream(store, **{**given, **keywords})


async def samples(store: Any, **keywords: Any) -> dict[int, Any]:
    """Inputs by sample number."""
    found: dict[int, Any] = {}
    async with stream(store, **keywords) as source:
        async for batch in source:
            found |= dict(zip(batch.index.tolist(), batch.inputs.copy(), strict=True))
    return found


@pytest.mark.parametrize(
    "select",
    [
        {"time": slice("1999-06", "2000")},
        {"time": slice("2000-02-01", None)},
        {"time": slice(None, "1999-03-05")},
        {"time": slice(datetime.datetime(2000, 1, 1), np.datetime64("2000-07-01"))},
        {"time": slice("1999", "2000", 3)},
        {"time": ["1999-01-21T12:00", "2000-02-05T12"]},
        {"level": [500.0, 850.0]},
        {"level": [500, 850]},
        {"level": slice(850.0, 300.0)},
        {"lat": slice(60, 15)},
        {"lat": [30.0, 0.0]},
        {"time": slice("1999", "1999"), "level": [250.0], "lat": slice(45, -45)},
    ],
    ids=str,
)
@pytest.mark.parametrize("shuffle", [False, "block"])
async def test_values_are_those_that_xarray_gives(
    store: Path, data: xarray.DataArray, select: dict[str, Any], shuffle: Any
) -> None:
    expected = data.sel(**select)
    found = await samples(store, select=select, shuffle=shuffle)
    times = np.searchsorted(TIMES, np.sort(expected["time"].values.astype("M8[us]")))
    assert sorted(found) == times.tolist()
    ordered = np.stack([found[number] for number in sorted(found)])
    assert (ordered == expected.sortby("time").values).all()


async def test_a_text_alone_is_its_whole_period(store: Path) -> None:
    assert sorted(await samples(store, select={"time": "1999"})) == np.flatnonzero(YEARS == 1999).tolist()


async def test_an_axis_by_number_takes_positions(store: Path) -> None:
    found = await samples(store, select={0: slice(3, 30, 4), 1: [0, -1], 2: slice(2, 5)})
    assert sorted(found) == list(range(3, 30, 4))
    assert all((patch == X[number][[0, 3], 2:5]).all() for number, patch in found.items())


async def test_whole_numbers_that_can_only_be_positions_are(store: Path) -> None:
    found = await samples(store, select={"level": [0, 3], "time": [0, 5]})
    assert sorted(found) == [0, 5]
    assert all((patch == X[number][[0, 3]]).all() for number, patch in found.items())


async def test_what_can_be_both_is_an_error_that_names_both(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("x", data=X[:, :, 0], dimension_names=("time", "member"))
    group.create_array("member", data=np.arange(1, 5), dimension_names=("member",))
    for member, places in (([1.0, 2.0], [0, 1]), ([4], [3])):
        found = await samples(tmp_path / "s", targets=None, select={"member": member})
        assert (found[2] == X[2, places, 0]).all()
    with pytest.raises(ConfigError, match=r"positions \(where member is 2, 3\) or values \(at the positions 0, 1\)"):
        await samples(tmp_path / "s", targets=None, select={"member": [1, 2]})


@pytest.mark.parametrize("split", [(0.0, 0.5), (0.5, 1.0)])
async def test_windows_never_cross_what_was_cut_out(store: Path, split: Any) -> None:
    kept = [*range(2, 9), *range(12, 24), *range(30, 32)]
    mine = set(kept[: len(kept) // 2] if split[0] == 0 else kept[len(kept) // 2 :])
    given: dict[str, Any] = {"select": {0: kept}, "window": 3, "horizon": 1, "split": split, "shuffle": "block"}
    found = await samples(store, **given)
    assert sorted(found) == [n for n in range(DAYS - 3) if set(range(n, n + 4)) <= mine]
    assert all((window == X[number : number + 3]).all() for number, window in found.items())


async def test_windows_split_by_chunk_lie_in_one_part_whole_and_the_others_are_counted(store: Path) -> None:
    seen: list[set[int]] = []
    cut = 0
    for split in ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0)):
        async with stream(store, window=2, split=split, split_by="chunk", shuffle="block") as source:
            numbers = {int(n) for batch in [b async for b in source] for n in batch.index}
            cut += source.plan().samples_cut
        seen.append({place for n in numbers for place in (n, n + 1)})
        assert numbers
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert cut > 0


async def test_places_of_each_sample_axis_are_cut_out(store: Path) -> None:
    given: dict[str, Any] = {"sample_axes": (0, 2), "targets": None, "shuffle": "block"}
    found = await samples(store, select={"time": "1999", 2: [1, 4]}, **given)
    days = np.flatnonzero(YEARS == 1999).tolist()
    assert sorted(found) == [day * LATS + lat for day in days for lat in (1, 4)]
    assert all((value == X[divmod(number, LATS)[0], :, number % LATS]).all() for number, value in found.items())


async def test_patches_lie_in_what_is_left(store: Path) -> None:
    found = await samples(store, targets=None, select={"lat": slice(60, -30)}, window={"lat": 3}, stride=2)
    assert sorted(found) == [day * 6 + n for day in range(DAYS) for n in range(6) if 2 <= 2 * n <= 6]


async def test_a_range_of_samples_is_arithmetic_without_a_table(store: Path) -> None:
    async with stream(store, select={"time": slice("1999-06", "2000")}) as source:
        await source.open()
        assert source._known().survey.drawn is None


async def test_a_choice_is_of_what_is_selected(store: Path) -> None:
    found = await samples(store, select={"time": "2000"}, indices=list(range(0, DAYS, 2)))
    inside = np.flatnonzero(YEARS == 2000)
    assert sorted(found) == [n for n in inside if n % 2 == 0]


async def test_each_store_has_its_own_coordinates(tmp_path: Path) -> None:
    stores = [write(tmp_path / "a", 0, 15), write(tmp_path / "b", 15, 28), write(tmp_path / "c", 28, DAYS)]
    whole = write(tmp_path / "whole")
    for select in ({"time": slice("1999-12", "2000-08")}, {"time": ["1999-01-01T12", "2000-02-05T12"]}):
        assert sorted(await samples(stores, select=select)) == sorted(await samples(whole, select=select))


async def test_whole_numbers_mean_the_same_in_every_store(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 10)):
        group = zarr.create_group(tmp_path / name)
        group.create_array("x", data=X[first : first + 10], dimension_names=("step", None, None))
        group.create_array("step", data=np.arange(first, first + 10), dimension_names=("step",))
    stores = [tmp_path / "a", tmp_path / "b"]
    for steps in ([3, 14], [13, 14], [3.0, 4.0]):
        assert sorted(await samples(stores, targets=None, select={"step": steps})) == steps
    with pytest.raises(ConfigError, match=r"positions \(where step is 13, 14\) or values \(in other stores\)"):
        await samples(stores, targets=None, select={"step": [3, 4]})
    with pytest.raises(DataError, match="takes 25 of axis 'step', which is not there"):
        await samples(stores, targets=None, select={"step": [3, 25]})


async def test_a_position_of_other_values_is_refused(store: Path) -> None:
    async with (
        stream(store, select={"lat": slice(60, 15)}) as one,
        stream(store, select={"lat": slice(60, 30)}) as other,
    ):
        await one.open()
        with pytest.raises(CheckpointError, match="select"):
            other.load_state_dict(one.state_dict())


async def test_a_position_goes_through_json(store: Path) -> None:
    for keywords in ({"groups": "y"}, {"indices": [3, 5, 7]}, {"select": {"time": "1999"}, "split_by": "chunk"}):
        async with stream(store, split=(0.0, 0.6), **keywords) as source:
            await source.open()
            source.load_state_dict(json.loads(json.dumps(source.state_dict())))


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"level": [500.0, 700.0]}, "takes 700.0 of axis 'level', which is not there"),
        ({"level": [700]}, "takes 700 of axis 'level'"),
        ({"lat": slice(15, 60)}, "whose coordinate falls"),
        ({"lat": slice("a", "b")}, "whose coordinate has numbers"),
        ({"lat": ["north"]}, "its coordinate has numbers"),
        ({"time": slice("2031", "2032")}, "no samples are chosen"),
        ({"time": slice(0, 3)}, "whose coordinate has times"),
        ({"time": ["1999-01-02"]}, "which is not there"),
        ({"time": slice("1999-02-31", None)}, "select= of axis 'time'"),
        ({"time": [0, 99]}, "which has 40 places"),
        ({"lat": [0.0, "a"]}, "must be places"),
        ({"lat": {"from": 3}}, "must have start, stop and step alone"),
        ({0: slice(0, 10), "time": "2000"}, "names one axis of 'x' twice: 0 and 'time'"),
        ({"lat": [0.0], 2: [0]}, "names one axis of 'x' twice: 'lat' and 2"),
    ],
    ids=str,
)
async def test_what_is_not_there_is_named(store: Path, select: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        await samples(store, select=select)


async def test_a_table_of_start_and_stop_is_a_slice(store: Path) -> None:
    spelt = {"lat": {"start": 60, "stop": 15}}
    assert (await samples(store, select=spelt))[0].shape == (LEVELS, 4)


# ---- for every coordinate


def of_one(axis: str, wanted: Any, coordinate: Coordinate) -> Any:
    """The places, and what is missing, where there is one store."""
    return places_of(axis, wanted, [(len(coordinate.values), coordinate)])[0]


def test_texts_are_values_too() -> None:
    coordinate = Coordinate("station", NAMES)
    assert of_one("station", wanted_of("station", ["s03", "s01"]), coordinate)[0].tolist() == [3, 1]
    assert of_one("station", Between("s03", "s05"), coordinate)[0].tolist() == [3, 4, 5]
    assert of_one("station", ("x",), coordinate)[1] == ("x",)


@quick
@given(
    st.lists(st.integers(-50, 50), min_size=1, max_size=12, unique=True),
    st.booleans(),
    st.sampled_from(["int64", "float32", "float64"]),
    st.none() | st.integers(-60, 60),
    st.none() | st.integers(-60, 60),
    st.none() | st.integers(1, 3),
)
def test_ranges_are_those_of_xarray(
    values: list[int], falling: bool, dtype: str, start: int | None, stop: int | None, step: int | None
) -> None:
    ordered = np.array(sorted(values, reverse=falling), dtype=dtype)
    table = xarray.DataArray(np.arange(len(ordered)), {"a": ordered}, ("a",))
    expected = table.sel(a=slice(start, stop, step)).values.tolist()
    try:
        found = of_one("a", Between(start, stop, step), Coordinate("a", ordered))[0].tolist()
    except ConfigError:  # the wrong way round
        found = []
    if len(ordered) > 1 or not falling:
        assert found == expected


@quick
@given(
    st.lists(st.integers(-100_000, 100_000), min_size=1, max_size=5),
    st.sampled_from(["days", "hours", "minutes", "seconds", "milliseconds", "microseconds"]),
    st.sampled_from(["2000-01-01", "1900-1-1 00:00:0.0", "1970-01-01T06:30:00Z", "2001-02-03 04:05"]),
    st.booleans(),
)
def test_times_are_decoded_as_by_xarray(numbers: list[int], unit: str, since: str, fractions: bool) -> None:
    values = np.array(numbers) / 4 if fractions and unit != "microseconds" else np.array(numbers)
    units = f"{unit} since {since}"
    coder = xarray.coders.CFDatetimeCoder(time_unit="us")
    expected = xarray.decode_cf(
        xarray.Dataset({"t": ("t", values, {"units": units, "calendar": "proleptic_gregorian"})}), decode_times=coder
    )
    found = decode_times(values, units, "proleptic_gregorian", "t")
    assert (found == expected["t"].values.astype("M8[us]")).all()


@pytest.mark.parametrize(
    ("units", "calendar", "message"),
    [
        ("days since 2000-01-01", "360_day", "the calendar '360_day'"),
        ("days since 2000-01-01", "noleap", "the calendar 'noleap'"),
        ("months since 2000-01-01", "standard", "count 'months'"),
        ("days since yesterday", "standard", "count from 'yesterday'"),
        ("days since 2000-13-01", "standard", "count from '2000-13-01'"),
        ("hours since 2000-01-01 00:00 +02:00", "standard", "no date of universal time"),
        ("days since 0001-01-01", "standard", "before 1582-10-15"),
    ],
)
def test_times_that_are_not_decoded_are_named(units: str, calendar: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_times(np.arange(3), units, calendar, "time")


@pytest.mark.parametrize("calendar", [None, "standard", "proleptic_gregorian"])
def test_nanoseconds_are_decoded_to_the_last(calendar: str | None) -> None:
    numbers = np.array([1_700_000_000_000_000_001, -1])
    found = decode_times(numbers, "nanoseconds since 1970-01-01", calendar, "time")
    assert (found == numbers.astype("M8[ns]")).all()
    with pytest.raises(DataError, match="before 1582-10-15"):
        decode_times(np.arange(-200_000, -199_998), "days since 2000-01-01", "standard", "time")


@pytest.mark.parametrize("missing", [{}, {"_FillValue": -1}, {"_Unsigned": "true"}], ids=str)
async def test_nanoseconds_are_told_apart_beside_missing_ones(tmp_path: Path, missing: dict[str, Any]) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("x", data=np.arange(3), dimension_names=("time",))
    numbers = np.array([1_700_000_000_000_000_001, 1_700_000_000_000_000_002, 7 if "_Unsigned" in missing else -1])
    time = group.create_array("time", data=numbers)
    time.attrs.update({"units": "nanoseconds since 1970-01-01", **missing})
    found = await samples(tmp_path / "s", targets=None, select={"time": [np.datetime64(int(numbers[1]), "ns")]})
    assert sorted(found) == [1]


@pytest.mark.parametrize(
    ("values", "units"),
    [
        ([2**62, 5], "days since 2000-01-01"),
        ([200_000_000, 5], "days since 2000-01-01"),
        ([5, -200_000_000], "days since 2000-01-01"),
        ([9.96921e36, 5.0], "hours since 1900-01-01"),
        ([1.7e308, np.nan], "days since 1900-01-01"),
        ([], "nanoseconds since 1600-01-01"),
        ([2**64 - 1], "seconds since 1970-01-01"),
        ([2**63 - 1], "nanoseconds since 2000-01-01"),
        ([0], "nanoseconds since 1600-01-01"),
    ],
)
def test_times_that_would_wrap_to_another_year_are_refused(values: list[Any], units: str) -> None:
    with pytest.raises(DataError, match="its times go beyond what datetime64"):
        decode_times(np.array(values), units, "proleptic_gregorian", "time")


async def test_coordinates_that_xarray_has_written_are_read(tmp_path: Path, data: xarray.DataArray) -> None:
    table = data.to_dataset(name="x").assign_coords(lat=NAMES)
    for form in (2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr's, of texts of one length
            table.to_zarr(tmp_path / f"{form}", zarr_format=form, consolidated=False)
        found = await samples(
            tmp_path / f"{form}", targets=None, select={"time": slice("2000", "2000"), "lat": ["s01", "s12"]}
        )
        expected = table.sel(time="2000", lat=["s01", "s12"])["x"].values
        assert (np.stack(list(found.values())) == expected).all()


def test_a_damaged_coordinate_is_named(store: Path, tmp_path: Path) -> None:
    write(tmp_path / "s")
    (tmp_path / "s" / "time" / "c" / "0").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="time"):
        asyncio.run(samples(tmp_path / "s", select={"time": "1999"}))
