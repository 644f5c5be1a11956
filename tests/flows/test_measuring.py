"""From a run on the command line to its numbers and its predictions."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from data_tools.stats import stats
from streamtrain.checkpoint import scan
from streamtrain.cli import main
from tests.data.test_predicted import climate, known, opened

Capture = pytest.CaptureFixture[str]
NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(1)

    def forward(self, x):
        return self.layer(x.flatten(1)).flatten()
"""
CONFIG = """
[data]
store = "s"
inputs = "t2m"
targets = "rain"
batch_size = 16
shuffle = "block"
split = [0.0, 0.8]
normalize = {t2m = [280.0, 20.0], rain = [280.0, 20.0]}

[validation]
split = [0.8, 1.0]

[model]
target = "measured_nets:Net"

[loss]
name = "mse"

[metrics]
mae = "mae"

[trainer]
device = "cpu"
seed = 0

[fit]
max_epochs = 2
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    climate(tmp_path / "s", times=100)
    (tmp_path / "measured_nets.py").write_text(NETS)
    (tmp_path / "c.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["fit", "c.toml", "--run-dir", "run", "-q"]) == 0
    yield tmp_path
    sys.modules.pop("measured_nets", None)


def numbers(capsys: Capture, *arguments: str) -> dict[str, float]:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    found: dict[str, float] = json.loads(capsys.readouterr().out)
    return found


def logged(run: Path, split: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def values(target: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(target / "prediction", mode="r")[:])


def test_validate_measures_the_newest_checkpoint_as_the_run_did(place: Path, capsys: Capture) -> None:
    found = numbers(capsys, "validate", "run")
    last = logged(place / "run", "val")[-1]
    assert found == {"val_loss": pytest.approx(last["val_loss"]), "val_mae": pytest.approx(last["val_mae"])}
    assert main(["validate", "run"]) == 0
    shown = capsys.readouterr().out
    assert shown == f"val_loss {found['val_loss']:.6g}\nval_mae {found['val_mae']:.6g}\n"


def test_evaluate_measures_what_it_is_told_to_and_logs_that(place: Path, capsys: Capture) -> None:
    climate(place / "other", start=7, times=30)
    found = numbers(capsys, "evaluate", "run/config.toml", "--data", "other", "--batch-size", "7")
    assert set(found) == {"test_loss", "test_mae"}
    assert found != {f"test_{k.removeprefix('val_')}": v for k, v in numbers(capsys, "validate", "run").items()}
    assert [row["test_loss"] for row in logged(place / "run", "test")] == [pytest.approx(found["test_loss"])]


def test_another_checkpoint_is_measured_by_its_path_or_as_the_best(place: Path, capsys: Capture) -> None:
    first, *_, last = [entry.path for entry in scan(place / "run" / "checkpoints")]
    paths = {numbers(capsys, "validate", "run", "--checkpoint", str(path))["val_loss"] for path in (first, last)}
    assert numbers(capsys, "validate", str(last))["val_loss"] in paths
    assert numbers(capsys, "validate", "c.toml", "--checkpoint", str(last))["val_loss"] in paths
    best = min(row["val_loss"] for row in logged(place / "run", "val"))
    assert numbers(capsys, "validate", "run", "--checkpoint", "best")["val_loss"] == pytest.approx(best)


def test_predict_writes_all_of_the_data_in_its_coordinates(place: Path, capsys: Capture) -> None:
    assert main(["predict", "run", "--out", "p.zarr"]) == 0
    assert capsys.readouterr().out.endswith(f"predictions are in {place / 'p.zarr'}\n")
    found, source = opened(place / "p.zarr"), known(place / "s")
    assert found.prediction.dims == ("time",)
    assert found.time.equals(source.time)
    assert bool(found.prediction.notnull().all())
    assert main(["predict", "run", "--out", "p.zarr"]) == 2
    assert f"{place / 'p.zarr'} exists already and is complete" in capsys.readouterr().err
    assert main(["predict", "run", "--out", "p.zarr", "--overwrite", "--split", "0.5", "1.0"]) == 0
    assert np.isnan(values(place / "p.zarr")).tolist() == [True] * 50 + [False] * 50


def test_other_statistics_than_those_of_training_are_said(place: Path, capsys: Capture) -> None:
    climate(place / "other", start=7, times=30)
    stats(place / "other")
    arguments = ["predict", "run", "--out", "p.zarr", "--data", "other", "--normalize", "stats"]
    assert main(arguments) == 0
    assert "other is normalised by its own statistics, not by those of the training data" in capsys.readouterr().err


def test_what_can_not_be_measured_is_said_with_its_exit_code(place: Path, capsys: Capture) -> None:
    shutil.rmtree(place / "run" / "checkpoints")
    (place / "empty").mkdir()
    said = {
        ("validate", "nothing"): (2, "configuration nothing does not exist"),
        ("validate", "empty"): (2, "empty has no config.toml: the model can't be made from it"),
        ("validate", "c.toml"): (2, "c.toml names no run folder, where its checkpoints would lie"),
        ("predict", "run", "--out", "p"): (4, "there is no checkpoint in "),
        ("validate", "run", "--checkpoint", "best"): (4, "there is no checkpoint in "),
        ("predict", "run"): (2, "--out needs a value"),
        ("validate", "run", "--bach-size", "3"): (2, "unknown option --bach-size"),
    }
    for arguments, (code, text) in said.items():
        assert main([*arguments]) == code, arguments
        error, hint = capsys.readouterr().err.splitlines()[-2:]
        assert text in error
        assert hint.startswith("hint: ")
