"""What a save stops: a real fit with 1 GiB of state, against `torch.save` and fsync of the same in a bare loop.

In turn within a round: the fit saves, and its event says for how long training stood still; then the weights and the
optimizer's state are written as people do it. And the share of a fit that its saves take with `every="auto"`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from streamtrain import Callback, ModelCheckpoint, Trainer, from_iterable
from streamtrain.events import CheckpointCommitted
from tests.bench.measure import Measure, Options, ratios

WIDTH = 2048
LAYERS = 21
"""Of 16 MiB each; with AdamW's two moments 1 GiB."""
QUIET = 3
"""Steps between two saves."""
AUTO = 100.0
"""Seconds of the fit whose saves come by themselves; the first after 30."""


class Stalls(Callback):
    """Notes for how long each save stopped training, and does what is compared with it after each."""

    def __init__(self, theirs: Path | None = None, *, rounds: int = 0) -> None:
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.buffers = 0
        self.enough: Callable[[], object] = lambda: None
        """Called after the last round."""
        self._path, self._rounds = theirs, rounds

    async def on_checkpoint(self, event: CheckpointCommitted) -> None:
        """A save is through."""
        if event.kind != "periodic":
            return
        self.ours.append(event.seconds)
        self.buffers = event.buffers
        if self._path is not None:
            path = self._path
            self.theirs.append(await event.on_train_thread(lambda model, optimizer: _saved(model, optimizer, path)))
            if len(self.ours) == self._rounds:
                self.enough()


def _saved(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> float:
    """As in a bare loop: seconds."""
    began = time.perf_counter()
    with open(path, "wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    taken = time.perf_counter() - began
    path.unlink()
    return taken


def network(layers: int) -> nn.Module:
    """Wide layers, one after the other."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same one again and again."""
    inputs = torch.randn(4, WIDTH)
    for _ in range(count):
        yield inputs, inputs


async def fitted(room: Path, layers: int, every: str, stalls: Stalls, *, most: float | None = None) -> float:
    """Seconds that the fit took."""
    callbacks = [ModelCheckpoint(every=every, keep_last=1), stalls]
    trainer = Trainer(network(layers), nn.MSELoss(), lr=1e-4, run_dir=room / every, callbacks=callbacks, seed=0)
    stalls.enough = trainer.stop
    began = time.perf_counter()
    await trainer.fit(from_iterable(batches(10**9)), max_epochs=1, max_time=most)
    return time.perf_counter() - began


def run(options: Options) -> Iterator[Measure]:
    """All of it; a round is a save of each kind."""
    layers, rounds = (2, 2) if options.quick else (LAYERS, options.rounds)
    with options.room() as room:
        stalls = Stalls(room / "theirs.pt", rounds=rounds)
        asyncio.run(fitted(room, layers, f"{QUIET}steps", stalls))
        ours, theirs = stalls.ours[:rounds], stalls.theirs[:rounds]
        yield Measure(name="a save stops training, over torch.save", values=ratios(ours, theirs), at_most=0.15)
        yield Measure(name="  seconds", values=tuple(ours), unit=" s")
        yield Measure(name="  seconds of torch.save and fsync", values=tuple(theirs), unit=" s")
        yield Measure(name="  memory kept for snapshots", values=(stalls.buffers / 2**20,), unit=" MiB")
        if options.quick:
            return
        auto = Stalls()
        taken = asyncio.run(fitted(room, layers, "auto", auto, most=AUTO))
        share = 100 * sum(auto.ours) / taken
        yield Measure(name="every='auto': share of the time stopped", values=(share,), at_most=1, unit=" %")
        yield Measure(name="  saves", values=(len(auto.ours),))
