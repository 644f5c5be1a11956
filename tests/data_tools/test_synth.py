"""What made-up data promises: the same arguments give the same bytes, in bounded memory, with something to learn."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from data_tools.__main__ import main
from data_tools.synth import synth
from streamtrain.errors import ConfigError
from tests.data.stores import layout_of


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def arrays(folder: Path) -> tuple[Any, Any]:
    group = zarr.open_group(str(folder), mode="r")
    return group["x"], group["y"]


@pytest.mark.parametrize("codec", ["raw", "zstd", "blosc"])
def test_the_same_arguments_give_the_same_bytes(codec: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows": 50, "columns": 8, "chunk_rows": 16, "codec": codec}
    assert digest(synth(tmp_path / "a", **options)) == digest(synth(tmp_path / "b", **options))
    assert digest(synth(tmp_path / "c", **options, seed=1)) != digest(tmp_path / "a")


@pytest.mark.parametrize("shard_rows", [None, 32])
def test_rows_are_normal_rounded_and_in_whole_row_chunks(shard_rows: int | None, tmp_path: Path) -> None:
    x, y = arrays(synth(tmp_path / "t", rows=2000, columns=16, chunk_rows=16, shard_rows=shard_rows))
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((2000, 16), (2000,), np.float32, np.float32)
    assert (x.chunks, y.chunks) == ((16, 16), (16,))
    values = np.asarray(x[...])
    assert np.array_equal(values * 64, np.rint(values * 64))
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_targets_are_linear_in_the_rows_but_for_a_noise_of_a_tenth(tmp_path: Path) -> None:
    x, y = arrays(synth(tmp_path / "t", rows=5000, columns=8, chunk_rows=1000))
    weights, residuals, *_ = np.linalg.lstsq(np.asarray(x[...]), np.asarray(y[...]), rcond=None)
    assert abs(np.sqrt(residuals[0] / 5000) - 0.1) < 0.01
    assert 0.3 < np.linalg.norm(weights) < 3


def test_no_two_bands_are_alike(tmp_path: Path) -> None:
    x, _ = arrays(synth(tmp_path / "t", rows=64, columns=4, chunk_rows=16))
    assert len(np.unique(np.asarray(x[...]), axis=0)) == 64


def test_the_fast_lanes_read_it_and_no_chunk_is_left_out(tmp_path: Path) -> None:
    synth(tmp_path / "t", rows=40, columns=4, chunk_rows=8, shard_rows=16)
    for name in ("x", "y"):
        layout = layout_of(tmp_path / "t", name)
        assert (layout.slow, layout.complete, layout.raw) == (None, True, True)


def test_memory_holds_one_band(tmp_path: Path) -> None:
    """64 MB in all, a band of 1 MB."""
    synth(tmp_path / "warm", rows=10, columns=4)
    tracemalloc.start()
    try:
        synth(tmp_path / "t", rows=32_000, columns=500, chunk_rows=500)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_progress_counts_rows(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synth(tmp_path / "t", rows=20, columns=2, chunk_rows=8, progress=lambda *given: seen.append(given))
    assert seen == [(8, 20), (16, 20), (20, 20)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows=0"),
        ({"rows": 5, "columns": 0}, "columns=0"),
        ({"rows": 5, "chunk_rows": -1}, "chunk_rows=-1"),
        ({"rows": 5, "chunk_rows": 4, "shard_rows": 6}, "shard_rows=6 is no multiple"),
        ({"rows": 5, "chunk_rows": 4, "shard_rows": -4}, "shard_rows=-4 is no multiple"),
        ({"rows": 5, "seed": -1}, "seed=-1 must be at least 0"),
        ({"rows": 5, "codec": "lzma"}, "codec='lzma' is unknown"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused_and_nothing_is_left(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        synth(tmp_path / "t", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", str(tmp_path / "t"), "--rows", "10", "--columns", "3", "--chunk-rows", "4"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 't'}\n"
    assert arrays(tmp_path / "t")[0].shape == (10, 3)
