"""Where a run stands, and how it ended; its law: everything here is counted in finished updates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamtrain.events import Verdict


@dataclass(frozen=True, slots=True)
class Best:
    """The best value of a monitored metric."""

    monitor: str
    value: float
    epoch: int
    """Number of the epoch in which it was reached, from 0."""
    step: int
    checkpoint: Path | None = None
    """Where its weights lie; None while nothing was saved."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """How a fit ended."""

    reason: str
    """`completed`, `early_stopping`, `stopped`, `signal` or `max_time`."""
    detail: str
    epoch: int
    """Finished epochs over the run's life."""
    step: int
    """Optimizer updates over the run's life."""
    samples: int
    metrics: dict[str, float]
    """The last value of each metric, by its full name: of training the means over the last epoch, or over the part of
    it that was trained."""
    best: Best | None
    checkpoint: Path | None
    """The last committed checkpoint."""
    diagnosis: str | None = None


@dataclass(slots=True)
class Progress:
    """Where a run stands now, over its whole life."""

    epoch: int = 0
    """Number of the running epoch, from 0: so many are finished."""
    step: int = 0
    """Finished updates."""
    samples: int = 0
    """Samples in them."""
    batch: int = 0
    """Batches of the running epoch that are part of a finished update."""
    passed: int = 0
    """Batches without rows that came before the last of those."""
    time: float = 0.0
    """Seconds for which fits of this run were going on, pauses included."""
    owes: str = ""
    """What was cut short after the last update: `validation`, `epoch` (its end, validation and all), `epoch_end` (the
    same, but for the validation), `end` (what comes with the last update of `max_steps`: the line of the log, and an
    epoch's end if it is one), or nothing."""
    verdicts: list[Verdict] = field(default_factory=list)
    """What the deciders said of the validation of an epoch whose end is still owed: obeyed once that is made."""
    best: Best | None = None
    bests: dict[str, Best] = field(default_factory=dict)
    """The best by monitor, where several are watched."""

    @property
    def taken(self) -> int:
        """Batches of the running epoch up to the last one of a finished update."""
        return self.batch + self.passed

    def offer(self, best: Best, *, primary: str) -> None:
        """Take in a new best; `best` is the one of the monitor `primary`, or of the only one."""
        self.bests[best.monitor] = best
        self.best = self.bests.get(primary) or next(iter(self.bests.values()))

    @contextmanager
    def offered(self, coming: Sequence[Best], *, primary: str) -> Iterator[None]:
        """As it will be once these are kept; afterwards it is what it was."""
        before = dict(self.bests), self.best
        for best in coming:
            self.offer(best, primary=primary)
        try:
            yield
        finally:
            self.bests, self.best = before

    def state_dict(self) -> dict[str, Any]:
        """All of it, `passed` where it is not 0; checkpoints by name, since run folders move."""
        bests = [
            [b.monitor, b.value, b.epoch, b.step, None if b.checkpoint is None else b.checkpoint.name]
            for b in self.bests.values()
        ]
        counts = {name: getattr(self, name) for name in ("epoch", "step", "samples", "batch", "time")}
        counts |= {"passed": self.passed} if self.passed else {}
        owed = {"owes": self.owes, "verdicts": [asdict(verdict) for verdict in self.verdicts]}
        return {**counts, **owed, "bests": bests, "best": None if self.best is None else self.best.monitor}

    def load_state_dict(self, state: Mapping[str, Any], *folders: Path | None) -> None:
        """Take back what `state_dict` gave; a checkpoint lies in the first of `folders` that has its name."""
        for name in ("epoch", "step", "samples", "batch"):
            setattr(self, name, int(state[name]))
        self.passed = int(state.get("passed", 0))
        self.time, self.owes = float(state["time"]), str(state["owes"])
        self.verdicts = [Verdict(**verdict) for verdict in state.get("verdicts", ())]
        self.bests = {}
        for monitor, value, epoch, step, name in state["bests"]:
            path = None if name is None else _find(Path(name).name, [folder for folder in folders if folder])
            self.bests[monitor] = Best(monitor, float(value), int(epoch), int(step), path)
        self.best = self.bests.get(state["best"])


def _find(name: str, folders: list[Path]) -> Path | None:
    paths = [folder / name for folder in folders]
    return next((path for path in paths if path.is_dir()), paths[0] if paths else None)


class Means:
    """Means by name, weighted by samples; sums are made in the order of the batches, so that they never depend on how
    these were handed over."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, value: float, samples: int) -> None:
        """Add a batch's mean."""
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value * samples, count + samples)

    def get(self, name: str) -> tuple[float, int]:
        """Sum and samples."""
        return self._sums.get(name, (0.0, 0))

    def put(self, name: str, total: float, samples: int) -> None:
        """Set sum and samples."""
        self._sums[name] = (total, samples)

    def compute(self) -> dict[str, float]:
        """The mean of each name that was added; nan over no samples."""
        return {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """`{name: [sum, samples]}`."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._sums = {name: (float(total), int(count)) for name, (total, count) in state.items()}
