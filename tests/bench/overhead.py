"""Time per step of `fit` over a bare loop, in turns of some hundred steps of a loop and a fit that go on all the while.

All have AdamW with the same settings; no task ticks beside them. Against torch's default kernels (which `fit` does not
take: fused ones are several times faster) it must be no slower at all. Lightning does the same steps, in an environment
of its own: what N more steps take, so that beginnings and ends cancel out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import run as environments
from tests.bench.loops import LR, Size, near
from tests.bench.measure import Measure, Options
from tests.bench.pacer import LOCAL
from tests.bench.turns import Way, take_turns

TURNS = 12
LIGHTNING = ["torch==2.13.0", "numpy", "lightning>=2.5,<3"]


def run(options: Options) -> Iterator[Measure]:
    """The ratios at steps of about 500 us and of about 10 ms."""
    quick = options.quick
    yield from _ratios(options, "500 us", near(500e-6), steps=100 if quick else 1000, bars=(1.05, 1.15))
    yield from _ratios(options, "10 ms", near(10e-3, steps=20), steps=10 if quick else 60, bars=(1.01, None))


def _ratios(
    options: Options, name: str, size: Size, *, steps: int, bars: tuple[float, float | None]
) -> Iterator[Measure]:
    fit, fused, default, every = ways = [Way(each, size) for each in ("fit", "fused", "default", "all")]
    with options.room() as room:
        take_turns(options, ways, lead=steps // 2, steps=steps, turns=2 if options.quick else TURNS, folder=room)
        theirs = []
        if not options.quick:
            python = _lightning_python()
            theirs = [_lightning(python, size, 2 * steps, room / f"lightning-{at}") for at in range(options.rounds)]
    yield Measure(name=f"{name}: fit over a bare loop", values=fit.over(fused), at_most=bars[0])
    yield Measure(name="  its thread's processor time", values=fit.over(fused, cpu=True), at_most=bars[0])
    yield Measure(name=f"{name}: with all callbacks", values=every.over(fused), at_most=bars[1])
    yield Measure(name="  its thread's processor time", values=every.over(fused, cpu=True), at_most=bars[1])
    print(f"  beside the default ones: {', '.join(LOCAL)}", flush=True)
    yield Measure(name=f"{name}: fit over a bare loop, torch's default", values=fit.over(default), at_most=1.0)
    microseconds = {
        each: tuple(1e6 * statistics.median(turns) for turns in way.seconds)
        for each, way in (("fit", fit), ("bare loop, fused", fused), ("bare loop, torch's default", default))
    }
    if theirs:
        bare = microseconds["bare loop, fused"]
        values = tuple(1e6 * one / other for one, other in zip(theirs, bare, strict=True))
        yield Measure(name=f"{name}: Lightning over a bare loop", values=values)
    for each, values in microseconds.items():
        yield Measure(name=f"  {each}", values=values, unit=" us a step")
    lines = tuple(float(one["lines"]) for way in (fit, every) for one in way.found)
    yield Measure(name="  steps missing or twice in metrics.jsonl", values=lines, at_most=0)


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
