"""What the monitor of resources promises: true figures, in lines of their own, that leave the metrics alone."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.resource_monitor import Look, ResourceMonitor
from streamtrain.errors import ConfigError
from streamtrain.events import BatchEnd, Log, TrainBegin, TrainEnd
from streamtrain.trainer import Trainer
from tests.engine import Samples, lines, network


class Watching(ResourceMonitor):
    """Ends the training when it has seen so many lines."""

    def __init__(self, most: int, stop: Callable[[], None]) -> None:
        super().__init__(every=0.1)
        self._left, self._stop_training = most, stop

    async def on_log(self, event: Log) -> None:
        await super().on_log(event)
        self._left -= event.split == "resource"
        if not self._left:
            self._stop_training()


async def life(folder: Path, looks: int) -> list[dict[str, Any]]:
    """Training goes on until there were so many looks; the lines of resources."""
    monitor = Watching(looks, lambda: trainer.stop())
    trainer = Trainer(network(), nn.MSELoss(), callbacks=[monitor], run_dir=folder, seed=0, device="cpu")
    await trainer.fit(Samples(80), max_epochs=10**6)
    return [json.loads(line) for line in (folder / "resources.jsonl").read_text().splitlines()]


async def test_the_machine_is_looked_at_while_training_goes_on(tmp_path: Path) -> None:
    rows = await life(tmp_path, 2)
    assert len(rows) >= 2
    for row in rows:
        assert {"at", "step", "epoch", "time", "cpu", "rss", "memory", "memory_available", "disk_free"} <= row.keys()
        assert row["rss"] > 10e6
        assert 0 < row["memory"] < 1


async def test_the_metrics_hold_nothing_of_it(tmp_path: Path) -> None:
    await life(tmp_path, 1)
    assert all(row["split"] == "train" and "cpu" not in row for row in lines(tmp_path))
    assert "cpu" not in (tmp_path / "metrics.csv").read_text()


def torn(folder: Path) -> None:
    with open(folder / "resources.jsonl", "a") as file:
        file.write('{"step": 3, "to')


async def test_a_later_life_appends(tmp_path: Path) -> None:
    first = await life(tmp_path, 1)
    torn(tmp_path)
    async with Bus([monitor := ResourceMonitor()]) as bus:
        await bus.emit("on_train_begin", TrainBegin(run_dir=str(tmp_path), step=3))
        await bus.emit("on_log", Log(step=1, split="resource", values={"cpu": float("nan")}))
        await bus.emit("on_train_end", TrainEnd())
    bus.check()
    del monitor
    rows = [json.loads(line) for line in (tmp_path / "resources.jsonl").read_text().splitlines()]
    assert rows[: len(first)] == first
    assert (len(rows), rows[-1]["cpu"], rows[-1]["nonfinite"]) == (len(first) + 1, None, ["cpu"])


async def test_its_thread_ends_with_the_fit() -> None:
    async with Bus([ResourceMonitor(every=1000.0)]) as bus:
        await bus.emit("on_train_begin", TrainBegin())
        await bus.drain()
        assert "streamtrain-resources" in [thread.name for thread in threading.enumerate()]
        await bus.emit("on_train_end", TrainEnd())
        await bus.drain()
        assert "streamtrain-resources" not in [thread.name for thread in threading.enumerate()]


def test_children_count() -> None:
    look = Look(".")
    alone = look()["rss"]
    script = (
        "import sys; kept = bytearray(200_000_000); kept[::4096] = b'x' * len(kept[::4096]); print(); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert look()["rss"] - alone > 150e6
    child.communicate()
    assert look()["rss"] - alone < 150e6


def test_the_share_of_the_cpu_is_that_since_the_look_before() -> None:
    look = Look(".")
    look()
    began = os.times()
    while os.times().user - began.user < 0.3:
        sum(range(10_000))
    assert look()["cpu"] > 0


def test_gpus_that_torch_does_not_use_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not [name for name in Look(".")() if name.startswith("gpu")]


def test_a_gpu_in_use_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(number: int) -> int:
        raise ModuleNotFoundError("pynvml does not seem to be installed")

    fakes: dict[str, Any] = {
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "memory_reserved": lambda number: [0, 300][number],
        "memory_allocated": lambda number: 200,
        "mem_get_info": lambda number: (600, 1000),
        "utilization": missing,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    look = Look(".")
    look()
    gpus = {name: value for name, value in look().items() if name.startswith("gpu")}
    assert gpus == {"gpu1_allocated": 200.0, "gpu1_reserved": 300.0, "gpu1_used": 400.0}


async def test_a_machine_that_gives_no_answer_is_said_once_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: Iterator[dict[str, float]] = iter([{}])

    def broken(look: Look) -> dict[str, float]:
        return next(answers)

    monkeypatch.setattr(Look, "__call__", broken)
    async with Bus([monitor := ResourceMonitor(every=0.1)]) as bus:
        await bus.emit("on_train_begin", TrainBegin())
        await bus.drain()
        assert monitor._thread is not None
        await asyncio.to_thread(monitor._thread.join)
        await bus.emit("on_batch_end", BatchEnd())
        await bus.emit("on_train_end", TrainEnd())
    bus.check()
    assert caplog.text.count("the use of resources is not logged any more: StopIteration") == 1


@pytest.mark.parametrize("every", [0, -1, "x", True, float("nan")])
def test_what_cannot_work_is_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="every"):
        ResourceMonitor(every=every)
