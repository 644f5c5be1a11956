"""Which row of a run of wandb's each line of the log became, for a run that is online.

Their server tells a life that goes on how many rows of the run have arrived, and these notes which lines they were.
The law: a row is noted before it is handed over, by one call, so that whenever a kill comes no row that arrived is
without its note; rows arrive in their order.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamtrain.callbacks.wandb_folder import Kind
from streamtrain.errors import UNREADABLE

logger = logging.getLogger(__name__)


class Rows:
    """The notes of one run in a file: some 15 bytes a row of a life, and a line for all lives before it."""

    def __init__(self, path: Path, run: str) -> None:
        """`path`: of the file; one of another run than `run` counts for none."""
        self._path, self._run = path, run
        self._found = self._read()
        self.floor = -1 if self._found is None else int(self._found[0]["floor"])
        """Lines up to this step count as being there, since nobody can tell."""
        self._next = 0
        self._kinds: dict[Kind, int] = {}
        self._said = False

    @property
    def known(self) -> bool:
        """Whether there are notes of lives before this one."""
        return self._found is not None

    def arrived(self, rows: int | None) -> dict[Kind, int]:
        """The last step of each kind of line among the first `rows` of the run; None: among all that are noted.

        That there are more than are noted is said.
        """
        if self._found is None:
            return {}
        head, noted = self._found
        end = head["rows"] if not noted else max(noted) + 1
        if rows is not None and end is not None and rows > end:
            text = "wandb has %d rows of run %s that nobody noted: lines may stand there twice"
            logger.warning(text, rows - end, self._run)
        there = {frozenset(names): int(step) for step, names in head["there"]}
        for row, line in noted.items():
            if line is not None and (rows is None or row < rows):
                step, kind = line
                there[kind] = max(step, there.get(kind, -1))
        return there

    def begin(self, rows: int | None, there: Mapping[Kind, int], floor: int = -1) -> None:
        """A life begins, with so many rows there, among them these lines; None: with as many as other lives add."""
        self.floor, self._next, self._kinds = floor, rows or 0, {}
        lines = [[step, sorted(kind)] for kind, step in there.items()]
        temp = self._path.with_name(f"{self._path.name}.tmp")
        try:
            temp.write_text(_line({"run": self._run, "rows": rows, "floor": floor, "there": lines}))
            os.replace(temp, self._path)
        except OSError as error:
            self._say(error)

    def note(self, step: int, kind: Kind | None) -> None:
        """The next row is a line of this kind at this step, or with None nothing that a later life has to know of."""
        text = ""
        if kind is not None and kind not in self._kinds:
            self._kinds[kind] = len(self._kinds)
            text = _line([self._kinds[kind], sorted(kind)])
        text += _line([self._next] if kind is None else [self._next, step, self._kinds[kind]])
        self._next += 1
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            self._say(error)

    def _read(self) -> tuple[dict[str, Any], dict[int, tuple[int, Kind] | None]] | None:
        """The line for the lives before, and what each row of the last one is; None without notes of this run."""
        kinds: dict[int, Kind] = {}
        rows: dict[int, tuple[int, Kind] | None] = {}
        head: dict[str, Any] | None = None
        try:
            for line in self._path.read_bytes().splitlines():
                match json.loads(line):
                    case {"run": self._run, "rows": _, "there": _, "floor": _} as head:
                        pass
                    case {"run": _}:
                        return None
                    case [int(number), list(names)]:
                        kinds[number] = frozenset(names)
                    case [int(row)]:
                        rows[row] = None
                    case [int(row), int(step), int(number)]:
                        rows[row] = step, kinds[number]
        except FileNotFoundError:
            return None
        except (OSError, *UNREADABLE) as error:
            logger.warning("%s is damaged: what stands there after the damage is not known (%r)", self._path, error)
        return None if head is None else (head, rows)

    def _say(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            text = "%s can't be written (%s): after a kill lines may be missing in wandb, or stand there twice"
            logger.warning(text, self._path, error.strerror or error)


def joined(some: Mapping[Kind, int], more: Mapping[Kind, int]) -> dict[Kind, int]:
    """The last step of each kind of line that is there by the one or the other."""
    return {kind: max(some.get(kind, -1), more.get(kind, -1)) for kind in {**some, **more}}


def _line(what: Any) -> str:
    return json.dumps(what, separators=(",", ":")) + "\n"
