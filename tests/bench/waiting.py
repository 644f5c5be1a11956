"""The share of time for which steps wait for data: zstd chunks, and a model that keeps both cores busy.

Two views: what `fit` itself counts (`BatchEnd.data_wait`), held against the bar; and, from outside, all the time
between an update and the next forward pass, whatever it goes to.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_tools.synth import synth
from streamtrain import Callback, Trainer, ZarrStream
from streamtrain.events import BatchEnd
from tests.bench.loops import LR, Size, near
from tests.bench.measure import Measure, Options

STEP = 0.01
"""Seconds that a step about takes, on all cores."""


class Waits(Callback):
    """Adds up for how long the steps waited."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def on_batch_end(self, event: BatchEnd) -> None:
        """News of some batches."""
        self.seconds += event.data_wait


def run(options: Options) -> Iterator[Measure]:
    """Both shares."""
    chunks = 16 if options.quick else 128
    with options.room() as room:
        store = synth(room / "store.zarr", rows=chunks * 4096, columns=512, chunk_rows=4096, codec="zstd")
        size = dataclasses.replace(near(STEP, steps=20), batch=256, columns=512)
        rounds = 1 if options.quick else min(options.rounds, 5)
        shares = [asyncio.run(_shares(store, size)) for _ in range(rounds)]
    waits, gaps, steps = zip(*shares, strict=True)
    yield Measure(name="time that steps wait for data", values=tuple(100 * s for s in waits), at_most=2, unit=" %")
    yield Measure(
        name="time between an update and the next forward pass", values=tuple(100 * s for s in gaps), unit=" %"
    )
    yield Measure(name="  a step", values=tuple(1e3 * s for s in steps), unit=" ms")


async def _shares(store: Path, size: Size) -> tuple[float, float, float]:
    """Waiting and gaps as shares of the time of training, and the time of a step."""
    waits, model = Waits(), size.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    gap, ended, first = 0.0, 0.0, 0.0

    def begins(module: nn.Module, inputs: Any) -> None:
        nonlocal gap, first
        now = time.perf_counter()
        if ended:
            gap += now - ended
        else:
            first = now

    def ends(*_: Any) -> None:
        nonlocal ended
        ended = time.perf_counter()

    model.register_forward_pre_hook(begins)
    optimizer.register_step_post_hook(ends)
    stream = ZarrStream(store, inputs="x", targets="y", batch_size=256, shuffle="block", memory="512MiB")
    async with stream:
        trainer = Trainer(model, _loss, optimizer=optimizer, callbacks=[waits])
        began = time.perf_counter()
        result = await trainer.fit(stream)
    assert result.step == len(stream)
    return waits.seconds / (ended - began), gap / (ended - first), (ended - first) / result.step


def _loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(outputs.squeeze(1), targets)
