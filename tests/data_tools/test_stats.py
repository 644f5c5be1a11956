"""What statistics promise: numpy's numbers, NaN apart, within the error stated, in the attributes, within memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.__main__ import main
from data_tools.sketch import Sketch
from data_tools.stats import SHARES, stats
from data_tools.synth import synth
from streamtrain.data.verification import verify
from streamtrain.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def store(folder: Path, **arrays: Any) -> Path:
    group = zarr.create_group(str(folder))
    for name, data in arrays.items():
        group.create_array(name, data=data, chunks=(7, *data.shape[1:]))
    return folder


def rank_error(values: Any, found: Any, share: float) -> float:
    """By how much of the count the rank of an answer is off."""
    below, upto = (np.searchsorted(np.sort(values), found, side=side) for side in ("left", "right"))
    wanted = share * len(values)
    return float(max(below - wanted, wanted - upto, 0) / len(values))


@given(
    st.lists(st.floats(-1e6, 1e6, width=32) | st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=200),
    st.integers(1, 9),
)
@settings(max_examples=40)
def test_they_are_numpy_s_of_the_finite_numbers(
    tmp_path_factory: pytest.TempPathFactory, given: list[float], columns: int
) -> None:
    data = np.array(given * columns, dtype="f4").reshape(-1, columns)
    found = stats(store(tmp_path_factory.mktemp("s") / "a", x=data), memory="2MiB")["x"]
    finite = data[np.isfinite(data)].astype("f8")
    assert (found["count"], found["nan"], found["infinite"]) == (
        finite.size,
        np.isnan(data).sum(),
        np.isinf(data).sum(),
    )
    if not finite.size:
        assert found["mean"] is found["std"] is found["min"] is found["quantiles"]["0.5"] is None
        return
    assert found["mean"] == pytest.approx(finite.mean(), rel=1e-9, abs=1e-9)
    assert found["std"] == pytest.approx(finite.std(), rel=1e-6, abs=1e-6)
    assert (found["min"], found["max"]) == (finite.min(), finite.max())
    assert found["quantile_error"] == 0
    for share in SHARES:
        expected = np.sort(finite)[max(0, int(np.ceil(share * finite.size)) - 1)]
        assert found["quantiles"][str(share)] == expected


def test_channels_have_numbers_of_their_own_and_what_has_none_is_null(tmp_path: Path) -> None:
    data = RNG.normal(size=(50, 3, 4)) * np.array([1, 100, 1e4])[None, :, None] + 1e7
    data[:, 2] = np.nan
    found = stats(store(tmp_path / "a", x=data), axis=1)["x"]
    assert found["axis"] == 1
    assert found["count"] == [200, 200, 0]
    assert found["mean"][:2] == pytest.approx(data[:, :2].mean(axis=(0, 2)))
    assert found["std"][:2] == pytest.approx(data[:, :2].std(axis=(0, 2)), rel=1e-7)
    assert found["mean"][2] is found["quantiles"]["0.5"][2] is None


def test_they_stand_in_the_attributes_and_the_manifest_still_holds(tmp_path: Path) -> None:
    path = synth(tmp_path / "a", rows=200, columns=3, chunk_rows=32)
    found = stats(path)
    for name in ("x", "y"):
        own: Any = zarr.open_array(str(path / name), mode="r").attrs["streamtrain"]
        assert own == {"complete": True, "manifest": True, "stats": found[name]}
    assert list(verify(path, deep=True))[-1].startswith("ok: ")
    assert not list(path.rglob("*.part"))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_consolidated_metadata_tell_them_too(version: Any, tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "a"), zarr_format=version)
    group.create_array("x", data=np.arange(10.0), attributes={"units": "K"})
    zarr.consolidate_metadata(str(tmp_path / "a"))
    stats(tmp_path / "a")
    attributes: Any = zarr.open_consolidated(str(tmp_path / "a"))["x"].attrs
    assert (attributes["units"], attributes["streamtrain"]["stats"]["mean"]) == ("K", 4.5)


def test_cf_attributes_are_applied_unless_told_not_to(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "a"))
    cf: Any = {"scale_factor": 0.5, "add_offset": 10.0, "_FillValue": -999, "missing_value": 1e20}
    group.create_array("x", data=np.array([0, 2, -999, 4], dtype="i2"), attributes=cf)
    fill: Any = {"_FillValue": "AAAAAAAA+H8=", "missing_value": [1e20]}
    group.create_array("f", data=np.array([1, np.nan, 1e20, 3], dtype="f4"), attributes=fill)
    found = stats(tmp_path / "a", write=False)
    assert (found["x"]["mean"], found["x"]["count"], found["x"]["nan"], found["x"]["decoded"]) == (11, 3, 1, True)
    assert (found["f"]["mean"], found["f"]["nan"]) == (2, 2)
    assert stats(tmp_path / "a", arrays=["x"], write=False, decode_cf=False)["x"]["min"] == -999
    assert "streamtrain" not in zarr.open_array(str(tmp_path / "a/x"), mode="r").attrs


def test_a_part_of_the_rows_can_be_what_counts(tmp_path: Path) -> None:
    path = store(tmp_path / "a", x=np.arange(100.0))
    assert stats(path, rows=(0.0, 0.9), write=False)["x"]["max"] == 89


@settings(max_examples=25)
@given(
    st.integers(2, 64),
    st.lists(st.lists(st.integers(-1000, 1000), max_size=300), min_size=1, max_size=12),
    st.integers(0, 12),
)
def test_a_sketch_is_off_by_no_more_than_it_says_merged_or_not(size: int, parts: list[list[int]], at: int) -> None:
    one, two = Sketch(size), Sketch(size)
    for part in parts[:at]:
        one.add(np.array(part, dtype="f8"))
    for part in parts[at:]:
        two.add(np.array(part, dtype="f8"))
    one.merge(two)
    values = np.concatenate([np.array(part, dtype="f8") for part in parts])
    assert one.count == len(values)
    if not len(values):
        assert np.isnan(one.quantiles([0.5])).all()
        return
    for share, found in zip(SHARES, one.quantiles(SHARES), strict=True):
        assert rank_error(values, found, share) <= one.error + 1 / len(values)


def test_a_million_numbers_are_told_within_a_thousandth() -> None:
    values = RNG.lognormal(size=1_000_000)
    sketch = Sketch(4096)
    for part in np.split(values, 100):
        sketch.add(part)
    assert 0 < sketch.error < 0.002
    errors = [rank_error(values, q, share) for share, q in zip(SHARES, sketch.quantiles(SHARES), strict=True)]
    assert max(errors) <= sketch.error


def test_memory_is_bounded(tmp_path: Path) -> None:
    """64 MB in 16 MiB."""
    path = synth(tmp_path / "a", rows=32_000, columns=500, chunk_rows=250)
    tracemalloc.start()
    try:
        stats(path, memory="16MiB", arrays=["x"])
        assert tracemalloc.get_traced_memory()[1] < 17 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrays": ["z"]}, "no array 'z'"),
        ({"arrays": ["c"]}, "complex"),
        ({"axis": 0}, "axis=0"),
        ({"rows": (0.5, 0.5)}, "two fractions"),
        ({"memory": 1000}, "too small"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = store(tmp_path / "a", x=np.ones((4, 3)), c=np.ones(4, dtype="c8"))
    with pytest.raises(ConfigError, match=message):
        stats(path, **options)


def test_damage_is_no_number(tmp_path: Path) -> None:
    path = synth(tmp_path / "a", rows=64, columns=2, chunk_rows=8)
    file = path / "x/c/3/0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"array 'x': chunk 3\.0"):
        stats(path)


def test_the_command_prints_them_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store(tmp_path / "a", x=np.arange(10.0))
    assert main(["stats", str(path), "--rows", "0,0.5", "--dry-run"]) == 0
    name, _, text = capsys.readouterr().out.partition(": ")
    assert (name, json.loads(text)["mean"]) == ("x", 2)
    assert main(["stats", str(path), "--axis", "1"]) == 2


def test_an_array_without_a_number_counts_none(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "x"), shape=(4, 0), dtype="f4", chunks=(2, 1))
    found = stats(tmp_path / "x")[""]
    assert (found["count"], found["mean"], found["min"], found["quantiles"]["0.5"]) == (0, None, None, None)
