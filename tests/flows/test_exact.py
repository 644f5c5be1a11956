"""However a run was ended, and with whatever memory, prefetch and threads it goes on: it is the undisturbed run, to the
bit, in weights, optimizer, averages, random numbers, callbacks' states and the lines of its log."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamtrain import checkpoint
from streamtrain import state as trees
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.data.batch import Batch
from streamtrain.data.stream import ZarrStream
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import UserCodeError
from streamtrain.events import BatchEnd, EpochEnd
from streamtrain.trainer import Trainer
from tests.engine import AtStep, lines, network, same, samples

ROWS, EPOCHS, BATCH = 100, 2, 8


@pytest.fixture(scope="module")
def store() -> Iterator[Path]:
    """100 samples in chunks of 7, compressed."""
    folder = Path(tempfile.mkdtemp())
    group: Any = zarr.open_group(folder / "d.zarr", mode="w")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 4), dtype=np.float32)
    group.create_array("x", data=x, chunks=(7, 4))
    group.create_array("y", data=x.sum(axis=1, keepdims=True), chunks=(7, 1))
    yield folder / "d.zarr"
    shutil.rmtree(folder)


@dataclass(frozen=True)
class How:
    """What a run consists of."""

    accumulate: int = 1
    precision: str = "32"
    ema: float | None = None
    clip: float | None = None
    scheduler: str | None = None
    optimizer: str = "adamw"
    shuffle: Literal["block", "global"] = "block"
    augment: bool = False
    validate_every: str = "1epoch"
    log_every: int = 1
    nonfinite: str = "raise"


@dataclass(frozen=True)
class With:
    """What may be another in each life."""

    memory: str = "64MiB"
    prefetch: int | None = None
    threads: int | None = None
    cache: str | int = "auto"
    save_every: int = 3


def augmented(batch: Batch) -> tuple[Any, Any]:
    """Noise, and some rows left out."""
    assert batch.rng is not None
    noise = batch.rng.standard_normal(batch.inputs.shape, dtype=np.float32)
    keep = batch.rng.random(len(batch.inputs)) < 0.9
    return (batch.inputs + noise)[keep], batch.targets[keep]


class Counts(Callback):
    """A callback with a state: what it has heard of, over all lives."""

    def __init__(self) -> None:
        self.batches, self.samples, self.epochs = 0, 0, 0

    async def on_batch_end(self, event: BatchEnd) -> None:
        self.batches += event.count
        self.samples += event.batch_samples

    async def on_epoch_end(self, event: EpochEnd) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def made(folder: Path, how: How, life: With, *callbacks: Callback) -> Trainer:
    return Trainer(
        network(),
        nn.MSELoss(),
        optimizer=how.optimizer,
        lr=1e-2,
        scheduler=how.scheduler,
        seed=5,
        device="cpu",
        precision=how.precision,
        accumulate_grad_batches=how.accumulate,
        ema=how.ema,
        gradient_clip_norm=how.clip,
        validate_every=how.validate_every,
        log_every=how.log_every,
        nonfinite=how.nonfinite,
        run_dir=folder,
        callbacks=[
            ModelCheckpoint(every=f"{life.save_every}steps"),
            EarlyStopping("val_loss", patience=50),
            Counts(),
            *callbacks,
        ],
    )


def streams(store: Path, how: How, life: With) -> tuple[ZarrStream, ZarrStream]:
    given = {"memory": life.memory, "prefetch": life.prefetch, "threads": life.threads, "cache": life.cache}
    common: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    common |= {"inputs": "x", "targets": "y", "batch_size": BATCH}
    train = ZarrStream(
        store,
        split=(0.0, 0.8),
        shuffle=how.shuffle,
        shuffle_blocks=2 if how.shuffle == "block" else None,
        seed=3,
        transform=augmented if how.augment else None,
        **common,
    )
    return train, ZarrStream(store, split=(0.8, 1.0), **common)


async def fitted(store: Path, trainer: Trainer, how: How, life: With, **limits: Any) -> None:
    train, held_out = streams(store, how, life)
    async with train, held_out:
        await trainer.fit(train, validation=held_out, max_epochs=EPOCHS, resume="auto", **limits)


def kept(folder: Path) -> dict[str, Any]:
    """All of a finished run that must be equal: its last checkpoint, and the lines of its log."""
    newest = checkpoint.newest_valid(folder / "checkpoints")
    assert newest is not None
    snapshot = checkpoint.read(newest.path)
    state = {key: value for key, value in snapshot.state.items() if key not in ("callbacks", "config", "progress")}
    deciders = ("Counts", "EarlyStopping['val_loss']", "ModelCheckpoint")
    callbacks = {key: snapshot.state["callbacks"][key] for key in deciders}
    callbacks["ModelCheckpoint"] = {**callbacks["ModelCheckpoint"], "spare": None}  # by when its saves were through
    progress = {key: value for key, value in snapshot.state["progress"].items() if key != "time"}
    tree = {"model": snapshot.model, "optimizer": snapshot.optimizer, "state": state, "callbacks": callbacks}
    json_of, tensors = trees.encode({**tree, "progress": progress})
    return {"json": json_of, "tensors": tensors, "lines": lines(folder)}


def unequal(one: Any, other: Any, path: str) -> list[str]:
    """Where two trees differ, with what stands there."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in sorted(one.keys() | other.keys())
            for line in unequal(one.get(key), other.get(key), f"{path}.{key}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            line for at, (a, b) in enumerate(zip(one, other, strict=True)) for line in unequal(a, b, f"{path}[{at}]")
        ]
    return [] if one == other else [f"{path}: {one!r} is {other!r}"]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The paths of what is not equal."""
    found = [path for key in ("json", "lines") for path in unequal(one[key], other[key], key)]
    names = one["tensors"].keys() | other["tensors"].keys()
    return found + [
        name
        for name in sorted(names)
        if name not in one["tensors"]
        or name not in other["tensors"]
        or not torch.equal(one["tensors"][name], other["tensors"][name])
    ]


WAYS = ("max_steps", "stop", "raise", "cancel")


async def ended(store: Path, folder: Path, how: How, life: With, way: str, step: int) -> None:
    """A life that ends at about this step."""
    if way == "max_steps":
        return await fitted(store, made(folder, how, life), how, life, max_steps=step)
    task: asyncio.Task[None] | None = None
    trainer: Trainer | None = None

    def act() -> None:
        assert trainer is not None
        assert task is not None
        if way == "raise":
            raise ValueError("no")
        (trainer.stop if way == "stop" else task.cancel)()

    trainer = made(folder, how, life, AtStep(step, act))
    task = asyncio.create_task(fitted(store, trainer, how, life))
    await asyncio.wait([task])
    if way == "raise" and not task.cancelled() and task.exception() is not None:
        assert isinstance(task.exception(), UserCodeError)
    return None


def run(work: Callable[[], Any]) -> Any:
    return asyncio.run(work())


HOWS = st.builds(
    How,
    accumulate=st.sampled_from([1, 2, 3]),
    precision=st.sampled_from(["32", "bf16"]),
    ema=st.sampled_from([None, 0.9]),
    clip=st.sampled_from([None, 0.5]),
    scheduler=st.sampled_from([None, "exponential", "cosine", "plateau"]),
    optimizer=st.sampled_from(["adamw", "sgd", "adafactor"]),
    shuffle=st.sampled_from(["block", "global"]),
    augment=st.booleans(),
    validate_every=st.sampled_from(["1epoch", "4steps"]),
    log_every=st.sampled_from([1, 3]),
    nonfinite=st.sampled_from(["raise", "rollback"]),
)
LIVES = st.builds(
    With,
    memory=st.sampled_from(["16MiB", "64MiB"]),
    prefetch=st.sampled_from([None, 1, 4]),
    threads=st.sampled_from([None, 1, 3]),
    cache=st.sampled_from(["auto", 0]),
    save_every=st.sampled_from([2, 3, 5]),
)
ENDS = st.lists(st.tuples(st.sampled_from(WAYS), st.integers(1, 18), LIVES), min_size=1, max_size=2)


def fits(how: How, way: str) -> bool:
    """Whether an end leaves the run the same: an end by `max_steps` is told to a schedule, and ends the log."""
    return way != "max_steps" or (how.log_every == 1 and how.scheduler in (None, "exponential"))


@pytest.mark.timeout(600)
@settings(max_examples=6, deadline=None)
@given(how=HOWS, ends=ENDS, last=LIVES)
def test_a_run_that_was_ended_is_the_undisturbed_one(
    store: Path, how: How, ends: list[tuple[str, int, With]], last: With
) -> None:
    with tempfile.TemporaryDirectory() as room:
        whole, broken = Path(room, "whole"), Path(room, "broken")
        run(lambda: fitted(store, made(whole, how, With()), how, With()))
        for way, step, life in ends:
            way = way if fits(how, way) else "stop"
            run(functools.partial(ended, store, broken, how, life, way, step))
        run(lambda: fitted(store, made(broken, how, last), how, last))
        assert differences(kept(whole), kept(broken)) == []


@pytest.mark.parametrize("step", [9, 10])
def test_an_error_that_an_epochs_end_meets_leaves_the_epochs_end_to_the_next_life(
    store: Path, tmp_path: Path, step: int
) -> None:
    """For all who keep a state: they were told already when it came up."""
    how, life = How(), With(memory="16MiB", save_every=2)
    run(lambda: fitted(store, made(tmp_path / "whole", how, life), how, life))
    run(lambda: ended(store, tmp_path / "broken", how, life, "raise", step))
    run(lambda: fitted(store, made(tmp_path / "broken", how, life), how, life))
    assert differences(kept(tmp_path / "whole"), kept(tmp_path / "broken")) == []


RICH = How(
    accumulate=2,
    precision="bf16",
    ema=0.9,
    clip=0.5,
    scheduler="cosine",
    augment=True,
    validate_every="4steps",
    log_every=3,
)


@pytest.mark.parametrize("step", [1, 8])
def test_a_process_that_is_gone_at_once_costs_steps_but_no_bit(store: Path, tmp_path: Path, step: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(lambda: fitted(store, made(whole, RICH, With()), RICH, With()))
    command = [
        sys.executable,
        "-m",
        "tests.flows.test_exact",
        str(store),
        str(broken),
        str(step),
        json.dumps(asdict(RICH)),
    ]
    assert subprocess.run(command, check=False, timeout=200).returncode == 9
    other = With(memory="16MiB", prefetch=1, threads=1, cache=0, save_every=2)
    run(lambda: fitted(store, made(broken, RICH, other), RICH, other))
    assert differences(kept(whole), kept(broken)) == []


class Shuffled:
    """A source of the user's that shuffles by the number of its epoch, and knows its place."""

    def __init__(self) -> None:
        self.epoch = self.at = 0

    def __iter__(self) -> Iterator[Any]:
        inputs, targets = samples(64)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch))
        begin, self.at = self.at, 0
        for at in range(begin, 64, BATCH):
            rows, self.at = order[at : at + BATCH], at + BATCH
            yield inputs[rows], targets[rows]
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


@pytest.mark.parametrize("epoch", [0, 1])
async def test_a_source_with_a_state_goes_on_behind_an_epoch_whose_end_failed(tmp_path: Path, epoch: int) -> None:
    """The next life had the order of its first epoch again, in silence."""

    class Fails(Callback):
        decides = True

        async def on_epoch_end(self, event: EpochEnd) -> None:
            if event.epoch == epoch:
                raise ValueError("once")

    whole = Trainer(network(), nn.MSELoss(), seed=1, device="cpu")
    await whole.fit(Shuffled(), max_epochs=4)
    first = Trainer(network(), nn.MSELoss(), seed=1, device="cpu", run_dir=tmp_path, callbacks=[Fails()])
    with pytest.raises(UserCodeError, match="once"):
        await first.fit(Shuffled(), max_epochs=4)
    second = Trainer(network(), nn.MSELoss(), seed=1, device="cpu", run_dir=tmp_path)
    await second.fit(Shuffled(), max_epochs=4, resume="auto")
    assert same(second.model, whole.model)


def die(store: str, folder: str, step: str, how: str) -> None:
    """A life that is gone, without a word, once it hears of this step."""
    rich, life = How(**json.loads(how)), With(save_every=1)
    trainer = made(Path(folder), rich, life, AtStep(int(step), lambda: os._exit(9)))
    run(lambda: fitted(Path(store), trainer, rich, life))


if __name__ == "__main__":
    die(*sys.argv[1:])
