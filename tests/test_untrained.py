"""Parameters that nobody would update: said where they were left out, refused or said where they came later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain.errors import ConfigError
from streamtrain.events import EpochBegin
from streamtrain.trainer import Trainer
from tests.engine import Samples, network


def trainer(model: nn.Module, **options: Any) -> Trainer:
    return Trainer(model, nn.MSELoss(), seed=5, device="cpu", **options)


def replaced(model: nn.Module) -> None:
    model[4] = nn.Linear(16, 1)  # type: ignore[operator]


def assigned(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def thawed(model: nn.Module) -> None:
    model[0].requires_grad_(True)  # type: ignore[index]


@pytest.mark.parametrize("change", [replaced, assigned, thawed])
@pytest.mark.parametrize("fitted", [False, True])
async def test_a_model_that_was_changed_since_its_optimizer_was_made_is_refused(
    change: Callable[[nn.Module], None], fitted: bool
) -> None:
    """Its new parameters were never updated."""
    model = network()
    model[0].requires_grad_(change is not thawed)  # type: ignore[index]
    made = trainer(model)
    if fitted:
        await made.fit(Samples(), max_steps=2)
    change(model)
    with pytest.raises(ConfigError, match=r"the optimizer does not hold .*\.weight.*, which would not be trained"):
        await made.fit(Samples(), max_steps=4)
    assert (await trainer(model).fit(Samples(), max_steps=4)).step == 4


async def test_what_is_thawed_by_hand_is_said_once_unless_an_optimizer_gets_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Thawing:
        def __init__(self, *, gives: bool) -> None:
            self.gives = gives

        async def on_epoch_begin(self, event: EpochBegin) -> None:
            if event.epoch:
                await event.on_train_thread(self.thaw)

        def thaw(self, model: nn.Module, optimizer: Any) -> None:
            thawed(model)
            if self.gives and len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": list(model[0].parameters())})  # type: ignore[index]

    for gives in (False, True):
        caplog.clear()
        model = network()
        model[0].requires_grad_(False)  # type: ignore[index]
        before = model[0].weight.detach().clone()  # type: ignore[index]
        await trainer(model, callbacks=[Thawing(gives=gives)]).fit(Samples(), max_epochs=4)
        assert torch.equal(before, model[0].weight) != gives  # type: ignore[index]
        assert caplog.text.count("0.weight, 0.bias requires gradients now, and is in no optimizer") == (not gives)


@pytest.mark.parametrize("saves", [False, True])
async def test_a_layer_that_the_model_makes_in_its_first_step_is_said(
    saves: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = network()
            self.late: nn.Module = nn.Identity()

        def forward(self, inputs: Tensor) -> Tensor:
            if isinstance(self.late, nn.Identity):
                self.late = nn.Linear(1, 1)
            made: Tensor = self.late(self.whole(inputs))
            return made

    await trainer(Growing(), run_dir=tmp_path if saves else None).fit(Samples(), max_steps=3)
    assert caplog.text.count("late.weight, late.bias requires gradients now, and is in no optimizer") == 1


async def test_an_optimizer_of_some_parameters_is_taken_and_what_it_leaves_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = network()
    made = trainer(model, optimizer=torch.optim.SGD(model[4].parameters(), lr=0.1))  # type: ignore[index]
    assert (await made.fit(Samples(), max_steps=2)).step == 2
    assert (await made.fit(Samples(), max_steps=4)).step == 4
    assert caplog.text.count("the optimizer leaves out, and nothing trains: 0.weight, 0.bias, 1.weight, 1.bias") == 1


def test_parameters_of_an_optimizer_that_no_checkpoint_has_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model, scale = network(), nn.Parameter(torch.zeros(3))
    trainer(model, optimizer=torch.optim.SGD([*model.parameters(), scale], lr=0.1))
    assert "parameters that are none of the model's, of the shapes [3]: no checkpoint has" in caplog.text


@pytest.mark.parametrize("freeze", ["^0", {"^0": "1epoch"}, {"^0": "3steps"}])
async def test_what_freeze_names_is_no_surprise(freeze: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(network(), freeze=freeze)
    for epochs in (1, 2):
        await made.fit(Samples(), max_epochs=epochs)
    assert "optimizer" not in "".join(record.getMessage() for record in caplog.records if record.levelname != "INFO")
