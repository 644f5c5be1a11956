"""Two hundred fits one after another in one loop, then two at a time: nothing is left, and each is what it is alone.

Each has data on disk, a folder, checkpoints and all default callbacks; seeds take turns. What a fit is alone says a
process that makes no other. `python -m tests.bench.fits STORE FOLDER FITS SEEDS` is the process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_tools.synth import synth
from tests import warm
from tests.bench.measure import Measure, Options
from tests.bench.passes import Stock, growth, stock

FITS, SEEDS = 200, (0, 1, 2)
COLUMNS = 16


def run(options: Options) -> Iterator[Measure]:
    """Growth from early on to the end, and fits that differ from those alone."""
    fits = 9 if options.quick else FITS
    with options.room() as room:
        store = synth(room / "s.zarr", rows=3000, columns=COLUMNS, chunk_rows=256, codec="zstd")
        alone = {seed: _process(store, room / f"alone-{seed}", 1, (seed,))["digests"][0] for seed in SEEDS}
        found = _process(store, room / "many", fits, SEEDS)
    yield from growth(f"{fits} fits", [Stock(**each) for each in found["stocks"]], memory=8)
    differing = sum(digest != alone[SEEDS[number % len(SEEDS)]] for number, digest in enumerate(found["digests"]))
    yield Measure(name=f"{fits} fits: other weights than alone", values=(differing,), at_most=0)
    differing = sum(digest != alone[seed] for seed, digest in zip(SEEDS, found["beside"], strict=False))
    yield Measure(name="2 fits at a time: other weights than alone", values=(differing,), at_most=0)


def _process(store: Path, folder: Path, fits: int, seeds: tuple[int, ...]) -> dict[str, Any]:
    done = warm.run(["-m", "tests.bench.fits", str(store), str(folder), str(fits), *map(str, seeds)], timeout=None)
    done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- in the process


async def main(store: Path, folder: Path, fits: int, seeds: list[int]) -> dict[str, Any]:
    """What is held after each fit, and what weights it ended with; and those of two at a time."""
    stocks, digests = [], []
    for number in range(fits):
        digests.append(await _fit(store, folder / str(number), seeds[number % len(seeds)]))
        shutil.rmtree(folder / str(number))
        stocks.append(asdict(stock()))
    beside = await asyncio.gather(*(_fit(store, folder / f"beside-{seed}", seed) for seed in seeds[:2]))
    return {"stocks": stocks, "digests": digests, "beside": beside}


async def _fit(store: Path, folder: Path, seed: int) -> str:
    from streamtrain import EarlyStopping, Trainer, ZarrStream

    data: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 100, "memory": "16MiB"}
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(COLUMNS, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1), nn.Flatten(0)
    )
    trainer = Trainer(
        model, nn.MSELoss(), callbacks=[EarlyStopping("val_loss", patience=3)], run_dir=folder, seed=seed, log_every=5
    )
    train = ZarrStream(store, split=(0.0, 0.9), shuffle="block", seed=seed, **data)
    valid = ZarrStream(store, split=(0.9, 1.0), shuffle=False, **data)
    async with train, valid:
        await trainer.fit(train, validation=valid, max_epochs=2)
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    store, folder, fits, *seeds = sys.argv[1:]
    print(json.dumps(asyncio.run(main(Path(store), Path(folder), int(fits), list(map(int, seeds))))))
