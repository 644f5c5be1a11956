"""Ways to make steps that take short turns, so that a machine whose speed drifts is as fast for each of them.

Each lives in a process of its own, as a user's does; each round has new processes, since one keeps the luck of its
pages for its whole life, a twentieth either way. libgomp keeps a pool for each thread that ever ran parallel operators,
and once all pools of a process together have more threads than there are cores it stops spinning and sleeps, so that
one way would pay for what another left behind.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from tests.bench.loops import Size
from tests.bench.measure import Options

WARM = 3
"""Turns of each process that count for nothing."""


class Way:
    """A process (tests.bench.pacer) that makes steps when it is told to."""

    _told: IO[str]
    _says: IO[str]

    def __init__(self, name: str, size: Size) -> None:
        shape = map(str, (size.batch, size.columns, size.width, size.layers))
        self._command = [sys.executable, "-m", "tests.bench.pacer", name, *shape]
        self.seconds: list[list[float]] = []
        """A step: a list a round, a value a turn."""
        self.cpu: list[list[float]] = []
        """The same of its thread's processor time."""
        self.found: list[dict[str, Any]] = []
        """What each process said at its end."""

    def begin(self, folder: Path, stack: ExitStack) -> None:
        """A new process, until the stack is left."""
        process = subprocess.Popen(
            [*self._command, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.enter_context(process)  # closes its input, which ends it, and waits
        assert process.stdin is not None
        assert process.stdout is not None
        self._told, self._says = process.stdin, process.stdout
        self.seconds.append([])
        self.cpu.append([])

    def go(self, lead: int, steps: int, *, counts: bool) -> None:
        """Have it make so many steps, after others that are not timed."""
        print(lead, steps, file=self._told, flush=True)
        seconds, cpu = json.loads(self._says.readline())
        if counts:
            self.seconds[-1].append(seconds)
            self.cpu[-1].append(cpu)

    def end(self) -> None:
        """Have it end, and say what it has found."""
        self._told.close()
        self.found.append(json.loads(self._says.readline()))

    def over(self, other: Way, *, cpu: bool = False) -> tuple[float, ...]:
        """The ratio of the steps' times, a value a round: the median of its turns, each over the other's turn."""
        mine, theirs = (self.cpu, other.cpu) if cpu else (self.seconds, other.seconds)
        return tuple(
            statistics.median(a / b for a, b in zip(*both, strict=True)) for both in zip(mine, theirs, strict=True)
        )


def take_turns(options: Options, ways: Sequence[Way], *, lead: int, steps: int, turns: int, folder: Path) -> None:
    """Have all of them make steps, `turns` times a round."""
    for number in range(options.rounds):
        with ExitStack() as stack:
            for at, way in enumerate(ways):
                way.begin(folder / f"{at}-{number}", stack)
            for turn in range(-WARM, turns):
                for way in ways if (number + turn) % 2 else reversed(ways):  # drift falls on all of them
                    way.go(lead, steps, counts=turn >= 0)
            for way in ways:
                way.end()
