"""What freezing promises: the bare loop with the same parameters left out, and thawed at the same update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain.callbacks.base import Callback
from streamtrain.errors import ConfigError
from streamtrain.events import EpochEnd
from streamtrain.freezing import Freezing, parse_freeze
from streamtrain.toggled import check_toggled
from streamtrain.trainer import Trainer
from tests.engine import Samples, network, pairs, same

FRONT = r"^[01]\."
"""The first layer and its norm."""


def trainer(**options: Any) -> Trainer:
    return Trainer(network(), nn.MSELoss(), **{"seed": 5, "device": "cpu", **options})


def by_hand(
    thaw: int | None, *, epochs: int = 3, decay: float = 0.01, make: Callable[[list[nn.Parameter]], Any] | None = None
) -> nn.Module:
    """The bare loop, whose front is trained from update `thaw` on."""
    model, loss = network(), nn.MSELoss()
    assert isinstance(model, nn.Sequential)
    front = [*model[0].parameters(), *model[1].parameters()]
    kept = [p for p in model.parameters() if thaw is not None or all(p is not other for other in front)]
    optimizer = make(kept) if make else torch.optim.AdamW(kept, lr=1e-3, fused=True, weight_decay=decay)
    for parameter in front:
        parameter.requires_grad_(False)
    model[1].eval()
    torch.manual_seed(5)
    for step, (inputs, targets) in enumerate(pair for epoch in pairs(Samples(), epochs) for pair in epoch):
        if step == thaw:
            for parameter in front:
                parameter.requires_grad_()
            model[1].train()
        loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("freeze", "thaw"),
    [(FRONT, None), ([r"^0", r"^1"], None), ({FRONT: "2epochs"}, 26), ({FRONT: "5steps"}, 5), ({FRONT: "never"}, None)],
    ids=["regex", "list", "epochs", "steps", "never"],
)
async def test_the_weights_are_those_of_the_bare_loop(freeze: Any, thaw: int | None) -> None:
    fitted = trainer(freeze=freeze)
    await fitted.fit(Samples(), validation=Samples(24), max_epochs=3)
    assert same(fitted.model, by_hand(thaw))
    assert fitted.optimizer is not None
    assert len(fitted.optimizer.param_groups[0]["params"]) == (2 if thaw is None else 6)


@pytest.mark.parametrize(("nesterov", "dampening"), [(False, 0.0), (True, 0.0), (False, 0.1)])
async def test_what_thaws_has_no_momentum_yet_as_in_the_bare_loop(nesterov: bool, dampening: float) -> None:
    """Which can't be fused: that kernel of torch takes the momentum of all or of none."""
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov, "dampening": dampening, "lr": 1e-2}
    fitted = trainer(freeze={FRONT: "5steps"}, optimizer={"name": "sgd", **options})
    await fitted.fit(Samples(), max_epochs=3)
    bare = by_hand(5, make=lambda kept: torch.optim.SGD(kept, foreach=False, **options))
    for mine, theirs in zip(fitted.model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [3, 5, 12])
@pytest.mark.parametrize(("freeze", "thaw"), [({FRONT: "1epochs"}, 13), ({FRONT: "5steps"}, 5)])
async def test_a_resumed_run_thaws_at_the_same_update(tmp_path: Path, freeze: Any, thaw: int, stop: int) -> None:
    await trainer(run_dir=tmp_path, freeze=freeze).fit(Samples(), max_steps=stop)
    again = trainer(run_dir=tmp_path, freeze=freeze)
    await again.fit(Samples(), max_epochs=3, resume="auto")
    assert same(again.model, by_hand(thaw))


async def test_a_second_fit_freezes_again_what_was_woken_meanwhile() -> None:
    fitted = trainer(freeze=FRONT)
    await fitted.fit(Samples(), max_epochs=1)
    fitted.model.eval()
    fitted.model.requires_grad_()
    await fitted.fit(Samples(), max_epochs=3)
    assert same(fitted.model, by_hand(None))


async def test_what_was_frozen_in_the_last_fit_thaws_in_the_next() -> None:
    fitted = trainer(freeze={FRONT: "13steps"})
    await fitted.fit(Samples(), max_steps=13)
    await fitted.fit(Samples(), max_epochs=3)
    assert same(fitted.model, by_hand(13))


async def test_a_layer_that_its_user_put_to_evaluation_stays_there() -> None:
    fitted = trainer(freeze={"^4": "1epochs"})
    assert isinstance(fitted.model, nn.Sequential)
    fitted.model[1].eval()
    before = fitted.model[1].running_mean.clone()  # type: ignore[operator]
    await fitted.fit(Samples(), validation=Samples(24), max_epochs=2)
    assert torch.equal(before, fitted.model[1].running_mean)  # type: ignore[arg-type]
    assert [layer.training for layer in fitted.model] == [True, False, True, True, True]


async def test_another_freeze_of_the_same_optimizer_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await trainer(run_dir=tmp_path, freeze={FRONT: "5steps"}).fit(Samples(), max_steps=2)
    await trainer(run_dir=tmp_path, freeze={FRONT: "6steps"}).fit(Samples(), max_steps=3, resume="auto")
    assert "resumed with freeze[0][1]: 5 -> 6" in caplog.text


def test_a_tied_parameter_is_frozen_by_any_of_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    model["head"].weight = model["embed"].weight
    Freezing(model, parse_freeze("head.weight"))
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"embed.weight"}


def test_a_norm_without_parameters_follows_its_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 1))
    freezing = Freezing(model, parse_freeze({r"^[01]\.": "2epochs"}))
    freezing.apply(0, 0)
    assert not model[1].training
    freezing.apply(9, 2)
    assert model[1].training
    model[1].eval()
    freezing.begin()
    freezing.apply(10, 2)  # thawed long ago: this is its user's doing
    assert not model[1].training


@pytest.mark.parametrize(
    ("freeze", "told"),
    [
        ("layer9", "'layer9' names no parameter"),
        ("(", "no regular expression"),
        ({"^0": "2h"}, "must be '2epochs', '500steps' or 'never', not '2h'"),
        ({"^0": 2}, "must be '2epochs', '500steps' or 'never', not 2"),
        (3, "freeze must be a regex, a list of them, or a table"),
        ({"": "1epochs"}, "freeze leaves nothing to train"),
        ("", "no parameter that requires a gradient"),
    ],
)
def test_what_cannot_be_frozen_is_refused(freeze: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        trainer(freeze=freeze)


def test_what_thaws_must_be_in_the_optimizer() -> None:
    model = network()
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="but the optimizer does not hold it"):
        Trainer(model, nn.MSELoss(), optimizer=optimizer, freeze={"^0": "1epochs"})


class ByTurns(Callback):
    """Freezes the front in the second of three epochs, its norm's statistics too, and thaws it after that; the head is
    frozen from then on."""

    decides = True

    async def on_epoch_end(self, event: EpochEnd) -> None:
        def turn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            for name, parameter in model.named_parameters():
                if name.startswith(("0.", "4.")):
                    parameter.requires_grad_((event.epoch == 0) == name.startswith("4."))
            model.get_submodule("1").train(event.epoch > 0)

        await event.on_train_thread(turn)


@pytest.mark.parametrize("freeze", [None, {r"^0\.bias": "30steps"}])
@pytest.mark.parametrize("stop", [9, 20, 30])
async def test_what_a_callback_froze_is_frozen_after_a_resume(tmp_path: Path, stop: int, freeze: Any) -> None:
    """It was trained again, in silence."""
    whole = trainer(callbacks=[ByTurns()], freeze=freeze)
    await whole.fit(Samples(), max_epochs=3)
    first, second = (trainer(callbacks=[ByTurns()], freeze=freeze, run_dir=tmp_path) for _ in range(2))
    await first.fit(Samples(), max_steps=stop)
    first.model.eval()  # as for a prediction, which is none of the run's
    await first.save_checkpoint()
    await second.fit(Samples(), max_epochs=3, resume="auto")
    assert same(second.model, whole.model)


async def test_a_checkpoint_from_before_anything_was_frozen_thaws_it_again(tmp_path: Path) -> None:
    made = trainer(callbacks=[ByTurns()], run_dir=tmp_path)
    early = (await made.fit(Samples(), max_steps=5)).checkpoint
    await made.fit(Samples(), max_steps=20)
    weight, norm = made.model.get_parameter("0.weight"), made.model.get_submodule("1")
    assert (weight.requires_grad, norm.training) == (False, False)
    assert early is not None
    await made.fit(Samples(), max_steps=9, resume=early)
    assert (weight.requires_grad, norm.training) == (True, True)


async def test_a_layer_stays_in_evaluation_mode_though_the_model_was_looked_at_between_two_fits() -> None:
    """Its statistics went on learning, in silence."""
    made = trainer(callbacks=[ByTurns()])
    await made.fit(Samples(), max_epochs=1)
    made.model.eval()
    await made.fit(Samples(), max_steps=20)
    assert (made.model.training, made.model.get_submodule("1").training) == (True, False)


@pytest.mark.parametrize("way", ["resume", "load_checkpoint"])
async def test_what_its_user_freezes_between_two_fits_stays_frozen_whatever_the_checkpoint_says(
    tmp_path: Path, way: str
) -> None:
    """It was trained again, in silence."""
    made = trainer(run_dir=tmp_path)
    await made.fit(Samples(), max_epochs=1)
    if way == "load_checkpoint":
        await made.load_checkpoint("auto")
    weight, norm = made.model.get_parameter("0.weight"), made.model.get_submodule("1")
    weight.requires_grad_(False)
    norm.eval()
    before = weight.detach().clone()
    await made.fit(Samples(), max_epochs=2, resume="auto" if way == "resume" else None)
    assert made.state.step == 26
    assert (weight.requires_grad, norm.training) == (False, False)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("key", ["requires_grad", "training"])
@pytest.mark.parametrize("flags", [3, {"0.weight": "no"}])
def test_what_is_no_table_of_flags_is_no_state(key: str, flags: Any) -> None:
    with pytest.raises(TypeError, match=f"{key} is"):
        check_toggled({key: flags})
