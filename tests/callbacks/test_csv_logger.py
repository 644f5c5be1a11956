"""What metrics.csv promises: one table at any time, whatever columns come later, each step once after a resume."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.csv_logger import CSVLogger, padded, row, widen
from streamtrain.events import Log, TrainBegin, TrainEnd


async def life(folder: Path, logs: list[Log], *, start: int = 0, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """One fit's worth of events; the state that a checkpoint taken before its end would hold."""
    logger = CSVLogger()
    logger.load_state_dict(state or {})
    async with Bus([logger]) as bus:
        await bus.emit("on_train_begin", TrainBegin(run_dir=str(folder), step=start))
        for event in logs:
            await bus.emit("on_log", event)
        await bus.drain()
        state = logger.state_dict()
        await bus.emit("on_train_end", TrainEnd())
    bus.check()
    return state


def log(step: int, /, **values: float) -> Log:
    return Log(step=step, values=values)


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert all(None not in row.values() and None not in row for row in rows), "every row has every cell"
    return rows


async def test_names_that_come_later_get_columns_at_the_end(tmp_path: Path) -> None:
    await life(tmp_path, [log(1, loss=0.5), log(2, loss=0.25, mae=3.0), log(2, val_loss=1.0), log(3, loss=0.125)])
    rows = table(tmp_path)
    assert list(rows[0]) == ["step", "epoch", "samples", "time", "split", "loss", "mae", "val_loss"]
    assert [[row[name] for name in ("step", "loss", "mae", "val_loss")] for row in rows] == [
        ["1", "0.5", "", ""],
        ["2", "0.25", "3.0", ""],
        ["2", "", "", "1.0"],
        ["3", "0.125", "", ""],
    ]


async def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, math.nan, -math.inf]
    await life(tmp_path, [log(step, loss=value) for step, value in enumerate(values)])
    assert [repr(float(row["loss"])) for row in table(tmp_path)] == [repr(value) for value in values]


async def test_names_may_hold_what_csv_uses_itself(tmp_path: Path) -> None:
    await life(tmp_path, [log(1, **{'a,"b"': 1.0, "two\nlines": 2.0, "größe": 3.0, "\udc80": 4.0})])
    assert list(table(tmp_path)[0].values())[5:] == ["1.0", "2.0", "3.0", "4.0"]
    assert list(table(tmp_path)[0])[5:] == ['a,"b"', "two lines", "größe", "\\udc80"]


@pytest.mark.parametrize("torn", ["", "3", "30,0,0,0.0,tra", '"', "\0\0", "9" * 5000 + ",0\n"], ids=range(6))
async def test_a_resumed_table_has_each_step_once(tmp_path: Path, torn: str) -> None:
    await life(tmp_path, [log(10, loss=1.0), log(20, loss=1.0), log(30, loss=1.0, mae=1.0)])
    append(tmp_path / "metrics.csv", torn)
    await life(tmp_path, [log(30, loss=2.0), log(30, f1=2.0)], start=20)
    rows = table(tmp_path)
    assert list(rows[0])[5:] == ["loss", "mae", "f1"]
    assert [(row["step"], row["loss"], row["f1"]) for row in rows] == [
        ("10", "1.0", ""),
        ("20", "1.0", ""),
        ("30", "2.0", ""),
        ("30", "", "2.0"),
    ]


async def test_a_validation_that_is_made_again_is_written_once(tmp_path: Path) -> None:
    await life(tmp_path, [log(20, loss=1.0), log(20, val_loss=0.5, **{"two\nlines": math.nan})])
    await life(tmp_path, [log(20, val_loss=0.5, **{"two\nlines": math.nan}), log(20, val_mae=1.0)], start=20)
    assert [(row["loss"], row["val_loss"], row["val_mae"]) for row in table(tmp_path)] == [
        ("1.0", "", ""),
        ("", "0.5", ""),
        ("", "", "1.0"),
    ]


async def test_a_fresh_start_begins_a_table_of_its_own(tmp_path: Path) -> None:
    await life(tmp_path, [log(10, loss=1.0)])
    await life(tmp_path, [log(10, mae=2.0)])
    assert [list(row.items())[5:] for row in table(tmp_path)] == [[("mae", "2.0")]]


async def test_a_resume_that_logs_nothing_keeps_the_table(tmp_path: Path) -> None:
    await life(tmp_path, [log(10, loss=1.0), log(20, mae=1.0)])
    before = (tmp_path / "metrics.csv").read_bytes()
    await life(tmp_path, [], start=20)
    assert (tmp_path / "metrics.csv").read_bytes() == before


async def test_rows_that_a_kill_took_come_back_with_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    state = await life(tmp_path, [log(10, loss=1.0), log(20, mae=2.0)])
    whole = file.read_bytes()
    half = row(["step", "epoch", "samples", "time", "split", "loss"]) + row([10, 0, 0, 0.0, "train", 1.0])
    for survived in (b"", b"step,epo", half.encode(), whole[:-3], whole):
        file.write_bytes(survived)
        await life(tmp_path, [log(30, f1=3.0)], start=20, state=json.loads(json.dumps(state)))
        assert [[row[name] for name in ("step", "loss", "mae", "f1")] for row in table(tmp_path)] == [
            ["10", "1.0", "", ""],
            ["20", "", "2.0", ""],
            ["30", "", "", "3.0"],
        ]


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4), max_size=6))
def test_widening_keeps_all_cells(tmp_path_factory: pytest.TempPathFactory, names: list[list[str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "widen.csv"
    path.write_bytes(b"")
    columns: dict[str, None] = {"step": None, "split": None}
    rows: list[str] = []
    for number, more in enumerate(names):
        columns.update(dict.fromkeys(" ".join(name.splitlines()) for name in more))
        widen(path, tuple(columns))
        line = row([number, *columns][: len(columns)])
        with open(path, "ab") as file:
            file.write(line.encode())
        rows.append(line)
    wanted = [list(columns), *(next(csv.reader([padded(line, len(columns))])) for line in rows)] if rows else []
    assert list(csv.reader(io.StringIO(path.read_text(), newline=""))) == wanted
