"""What any thread leaves for the log: numbers, lines and media, until the wheel tells them.

Its law: whoever leaves something never waits. Numbers join the next line of the log; what the wheel has not taken for
long (outside of a fit nobody does) is held up to a bound, and what goes beyond it is said once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from streamtrain.errors import ConfigError
from streamtrain.events import Event, Log, Media
from streamtrain.media import medium
from streamtrain.options import number
from streamtrain.progress import Progress

logger = logging.getLogger(__name__)

MOST = 256
"""Lines and media that wait for the wheel."""
PLACE = ("step", "epoch", "samples", "time", "split", "nonfinite")
"""What tells of a line of the log where it stands."""
OWN = ("loss", "lr")
"""What each line of the training tells itself."""


@dataclass(frozen=True, slots=True)
class Note:
    """A line or media, and when it was left."""

    hook: str
    kind: type[Event]
    fields: dict[str, Any]
    at: float
    """By `time.monotonic`."""


class Notes:
    """The notes of one trainer; the wheel of its fit takes them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._numbers: dict[str, float] = {}
        """The last of each name; changed by single operations alone, since whoever takes them is on another thread."""
        self._notes: deque[Note] = deque()
        self._said = False
        self.late_said = False
        """Whether it was said that numbers came behind the last line."""

    @property
    def waiting(self) -> bool:
        """Whether a line or media wait; numbers alone wait for their line."""
        return bool(self._notes)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Numbers for the next line. Raises ConfigError, and leaves nothing, if one is no number, or has the name of
        what the line tells itself."""
        for name, value in _numbers(values, (*OWN, *PLACE)).items():
            self._numbers[name] = value

    def line(self, values: Mapping[str, Any], split: str) -> None:
        """A line of its own, of this split, at the step where the run stands. Raises ConfigError as `metrics` does."""
        self._leave("on_log", Log, {"values": _numbers(values, PLACE), "split": split})

    def media(self, values: Mapping[str, Any]) -> None:
        """Images, tables and histograms, at the step where the run stands. Raises ConfigError for what is none."""
        shown = {str(name): medium(value, str(name)) for name, value in _named(values, "log_media").items()}
        self._leave("on_media", Media, {"values": shown})

    def _leave(self, hook: str, kind: type[Event], fields: dict[str, Any]) -> None:
        now = self._progress
        place = {"epoch": now.epoch, "step": now.step, "samples": now.samples}
        self._notes.append(Note(hook, kind, {**place, **fields}, time.monotonic()))
        if len(self._notes) > MOST:
            self._notes.popleft()
            if not self._said:
                self._said = True
                logger.warning(
                    "more than %d lines and media wait to be logged and nothing takes them: the oldest are dropped",
                    MOST,
                )

    def take_metrics(self) -> dict[str, float]:
        """The numbers left so far, the last of each name."""
        return {name: self._numbers.pop(name) for name in list(self._numbers)}

    def numbers(self) -> dict[str, float]:
        """The same, which wait on."""
        return dict(self._numbers)

    def take(self) -> list[Note]:
        """The lines and media left so far, in their order."""
        taken: list[Note] = []
        while self._notes:
            taken.append(self._notes.popleft())
        return taken


def _numbers(values: Mapping[str, Any], taken: Collection[str]) -> dict[str, float]:
    numbers = {
        str(name): number(value, f"log_metrics: {name}") for name, value in _named(values, "log_metrics").items()
    }
    for name in numbers:
        if name in taken:
            raise ConfigError(
                f"log_metrics: {name!r} is what the line of the log tells itself",
                hint=f"Name it otherwise, such as {'my_' + name!r}.",
            )
    return numbers


def _named(values: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{what} takes a dict by name, not {values!r:.80}", hint=f"For instance {what}({{'x': ...}})."
        )
    return values
