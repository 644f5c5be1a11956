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
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.callbacks.needed import load
from streamtrain.callbacks.progress_bar import ProgressBar
from streamtrain.callbacks.tensorboard import TensorBoard
from streamtrain.callbacks.wandb_folder import reached, settle
from streamtrain.events import Log
from streamtrain.trainer import Trainer
from tests.engine import Samples, network
from tests.flows.wandb_server import Server, environment, synced

EVERY, DIES_AT, STEPS = 4, 11, 20


class Dies(Callback):
    """Kills its process at a line beyond the first checkpoint, once the loggers have written it; training stands."""

    def __init__(self, folder: Path, at: int, which: str) -> None:
        self.folder, self.at, self.which = folder, at, which
        self.written = ".mlflow-lines-*" if which.startswith("mlflow") else "metrics.jsonl"

    async def on_log(self, event: Log) -> None:
        if event.step == self.at and event.split == "train":
            await event.on_train_thread(lambda model, optimizer: self.die())

    def die(self) -> None:
        while not (any(self.folder.glob("checkpoints/step-*")) and self.there()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def there(self) -> bool:
        if self.which == "wandb-kept":
            files = (self.folder / "wandb").glob("offline-run-*/*.wandb")
            there = reached(files, load("wandb.proto.wandb_internal_pb2").Record)
            return max(there.values(), default=0) >= self.at
        if self.which in ("online-arrived", "online-cut"):
            with urllib.request.urlopen(f"{os.environ['WANDB_BASE_URL']}/state") as answer:
                state = json.load(answer)
            return bool(state["full"] if self.which == "online-cut" else state["step"] >= self.at)
        text = "".join(path.read_text() for path in self.folder.glob(self.written))
        if self.which.startswith("mlflow"):  # the last steps alone
            return bool(text) and max(json.loads(text)["reached"].values()) >= self.at
        return re.search(rf"\D{self.at}\D", text) is not None


def trackers(which: str) -> list[Any]:
    if which == "tensorboard":
        return [TensorBoard()]
    if which.startswith(("wandb", "online")):
        from streamtrain.callbacks.wandb_logger import WandbLogger

        return [WandbLogger("trackers", mode="online" if which.startswith("online") else "offline")]
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
    await trainer.fit(Samples(80), Samples(16, seed=1), max_steps=steps, max_epochs=steps, resume="auto")


def life(folder: Path, which: str, at: int, steps: int) -> subprocess.CompletedProcess[str]:
    """A life in a process of its own, which dies at a step; 0: at none."""
    command = [sys.executable, "-m", "tests.flows.test_trackers", str(folder), which, str(at), str(steps)]
    pace = {
        "wandb-kept": {"WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "0.02"},
        "online-arrived": {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.02"},
        "online-cut": {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.02"},
        "online-lost": {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1000"},
    }
    early = pace.get(which, {})
    told = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | early
    return subprocess.run(command, check=False, timeout=110, capture_output=True, text=True, env=told)


def killed(folder: Path, which: str, at: int = DIES_AT, steps: int = STEPS) -> None:
    """A life that ends by kill -9, beyond its last checkpoint."""
    done = life(folder, which, at, steps)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    second = int(time.time())
    while int(time.time()) == second:  # TensorBoard reads files in the order of the seconds in their names
        time.sleep(0.05)


def ended(folder: Path, which: str, steps: int = STEPS) -> None:
    """A life that comes to its end, in a process of its own: wandb reads where its server is but once in a process."""
    done = life(folder, which, 0, steps)
    assert done.returncode == 0, done.stderr[-2000:]


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


def stored(folder: Path) -> list[tuple[int, float]]:
    """What mlflow has of the loss, as its client tells: step and value of each line."""
    database = folder.parent / "mlflow.db"
    uri = f"sqlite:///{database}" if database.exists() else (folder.parent / "mlruns").as_uri()
    client = load("mlflow").MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("streamtrain").experiment_id])
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log that wandb's offline folders have, folder after folder, read by wandb's own command."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.parent.name)
    assert settle(files)
    rows = []
    for file in files:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines()]
        rows += [record["history"]["item"] for record in found if record["type"] == "history"]
    return [row for row in rows if "samples" in row]


@pytest.mark.parametrize("which", ["wandb-kept", "wandb-lost"])
def test_wandb_offline_has_each_line_once(folder: Path, which: str) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: nothing real to be killed")
    killed(folder, which)
    left = [row["step"] for row in logged(folder) if "loss" in row]
    assert (max(left, default=0) >= DIES_AT) == (which == "wandb-kept")
    asyncio.run(fit(folder, which))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = logged(folder)
    assert [row["step"] for row in found if "loss" in row] == list(range(1, STEPS + 1))
    told = [{k: v for k, v in row.items() if k not in ("time", "split")} for row in rows]
    assert [{k: v for k, v in row.items() if not k.startswith("_")} for row in found] == told
    sent = synced(sorted((folder / "wandb").glob("offline-run-*")))  # into one run, one folder after the other
    assert [{k: v for k, v in row.items() if not k.startswith("_")} for row in sent if "samples" in row] == told


def online(folder: Path, which: str, kills: Sequence[int], steps: int = STEPS) -> list[dict[str, Any]]:
    """The rows that wandb's server has at the end of a run that was killed at these steps.

    `online-arrived`: with all lines there; `online-lost`: with none of a life's; `online-cut`: with some.
    """
    server = Server()
    before = {name: os.environ.get(name) for name in environment(server)}
    os.environ.update(environment(server))
    try:
        for at in kills:
            had, server.full = len(server.rows), False
            server.most = had + 2 if which == "online-cut" else None
            killed(folder, which, at, steps)
            assert which != "online-lost" or len(server.rows) == had
        server.most = None
        ended(folder, which, steps)
        return server.rows
    finally:
        server.close()
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


@pytest.mark.parametrize("which", ["online-arrived", "online-lost", "online-cut"])
def test_wandb_online_has_each_line_once(folder: Path, which: str) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: nothing real to be killed")
    found = online(folder, which, [DIES_AT, DIES_AT + EVERY])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [{k: v for k, v in row.items() if k not in ("time", "split")} for row in rows]
    assert [{k: v for k, v in row.items() if not k.startswith("_")} for row in found] == told


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs, of SQLAlchemy
@pytest.mark.parametrize("which", ["mlflow-folder", "mlflow-database"])
def test_mlflow_has_each_step_once(folder: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: nothing real to be killed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", str(which == "mlflow-folder").lower())
    killed(folder, which)
    asyncio.run(fit(folder, which))
    assert [step for step, _ in stored(folder)] == list(range(1, STEPS + 1))


if __name__ == "__main__":
    where, tracker, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    asyncio.run(fit(where, tracker, *([Dies(where, last, tracker)] if last else []), steps=int(sys.argv[4])))
