"""Texts, times and the like promise to go where their samples go, or to stay what they are; none is lost in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from data_tools.__main__ import main
from data_tools.others import carry
from data_tools.rechunk import rechunk
from data_tools.reshuffle import reshuffle
from data_tools.source import Source
from data_tools.split import split
from data_tools.stats import stats
from streamtrain.data.layout import Untrainable
from streamtrain.data.verification import verify
from streamtrain.errors import ConfigError, DataError

ROWS = 23
TEXTS = np.array([f"row {number}" for number in range(ROWS)])
TIMES = np.arange(ROWS).astype("M8[s]")
OTHERS = ("name", "time", "inner/fixed", "station", "title")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(params=[2, 3], ids=["zarr2", "zarr3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """`x` and `y` tell which row they are, as do a text and a time; `station` belongs to other samples."""
    group = zarr.create_group(tmp_path / "a", zarr_format=request.param)
    create(group, "x", np.arange(ROWS * 3, dtype="f4").reshape(ROWS, 3), ("time", "level"))
    create(group, "y", np.arange(ROWS), ("time",))
    create(group, "name", TEXTS, ("time",), dtype=str, attributes={"encoding-type": "string-array"})
    create(group, "time", TIMES, ("time",))
    create(group.create_group("inner"), "fixed", TEXTS.astype("S"), ("time",))
    create(group, "station", np.array(["a", "bc", "def"]), ("station",), dtype=str)
    create(group, "title", np.array("T"), (), dtype=str)
    group.create_group("uns/empty", attributes={"kept": True})
    return tmp_path / "a"


def create(group: zarr.Group, name: str, data: Any, dims: tuple[str, ...], **options: Any) -> None:
    options = {"shape": data.shape, "dtype": data.dtype, "chunks": (4,) * data.ndim, **options}
    attributes = options.pop("attributes", {})
    if group.metadata.zarr_format == 2:
        attributes |= {"_ARRAY_DIMENSIONS": list(dims)}
    else:
        options["dimension_names"] = dims
    group.create_array(name, attributes=attributes, **options)[...] = data


def values(folder: Path, name: str) -> Any:
    return np.asarray(zarr.open_array(str(folder / name), mode="r")[...])


pytestmark = pytest.mark.filterwarnings("ignore:The data type .* does not have a Zarr V3 specification")


def test_rechunk_copies_them_and_empty_groups(store: Path, tmp_path: Path) -> None:
    target = rechunk(store, tmp_path / "b", chunks={"x": (5, 2)}, codec="raw")
    for name in OTHERS:
        before, after = (zarr.open_array(str(folder / name), mode="r") for folder in (store, target))
        assert np.array_equal(values(target, name), values(store, name))
        assert after.dtype == before.dtype
        assert after.chunks == before.chunks
        assert dict(after.attrs) == dict(before.attrs)
    assert zarr.open_array(str(target / "x"), mode="r").chunks == (5, 2)
    assert zarr.open_group(str(target / "uns/empty"), mode="r").attrs["kept"] is True
    assert list(verify(target))[-1].endswith("; 5 arrays not looked at")


def test_reshuffle_takes_them_along_with_their_samples(store: Path, tmp_path: Path) -> None:
    target = reshuffle(store, tmp_path / "b", seed=3)
    order = values(target, "y")
    assert sorted(order.tolist()) == list(range(ROWS))
    for name in ("x", "name", "time", "inner/fixed"):
        assert np.array_equal(values(target, name), values(store, name)[order])
    assert values(target, "station").tolist() == ["a", "bc", "def"]


def test_split_cuts_them_with_their_samples(store: Path, tmp_path: Path) -> None:
    first, second = split(store, [tmp_path / "b", tmp_path / "c"], fractions=[0.4, 0.6])
    assert (len(values(first, "name")), len(values(second, "name"))) == (9, 14)
    for name in ("x", "name", "time", "inner/fixed"):
        assert np.array_equal(np.concatenate([values(first, name), values(second, name)]), values(store, name))
    assert values(second, "station").tolist() == ["a", "bc", "def"]


def test_those_not_named_are_copied_as_they_are(store: Path, tmp_path: Path) -> None:
    split(store, [tmp_path / "b"], fractions=[0.5], arrays=["x", "time"])
    assert np.array_equal(values(tmp_path / "b", "time"), TIMES[:11])
    assert np.array_equal(values(tmp_path / "b", "name"), TEXTS)
    reshuffle(store, tmp_path / "c", arrays=["x"])
    assert np.array_equal(values(tmp_path / "c", "name"), TEXTS)


def test_stats_leaves_them_alone_and_refuses_them_by_name(store: Path) -> None:
    assert set(stats(store, write=False)) == {"x", "y"}
    assert set(stats(store, arrays=["x"], write=False)) == {"x"}
    with pytest.raises(Untrainable, match="array 'name' has dtype"):
        stats(store, arrays=["name"])


def test_stats_minds_only_damage_of_arrays_that_were_asked_for(store: Path) -> None:
    for file in {".zarray", "zarr.json"}:
        if (store / "y" / file).exists():
            (store / "y" / file).write_text("{")
    assert set(stats(store, arrays=["x"], write=False)) == {"x"}
    with pytest.raises(DataError, match="/y/"):
        stats(store, write=False)


def test_sizes_for_one_of_them_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"array 'name' has dtype .* it is copied as it is"):
        rechunk(store, tmp_path / "b", chunks={"name": (2,)})
    assert not (tmp_path / "b").exists()


def test_damage_in_one_of_them_ends_the_tool_and_leaves_nothing(store: Path, tmp_path: Path, capsys: Capture) -> None:
    (chunk,) = [path for path in (store / "name/0", store / "name/c/0") if path.exists()]
    chunk.write_bytes(b"no texts")
    assert main(["rechunk", str(store), str(tmp_path / "b"), "--codec", "raw"]) == 3
    assert "array 'name' can't be read: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_what_zarr_refuses_to_write_is_an_error_with_the_arrays_name(store: Path, tmp_path: Path) -> None:
    taken = zarr.create_group(tmp_path / "b")
    create(taken, "name", TIMES, ("time",))
    with Source(store) as source, pytest.raises(DataError, match="array 'name' can't be written again: Contains"):
        carry(source.others["name"], taken, 1 << 20)


def test_too_little_memory_to_reorder_texts_is_said(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "a")
    create(group, "x", np.arange(64), ("row",))
    create(group, "text", np.array(["long " * 1000] * 64), ("row",), dtype=str)
    with pytest.raises(ConfigError, match="too small for array 'text'"):
        reshuffle(tmp_path / "a", tmp_path / "b", memory="64KiB")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_store_of_texts_alone_is_refused(tmp_path: Path) -> None:
    create(zarr.create_group(tmp_path / "a"), "text", TEXTS, ("row",), dtype=str)
    with pytest.raises(Untrainable, match="array 'text' has dtype"):
        Source(tmp_path / "a")
