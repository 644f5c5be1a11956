"""One way to make steps, in a process of its own: `python -m tests.bench.pacer WAY BATCH COLUMNS WIDTH LAYERS FOLDER`.

It makes steps as it is told to, in one loop or one `fit` that lasts as long as the process: for each line "LEAD STEPS"
it makes LEAD steps and then STEPS, and answers in a line of JSON with the seconds, and the seconds of its thread's
processor time, that each of the latter took. Once nothing comes in any more it says what it has found out, a dict.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import streamtrain
from streamtrain import Trainer, from_iterable
from streamtrain.callbacks.base import Callback
from streamtrain.events import BatchEnd
from tests.bench.loops import LOG_EVERY, LR, Pair, Size, bare, missing

LOCAL = ("TensorBoard", "LearningRateMonitor", "ResourceMonitor", "Plots")
"""The callbacks that we ship and that need nobody else, beside the default ones; a Profiler is for a few steps."""
SLOW = 1.0
"""Seconds that the slow callback takes for each event."""


class Turns:
    """Batches as they are asked for on the standard input; whoever iterates makes a step of each."""

    def __init__(self, batches: Sequence[Pair]) -> None:
        self._batches = batches
        self.given = 0

    def __iter__(self) -> Iterator[Pair]:
        for line in sys.stdin:
            lead, steps = map(int, line.split())
            yield from self._next(lead)
            began, cpu = time.perf_counter(), time.thread_time()
            yield from self._next(steps)
            print(json.dumps([(time.perf_counter() - began) / steps, (time.thread_time() - cpu) / steps]), flush=True)

    def _next(self, count: int) -> Iterator[Pair]:
        for _ in range(count):
            self.given += 1
            yield self._batches[self.given % len(self._batches)]


class Slow(Callback):
    """Takes a while for each piece of news, which it sleeps through in its thread."""

    def __init__(self) -> None:
        self.steps = 0

    def on_batch_end(self, event: BatchEnd) -> None:
        """One event may stand for many steps."""
        self.steps += event.count
        time.sleep(SLOW)


class Said(logging.Handler):
    """What is logged at WARNING or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    """Make steps until nothing comes in any more."""
    way, *shape = sys.argv[1:6]
    size, folder = Size(*map(int, shape)), Path(sys.argv[6])
    turns, found = Turns(size.batches(64)), dict[str, Any]()
    if way == "default":
        bare(size, turns)
    elif way == "fused":
        bare(size, turns, fused=True)
    else:
        found = asyncio.run(_fit(size, turns, folder, way))
    print(json.dumps(found), flush=True)


async def _fit(size: Size, turns: Turns, folder: Path, way: str) -> dict[str, Any]:
    slow, said = Slow(), Said()
    more = {"fit": [], "all": [getattr(streamtrain, name)() for name in LOCAL], "slow": [slow]}[way]
    logging.getLogger("streamtrain").addHandler(said)
    trainer = Trainer(size.model(), nn.MSELoss(), lr=LR, run_dir=folder, log_every=LOG_EVERY, callbacks=more)
    result = await trainer.fit(from_iterable(turns))
    assert result.step == turns.given
    return {
        "lines": missing(folder, turns.given),
        "untold": turns.given - slow.steps if way == "slow" else math.nan,
        "said": sum("Slow" in line for line in said.lines),
    }


if __name__ == "__main__":
    main()
