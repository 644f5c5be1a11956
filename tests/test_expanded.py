"""Buffers that were expanded: a run that has them goes on, goes back and ends like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.expanded import own_memory
from streamtrain.trainer import Trainer
from tests.engine import Samples, network, same


class Masked(nn.Module):
    """With a mask that is one row many times, and a scale that is tied."""

    mask: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.register_buffer("mask", torch.ones(1, 4).expand(8, 4))
        self.register_buffer("scale", torch.ones(1).expand(4))
        self.net.register_buffer("scale", self.scale)
        self.register_buffer("cache", torch.ones(1).expand(4), persistent=False)

    def forward(self, inputs: Tensor) -> Any:
        return self.net(inputs * self.mask[: len(inputs)] * self.scale)


def trainer(folder: Path | None, **options: Any) -> Trainer:
    return Trainer(Masked(), nn.MSELoss(), seed=5, device="cpu", run_dir=folder, **options)


async def test_a_run_with_them_goes_on_from_its_checkpoints(tmp_path: Path) -> None:
    """They were saved for a week, and nothing could load them."""
    every = {"callbacks": [ModelCheckpoint(every="2steps")]}
    whole, parts = trainer(tmp_path / "whole", **every), [trainer(tmp_path / "parts", **every) for _ in range(2)]
    await whole.fit(Samples(), max_steps=8)
    await parts[0].fit(Samples(), max_steps=3)
    result = await parts[1].fit(Samples(), max_steps=8, resume="auto")
    assert result.step == 8
    assert same(parts[1].model, whole.model)
    warm = trainer(None)
    await warm.load_weights(tmp_path / "parts")
    assert same(warm.model, whole.model)


@pytest.mark.parametrize("folder", [True, False])
async def test_the_best_weights_come_back_at_the_end(tmp_path: Path, folder: bool) -> None:
    fitted = trainer(tmp_path if folder else None, lr=0.5, callbacks=[EarlyStopping(patience=1)])
    result = await fitted.fit(Samples(), validation=Samples(30), max_epochs=9)
    assert result.best is not None
    assert (await fitted.validate(Samples(30)))["val_loss"] == result.best.value


async def test_a_rollback_goes_back_with_them() -> None:
    items = [(batch.inputs, batch.targets) for batch in Samples().batches(0)]
    items[2] = (items[2][0], torch.full_like(items[2][1], float("nan")))
    fitted = Trainer(Masked(), nn.MSELoss(), seed=5, device="cpu", nonfinite="rollback")
    assert (await fitted.fit(items)).reason == "completed"


def test_only_what_is_saved_and_shared_gets_memory_of_its_own() -> None:
    model = Masked()
    before, weight = model.cache, model.net[0].weight.data_ptr()  # type: ignore[index]
    own_memory(model)
    assert model.mask.is_contiguous()
    assert torch.equal(model.mask, torch.ones(8, 4))
    assert model.scale is model.net.scale
    assert model.cache is before
    assert model.net[0].weight.data_ptr() == weight  # type: ignore[index]


class Selective(nn.Module):
    """It saves its head alone, and takes nothing less than all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, inputs: Tensor) -> Any:
        return self.net(inputs)

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        return {name: value for name, value in super().state_dict(*arguments, **named).items() if ".4." in name}


class Forgiving(Selective):
    """It takes what it saves."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False, assign=assign)


class Weary(Selective):
    """It takes what it saves, but only once."""

    weary = False

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if self.weary:
            raise RuntimeError("not again")
        self.weary = True
        return super().load_state_dict(state_dict, strict=False, assign=assign)


async def test_a_model_that_takes_less_than_it_saves_is_refused_before_training(tmp_path: Path) -> None:
    """It could be trained for a week, and not go on."""
    refused = Trainer(Selective(), nn.MSELoss(), device="cpu", run_dir=tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"could not be loaded from a checkpoint of its own: Missing key\(s\)"):
        await refused.fit(Samples())
    assert refused.state.step == 0
    for steps in (5, 9):
        taken = Trainer(Forgiving(), nn.MSELoss(), device="cpu", run_dir=tmp_path / "b")
        assert (await taken.fit(Samples(), max_steps=steps, resume="auto")).step == steps


async def test_weights_that_can_t_be_put_back_at_the_end_are_told_and_the_run_is_saved(tmp_path: Path) -> None:
    stops = [EarlyStopping(patience=1), ModelCheckpoint(every="1epoch")]
    fitted = Trainer(Weary(), nn.MSELoss(), device="cpu", lr=0.5, run_dir=tmp_path, callbacks=stops)
    with pytest.raises(CheckpointError, match="can't take back weights that it had: not again"):
        await fitted.fit(Samples(), validation=Samples(30), max_epochs=9)
    assert any((tmp_path / "checkpoints").glob("step-*"))


def test_a_parameter_that_is_expanded_is_refused_where_it_is_to_be_trained() -> None:
    """The fused kernel wrote behind its memory, which ended the process."""
    model = network()
    model.register_parameter("shared", nn.Parameter(torch.ones(4, 1).expand(4, 4)))
    with pytest.raises(ConfigError, match=r"share memory, and can't be trained: shared$"):
        Trainer(model, nn.MSELoss(), device="cpu")
    model.get_parameter("shared").requires_grad_(False)
    Trainer(model, nn.MSELoss(), device="cpu")
