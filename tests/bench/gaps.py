"""Data with gaps: delays of flights, and a sea with land in it. The error on held-out data, over a bare loop's.

`flights`: how late 336,776 flights arrived, from ten numbers of which some are missing; a transform marks the gaps, and
drops the flights that never arrived. `sea`: waves that travel over the real oceans, NaN on land; from two days the next
one, where there is sea; the mask (lat, lon) is the same for all samples. The bare loops have everything in memory and
draw full permutations; models, first weights, optimizers and sizes of batches are the same.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor, nn

from data_tools.convert import Layout, convert
from streamtrain import Trainer, ZarrStream
from streamtrain.data.batch import Batch
from tests.bench import datasets
from tests.bench.loops import parts
from tests.bench.measure import Measure, Options, ratios

COLUMNS = ("month", "day", "hour", "minute", "dep_delay", "air_time", "distance", "carrier", "origin", "dest")
MEAN = np.array([6.5, 15.7, 13.2, 26.2, 12.6, 150.7, 1040, 7, 1, 50], dtype="f4")
DEVIATION = np.array([3.4, 8.8, 4.7, 19.3, 40.2, 93.7, 733, 4, 0.8, 30], dtype="f4")
HELD_OUT = 0.8
"""The samples from this share on are for the test."""
DAYS, EVERY = 240, 600
"""Days of the sea, and points of the land mask from one to the next: 36 by 72 remain."""


def run(options: Options) -> Iterator[Measure]:
    """Errors, a seed a round."""
    for name, measured in (("flights", flights), ("sea", sea)):
        ours, theirs = [], []
        with options.room() as room:
            for one, other in measured(room, options):
                ours.append(one)
                theirs.append(other)
        yield Measure(name=f"{name}: error over a bare loop's", values=ratios(ours, theirs), at_most=1.02)
        yield Measure(name="  root of the mean squared error", values=tuple(ours))


# ---- flights


def flights(room: Path, options: Options) -> Iterator[tuple[float, float]]:
    """Errors in units of 100 minutes, ours and the bare loop's."""
    rows = datasets.flight_rows(datasets.flights(), (*COLUMNS, "arr_delay"))
    rows = rows[np.random.default_rng(0).permutation(len(rows))[: 20_000 if options.quick else None]]
    for name, values in (("x", rows[:, :-1]), ("y", rows[:, -1])):
        np.save(room / "values.npy", values)
        convert(room / "values.npy", room / "flights.zarr" / name, layout=Layout(chunks=(4096, *values.shape[1:])))
    epochs = 1 if options.quick else 3
    for seed in range(options.rounds):
        one = asyncio.run(_fit_flights(room / "flights.zarr", epochs, seed))
        yield one, _bare(_tabular(seed), *_filled(rows[:, :-1], rows[:, -1]), 256, epochs, seed, _mean_square)


def _fill(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Columns normalised, gaps 0, and for each column whether it was there."""
    known = np.isfinite(inputs)
    return np.concatenate([np.where(known, (inputs - MEAN) / DEVIATION, 0), known], axis=1).astype("f4")


def _arrived(batch: Batch) -> tuple[Any, Any]:
    """The flights that arrived, of a batch."""
    there = np.isfinite(batch.targets)
    return _fill(batch.inputs[there]), batch.targets[there, None] / 100


def _filled(x: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[Tensor, Tensor, int]:
    """The same of all, and how many of them are for training."""
    there = np.isfinite(y)
    train = int(there[: int(HELD_OUT * len(y))].sum())
    return torch.from_numpy(_fill(x[there])), torch.from_numpy(y[there, None] / 100), train


def _tabular(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    width = 2 * len(COLUMNS)
    return nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))


async def _fit_flights(store: Path, epochs: int, seed: int) -> float:
    data: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 256, "memory": "64MiB", "transform": _arrived}
    train = ZarrStream(store, split=(0.0, HELD_OUT), shuffle="block", seed=seed, **data)
    test = ZarrStream(store, split=(HELD_OUT, 1.0), shuffle=False, **data)
    trainer = Trainer(_tabular(seed), nn.MSELoss(), seed=seed)
    await trainer.fit(train, max_epochs=epochs)
    return math.sqrt((await trainer.evaluate(test))["test_loss"])


def _mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets)


# ---- sea


def sea(room: Path, options: Options) -> Iterator[tuple[float, float]]:
    """Errors where there is sea, ours and the bare loop's."""
    land = datasets.land_mask(EVERY)
    field = _waves(land, 60 if options.quick else DAYS)
    group = zarr.create_group(room / "sea.zarr")
    dims = ("time", "lat", "lon")
    group.create_array("height", data=field, chunks=(8, *land.shape), dimension_names=dims, fill_value=np.nan)
    group.create_array("land", data=land, chunks=land.shape, dimension_names=dims[1:])
    epochs = 1 if options.quick else 6
    x, y = _days(field)
    for seed in range(options.rounds):
        one = asyncio.run(_fit_sea(room / "sea.zarr", epochs, seed))
        yield one, _bare(_convolutions(seed), x, y, int(HELD_OUT * len(x)), 8, epochs, seed, _over_sea)


def _waves(land: NDArray[np.bool_], days: int) -> NDArray[np.float32]:
    """Heights of waves that travel eastwards and grow and fall, (days, lat, lon) float32; NaN on land."""
    rng = np.random.default_rng(0)
    lat, lon = np.meshgrid(*(np.linspace(0, 2 * np.pi, size, endpoint=False) for size in land.shape), indexing="ij")
    time = np.arange(days)[:, None, None]
    field = 0.1 * rng.standard_normal((days, *land.shape))
    for north, east, pace in ((1, 3, 0.3), (2, 5, 0.5), (1, 8, 0.8)):
        field += np.sin(north * lat + east * lon - pace * time + rng.uniform(0, 6)) * np.cos(lat / 2)
    field[:, land] = np.nan
    return field.astype("f4")


def _days(field: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Two days and the one after, for each day."""
    x = np.stack([field[:-2], field[1:-1]], axis=1)
    return torch.from_numpy(np.nan_to_num(x)), torch.from_numpy(field[2:])


def _convolutions(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1)
    )


def _over_sea(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error where there is a target."""
    there = targets.isfinite()
    return (outputs[:, 0][there] - targets[there]).square().mean()


def _split(batch: Batch) -> tuple[Any, Any]:
    """Of a window of three days the first two, without gaps, and the last; on land by the mask beside them."""
    days, land = batch.inputs["height"], batch.inputs["land"]
    return np.nan_to_num(days[:, :2]), np.where(land, np.nan, days[:, 2]).astype("f4")


async def _fit_sea(store: Path, epochs: int, seed: int) -> float:
    data: dict[str, Any] = {"inputs": ["height", "land"], "batch_size": 8, "memory": "32MiB", "transform": _split}
    data |= {"window": {"time": 3}, "decode_cf": False}
    train = ZarrStream(store, split=(0.0, HELD_OUT), shuffle="block", seed=seed, **data)
    test = ZarrStream(store, split=(HELD_OUT, 1.0), shuffle=False, **data)
    trainer = Trainer(_convolutions(seed), _over_sea, seed=seed)
    await trainer.fit(train, max_epochs=epochs)
    return math.sqrt((await trainer.evaluate(test))["test_loss"])


# ---- by hand


def _bare(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    train: int,
    batch: int,
    epochs: int,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """The error on what follows the first `train` samples, after a loop over those."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    torch.manual_seed(seed)
    for _ in range(epochs):
        for chosen in parts(torch.randperm(train), batch):
            torch.autograd.backward(loss(model(x[chosen]), y[chosen]))
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        each = [
            (float(loss(model(a), b)), len(a))
            for a, b in zip(parts(x[train:], batch), parts(y[train:], batch), strict=True)
        ]
    return math.sqrt(sum(value * count for value, count in each) / sum(count for _, count in each))
