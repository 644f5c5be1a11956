"""What events.jsonl promises: a line for each thing that happened, in all lives of the run."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from streamtrain.callbacks.base import HOOKS, NEWS, hooks_of
from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.event_log import EventLog
from streamtrain.errors import DataError
from streamtrain.events import (
    CheckpointCommitted,
    CheckpointFailed,
    EpochBegin,
    EpochEnd,
    Event,
    ExceptionRaised,
    Interrupt,
    TrainBegin,
    TrainEnd,
    ValidationBegin,
    ValidationEnd,
)


async def life(folder: Path, events: dict[str, Event], *, start: int = 0) -> None:
    async with Bus([EventLog()]) as bus:
        await bus.emit("on_train_begin", TrainBegin(run_dir=str(folder), step=start, resumed_from=f"step-{start}"))
        for hook, event in events.items():
            await bus.emit(hook, event)
        await bus.emit("on_train_end", TrainEnd(step=start + 9, reason="stopped", detail="enough"))
    bus.check()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def test_all_but_news_and_metrics_is_noted() -> None:
    assert hooks_of(EventLog()) == set(HOOKS) - NEWS - {"on_log", "on_media"}


async def test_each_event_is_a_line_with_its_facts(tmp_path: Path) -> None:
    await life(
        tmp_path,
        {
            "on_epoch_begin": EpochBegin(epoch=3, step=7, samples=28, time=1.5),
            "on_epoch_end": EpochEnd(metrics={"loss": float("nan")}),
            "on_validation_begin": ValidationBegin(batches=4),
            "on_validation_end": ValidationEnd(metrics={"val_loss": 0.5}),
            "on_checkpoint": CheckpointCommitted(path="/x/step-000000007", bytes=9, seconds=0.25),
            "on_checkpoint_failed": CheckpointFailed(path="/x/step-000000009", error=OSError("full"), failures=2),
            "on_interrupt": Interrupt(reason="signal", detail="SIGTERM"),
            "on_exception": ExceptionRaised(error=DataError("chunk 3 is cut", hint="fetch it again")),
        },
    )
    said = {line.pop("event"): line for line in lines(tmp_path)}
    assert list(said) == [
        "train_begin",
        "epoch_begin",
        "epoch_end",
        "validation_begin",
        "validation_end",
        "checkpoint",
        "checkpoint_failed",
        "interrupt",
        "exception",
        "train_end",
    ]
    assert said["train_begin"]["pid"] == os.getpid()
    assert [said["epoch_begin"][name] for name in ("epoch", "step", "samples", "time")] == [3, 7, 28, 1.5]
    assert said["epoch_end"]["metrics"] == {"loss": None, "nonfinite": ["loss"]}
    assert said["epoch_end"]["used"]["peak_rss"] > 1 << 20
    assert said["train_end"]["used"]["cpu"] >= said["epoch_end"]["used"]["cpu"] > 0
    assert said["checkpoint"]["path"] == "/x/step-000000007"
    assert (said["checkpoint_failed"]["message"], said["checkpoint_failed"]["failures"]) == ("full", 2)
    assert said["interrupt"]["detail"] == "SIGTERM"
    assert said["exception"] | {"error": "DataError", "message": "chunk 3 is cut"} == said["exception"]
    assert (said["train_end"]["reason"], said["train_end"]["detail"]) == ("stopped", "enough")
    assert all(datetime.fromisoformat(line["at"]).tzinfo is not None for line in said.values())


async def test_later_lives_are_added_and_only_a_torn_line_is_cut(tmp_path: Path) -> None:
    await life(tmp_path, {"on_interrupt": Interrupt(step=90)})
    append(tmp_path / "events.jsonl", '{"event": "checkpo')
    await life(tmp_path, {}, start=50)
    assert [(line["event"], line["step"]) for line in lines(tmp_path)] == [
        ("train_begin", 0),
        ("interrupt", 90),
        ("train_end", 9),
        ("train_begin", 50),
        ("train_end", 59),
    ]


async def test_the_configuration_is_noted_as_json_can_hold_it(tmp_path: Path) -> None:
    config = {"data": {"split": (0.0, 0.5)}, "odd": float("nan"), "path": Path("x")}
    async with Bus([EventLog()]) as bus:
        await bus.emit("on_train_begin", TrainBegin(run_dir=str(tmp_path), config=config))
        await bus.emit("on_train_end", TrainEnd())
    bus.check()
    assert lines(tmp_path)[0]["config"] == {"data": {"split": [0.0, 0.5]}, "odd": "nan", "path": "x"}


async def test_tables_are_written_but_for_large_ones(tmp_path: Path) -> None:
    tables: dict[str, Any] = {"small": [[1, 2], [float("nan"), 0.5]], "large": [[0] * 65] * 65}
    await life(tmp_path, {"on_validation_end": ValidationEnd(tables=tables)})
    (told,) = (line["tables"] for line in lines(tmp_path) if line["event"] == "validation_end")
    assert told == {"small": [[1, 2], [None, 0.5]], "large": "left out: 4225 numbers"}
