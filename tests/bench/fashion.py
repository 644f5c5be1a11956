"""Fashion-MNIST, converted and streamed from disk, and a small CNN: accuracy on the test set, beside a bare loop's.

The bare loop has all images in memory, normalised, and draws its own full permutation for each epoch; model, first
weights, optimizer, schedule and batches' size are the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.convert import Layout, convert
from streamtrain import Trainer, ZarrStream
from streamtrain.metrics import Accuracy
from tests.bench import datasets
from tests.bench.loops import parts
from tests.bench.measure import Measure, Options

BATCH, LR, EPOCHS = 128, 2e-3, 6
MEAN, DEVIATION = 72.94, 90.02
"""Of the training images' values from 0 to 255."""
PARTS = {"train": "train", "test": "t10k"}


def run(options: Options) -> Iterator[Measure]:
    """Test accuracies in per cent, a seed a round."""
    images, epochs = (6000, 1) if options.quick else (60_000, EPOCHS)
    ours, theirs = [], []
    with options.room() as room:
        stores = {part: stored(room, part, images if part == "train" else 10_000) for part in PARTS}
        for seed in range(options.rounds):
            ours.append(asyncio.run(streamed(stores, epochs, seed)))
            theirs.append(bare(images, epochs, seed))
    difference = tuple(one - other for one, other in zip(ours, theirs, strict=True))
    yield Measure(name="test accuracy", values=tuple(ours), at_least=91.0, unit=" %")
    yield Measure(name="  of a bare loop with all images in memory", values=tuple(theirs), unit=" %")
    yield Measure(name="  the bare loop's over ours", values=tuple(-one for one in difference), at_most=0.3, unit=" %")


def stored(room: Path, part: str, count: int) -> Path:
    """A store of the first so many images (n, 28, 28) uint8 and labels (n,) uint8, by the tool that users have."""
    store = room / f"{part}.zarr"
    for name, kind in (("images", "images-idx3"), ("labels", "labels-idx1")):
        values = datasets.idx(datasets.fashion() / f"{PARTS[part]}-{kind}-ubyte.gz")[:count]
        np.save(room / "values.npy", values)
        convert(room / "values.npy", store / name, layout=Layout(chunks=(512, *values.shape[1:])))
    return store


def network(seed: int) -> nn.Module:
    """Two convolutions and two full layers; the same weights for a seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 28)),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


async def streamed(stores: dict[str, Path], epochs: int, seed: int) -> float:
    """Test accuracy in per cent after `fit`."""
    data: dict[str, Any] = {
        "inputs": "images",
        "targets": "labels",
        "memory": "256MiB",
        "normalize": {"images": (MEAN, DEVIATION)},
    }
    train = ZarrStream(stores["train"], batch_size=BATCH, shuffle="block", seed=seed, **data)
    test = ZarrStream(stores["test"], batch_size=1000, shuffle=False, **data)
    trainer = Trainer(
        network(seed),
        "cross_entropy",
        optimizer="adamw",
        lr=LR,
        scheduler="cosine",
        metrics={"accuracy": Accuracy()},
        seed=seed,
    )
    await trainer.fit(train, max_epochs=epochs)
    return 100 * float((await trainer.evaluate(test))["test_accuracy"])


def bare(images: int, epochs: int, seed: int) -> float:
    """The same by hand."""
    folder = datasets.fashion()
    x, y = _tensors(folder, "train", images)
    model, loss = network(seed), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    steps = -(-images // BATCH) * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(seed)
    for _ in range(epochs):
        for chosen in parts(torch.randperm(images), BATCH):
            loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    x, y = _tensors(folder, "test", 10_000)
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(1) for part in parts(x, 1000)])
    return 100 * float((answers == y).double().mean())


def _tensors(folder: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    images = datasets.idx(folder / f"{PARTS[part]}-images-idx3-ubyte.gz")[:count]
    labels = datasets.idx(folder / f"{PARTS[part]}-labels-idx1-ubyte.gz")[:count]
    x = (torch.from_numpy(images.astype("f4")) - MEAN) / DEVIATION
    return x, torch.from_numpy(labels.astype("i8"))
