"""Weights after `fit` against those of a bare loop that is given the same batches: the same to the bit.

Shuffled from disk, with dropout, BatchNorm and accumulation, over two epochs; their last group is short, or its last
batch is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from data_tools.synth import synth
from streamtrain import Trainer, ZarrStream
from tests.bench.measure import Measure, Options

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
