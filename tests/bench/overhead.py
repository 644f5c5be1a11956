"""Time per step of `fit` over a bare loop: what N more steps take, so that beginnings and ends cancel out.

All have AdamW with the same settings; no task ticks beside them. Against torch's default kernels (which `fit` does not
take: fused ones are several times faster) it must be no slower at all. Each way lives in a process of its own, as a
user's does, and they take turns; each round has new processes, since one keeps the luck of its pages for its whole
life, a twentieth either way. libgomp keeps a pool for each thread that ever ran parallel operators, and once all
pools of a process together have more threads than there are cores it stops spinning and sleeps, so that one way would
pay for what another left behind. Lightning does the same steps, in an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import run as environments
from tests.bench.loops import LR, Size, near
from tests.bench.measure import Measure, Options, ratios
from tests.bench.pacer import LOCAL, WAYS

TURNS = 3
"""Of the processes of one round."""
LIGHTNING = ["torch==2.13.0", "numpy", "lightning>=2.5,<3"]


def run(options: Options) -> Iterator[Measure]:
    """The ratios at steps of about 500 us and of about 10 ms."""
    quick = options.quick
    yield from _slopes(options, "500 us", near(500e-6), steps=200 if quick else 2000, bars=(1.05, 1.15))
    yield from _slopes(options, "10 ms", near(10e-3, steps=20), steps=20 if quick else 150, bars=(1.01, None))


class _Way:
    """Processes that make steps when they are told to, one at a time."""

    _told: IO[str]
    _says: IO[str]

    def __init__(self, name: str, size: Size) -> None:
        shape = map(str, (size.batch, size.columns, size.width, size.layers))
        self._command = [sys.executable, "-m", "tests.bench.pacer", name, *shape]
        self.seconds: list[float] = []
        """A step, a value a turn."""
        self.cpu: list[float] = []
        """The same of its thread's processor time."""
        self.gaps: list[float] = []

    def begin(self, folder: Path, stack: ExitStack) -> None:
        """A new process, until the stack is left."""
        command = [*self._command, str(folder)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.enter_context(process)  # closes its input, which ends it, and waits
        assert process.stdin is not None
        assert process.stdout is not None
        self._told, self._says = process.stdin, process.stdout
        self._says.readline()  # it is warm

    def go(self, steps: int) -> None:
        """Have it make `steps` and twice as many."""
        print(steps, file=self._told, flush=True)
        seconds, cpu, gaps = json.loads(self._says.readline())
        self.seconds.append(seconds)
        self.cpu.append(cpu)
        self.gaps.append(gaps)

    def __truediv__(self, other: _Way) -> tuple[float, ...]:
        return ratios(self.seconds, other.seconds)


def _slopes(
    options: Options, name: str, size: Size, *, steps: int, bars: tuple[float, float | None]
) -> Iterator[Measure]:
    with options.room() as room:
        ways = {each: _Way(each, size) for each in WAYS}
        lightning = None if options.quick else _lightning_python()
        theirs: list[float] = []
        for number in range(options.rounds):
            with ExitStack() as stack:
                for each, way in ways.items():
                    way.begin(room / f"{each}-{number}", stack)
                for turn in range(TURNS):
                    for each in ways if (number + turn) % 2 else reversed(ways):  # drift falls on all of them
                        ways[each].go(steps)
            if lightning is not None:
                theirs += [_lightning(lightning, size, steps, room / f"lightning-{number}")] * TURNS
    fit, fused, default, every = (ways[each] for each in ("fit", "fused", "default", "all"))
    yield Measure(name=f"{name}: fit over a bare loop", values=fit / fused, at_most=bars[0])
    yield Measure(name="  its thread's processor time", values=ratios(fit.cpu, fused.cpu), at_most=bars[0])
    yield Measure(name=f"{name}: with all callbacks", values=every / fused, at_most=bars[1])
    yield Measure(name="  its thread's processor time", values=ratios(every.cpu, fused.cpu), at_most=bars[1])
    print(f"  beside the default ones: {', '.join(LOCAL)}", flush=True)
    yield Measure(name=f"{name}: fit over a bare loop, torch's default", values=fit / default, at_most=1.0)
    if theirs:
        yield Measure(name=f"{name}: Lightning over a bare loop", values=ratios(theirs, fused.seconds))
    for each, way in (("fit", fit), ("bare loop, fused", fused), ("bare loop, torch's default", default)):
        yield Measure(name=f"  {each}", values=tuple(1e6 * one for one in way.seconds), unit=" us a step")
    gaps = tuple(one for way in (fit, every) for one in way.gaps)
    yield Measure(name="  steps missing or twice in metrics.jsonl", values=gaps, at_most=0)


def _lightning_python() -> Path:
    return environments.environment(sys.executable, "lightning", LIGHTNING, "torch, lightning")


def _lightning(python: Path, size: Size, steps: int, folder: Path) -> float:
    """Seconds a step."""
    script = Path(__file__).with_name("lightning_loop.py")
    shape = [size.batch, size.columns, size.width, size.layers, LR]
    command = [str(python), str(script), *map(str, shape), str(folder), str(steps), str(2 * steps)]
    done = subprocess.run(command, capture_output=True, check=True)
    first, second = json.loads(done.stdout.splitlines()[-1])
    return float(second - first) / steps
