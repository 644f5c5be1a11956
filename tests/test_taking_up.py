"""A checkpoint that is refused leaves everything as it was, whatever of it no run has left."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from streamtrain import Callback, EarlyStopping, Trainer, checkpoint
from streamtrain.data.iterable import as_stream
from streamtrain.errors import CheckpointError
from streamtrain.taking_up import check_own_rng
from tests.engine import Samples, network, samples


class Counting(Callback):
    """Keeps a number, and takes up no other."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = int(state["seen"])


def trainer(run_dir: Path | None = None, **options: Any) -> Trainer:
    given = {"seed": 0, "device": "cpu", "ema": 0.9, "nonfinite": "rollback", "scheduler": "cosine", "log_every": 1}
    callbacks = [Counting(), EarlyStopping("loss", restore_best=False)]
    return Trainer(network(), nn.MSELoss(), run_dir=run_dir, callbacks=callbacks, **{**given, **options})


def standing(fitted: Trainer, stream: Samples) -> Any:
    """All that a checkpoint would change."""
    parts = fitted._parts
    assert parts.optimizer is not None
    assert parts.average is not None
    assert parts.rollback is not None
    rng = None if parts.rng is None else parts.rng.state["torch"]
    live: dict[str, Any] = {
        "model": dict(parts.model.state_dict()),
        "optimizer": parts.optimizer.state_dict(),
        "average": parts.average.state_dict(),
        "kept": parts.rollback.state_dict(),
        "progress": fitted.state.state_dict(),
        "callbacks": [callback.state_dict() for callback in fitted.callbacks if isinstance(callback, Counting)],
        "stream": stream.state_dict(),
        "rng": rng,
    }
    for group in live["optimizer"]["param_groups"]:
        group.pop("initial_lr", None)  # a schedule that is bound notes it, whatever becomes of the fit
    return copy.deepcopy(live)


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def at(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts `value` to this place of a tree."""

    def change(tree: dict[str, Any]) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return change


BAD = {
    "rng": at("state", "rng", "torch", value=torch.zeros(2)),
    "no rng": at("state", "rng", value=None),
    "epoch's rng": at("state", "epoch_rng", value={"torch": torch.zeros(2)}),
    "no count": at("state", "progress", "samples", value="many"),
    "a negative count": at("state", "progress", "step", value=-1),
    "time": at("state", "progress", "time", value=float("inf")),
    "owes": at("state", "progress", "owes", value="rent"),
    "bests": at("state", "progress", "bests", value=[["loss", 1.0]]),
    "means": at("state", "means", value={"loss": 3}),
    "window": at("state", "window", value=[1]),
    "spikes": at("state", "spikes", value={}),
    "scaler": at("state", "scaler", value={"scale": 1.0}),
    "scheduler": at("state", "scheduler", "bases", value="none"),
    "metrics": at("state", "metrics", value={"loss": "low"}),
    "ended": at("state", "ended", value=3),
    "restores": at("state", "restores", value=3),
    "habits": at("state", "habits", value=3),
    "average's shape": at("state", "average", "weights", "0.weight", value=torch.zeros(16, 1)),
    "average's count": at("state", "average", "updates", value="many"),
    "rollback's model": at("state", "kept", "kept", "model", value={}),
    "rollback's optimizer": at("state", "kept", "kept", "optimizer", "param_groups", value=[]),
    "rollback's step": at("state", "kept", "step", value="none"),
    "optimizer's groups": at("optimizer", "param_groups", value=[]),
    "optimizer's shape": at("optimizer", "state", "0.weight", "exp_avg", value=torch.zeros(4, 16)),
    "optimizer's state": at("optimizer", "state", "0.weight", value=3),
}
ONLY_IN_A_FIT = {
    "callback": at("state", "callbacks", "Counting", "seen", value="many"),
    "a later callback": at("state", "callbacks", "EarlyStopping['loss']", value={}),
    "stream": at("state", "stream", "seed", value=1),
}


async def forged(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint of a run, changed by somebody who knows how to make its digests."""
    first = trainer(folder / "first")
    (counting,) = (callback for callback in first.callbacks if isinstance(callback, Counting))
    counting.seen = 7
    path = (await first.fit(Samples(), max_steps=5)).checkpoint
    assert path is not None
    snapshot = await asyncio.to_thread(checkpoint.read, path)
    tree: dict[str, Any] = {"state": snapshot.state, "optimizer": snapshot.optimizer}
    change(tree)
    await asyncio.to_thread(checkpoint.commit, folder / "forged", replace(snapshot, **tree))
    return folder / "forged"


@pytest.mark.parametrize("bad", [*BAD, *ONLY_IN_A_FIT])
async def test_a_fit_that_is_refused_has_changed_nothing(tmp_path: Path, bad: str) -> None:
    path = await forged(tmp_path, {**BAD, **ONLY_IN_A_FIT}[bad])
    again, stream = trainer(tmp_path / "again"), Samples()
    before = standing(again, stream)
    with pytest.raises(CheckpointError, match="forged"):
        await again.fit(stream, max_steps=9, resume=path)
    after = standing(again, stream)
    before["rng"] = after["rng"]  # it is there since the fit began
    assert alike(before, after)
    assert torch.equal(after["rng"], trainer()._parts.random().state["torch"])


@pytest.mark.parametrize("bad", BAD)
async def test_a_checkpoint_that_is_not_loaded_has_changed_nothing(tmp_path: Path, bad: str) -> None:
    path = await forged(tmp_path, BAD[bad])
    again, stream = trainer(), Samples()
    before = standing(again, stream)
    with pytest.raises(CheckpointError, match="forged"):
        await again.load_checkpoint(path)
    assert alike(before, standing(again, stream))
    assert again._run.loaded is None


async def test_what_was_not_forged_is_taken_up_both_ways(tmp_path: Path) -> None:
    path = await forged(tmp_path, lambda tree: None)
    one, other = trainer(tmp_path / "one"), trainer(tmp_path / "other")
    await one.fit(Samples(), max_steps=9, resume=path)
    await other.load_checkpoint(path)
    await other.fit(Samples(), max_steps=9)
    assert alike(dict(one.model.state_dict()), dict(other.model.state_dict()))
    assert [callback.seen for callback in one.callbacks if isinstance(callback, Counting)] == [7]


def test_generators_of_a_source_are_tried_and_stay_where_they_were() -> None:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(*samples(24))
    stream = as_stream(DataLoader(data, batch_size=8, sampler=RandomSampler(data, generator=generator)))
    before = generator.get_state()
    check_own_rng(stream, {"sampler.generator": torch.Generator().manual_seed(4).get_state()})
    with pytest.raises(RuntimeError):
        check_own_rng(stream, {"sampler.generator": torch.zeros(2, dtype=torch.uint8)})
    assert torch.equal(generator.get_state(), before)
