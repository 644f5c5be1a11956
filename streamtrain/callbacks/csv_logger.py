"""`metrics.csv`: one row a line of metrics, a column a name; a name that appears later gets a column at the end.

A new column rewrites the file into another one, which then takes its name: readers see the old or the new, whole. An
empty cell means that this row has no such metric; what is not finite stands there as `nan`, `inf` or `-inf`.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from streamtrain.callbacks.lines import FIXED, MetricsLog, cut, rewrite
from streamtrain.callbacks.rolling import older, prune
from streamtrain.events import Log, TrainBegin

_MOST = 18
"""Digits of a step at most: Python refuses to read some thousands."""


class CSVLogger(MetricsLog):
    """Writes `metrics.csv` in the run's folder: `step, epoch, samples, time, split`, then a column for each metric.

    After a resume each step stands there once; a fresh start empties the file. Once it has `part` bytes it becomes
    `metrics-000001.csv`, and so on, and a new one begins, with a header of its own.
    """

    file_name = "metrics.csv"
    headed = True

    def __init__(self, *, part: str | int = "64MiB") -> None:
        super().__init__(part=part)
        self._columns: dict[str, None] = {}
        """In their order; empty until the header is written."""
        self._restored: list[str] = []

    async def on_train_begin(self, event: TrainBegin) -> None:
        """Open the file."""
        self._columns = {}
        await super().on_train_begin(event)
        self._restored = []

    async def on_log(self, event: Log) -> None:
        """Write one row, after a new header where one is needed."""
        if self._file is None:
            return
        values = {_plain(name): value for name, value in self.values(event).items()}
        if self.again(event, values):
            return
        if not (self._columns and self._columns.keys() >= values.keys()):
            self._columns.update(dict.fromkeys([*FIXED, *values]))
            columns = tuple(self._columns)
            self._file.change(lambda path: widen(path, columns))
        names = list(self._columns)[len(FIXED) :]
        self._file.put(row([*self.fixed(event), *(values.get(name, "") for name in names)]))

    def prepare(self, path: Path, step: int) -> None:
        """Cut off what comes after `step`; at step 0, all."""
        there: set[tuple[str, ...]] = set()
        if step < sys.maxsize:
            last = prune(path, lambda part: self._keep(columns_of(part) if step else [], step), head=1)
            there = {_bare(next(csv.reader([line.decode(errors="replace")]))) for line in last}
        if step > 0:
            # The rows that may be missing have the columns of their time, which the file may lack or be beyond.
            columns = dict.fromkeys([*columns_of(path), *self._restored])
            if not columns and (full := older(path)):
                columns = dict.fromkeys(columns_of(full[-1]))
            if columns:
                widen(path, tuple(columns))
            self._columns = columns
        keep = self._keep(list(self._columns), step)
        short = [row(next(csv.reader([line]))) for line in self._missing if keep(line.encode())]
        absent = [line for line in short if _bare(next(csv.reader([line]))) not in there]
        cut(path, keep, [padded(line, len(self._columns)) for line in absent])

    def _keep(self, columns: Sequence[str], step: int) -> Callable[[bytes], bool]:
        """Whether a line of a file with these columns stays; notes those of the very step."""

        def keep(line: bytes) -> bool:
            first = line.split(b",", 1)[0]
            if not columns or not first.isdigit() or len(first) > _MOST or int(first) > step:
                return bool(columns) and first == b"step"
            if int(first) == step:
                cells = dict(zip(columns, next(csv.reader([line.decode(errors="replace")])), strict=False))
                names = [name for name, cell in cells.items() if cell and name not in FIXED]
                self._there.add((cells.get("split", ""), frozenset(names)))
            return True

        return keep

    def state_dict(self) -> dict[str, Any]:
        """The last rows, where they may not be in the file yet, and their columns."""
        state = super().state_dict()
        return {**state, "columns": list(self._columns) or self._restored} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back for the next fit."""
        super().load_state_dict(state)
        self._restored = [str(name) for name in state.get("columns", ())]


def row(cells: Sequence[Any]) -> str:
    """A row of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _plain(name: str) -> str:
    """The name without line breaks, so that a row is a line, and as UTF-8 can hold it."""
    return " ".join(name.splitlines()).encode(errors="backslashreplace").decode()


def padded(line: str, columns: int) -> str:
    """The row with empty cells up to this many columns."""
    cells = next(csv.reader([line]))
    return row([*cells, *[""] * (columns - len(cells))])


def _bare(cells: Sequence[str]) -> tuple[str, ...]:
    """The cells without the empty ones at the end, which differ with the number of columns."""
    cells = list(cells)
    while cells and not cells[-1]:
        cells.pop()
    return tuple(cells)


def columns_of(path: Path) -> list[str]:
    """The header of a file; nothing if it has no whole one."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        line = file.readline()
    return next(csv.reader([line])) if line.startswith("step,") and line.endswith("\n") else []


def widen(path: Path, columns: Sequence[str]) -> None:
    """Give the file these columns; those that it has are the first of them. Makes the header where there is none."""
    had = len(columns_of(path))
    if had == len(columns):
        return
    tail = b"," * (len(columns) - had) + b"\n"

    def edit(lines: Iterable[bytes]) -> Iterable[bytes]:
        yield row(columns).encode()
        for number, line in enumerate(lines):
            if number > 0 or not had:
                yield line[:-1] + tail if line.endswith(b"\n") else line

    rewrite(path, edit)
