"""Shuffling as a dial, on data that lies sorted by class: what batches hold, and what training makes of them.

An eighth of the cells together, read once: the entropy of a batch's classes over that of a full shuffle, and the
validation loss at the end, a full shuffle's beside it with the same seed (the same weights to begin with, too). The
unshuffled order shows what there is to lose.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor, nn

from streamtrain import ZarrStream
from streamtrain.data.order import Shuffle
from tests.bench.measure import Measure, Options, ratios

CLASSES, WIDTH, CELL, BATCH = 10, 16, 64, 128
CELLS = 640
"""For training; a tenth more for validation."""
SEEDS = 5
SHUFFLES: tuple[Shuffle, ...] = ("block", "global", "none")


def run(options: Options) -> Iterator[Measure]:
    """Entropy, read amplification and losses."""
    cells, epochs, seeds = (CELLS // 8, 1, 1) if options.quick else (CELLS, 5, SEEDS)
    blocks = cells // 8
    found: dict[str, list[float]] = {shuffle: [] for shuffle in SHUFFLES}
    losses: dict[str, list[float]] = {shuffle: [] for shuffle in SHUFFLES}
    with options.room() as room:
        store = _store(room / "sorted.zarr", cells * CELL)
        plan = _stream(store, "block", blocks, 0).plan()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a model so small only waits for the second
        try:
            for seed in range(seeds):
                for shuffle in SHUFFLES if not seed else SHUFFLES[:2]:
                    found[shuffle].append(asyncio.run(entropy(_stream(store, shuffle, blocks, seed))))
                    stream = _stream(store, shuffle, blocks, seed)
                    losses[shuffle].append(asyncio.run(trained(stream, store / "valid", seed, epochs)))
        finally:
            torch.set_num_threads(threads)
    what = f"{blocks} of {cells} cells together:"
    yield Measure(name=f"{what} read amplification", values=(plan.read_amplification,), at_most=1.1)
    mixed = ratios(found["block"], found["global"])
    yield Measure(name=f"{what} entropy over a full shuffle's", values=mixed, at_least=0.97)
    yield Measure(name="  as the plan tells, were each cell a class", values=(plan.shuffle_quality,))
    yield Measure(name="  not shuffled at all: entropy", values=ratios(found["none"], found["global"][:1]))
    final = ratios(losses["block"], losses["global"])
    yield Measure(name=f"{what} loss over a full shuffle's", values=final, at_most=1.01)
    yield Measure(name="  not shuffled at all: loss", values=ratios(losses["none"], losses["global"][:1]))
    yield Measure(name="  loss of a full shuffle", values=tuple(losses["global"]))


def _store(path: Path, samples: int) -> Path:
    """Ten overlapping clouds, sorted by class, and as many in any order for validation."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, WIDTH)) * 0.55
    for name, count in (("train", samples), ("valid", samples // 2)):
        labels = np.sort(rng.integers(CLASSES, size=count))
        data = (centres[labels] + rng.standard_normal((count, WIDTH))).astype(np.float32)
        group = zarr.create_group(path / name)
        group.create_array("x", data=data, chunks=(CELL, WIDTH), compressors=None)
        group.create_array("y", data=labels, chunks=(CELL,), compressors=None)
    return path


def _stream(store: Path, shuffle: Shuffle, blocks: int, seed: int) -> ZarrStream:
    return ZarrStream(
        store / "train",
        inputs="x",
        targets="y",
        batch_size=BATCH,
        shuffle=shuffle if shuffle != "none" else False,
        shuffle_blocks=blocks,
        seed=seed,
        memory="64MiB",
    )


def _entropy(labels: NDArray[Any]) -> float:
    shares = np.bincount(labels) / len(labels)
    return -sum(float(share) * math.log(share) for share in shares if share)


async def entropy(stream: ZarrStream) -> float:
    """Mean entropy of the classes in a batch, over an epoch."""
    async with stream:
        return statistics.fmean([_entropy(batch.targets.numpy()) async for batch in stream])


async def trained(stream: ZarrStream, valid: Path, seed: int, epochs: int) -> float:
    """Validation loss after so many epochs, the rate falling to nothing."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    async with stream:
        steps = epochs * len(stream)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            async for batch in stream:
                optimizer.zero_grad()
                loss: Any = nn.functional.cross_entropy(model(batch.inputs), batch.targets)
                loss.backward()
                optimizer.step()
                schedule.step()
    return _validated(model, valid)


@torch.no_grad()
def _validated(model: nn.Module, valid: Path) -> float:
    group = zarr.open_group(valid, mode="r")
    inputs, labels = (torch.from_numpy(np.asarray(group[name][...])) for name in ("x", "y"))  # type: ignore[index]
    loss: Tensor = nn.functional.cross_entropy(model(inputs), labels)
    return float(loss)
