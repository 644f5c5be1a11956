"""What a rollback promises: the weights of a while ago, to the bit, and the run goes forward; not for ever."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain import rollback
from streamtrain.data.batch import Batch
from streamtrain.errors import ConfigError, NonFiniteError
from streamtrain.trainer import Trainer
from tests.engine import Samples, bare_loop, lines, network, pairs, same

BAD = {7, 9, 18}
"""Numbers of the updates whose loss is no number, from 1."""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "EVERY", 5)


def number(batch: Batch) -> int:
    return 13 * batch.cursor.epoch + -(-batch.cursor.position // 8)


def step(model: nn.Module, batch: Batch) -> Any:
    loss = nn.functional.mse_loss(model(batch.inputs), batch.targets)
    return loss * float("nan") if number(batch) in BAD else loss


def trainer(**options: Any) -> Trainer:
    return Trainer(network(), step=step, **{"seed": 5, "device": "cpu", "nonfinite": "rollback", **options})


def by_hand(*, every: int = 5, rate: Any = lambda step: 1e-3) -> nn.Module:
    """The bare loop of two epochs, which goes back to copies of its model and optimizer."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    kept: Any = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(5)
    for at, (inputs, targets) in enumerate((pair for epoch in pairs(Samples(), 2) for pair in epoch), 1):
        loss = nn.functional.mse_loss(model(inputs), targets)
        if at in BAD:
            weights, state = copy.deepcopy(kept)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.param_groups[0]["lr"] = rate(at - 1)
            optimizer.step()
            optimizer.zero_grad()
        if at % every == 0:
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return model


async def test_the_weights_are_those_of_a_bare_loop_that_goes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = trainer(run_dir=tmp_path, log_every=1)
    result = await fitted.fit(Samples(), max_epochs=2)
    assert same(fitted.model, by_hand())
    assert (result.step, result.samples) == (26, 200)
    assert "step 9, rows" in caplog.text
    assert (
        "the loss is nan; back to the weights of step 5, the 3 updates since then are given up (rollback 2 of 5)"
        in (caplog.text)
    )
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 27))


@pytest.mark.parametrize("stop", [3, 6, 7, 9, 12, 17, 20])
async def test_a_resumed_run_goes_back_to_the_same_weights(tmp_path: Path, stop: int) -> None:
    await trainer(run_dir=tmp_path).fit(Samples(), max_steps=stop)
    again = trainer(run_dir=tmp_path)
    await again.fit(Samples(), max_epochs=2, resume="auto")
    assert same(again.model, by_hand())


async def test_so_does_a_second_fit() -> None:
    fitted, stream = trainer(), Samples()
    await fitted.fit(stream, max_steps=7)
    await fitted.fit(stream, max_epochs=2)
    assert same(fitted.model, by_hand())


async def test_the_learning_rate_goes_forward() -> None:
    fitted = trainer(scheduler={"name": "linear", "total": 26})
    await fitted.fit(Samples(), max_epochs=2)
    assert same(fitted.model, by_hand(rate=lambda step: 1e-3 * (1 - step / 26)))
    assert fitted.optimizer is not None
    assert fitted.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 26)


async def test_the_average_goes_back_as_well() -> None:
    fitted = trainer(ema=0.9)
    await fitted.fit(Samples(), max_epochs=2)
    assert same(fitted.model, by_hand())
    assert fitted._parts.average is not None
    assert fitted._parts.average.updates == 26 - 4 - 3  # steps 6 to 9 and 16 to 18


async def test_bad_data_are_passed_over_with_the_weights_that_met_them() -> None:
    stream = Samples(96)
    stream.inputs[int(list(stream.batches(0))[3].index[0]), 1] = float("nan")
    fitted = Trainer(network(dropout=0.0), nn.MSELoss(), seed=5, device="cpu", nonfinite="rollback")
    await fitted.fit(stream)
    (batches,) = pairs(stream, 1)
    del batches[3]
    assert same(fitted.model, bare_loop(network(dropout=0.0), [batches], seed=5))


async def test_after_too_many_the_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "MOST", 2)
    with pytest.raises(NonFiniteError, match=r"step 18, rows .*2 rollbacks did not help, the last one to step 15"):
        await trainer().fit(Samples(), max_epochs=2)


def test_a_learning_rate_that_was_set_meanwhile_stays() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept = rollback.Rollback(model, optimizer, None)
    kept.keep(0)
    optimizer.param_groups[0]["lr"] = 0.25
    kept.back(NonFiniteError("the loss is nan"), 3)
    assert optimizer.param_groups[0]["lr"] == 0.25


async def test_several_optimizers_have_none() -> None:
    spec = {"all": {"name": "sgd", "params": ""}}
    with pytest.raises(ConfigError, match="'rollback' is for one optimizer"):
        await trainer(optimizer=spec).fit(Samples())


async def test_numbers_that_an_optimizer_keeps_in_its_groups_go_back_as_well() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            return super().step(closure)

    fitted = trainer(optimizer=Counting)
    await fitted.fit(Samples(), max_epochs=2)
    assert fitted.optimizer is not None
    assert fitted.optimizer.param_groups[0]["k"] == 26 - 4 - 3  # as many as the average took in
