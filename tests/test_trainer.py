"""What fit promises: the bare loop's weights, a resume at the very next batch, nothing lost, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from streamtrain import checkpoint, signals
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.csv_logger import CSVLogger
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.control import Control, Save
from streamtrain.data.batch import Batch
from streamtrain.data.mix import mix
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentProblem,
    NonFiniteError,
    UserCodeError,
)
from streamtrain.events import BatchEnd, EpochEnd, Event, TrainEnd, ValidationEnd, Verdict
from streamtrain.flagged import Flags
from streamtrain.metrics import MeanAbsoluteError
from streamtrain.progress import FitResult
from streamtrain.schedulers import build_scheduler, get_lr
from streamtrain.step import TrainStep
from streamtrain.trainer import Trainer
from tests.engine import AtStep, Recorder, Samples, bare_loop, lines, network, pairs, same, samples

SEED = 5


def trainer(model: nn.Module | None = None, **options: Any) -> Trainer:
    return Trainer(model or network(), nn.MSELoss(), **{"seed": SEED, "device": "cpu", "log_every": 5, **options})


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("known", [True, False], ids=["known-length", "unknown-length"])
async def test_fit_makes_the_bare_loops_weights(accumulate: int, known: bool) -> None:
    stream = Samples(96, known=known)  # 12 batches: the last group of 5 has 2
    fitted = trainer(accumulate_grad_batches=accumulate)
    result = await fitted.fit(stream, validation=Samples(40), max_epochs=3)
    bare = bare_loop(network(), pairs(stream, 3), seed=SEED, accumulate=accumulate)
    if known or accumulate != 5:
        assert same(fitted.model, bare)
    else:  # the size of the last group is known only when it is over: gradients are multiplied by 5/2
        for (name, mine), theirs in zip(fitted.model.named_parameters(), bare.parameters(), strict=True):
            if name != "0.bias":  # before a BatchNorm its gradient is rounding, which Adam makes large
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert (result.reason, result.epoch, result.step, result.samples) == ("completed", 3, 3 * -(-12 // accumulate), 288)


async def test_clipping_and_schedule_are_the_bare_loops() -> None:
    stream = Samples()
    fitted = trainer(gradient_clip_norm=0.5, scheduler={"name": "linear", "warmup": 3})
    await fitted.fit(stream, max_epochs=2)
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = build_scheduler(inner, {"name": "linear", "warmup": 3}, total_steps=26)

    def rate(step: int) -> float:
        schedule.before_update(step, 0)
        return get_lr(inner)

    assert same(fitted.model, bare_loop(network(), pairs(stream, 2), seed=SEED, clip=0.5, lr=rate))


async def test_the_groups_of_the_optimizer_are_said_once_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "streamtrain")
    fitted = trainer(optimizer={"name": "adamw", "no_decay": True})
    assert "group 0" not in caplog.text
    for epochs in (1, 2):
        await fitted.fit(Samples(), max_epochs=epochs)
    assert caplog.text.count("group 1 (no decay): 4 parameters, 49 elements, lr 0.001, weight decay 0") == 1


async def test_a_model_whose_parameters_come_in_another_order_goes_on_the_same(tmp_path: Path) -> None:
    class Reordered(nn.Module):
        def __init__(self, *order: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = {"first": nn.Linear(4, 8), "last": nn.Linear(8, 1)}
            for name in order:
                self.add_module(name, layers[name])

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.get_submodule("last")(self.get_submodule("first")(inputs))

    whole = trainer(Reordered("first", "last"))
    await whole.fit(Samples(), max_epochs=2)
    await trainer(Reordered("first", "last"), run_dir=tmp_path).fit(Samples(), max_epochs=1)
    resumed = trainer(Reordered("last", "first"), run_dir=tmp_path)
    await resumed.fit(Samples(), max_epochs=2, resume="auto")
    assert same(resumed.model, whole.model)


async def test_a_torch_schedule_of_ones_own_optimizer_may_stand_in_a_table() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    fitted = trainer(model, optimizer=optimizer, scheduler={"name": schedule, "interval": "epoch"})
    await fitted.fit(Samples(), max_epochs=2)
    assert optimizer.param_groups[0]["lr"] == 0.025


async def test_a_loaded_checkpoint_of_another_schedule_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = trainer(scheduler="cosine"), trainer(scheduler="linear")
    await one.fit(Samples(), max_epochs=1)
    await other.load_checkpoint(await one.save_checkpoint(tmp_path / "one"))
    await other.fit(Samples(), max_epochs=2)
    assert "the schedule of the checkpoint is cosine, not linear: this one takes over from here" in caplog.text


async def test_a_run_that_is_resumed_with_another_schedule_is_told_how_to_go_on_with_it(tmp_path: Path) -> None:
    await trainer(run_dir=tmp_path, scheduler="cosine").fit(Samples(24), max_steps=3)
    other = trainer(run_dir=tmp_path, scheduler={"name": "exponential", "gamma": 0.5})
    with pytest.raises(CheckpointError, match=r"saved -> now\): scheduler: 'cosine' -> 'exponential'$") as caught:
        await other.fit(Samples(24), max_steps=6, resume="auto")
    assert "load_checkpoint(path), and fit without resume" in caught.value.hint
    await other.load_checkpoint("auto")
    assert (await other.fit(Samples(24), max_steps=6)).step == 6
    assert other.optimizer is not None
    assert get_lr(other.optimizer) == pytest.approx(1e-3 * 0.5**5)  # as of the run's sixth update


async def test_a_plateau_lowers_the_rate_and_watches_what_is_logged() -> None:
    known = {"name": "plateau", "patience": 0, "threshold": 10.0, "threshold_mode": "abs", "factor": 0.5}
    fitted = trainer(scheduler=known, optimizer="sgd")
    await fitted.fit(Samples(), validation=Samples(20), max_epochs=4)
    assert fitted.optimizer is not None
    assert fitted.optimizer.param_groups[0]["lr"] == 1e-3 * 0.25  # 2 epochs without a gain came before the last one
    with pytest.raises(ConfigError, match="the scheduler: nothing logs 'val_loss'"):
        await trainer(scheduler="plateau").fit(Samples())


async def test_rates_by_samples_and_by_time_follow_what_was_trained() -> None:
    fitted = trainer(optimizer="sgd", scheduler={"name": "linear", "interval": "samples"}, log_every=1)
    recorder = Recorder()
    fitted.callbacks.append(recorder)
    await fitted.fit(Samples(20), max_epochs=2)  # batches of 8, 8 and 4
    rates = [event.values["lr"] for event in recorder.events("on_log")]
    assert rates == pytest.approx([1e-3 * (1 - done / 40) for done in (0, 8, 16, 20, 28, 36)])
    timed = trainer(scheduler={"name": lambda progress: 0.5 + progress, "interval": "time"})
    await timed.fit(Samples(20), max_epochs=1, max_time=1e6)
    assert timed.optimizer is not None
    assert timed.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4, rel=1e-3)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "exponential", "gamma": 0.93, "warmup": 3},
        {"name": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9, "warmup": 3},
        {"name": "torch.optim.lr_scheduler.LinearLR", "total_iters": 20},
    ],
)
async def test_a_second_fit_goes_on_where_the_schedule_stood(spec: Any, tmp_path: Path) -> None:
    whole, parted, loaded = (trainer(scheduler=spec, optimizer="sgd", log_every=1) for _ in range(3))
    await whole.fit(Samples(), max_epochs=2)
    await parted.fit(Samples(), max_epochs=1)
    await loaded.load_checkpoint(await parted.save_checkpoint(tmp_path / "half"))
    await loaded.load_checkpoint(await loaded.save_checkpoint(tmp_path / "again"))
    for second in (parted, loaded):
        await second.fit(Samples(), max_epochs=2)
        assert second.optimizer is not None
        assert whole.optimizer is not None
        assert second.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


async def test_a_short_last_group_is_the_mean_over_its_samples() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    stream = Samples(20, batch_size=8)  # batches of 8, 8 and 4: groups of 2 batches, then one of 1; all 3 in one of 5
    inputs, targets = samples(20)
    fitted = trainer(model, accumulate_grad_batches=5, optimizer="sgd", lr=0.1)
    whole = nn.Linear(4, 1)
    whole.load_state_dict(model.state_dict())
    await fitted.fit(stream)
    nn.MSELoss()(whole(inputs), targets).backward()
    for mine, theirs in zip(fitted.model.parameters(), whole.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad)


async def test_a_shuffling_dataloader_gives_the_bare_loops_weights() -> None:
    loader = DataLoader(TensorDataset(*samples()), batch_size=8, shuffle=True)
    fitted = trainer()
    await fitted.fit(loader, max_epochs=2)
    model = network()
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), nn.MSELoss()
    torch.manual_seed(SEED)
    for _ in range(2):
        for inputs, targets in loader:
            loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(fitted.model, model)


@pytest.mark.parametrize("stop", [1, 4, 8, 13, 20, 26])
@pytest.mark.parametrize("accumulate", [1, 3])
async def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, stop: int, accumulate: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "metrics": {"mae": MeanAbsoluteError()}}
    options["scheduler"] = {"name": "cosine", "total": 40}
    whole = trainer(run_dir=tmp_path / "whole", **options)
    whole_result = await whole.fit(Samples(), validation=Samples(30, seed=9), max_epochs=3)
    stop = min(stop, whole.state.step - 1)
    first = trainer(run_dir=tmp_path / "cut", **options)
    cut = await first.fit(Samples(), validation=Samples(30, seed=9), max_epochs=3, max_steps=stop)
    assert cut.step == stop
    again = trainer(run_dir=tmp_path / "cut", **options)
    result = await again.fit(Samples(), validation=Samples(30, seed=9), max_epochs=3, resume="auto")
    assert (result.step, result.metrics) == (whole.state.step, whole_result.metrics)
    assert same(again.model, whole.model)
    told, undisturbed = lines(tmp_path / "cut"), lines(tmp_path / "whole")
    if stop % 5:  # a log ends with the last step of a run, which this one was for a while
        told = [row for row in told if (row["step"], row["split"]) != (stop, "train")]
    assert told == undisturbed


async def test_a_shuffling_dataloader_is_resumed_in_its_own_order(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(*samples()), batch_size=8, shuffle=True)
    whole = trainer()
    await whole.fit(loader, max_epochs=2)
    await trainer(run_dir=tmp_path).fit(loader, max_steps=18)
    again = trainer(run_dir=tmp_path)
    await again.fit(loader, max_epochs=2, resume="auto")
    assert same(again.model, whole.model)


class Augmented(Dataset[Any]):
    """Adds noise from the process's generator to each sample; `own`: from one that it keeps."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.inputs, self.targets = samples(40)
        self.generator = generator

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.inputs[number] + torch.randn(4, generator=self.generator), self.targets[number]


class Drawn:
    """Batches in an order of its own, of unknown length, with noise from the process's generator."""

    def __init__(self, generator: np.random.Generator | random.Random | None = None) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[Any]:
        inputs, targets = samples(40)
        for _ in range(5):
            rows = self.rows()
            yield inputs[rows] + 0.1 * torch.randn(len(rows), 4), targets[rows]

    def rows(self) -> list[int]:
        if isinstance(self.generator, random.Random):
            return self.generator.sample(range(40), 8)
        return [int(row) for row in (self.generator or np.random).permutation(40)[:8]]


class DrawnAside:
    """An asynchronous source with an order of its own."""

    def __init__(self, generator: random.Random | None = None) -> None:
        self.drawn = Drawn(generator)

    async def __aiter__(self) -> AsyncIterator[Any]:
        inputs, targets = samples(40)
        for _ in range(5):
            rows = self.drawn.rows()
            yield inputs[rows], targets[rows]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def loader(dataset: Any = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset or TensorDataset(*samples(40)), **{"batch_size": 8, "shuffle": True, **options})


@pytest.mark.parametrize("stop", [1, 4, 5, 8, 10, 12])
@pytest.mark.parametrize(
    "source",
    [
        lambda: loader(Augmented()),
        lambda: loader(Augmented(seeded())),
        lambda: loader(generator=seeded()),
        lambda: loader(shuffle=False, sampler=RandomSampler(range(40), True, generator=seeded())),
        Drawn,
        lambda: Drawn(np.random.default_rng(3)),
        lambda: DrawnAside(random.Random(3)),
    ],
    ids=["augmented", "own-noise", "own-order", "own-sampler", "drawn", "drawn-numpy", "aside"],
)
async def test_a_source_that_draws_random_numbers_is_resumed_exactly(
    tmp_path: Path, source: Callable[[], Any], stop: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole, rest = trainer(), trainer(run_dir=tmp_path)
    await whole.fit(source(), max_epochs=3)
    await trainer(run_dir=tmp_path, callbacks=[ModelCheckpoint(every="2steps")]).fit(source(), max_steps=stop)
    await rest.fit(source(), max_epochs=3, resume="auto")
    assert same(whole.model, rest.model)
    assert "not exact" not in caplog.text
    twice, given = trainer(), source()
    await twice.fit(given, max_steps=stop)
    await twice.fit(given, max_epochs=3)
    assert same(whole.model, twice.model)


class Noisy(Dataset[Any]):
    """Each sample with noise of one of the process's generators."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.samples, self.draw = samples(40), draw

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> Any:
        return self.samples[0][row] + self.draw(), self.samples[1][row]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("draw", [np.random.rand, random.random, lambda: float(torch.rand(()))])
async def test_a_stop_before_a_short_last_group_costs_none_of_its_random_numbers(
    tmp_path: Path, draw: Callable[[], float], stop: int
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3}  # of an epoch's 5 batches the last group has 2
    whole = trainer(**options)
    await whole.fit(loader(Noisy(draw)), max_epochs=3)
    parts = trainer(run_dir=tmp_path, **options)
    parts.callbacks.append(AtStep(stop, parts.stop))
    await parts.fit(loader(Noisy(draw)), max_epochs=3)
    rest = trainer(run_dir=tmp_path, **options)
    await rest.fit(loader(Noisy(draw)), max_epochs=3, resume="auto")
    assert same(whole.model, rest.model)


@pytest.mark.parametrize("fails", [1, 2, 4, 8, 11])
@pytest.mark.parametrize("draw", [np.random.rand, random.random])
async def test_where_an_error_keeps_numbers_that_numpy_or_python_gave_that_is_said(
    tmp_path: Path, draw: Callable[[], float], fails: int, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def step(model: nn.Module, batch: Batch) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails:
            raise RuntimeError("once")
        return nn.functional.mse_loss(model(batch.inputs), batch.targets)

    def fitted(run_dir: Path | None) -> Trainer:
        return Trainer(network(), step=step, seed=SEED, run_dir=run_dir)

    with pytest.raises(UserCodeError, match="once"):
        await fitted(tmp_path).fit(loader(Noisy(draw)), max_epochs=3)
    said = "stay drawn: a run that goes on from here is not exact" in caplog.text
    rest, whole = fitted(tmp_path), fitted(None)
    await rest.fit(loader(Noisy(draw)), max_epochs=3, resume="auto")
    await whole.fit(loader(Noisy(draw)), max_epochs=3)
    assert said != same(whole.model, rest.model)
    assert not (said and fails == 1)


@pytest.mark.parametrize("fails", [1, 3, 4, 7, 11])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("where", ["step", "source", "ahead", "step of what was pulled ahead"])
async def test_an_error_costs_none_of_the_numbers_that_its_batch_drew_from_torch(
    tmp_path: Path, where: str, accumulate: int, fails: int
) -> None:
    calls = rows = 0

    def step(model: nn.Module, batch: Batch) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if where.startswith("step") and torch.is_grad_enabled() and calls == fails:
            raise RuntimeError("once")
        return nn.functional.mse_loss(model(batch.inputs), batch.targets)

    class Breaks(Augmented):
        def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
            nonlocal rows
            rows += 1
            if not where.startswith("step") and rows == 8 * fails - 3:
                raise RuntimeError("once")
            return super().__getitem__(number)

    class Unknown:
        """Of a length that nobody knows: whether a batch follows is asked ahead."""

        def __init__(self, dataset: Any) -> None:
            self.loader = loader(dataset)

        def __iter__(self) -> Iterator[Any]:
            yield from self.loader

    def fitted(run_dir: Path | None) -> Trainer:
        options: dict[str, Any] = {"validate_every": "1steps", "accumulate_grad_batches": accumulate}
        return Trainer(network(), step=step, seed=SEED, run_dir=run_dir, **options)

    def source(dataset: Any) -> Any:
        return Unknown(dataset) if where.endswith("ahead") else loader(dataset)

    valid = Samples(8) if where.endswith("ahead") else None
    with pytest.raises(UserCodeError, match="once"):
        await fitted(tmp_path).fit(source(Breaks()), valid, max_epochs=3)
    rest, whole = fitted(tmp_path), fitted(None)
    await rest.fit(source(Augmented()), valid, max_epochs=3, resume="auto")
    await whole.fit(source(Augmented()), valid, max_epochs=3)
    assert same(whole.model, rest.model)


async def test_what_can_not_be_resumed_exactly_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await trainer(run_dir=tmp_path).fit(DrawnAside(), max_steps=7)
    assert "not exact" not in caplog.text
    await trainer(run_dir=tmp_path).fit(DrawnAside(), max_epochs=4, resume="auto")
    assert caplog.text.count("DrawnAside: if it draws random numbers, resuming is not exact") == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
async def test_the_default_dtype_of_the_host_makes_no_difference(dtype: torch.dtype) -> None:
    """With any but float32 the first step failed: torch's check for what is not finite takes no other."""
    whole, other, given = trainer(gradient_clip_norm=1.0), trainer(gradient_clip_norm=1.0), loader(shuffle=False)
    await whole.fit(given, max_epochs=2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        await other.fit(given, max_epochs=2)
        assert not Flags(torch.device("cpu"), lasting=True).raised([torch.ones(1)])
    finally:
        torch.set_default_dtype(before)
    assert same(whole.model, other.model)


async def test_a_mix_says_whose_random_numbers_it_does_not_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A shuffling DataLoader in a mix went on in another order, in silence."""

    def mixed(source: Any) -> Any:
        inputs, targets = samples(16)
        return mix([source, [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]], stop=6)

    for number, source in enumerate((list(loader()), loader(generator=seeded()))):
        await trainer(run_dir=tmp_path / str(number)).fit(mixed(source), max_steps=3)
        assert "not exact" not in caplog.text
        await trainer(run_dir=tmp_path / str(number)).fit(mixed(source), max_steps=6, resume="auto")
    assert caplog.text.count("DataLoader: if it draws random numbers, resuming is not exact: within a mix") == 1


@pytest.mark.parametrize("stop", [5, 7])
async def test_the_order_of_persistent_workers_is_resumed_and_said_to_be_all_that_is(
    tmp_path: Path, stop: int, caplog: pytest.LogCaptureFixture
) -> None:
    def working() -> DataLoader[Any]:
        return loader(num_workers=1, persistent_workers=True)

    whole, rest = trainer(), trainer(run_dir=tmp_path)
    await whole.fit(working(), max_epochs=3)
    await trainer(run_dir=tmp_path).fit(working(), max_steps=stop)
    await rest.fit(working(), max_epochs=3, resume="auto")
    assert same(whole.model, rest.model)
    assert caplog.text.count("persistent workers carry their random states on") == 1


async def test_the_last_line_of_the_log_is_kept_by_the_last_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    await trainer(run_dir=tmp_path, log_every=1000).fit(Samples(), max_steps=5)
    whole = replaced(log, b"")  # as if a kill had come right after the commit
    await trainer(run_dir=tmp_path, log_every=1000).fit(Samples(), max_steps=5, resume="auto")
    assert replaced(log, whole) == whole != b""


@pytest.mark.parametrize("every", ["3steps", "4steps"])
def test_the_last_checkpoint_is_the_same_whether_its_step_was_due_or_the_end_made_it(
    tmp_path: Path, every: str
) -> None:
    saves = ModelCheckpoint(every=every)
    fitted = trainer(run_dir=tmp_path, log_every=3, scheduler="linear", callbacks=[saves])
    result = asyncio.run(fitted.fit(Samples(), max_steps=4))
    newest = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.step == 4
    of_the_line = [line["lr"] for line in lines(tmp_path) if "lr" in line]
    assert len(of_the_line) == 2
    assert checkpoint.read(newest.path).state["metrics"]["lr"] == of_the_line[0]
    assert result.metrics["lr"] == of_the_line[1] != of_the_line[0]
    again = trainer(run_dir=tmp_path, log_every=3, scheduler="linear", callbacks=[ModelCheckpoint(every=every)])
    assert asyncio.run(again.fit(Samples(), max_steps=4, resume="auto")).metrics == result.metrics


def replaced(path: Path, content: bytes) -> bytes:
    """What the file held before it was given this content."""
    before = path.read_bytes()
    path.write_bytes(content)
    return before


async def test_a_second_fit_goes_on_in_the_order_that_a_shuffling_dataloader_drew() -> None:
    loader = DataLoader(TensorDataset(*samples()), batch_size=8, shuffle=True)
    whole, parts = trainer(), trainer()
    once = await whole.fit(loader, max_epochs=2)
    await parts.fit(loader, max_steps=18)
    twice = await parts.fit(loader, max_epochs=2)
    assert same(parts.model, whole.model)
    assert twice.metrics == once.metrics


async def test_a_second_fit_goes_on_in_the_middle_of_the_epoch() -> None:
    stream = Samples()
    fitted = trainer()
    await fitted.fit(stream, max_steps=20)
    assert (fitted.state.epoch, fitted.state.batch) == (1, 7)
    await fitted.fit(stream, max_epochs=3)
    assert same(fitted.model, bare_loop(network(), pairs(stream, 3), seed=SEED))


async def test_without_limits_each_fit_is_one_epoch() -> None:
    fitted = trainer()
    assert (await fitted.fit(Samples())).epoch == 1
    assert (await fitted.fit(Samples())).epoch == 2


async def test_fit_leaves_the_callers_random_numbers_threads_and_tasks_alone(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    threads = set(threading.enumerate())  # zarr's own, of other tests, among them
    await fitted.fit(Samples(), validation=Samples(20))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index]
    assert not set(threading.enumerate()) - threads
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_seed_of_none_is_a_copy_of_the_callers_state() -> None:
    torch.manual_seed(SEED)
    fitted = trainer(network(), seed=None)  # building the network seeds with 0
    torch.manual_seed(SEED)
    await fitted.fit(Samples())
    assert same(fitted.model, bare_loop(network(), pairs(Samples(), 1), seed=SEED))


async def test_two_fits_beside_each_other_disturb_neither() -> None:
    one, other = trainer(), trainer(seed=6)
    await asyncio.gather(one.fit(Samples(), max_epochs=2), other.fit(Samples(), max_epochs=2))
    assert same(one.model, bare_loop(network(), pairs(Samples(), 2), seed=SEED))
    assert same(other.model, bare_loop(network(), pairs(Samples(), 2), seed=6))


async def test_the_order_of_an_epoch(tmp_path: Path) -> None:
    recorder, told = Recorder(), []

    class Decider(Callback):
        decides = True

        async def on_validation_end(self, event: ValidationEnd) -> None:
            told.append(event.sanity)

    fitted = trainer(callbacks=[recorder, Decider()], run_dir=tmp_path)
    await fitted.fit(Samples(), validation=Samples(20), max_epochs=2)
    hooks = [hook for hook, _ in recorder.told if not hook.startswith("on_batch") and hook != "on_checkpoint"]
    epoch = ["on_epoch_begin", "on_log", "on_log", "on_validation_begin", "on_log", "on_validation_end", "on_epoch_end"]
    second = ["on_epoch_begin", "on_log", "on_log", "on_log", *epoch[3:]]
    begin = ["on_train_begin", "on_validation_begin", "on_validation_end"]
    assert hooks == [*begin, *epoch, *second, "on_log", "on_train_end"]
    assert told == [True, False, False]
    counts = [event.count for event in recorder.events("on_batch_end")]
    assert sum(counts) == 26


def test_callbacks_hear_of_an_epochs_end_before_the_learning_rate_and_verdicts_come_behind_it(
    tmp_path: Path,
) -> None:
    rates: list[float] = []

    class Halves(Callback):
        decides = True

        async def on_epoch_end(self, event: EpochEnd) -> Verdict:
            rates.append(await event.on_train_thread(lambda model, optimizer: optimizer.param_groups[0]["lr"]))
            return Verdict(lr_factor=0.5)

    scheduler = {"name": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.1, "interval": "epoch"}
    saves = ModelCheckpoint(every="1epoch", keep_last=-1)
    fitted = trainer(callbacks=[Halves(), saves], scheduler=scheduler, run_dir=tmp_path)
    asyncio.run(fitted.fit(Samples(), max_epochs=2))
    assert rates == pytest.approx([1e-3, 5e-5])
    factors = [checkpoint.read(tmp_path / "checkpoints" / f"step-{step:09d}").state["scheduler"] for step in (13, 26)]
    assert [state["factor"] for state in factors] == [0.5, 0.25]  # a save at an epoch's end is of after all of it


# --- cancellation and stops ---


async def within(timeout: asyncio.Timeout, fit: Coroutine[Any, Any, None]) -> None:
    """Await a fit inside a timeout."""
    async with timeout:
        await fit


async def begun(fitted: Trainer, step: int, **fit: Any) -> asyncio.Task[FitResult]:
    """A fit without end that has made so many steps."""
    reached = asyncio.Event()
    fitted.callbacks.append(AtStep(step, reached.set))
    task = asyncio.create_task(fitted.fit(**{"stream": Samples(), "max_epochs": 10**6, **fit}))
    await reached.wait()
    return task


@pytest.mark.parametrize("how", ["task.cancel", "anyio", "wait_for"])
async def test_a_cancelled_fit_saves_and_raises_again(tmp_path: Path, how: str) -> None:
    fitted, reached = trainer(run_dir=tmp_path), asyncio.Event()
    fitted.callbacks.append(AtStep(20, reached.set))

    async def fit() -> None:
        await fitted.fit(Samples(), max_epochs=10**6)

    if how == "task.cancel":
        task = asyncio.create_task(fit())
        await reached.wait()
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif how == "anyio":
        async with anyio.create_task_group() as group:
            group.start_soon(fit)
            await reached.wait()
            group.cancel_scope.cancel()
    else:
        timeout = asyncio.timeout(None)
        fitted.callbacks.append(AtStep(20, lambda: timeout.reschedule(0)))
        with pytest.raises(TimeoutError):
            await within(timeout, fit())
    assert steps(tmp_path)[-1] == fitted.state.step
    again = trainer(run_dir=tmp_path)
    result = await again.fit(Samples(), max_steps=fitted.state.step + 5, resume="auto")
    assert same(again.model, bare_loop(network(), cut(result.step), seed=SEED))


def cut(updates: int) -> list[Any]:
    """So many batches of the epochs of Samples."""
    epochs = pairs(Samples(), -(-updates // 13))
    epochs[-1] = epochs[-1][: updates - 13 * (len(epochs) - 1)]
    return epochs


async def test_a_cancelled_fit_whose_data_hangs_saves_at_once(tmp_path: Path) -> None:
    stream = Samples()
    stream.gates[40] = asyncio.Event()
    fitted = trainer(run_dir=tmp_path, accumulate_grad_batches=2)
    task = await begun(fitted, 2, stream=stream)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps(tmp_path) == [2]
    again = trainer(run_dir=tmp_path, accumulate_grad_batches=2)
    await again.fit(Samples(), resume="auto")
    assert same(again.model, bare_loop(network(), pairs(Samples(), 1), seed=SEED, accumulate=2))


class Hangs(Callback):
    """Does not return from one of its hooks; from none of its own thread before the gate opens."""

    decides = True

    def __init__(self, hook: str, *, blocking: bool) -> None:
        self.entered, self.gate = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def blocks(event: Event) -> None:
            loop.call_soon_threadsafe(self.entered.set)
            self.gate.wait()

        async def waits(event: Event) -> None:
            self.entered.set()
            await asyncio.Event().wait()

        setattr(self, hook, blocks if blocking else waits)


@pytest.mark.parametrize(("hook", "blocking"), [("on_batch_end", True), ("on_epoch_end", False)])
async def test_a_cancelled_fit_whose_callback_hangs_is_saved_within_the_grace(
    tmp_path: Path, hook: str, blocking: bool, caplog: pytest.LogCaptureFixture
) -> None:
    hangs, loop = Hangs(hook, blocking=blocking), asyncio.get_running_loop()
    fitted = trainer(run_dir=tmp_path, callbacks=[hangs], grace=3)
    task = asyncio.create_task(fitted.fit(Samples(), max_epochs=10**6))
    await hangs.entered.wait()
    began = loop.time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop.time() - began < 5  # twice the grace it was
    assert steps(tmp_path)[-1] == fitted.state.step > 0
    assert f"callback Hangs has not returned from {hook}" in caplog.text
    assert "has not ended" not in caplog.text
    assert {task for task in asyncio.all_tasks() if task.get_name().startswith("streamtrain")} == set()
    hangs.gate.set()


async def test_a_fit_that_is_cancelled_while_it_opens_its_data_ends_at_once(tmp_path: Path) -> None:
    class Hanging(Samples):
        async def open(self) -> None:
            opening.set()
            await asyncio.Event().wait()

    opening = asyncio.Event()
    task = asyncio.create_task(trainer(run_dir=tmp_path / "run", grace=1000.0).fit(Hanging()))
    await opening.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "run").exists()


async def test_a_stop_from_another_thread_ends_after_the_update(tmp_path: Path) -> None:
    recorder = Recorder()
    fitted = trainer(run_dir=tmp_path, callbacks=[recorder])
    fitted.callbacks.append(AtStep(7, lambda: threading.Thread(target=fitted.stop, args=("enough",)).start()))
    result = await fitted.fit(Samples(), max_epochs=10**6)
    assert (result.reason, result.detail) == ("stopped", "enough")
    assert steps(tmp_path)[-1] == result.step
    assert [event.detail for event in recorder.events("on_interrupt")] == ["enough"]


async def test_a_stop_before_the_fits_task_has_begun_ends_it_and_no_other(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path)
    for number in range(2):
        task = asyncio.create_task(fitted.fit(Samples(), max_epochs=10**6))
        fitted.stop(f"number {number}")
        result = await task
        assert (result.reason, result.detail, result.step) == ("stopped", f"number {number}", 0)
        fitted.stop("too late")
    assert (await fitted.fit(Samples())).reason == "completed"


async def test_a_stop_before_the_task_of_an_epoch_has_begun_ends_it() -> None:
    fitted = trainer()
    await fitted.train_epoch(Samples())
    task = asyncio.create_task(fitted.train_epoch(Samples()))
    fitted.stop()
    await task
    assert (fitted.state.epoch, fitted.state.step) == (1, 13)


async def test_a_stop_before_any_fit_was_called_for_is_the_first_ones() -> None:
    fitted = trainer()
    fitted.stop()
    assert (await fitted.fit(Samples(), validation=Samples(20))).reason == "stopped"
    assert (await fitted.fit(Samples())).step == 13


async def test_a_stop_goes_with_the_fit_that_was_refused() -> None:
    fitted = trainer()
    fitted.stop()
    with pytest.raises(ConfigError):
        await fitted.fit(Samples(), max_epochs=0)
    assert (await fitted.fit(Samples())).reason == "completed"


async def test_a_fit_paused_before_it_began_makes_no_update_until_it_is_resumed(tmp_path: Path) -> None:
    class Begins(Callback):
        async def on_train_begin(self, event: Event) -> None:
            began.set()

    began = asyncio.Event()
    fitted = trainer(run_dir=tmp_path / "run", callbacks=[Begins()])
    task = asyncio.create_task(fitted.fit(Samples()))
    fitted.pause()
    fitted.set_lr(0.5)
    await began.wait()
    await fitted.save_checkpoint(tmp_path / "paused")
    assert fitted.state.step == 0
    assert fitted.optimizer is not None
    assert fitted.optimizer.param_groups[0]["lr"] == 0.5
    fitted.resume()
    assert (await task).step == 13


async def test_max_time_ends_a_fit_even_while_data_hangs() -> None:
    stream = Samples()
    stream.gates[40] = asyncio.Event()
    result = await trainer().fit(stream, max_time=1.0)
    assert (result.reason, result.step) == ("max_time", 5)


async def test_max_time_counts_pauses_and_ends_a_paused_fit(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path)
    fitted.pause()
    result = await fitted.fit(Samples(), max_epochs=1000, max_time=0.2)
    assert (result.reason, result.step) == ("max_time", 0)
    fitted = trainer(run_dir=tmp_path, callbacks=[AtStep(1, lambda: fitted.pause())])
    result = await fitted.fit(Samples(), max_epochs=10**6, max_time=1.0, resume="auto")
    assert (result.reason, result.step > 0) == ("max_time", True)
    assert steps(tmp_path) == [result.step]


async def test_a_paused_fit_stands_still_saves_and_goes_on(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path / "run")
    task = await begun(fitted, 3, max_steps=200)
    fitted.pause()
    await fitted.save_checkpoint(tmp_path / "one")
    await fitted.save_checkpoint(tmp_path / "other")
    one, other = trainer(), trainer()
    await one.load_checkpoint(tmp_path / "one")
    await other.load_checkpoint(tmp_path / "other")
    assert one.state.step == other.state.step == fitted.state.step < 200
    fitted.resume()
    assert (await task).step == 200


async def test_a_requested_checkpoint_is_made_between_two_updates(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path / "run")
    task = await begun(fitted, 3)
    path = await fitted.save_checkpoint()
    assert path.parent == tmp_path / "run" / "checkpoints"
    fitted.stop()
    await task
    loaded = trainer()
    await loaded.load_checkpoint(path)
    assert loaded.state.step >= 3
    assert same(loaded.model, bare_loop(network(), cut(loaded.state.step), seed=SEED))


async def test_a_fit_without_a_folder_saves_to_a_path(tmp_path: Path) -> None:
    fitted = trainer()
    task = await begun(fitted, 3)
    path = await fitted.save_checkpoint(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="exists already"):
        await fitted.save_checkpoint(path)
    with pytest.raises(ConfigError, match="needs a run_dir or a path"):
        await fitted.save_checkpoint()
    fitted.stop()
    await task
    loaded = trainer()
    await loaded.load_checkpoint(path)
    assert same(loaded.model, bare_loop(network(), cut(loaded.state.step), seed=SEED))


class SavesIn(EarlyStopping):
    """Saves in each call of one hook, before it does what it does there."""

    def __init__(self, hook: str) -> None:
        super().__init__(patience=2)
        self.trainer: Trainer | None = None
        self.paths: list[Path] = []
        own = getattr(self, hook, None)

        async def saves(event: Event) -> Verdict | None:
            assert self.trainer is not None
            self.paths.append(await self.trainer.save_checkpoint())
            return None if own is None else await own(event)

        setattr(self, hook, saves)


@pytest.mark.parametrize("hook", ["on_train_begin", "on_validation_end", "on_epoch_end", "on_log", "on_train_end"])
async def test_a_hook_may_await_a_checkpoint(tmp_path: Path, hook: str) -> None:
    saves, keeps = SavesIn(hook), ModelCheckpoint(keep_last=-1)
    fitted = saves.trainer = trainer(lr=0.3, run_dir=tmp_path, callbacks=[EarlyStopping(patience=9), saves, keeps])
    whole = await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=4)
    assert saves.paths
    assert {path.name for path in saves.paths} <= {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert whole.reason in ("completed", "early_stopping")


@pytest.mark.parametrize("hook", ["on_validation_end", "on_epoch_end"])
async def test_a_life_that_goes_on_from_a_checkpoint_of_a_hook_decides_the_same(tmp_path: Path, hook: str) -> None:
    class Saves(Callback):
        decides = True

        async def saves(self, event: Event) -> None:
            if event.step == 26:
                self.path = await whole.save_checkpoint(tmp_path / "kept")

    def early() -> EarlyStopping:
        return EarlyStopping("val_loss" if hook == "on_validation_end" else "loss", patience=3, restore_best=False)

    saves = Saves()
    setattr(saves, hook, saves.saves)
    whole = trainer(lr=0.3, run_dir=tmp_path / "whole", callbacks=[early(), saves])
    result = await whole.fit(Samples(), validation=Samples(30, seed=3), max_epochs=20)
    again = trainer(lr=0.3, run_dir=tmp_path / "again", callbacks=[early()])
    resumed = await again.fit(Samples(), validation=Samples(30, seed=3), max_epochs=20, resume=saves.path)
    assert (resumed.reason, resumed.detail, resumed.step) == (result.reason, result.detail, result.step)
    assert same(again.model, whole.model)


async def test_a_hook_that_waits_for_a_checkpoint_of_a_fit_that_failed_is_told(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    class Saves(Callback):
        async def on_exception(self, event: Event) -> None:
            try:
                await fitted.save_checkpoint()
            except CheckpointError as error:
                errors.append(error)

    fitted = trainer(run_dir=tmp_path, callbacks=[Faulty(), Saves()])
    with pytest.raises(UserCodeError):
        await fitted.fit(Samples(), max_epochs=10**6)
    assert [str(error) for error in errors] == ["the fit ended before it was saved"]


async def test_all_who_wait_for_a_checkpoint_are_told_when_the_first_could_not_be_made(tmp_path: Path) -> None:
    class Unkept(Callback):
        def state_dict(self) -> dict[str, Any]:
            if fitted.state.step >= 3:
                raise ArithmeticError("no state")
            return {}

    asked: list[asyncio.Task[Path]] = []

    def ask() -> None:
        asked.extend(asyncio.create_task(fitted.save_checkpoint(tmp_path / name)) for name in ("one", "other"))

    fitted = trainer(run_dir=tmp_path / "run", callbacks=[Unkept(), AtStep(3, ask)])
    with pytest.raises(UserCodeError, match="callback Unkept: state_dict raised ArithmeticError"):
        await fitted.fit(Samples(), max_epochs=10**6)
    answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)
    assert all(isinstance(answer, UserCodeError | CheckpointError) for answer in answers)


def test_who_waits_for_a_checkpoint_that_no_fit_makes_is_told() -> None:
    told: list[object] = []

    async def ask() -> None:
        control = Control()
        control.bind()
        control.save(Save(None, lambda path, error: told.append((path, error))))
        control.unbind()
        control.save(Save(None, lambda path, error: told.append("late")))

    asyncio.run(ask())
    assert told == [(None, None), "late"]


async def test_set_lr_keeps_the_groups_proportions() -> None:
    fitted = trainer(optimizer={"name": "sgd", "rules": [("bias", {"lr": 0.002})]}, lr=0.001)
    fitted.callbacks.append(AtStep(1, lambda: fitted.set_lr(0.01)))
    await fitted.fit(Samples(), max_epochs=20)
    assert fitted.optimizer is not None
    assert [group["lr"] for group in fitted.optimizer.param_groups] == pytest.approx([0.01, 0.02])


def test_methods_that_other_trainers_call_and_this_one_does_not_are_said(caplog: pytest.LogCaptureFixture) -> None:
    class Ported(Trainer):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters())

        def compute_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs - targets).abs().mean()

        def on_train_epoch_end(self) -> None:
            raise AssertionError

    class Stepping(Ported):
        def training_step(self, model: nn.Module, batch: Batch) -> Tensor:
            return self.compute_loss(model(batch.inputs), batch.targets)

    Ported(network(), nn.MSELoss())
    told = [record.message.partition(":")[0] for record in caplog.records]
    assert told == ["Ported.compute_loss", "Ported.configure_optimizers", "Ported.on_train_epoch_end"]
    caplog.clear()
    Stepping(network(), optimizer="sgd")
    assert [record.message.partition(":")[0] for record in caplog.records] == ["Stepping.on_train_epoch_end"]


async def test_groups_have_their_proportions_again_after_a_rate_of_0_in_the_next_life_too(tmp_path: Path) -> None:
    for steps, rate in (4, 0.0), (8, 0.01):
        spec = {"name": "sgd", "rules": [("bias", {"lr": 0.002})]}
        fitted = trainer(optimizer=spec, lr=0.001, run_dir=tmp_path)
        fitted.set_lr(rate)
        await fitted.fit(Samples(), max_steps=steps, resume="auto")
        assert fitted.optimizer is not None
        assert [group["lr"] for group in fitted.optimizer.param_groups] == pytest.approx([rate, 2 * rate])


async def test_groups_that_learn_are_no_multiple_of_a_first_one_that_does_not_which_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fitted = trainer(optimizer={"name": "sgd", "rules": [("bias", {"lr": 0.002})]}, lr=0.0)
    fitted.set_lr(0.01)
    await fitted.fit(Samples(), max_steps=2)
    assert fitted.optimizer is not None
    assert [group["lr"] for group in fitted.optimizer.param_groups] == [0.0, 0.002]
    assert "set_lr(0.01) changes nothing" in caplog.text


async def test_two_numbers_of_a_validation_that_would_have_one_name_are_refused(tmp_path: Path) -> None:
    fitted = trainer(metrics={"b_loss": MeanAbsoluteError()}, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="would be logged as 'val_a_b_loss': of the streams 'a', 'a_b'"):
        await fitted.fit(Samples(), validation={"a": Samples(), "a_b": Samples()})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "scheduler", [None, lambda t: float(t < 2), lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, lambda t: t < 2)]
)
async def test_a_rate_of_nothing_is_no_base_for_another_which_is_said(
    scheduler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = trainer(optimizer="sgd", lr=0.0 if scheduler is None else 0.1, scheduler=scheduler)
    await fitted.fit(Samples(), max_steps=5)
    fitted.set_lr(0.01)
    await fitted.fit(Samples(), max_steps=13)
    assert fitted.optimizer is not None
    assert fitted.optimizer.param_groups[0]["lr"] == (0.01 if scheduler is None else 0.0)
    assert ("set_lr(0.01) changes nothing" in caplog.text) == (scheduler is not None)


# --- what is written ---


async def test_metrics_are_means_over_samples(tmp_path: Path) -> None:
    fitted = trainer(nn.Linear(4, 1), optimizer="sgd", lr=0.0, run_dir=tmp_path, metrics={"mae": MeanAbsoluteError()})
    await fitted.fit(Samples(20, batch_size=8), validation={"a": Samples(20), "b": Samples(30)})
    inputs, targets = samples(20)
    loss = nn.MSELoss()(fitted.model(inputs), targets).item()
    train, val = (
        [row for row in lines(tmp_path) if row["split"] == "train"],
        [row for row in lines(tmp_path) if row["split"] == "val"],
    )
    assert train[-1]["loss"] == pytest.approx(loss)
    assert val[-1]["val_a_loss"] == pytest.approx(loss)
    assert set(val[-1]) >= {"val_a_mae", "val_b_loss", "val_b_mae"}


async def test_user_metrics_join_the_next_line(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path)
    fitted.log_metrics({"teacher": 0.5})
    await fitted.fit(Samples())
    assert [row["teacher"] for row in lines(tmp_path) if "teacher" in row] == [0.5]


@pytest.mark.parametrize("value", ["b", "1.5", None, [1.0], torch.zeros(2), 1j])
async def test_a_logged_value_that_is_no_number_is_named_and_nothing_is_logged(tmp_path: Path, value: Any) -> None:
    fitted = trainer(run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"log_metrics: teacher must be one number, not ") as caught:
        fitted.log_metrics({"pupil": 1.0, "teacher": value})
    assert repr(value)[:60] in str(caught.value)
    numbers: dict[str, Any] = {"tensor": torch.ones(1, requires_grad=True), "numpy": np.float32(0.5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of a tensor with a graph
        fitted.log_metrics(numbers)
    await fitted.fit(Samples())
    first = lines(tmp_path)[0]
    assert (first["tensor"], first["numpy"], "pupil" in first) == (1.0, 0.5, False)


async def test_a_step_function_logs_what_it_returns(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Batch) -> dict[str, Any]:
        outputs = model(batch.inputs)
        loss = nn.functional.mse_loss(outputs, batch.targets)
        return {"loss": loss, "outputs": outputs, "double": 2 * loss}

    fitted = Trainer(
        network(), step=step, seed=SEED, run_dir=tmp_path, log_every=5, metrics={"mae": MeanAbsoluteError()}
    )
    await fitted.fit(Samples(), validation=Samples(20))
    assert same(fitted.model, bare_loop(network(), pairs(Samples(), 1), seed=SEED))
    for row in lines(tmp_path):
        prefix = "val_" if row["split"] == "val" else ""
        assert row[f"{prefix}double"] == pytest.approx(2 * row[f"{prefix}loss"])


async def test_what_a_step_returns_to_be_logged_and_is_no_number_is_named() -> None:
    def step(model: nn.Module, batch: Batch) -> dict[str, Any]:
        return {"loss": model(batch.inputs).mean(), "note": "text"}

    with pytest.raises(UserCodeError, match=r"the step's 'note' must be one number, not 'text'"):
        await Trainer(network(), step=step).fit(Samples(), max_steps=3)


async def test_overridden_steps_are_used() -> None:
    class Own(Trainer):
        def training_step(self, model: nn.Module, batch: Batch) -> Any:
            return nn.functional.mse_loss(model(batch.inputs), batch.targets)

        def validation_step(self, model: nn.Module, batch: Batch) -> Any:
            return {"seven": 7.0}

        def predict_step(self, model: nn.Module, batch: Batch) -> Any:
            return batch.index

    fitted = Own(network(), seed=SEED)
    result = await fitted.fit(Samples(), validation=Samples(20))
    assert same(fitted.model, bare_loop(network(), pairs(Samples(), 1), seed=SEED))
    assert result.metrics["val_seven"] == 7.0
    stream = Samples(20)
    assert torch.cat([part async for part in fitted.predict(stream)]).sort().values.tolist() == list(range(20))


async def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    result = await trainer(run_dir=tmp_path / "run", fast_dev_run=2, callbacks=[ModelCheckpoint()]).fit(
        Samples(), validation=Samples(30), max_epochs=9
    )
    assert (result.step, result.reason) == (2, "completed")
    assert "val_loss" in result.metrics
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
async def test_a_neighbour_without_gradients_stops_no_training(mode: Any) -> None:
    """A request's `with torch.no_grad(): ... await` is in force for the whole loop, and ended the fit at random."""

    async def serve() -> None:
        with mode():
            await asyncio.Event().wait()

    model = network()
    fitted = Trainer(
        model, nn.MSELoss(), seed=SEED, device="cpu", optimizer=torch.optim.SGD(model.parameters(), lr=0.05)
    )
    serving = asyncio.create_task(serve())
    await asyncio.sleep(0)
    try:
        assert not torch.is_grad_enabled()
        await fitted.fit(Samples(), validation=Samples(30), max_epochs=1)
    finally:
        serving.cancel()
        await asyncio.wait([serving])
    alone = network()
    again = Trainer(
        alone, nn.MSELoss(), seed=SEED, device="cpu", optimizer=torch.optim.SGD(alone.parameters(), lr=0.05)
    )
    await again.fit(Samples(), validation=Samples(30), max_epochs=1)
    assert same(model, alone)


async def test_fast_dev_run_validates_however_seldom_the_run_would() -> None:
    result = await trainer(fast_dev_run=2, validate_every="500steps").fit(Samples(), validation=Samples(30))
    assert (result.step, "val_loss" in result.metrics) == (2, True)


async def test_fast_dev_run_takes_one_batch_of_everything() -> None:
    fitted, recorder = trainer(fast_dev_run=True, accumulate_grad_batches=3), Recorder()
    fitted.callbacks.append(recorder)
    validation = {"a": Samples(30), "b": Samples(30)}
    result = await fitted.fit(Samples(), validation=validation, max_epochs=9)
    assert (result.epoch, result.step, result.samples) == (1, 1, 8)
    assert {"val_a_loss", "val_b_loss"} <= result.metrics.keys()
    assert len(recorder.events("on_validation_end")) == 1  # no sanity check before: all of it is one
    first = next(iter(Samples(30).batches(0)))
    means = await fitted.evaluate(Samples(30))
    with torch.no_grad():
        assert means["test_loss"] == float(nn.MSELoss()(fitted.model.eval()(first.inputs), first.targets))


async def test_limits_are_the_validations_too_and_shares_are_rounded_down_to_at_least_one() -> None:
    seen: list[int] = []

    class Counting(Trainer):
        def validation_step(self, model: nn.Module, batch: Batch) -> Any:
            seen.append(len(batch))
            return nn.functional.mse_loss(model(batch.inputs), batch.targets)

    for limit, batches in ((3, 3), (0.5, 2), (0.01, 1)):
        seen.clear()
        fitted = Counting(network(), nn.MSELoss(), seed=SEED, device="cpu", limit_batches=limit, sanity_batches=0)
        await fitted.fit(Samples(40), validation=Samples(40))  # 5 batches each
        assert (len(seen), fitted.state.step) == (batches, batches)


async def test_what_is_broken_in_validation_breaks_before_the_first_update() -> None:
    def step(model: nn.Module, batch: Batch) -> Any:
        loss = nn.functional.mse_loss(model(batch.inputs), batch.targets)
        if not torch.is_grad_enabled() and batch.cursor.position > 8:
            raise ValueError("broken")
        return loss

    for sanity, steps_made in ((2, 0), (1, 13), (0, 13)):
        fitted = Trainer(network(), step=step, seed=SEED, device="cpu", sanity_batches=sanity)
        with pytest.raises(UserCodeError, match=r"in evaluation: .*ValueError: broken"):
            await fitted.fit(Samples(), validation=Samples(24))
        assert fitted.state.step == steps_made


async def test_limits_of_batches() -> None:
    assert (await trainer(limit_batches=5).fit(Samples(), max_epochs=2)).step == 10
    assert (await trainer(limit_batches=0.5).fit(Samples(), max_epochs=2)).step == 12
    stream = Samples()
    fitted = trainer(overfit_batches=3)
    await fitted.fit(stream, max_epochs=2)
    assert same(fitted.model, bare_loop(network(), [pairs(stream, 1)[0][:3]] * 2, seed=SEED))


class Sifted(Samples):
    """Its filter has dropped all rows of the first batches."""

    def batches(self, epoch: int, position: int = 0) -> Iterator[Batch]:
        for batch in super().batches(epoch, position):
            index = batch.index[:0] if batch.cursor.position <= 24 else batch.index
            yield replace(batch, inputs=batch.inputs[: len(index)], targets=batch.targets[: len(index)], index=index)


@pytest.mark.parametrize("stop", [1, 3])
async def test_batches_without_rows_count_towards_a_limit_in_the_next_life_too(tmp_path: Path, stop: int) -> None:
    options: dict[str, Any] = {"limit_batches": 10, "accumulate_grad_batches": 4}
    undisturbed = trainer(**options)
    await undisturbed.fit(Sifted(84), max_epochs=2)
    assert (undisturbed.state.step, undisturbed.state.samples) == (4, 2 * 7 * 8)
    await trainer(run_dir=tmp_path / "a", **options).fit(Sifted(84), max_steps=stop)
    resumed = trainer(run_dir=tmp_path / "a", **options)
    await resumed.fit(Sifted(84), max_epochs=2, resume="auto")
    assert (resumed.state.step, resumed.state.samples) == (4, 2 * 7 * 8)
    assert same(resumed.model, undisturbed.model)


class Ending(Samples):
    """Its filter has dropped all rows of the last batch."""

    def batches(self, epoch: int, position: int = 0) -> Iterator[Batch]:
        for batch in super().batches(epoch, position):
            index = batch.index[:0] if batch.cursor.position == self.num_samples else batch.index
            yield replace(batch, inputs=batch.inputs[: len(index)], targets=batch.targets[: len(index)], index=index)


@pytest.mark.parametrize("known", [True, False])
async def test_a_step_is_validated_once_though_the_epoch_ends_behind_a_batch_without_rows(
    tmp_path: Path, known: bool
) -> None:
    heard = Recorder()
    fitted = trainer(run_dir=tmp_path / "a", callbacks=[heard], validate_every="3steps", sanity_batches=0)
    await fitted.fit(Ending(32, known=known), validation=Samples(16), max_epochs=2)
    assert [event.step for event in heard.events("on_validation_end")] == [3, 6]
    assert [line["step"] for line in lines(tmp_path / "a") if line["split"] == "val"] == [3, 6]


async def test_a_validation_that_failed_before_the_end_behind_a_batch_without_rows_is_made_by_the_next_life(
    tmp_path: Path,
) -> None:
    def step(model: nn.Module, batch: Batch) -> Any:
        if not torch.is_grad_enabled() and fails:
            raise ValueError("no")
        return nn.functional.mse_loss(model(batch.inputs), batch.targets)

    for fails in (True, False):
        heard = Recorder()
        options: dict[str, Any] = {"validate_every": "3steps", "sanity_batches": 0, "seed": SEED, "device": "cpu"}
        fitted = Trainer(network(), step=step, run_dir=tmp_path / "a", callbacks=[heard], **options)
        with contextlib.nullcontext() if not fails else pytest.raises(UserCodeError):
            await fitted.fit(Ending(32), validation=Samples(16), max_epochs=1, resume="auto")
        assert [event.step for event in heard.events("on_validation_end")] == ([] if fails else [3])


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("own", [False, True], ids=["processes-generator", "own-generator"])
async def test_overfit_batches_are_the_same_ones_of_a_loader_that_shuffles(
    tmp_path: Path, own: bool, stop: int
) -> None:
    seen: list[list[float]] = []

    def step(model: nn.Module, batch: Batch) -> Any:
        seen.append(batch.inputs[:, 0].tolist())
        return nn.functional.mse_loss(model(batch.inputs), batch.targets)

    def fitted() -> Trainer:
        return Trainer(network(), step=step, seed=SEED, device="cpu", overfit_batches=2, run_dir=tmp_path)

    def shuffling() -> DataLoader[Any]:
        return loader(generator=seeded() if own else None)

    await fitted().fit(shuffling(), max_steps=stop)
    await fitted().fit(shuffling(), max_epochs=3, resume="auto")
    assert seen == seen[:2] * 3
    assert seen[0] != seen[1]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
async def test_a_resumed_run_overfits_on_the_same_batches(tmp_path: Path, stop: int) -> None:
    await trainer(overfit_batches=2, run_dir=tmp_path).fit(Samples(), max_steps=stop)
    again = trainer(overfit_batches=2, run_dir=tmp_path)
    await again.fit(Samples(), max_epochs=3, resume="auto")
    assert same(again.model, bare_loop(network(), [pairs(Samples(), 1)[0][:2]] * 3, seed=SEED))


async def test_lazy_parameters_take_their_size_from_the_first_batch() -> None:
    def lazy() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    bare = lazy()
    torch.manual_seed(SEED)
    with torch.no_grad():
        bare.eval()(pairs(Samples(), 1)[0][0][0])
    bare.train()
    fitted = trainer(lazy())
    await fitted.fit(Samples(), max_epochs=2)
    assert same(fitted.model, bare_loop(bare, pairs(Samples(), 2), seed=SEED))


class Tape:
    """An iterator that knows its place."""

    def __init__(self) -> None:
        self.at, self.items = 0, pairs(Samples(), 1)[0]

    def __iter__(self) -> Tape:
        return self

    def __next__(self) -> Any:
        if self.at == len(self.items):
            raise StopIteration
        self.at += 1
        return self.items[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


async def written() -> AsyncIterator[Any]:
    for pair in pairs(Samples(), 1)[0]:
        yield pair


@pytest.mark.parametrize("source", [written, Tape, lambda: iter(pairs(Samples(), 1)[0])])
@pytest.mark.parametrize("stop", [1, 5])
async def test_lazy_parameters_lose_nothing_of_an_iterator_nor_its_next_life(
    tmp_path: Path, source: Callable[[], Any], stop: int
) -> None:
    def lazy() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1))

    whole = trainer(lazy())
    assert (await whole.fit(source())).step == 13
    await trainer(lazy(), run_dir=tmp_path).fit(source(), max_steps=stop)
    rest = trainer(lazy(), run_dir=tmp_path)
    assert (await rest.fit(source(), max_steps=99, max_epochs=1, resume="auto")).step == 13
    assert same(whole.model, rest.model)


async def test_an_iterator_that_a_fit_has_begun_is_refused_by_the_next() -> None:
    fitted, source = trainer(), iter(pairs(Samples(), 1)[0])
    await fitted.fit(source, max_steps=3)
    with pytest.raises(ConfigError, match="was begun by an earlier fit"):
        await fitted.fit(source)


async def test_bfloat16_trains() -> None:
    result = await trainer(precision="bf16").fit(Samples(), max_epochs=3)
    assert result.metrics["loss"] < 5


async def test_a_transform_on_the_device_is_made_of_each_batch_trained_validated_and_predicted() -> None:
    def tenfold(batch: Batch) -> Batch:
        return replace(batch, inputs=10 * batch.inputs)

    model, stream, valid = network(dropout=0.0), Samples(), Samples(40, seed=3)
    fitted = trainer(device_transform=tenfold, model=model)
    found = (await fitted.fit(stream, valid)).metrics["val_loss"]
    bare = bare_loop(network(dropout=0.0), [[(10 * x, y) for x, y in pairs(Samples(), 1)[0]]], seed=SEED)
    assert same(model, bare)
    with torch.no_grad():
        bare.eval()
        outputs = [bare(10 * batch.inputs) for batch in valid.batches(0)]
    losses = [
        nn.functional.mse_loss(made, batch.targets).item() * len(batch)
        for made, batch in zip(outputs, valid.batches(0), strict=True)
    ]
    assert found == pytest.approx(sum(losses) / 40, rel=1e-6)
    assert torch.equal(torch.cat([made async for made in fitted.predict(Samples(40, seed=3))]), torch.cat(outputs))


async def test_validation_computes_in_the_precision_of_the_training() -> None:
    fitted = trainer(precision="bf16")
    stream = Samples(40, seed=3)
    found = (await fitted.validate(stream))["val_loss"]
    model, total = fitted.model.eval(), {True: 0.0, False: 0.0}
    for batch in stream.batches(0):
        for half in total:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                total[half] += nn.functional.mse_loss(model(batch.inputs), batch.targets).item() * len(batch)
    assert found == pytest.approx(total[True] / 40, rel=1e-6) != pytest.approx(total[False] / 40, rel=1e-6)


def test_making_the_first_trainer_imports_nothing_where_a_loop_may_run() -> None:
    script = (
        "import sys; from torch import nn; from streamtrain import Trainer; before = set(sys.modules)\n"
        "Trainer(nn.Linear(1, 1), nn.MSELoss()); print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "[]\n"


# --- deciders ---


async def test_early_stopping_ends_the_fit_and_restores_the_best_weights(tmp_path: Path) -> None:
    fitted = trainer(lr=0.3, run_dir=tmp_path, callbacks=[EarlyStopping(patience=2)])
    result = await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=100)
    assert result.reason == "early_stopping"
    assert result.best is not None
    assert result.best.checkpoint is not None
    assert result.best.epoch == result.epoch - 3
    means = await fitted.validate(Samples(30, seed=3))
    assert means["val_loss"] == pytest.approx(result.best.value, rel=1e-6)
    again = await trainer(lr=0.3, run_dir=tmp_path, callbacks=[EarlyStopping(patience=2)]).fit(
        Samples(), validation=Samples(30, seed=3), max_epochs=100, resume="auto"
    )
    assert (again.reason, again.step) == ("early_stopping", result.step)


async def test_a_run_that_was_given_up_goes_on_with_more_patience_as_if_it_had_not_been(tmp_path: Path) -> None:
    async def fit(folder: str, patience: int, resume: str | None = None) -> FitResult:
        fitted = trainer(lr=0.3, run_dir=tmp_path / folder, callbacks=[EarlyStopping(patience=patience)])
        return await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=30, resume=resume)

    whole, first = await fit("whole", 4), await fit("cut", 2)
    again = await fit("cut", 4, "auto")
    assert first.epoch < whole.epoch
    assert (again.reason, again.detail, again.step) == (whole.reason, whole.detail, whole.step)
    assert again.metrics == whole.metrics


async def test_a_condition_of_ones_own_ends_the_fit_and_stays_met(tmp_path: Path) -> None:
    def early() -> EarlyStopping:
        return EarlyStopping(condition=lambda metrics: metrics["val_loss"] < 0.6, patience=30, restore_best=False)

    fitted, again = (trainer(lr=0.3, run_dir=tmp_path, callbacks=[early()]) for _ in range(2))
    result = await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=30)
    assert (result.reason, result.detail) == ("early_stopping", "the condition is met")
    later = await again.fit(Samples(), validation=Samples(30, seed=3), max_epochs=30, resume="auto")
    assert (later.reason, later.step) == ("early_stopping", result.step)


async def test_the_rate_is_lowered_before_the_fit_is_given_up(tmp_path: Path) -> None:
    early = EarlyStopping(patience=4, reduce_lr=0.1)
    result = await trainer(lr=0.3, run_dir=tmp_path, callbacks=[early], log_every=1).fit(
        Samples(), validation=Samples(30, seed=3), max_epochs=60
    )
    assert result.reason == "early_stopping"
    rates = [row["lr"] for row in lines(tmp_path) if "lr" in row]
    assert rates[0] == 0.3
    assert rates[-1] == pytest.approx(0.3 * 0.1 ** (len(set(rates)) - 1))
    assert len(set(rates)) > 1


async def test_the_best_to_be_restored_stays_though_no_best_are_kept(tmp_path: Path) -> None:
    rules = [EarlyStopping(patience=4), ModelCheckpoint(every="1epoch", save_top_k=0, keep_last=1)]
    fitted = trainer(lr=0.3, run_dir=tmp_path, callbacks=rules)
    result = await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=60)
    assert result.best is not None
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {result.best.step, result.step}
    means = await fitted.validate(Samples(30, seed=3))
    assert means["val_loss"] == pytest.approx(result.best.value, rel=1e-6)


async def test_several_best_are_kept_and_the_very_best_is_restored(tmp_path: Path) -> None:
    rules = [EarlyStopping(patience=4), ModelCheckpoint(every="1h", save_top_k=3, keep_last=1)]
    fitted = trainer(lr=0.3, run_dir=tmp_path, callbacks=rules)
    result = await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=60)
    values = {row["step"]: row["val_loss"] for row in lines(tmp_path) if row["split"] == "val"}
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {*sorted(values, key=lambda step: values[step])[:3], result.step}
    means = await fitted.validate(Samples(30, seed=3))
    assert means["val_loss"] == pytest.approx(min(values.values()), rel=1e-6)


@pytest.mark.parametrize(
    ("rule", "monitor", "told"),
    [
        (None, "val_mae", 1),
        (None, "val_loss", 0),
        (ModelCheckpoint(monitor="val_mae"), "val_mae", 0),
        (ModelCheckpoint(monitor="loss"), "val_loss", 1),
        (ModelCheckpoint(save_top_k=0), "val_mae", 0),
    ],
)
async def test_that_two_callbacks_mean_two_things_by_the_best_is_said_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rule: ModelCheckpoint | None, monitor: str, told: int
) -> None:
    early = [EarlyStopping(monitor), EarlyStopping("loss", restore_best=False)]
    callbacks = [*early, *([] if rule is None else [rule])]
    fitted = trainer(run_dir=tmp_path, callbacks=callbacks, metrics={"mae": MeanAbsoluteError()})
    result = await fitted.fit(Samples(24), validation=Samples(24), max_epochs=1)
    assert result.best is not None
    by = f"resume='best', are by {result.best.monitor}, which ModelCheckpoint monitors, while EarlyStopping puts"
    assert caplog.text.count(by) == caplog.text.count("resume='best', are by") == told
    assert (result.best.monitor != monitor) == told


async def test_early_stopping_restores_without_a_folder() -> None:
    fitted = trainer(lr=0.3, callbacks=[EarlyStopping(patience=2)])
    result = await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=100)
    assert result.best is not None
    means = await fitted.validate(Samples(30, seed=3))
    assert means["val_loss"] == pytest.approx(result.best.value, rel=1e-6)


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "memory"])
@pytest.mark.parametrize("stop", [21, 23])
async def test_the_best_weights_are_restored_though_an_earlier_life_found_them(
    tmp_path: Path, stop: int, folder: bool
) -> None:
    """In the last life, which may make no step, there is no validation."""

    def early(run_dir: Path) -> Trainer:
        early_stopping, where = EarlyStopping(patience=50), run_dir if folder else None
        return trainer(lr=0.3, validate_every="5steps", callbacks=[early_stopping], run_dir=where)

    whole, first = early(tmp_path / "whole"), early(tmp_path / "cut")
    result = await whole.fit(Samples(), validation=Samples(30, seed=3), max_steps=23)
    assert result.best is not None
    assert result.best.step <= 20
    await first.fit(Samples(), validation=Samples(30, seed=3), max_steps=stop)
    last = early(tmp_path / "cut") if folder else first
    resume = "auto" if folder else None
    again = await last.fit(Samples(), validation=Samples(30, seed=3), max_steps=23, resume=resume)
    assert (again.step, again.best and again.best.step) == (23, result.best.step)
    assert same(whole.model, last.model)


async def test_the_best_weights_of_another_folders_run_are_restored(tmp_path: Path) -> None:
    def early(name: str, **options: Any) -> Trainer:
        return trainer(lr=0.3, validate_every="5steps", run_dir=tmp_path / name, **options)

    first = early("one", callbacks=[EarlyStopping(patience=50)])
    result = await first.fit(Samples(), validation=Samples(30, seed=3), max_steps=23)
    last, kept = early("other", callbacks=[EarlyStopping(patience=50)]), early("third")
    await last.fit(Samples(), validation=Samples(30, seed=3), max_steps=24, resume=result.checkpoint)
    assert same(first.model, last.model)
    await kept.fit(Samples(), validation=Samples(30, seed=3), max_steps=24, resume=result.checkpoint)
    assert not same(first.model, kept.model)  # nobody wants them any more


async def test_resume_best_goes_back_and_sets_the_future_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rule = {"every": "1epoch", "keep_last": -1, "save_top_k": 1}
    fitted = trainer(lr=0.3, run_dir=tmp_path, callbacks=[ModelCheckpoint(**rule)])  # type: ignore[arg-type]
    result = await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=8)
    assert result.best is not None
    again = trainer(lr=0.3, run_dir=tmp_path, callbacks=[ModelCheckpoint(**rule)])  # type: ignore[arg-type]
    recorder = Recorder()
    again.callbacks.append(recorder)
    await again.fit(Samples(), validation=Samples(30, seed=3), max_epochs=8, resume="best")
    assert recorder.events("on_train_begin")[0].step == result.best.step
    assert same(again.model, fitted.model)
    assert result.best.step == result.step or "set aside" in caplog.text


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a run, but for what tells of its last error."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name not in ("error.json", ".lock", "status.json")}


class Own(Trainer):
    """Its validations log what it likes."""

    def validation_step(self, model: nn.Module, batch: Batch) -> Any:
        outputs = model(batch.inputs)
        return {"loss": nn.MSELoss()(outputs, batch.targets), "seven": 7.0}


@pytest.mark.parametrize("resume", ["path", "best"])
@pytest.mark.parametrize("wrong", ["model", "optimizer", "data", "monitor", "own monitor"])
async def test_a_life_that_is_refused_changes_nothing_on_the_disk(tmp_path: Path, wrong: str, resume: str) -> None:
    def life(**options: Any) -> Trainer:
        rule = ModelCheckpoint(every="5steps", keep_last=-1)
        common = {"seed": SEED, "device": "cpu", "log_every": 1, "run_dir": tmp_path, "validate_every": "5steps"}
        model = nn.Linear(4, 1) if wrong == "model" and options.pop("change") else network()
        options.pop("change", None)
        return Own(model, nn.MSELoss(), **{**common, "callbacks": [rule], **options})

    changes: dict[str, dict[str, Any]] = {
        "optimizer": {"optimizer": "sgd"},
        "monitor": {"callbacks": [EarlyStopping("los"), ModelCheckpoint(every="5steps", keep_last=-1)]},
        "own monitor": {"callbacks": [EarlyStopping("val_eight"), ModelCheckpoint(every="5steps", keep_last=-1)]},
    }
    first = life(change=False) if wrong == "model" else life()
    await first.fit(Samples(), validation=Samples(30, seed=3), max_steps=10)
    before, path = everything(tmp_path), tmp_path / "checkpoints" / "step-000000005"
    refused = life(**{"change": True, **changes.get(wrong, {})})
    data = Samples(seed=1) if wrong == "data" else Samples()
    with pytest.raises((CheckpointError, ConfigError, DataError)):
        await refused.fit(
            data, validation=Samples(30, seed=3), max_steps=20, resume=path if resume == "path" else resume
        )
    assert everything(tmp_path) == before
    last = life(change=False) if wrong == "model" else life()
    result = await last.fit(Samples(), validation=Samples(30, seed=3), max_steps=11, resume="auto")
    assert result.step == 11


# --- what is refused ---


async def test_a_fit_goes_on_from_the_beginning_where_its_checkpoint_was_loaded(tmp_path: Path) -> None:
    fitted, stream = trainer(run_dir=tmp_path), Samples()
    first = await fitted.save_checkpoint()
    await fitted.fit(stream)
    assert steps(tmp_path) == [0, 13]
    await fitted.load_checkpoint(first)
    result = await fitted.fit(stream, max_steps=20)
    assert result.step == 20
    assert same(fitted.model, bare_loop(network(), cut(20), seed=SEED))
    assert (tmp_path / "checkpoints" / "abandoned-step-000000013").is_dir()


async def test_a_fit_from_an_older_checkpoint_that_was_loaded_sets_the_future_aside(tmp_path: Path) -> None:
    every = ModelCheckpoint(every="1epoch", keep_last=-1)
    await trainer(run_dir=tmp_path, callbacks=[every]).fit(Samples(80), max_epochs=1)
    await trainer(run_dir=tmp_path, callbacks=[every]).fit(Samples(80), max_epochs=2, resume="auto")
    fitted = trainer(run_dir=tmp_path)
    await fitted.load_checkpoint(tmp_path / "checkpoints" / "step-000000010")
    await fitted.fit(Samples(80), max_steps=13)
    assert steps(tmp_path) == [10, 13]
    assert (tmp_path / "checkpoints" / "abandoned-step-000000020").is_dir()
    assert (await trainer(run_dir=tmp_path).fit(Samples(80), max_steps=15, resume="auto")).step == 15


async def test_paths_that_are_none_are_named(tmp_path: Path) -> None:
    fitted: Any = trainer(run_dir=tmp_path)
    for call in (fitted.save_checkpoint, fitted.load_checkpoint):
        with pytest.raises(ConfigError, match=r"_checkpoint: path must be .* not 3"):
            await call(3)
    with pytest.raises(ConfigError, match="predict: out must be a path, not 3"):
        fitted.predict(Samples(), out=3)


async def test_a_folder_that_no_disk_can_have_is_named(tmp_path: Path) -> None:
    for resume in (None, "auto"):
        with pytest.raises(EnvironmentProblem, match=r"the run folder .*xxx can't be .*: File name too long"):
            await trainer(run_dir=tmp_path / ("x" * 300)).fit(Samples(), resume=resume)


async def test_a_folder_with_checkpoints_wants_to_know_what_to_do(tmp_path: Path) -> None:
    await trainer(run_dir=tmp_path).fit(Samples())
    with pytest.raises(ConfigError, match="resume was not given") as caught:
        await trainer(run_dir=tmp_path).fit(Samples())
    assert "resume='auto'" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(hook=1), "its state is not one of this streamtrain: 'hook' is unknown"),
        (lambda state: state.pop("rng"), "its state is not one of this streamtrain: 'rng' is missing"),
        (lambda state: state["progress"].update(lap=1), "its state.progress is not one .*: 'lap' is unknown"),
    ],
)
async def test_a_state_with_a_key_too_many_or_too_few_is_refused(
    tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    result = await trainer(run_dir=tmp_path).fit(Samples())
    assert result.checkpoint is not None
    path = result.checkpoint

    def edit() -> None:
        snapshot = checkpoint.read(path)
        change(snapshot.state)
        checkpoint.commit(path, snapshot, replace=True)

    await asyncio.to_thread(edit)
    with pytest.raises(CheckpointError, match=message):
        await trainer(run_dir=tmp_path).fit(Samples(), max_epochs=2, resume="auto")


async def test_another_model_or_optimizer_is_refused_with_a_table(tmp_path: Path) -> None:
    await trainer(run_dir=tmp_path).fit(Samples())
    other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"0\.weight: float32\[16, 4\] -> float32\[8, 4\]"):
        await trainer(other, run_dir=tmp_path).fit(Samples(), resume="auto")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    for options, told in (
        ({"optimizer": "sgd"}, "optimizer.class: 'AdamW' -> 'SGD'"),
        ({"optimizer": {"name": "adamw", "weight_decay": 0.5}}, r"optimizer.groups\[0\].weight_decay: 0.01 -> 0.5"),
        ({"seed": 6}, "seed: 5 -> 6"),
        ({"precision": "bf16"}, "precision: '32' -> 'bf16'"),
        ({"scheduler": "cosine"}, "scheduler: "),
    ):
        with pytest.raises(CheckpointError, match=told):
            await trainer(run_dir=tmp_path, **options).fit(Samples(), max_epochs=9, resume="auto")
    with pytest.raises(CheckpointError, match=r"step-\d+ does not fit: seed: 0 then, 1 now"):
        await trainer(run_dir=tmp_path).fit(Samples(seed=1), resume="auto")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "64"}, "precision"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches"),
        ({"log_every": 1.5}, "log_every"),
        ({"lr": float("nan")}, "lr"),
        ({"validate_every": "10min"}, "validate_every"),
        ({"nonfinite": "ignore"}, "nonfinite"),
        ({"limit_batches": 1.5}, "limit_batches"),
        ({"strategy": "ddp"}, "later"),
        ({"optimizer": "adan"}, "optimizer"),
        ({"precision": "16"}, "CUDA"),
        ({"metrics": {"loss": MeanAbsoluteError()}}, "named 'loss'"),
        ({"callbacks": [EarlyStopping]}, "no callback"),
        ({"callbacks": [print]}, "no callback"),
        ({"callbacks": EarlyStopping()}, "callbacks must be a list"),
        ({"callbacks": None}, "callbacks must be a list"),
        ({"seed": 1 << 63}, "below 2\\^63"),
        ({"run_dir": 3}, "run_dir must be a path"),
        ({"run_dir": ""}, "run_dir must be a path"),
        ({"run_dir": "a\0b"}, "run_dir must be a path"),
        ({"run_dir": "~/runs"}, "only a shell puts there"),
        ({"fast_dev_run": "x"}, "fast_dev_run must be"),
        ({"fast_dev_run": 0}, "fast_dev_run must be"),
        ({"deterministic": "x"}, "deterministic must be true or false"),
        ({"step": 3}, "step must be a function"),
        ({"device_transform": 3}, "device_transform must be a function"),
        ({"metrics": {3: "mae"}}, "metrics are named by texts"),
        ({"optimizer": {"lr": 1e-3}}, "optimizer has no name"),
    ],
)
def test_values_that_cannot_work_are_refused_when_given(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        trainer(**options)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"max_epochs": 0}, "max_epochs"),
        ({"max_steps": -1}, "max_steps"),
        ({"max_epochs": 1.5}, "max_epochs"),
        ({"max_time": "soon"}, "max_time"),
        ({"max_epochs": True}, "max_epochs"),
        ({"resume": True}, "resume must be 'auto', 'best' or a path, not True"),
        ({"resume": ""}, "resume must be"),
        ({"resume": "auto"}, "needs a run_dir"),
    ],
)
async def test_limits_that_cannot_work_are_refused(limits: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        await trainer().fit(Samples(), **limits)


async def test_more_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="serves one epoch"):
        await trainer(run_dir=run).fit(iter([samples(8)]), max_epochs=2)
    with pytest.raises(ConfigError, match="no validation stream"):
        await trainer(run_dir=run, callbacks=[EarlyStopping()]).fit(Samples())
    with pytest.raises(ConfigError, match="how long the run is"):
        await trainer(run_dir=run, scheduler="cosine").fit(Samples(known=False))
    with pytest.raises(ConfigError, match="share of a stream"):
        await trainer(run_dir=run, limit_batches=0.5).fit(Samples(), validation=Samples(known=False))
    with pytest.raises(ConfigError, match="there is no loss"):
        await Trainer(network(), run_dir=run).fit(Samples())
    with pytest.raises(ConfigError, match="ModelCheckpoint needs a run_dir"):
        await trainer(callbacks=[ModelCheckpoint()]).fit(Samples())
    with pytest.raises(ConfigError, match="several ModelCheckpoints"):
        await trainer(run_dir=run, callbacks=[ModelCheckpoint(), ModelCheckpoint(every="1epoch")]).fit(Samples())
    with pytest.raises(ConfigError, match="CSVLogger needs a run_dir"):
        await trainer(callbacks=[CSVLogger()]).fit(Samples())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2"):
        await trainer(run_dir=run).fit(Samples())
    assert not run.exists()


async def test_rules_that_disagree_on_what_is_better_are_refused(tmp_path: Path) -> None:
    stops, saves = EarlyStopping("val_score", mode="max"), ModelCheckpoint(monitor="val_score")
    fitted = trainer(run_dir=tmp_path / "a", metrics={"score": "r2"}, callbacks=[stops, saves])
    with pytest.raises(ConfigError, match="val_score: EarlyStopping has mode 'max', and ModelCheckpoint 'min'") as told:
        await fitted.fit(Samples(), validation=Samples(20))
    assert "mode='max'" in told.value.hint
    agree = [stops, ModelCheckpoint(monitor="val_score", mode="max")]
    fitted = trainer(run_dir=tmp_path / "b", metrics={"score": "r2"}, callbacks=agree)
    result = await fitted.fit(Samples(), validation=Samples(20))
    assert result.best is not None
    assert result.best.monitor == "val_score"


def test_methods_that_look_like_hooks_and_are_none_are_said(caplog: pytest.LogCaptureFixture) -> None:
    class Foreign:
        on_device = "cpu"

        def on_epoch_end(self, event: Any) -> None: ...
        def on_train_batch_end(self, *given: Any) -> None: ...
        def on_something(self) -> None: ...

    trainer(callbacks=[Foreign()])
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "callback Foreign: nothing calls its on_something",
        "callback Foreign: nothing calls its on_train_batch_end; did you mean on_batch_end?",
    ]


PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"callbacks": [EarlyStopping("val_mea")]}, "EarlyStopping: nothing logs 'val_mea'; logged: loss, val_loss, v"),
        ({"callbacks": [EarlyStopping("mae")]}, "EarlyStopping: nothing logs 'mae'"),
        ({"callbacks": [ModelCheckpoint(monitor="val_mea")]}, "ModelCheckpoint: nothing logs 'val_mea'"),
        ({"scheduler": {"name": PLATEAU, "monitor": "val_mea"}}, "the scheduler: nothing logs 'val_mea'"),
    ],
)
async def test_a_monitor_that_nothing_will_log_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    fitted = trainer(run_dir=tmp_path / "run", metrics={"mae": MeanAbsoluteError()}, **options)
    with pytest.raises(ConfigError, match=told) as caught:
        await fitted.fit(Samples(), validation=Samples(20))
    assert "val_mae" in str(caught.value) + caught.value.hint
    assert not (tmp_path / "run").exists()


async def test_a_monitor_that_no_validation_will_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ModelCheckpoint monitors 'val_loss', but fit has no validation stream"):
        await trainer(run_dir=tmp_path / "run", callbacks=[ModelCheckpoint(monitor="val_loss")]).fit(Samples())
    with pytest.raises(ConfigError, match="the scheduler: nothing logs 'val_loss'; logged: nothing"):
        await trainer(run_dir=tmp_path / "run", scheduler={"name": PLATEAU}).fit(Samples())
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="nothing logs 'val_loss'; logged: val_a_loss, val_b_loss"):
        await trainer(scheduler=PLATEAU).fit(Samples(), validation={"a": Samples(20), "b": Samples(20)})


@pytest.mark.parametrize(("every", "seen"), [("1epoch", 6), ("2epochs", 3), ("26steps", 3), ("5steps", 6)])
async def test_a_plateau_sees_each_validation_that_an_epoch_had_and_none_twice(every: str, seen: int) -> None:
    made: list[torch.optim.lr_scheduler.ReduceLROnPlateau] = []

    def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        made.append(PLATEAU(optimizer))
        return made[-1]

    fitted = trainer(scheduler=plateau, validate_every=every)
    await fitted.fit(Samples(), validation=Samples(20), max_epochs=6)
    assert made[-1].last_epoch == seen


async def test_a_monitor_that_may_be_logged_by_the_users_own_functions_is_not_refused() -> None:
    def step(model: nn.Module, batch: Batch) -> dict[str, Any]:
        loss = nn.functional.mse_loss(model(batch.inputs), batch.targets)
        return {"loss": loss, "double": 2 * loss}

    for monitor in ("double", "val_double"):
        fitted = Trainer(network(), step=step, device="cpu", callbacks=[EarlyStopping(monitor)])
        assert (await fitted.fit(Samples(), validation=Samples(20))).step == 13
    fitted = trainer(scheduler={"name": PLATEAU, "monitor": "teacher"})
    fitted.log_metrics({"teacher": 0.5})
    assert (await fitted.fit(Samples())).step == 13


async def test_a_result_has_the_means_of_the_epoch_in_which_it_ended() -> None:
    stream, told = Samples(80), Recorder()
    losses: list[float] = []

    def step(model: nn.Module, batch: Batch) -> Tensor:
        loss = nn.functional.mse_loss(model(batch.inputs), batch.targets)
        losses.append(float(loss.detach()))
        return loss

    fitted = Trainer(network(), step=step, seed=SEED, log_every=50, callbacks=[told], scheduler="linear")
    result = await fitted.fit(stream, max_steps=3)
    assert result.metrics == {"loss": pytest.approx(sum(losses[:3]) / 3), "lr": pytest.approx(1e-3 / 3)}
    assert told.events("on_train_end")[0].metrics == result.metrics
    result = await fitted.fit(stream, max_steps=8)
    assert result.metrics == {"loss": pytest.approx(sum(losses) / 8), "lr": pytest.approx(1e-3 / 8)}


@pytest.mark.parametrize("accumulate", [1, 3])
async def test_a_training_step_reads_the_very_update_before_its_own(accumulate: int) -> None:
    read: list[tuple[int, int, int, int]] = []

    def step(model: nn.Module, batch: Batch) -> Tensor:
        now = fitted.state
        read.append((now.epoch, now.step, now.batch, now.samples))
        return nn.functional.mse_loss(model(batch.inputs), batch.targets)

    fitted = Trainer(network(), step=step, seed=SEED, accumulate_grad_batches=accumulate, sanity_batches=0)
    await fitted.fit(Samples(80), max_epochs=2)
    per_epoch = -(-10 // accumulate)
    expected = [
        (epoch, epoch * per_epoch + n // accumulate, n - n % accumulate, 80 * epoch + 8 * (n - n % accumulate))
        for epoch in range(2)
        for n in range(10)
    ]
    assert read == expected
    assert fitted.state.step == 2 * per_epoch


async def test_a_schedule_knows_that_a_fit_without_limits_is_one_epoch() -> None:
    fitted = trainer(scheduler="linear", optimizer="sgd", log_every=1)
    assert (await fitted.fit(Samples(80))).metrics["lr"] == pytest.approx(1e-4)


async def test_numpys_integers_are_integers() -> None:
    fitted = trainer(accumulate_grad_batches=np.int64(2), seed=np.uint32(SEED))
    assert (await fitted.fit(Samples(80), max_steps=np.int32(3))).step == 3  # type: ignore[arg-type]


async def test_who_saves_before_the_first_fit_need_not_resume_it(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path)
    await fitted.save_checkpoint()
    await fitted.train_epoch(Samples(80))
    undisturbed = trainer()
    await undisturbed.fit(Samples(80), max_epochs=1)
    assert same(fitted.model, undisturbed.model)
    other = trainer(run_dir=tmp_path)
    with pytest.raises(ConfigError, match="resume was not given"):
        await other.train_epoch(Samples(80))


async def test_fit_sync_within_a_loop_says_what_to_type(recwarn: pytest.WarningsRecorder) -> None:
    fitted = trainer()
    with pytest.raises(ConfigError, match="an event loop runs already") as caught:
        fitted.fit_sync(Samples())
    assert "await trainer.fit" in caught.value.hint
    assert (await fitted.fit(Samples(80))).reason == "completed"
    assert not recwarn.list


async def test_states_of_callbacks_that_are_gone_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await trainer(run_dir=tmp_path, callbacks=[EarlyStopping("loss")]).fit(Samples(80), max_epochs=1)
    await trainer(run_dir=tmp_path).fit(Samples(80), max_epochs=2, resume="auto")
    assert caplog.text.count("that are not there now, with their states: EarlyStopping['loss']") == 1


async def test_fit_while_fit_runs_is_refused() -> None:
    fitted = trainer()
    task = await begun(fitted, 1)
    with pytest.raises(ConfigError, match="running already"):
        await fitted.fit(Samples())
    fitted.stop()
    await task


async def test_a_locked_folder_is_refused(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path)
    task = await begun(fitted, 1)
    with pytest.raises(EnvironmentProblem, match="in use"):
        await trainer(run_dir=tmp_path).fit(Samples(), resume="auto")
    fitted.stop()
    await task


# --- what goes wrong ---


class Faulty(Callback):
    """Raises at a step."""

    async def on_batch_end(self, event: BatchEnd) -> None:
        if event.step >= 5:
            raise ValueError("no")


async def test_a_callback_that_raises_ends_the_fit_saved_and_the_others_properly(tmp_path: Path) -> None:
    recorder = Recorder()
    fitted = trainer(run_dir=tmp_path, callbacks=[Faulty(), recorder])
    with pytest.raises(UserCodeError, match="callback Faulty: on_batch_end raised ValueError: no"):
        await fitted.fit(Samples(), max_epochs=10**6)
    assert steps(tmp_path)[-1] == fitted.state.step >= 5
    assert isinstance(recorder.events("on_exception")[0].error, UserCodeError)
    assert isinstance(recorder.told[-1][1], TrainEnd)
    assert "callback Faulty" in (tmp_path / "error.json").read_text()


async def test_the_end_is_told_once_even_if_a_hook_raises_there(tmp_path: Path) -> None:
    class Ends(Callback):
        ends = 0

        async def on_train_end(self, event: TrainEnd) -> None:
            self.ends += 1
            raise ValueError("no")

    ends, recorder = Ends(), Recorder()
    fitted = trainer(run_dir=tmp_path, callbacks=[ends, recorder])
    with pytest.raises(UserCodeError, match="callback Ends: on_train_end raised ValueError: no"):
        await fitted.fit(Samples())
    assert (ends.ends, len(recorder.events("on_train_end")), len(recorder.events("on_exception"))) == (1, 1, 1)


async def test_a_model_that_raises_is_named_and_what_was_finished_is_saved(tmp_path: Path) -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 1), 0

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 8:
                raise RuntimeError("out of ideas")
            out: torch.Tensor = self.layer(inputs)
            return out

    fitted = trainer(Fragile(), run_dir=tmp_path)
    with pytest.raises(UserCodeError, match=r"step 8: .* RuntimeError: out of ideas"):
        await fitted.fit(Samples())
    assert steps(tmp_path) == [7]


async def test_a_burst_that_breaks_down_ends_the_pass_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("lr")

    monkeypatch.setattr(TrainStep, "run", broken)
    with pytest.raises(KeyError, match="lr"):
        await trainer().fit(Samples())
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_fails_beside_the_steps_of_a_burst_is_told_as_an_error_of_ours(tmp_path: Path) -> None:
    """And as nobody knows what of the burst was made, no checkpoint is made of it."""

    class Breaks(Callback):
        async def on_train_begin(self, event: Event) -> None:
            await event.on_train_thread(lambda model, optimizer: optimizer.param_groups[0].pop("lr"))

    with pytest.raises(UserCodeError, match="KeyError: 'lr'"):
        await trainer(callbacks=[Breaks()], run_dir=tmp_path).fit(Samples())
    assert steps(tmp_path) == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_data_that_fails_is_raised_after_what_came_before_is_trained(tmp_path: Path) -> None:
    stream = Samples()
    stream.failures[40] = DataError("chunk 5 is damaged")
    fitted = trainer(run_dir=tmp_path)
    with pytest.raises(DataError, match="chunk 5"):
        await fitted.fit(stream)
    assert steps(tmp_path) == [5]
    again = trainer(run_dir=tmp_path)
    await again.fit(Samples(), resume="auto")
    assert same(again.model, bare_loop(network(), pairs(Samples(), 1), seed=SEED))


async def test_not_a_number_in_the_features_names_row_and_column() -> None:
    stream = Samples()
    row = int(next(iter(stream.batches(0))).index[3])
    stream.inputs[row, 2] = float("nan")
    fitted = trainer()
    before = {name: value.clone() for name, value in fitted.model.state_dict().items()}
    with pytest.raises(DataError, match=f"step 1: inputs hold nan at row {row}, column 2"):
        await fitted.fit(stream)
    assert all(torch.equal(value, before[name]) for name, value in fitted.model.state_dict().items())


async def test_a_loss_that_is_not_finite_leaves_the_weights_before_it(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Batch) -> Any:
        loss = nn.functional.mse_loss(model(batch.inputs), batch.targets)
        return loss * float("inf") if batch.cursor.position == 48 else loss

    fitted = Trainer(network(), step=step, seed=SEED, run_dir=tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 6, rows .*: the loss is inf; the weights are those of step 5"):
        await fitted.fit(Samples())
    assert same(fitted.model, bare_loop(network(), cut(5), seed=SEED))
    assert steps(tmp_path) == [5]


async def test_skipped_updates_change_nothing_and_are_said(caplog: pytest.LogCaptureFixture) -> None:
    stream = Samples()
    batch = list(stream.batches(0))[4]
    stream.inputs[int(batch.index[0]), 1] = float("nan")
    fitted = trainer(network(dropout=0.0), nonfinite="skip")
    result = await fitted.fit(stream)
    batches = pairs(stream, 1)[0]
    del batches[4]
    assert same(fitted.model, bare_loop(network(dropout=0.0), [batches], seed=SEED))
    assert (result.step, result.samples) == (13, 100)
    assert np.isfinite(result.metrics["loss"])
    assert "the update is skipped" in caplog.text


async def test_the_loss_of_an_epoch_whose_updates_are_all_skipped_is_nan_and_no_improvement(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Batch) -> Any:
        return nn.functional.mse_loss(model(batch.inputs), batch.targets) * float("nan")

    waits = {"name": "plateau", "monitor": "loss", "patience": 0, "factor": 0.5}
    options: dict[str, Any] = {"callbacks": [EarlyStopping("loss", patience=2)], "run_dir": tmp_path, "log_every": 7}
    fitted = Trainer(network(), step=step, seed=SEED, nonfinite="skip", scheduler=waits, **options)
    result = await fitted.fit(Samples(), max_epochs=9)
    assert (result.reason, result.epoch) == ("early_stopping", 2)
    assert np.isnan(result.metrics["loss"])
    assert same(fitted.model, network())
    assert [(row["loss"], row["nonfinite"]) for row in lines(tmp_path)] == [(None, ["loss"])] * 4


async def test_a_label_out_of_range_names_its_row() -> None:
    inputs, _ = samples()
    labels = torch.zeros(100, dtype=torch.int64)
    labels[9] = 7
    batches = [Batch(inputs[i : i + 10], labels[i : i + 10], torch.arange(i, i + 10)) for i in range(0, 100, 10)]
    with pytest.raises(DataError, match="targets hold 7 at row 9"):
        await Trainer(nn.Linear(4, 3), nn.CrossEntropyLoss()).fit(batches)


async def test_saves_that_fail_let_training_go_on_until_the_third_one_in_a_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    fitted = trainer(run_dir=tmp_path, callbacks=[ModelCheckpoint(every="1epoch")])
    with pytest.raises(EnvironmentProblem, match="checkpoint"):
        await fitted.fit(Samples(), max_epochs=10_000)  # saves that are due while one is under way are joined
    assert caplog.text.count("training goes on") == 2
    assert 3 <= fitted.state.epoch < 10_000


async def test_saves_that_are_joined_are_counted_and_the_newest_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted, recorder = trainer(run_dir=tmp_path, callbacks=[ModelCheckpoint(every="1steps", keep_last=3)]), Recorder()
    fitted.callbacks.append(recorder)
    result = await fitted.fit(Samples(), max_steps=200)
    made = [event.step for event in recorder.events("on_checkpoint")]
    assert steps(tmp_path) == made[-3:]
    assert made[-1] == result.step == 200
    joined = 200 - sum(event.kind == "periodic" for event in recorder.events("on_checkpoint"))
    told = f"{joined} saves were due while another was under way: joined with later ones"
    assert caplog.text.count("joined with") == (2 if joined else 0)
    assert (told in caplog.text) == (joined > 0)


async def test_an_empty_stream_is_said() -> None:
    with pytest.raises(DataError, match="gave no batch"):
        await trainer().fit([])


async def test_a_loss_that_is_none_is_explained() -> None:
    for step, told in (
        (lambda model, batch: None, "returned no loss"),
        (lambda model, batch: 1.0, "float, not a tensor"),
        (lambda model, batch: model(batch.inputs), r"shape \(8, 1\)"),
        (lambda model, batch: torch.zeros(()), "does not depend"),
    ):
        with pytest.raises(ConfigError, match=told):
            await Trainer(network(), step=step).fit(Samples())


# --- without learning ---


async def test_evaluation_leaves_modes_and_random_numbers_alone() -> None:
    fitted = trainer(metrics={"mae": MeanAbsoluteError()})
    fitted.model[1].eval()  # type: ignore[index]
    before = torch.get_rng_state()
    means = await fitted.evaluate(Samples(30))
    assert set(means) == {"test_loss", "test_mae"}
    assert [module.training for module in fitted.model] == [True, False, True, True, True]  # type: ignore[attr-defined]
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in fitted.model.parameters())


async def test_an_evaluation_is_a_line_of_the_log_and_takes_none_away(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path)
    await fitted.fit(Samples(), validation=Samples(20))
    before = lines(tmp_path)
    means = await fitted.evaluate(Samples(30))
    test = {"step": 13, "epoch": 0, "samples": 100, "split": "test", **means}
    assert lines(tmp_path) == [*before, test]
    fresh = trainer(run_dir=tmp_path)  # stands at step 0, where a fit would begin the log anew
    other = await fresh.evaluate({"a": Samples(30)})
    assert set(other) == {"test_a_loss"}
    assert lines(tmp_path) == [*before, test, {"step": 0, "epoch": 0, "samples": 0, "split": "test", **other}]
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.endswith(",test_loss,test_a_loss")
    assert [row.split(",")[4] for row in rows] == [*(row["split"] for row in before), "test", "test"]
    await trainer(run_dir=tmp_path).fit(Samples(), validation=Samples(20), max_epochs=2, resume="auto")
    assert lines(tmp_path)[: len(before) + 1] == [*before, test]


async def test_an_evaluation_beside_a_fit_in_the_same_folder_is_only_returned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted, reached = trainer(run_dir=tmp_path), asyncio.Event()
    fitted.callbacks.append(AtStep(3, reached.set))
    task = asyncio.create_task(fitted.fit(Samples(), max_epochs=10**6))
    await reached.wait()
    assert set(await trainer(run_dir=tmp_path).evaluate(Samples(30))) == {"test_loss"}
    assert "the evaluation is not in the log" in caplog.text
    assert set(await fitted.evaluate(Samples(30))) == {"test_loss"}
    fitted.stop()
    await task
    assert not [row for row in lines(tmp_path) if row["split"] == "test"]


async def test_predictions_come_in_order_and_may_be_left_early() -> None:
    fitted = trainer()
    inputs, _ = samples(40)
    batches = list(torch.split(inputs, 8))
    outputs = [output async for output in fitted.predict(batches)]
    fitted.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(outputs), fitted.model(inputs))
    fitted.model.train()
    async for output in fitted.predict(batches):
        assert len(output) == 8
        break


async def test_train_epoch_returns_its_means() -> None:
    fitted = trainer()
    first, second = await fitted.train_epoch(Samples()), await fitted.train_epoch(Samples())
    assert first["loss"] > second["loss"]


async def test_a_checkpoint_saved_outside_of_fit_can_be_resumed(tmp_path: Path) -> None:
    fitted = trainer()
    await fitted.fit(Samples())
    path = await fitted.save_checkpoint(tmp_path / "kept")
    again = trainer(run_dir=tmp_path / "run")
    await again.fit(Samples(), max_epochs=2, resume=path)
    assert same(again.model, bare_loop(network(), pairs(Samples(), 2), seed=SEED))


def test_fit_sync_runs_without_a_loop() -> None:
    assert trainer().fit_sync(Samples()).reason == "completed"


class Signalling(Samples):
    """Sends the signal that saves when no fit wants it any more."""

    def follow(self, driven: bool) -> None:
        super().follow(driven)
        if not driven:
            signal.raise_signal(signal.SIGUSR1)


def test_a_signal_that_saves_after_the_end_of_fit_sync_saves_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = trainer(run_dir=tmp_path)
    monkeypatch.setattr(signals, "untouched", lambda: True)
    fitted.fit_sync(Signalling(), max_steps=3)
    assert "asked for after a fit had ended, and are not made: 1" in caplog.text
    fitted.fit_sync(Samples(), max_steps=5)
    assert steps(tmp_path) == [3, 5]


def test_said_once_that_a_run_starts_fresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer(run_dir=tmp_path).fit_sync(Samples(), resume="auto")
    assert "starting fresh" in caplog.text


async def test_one_stream_is_not_trained_and_validated_on() -> None:
    stream = Samples()
    with pytest.raises(ConfigError, match="the same stream"):
        await trainer().fit(stream, validation=stream)


async def test_an_error_of_an_earlier_life_is_forgotten(tmp_path: Path) -> None:
    await asyncio.to_thread((tmp_path / "error.json").write_text, "{}")
    fitted = trainer(run_dir=tmp_path)
    await fitted.fit(Samples())
    assert not (tmp_path / "error.json").exists()
    assert fitted.logger is not None


async def test_that_there_is_no_best_to_be_restored_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    told = "EarlyStopping['val_loss'] was to restore the best weights, but no best value of what it monitors is known"
    unwanted = trainer(callbacks=[EarlyStopping(restore_best=False)])
    await unwanted.fit(Samples(), validation=Samples(30, seed=3), max_steps=3)
    assert told not in caplog.text
    fitted = trainer(callbacks=[EarlyStopping()])
    await fitted.fit(Samples(), validation=Samples(30, seed=3), max_steps=3)
    assert caplog.text.count(told) == 1


@pytest.mark.parametrize(
    "scheduler", [{"name": "cosine", "warmup": "1epoch"}, {"name": "cosine", "interval": "epoch"}, "linear"]
)
async def test_a_trainer_that_never_fitted_saves_whatever_its_schedule_needs_to_know(
    scheduler: Any, tmp_path: Path
) -> None:
    fresh = trainer(scheduler=scheduler)
    fresh.model.eval()
    path = await fresh.save_checkpoint(tmp_path / "c")
    assert not fresh.model.training
    other = trainer(scheduler=scheduler)
    await other.load_checkpoint(path)
    whole = trainer(scheduler=scheduler)
    for each in (other, whole):
        await each.fit(Samples(), max_epochs=2)
    assert same(other.model, whole.model)


def test_a_trainer_that_is_refused_leaves_the_model_as_it_was() -> None:
    model = network()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    with pytest.raises(ConfigError, match="adamww"):
        Trainer(model, nn.MSELoss(), freeze="^0", gradient_checkpointing=True, compile=True, optimizer="adamww")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert not any(getattr(module, "_compiled_call_impl", None) for module in model.modules())


@pytest.mark.parametrize("lazy", [False, True], ids=["known", "lazy"])
async def test_a_schedule_with_numbers_for_each_group_is_checked_against_as_many(lazy: bool) -> None:
    cycle = {"name": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": [0.1, 0.2], "total_steps": 20}
    first = nn.LazyLinear(8) if lazy else nn.Linear(4, 8)
    optimizer = {"name": "adamw", "rules": [("bias", {"weight_decay": 0.0})]}
    fitted = trainer(nn.Sequential(first, nn.Linear(8, 1)), optimizer=optimizer, scheduler=cycle)
    await fitted.fit(Samples(24))
    assert fitted.optimizer is not None
    assert [group["max_lr"] for group in fitted.optimizer.param_groups] == [0.1, 0.2]
    with pytest.raises(ConfigError, match="max_lr"):
        await trainer(nn.Sequential(nn.Linear(4, 1)), scheduler=cycle).fit(Samples(24))


async def test_gauges_are_read_on_the_train_thread_for_the_last_line_too(tmp_path: Path) -> None:
    threads: list[str] = []

    class Gauge(Callback):
        def gauge(self, optimizer: Any, epoch: int) -> dict[str, float]:
            threads.append(threading.current_thread().name)
            return {"gauged": float(len(threads))}

    await trainer(callbacks=[Gauge()], run_dir=tmp_path, log_every=10).fit(Samples())
    assert [row.get("gauged") for row in lines(tmp_path)] == [1, 2]
    assert set(threads) == {"streamtrain-train"}


async def test_a_second_fit_goes_on_with_what_is_usual_of_norms() -> None:
    """As a resumed one does: it is said at once, not only when 20 more norms were seen."""
    fitted, stream = trainer(gradient_clip_norm=1.0), Samples(400)
    await fitted.fit(stream, max_steps=25)
    assert fitted._run.life is not None
    before = fitted._run.life.step.spikes.state_dict()
    await fitted.fit(stream, max_steps=26)
    assert fitted._run.life.step.spikes.state_dict()["norms"][:25] == before["norms"]


@pytest.mark.parametrize("lazy", [False, True], ids=["known", "lazy"])
async def test_a_checkpoint_is_loaded_with_the_checks_with_which_it_is_resumed(tmp_path: Path, lazy: bool) -> None:
    """Its version, its keys, and whose weights it holds: nothing live is touched before."""

    def network_of(width: int) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(width) if lazy else nn.Linear(4, width), nn.Linear(width, 1))

    first = trainer(network_of(8))
    await first.fit(Samples(24))
    path = await first.save_checkpoint(tmp_path / "good")
    snapshot = await asyncio.to_thread(checkpoint.read, path)
    wrong: dict[str, Any] = {"version": {**snapshot.state, "version": 1}, "unknown": {**snapshot.state, "more": 1}}
    for name, state in wrong.items():
        await asyncio.to_thread(checkpoint.commit, tmp_path / name, replace(snapshot, state=state))
    for name, told in (("version", "of a version that this"), ("unknown", "'more' is unknown")):
        again = trainer(network_of(8))
        with pytest.raises(CheckpointError, match=told):
            await again.load_checkpoint(tmp_path / name)
        assert (again.state.step, again.optimizer is None) == (0, lazy)
    other = trainer(network_of(9))
    with pytest.raises(CheckpointError, match=r"does not fit .*1\.weight: float32\[1, 8\] -> float32\[1, 9\]"):
        await other.load_checkpoint(path)
    assert any(map(is_lazy, other.model.parameters())) == lazy


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"scheduler": "cosine", "lr": 0.5, "optimizer": "adam"}])
async def test_a_model_of_no_size_yet_has_none_of_a_checkpoint_whose_optimizer_is_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    def network_of() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    first = trainer(network_of())
    await first.fit(Samples(24))
    path = await first.save_checkpoint(tmp_path / "good")
    model, untouched = network_of(), network_of()
    again = trainer(model, **options)
    with pytest.raises(CheckpointError, match=r"does not fit .*optimizer\.class"):
        await again.load_checkpoint(path)
    assert again.optimizer is None
    assert [is_lazy(parameter) for parameter in model.parameters()] == [True, True, False, False, False, False]
    assert same(model[1:], untouched[1:])
    await again.fit(Samples(24))
    await trainer(network_of()).load_checkpoint(path)
