"""For loggers whose lines can't be cut off again: which lines of the step where a life begins are there already.

The law: what a checkpoint's state holds was handed over before the checkpoint, so that a life which goes on from it,
and repeats a validation that was still due, does not hand it over twice.
"""

from __future__ import annotations

from typing import Any

from streamtrain.events import Log


class Once:
    """The lines of the last step that were handed over."""

    def __init__(self) -> None:
        self._step = -1
        self._there: set[tuple[str, frozenset[str]]] = set()
        """Split and names of each line of that step."""

    def begin(self, step: int) -> None:
        """A life begins at this step: of a fresh one, or of another than was kept, nothing is there."""
        if step == 0 or step != self._step:
            self._step, self._there = step, set()

    def first(self, event: Log) -> bool:
        """Whether this line is not there yet; from now on it is."""
        if event.step != self._step:
            self._step, self._there = event.step, set()
        line = (event.split, frozenset(event.values))
        if line in self._there:
            return False
        self._there.add(line)
        return True

    def state_dict(self) -> dict[str, Any]:
        """`{"step": n, "there": [[split, [names]], ...]}`."""
        return {"step": self._step, "there": sorted([split, sorted(names)] for split, names in self._there)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._step = int(state.get("step", -1))
        self._there = {(str(split), frozenset(names)) for split, names in state.get("there", ())}
