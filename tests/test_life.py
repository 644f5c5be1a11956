"""What a life that was broken off leaves to the next one of the same trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.errors import CheckpointError, UserCodeError
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
