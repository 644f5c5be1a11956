"""What logs in parts promise: together they are the log, each step once, wherever lives end and go on."""

from __future__ import annotations

import asyncio
import csv
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.csv_logger import CSVLogger
from streamtrain.callbacks.json_logger import JSONLogger
from streamtrain.callbacks.lines import MetricsLog
from streamtrain.callbacks.rolling import older, parts, roll, rows
from streamtrain.errors import ConfigError
from streamtrain.events import Log, TrainBegin, TrainEnd

PART = 4096


def log(step: int, life: int) -> Log:
    """A line of about 100 bytes; later steps have more names."""
    return Log(step=step, values={"life": float(life), f"name{step // 60}": step / 7})


async def life(logger: MetricsLog, folder: Path, start: int, stop: int, number: int) -> dict[str, Any]:
    """The steps after `start` up to `stop`; the state that a checkpoint at its end would hold."""
    async with Bus([logger]) as bus:
        await bus.emit("on_train_begin", TrainBegin(run_dir=str(folder), step=start))
        for step in range(start + 1, stop + 1):
            await bus.emit("on_log", log(step, number))
            if step % 10 == 0:
                await bus.drain()
                assert logger._file is not None
                logger._file._hurry.set()  # as if a tenth of a second had passed
                while logger._file._writer is not None and not logger._file._writer.done():  # noqa: ASYNC110
                    await asyncio.sleep(0)
        await bus.drain()
        state: dict[str, Any] = json.loads(json.dumps(logger.state_dict()))
        await bus.emit("on_train_end", TrainEnd())
    bus.check()
    return state


def read(folder: Path, kind: type[MetricsLog]) -> list[tuple[int, int, float]]:
    """Step, life and the named value of each row, of all parts."""
    found: list[dict[str, Any]] = []
    if kind is JSONLogger:
        found = list(rows(folder / "metrics.jsonl"))
    else:
        for part in parts(folder / "metrics.csv"):
            with open(part, newline="") as file:
                found += csv.DictReader(file, strict=True)
    name = "name{}".format
    return [
        (step, int(float(row["life"])), float(row[name(step // 60)])) for row in found for step in [int(row["step"])]
    ]


@pytest.mark.parametrize("kind", [JSONLogger, CSVLogger])
@settings(max_examples=15)
@given(ends=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=4))
def test_each_step_stands_once_in_any_number_of_parts_and_lives(
    kind: type[MetricsLog], ends: list[tuple[int, int]]
) -> None:
    folder = Path(tempfile.mkdtemp())
    wanted: list[tuple[int, int, float]] = []
    reached = 0
    for number, (back, further) in enumerate(ends):
        start = max(0, reached - back)
        reached = start + further
        asyncio.run(life(kind(part=PART), folder, start, reached, number))
        wanted = [row for row in wanted if row[0] <= start and start]
        wanted += [(step, number, step / 7) for step in range(start + 1, reached + 1)]
        assert read(folder, kind) == wanted
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", [JSONLogger, CSVLogger])
def test_no_part_grows_beyond_its_size_by_more_than_gathers(tmp_path: Path, kind: type[MetricsLog]) -> None:
    asyncio.run(life(kind(part=PART), tmp_path, 0, 600, 0))
    full = older(tmp_path / kind.file_name)
    assert len(full) >= 3
    assert all(PART <= part.stat().st_size < 2 * PART for part in full)


@pytest.mark.parametrize("kind", [JSONLogger, CSVLogger])
def test_lines_that_a_kill_took_are_not_doubled_at_the_border_of_two_parts(
    tmp_path: Path, kind: type[MetricsLog]
) -> None:
    state = asyncio.run(life(kind(part=1 << 20), tmp_path, 0, 3, 0))
    assert state["unwritten"]
    path = tmp_path / kind.file_name
    roll(path, headed=kind.headed)  # they were written, and the part was full; then came the kill
    for survived in (path.read_bytes(), None):
        second = kind(part=PART)
        second.load_state_dict(state)
        if survived is None:
            path.unlink()
        asyncio.run(life(second, tmp_path, 3, 5, 1))
        assert [row[:2] for row in read(tmp_path, kind)] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]


def test_an_evaluation_outside_of_a_fit_touches_no_part(tmp_path: Path) -> None:
    logger = JSONLogger(part=PART)
    asyncio.run(life(logger, tmp_path, 0, 120, 0))
    before = [part.read_bytes() for part in older(tmp_path / "metrics.jsonl")]
    asyncio.run(logger.append(tmp_path, Log(step=120, split="test", values={"test_loss": 1.0})))
    assert [part.read_bytes() for part in older(tmp_path / "metrics.jsonl")] == before
    assert list(rows(tmp_path / "metrics.jsonl"))[-1]["test_loss"] == 1.0


def test_parts_are_read_by_their_numbers(tmp_path: Path) -> None:
    for name, step in (("m-000002.jsonl", 2), ("m-1000000.jsonl", 3), ("m-000001.jsonl", 1), ("m.jsonl", 4)):
        (tmp_path / name).write_text(f'{{"step": {step}}}\n')
    (tmp_path / "m-x.jsonl").write_text('{"step": 9}\n')
    (tmp_path / "m.jsonl").write_text('{"step": 4}\nnonsense\n[1]\n' + "[" * 9000 + '\n{"step"')
    assert [row["step"] for row in rows(tmp_path / "m.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("part", [0, 100, "x", "1B", True, None])
def test_a_size_that_cannot_work_is_refused(part: Any) -> None:
    with pytest.raises(ConfigError, match="JSONLogger: part"):
        JSONLogger(part=part)
