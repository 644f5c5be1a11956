"""What all tools share: any region of any layout, damage by name, and stores made in the likeness of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.reshuffle import reshuffle
from data_tools.source import Source
from data_tools.split import split
from streamtrain.errors import ConfigError, DataError
from tests.data.stores import CASES, write

LAYOUTS = [case for case in CASES if case.shape == (23, 10)]


@settings(max_examples=60)
@given(data=st.data())
def test_any_region_is_what_numpy_gives(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("s")
    expected = write(data.draw(st.sampled_from(LAYOUTS)), folder)
    bounds = [data.draw(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)) for n in expected.shape]
    region = tuple((a, b) for a, b in bounds)
    with Source(folder) as source:
        found = source.arrays["x"].region(region)
    assert np.array_equal(found, expected[tuple(slice(a, b) for a, b in region)])


def test_absent_chunks_are_fill(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "x"), shape=(6,), chunks=(2,), dtype="int16", fill_value=7)[2:4] = 1
    with Source(tmp_path / "x") as source:
        assert source.arrays[""].rows(0, 6).tolist() == [7, 7, 1, 1, 7, 7]


def test_damage_is_named(tmp_path: Path) -> None:
    write(LAYOUTS[0], tmp_path)
    (tmp_path / "x/c/1/1").write_bytes(b"cut")
    with Source(tmp_path) as source, pytest.raises(DataError, match=r"array 'x': chunk 1\.1 .*/x/c/1/1"):
        source.arrays["x"].rows(0, 23)


@pytest.mark.parametrize("options", [{}, {"shards": (8, 4)}, {"zarr_format": 2}], ids=str)
def test_a_store_in_its_likeness_has_its_groups_attributes_and_names(options: Any, tmp_path: Path) -> None:
    options = dict(options)
    old = options.pop("zarr_format", 3) == 2
    group = zarr.create_group(str(tmp_path / "a"), attributes={"title": "T"}, zarr_format=2 if old else 3)
    inner = group.create_group("deep", attributes={"level": 1})
    names = {} if old else {"dimension_names": ("time", "x")}
    own: dict[str, Any] = {"units": "K", "streamtrain": {"stats": {"mean": 1}}}
    own |= {"_ARRAY_DIMENSIONS": ["time", "x"]} if old else {}
    layout: dict[str, Any] = {"shape": (16, 4), "chunks": (4, 4), "dtype": "f4", "fill_value": 9, **options, **names}
    inner.create_array("t", attributes=own, compressors=None, **layout)
    with Source(tmp_path / "a") as source:
        where = source.create_groups(tmp_path / "b")
        made = source.arrays["deep/t"].create(where)
        cut = source.arrays["deep/t"].create(tmp_path / "c", stats=False)
    found = zarr.open_group(str(tmp_path / "b"), mode="r")
    assert (found.attrs["title"], found["deep"].attrs["level"]) == ("T", 1)
    assert made.metadata.dimension_names == ("time", "x")  # type: ignore[union-attr]
    assert (made.chunks, made.shards, made.fill_value) == ((4, 4), options.get("shards"), 9)
    assert made.attrs["units"] == "K"
    assert made.attrs["streamtrain"] == {"stats": {"mean": 1}, "complete": True, "manifest": True}
    assert cut.attrs["streamtrain"] == {"complete": True, "manifest": True}
    assert made.compressors == ()


def test_samples_are_numbered_by_the_length_that_most_arrays_share(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path))
    for name, shape in {"x": (9, 2), "y": (9,), "lat": (4,), "scalar": ()}.items():
        group.create_array(name, shape=shape, dtype="f4", dimension_names=("lat",) if name == "lat" else None)
    with Source(tmp_path) as source:
        assert source.samples == 9
        assert set(source.with_samples()) == {"x", "y"}


def moved(tool: str, source: Path, target: Path, arrays: list[str] | None = None) -> None:
    if tool == "reshuffle":
        reshuffle(source, target, arrays=arrays)
    else:
        split(source, [target], fractions=[0.5], arrays=arrays)


@pytest.mark.parametrize("tool", ["reshuffle", "split"])
@pytest.mark.parametrize("said", ["csr_matrix", "csc_matrix", "categorical", "nullable-integer", "dataframe"])
def test_groups_whose_rows_cannot_be_moved_are_refused_by_name(tmp_path: Path, tool: str, said: str) -> None:
    group = zarr.create_group(str(tmp_path / "a"))
    group.create_array("y", data=np.arange(10))
    group.create_group("X", attributes={"encoding-type": said}).create_array("data", data=np.arange(10))
    with pytest.raises(DataError, match=f"'X' is a {said}") as refused:
        moved(tool, tmp_path / "a", tmp_path / "b", ["y"])
    assert "shuffled as it is" in str(refused.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("tool", ["reshuffle", "split"])
def test_which_arrays_have_samples_is_asked_where_it_is_not_clear(tmp_path: Path, tool: str) -> None:
    group = zarr.create_group(str(tmp_path / "a"))
    for name, length in {"values": 30, "offsets": 11, "y": 10, "key": 10}.items():
        group.create_array(name, data=np.arange(length))
    with pytest.raises(ConfigError, match=r"'key' 10, 'y' 10, .*'values' 30") as refused:
        moved(tool, tmp_path / "a", tmp_path / "b")
    assert "--arrays key,y" in str(refused.value.hint)
    with pytest.raises(ConfigError, match="as many rows"):
        moved(tool, tmp_path / "a", tmp_path / "b", ["y", "values"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    moved(tool, tmp_path / "a", tmp_path / "b", ["y", "key"])
    made = zarr.open_group(str(tmp_path / "b"), mode="r")
    offsets, y, key = (np.asarray(made[name][...]) for name in ("offsets", "y", "key"))  # type: ignore[index]
    assert np.array_equal(offsets, np.arange(11))
    assert np.array_equal(y, key)


def test_lengths_that_agree_along_other_dimensions_are_not_taken_for_samples(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "a"))
    group.create_array("x", data=np.zeros((10, 10)), dimension_names=("time", "lat"))
    group.create_array("lat", data=np.arange(10.0), dimension_names=("lat",))
    with Source(tmp_path / "a") as source:
        with pytest.raises(ConfigError, match="not clear"):
            source.with_samples()
        assert list(source.with_samples(["x"])) == ["x"]
