"""Losses by name: torch's values for targets as stores hold them, and no silent broadcast."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain.errors import ConfigError
from streamtrain.losses import LOSSES, described, short_loss


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["mse", "mae", "l1", "huber"])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (2, 3, 4)])
def test_an_element_loss_is_torchs(name: str, shape: tuple[int, ...]) -> None:
    outputs, targets = numbers(*shape), numbers(*shape, seed=1)
    assert torch.equal(short_loss(name, {})(outputs, targets), LOSSES[name][1]()(outputs, targets))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.uint8, torch.bool])
def test_targets_are_put_beside_outputs_of_one_column(dtype: torch.dtype) -> None:
    outputs, targets = numbers(6, 1).requires_grad_(), torch.tensor([0, 1, 1, 0, 1, 0]).to(dtype)
    expected = nn.functional.mse_loss(outputs[:, 0], targets.float())
    loss = short_loss("mse", {})(outputs, targets)
    torch.testing.assert_close(loss, expected, check_dtype=False)
    assert loss.requires_grad


def test_yes_or_no_may_be_held_as_bytes() -> None:
    outputs, targets = numbers(5, 1), torch.tensor([0, 1, 0, 1, 1], dtype=torch.uint8)
    expected = nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.float())
    assert torch.equal(short_loss("bce", {})(outputs, targets), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("column", [False, True])
def test_classes_may_be_held_in_any_integers(dtype: torch.dtype, column: bool) -> None:
    outputs, classes = numbers(5, 3), torch.tensor([0, 2, 1, 1, 0])
    targets = classes.to(dtype)[:, None] if column else classes.to(dtype)
    assert torch.equal(short_loss("cross_entropy", {})(outputs, targets), nn.functional.cross_entropy(outputs, classes))


def test_classes_of_positions_and_shares_are_torchs() -> None:
    outputs, classes = numbers(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    loss = short_loss("cross_entropy", {"label_smoothing": 0.1})
    assert torch.equal(loss(outputs, classes), nn.CrossEntropyLoss(label_smoothing=0.1)(outputs, classes))
    shares = numbers(2, 3, 4, 5, seed=1).softmax(1)
    assert torch.equal(loss(outputs, shares), nn.CrossEntropyLoss(label_smoothing=0.1)(outputs, shares))


def test_a_batch_of_one_that_was_squeezed_is_still_a_batch_of_one() -> None:
    assert float(short_loss("mse", {})(torch.tensor(3.0), torch.tensor([1.0]))) == 4.0


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [
        ("mse", numbers(4, 1), numbers(1, 4)),
        ("mse", numbers(4), numbers(1)),
        ("mse", numbers(4, 2), numbers(8)),
        ("mse", numbers(2, 3), numbers(3, 2)),
        ("bce", numbers(4, 3), torch.zeros(4)),
        ("cross_entropy", numbers(4), torch.zeros(4, dtype=torch.int64)),
        ("cross_entropy", numbers(4, 3), torch.zeros(4)),
        ("cross_entropy", numbers(4, 3), torch.zeros(3, dtype=torch.int64)),
        ("cross_entropy", numbers(4, 3, 5), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_what_does_not_fit_is_refused_with_both_shapes(name: str, outputs: Tensor, targets: Tensor) -> None:
    with pytest.raises(ConfigError) as caught:
        short_loss(name, {})(outputs, targets)
    assert f"the loss {name} got outputs of shape {tuple(outputs.shape)}" in str(caught.value)
    assert f"targets of shape {tuple(targets.shape)}" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("arguments", [{"delta": 0.5}, {"reduction": "sum"}])
def test_torchs_keywords_are_passed_on(arguments: dict[str, Any]) -> None:
    outputs, targets = numbers(4), numbers(4, seed=1)
    assert torch.equal(short_loss("huber", arguments)(outputs, targets), nn.HuberLoss(**arguments)(outputs, targets))


def shifted(outputs: Tensor, targets: Tensor, by: float = 0.0) -> Tensor:
    return (outputs - targets + by).square().mean()


def test_a_loss_is_described_by_what_it_is_and_not_by_where_it_lies() -> None:
    assert described(short_loss("mse", {})) == described(nn.MSELoss()) == "MSELoss(reduction='mean')"
    assert described(None) is None
    assert described(shifted) == "shifted"
    same = [functools.partial(shifted, by=1.0) for _ in range(2)]
    others = [
        nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.HuberLoss(delta=2.0), shifted, *same[:1],
        functools.partial(shifted, by=2.0), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.ones(2)),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])),
    ]  # fmt: skip
    assert described(same[0]) == described(same[1])
    assert len({described(loss) for loss in others}) == len(others)


def test_what_a_loss_of_ones_own_learns_does_not_make_it_another() -> None:
    class Centred(nn.Module):
        def __init__(self, centre: float) -> None:
            super().__init__()
            self.register_buffer("centre", torch.tensor(centre))

    assert described(Centred(0.0)) == described(Centred(1.0))
