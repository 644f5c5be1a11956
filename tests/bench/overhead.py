"""Time per step of `fit` over a bare loop: what N more steps take, so that beginnings and ends cancel out.

Both have AdamW with the same settings; no task ticks beside them. Against torch's default kernels (which `fit` does not
take: fused ones are several times faster) it is for information. So it is against a bare loop in a thread of its own:
libgomp keeps a pool for each thread that ever ran parallel operators, and once all pools together have more threads
than there are cores it stops spinning and sleeps, which costs a small step several times its time, whoever makes it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.loops import Pair, Size, bare, fitted, missing, near
from tests.bench.measure import Measure, Options, ratios


def run(options: Options) -> Iterator[Measure]:
    """The ratio at steps of about 500 us, with a bar, and at about 10 ms."""
    yield from _slopes(options, "500 us", near(500e-6), steps=200 if options.quick else 2000, at_most=1.10)
    yield from _slopes(options, "10 ms", near(10e-3, steps=20), steps=20 if options.quick else 150, at_most=None)


def _slopes(options: Options, name: str, size: Size, *, steps: int, at_most: float | None) -> Iterator[Measure]:
    fit: list[float] = []
    fused: list[float] = []
    default: list[float] = []
    thread: list[float] = []
    gaps: list[float] = []
    short, long = size.batches(steps), size.batches(2 * steps)
    bare(size, short, fused=True)  # warm
    with options.room() as room:
        for number in range(options.rounds):
            folders = [room / f"{number}-{part}" for part in ("short", "long")]
            # A loop of one kind never follows itself, and rounds turn around: drift falls on all of them.
            turns: list[tuple[list[float], Callable[[], float]]] = [
                (fit, functools.partial(_more, size, short, long, folders)),
                (fused, lambda: bare(size, long, fused=True) - bare(size, short, fused=True)),
                (default, lambda: bare(size, long) - bare(size, short)),
                (thread, lambda: _in_a_thread(size, long) - _in_a_thread(size, short)),
            ]
            for values, turn in turns if number % 2 else reversed(turns):
                values.append(turn() / steps * 1e6)
            gaps += [missing(folder, len(batches)) for folder, batches in zip(folders, (short, long), strict=True)]
    yield Measure(name=f"{name}: fit over a bare loop", values=ratios(fit, fused), at_most=at_most)
    yield Measure(name=f"{name}: fit over a bare loop, torch's default", values=ratios(fit, default))
    yield Measure(name=f"{name}: fit over a bare loop in a thread", values=ratios(fit, thread))
    yield Measure(name="  fit", values=tuple(fit), unit=" us a step")
    yield Measure(name="  bare loop, fused", values=tuple(fused), unit=" us a step")
    yield Measure(name="  bare loop, torch's default", values=tuple(default), unit=" us a step")
    yield Measure(name="  bare loop in a thread, fused", values=tuple(thread), unit=" us a step")
    yield Measure(name="  steps missing or twice in metrics.jsonl", values=tuple(gaps), at_most=0)


def _more(size: Size, short: list[Pair], long: list[Pair], folders: Sequence[Path]) -> float:
    """What the longer list takes more."""
    first, second = (
        asyncio.run(fitted(size, batches, folder)) for batches, folder in zip((short, long), folders, strict=True)
    )
    return second - first


def _in_a_thread(size: Size, batches: list[Pair]) -> float:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(bare, size, batches, fused=True).result()
