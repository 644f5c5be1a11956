"""Weights after `fit` against those of a bare loop that is given the same batches: the same to the bit.

Shuffled from disk, with dropout, BatchNorm and accumulation, over two epochs; their last group is short, or its last
batch is. Then every optimizer with every schedule, and their pairs with accumulation, clipping and precision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.synth import synth
from streamtrain import Trainer, ZarrStream
from tests.bench.covering import Case, covering
from tests.bench.measure import Measure, Options
from tests.bench.recipes import CLIPPING, OPTIMIZERS, SCHEDULERS
from tests.bench.recipes import LR as RATE
from tests.bench.recipes import bare as bare_recipe
from tests.engine import Samples, pairs
from tests.engine import network as small_network

SEED, LR, EPOCHS, ACCUMULATE, BATCH = 7, 1e-3, 2, 4, 33


def run(options: Options) -> Iterator[Measure]:
    """How many of the model's tensors differ, for rows of 12 and of 2,000 bytes."""
    groups = ACCUMULATE * BATCH * (15 if options.quick else 150)
    for columns, rest in ((3, 2 * BATCH), (500, 3 * BATCH + 20)):
        with options.room() as room:
            rows = groups + rest
            store = synth(room / "store.zarr", rows=rows, columns=columns, chunk_rows=256, codec="zstd")
            differing, updates = asyncio.run(differences(store, columns))
        name = f"rows of {4 * columns} bytes: tensors that differ after {updates} updates"
        yield Measure(name=name, values=(differing,), at_most=0)
    found = cases(quick=options.quick)
    failed = [case for case in found if asyncio.run(differing_tensors(case))]
    for case in failed:
        print("differs:", case)
    name = f"of {len(found)} runs with pairs of options: those that differ"
    yield Measure(name=name, values=(len(failed),), at_most=0)


def cases(*, quick: bool = False) -> list[Case]:
    """Optimizer, schedule, accumulation, clipping and precision, all pairs; `quick`: not each optimizer with each
    schedule."""
    precisions = ["32", "bf16", *(["16"] if torch.cuda.is_available() else [])]
    factors: Mapping[str, list[str]] = {
        "optimizer": list(OPTIMIZERS),
        "scheduler": list(SCHEDULERS),
        "accumulate": ["1", "3"],
        "clip": list(CLIPPING),
        "precision": precisions,
    }
    return covering(factors, apart=[frozenset(("optimizer", "scheduler"))] if quick else ())


async def differing_tensors(case: Case) -> list[str]:
    """The model's tensors that differ after two epochs of 13 batches, whose last one is a short group alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"optimizer": case["optimizer"], "scheduler": SCHEDULERS[case["scheduler"]].spec}
    options |= {"precision": case["precision"], "accumulate_grad_batches": int(case["accumulate"])}
    options |= CLIPPING[case["clip"]]
    if case["precision"] == "16":
        options["nonfinite"] = "skip"  # the scaler tries scales that are too large
    ours, theirs = small_network(), small_network().to(device)
    trainer = Trainer(ours, nn.MSELoss(), lr=RATE, seed=SEED, device=device, **options)
    await trainer.fit(Samples(), max_epochs=EPOCHS)
    bare_recipe(theirs, pairs(Samples(), EPOCHS), case, seed=SEED, device=device)
    other = theirs.state_dict()
    return [name for name, value in ours.state_dict().items() if not same(value.cpu(), other[name].cpu())]


def network(columns: int) -> nn.Module:
    """Dropout draws random numbers, BatchNorm keeps running means; its weights are the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(columns, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1), nn.Flatten(0)
    )


def stream_of(store: Path) -> ZarrStream:
    """Batches of 33 rows in an order of their own each epoch."""
    return ZarrStream(store, inputs="x", targets="y", batch_size=BATCH, shuffle="block", seed=3)


async def differences(store: Path, columns: int) -> tuple[int, int]:
    """Tensors that differ between the two models, and updates made."""
    ours = network(columns)
    trainer = Trainer(ours, nn.MSELoss(), lr=LR, seed=SEED, accumulate_grad_batches=ACCUMULATE)
    async with stream_of(store) as stream:
        result = await trainer.fit(stream, max_epochs=EPOCHS)
    theirs = network(columns)
    updates = await bare(theirs, store)
    assert result.step == updates
    other = theirs.state_dict()
    return sum(not same(value, other[name]) for name, value in ours.state_dict().items()), updates


async def bare(model: nn.Module, store: Path) -> int:
    """The same by hand, with the same arithmetic: each loss divided by the batches of its group."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    loss = nn.MSELoss()
    torch.manual_seed(SEED)
    updates = 0
    async with stream_of(store) as stream:
        for _ in range(EPOCHS):
            left, group, taken = len(stream), min(ACCUMULATE, len(stream)), 0
            async for inputs, targets in stream:
                (loss(model(inputs), targets) / group).backward()
                left, taken = left - 1, taken + 1
                if taken == group:
                    optimizer.step()
                    optimizer.zero_grad()
                    updates, group, taken = updates + 1, min(ACCUMULATE, left), 0
    return updates


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
