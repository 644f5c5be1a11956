"""What rechunking and splitting promise: the same values in their new places, in bounded memory, each sample once."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.__main__ import main
from data_tools.rechunk import rechunk
from data_tools.split import split
from data_tools.synth import synth
from streamtrain.data.verification import verify
from streamtrain.errors import ConfigError, DataError

Capture = pytest.CaptureFixture[str]


def array(folder: Path, name: str = "x") -> Any:
    return zarr.open_array(str(folder / name), mode="r")


def store(folder: Path, shape: tuple[int, ...] = (40, 6, 5), **options: Any) -> Path:
    group = zarr.create_group(str(folder))
    data = np.arange(np.prod(shape), dtype="f4").reshape(shape)
    group.create_array("x", data=data, attributes={"units": "K"}, **{"chunks": (7, 4, 5), **options})
    group.create_array("y", data=np.arange(shape[0]), chunks=(16,))
    group.create_array("lat", data=np.arange(3.0), dimension_names=("lat",))
    return folder


@settings(max_examples=15)
@given(data=st.data())
def test_values_are_the_same_in_any_chunks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("r")
    layouts: list[dict[str, Any]] = [{}, {"shards": (14, 8, 5)}, {"compressors": None}]
    store(folder / "a", **data.draw(st.sampled_from(layouts)))
    chunks = data.draw(st.tuples(st.integers(1, 50), st.integers(1, 6), st.sampled_from([1, 5, -1])))
    times = data.draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)))
    whole = tuple(5 if c == -1 else c for c in chunks)
    shards = None if times is None else {"x": (whole[0] * times[0], whole[1] * times[1], whole[2])}
    codec: Any = data.draw(st.sampled_from([None, "raw", "zstd", "blosc"]))
    memory = data.draw(st.sampled_from([24 << 10, 1 << 20]))
    try:
        rechunk(folder / "a", folder / "b", chunks={"x": chunks}, shards=shards, codec=codec, memory=memory)
    except ConfigError as error:
        assert "too small" in str(error)  # noqa: PT017
        return
    for name in ("x", "y", "lat"):
        assert np.array_equal(array(folder / "b", name)[...], array(folder / "a", name)[...])
    assert array(folder / "b").shards == (None if shards is None else shards["x"])
    assert array(folder / "b").attrs["units"] == "K"


def test_what_is_not_named_keeps_its_chunks(tmp_path: Path) -> None:
    rechunk(store(tmp_path / "a"), tmp_path / "b", chunks={"": (20,), "lat": (2,)})
    assert [array(tmp_path / "b", name).chunks for name in ("x", "y", "lat")] == [(20, 6, 5), (20,), (2,)]
    rechunk(tmp_path / "a", tmp_path / "c", chunks={"y": (8,)})
    assert [array(tmp_path / "c", name).chunks for name in ("x", "y")] == [(7, 4, 5), (8,)]


def test_rows_of_a_store_of_columns_take_the_memory_of_a_tile(tmp_path: Path) -> None:
    """64 MB in 8 MiB, from whole rows to columns."""
    synth(tmp_path / "a", rows=32_000, columns=500, chunk_rows=250)
    rechunk(synth(tmp_path / "warm", rows=10, columns=2), tmp_path / "warmed", chunks={"x": (5,)})
    tracemalloc.start()
    try:
        rechunk(tmp_path / "a", tmp_path / "b", chunks={"x": (8000, 20)}, memory="8MiB")
        assert tracemalloc.get_traced_memory()[1] < 9 << 20
    finally:
        tracemalloc.stop()
    assert np.array_equal(array(tmp_path / "b")[:, 7], array(tmp_path / "a")[:, 7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": {"z": (4,)}}, "has no array 'z'"),
        ({"chunks": {"y": (4, 4)}}, "more axes"),
        ({"chunks": {"x": (0,)}}, "at least 1"),
        ({"chunks": {"x": (4, 4, 5)}, "shards": {"x": (6, 4, 5)}}, "no multiple"),
        ({"chunks": {"x": (40,)}, "memory": 100}, "too small for array"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_and_nothing_is_left(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    store(tmp_path / "a")
    with pytest.raises(ConfigError, match=message):
        rechunk(tmp_path / "a", tmp_path / "b", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_command_rechunks(tmp_path: Path, capsys: Capture) -> None:
    store(tmp_path / "a")
    command = ["rechunk", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(command) == 2
    assert "needs --chunks" in capsys.readouterr().err
    assert main([*command, "--chunks", "x=10,3", "--chunks", "y=5", "--codec", "raw"]) == 0
    assert (array(tmp_path / "b").chunks, array(tmp_path / "b", "y").chunks) == ((10, 3, 5), (5,))
    assert main(["verify", str(tmp_path / "b"), "--deep"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("ok: ")


@given(cut=st.floats(0.05, 0.95), rest=st.booleans())
@settings(max_examples=8)
def test_each_sample_goes_into_one_part_in_order(
    tmp_path_factory: pytest.TempPathFactory, cut: float, rest: bool
) -> None:
    folder = tmp_path_factory.mktemp("s")
    store(folder / "a")
    shares = (cut, (1 - cut) * (1 if rest else 0.5))
    parts = split(folder / "a", [folder / "t", folder / "v"], fractions=shares, memory=24 << 10)
    rows = np.concatenate([array(part, "y")[...] for part in parts])
    assert array(parts[0], "y").shape == (int(cut * 40),)
    assert np.array_equal(rows, np.arange(len(rows)))
    assert not rest or len(rows) == 40
    assert np.array_equal(np.concatenate([array(part)[...] for part in parts]), array(folder / "a")[: len(rows)])
    assert all(array(part, "lat").shape == (3,) for part in parts)


def test_parts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    store(tmp_path / "a")
    targets = [tmp_path / "t", tmp_path / "v"]
    for shares in [(0.5,), (0.9, 0.2), (1.0, 0.0)]:
        with pytest.raises(ConfigError, match="must be a share"):
            split(tmp_path / "a", targets, fractions=shares)
    with pytest.raises(DataError, match="without any"):
        split(tmp_path / "a", targets, fractions=(0.99, 0.001))
    with pytest.raises(ConfigError, match="the same"):
        split(tmp_path / "a", targets[:1] * 2, fractions=(0.5, 0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_command_splits_and_the_parts_have_manifests(tmp_path: Path, capsys: Capture) -> None:
    store(tmp_path / "a")
    paths = [str(tmp_path / name) for name in ("a", "t", "v")]
    assert main(["split", *paths, "--fractions", "0.8,0.2"]) == 0
    assert capsys.readouterr().out.splitlines() == paths[1:]
    for path in paths[1:]:
        assert list(verify(path, deep=True))[-1].startswith("ok: ")


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (0, 0)], ids=str)
def test_an_array_with_an_axis_of_length_zero_stays_one(shape: tuple[int, ...], tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "a")
    group.create_array("x", data=np.arange(8.0), chunks=(4,))
    group.create_array("none", shape=shape, dtype="f4", chunks=(2,) * len(shape), attributes={"kept": 1})
    rechunk(tmp_path / "a", tmp_path / "b", chunks={"": (3,)})
    assert array(tmp_path / "b", "none").shape == shape
    assert array(tmp_path / "b", "none").attrs["kept"] == 1
    assert array(tmp_path / "b").chunks == (3,)
    split(tmp_path / "a", [tmp_path / "c"], fractions=[0.5], arrays=["x"])
    assert array(tmp_path / "c", "none").shape == shape


@pytest.mark.parametrize("option", ["chunks", "shards"])
def test_more_sizes_than_any_array_has_axes_are_refused(option: str, tmp_path: Path) -> None:
    sizes: Any = {option: {"": (1, 2, 3, 4)}}
    with pytest.raises(ConfigError, match=f"{option}=1,2,3,4 has 4 sizes, and no array of .* has more than 3 axes"):
        rechunk(store(tmp_path / "a"), tmp_path / "b", **sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
