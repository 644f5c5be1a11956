"""Weights that the user gives the model between two fits: they are taken, and what was kept beside the old follows."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from streamtrain import rollback
from streamtrain.data.batch import Batch
from streamtrain.outside_changes import digest
from streamtrain.trainer import Trainer
from tests.engine import Samples, bare_loop, network, pairs, same
from tests.test_switching import TwoFaced


def trainer(**options: Any) -> Trainer:
    return Trainer(network(), nn.MSELoss(), **{"seed": 5, "device": "cpu", **options})


def other() -> dict[str, Tensor]:
    """Weights of another network of the same shape."""
    model = network()
    torch.manual_seed(99)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.state_dict()


def loaded(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights)


def written(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Where no version counter sees it."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])


def assigned(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].clone()


@pytest.mark.parametrize("give", [loaded, written, assigned])
async def test_weights_that_were_given_are_those_to_learn_from(give: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Beside an optimizer that keeps others to learn with: the loop by hand gives them to it in the same way."""
    fitted = trainer(optimizer=TwoFaced, lr=0.05)
    await fitted.fit(Samples(), max_epochs=1)
    give(fitted.model, other())
    await fitted.fit(Samples(), max_epochs=2)
    weights, model = other(), network()
    optimizer = TwoFaced(model.parameters(), lr=0.05)
    torch.manual_seed(5)
    for epoch, batches in enumerate(pairs(Samples(), 2)):
        if epoch:
            optimizer.eval()
            give(model, weights)
        optimizer.train()
        for inputs, targets in batches:
            nn.MSELoss()(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.eval()
    if give is loaded:
        assert same(fitted.model, model)
    assert all(torch.equal(a, b) for a, b in zip(fitted.model.parameters(), model.parameters(), strict=True))
    told = "the model was given other weights since its last fit: those to learn with follow from them"
    assert caplog.text.count(told) == 1


@pytest.mark.parametrize("ask", ["validate", "predict", "average", "fit", "save"])
async def test_an_average_begins_anew_with_weights_that_were_given(
    ask: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = trainer(ema=0.9)
    await fitted.fit(Samples())
    fitted.model.load_state_dict(other())
    expected = {name: weight.clone() for name, weight in fitted.model.named_parameters()}
    if ask == "validate":
        plain = Trainer(copy.deepcopy(fitted.model), nn.MSELoss(), device="cpu")
        assert await fitted.validate(Samples(24)) == await plain.validate(Samples(24))
    elif ask == "predict":
        assert [output async for output in fitted.predict([Samples(8).inputs])]
    elif ask == "fit":
        await fitted.fit(Samples(8), max_steps=14)
        now = dict(fitted.model.named_parameters())
        expected = {name: weight.lerp(now[name].detach(), 0.1) for name, weight in expected.items()}
    elif ask == "save":
        await fitted.save_checkpoint(tmp_path / "c")
        loaded = trainer(ema=0.9)
        await loaded.load_checkpoint(tmp_path / "c")
        assert loaded.average is not None
        assert all(torch.equal(loaded.average[name], weight) for name, weight in expected.items())
    assert fitted.average is not None
    assert all(torch.allclose(fitted.average[name], weight) for name, weight in expected.items())
    assert caplog.text.count("their average begins anew") == 1


async def test_a_rollback_goes_back_to_weights_that_were_given() -> None:
    def step(model: nn.Module, batch: Batch) -> Any:
        loss = nn.functional.mse_loss(model(batch.inputs), batch.targets)
        return loss * float("nan") if batch.cursor == (1, 8) else loss

    fitted = Trainer(network(), step=step, seed=5, device="cpu", nonfinite="rollback")
    await fitted.fit(Samples(), max_epochs=1)
    fitted.model.load_state_dict(other())
    await fitted.fit(Samples(), max_steps=14)
    expected = other()
    assert all(torch.equal(weight, expected[name]) for name, weight in fitted.model.named_parameters())
    assert rollback.EVERY > 14


@pytest.mark.parametrize("options", [{"ema": 0.9}, {"optimizer": TwoFaced}, {"nonfinite": "rollback"}, {}], ids=str)
async def test_nothing_is_said_where_none_were_given(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However it was evaluated, saved and loaded in between, moved there and back, or given what it has."""
    caplog.set_level(logging.WARNING)
    fitted = trainer(**options)
    await fitted.fit(Samples(), validation=Samples(24, seed=2), max_steps=5)
    await fitted.validate(Samples(24))
    assert [output async for output in fitted.predict([Samples(8).inputs])]
    path = await fitted.save_checkpoint(tmp_path / "c")
    fitted.model.to(torch.float64).to(torch.float32)
    fitted.model.load_state_dict(fitted.model.state_dict())
    await fitted.fit(Samples(), max_steps=9)
    await fitted.load_checkpoint(path)
    await fitted.fit(Samples(), max_steps=9)
    assert "other weights" not in caplog.text


async def test_a_run_that_is_resumed_takes_all_from_its_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = trainer(ema=0.9, run_dir=tmp_path)
    await fitted.fit(Samples(), max_steps=5)
    fitted.model.load_state_dict(other())
    await fitted.fit(Samples(), max_epochs=2, resume="auto")
    assert same(fitted.model, bare_loop(network(), pairs(Samples(), 2), seed=5))
    assert "other weights" not in caplog.text


@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_a_digest_changes_with_any_value_and_with_nothing_else(dtype: torch.dtype, row: int, column: int) -> None:
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    model = nn.ParameterList([weight, torch.zeros(0), weight.t()])
    before = digest(model)
    assert digest(copy.deepcopy(model)) == before
    changed = copy.deepcopy(model)
    changed[0].data[row, column] += 1
    assert digest(changed) != before


def test_a_digest_of_a_sparse_parameter_tells_that_it_was_written() -> None:
    model = nn.ParameterList([nn.Parameter(torch.eye(3).to_sparse())])
    before = digest(model)
    assert digest(model) == before
    with torch.no_grad():
        model[0].mul_(2)
    assert digest(model) != before
