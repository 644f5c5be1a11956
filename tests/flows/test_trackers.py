"""After kill -9 between a line of the log and the commit of its step, each step stands once in every logger's files."""

from __future__ import annotations

import asyncio
import csv
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.callbacks.progress_bar import ProgressBar
from streamtrain.callbacks.tensorboard import TensorBoard
from streamtrain.events import Log
from streamtrain.trainer import Trainer
from tests.engine import Samples, network

EVERY, DIES_AT, STEPS = 4, 11, 20


class Dies(Callback):
    """Kills its process at a line beyond the first checkpoint, once the loggers have written it; training stands."""

    def __init__(self, folder: Path, at: int, which: str) -> None:
        self.folder, self.at = folder, at
        self.written = "metrics.jsonl" if which == "tensorboard" else f".{which}-lines"

    async def on_log(self, event: Log) -> None:
        if event.step == self.at and event.split == "train":
            await event.on_train_thread(lambda model, optimizer: self.die())

    def die(self) -> None:
        line = re.compile(rf"\D{self.at}\D")
        while not (any(self.folder.glob("checkpoints/step-*")) and line.search(self.text())):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def text(self) -> str:
        path = self.folder / self.written
        return path.read_text() if path.exists() else ""


def trackers(which: str) -> list[Any]:
    if which == "tensorboard":
        return [TensorBoard()]
    from streamtrain.callbacks.mlflow_logger import MLflowLogger

    return [MLflowLogger()]


async def fit(folder: Path, which: str, *callbacks: object, steps: int = STEPS) -> None:
    trainer = Trainer(
        network(),
        nn.MSELoss(),
        callbacks=[ModelCheckpoint(every=f"{EVERY}steps"), *trackers(which), *callbacks],
        run_dir=folder,
        log_every=1,
        seed=0,
        device="cpu",
    )
    await trainer.fit(Samples(80), Samples(16, seed=1), max_steps=steps, max_epochs=3, resume="auto")


def killed(folder: Path, which: str) -> None:
    """A life that ends by kill -9, beyond its last checkpoint."""
    command = [sys.executable, "-m", "tests.flows.test_trackers", str(folder), which]
    done = subprocess.run(command, check=False, timeout=110, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    second = int(time.time())
    while int(time.time()) == second:  # TensorBoard reads files in the order of the seconds in their names
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_tensorboard_csv_and_jsonl_have_each_step_once(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(folder, "tensorboard")
    caplog.set_level(logging.INFO)
    asyncio.run(fit(folder, "tensorboard", ProgressBar()))
    begun = re.search(r"going on from .* at step (\d+)", caplog.text)
    assert begun is not None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row["split"] == "train"] == steps
    with open(folder / "metrics.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["split"] == "train"] == steps
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in found.Scalars("loss")] == steps
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(losses)
    shown = capsys.readouterr().err
    first = next(line for line in shown.splitlines() if "step " in line)
    assert int(first.split("step ")[1].split("/")[0]) >= int(begun[1])  # the bar goes on from where the run does


def stored(folder: Path) -> list[tuple[int, str]]:
    """What mlflow's folder has of the loss: (step, value) of each line."""
    (path,) = (folder.parent / "mlruns").glob("*/*/metrics/loss")
    rows = [line.split() for line in path.read_text().splitlines()]
    return [(int(row[2]), row[1]) for row in rows]


def test_mlflow_has_each_step_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: nothing real to be killed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    killed(folder, "mlflow")
    asyncio.run(fit(folder, "mlflow"))
    assert [step for step, _ in stored(folder)] == list(range(1, STEPS + 1))


if __name__ == "__main__":
    asyncio.run(fit(Path(sys.argv[1]), sys.argv[2], Dies(Path(sys.argv[1]), DIES_AT, sys.argv[2])))
