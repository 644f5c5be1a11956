"""What metrics.jsonl promises: flat lines, no number that JSON lacks, each step once after any death."""

from __future__ import annotations

import asyncio
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.json_logger import JSONLogger, finite
from streamtrain.errors import EnvironmentProblem
from streamtrain.events import Log, TrainBegin, TrainEnd


class Refusing(ThreadPoolExecutor):
    """A default executor that nobody may use."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the default executor is the host's")


def log(step: int, /, **values: float) -> Log:
    return Log(step=step, epoch=step // 10, samples=step * 4, time=step / 8, values=values)


async def life(folder: Path, logs: list[Log], *, start: int = 0, state: dict[str, Any] | None = None) -> None:
    """One fit's worth of events, from a step on."""
    logger = JSONLogger()
    logger.load_state_dict(state or {})
    async with Bus([logger]) as bus:
        await bus.emit("on_train_begin", TrainBegin(run_dir=str(folder), step=start))
        for event in logs:
            await bus.emit("on_log", event)
        await bus.emit("on_train_end", TrainEnd())
    bus.check()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


async def written(path: Path) -> None:
    """Wait until something stands in the file."""
    while not (os.path.exists(path) and os.path.getsize(path)):  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.01)


async def test_a_line_is_one_flat_object(tmp_path: Path) -> None:
    asyncio.get_running_loop().set_default_executor(Refusing())
    await life(tmp_path, [log(10, loss=0.5, lr=1e-3), Log(step=10, split="val", values={"val_loss": 0.25})])
    assert lines(tmp_path) == [
        {"step": 10, "epoch": 1, "samples": 40, "time": 1.25, "split": "train", "loss": 0.5, "lr": 1e-3},
        {"step": 10, "epoch": 0, "samples": 0, "time": 0.0, "split": "val", "val_loss": 0.25},
    ]


@given(st.dictionaries(st.text(), st.floats()))
def test_what_is_not_finite_is_null_and_named(values: dict[str, float]) -> None:
    values.pop("nonfinite", None)
    read = json.loads(json.dumps(finite(values), allow_nan=False))
    odd = [name for name, value in values.items() if not math.isfinite(value)]
    assert read.pop("nonfinite", []) == odd
    assert read == {name: None if name in odd else value for name, value in values.items()}


async def test_a_metric_with_the_name_of_a_field_is_left_out_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await life(tmp_path, [log(1, step=7.0, loss=1.0), log(2, step=8.0)])
    assert [(line["step"], line.get("loss")) for line in lines(tmp_path)] == [(1, 1.0), (2, None)]
    assert caplog.text.count("the metric 'step' is left out") == 1


@pytest.mark.parametrize("torn", ["", '{"step": 30, "ep', '{"step": 1', "\0\0\0\0", '{"step": 4}'])
async def test_a_resumed_file_has_each_step_once(tmp_path: Path, torn: str) -> None:
    await life(tmp_path, [log(step, loss=1.0) for step in range(10, 60, 10)])
    append(tmp_path / "metrics.jsonl", torn)
    await life(tmp_path, [log(step, loss=2.0) for step in range(40, 80, 10)], start=30)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        *[(step, 1.0) for step in (10, 20, 30)],
        *[(step, 2.0) for step in (40, 50, 60, 70)],
    ]


async def test_a_validation_that_is_made_again_is_written_once(tmp_path: Path) -> None:
    validation = Log(step=20, split="val", values={"val_loss": 0.5})
    await life(tmp_path, [log(20, loss=1.0), validation, Log(step=20, split="val", values={"val_b_loss": 1.0})])
    later = Log(step=30, split="val", values={"val_loss": 0.25})
    await life(tmp_path, [validation, Log(step=20, split="val", values={"val_c_loss": 1.0}), later], start=20)
    assert [(line["step"], sorted(line)[-1]) for line in lines(tmp_path)] == [
        (20, "time"),
        (20, "val_loss"),
        (20, "val_b_loss"),
        (20, "val_c_loss"),
        (30, "val_loss"),
    ]


async def test_a_fresh_start_empties_what_a_life_without_a_checkpoint_left(tmp_path: Path) -> None:
    await life(tmp_path, [log(0, loss=1.0), log(10, loss=1.0)])
    await life(tmp_path, [log(10, loss=2.0)])
    assert [line["loss"] for line in lines(tmp_path)] == [2.0]


async def test_lines_that_a_kill_took_come_back_with_the_checkpoint(tmp_path: Path) -> None:
    logger = JSONLogger()
    async with Bus([logger]) as bus:
        await bus.emit("on_train_begin", TrainBegin(run_dir=str(tmp_path)))
        await bus.emit("on_log", log(10, loss=1.0))
        await bus.emit("on_log", log(20, loss=1.0))
        await bus.drain()
        state, at_the_kill = logger.state_dict(), (tmp_path / "metrics.jsonl").read_bytes()
        await bus.emit("on_train_end", TrainEnd())
    assert logger.state_dict() == {}
    written = (tmp_path / "metrics.jsonl").read_bytes()
    assert at_the_kill == b""
    for survived in (b"", written[:40], written[:-1], written):
        (tmp_path / "metrics.jsonl").write_bytes(survived)
        await life(tmp_path, [log(30, loss=2.0)], start=20, state=json.loads(json.dumps(state)))
        assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


async def test_missing_lines_do_not_wander_into_another_folder(tmp_path: Path) -> None:
    await life(tmp_path, [log(30, loss=2.0)], start=20, state={"unwritten": ['{"step": 20}\n']})
    assert [line["step"] for line in lines(tmp_path)] == [30]


async def test_without_a_run_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with Bus([JSONLogger()]) as bus:
        await bus.emit("on_train_begin", TrainBegin())
        await bus.emit("on_log", log(1, loss=1.0))
        await bus.emit("on_train_end", TrainEnd())
    bus.check()
    assert os.listdir(tmp_path) == []


async def test_a_disk_that_is_full_is_an_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(EnvironmentProblem, match=r"metrics\.jsonl can't be written: No space left"):
        await life(tmp_path, [log(step, loss=1.0) for step in range(3)])


async def test_a_folder_that_is_gone_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"gone/metrics\.jsonl can't be written: No such file"):
        await life(tmp_path / "gone", [log(1, loss=1.0)])


async def test_lines_reach_the_file_while_training_goes_on(tmp_path: Path) -> None:
    async with Bus([JSONLogger()]) as bus:
        await bus.emit("on_train_begin", TrainBegin(run_dir=str(tmp_path)))
        await bus.emit("on_log", log(1, loss=1.0))
        async with asyncio.timeout(30):
            await written(tmp_path / "metrics.jsonl")
        assert [line["step"] for line in lines(tmp_path)] == [1]
        await bus.emit("on_train_end", TrainEnd())


async def test_many_lines_cost_few_writes(tmp_path: Path) -> None:
    logs = [log(step, loss=1.0) for step in range(5000)]
    before = _writes()
    await life(tmp_path, logs)
    assert len(lines(tmp_path)) == 5000
    assert _writes() - before < 500


def _writes() -> int:
    """Calls of write and its kin that this process has made."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{os.getpid()}/io").read_text().splitlines())
    return int(fields["syscw"])
