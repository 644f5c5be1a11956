"""A callback that takes a second an event: how much slower each step is, and whether that is said.

What N more steps take, so that beginnings and ends cancel out; the callback is plain, so that it sleeps in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from streamtrain import Trainer, from_iterable
from streamtrain.callbacks.base import Callback
from streamtrain.events import BatchEnd
from tests.bench.loops import LR, Pair, Size, near
from tests.bench.measure import Measure, Options, ratios


class Slow(Callback):
    """Takes a second for each piece of news."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps = seconds, 0

    def on_batch_end(self, event: BatchEnd) -> None:
        """One event may stand for many steps."""
        self.steps += event.count
        time.sleep(self.seconds)


class Said(logging.Handler):
    """What is logged at WARNING or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(options: Options) -> Iterator[Measure]:
    """The ratio of the slopes; steps that the callback was not told of; times that it was said, a fit."""
    size, seconds = near(500e-6), 0.1 if options.quick else 1.0
    steps = 400 if options.quick else 8000
    short, long = size.batches(steps), size.batches(3 * steps)
    plain: list[float] = []
    slowed: list[float] = []
    missed: list[float] = []
    said = Said()
    logging.getLogger("streamtrain").addHandler(said)
    with options.room() as room:
        for number in range(options.rounds):
            callbacks = [Slow(seconds), Slow(seconds)]
            for kind in (plain, slowed) if number % 2 else (slowed, plain):
                slow = kind is slowed
                taken = [
                    asyncio.run(
                        _fit(size, batches, room / f"{number}-{slow}-{len(batches)}", callback if slow else None)
                    )
                    for batches, callback in zip((short, long), callbacks, strict=True)
                ]
                kind.append((taken[1] - taken[0]) / (2 * steps))
            missed.append(4 * steps - sum(callback.steps for callback in callbacks))
    logging.getLogger("streamtrain").removeHandler(said)
    told = sum("Slow" in line for line in said.lines) / (2 * options.rounds)
    yield Measure(name="a step with it over one without", values=ratios(slowed, plain), at_most=1.01)
    yield Measure(name="  steps that it was not told of", values=tuple(missed), at_most=0)
    yield Measure(name="  times that this was said, a fit", values=(told,), at_least=1, at_most=1)


async def _fit(size: Size, batches: list[Pair], folder: Path, callback: Slow | None) -> float:
    """Seconds until the last step is made: what the callback still has to hear of comes after it."""
    callbacks = [] if callback is None else [callback]
    trainer = Trainer(size.model(), nn.MSELoss(), lr=LR, run_dir=folder, callbacks=callbacks)
    began = time.perf_counter()
    await trainer.fit(from_iterable(batches))
    return time.perf_counter() - began
