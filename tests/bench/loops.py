"""What `fit` is held against: the same steps in a bare loop, and batches that lie in memory."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamtrain import Trainer, from_iterable

Pair = tuple[Tensor, Tensor]
LR = 1e-3
LOG_EVERY = 50


def parts(whole: Tensor, size: int) -> list[Tensor]:
    """A tensor in pieces of so many rows."""
    return [whole[first : first + size] for first in range(0, len(whole), size)]


@dataclass(frozen=True)
class Size:
    """A model of fully connected layers and its batches."""

    batch: int
    columns: int
    width: int
    layers: int

    def model(self) -> nn.Module:
        """The same weights each time."""
        torch.manual_seed(0)
        parts: list[nn.Module] = [nn.Linear(self.columns, self.width), nn.ReLU()]
        for _ in range(self.layers):
            parts += [nn.Linear(self.width, self.width), nn.ReLU()]
        return nn.Sequential(*parts, nn.Linear(self.width, 1))

    def batches(self, count: int, *, different: int = 64) -> list[Pair]:
        """A list of so many batches, made once; after `different` of them they come again."""
        torch.manual_seed(1)
        made = [(torch.randn(self.batch, self.columns), torch.randn(self.batch, 1)) for _ in range(different)]
        return [made[i % different] for i in range(count)]


def near(seconds: float, *, steps: int = 100) -> Size:
    """A size whose step in a bare loop takes about so long on this machine."""
    sizes = [Size(batch, columns, width, 2) for batch, columns, width in SIZES]
    taken: dict[Size, float] = {}
    for size in sizes:
        batches = size.batches(steps, different=16)
        bare(size, batches[:10], fused=True)
        taken[size] = min(bare(size, batches, fused=True) for _ in range(3)) / steps
        if taken[size] > seconds:
            break
    return min(taken, key=lambda size: abs(math.log(taken[size] / seconds)))


SIZES = [
    *((64, 64, width) for width in (32, 64, 96, 128, 160, 192, 224, 256, 320)),
    *((256, 512, width) for width in (192, 256, 384, 512, 640, 768, 1024, 1280, 1536)),
]
"""Batch, columns and width, from small to large."""


def bare(size: Size, batches: Iterable[Pair], **how: Any) -> float:
    """Seconds of a bare loop, with AdamW as `how` says (`fused=True` is what `fit` takes)."""
    model = size.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **how)
    loss = nn.MSELoss()
    began = time.perf_counter()
    for inputs, targets in batches:
        loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


async def fitted(size: Size, batches: Sequence[Pair], run_dir: Path) -> float:
    """Seconds of `fit`, from its call to its end, with a run's folder and the default callbacks."""
    trainer = Trainer(size.model(), nn.MSELoss(), optimizer="adamw", lr=LR, run_dir=run_dir, log_every=LOG_EVERY)
    began = time.perf_counter()
    result = await trainer.fit(from_iterable(batches))
    seconds = time.perf_counter() - began
    assert result.reason == "completed"
    assert result.step == len(batches)
    return seconds


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def missing(run_dir: Path, steps: int, every: int = LOG_EVERY) -> int:
    """How many steps that should stand once among the training lines do not."""
    there = [line["step"] for line in lines(run_dir) if line["split"] == "train"]
    wanted = {*range(every, steps + 1, every), steps}
    return sum(there.count(step) != 1 for step in wanted) + sum(step not in wanted for step in there)
