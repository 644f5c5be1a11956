"""Whose fault it was: what is said of data, losses and gradients that are not finite, once an update was not made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain.blame import explained, non_finite
from streamtrain.data.batch import Batch
from streamtrain.errors import DataError, NonFiniteError, UserCodeError
from streamtrain.trainer import Trainer
from tests.engine import Samples, bare_loop, network, pairs, same

NAN, INF = float("nan"), float("inf")


def batch(**holes: list[tuple[int, int]]) -> Batch:
    inputs, targets = {"a": torch.zeros(4, 3), "b": torch.zeros(4, 2)}, torch.zeros(4, 1)
    for name, places in holes.items():
        for row, column in places:
            (targets if name == "targets" else inputs[name])[row, column] = NAN
    return Batch(inputs, targets, torch.tensor([10, 11, 12, 13]))


def told(*arguments: Any) -> tuple[type[Exception], str]:
    error = non_finite(*arguments)
    return type(error), str(error)


def test_each_array_that_holds_nan_is_named_with_its_first_place_and_its_rows() -> None:
    kind, text = told(batch(b=[(1, 1)], targets=[(2, 0), (3, 0)]), [None], [NAN], 7)
    assert kind is DataError
    assert "step 7: inputs 'b' hold nan at row 11, column 1; " in text
    assert "targets hold nan at row 12, column 0 (2 values in 2 of 4 rows); the loss is nan; " in text
    assert "inputs 'a'" not in text


def test_the_last_batch_is_not_blamed_for_another_ones_loss() -> None:
    rows = [torch.arange(4), torch.arange(4, 8), torch.arange(10, 14)]
    kind, text = told(batch(targets=[(2, 0)]), rows, [0.5, NAN, 0.25], 7)
    assert kind is NonFiniteError
    assert "step 7, rows 4, 5, 6, 7: the loss is nan" in text


def test_what_could_not_be_looked_at_is_said() -> None:
    gone = "Look for NaN in the data of these rows, whose batch is gone."
    assert gone in str(getattr(non_finite(None, [torch.arange(4)], [NAN], 7), "hint", ""))
    assert gone not in str(getattr(non_finite(None, [torch.arange(4)], [0.5], 7), "hint", ""))
    assert gone not in str(getattr(non_finite(batch(), [torch.arange(4)], [NAN], 7), "hint", ""))


def test_a_batch_is_blamed_for_its_own_loss_wherever_in_the_group_it_is() -> None:
    error = non_finite(batch(targets=[(2, 0)]), [None] * 3, [0.5, NAN, 0.25], 7, at=1)
    assert isinstance(error, DataError)
    assert "targets hold nan at row 12, column 0; the loss is nan" in str(error)
    assert isinstance(non_finite(batch(targets=[(2, 0)]), [None] * 3, [0.5, 0.5, NAN], 7, at=1), NonFiniteError)


@pytest.mark.timeout(20)
def test_an_error_that_is_its_own_cause_is_told_like_any_other() -> None:
    """`except ValueError as error: raise error from error`: whoever follows its causes comes to no end."""
    error = ValueError("mine")
    error.__cause__ = error
    problem = explained(error, None, "step 3")
    assert isinstance(problem, UserCodeError)
    assert str(problem) == "step 3: the model, loss or step raised ValueError: mine"


def test_nan_in_the_data_makes_no_infinite_loss() -> None:
    assert told(batch(targets=[(2, 0)]), [None], [INF], 7)[0] is NonFiniteError
    held = batch()
    held.inputs["a"][3, 0] = -INF
    assert "inputs 'a' hold -inf at row 13, column 0; the loss is inf" in told(held, [None], [INF], 7)[1]


def test_a_gradient_that_is_not_finite_may_come_from_masked_values() -> None:
    kind, text = told(batch(targets=[(2, 0)]), [None], [0.5], 7)
    assert (kind, "a gradient is not finite" in text) == (DataError, True)
    assert "masked" in str(non_finite(batch(targets=[(2, 0)]), [None], [0.5], 7).hint)  # type: ignore[attr-defined, unused-ignore]
    assert told(batch(), [torch.arange(4)], [0.5], 7)[0] is NonFiniteError


async def test_masked_nan_is_trained_on_without_a_word() -> None:
    def masked(outputs: Tensor, targets: Tensor) -> Tensor:
        there = targets.isfinite()
        return (outputs[there] - targets[there]).square().mean()

    stream, bare = Samples(), Samples()
    stream.targets[::7], bare.targets[::7] = NAN, NAN
    fitted = Trainer(network(), masked, seed=5, device="cpu")
    result = await fitted.fit(stream)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    torch.manual_seed(5)
    for inputs, targets in pairs(bare, 1)[0]:
        loss: Any = masked(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(fitted.model, model)
    assert result.step == 13


async def test_nan_in_any_batch_of_a_group_is_found_and_is_no_reason_to_go_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fit(**options: Any) -> Any:
        stream = Samples()
        stream.targets[int(next(iter(Samples().batches(0))).index[3])] = NAN
        fitted = Trainer(network(), nn.MSELoss(), seed=5, device="cpu", accumulate_grad_batches=4, **options)
        return fitted.fit(stream)

    with pytest.raises(DataError, match="step 1: targets hold nan at row"):
        await fit()
    assert (await fit(nonfinite="rollback")).step == 4
    assert "targets hold nan" in caplog.text
    assert "back to the weights" not in caplog.text


@pytest.mark.parametrize("accumulate", [1, 4])
async def test_data_are_looked_at_only_after_a_bad_loss(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    finite = Tensor.isfinite

    def isfinite(self: Tensor) -> Tensor:
        looked.append(1)
        return finite(self)

    monkeypatch.setattr(Tensor, "isfinite", isfinite)
    fitted = Trainer(network(), nn.MSELoss(), seed=5, device="cpu", accumulate_grad_batches=accumulate)
    await fitted.fit(Samples(96))
    assert not looked
    assert same(fitted.model, bare_loop(network(), pairs(Samples(96), 1), seed=5, accumulate=accumulate))
