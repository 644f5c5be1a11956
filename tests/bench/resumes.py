"""How long a resume takes to its first update, where the position is in the middle of a billion samples.

From the call of `fit` to the end of its first update, less what reading the checkpoint and loading the weights takes by
itself. Each round is a process of its own; its clock starts when everything is imported.
`python -m tests.bench.resumes STORE RUN SHUFFLE` is one of them.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamtrain import ModelCheckpoint, Trainer, ZarrStream, checkpoint
from streamtrain.data.order import Shuffle
from tests.bench import huge
from tests.bench.measure import Measure, Options

WIDTH = 1024
"""Of the model's layers: 16 MiB of weights, 48 with what AdamW keeps of them."""
LAYERS = 4


def run(options: Options) -> Iterator[Measure]:
    """Block and full shuffle; seconds beyond loading, and loading."""
    samples = huge.SAMPLES // 1000 if options.quick else huge.SAMPLES
    with options.room() as room:
        store = huge._store(room / "huge.zarr", samples)
        for shuffle in huge.SHUFFLES:
            folder = room / f"run-{shuffle}"
            place = samples // 2 + random.Random(1).randrange(huge.CHUNK)
            huge.touch(store, huge._order(samples, shuffle), place)
            asyncio.run(begun(store, folder, shuffle))
            moved(folder, place)
            rounds = [_round(store, folder, shuffle) for _ in range(options.rounds)]
            first, load, cpu = zip(*rounds, strict=True)
            beyond = tuple(one - other for one, other in zip(first, load, strict=True))
            yield Measure(name=f"{shuffle}: to the first update, beyond loading", values=beyond, at_most=1.0, unit=" s")
            yield Measure(name="  loading the weights", values=load, unit=" s")
            yield Measure(name="  CPU of all, loading too", values=cpu, unit=" s")


def _round(store: Path, folder: Path, shuffle: Shuffle) -> tuple[float, ...]:
    command = [sys.executable, "-m", "tests.bench.resumes", str(store), str(folder), shuffle]
    return tuple(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def trainer_of(folder: Path, first: list[tuple[float, float]]) -> tuple[Trainer, nn.Module]:
    """A trainer that notes when its updates are made, by the clock and by the processor's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, WIDTH), *_layers(), nn.Linear(WIDTH, 1), nn.Flatten(0))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: first.append((time.perf_counter(), time.process_time())))
    saves = ModelCheckpoint(every="1000000steps")
    return Trainer(model, nn.MSELoss(), optimizer=optimizer, callbacks=[saves], run_dir=folder, seed=1), model


def _layers() -> list[nn.Module]:
    return [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]


def stream_of(store: Path, shuffle: Shuffle) -> ZarrStream:
    """As in `huge`, with targets."""
    mode: Any = shuffle
    return ZarrStream(store, inputs="x", targets="x", batch_size=huge.BATCH, shuffle=mode, seed=huge.SEED)


async def begun(store: Path, folder: Path, shuffle: Shuffle) -> None:
    """A run of one update."""
    trainer, _ = trainer_of(folder, [])
    async with stream_of(store, shuffle) as stream:
        await trainer.fit(stream, max_steps=1)


def moved(folder: Path, place: int) -> None:
    """Let its checkpoint stand in the middle of the epoch, as if half of it had been trained."""
    [path] = (folder / "checkpoints").glob("step-*")
    snapshot = checkpoint.read(path)
    state = {**snapshot.state, "stream": {**snapshot.state["stream"], "position": place}}
    checkpoint.commit(path, replace(snapshot, state=state), replace=True)


async def measured(store: Path, folder: Path, shuffle: Shuffle) -> tuple[float, float, float]:
    """Seconds to the first update, of loading alone, and of the processor to the first update."""
    path, first = folder / "checkpoints" / "step-000000001", list[tuple[float, float]]()
    trainer, model = trainer_of(folder, first)
    stream = stream_of(store, shuffle)
    began, cpu = time.perf_counter(), time.process_time()
    async with stream:
        await trainer.fit(stream, max_steps=2, resume=path)
    load_began = time.perf_counter()
    model.load_state_dict(checkpoint.read(path).model)
    return first[0][0] - began, time.perf_counter() - load_began, first[0][1] - cpu


if __name__ == "__main__":
    kind: Shuffle = "global" if sys.argv[3] == "global" else "block"
    print(json.dumps(asyncio.run(measured(Path(sys.argv[1]), Path(sys.argv[2]), kind))))
