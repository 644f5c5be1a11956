"""What a life that was broken off leaves to the next one of the same trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import CheckpointError, UserCodeError
from streamtrain.events import Event, ValidationEnd
from streamtrain.trainer import Trainer
from tests.engine import Samples, network, same


class Breaking(torch.optim.SGD):
    """Breaks once, in the middle of its sixth update."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if self.calls == 6:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise RuntimeError("half an update")
        return super().step(closure)


async def broken(folder: Path | None) -> Trainer:
    """A trainer whose fit has ended in the middle of an update."""
    saves = [] if folder is None else [ModelCheckpoint(every="3steps")]
    options: dict[str, Any] = {"seed": 5, "device": "cpu", "run_dir": folder, "callbacks": saves}
    trainer = Trainer(network(), nn.MSELoss(), optimizer=lambda params: Breaking(params, lr=0.1), **options)
    with pytest.raises(UserCodeError, match="half an update"):
        await trainer.fit(Samples(), max_steps=12)
    return trainer


async def test_no_fit_goes_on_from_the_middle_of_an_update() -> None:
    trainer = await broken(None)
    with pytest.raises(CheckpointError, match="the weights are those of no step"):
        await trainer.fit(Samples(), max_steps=12)
    with pytest.raises(CheckpointError, match="the weights are those of no step"):
        await trainer.fit(Samples(), max_steps=12)


@pytest.mark.parametrize("how", ["resumed", "loaded"])
async def test_a_fit_goes_on_from_the_checkpoint_before_half_an_update(tmp_path: Path, how: str) -> None:
    sgd: dict[str, Any] = {"name": "torch.optim.SGD", "lr": 0.1}
    whole = Trainer(network(), nn.MSELoss(), optimizer=sgd, seed=5, device="cpu")
    await whole.fit(Samples(), max_steps=12)
    trainer = await broken(tmp_path)
    if how == "loaded":
        await trainer.load_checkpoint("auto")
    result = await trainer.fit(Samples(), max_steps=12, resume="auto" if how == "resumed" else None)
    assert result.step == 12
    assert same(trainer.model, whole.model)


class Counting(Callback):
    """Counts what it is told in its state."""

    def __init__(self) -> None:
        self.told: dict[str, int] = {}

    def on_epoch_end(self, event: Event) -> None:
        self._count("epochs")

    async def on_validation_end(self, event: ValidationEnd) -> None:
        self._count("sane" if event.sanity else "validations")

    def _count(self, what: str) -> None:
        self.told[what] = self.told.get(what, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        return dict(self.told)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.told = dict(state)


class Refusing(Callback):
    """Raises once, when it is told of the second epoch's end, or of its validation."""

    decides = True

    def __init__(self, hook: str) -> None:
        self._over = False
        setattr(self, hook, self._raises)

    async def _raises(self, event: Event) -> None:
        if event.step == 26 and not self._over:
            self._over = True
            raise ValueError("not now")


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("folder", [True, False])
async def test_a_fit_that_goes_on_after_a_hook_failed_counts_no_end_of_an_epoch_twice(
    tmp_path: Path, hook: str, folder: bool
) -> None:
    def fitted(*callbacks: Callback, name: str) -> Trainer:
        place = tmp_path / name if folder else None
        return Trainer(network(), nn.MSELoss(), seed=5, device="cpu", run_dir=place, callbacks=callbacks)

    counting, early, stream = Counting(), EarlyStopping(patience=2, min_delta=1e9), Samples()
    trainer = fitted(counting, early, Refusing(hook), name="broken")
    with pytest.raises(UserCodeError, match="not now"):
        await trainer.fit(stream, Samples(30, seed=3), max_epochs=9)
    result = await trainer.fit(stream, Samples(30, seed=3), max_epochs=9)

    undisturbed = Counting()
    whole = fitted(undisturbed, EarlyStopping(patience=2, min_delta=1e9), name="whole")
    expected = await whole.fit(Samples(), Samples(30, seed=3), max_epochs=9)
    assert (result.reason, result.step) == (expected.reason, expected.step) == ("early_stopping", 39)
    assert counting.told == undisturbed.told
