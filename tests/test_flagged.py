"""Updates that the kernels themselves leave out by a flag, as on CUDA, where nobody reads it before the burst ends.

The fused kernels of the CPU look at the flag as well, so that all of it runs here.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain import rollback
from streamtrain.averaging import Average
from streamtrain.errors import NonFiniteError
from streamtrain.outcome import Compute, supervised
from streamtrain.step import TrainStep
from tests.engine import network, same
from tests.test_step import Hand, batches, burst, made

BAD = 3
"""Number of the batch whose loss is no number."""


def flagged(model: nn.Module, **options: Any) -> TrainStep:
    inner, calls = supervised(model, nn.MSELoss()), []

    def compute(batch: Any) -> Any:
        calls.append(1)
        outcome = inner(batch)
        return outcome._replace(loss=outcome.loss * float("nan")) if len(calls) == BAD else outcome

    computed: Compute = compute
    step = made(model, computed, **options)
    step._kernel_skips = True
    return step


def without_it() -> nn.Module:
    """The weights after the others of six batches."""
    model, loss = network(dropout=0.0), nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for number, batch in enumerate(batches(6), 1):
        value: Any = loss(model(batch.inputs), batch.targets)
        if number != BAD:
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_an_error_comes_at_the_end_of_the_burst_and_no_later_update_was_made() -> None:
    model = network(dropout=0.0)
    average = Average(model, 0.9)
    step = flagged(model, average=average)
    report = burst(step, Hand(batches(6)))
    assert isinstance(report.error, NonFiniteError)
    assert (report.updates, step.step) == (2, 2)
    expected = network(dropout=0.0)
    plain = Average(expected, 0.9)
    burst(made(expected, average=plain), Hand(batches(6)[:2]))
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in expected.named_parameters())
    assert all(torch.equal(weight, plain.weights()[name]) for name, weight in average.weights().items())


def test_a_skipped_update_is_no_part_of_the_means() -> None:
    model = network(dropout=0.0)
    step = flagged(model, skip=True)
    report = burst(step, Hand(batches(6)))
    assert (report.error, report.updates, report.skipped, report.samples) == (None, 6, 1, 48)
    assert step.tally.epoch.compute()["loss"] == step.tally.epoch.compute()["loss"]
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in without_it().named_parameters())


def test_a_rollback_is_made_at_the_end_of_the_burst(caplog: pytest.LogCaptureFixture) -> None:
    """The updates after the bad one were not made: they are given up with those before it."""
    model = network(dropout=0.0)
    before = copy.deepcopy(model)
    step = flagged(model)
    step._rollback = rollback.Rollback(model, step._optimizer, None)
    report = burst(step, Hand(batches(6)))
    assert (report.error, report.updates, report.skipped) == (None, 6, 4)
    assert same(model, before)
    assert "back to the weights of step 0, the 2 updates since then are given up" in caplog.text
    assert burst(step, Hand(batches(2))).skipped == 0
    assert not same(model, before)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"skip": True}, {"average": True}], ids=lambda o: str(*o))
def test_numbers_are_read_once_a_burst(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading would wait for the device."""
    reads: list[str] = []

    def counted(name: str) -> Any:
        plain: Any = getattr(torch.Tensor, name)

        def read(self: Any, *arguments: Any) -> Any:
            reads.append(name)
            return plain(self, *arguments)

        return read

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    counts = []
    for updates in (4, 12):
        model = network(dropout=0.0)
        given = {**options, "average": Average(model, 0.9)} if "average" in options else options
        step = made(model, log_every=1000, **given)
        step._kernel_skips = True
        reads.clear()
        assert burst(step, Hand(batches(updates))).updates == updates
        counts.append(len(reads))
    assert counts[0] == counts[1]
