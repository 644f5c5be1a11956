"""For loggers whose lines can't be cut off again: which lines are there already.

The law: what a checkpoint's state holds was handed over before the checkpoint, so that a life which goes on from it,
and repeats a validation that was still due, does not hand it over twice. What was handed over after it, by a life that
was killed then, stands in a journal in the run's folder, and is not handed over again either: it is made again as it
was.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamtrain.errors import UNREADABLE
from streamtrain.events import Log

logger = logging.getLogger(__name__)


class Once:
    """The lines that were handed over: those of the last step, and how far a journal's lives have come."""

    def __init__(self) -> None:
        self._step = -1
        self._there: set[tuple[str, frozenset[str]]] = set()
        """Split and names of each line of that step."""
        self._reached: dict[str, int] = {}
        """The last step of each kind of line."""
        self._journal: Path | None = None
        self._key = ""

    def begin(self, step: int, journal: Path | None = None, *, key: str = "") -> None:
        """A life begins at this step: of a fresh one, or of another than was kept, nothing is there.

        `journal`: a file of the run's folder that tells how far lives before this one have come, in what `key` names.
        """
        if step == 0 or step != self._step:
            self._step, self._there = step, set()
        self._journal, self._key, self._reached = journal, key, {}
        if journal is None:
            return
        with suppress(OSError, *UNREADABLE):
            kept = json.loads(journal.read_bytes())
            if step and kept["key"] == key:
                self._reached = {str(kind): int(last) for kind, last in kept["reached"].items()}
        last = max(self._reached.values(), default=0)
        if last > step:
            logger.info("%s: lines up to step %d are there from a life before, and not sent again", journal, last)

    def first(self, event: Log) -> bool:
        """Whether this line is not there yet; from now on it is."""
        if event.step != self._step:
            self._step, self._there = event.step, set()
        line = (event.split, frozenset(event.values))
        if line in self._there:
            return False
        self._there.add(line)
        return event.step > self._reached.get(_kind(event), -1)

    def handed(self, event: Log) -> None:
        """A line was handed over; where there is a journal it is written there at once, by one call."""
        if self._journal is None:
            return
        self._reached[_kind(event)] = event.step
        data = json.dumps({"key": self._key, "reached": self._reached}).encode()
        with suppress(OSError):  # then a kill may cost a line twice
            descriptor = os.open(self._journal, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.pwrite(descriptor, data, 0)
                os.ftruncate(descriptor, len(data))
            finally:
                os.close(descriptor)

    def state_dict(self) -> dict[str, Any]:
        """`{"step": n, "there": [[split, [names]], ...]}`."""
        return {"step": self._step, "there": sorted([split, sorted(names)] for split, names in self._there)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._step = int(state.get("step", -1))
        self._there = {(str(split), frozenset(names)) for split, names in state.get("there", ())}


def _kind(event: Log) -> str:
    """Lines of one kind have different steps."""
    return f"{event.split}: {', '.join(sorted(event.values))}"
