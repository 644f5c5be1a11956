"""A training that may be killed at any moment and started again.

`python -m tests.bench.life STORE FOLDER COLUMNS EPOCHS EVERY`, EVERY in updates between two checkpoints.

Beside the run's folder it leaves `updates`, a line for each update as soon as it is made (the process that made it,
which kill -9 takes nothing back from), and `saves`, how many updates were made while each checkpoint was committed.
At the end it prints the digest of all weights.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from streamtrain import Callback, ModelCheckpoint, Trainer, ZarrStream
from streamtrain.events import CheckpointCommitted, TrainBegin

LOG_EVERY, ACCUMULATE, BATCH, SEED = 3, 3, 33, 5


def network(columns: int) -> nn.Module:
    """Dropout draws random numbers, BatchNorm keeps running means."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(columns, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1), nn.Flatten(0)
    )


def digest(weights: Mapping[str, Tensor]) -> str:
    """One text for all bits of a model."""
    made = hashlib.sha256()
    for name, value in sorted(weights.items()):
        made.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        made.update(value.contiguous().numpy().tobytes())
    return made.hexdigest()


class Diary(Callback):
    """Writes down each update, and for how many of them each save took."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.step = folder, 0
        self._updates = os.open(folder / "updates", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def update(self, *_: object) -> None:
        """After each update."""
        self.step += 1
        os.write(self._updates, b"%d\n" % os.getpid())

    def on_train_begin(self, event: TrainBegin) -> None:
        """Where this life goes on from."""
        self.step = event.step

    def on_checkpoint(self, event: CheckpointCommitted) -> None:
        """A save is over."""
        saved = int(Path(event.path).name.removeprefix("step-"))
        with open(self.folder / "saves", "a") as file:
            file.write(f"{self.step - saved}\n")


async def main(store: str, folder: Path, columns: int, epochs: int, every: int) -> None:
    """Train to the end, from wherever the last life got to."""
    model, diary = network(columns), Diary(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(diary.update)
    trainer = Trainer(
        model,
        nn.MSELoss(),
        optimizer=optimizer,
        callbacks=[ModelCheckpoint(every=f"{every}steps"), diary],
        run_dir=folder / "run",
        accumulate_grad_batches=ACCUMULATE,
        seed=SEED,
        log_every=LOG_EVERY,
    )
    stream = ZarrStream(
        store, inputs="x", targets="y", batch_size=BATCH, shuffle="block", shuffle_blocks=4, seed=SEED, memory="64MiB"
    )
    async with stream:
        await trainer.fit(stream, max_epochs=epochs, resume="auto")
    print(digest(model.state_dict()), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])))
