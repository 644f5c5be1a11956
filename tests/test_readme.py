"""The README's programs, commands and configuration run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests import warm
from tests.data.sparse import random_sparse, sparse_store, write_arrays

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the README takes for granted: a store, and a module with a network."""
    rng = np.random.default_rng(0)
    group = zarr.create_group(tmp_path / "era5.zarr")
    field, hours = rng.standard_normal((2000, 4, 5), dtype=np.float32), ("time",)
    group.create_array("t2m", data=field, chunks=(100, 4, 5), dimension_names=(*hours, "lat", "lon"))
    group.create_array("rain", data=rng.random(2000, dtype=np.float32), chunks=(200,), dimension_names=hours)
    group.create_array("good", data=np.arange(2000) % 3 > 0, chunks=(200,), dimension_names=hours)
    group.create_array("season", data=np.arange(2000) // 90 % 4, chunks=(200,), dimension_names=hours)
    sparse_store(tmp_path / "cells.zarr", random_sparse(203, 40, 12))
    kind = zarr.open_group(tmp_path / "cells.zarr", mode="r+").create_group("obs/kind")
    kind.attrs["encoding-type"] = "categorical"
    write_arrays(kind, {"codes": np.arange(203) % 3, "categories": np.arange(3)}, 50)
    ends = np.arange(101) ** 2
    write_arrays(zarr.create_group(tmp_path / "texts.zarr"), {"tokens": np.arange(10_000), "ends": ends}, 500)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self) -> None:\n"
        "        super().__init__(nn.Flatten(), nn.Linear(20, 1), nn.Flatten(0))\n"
    )
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    done = warm.run(list(arguments), cwd=folder, environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "program",
    blocks("python"),
    ids=["fit", "stream", "windows", "crops", "ragged", "samples", "mix", "optimizers", "several", "tasks", "predict"],
)
def test_programs_run(folder: Path, program: str) -> None:
    run(folder, "-c", program)


def test_commands_run_in_their_order(folder: Path) -> None:
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    ours = [shlex.split(line) for line in lines if line.startswith("python -m ")]
    assert len(ours) == 4
    for command in ours:
        assert run(folder, *command[1:])


def test_the_configuration_trains(folder: Path) -> None:
    (config,) = blocks("toml")
    (folder / "config.toml").write_text(config)
    run(folder, "-m", "streamtrain", "fit", "config.toml", "--run-dir", "runs/config")
    assert (folder / "runs" / "config" / "metrics.jsonl").read_text()


def test_the_two_commands_stand_at_the_top() -> None:
    first = blocks("console")[0]
    assert first == "$ python3 run.py demo\n$ python3 run.py test\n"
