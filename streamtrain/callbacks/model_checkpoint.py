"""When to save, and which checkpoints stay: three pure rules, and a callback that wires them.

The law: nothing here touches a disk or a clock. The loop asks `schedule` when to save and `retain` what to keep;
the top-k table answers validations with a Verdict.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from streamtrain.callbacks.base import Callback
from streamtrain.errors import ConfigError
from streamtrain.events import CheckpointCommitted, EpochEnd, ValidationEnd, Verdict
from streamtrain.metrics import direction, no_such_monitor
from streamtrain.options import monitored
from streamtrain.schedulers import parse_span

logger = logging.getLogger(__name__)

UNITS = "for example '10min', '500steps' or '1epoch', or 'auto'; times are in s, sec, second, m, min, minute, h or hour"
_STALL = 0.01
"""The share of time that saving may cost under "auto"."""
_SHORTEST, _LONGEST = 30.0, 900.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a periodic save is due; made by `Schedule.parse`. Exactly one of the first three is set."""

    steps: int | None = None
    """Save after every update whose number is a multiple of this."""
    epochs: int | None = None
    """Save at the end of every so many epochs."""
    seconds: float | None = None
    """Save when so many seconds have passed since the last save."""
    auto: bool = False
    """`seconds` follows the measured cost of a save."""

    @classmethod
    def parse(cls, every: str) -> Schedule:
        """From `"10min"`, `"90s"`, `"2h"`, `"500steps"`, `"1epoch"` or `"auto"`; ConfigError for anything else."""
        if every == "auto":
            return cls(seconds=_SHORTEST, auto=True)
        with suppress(ConfigError):
            amount, unit = parse_span(str(every), "every")
            if unit == "second" and amount > 0:
                return cls(seconds=amount)
            if unit in ("step", "epoch"):
                return cls(steps=int(amount)) if unit == "step" else cls(epochs=int(amount))
        raise ConfigError(f"every={every!r} is no interval", hint=UNITS)

    def due(self, step: int, epoch: int, seconds_since_last: float, *, epoch_end: bool = False) -> bool:
        """Whether to save now.

        `step`: updates made; `epoch`: number of the running epoch, from 0; `epoch_end`: its last update was just made.
        """
        if self.steps is not None:
            return step > 0 and step % self.steps == 0
        if self.epochs is not None:
            return epoch_end and (epoch + 1) % self.epochs == 0
        return self.seconds is not None and seconds_since_last >= self.seconds

    def next_step(self, step: int) -> int | None:
        """The next step after `step` at which a save is due by its number alone; None where steps do not matter."""
        return None if self.steps is None else (step // self.steps + 1) * self.steps

    def measured(self, stall: float) -> Schedule:
        """This schedule after a save that cost `stall` seconds; it changes under "auto" only."""
        if not self.auto:
            return self
        return replace(self, seconds=min(max(stall / _STALL, _SHORTEST), _LONGEST))


class Saved(Protocol):
    """What `retain` needs of an entry in the checkpoints folder."""

    @property
    def name(self) -> str:
        """The folder's name."""

    @property
    def step(self) -> int:
        """The step that it holds."""


def retain(
    entries: Iterable[Saved], *, keep_last: int, pinned: Collection[int] = (), pins: Collection[str] = ()
) -> set[str]:
    """The names that stay: those pinned, by step or by name, and the `keep_last` newest of the others.

    Entries that have a `problem` stay and do not count, so that damaged newer ones never push out a valid one.
    `keep_last=-1` keeps all.
    """
    entries = list(entries)
    stay = {e.name for e in entries if e.step in pinned or e.name in pins or getattr(e, "problem", None) is not None}
    others = sorted((e for e in entries if e.name not in stay), key=lambda e: e.step)
    if keep_last >= 0:
        others = others[len(others) - min(keep_last, len(others)) :]
    return stay | {e.name for e in others}


class TopK:
    """The k best values and their steps; a value that is not finite is never among them.

    A value takes its place when it is offered, before it is saved. So what it pushes out is remembered until its
    checkpoint is there, and takes the place back if that never comes: the disk was full for a moment.
    """

    def __init__(self, k: int, mode: str) -> None:
        self.k = k
        self.mode = mode
        self.table: list[tuple[int, float]] = []
        """(step, value), best first; among equals the earlier."""
        self.spare: list[tuple[int, float]] = []
        """What was pushed out by rows whose checkpoints are not there yet, best first."""

    def offer(self, step: int, value: float) -> int | None:
        """The place that `value` takes, 0 for the best; None if it is not among the k best. k = -1 takes all."""
        if not math.isfinite(value) or self.k == 0:
            return None
        rank = sum(not self._better(value, other) for _, other in self.table)
        if 0 < self.k <= rank:
            return None
        self.table.insert(rank, (step, value))
        if self.k > 0:
            self.spare = self.table[self.k :] + self.spare
            del self.table[self.k :]
        return rank

    def settle(self, saved: Collection[int]) -> None:
        """Hold the table against the steps that are saved: what lies before the newest and is not there, never was."""
        newest = max(saved, default=-1)
        rows = [row for row in self.table + self.spare if row[0] in saved or row[0] > newest]
        rows.sort(key=lambda row: (row[1] if self.mode == "min" else -row[1], row[0]))
        self.table, self.spare = (rows[: self.k], rows[self.k :]) if self.k >= 0 else (rows, [])
        if all(step in saved for step, _ in self.table):
            self.spare = []

    @property
    def pinned(self) -> set[int]:
        """The steps whose checkpoints must stay."""
        return {step for step, _ in self.table + self.spare}

    def _better(self, a: float, b: float) -> bool:
        return a < b if self.mode == "min" else a > b


class ModelCheckpoint(Callback):
    """Saves periodically, and at once when a validation is among the `save_top_k` best; the end always saves.

    `every`: `"10min"`, `"500steps"`, `"1epoch"`, or `"auto"`: the interval at which saving takes 1 % of the time,
    between 30 s and 15 min. `monitor=None`: `val_loss` where it is logged. Names that begin with `val_` are looked at
    after validations, others (`loss`) at the ends of epochs. `keep_last` counts the checkpoints that are not among the
    best; -1 keeps all, for `save_top_k` too.
    """

    decides = True

    def __init__(
        self,
        *,
        every: str = "auto",
        monitor: str | None = None,
        mode: str = "auto",
        save_top_k: int = 1,
        keep_last: int = 2,
    ) -> None:
        if type(save_top_k) is not int or save_top_k < -1:
            raise ConfigError(f"save_top_k={save_top_k!r} is no number of checkpoints", hint="0 for none, -1 for all")
        if type(keep_last) is not int or (keep_last < 1 and keep_last != -1):
            raise ConfigError(
                f"keep_last={keep_last!r} is no number of checkpoints",
                hint="at least 1, or -1 for all: resuming needs the newest",
            )
        self.every = every
        self.schedule = Schedule.parse(every)
        self.monitor = "val_loss" if monitor is None else monitored(monitor, "ModelCheckpoint: monitor")
        self.mode = direction(self.monitor, mode)
        self.keep_last = keep_last
        self.required = () if monitor is None else (monitor,)
        """The names that must be logged."""
        self._best = TopK(save_top_k, self.mode)
        self._said = self._without = False

    @property
    def keeps_best(self) -> bool:
        """Whether what it monitors has a best checkpoint."""
        return self._best.k != 0

    @property
    def directions(self) -> dict[str, str]:
        """Of its monitor, whether less (`"min"`) or more (`"max"`) is better."""
        return {self.monitor: self.mode}

    async def on_validation_end(self, event: ValidationEnd) -> Verdict | None:
        """Asked after each validation, but the sanity check's."""
        if event.sanity or not self.monitor.startswith("val_"):
            return None
        return self._judge(event.step, event.metrics)

    async def on_epoch_end(self, event: EpochEnd) -> Verdict | None:
        """Asked at the end of each epoch; only for monitors of the training itself."""
        return None if self.monitor.startswith("val_") else self._judge(event.step, event.metrics)

    async def on_checkpoint(self, event: CheckpointCommitted) -> None:
        """Under "auto", let the next interval follow what this save cost."""
        self.schedule = self.schedule.measured(event.seconds)
        if self.schedule.auto and event.seconds > _STALL * _LONGEST and not self._said:
            self._said = True
            logger.warning(
                "a save stalls training for %.1f s: every %g min, the longest interval of every='auto', that is more "
                "than %g %%; give every= a longer one",
                event.seconds,
                _LONGEST / 60,
                100 * _STALL,
            )

    def _judge(self, step: int, metrics: Mapping[str, float]) -> Verdict | None:
        value = metrics.get(self.monitor)
        if value is None:
            if self.required:
                raise no_such_monitor("ModelCheckpoint", self.monitor, metrics)
            if self._best.k and not self._without:
                self._without = True
                known = ", ".join(sorted(name for name in metrics if name.startswith("val_")))
                logger.warning(
                    "no best checkpoint is kept: nothing logs val_loss; give ModelCheckpoint a monitor: %s", known
                )
            return None
        rank = self._best.offer(step, value)
        if rank is None:
            return None
        # The second best is kept as well, but is not what `result.best` names.
        return Verdict(save="best" if rank == 0 else "request", monitor=self.monitor, value=value)

    def retain(self, entries: Iterable[Saved], *, pins: Collection[str] = ()) -> set[str]:
        """The names of the checkpoints that stay; `pins` are names kept for other reasons (the one just committed)."""
        entries = list(entries)
        self._best.settle({entry.step for entry in entries if getattr(entry, "problem", None) is None})
        return retain(entries, keep_last=self.keep_last, pinned=self._best.pinned, pins=pins)

    def state_dict(self) -> dict[str, Any]:
        """The table of the best: `{"monitor", "mode", "best": [[step, value], ...], "spare": ...}`."""
        best, spare = ([list(row) for row in rows] for rows in (self._best.table, self._best.spare))
        return {"monitor": self.monitor, "mode": self.mode, "best": best, "spare": spare}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the table back; one of another monitor is left, and that is said."""
        if not state:
            return
        if (state["monitor"], state["mode"]) != (self.monitor, self.mode):
            logger.warning(
                "ModelCheckpoint watched %s (%s) before and %s (%s) now: its table of the best starts anew",
                state["monitor"],
                state["mode"],
                self.monitor,
                self.mode,
            )
            return
        rows = [(int(step), float(value)) for step, value in [*state["best"], *state["spare"]]]
        kept = len(state["best"]) if self._best.k < 0 else self._best.k
        self._best.table, self._best.spare = rows[:kept], rows[kept:]
