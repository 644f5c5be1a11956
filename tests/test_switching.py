"""Optimizers with two sets of weights: those to learn with at each step, those to be judged by elsewhere."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain import checkpoint
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import UserCodeError
from streamtrain.events import TrainEnd, ValidationEnd
from streamtrain.switching import Switch, switch_of
from streamtrain.trainer import Trainer
from tests.engine import Recorder, Samples, network, pairs, same


class TwoFaced(torch.optim.Optimizer):
    """Schedule-free SGD as its paper has it: gradients at y = (1 - b) z + b x, steps of z, x the mean of all z."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "train_mode": False, "k": 0})
        self.switches = 0

    def _turn(self, learn: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not learn:
                self.switches += 1
                b = group["momentum"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], 1 - b if learn else 1 - 1 / b)
                group["train_mode"] = learn

    def train(self) -> None:
        self._turn(True)

    def eval(self) -> None:
        self._turn(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["train_mode"], "stepped with the weights to be judged by"
            group["k"] += 1
            b = group["momentum"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / b)
                z.sub_(p.grad, alpha=group["lr"])
                p.copy_(z.lerp(x.lerp_(z, 1 / group["k"]), b))


def trainer(model: nn.Module | None = None, **options: Any) -> Trainer:
    given = {"seed": 5, "device": "cpu", "log_every": 5, "optimizer": TwoFaced, "lr": 0.05, **options}
    return Trainer(model or network(), nn.MSELoss(), **given)


def by_hand(epochs: int) -> tuple[nn.Module, TwoFaced]:
    """A bare loop, which never turns but at its end."""
    model = network()
    optimizer = TwoFaced(model.parameters(), lr=0.05)
    torch.manual_seed(5)
    optimizer.train()
    for batches in pairs(Samples(), epochs):
        for inputs, targets in batches:
            nn.MSELoss()(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.eval()
    return model, optimizer


async def test_a_fit_ends_with_the_weights_to_be_judged_by_however_often_it_was_judged(tmp_path: Path) -> None:
    often = {"run_dir": tmp_path, "callbacks": [ModelCheckpoint(every="4steps")]}
    for options in ({}, {"validate_every": "3steps"}, often):
        fitted = trainer(**options)
        await fitted.fit(Samples(), validation=Samples(24, seed=3) if options else None, max_epochs=2)
        assert same(fitted.model, by_hand(2)[0])


async def test_a_second_fit_goes_on_with_the_weights_to_learn_with() -> None:
    fitted = trainer()
    await fitted.fit(Samples(), max_epochs=1)
    judged = copy.deepcopy(fitted.model)
    assert await fitted.validate(Samples(24)) == await fitted.validate(Samples(24))
    assert same(fitted.model, judged)
    await fitted.fit(Samples(), max_epochs=2)
    assert same(fitted.model, by_hand(2)[0])


async def test_validations_and_saves_see_the_weights_to_be_judged_by(tmp_path: Path) -> None:
    recorder = Recorder()
    fitted = trainer(run_dir=tmp_path, callbacks=[recorder])
    result = await fitted.fit(Samples(), validation=Samples(24, seed=3), max_epochs=1)
    model, _ = by_hand(1)
    assert result.checkpoint is not None
    saved = (await asyncio.to_thread(checkpoint.read, result.checkpoint)).model
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    inputs, targets = next((batch.inputs, batch.targets) for batch in Samples(24, 24, seed=3).batches(0))
    with torch.no_grad():
        expected = float(nn.MSELoss()(model.eval()(inputs), targets))
    ends: list[ValidationEnd] = recorder.events("on_validation_end")
    assert ends[-1].metrics["val_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("stop", [5, 13, 20])
async def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, stop: int) -> None:
    whole = trainer()
    await whole.fit(Samples(), max_epochs=2)
    first = trainer(run_dir=tmp_path)
    await first.fit(Samples(), validation=Samples(24), max_epochs=2, max_steps=stop)
    resumed = trainer(run_dir=tmp_path)
    await resumed.fit(Samples(), validation=Samples(24), max_epochs=2, resume="auto")
    assert same(resumed.model, whole.model)
    loaded = trainer()
    await loaded.load_checkpoint(tmp_path)
    assert same(loaded.model, whole.model)


async def test_the_best_weights_that_are_restored_are_those_that_were_judged() -> None:
    fitted = trainer(callbacks=[EarlyStopping("val_loss", patience=1)], lr=0.5)
    result = await fitted.fit(Samples(), validation=Samples(24, seed=3), max_epochs=6)
    assert result.best is not None
    restored = copy.deepcopy(fitted.model)
    values = await fitted.validate(Samples(24, seed=3))
    assert values["val_loss"] == pytest.approx(result.best.value)
    assert fitted._parts.switch is not None
    fitted._parts.switch.learn()
    fitted._parts.switch.judge()
    for mine, theirs in zip(fitted.model.parameters(), restored.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)  # what it learns with from now on follows from them


async def test_whoever_hears_of_the_end_sees_the_weights_to_be_judged_by() -> None:
    seen: list[nn.Module] = []

    class AtEnd(Callback):
        async def on_train_end(self, event: TrainEnd) -> None:
            seen.append(copy.deepcopy(fitted.model))

    fitted = trainer(callbacks=[AtEnd()])
    await fitted.fit(Samples(), max_epochs=2)
    assert same(seen[0], by_hand(2)[0])


async def test_a_fit_that_fails_leaves_the_weights_to_be_judged_by() -> None:
    fitted, stream = trainer(), Samples()
    stream.failures[40] = RuntimeError("no more")
    with pytest.raises(Exception, match="no more"):
        await fitted.fit(stream)
    assert isinstance(fitted.optimizer, TwoFaced)
    assert fitted.optimizer.param_groups[0]["k"] == 5
    assert not fitted.optimizer.param_groups[0]["train_mode"]


async def test_it_turns_only_where_it_must() -> None:
    fitted = trainer()
    await fitted.fit(Samples(), validation=Samples(24), max_epochs=3)
    assert isinstance(fitted.optimizer, TwoFaced)
    assert fitted.optimizer.switches == 2 * 3


def test_there_and_back_is_exact() -> None:
    model = nn.Linear(50, 50)
    optimizer = TwoFaced(model.parameters())
    switch = switch_of(model, optimizer)
    assert isinstance(switch, Switch)
    switch.learn()
    for _ in range(5):
        model(torch.randn(3, 50)).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy(model)
    switch.judge()
    assert not same(model, before)
    switch.learn()
    assert same(model, before)


def test_an_optimizer_without_the_two_has_no_switch() -> None:
    model = nn.Linear(2, 2)
    assert switch_of(model, torch.optim.SGD(model.parameters())) is None


async def test_an_optimizer_that_can_t_turn_back_after_its_error_hides_neither_that_nor_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(TwoFaced):
        def eval(self) -> None:
            if self.param_groups[0]["k"] > 20:
                raise RuntimeError("nothing to turn to")
            super().eval()

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            if self.param_groups[0]["k"] > 20:
                raise RuntimeError("half way")

    fitted = trainer(optimizer=Breaks, run_dir=tmp_path, callbacks=[ModelCheckpoint(every="15steps")])
    with pytest.raises(UserCodeError, match="half way"):
        await fitted.fit(Samples(), max_epochs=3)
    assert "nothing to turn to" in caplog.text
    assert fitted.checkpoint == tmp_path / "checkpoints" / "step-000000015"
