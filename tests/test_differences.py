"""What tells one run from another: in a fixed order, and rates that moved together are no difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamtrain.differences import (
    check_weights,
    differences,
    habits,
    model_differences,
    other_rate,
    rate_change,
    refuse,
)
from streamtrain.errors import CheckpointError
from streamtrain.schedulers import FixedLearningRate, get_lr

RATES = st.lists(st.sampled_from([0, 0.0, 1, 3e-4, 0.1]), min_size=1, max_size=4)


def of(rates: list[float], **other: Any) -> dict[str, Any]:
    return {"optimizer": {"groups": [{"lr": rate, "betas": [0.9, 0.99]} for rate in rates]}, **other}


@given(rates=RATES, factor=st.sampled_from([1.0, 0.3, 7.0]))
def test_rates_that_moved_by_one_factor_are_no_difference(rates: list[float], factor: float) -> None:
    found, told = rate_change(of(rates), of([rate * factor for rate in rates]))
    assert found == pytest.approx(factor if any(rates) else 1.0)
    assert told == []


@given(rates=RATES, at=st.integers(0, 5))
def test_one_that_moved_by_another_is_told_with_all_else(rates: list[float], at: int) -> None:
    moved = [0.5, 0.2, *(rate * 2 for rate in rates)]
    moved[at % len(moved)] = 0.7
    found, told = rate_change(of([0.25, 0.1, *rates], seed=1), of(moved, seed=2))
    assert found == 1.0
    assert any(line.startswith(f"optimizer.groups[{at % len(moved)}].lr: ") for line in told)
    assert told[-1] == "seed: 1 -> 2"


@given(old=st.floats(1e-6, 1.0), new=st.floats(1e-6, 1.0))
def test_another_rate_is_that_to_the_last_bit(old: float, new: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=old)
    factor, _ = rate_change(of([old]), of([new]))
    other_rate(optimizer, FixedLearningRate(optimizer), of([new]), factor)
    assert get_lr(optimizer) == (new if factor != 1.0 else old)


def test_another_number_of_groups_is_a_difference() -> None:
    found, told = rate_change(of([0.1]), of([0.2, 0.1]))
    assert (found, len(told)) == (2.0, 1)


def test_weights_are_told_in_the_models_order_and_those_of_the_checkpoint_alone_last(tmp_path: Path) -> None:
    saved = {"gone": torch.zeros(2), "2.bias": torch.zeros(3), "1": 7, "0.weight": torch.zeros(4, 4).half()}
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert list(model_differences(saved, model)) == [
        "model.0.weight: float16[4, 4] -> float32[4, 4]",
        "model.0.bias: not there -> float32[4]",
        "model.2.weight: not there -> float32[2, 4]",
        "model.2.bias: float32[3] -> float32[2]",
        "model.gone: float32[2] -> not there",
        "model.1: int -> not there",
    ]
    with pytest.raises(CheckpointError, match=r"^checkpoint .* does not fit \(saved -> now\): model\.0\.weight: "):
        check_weights(saved, model, tmp_path)


def test_of_many_differences_the_first_dozen_are_told_and_how_many_more_there_are(tmp_path: Path) -> None:
    told = [f"d{number}" for number in range(13)]
    refuse([], tmp_path)
    with pytest.raises(CheckpointError) as caught:
        refuse(told[:12], tmp_path)
    assert str(caught.value).endswith("d10; d11")
    with pytest.raises(CheckpointError) as caught:
        refuse([*told, "d13"], tmp_path)
    assert str(caught.value).endswith("d10; d11; and 2 more")


def test_another_gpu_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another make rounds otherwise, and a random state is one of each number."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ["A100", "A100", "H100"][device.index])
    one, other, newer = (habits(torch.device("cuda", number)) for number in range(3))
    assert list(differences(one, other)) == ["device: 'cuda:0 (A100)' -> 'cuda:1 (A100)'"]
    assert list(differences(other, newer)) == ["device: 'cuda:1 (A100)' -> 'cuda:2 (H100)'"]
    assert habits(torch.device("cpu"))["device"] == "cpu"
