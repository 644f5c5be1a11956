"""What a benchmark says: a value for each round, their median and spread, and the bar.

The law: whatever is compared runs in turn within a round, and the ratio is taken there, since absolute figures drift.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """How thoroughly to measure."""

    rounds: int = 7
    quick: bool = False
    """Small data and few steps: to see that it works, not what it gives."""
    folder: Path | None = None
    """Where data is made (and removed); None for the system's temporary folder."""

    @contextmanager
    def room(self) -> Iterator[Path]:
        """A folder that is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="streamtrain-bench-", dir=self.folder) as folder:
            yield Path(folder)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One line of the report; without a bar it is for information."""

    name: str
    values: tuple[float, ...]
    """One a round."""
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    @property
    def median(self) -> float:
        """What is held against the bar."""
        return statistics.median(self.values)

    @property
    def ok(self) -> bool:
        """Whether the median keeps to the bar."""
        above = self.at_least is None or self.median >= self.at_least
        return above and (self.at_most is None or self.median <= self.at_most)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        text = f"{self.name:<52} {self.median:9.4g}{self.unit}"
        if len(self.values) > 1:
            text += f"  ({low:.4g} to {high:.4g}, n={len(self.values)})"
        bars = [(">=", self.at_least), ("<=", self.at_most)]
        asked = " ".join(f"{sign} {bar:g}{self.unit}" for sign, bar in bars if bar is not None)
        return f"{text}  {asked}  {'ok' if self.ok else 'SHORT'}" if asked else text

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        bar = {"at_least": self.at_least, "at_most": self.at_most}
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "values": self.values,
            **bar,
            "ok": self.ok,
        }


def ratios(ours: list[float], theirs: list[float]) -> tuple[float, ...]:
    """Round by round."""
    return tuple(a / b for a, b in zip(ours, theirs, strict=True))


class Others:
    """How much of the processors other processes take: what makes a figure doubtful."""

    def __init__(self) -> None:
        self._before = self._times()

    def share(self) -> float:
        """Their share since this was made; our children count as ours once they have ended."""
        everything, busy, own = (now - then for now, then in zip(self._times(), self._before, strict=True))
        return min(1.0, max(0.0, busy - own) / everything) if everything else 0.0

    @staticmethod
    def _times() -> tuple[float, float, float]:
        """Seconds of all processors, of those the busy ones, and of those our own."""
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
        user, nice, system, idle, waiting, *rest = (
            int(field) / os.sysconf("SC_CLK_TCK") for field in first.split()[1:]
        )
        busy = user + nice + system + sum(rest[:3])
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return busy + idle + waiting, busy, own


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
