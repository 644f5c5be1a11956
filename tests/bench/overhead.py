"""Time per step of `fit` over a bare loop: what N more steps take, so that beginnings and ends cancel out.

All have AdamW with the same settings; no task ticks beside them. Against torch's default kernels (which `fit` does not
take: fused ones are several times faster) it must be no slower at all. Beside them Lightning does the same steps, in an
environment and a process of its own. A bare loop in a thread of its own is for information: libgomp keeps a pool for
each thread that ever ran parallel operators, and once all pools together have more threads than there are cores it
stops spinning and sleeps, which costs a small step several times its time, whoever makes it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import run as environments
from streamtrain import __all__ as names
from tests.bench.loops import LR, Pace, Size, bare, fitted, missing, near
from tests.bench.measure import Measure, Options, ratios

LOCAL = ("TensorBoard", "LearningRateMonitor", "ResourceMonitor", "Plots")
"""The callbacks that we ship and that need nobody else, beside the default ones; a Profiler is for a few steps."""
LIGHTNING = ["torch==2.13.0", "numpy", "lightning>=2.5,<3"]


def run(options: Options) -> Iterator[Measure]:
    """The ratios at steps of about 500 us and of about 10 ms."""
    quick = options.quick
    yield from _slopes(options, "500 us", near(500e-6), steps=200 if quick else 2000, bars=(1.05, 1.15))
    yield from _slopes(options, "10 ms", near(10e-3, steps=20), steps=20 if quick else 150, bars=(1.01, None))


class _Turns:
    """Microseconds a step of each way, a value a round."""

    def __init__(self, size: Size, steps: int, folder: Path) -> None:
        self.size, self.steps, self.folder = size, steps, folder
        self.short, self.long = size.batches(steps), size.batches(2 * steps)
        self.ways: dict[str, Callable[[], float]] = {
            "fit": lambda: self._fit("fit", list),
            "fused": lambda: self._bare("fused", fused=True),
            "default": lambda: self._bare("default"),
            "thread": self._in_a_thread,
            "all": lambda: self._fit("all", local_callbacks),
        }
        self.found: dict[str, list[float]] = {name: [] for name in self.ways}
        self.cpu: dict[str, list[float]] = {name: [] for name in self.ways}
        self.gaps: list[float] = []
        self.rounds = 0

    def round(self) -> None:
        """All of them; a loop of one kind never follows itself, and rounds turn around: drift falls on all of them."""
        for name in self.ways if self.rounds % 2 else reversed(self.ways):
            self.found[name].append(self.ways[name]() / self.steps * 1e6)
        self.rounds += 1

    def _fit(self, name: str, callbacks: Callable[[], Sequence[object]]) -> float:
        paces = Pace(self.short), Pace(self.long)
        folders = [self.folder / f"{self.rounds}-{name}-{len(pace)}" for pace in paces]
        first, second = (
            asyncio.run(fitted(self.size, pace, folder, callbacks)) for pace, folder in zip(paces, folders, strict=True)
        )
        self.cpu[name].append((paces[1].cpu - paces[0].cpu) / self.steps * 1e6)
        self.gaps += [missing(folder, len(pace)) for folder, pace in zip(folders, paces, strict=True)]
        return second - first

    def _bare(self, name: str, **how: bool) -> float:
        paces = Pace(self.short), Pace(self.long)
        first, second = (bare(self.size, pace, **how) for pace in paces)
        self.cpu[name].append((paces[1].cpu - paces[0].cpu) / self.steps * 1e6)
        return second - first

    def _in_a_thread(self) -> float:
        with ThreadPoolExecutor(1) as executor:
            first, second = (
                executor.submit(bare, self.size, batches, fused=True).result() for batches in (self.short, self.long)
            )
        return second - first


def local_callbacks() -> list[object]:
    """One of each that is shipped and works without a service."""
    import streamtrain

    return [getattr(streamtrain, name)() for name in LOCAL if name in names]


def _slopes(
    options: Options, name: str, size: Size, *, steps: int, bars: tuple[float, float | None]
) -> Iterator[Measure]:
    with options.room() as room:
        turns = _Turns(size, steps, room)
        bare(size, turns.short, fused=True)  # warm
        lightning = None if options.quick else _lightning_python()
        theirs: list[float] = []
        for _ in range(options.rounds):
            turns.round()
            if lightning is not None:
                theirs.append(_lightning(lightning, size, steps, room / f"lightning-{turns.rounds}"))
    found, cpu = turns.found, turns.cpu
    yield Measure(name=f"{name}: fit over a bare loop", values=ratios(found["fit"], found["fused"]), at_most=bars[0])
    yield Measure(name="  its thread's processor time", values=ratios(cpu["fit"], cpu["fused"]), at_most=bars[0])
    every = ", ".join(each for each in LOCAL if each in names)
    yield Measure(name=f"{name}: with all callbacks", values=ratios(found["all"], found["fused"]), at_most=bars[1])
    yield Measure(name="  its thread's processor time", values=ratios(cpu["all"], cpu["fused"]), at_most=bars[1])
    print(f"  beside the default ones: {every or 'none'}", flush=True)
    over = ratios(found["fit"], found["default"])
    yield Measure(name=f"{name}: fit over a bare loop, torch's default", values=over, at_most=1.0)
    yield Measure(name=f"{name}: fit over a bare loop in a thread", values=ratios(found["fit"], found["thread"]))
    if theirs:
        yield Measure(name=f"{name}: Lightning over a bare loop", values=ratios(theirs, found["fused"]))
    yield Measure(name="  fit", values=tuple(found["fit"]), unit=" us a step")
    yield Measure(name="  bare loop, fused", values=tuple(found["fused"]), unit=" us a step")
    yield Measure(name="  bare loop, torch's default", values=tuple(found["default"]), unit=" us a step")
    yield Measure(name="  bare loop in a thread, fused", values=tuple(found["thread"]), unit=" us a step")
    yield Measure(name="  steps missing or twice in metrics.jsonl", values=tuple(turns.gaps), at_most=0)


def _lightning_python() -> Path:
    return environments.environment(sys.executable, "lightning", LIGHTNING, "torch, lightning")


def _lightning(python: Path, size: Size, steps: int, folder: Path) -> float:
    """Microseconds a step."""
    script = Path(__file__).with_name("lightning_loop.py")
    shape = [size.batch, size.columns, size.width, size.layers, LR]
    command = [str(python), str(script), *map(str, shape), str(folder), str(steps), str(2 * steps)]
    done = subprocess.run(command, capture_output=True, check=True)
    first, second = json.loads(done.stdout.splitlines()[-1])
    return float(second - first) / steps * 1e6
