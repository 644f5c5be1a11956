"""What reshuffling promises: each sample once, arrays alike, from the seed alone, in bounded memory, all or nothing."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.__main__ import main
from data_tools.reshuffle import buckets, reshuffle
from data_tools.source import Source
from data_tools.synth import synth
from streamtrain.data.verification import verify
from streamtrain.errors import ConfigError, DataError, EnvironmentProblem


def store(folder: Path, rows: int = 500, **options: Any) -> Path:
    """`x`, `y` and `key` tell which row they are; `lat` has another length."""
    group = zarr.create_group(str(folder), attributes={"title": "T"})
    x = np.arange(rows * 3, dtype="f4").reshape(rows, 3)
    group.create_array("x", data=x, **{"chunks": (7, 2), "dimension_names": ("time", "x"), **options})
    group.create_array("y", data=np.arange(rows, dtype="i8"), chunks=(20,))
    group.create_array("key", data=(np.arange(rows) % 256).astype("u1"), chunks=(64,))
    group.create_array("lat", data=np.linspace(0, 1, 11), dimension_names=("lat",))
    return folder


def values(folder: Path) -> dict[str, Any]:
    group = zarr.open_group(str(folder), mode="r")
    return {name: np.asarray(group[name][...]) for name in ("x", "y", "key", "lat")}  # type: ignore[index]


@settings(max_examples=15)
@given(
    rows=st.integers(1, 700).filter(lambda rows: rows != 11),  # as long as `lat`: which are samples is not clear
    seed=st.integers(0, 1 << 40),
    memory=st.sampled_from(["16KiB", "64KiB", "1GiB"]),
    options=st.sampled_from([{}, {"shards": (21, 4)}, {"compressors": None}]),
)
def test_each_sample_comes_once_and_all_arrays_alike(
    tmp_path_factory: pytest.TempPathFactory, rows: int, seed: int, memory: str, options: Any
) -> None:
    folder = tmp_path_factory.mktemp("r")
    before = values(store(folder / "a", rows, **options))
    after = values(reshuffle(folder / "a", folder / "b", seed=seed, memory=memory))
    order = after["y"]
    assert sorted(order.tolist()) == list(range(rows))
    assert np.array_equal(after["x"], before["x"][order])
    assert np.array_equal(after["key"], before["key"][order])
    assert np.array_equal(after["lat"], before["lat"])


def test_the_order_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    store(tmp_path / "a")
    orders = [
        values(reshuffle(tmp_path / "a", tmp_path / f"{at}", seed=seed, memory=memory))["y"].tolist()
        for at, (seed, memory) in enumerate([(0, "16KiB"), (0, "1GiB"), (1, "1GiB")])
    ]
    assert orders[0] == orders[1] != orders[2]
    distance = np.abs(np.array(orders[0]) - np.arange(500)).mean()
    assert 500 / 3 * 0.8 < distance < 500 / 3 * 1.2, "a third of the length is the mean of a full shuffle"


def test_layout_attributes_and_names_are_kept_and_a_manifest_is_made(tmp_path: Path) -> None:
    store(tmp_path / "a", shards=(21, 4), compressors=None)
    reshuffle(tmp_path / "a", tmp_path / "b")
    group = zarr.open_group(str(tmp_path / "b"), mode="r")
    x: Any = group["x"]
    assert (x.chunks, x.shards, x.compressors, x.metadata.dimension_names) == ((7, 2), (21, 4), (), ("time", "x"))
    assert group.attrs["title"] == "T"
    lines = list(verify(tmp_path / "b", deep=True))
    assert lines[-1].startswith("ok: ")
    assert not any("nobody knows" in line for line in lines)


def test_memory_holds_a_bucket(tmp_path: Path) -> None:
    """64 MB in 8 MiB."""
    synth(tmp_path / "a", rows=32_000, columns=500, chunk_rows=250)
    reshuffle(synth(tmp_path / "warm", rows=10, columns=2), tmp_path / "warmed")
    tracemalloc.start()
    try:
        reshuffle(tmp_path / "a", tmp_path / "b", memory="8MiB")
        assert tracemalloc.get_traced_memory()[1] < 9 << 20
    finally:
        tracemalloc.stop()


def test_too_little_memory_is_refused_with_what_suffices(tmp_path: Path) -> None:
    synth(tmp_path / "a", rows=3200, columns=500, chunk_rows=320)
    with pytest.raises(ConfigError, match="too small for array 'x'") as caught:
        reshuffle(tmp_path / "a", tmp_path / "b", memory="1MiB")
    assert not (tmp_path / "b").exists()
    enough = caught.value.hint.partition(",")[0].removeprefix("memory=")
    reshuffle(tmp_path / "a", tmp_path / "b", memory=enough)
    with Source(tmp_path / "a") as source:
        assert buckets(source.arrays["x"], 1 << 30)[0] >= 320


def test_damage_in_the_source_leaves_nothing(tmp_path: Path) -> None:
    synth(tmp_path / "a", rows=64, columns=2, chunk_rows=8)
    file = tmp_path / "a/x/c/3/0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"array 'x': chunk 3\.0"):
        reshuffle(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path / "a")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(EnvironmentProblem, match="100 B free"):
        reshuffle(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_command_says_what_stands_when_it_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path / "a")
    (tmp_path / ".b.999999999.part").mkdir()
    command = ["reshuffle", str(tmp_path / "a"), str(tmp_path / "b"), "--seed", "3", "--memory", "1MiB"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'b'}\n"
    assert not (tmp_path / ".b.999999999.part").exists()
    assert main(command) == 2
    assert "b exists already and is complete" in capsys.readouterr().err
