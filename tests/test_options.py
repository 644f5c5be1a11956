"""What is told of values that cannot work: what they must be, and what was most likely meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.trainer import Trainer
from tests.engine import Samples, network


def trainer(**options: Any) -> Trainer:
    return Trainer(options.pop("model", None) or network(), options.pop("loss", nn.MSELoss()), device="cpu", **options)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("bf16-mixed", "Give 'bf16'"),
        ("bfloat16", "Give 'bf16'"),
        (torch.bfloat16, "Give 'bf16'"),
        ("16-mixed", "Give '16'"),
        ("fp16", "Give '16'"),
        (torch.float16, "Give '16'"),
        ("32-true", "Give '32'"),
        ("float32", "Give '32'"),
        (64, "weights stay float32"),
        (None, "weights stay float32"),
    ],
)
def test_a_precision_by_another_name_is_told_by_ours(given: Any, meant: str) -> None:
    with pytest.raises(ConfigError, match="precision must be '32', 'bf16' or '16', not") as caught:
        trainer(precision=given)
    assert meant in caught.value.hint


def test_a_precision_may_be_the_number_of_its_bits() -> None:
    trainer(precision=32)
    with pytest.raises(ConfigError, match="precision '16' needs a CUDA device"):
        trainer(precision=16)


@pytest.mark.parametrize(
    ("options", "told", "hint"),
    [
        ({"model": nn.Linear}, "got <class 'torch.nn.modules.linear.Linear'>", "Make one of the class: Linear"),
        ({"callbacks": [EarlyStopping]}, "is no callback", r"Make one: EarlyStopping\("),
        ({"validate_every": "10min"}, "like '500steps' or '1epoch', not '10min'$", "steps .* or epochs"),
        ({"validate_every": 0.5}, "like '500steps' or '1epoch', not 0.5", "a bare number is of steps"),
        ({"config": 3}, "config must be a dict, not 3", ""),
    ],
)
def test_options_that_cannot_work_are_told_what_to_do(options: dict[str, Any], told: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        trainer(**options)
    assert re.search(hint, caught.value.hint)


ROWS = torch.zeros(8, 4)


@pytest.mark.parametrize(
    ("fit", "told", "hint"),
    [
        (lambda: trainer().fit("a.zarr"), "a str is no series of batches", "ZarrStream('a.zarr', batch_size=...)"),
        (lambda: trainer().fit(ROWS), "a Tensor gives samples", "DataLoader(TensorDataset(x, y), batch_size="),
        (lambda: trainer().fit(ROWS.numpy()), "a ndarray gives samples", "DataLoader(TensorDataset(x, y)"),
        (
            lambda: trainer().fit(TensorDataset(ROWS)),
            "a TensorDataset gives samples",
            "DataLoader(dataset, batch_size=",
        ),
        (lambda: trainer().fit(Samples(), [Samples(), Samples()]), "have no names", "Give a dict"),
        (lambda: trainer().fit(Samples(), max_time="2 days"), "must be a time above 0.*, not '2 days'", "minute, h"),
        (lambda: trainer().fit(Samples(), resume="auto"), "needs a run_dir", "run_dir="),
        (lambda: trainer(run_dir="x").fit(Samples(), resume=""), "not ''", "'auto' goes on"),
        (lambda: trainer(loss=None).fit(Samples()), "there is no loss", "--loss mse"),
        (lambda: trainer(loss={"a": "mse"}).fit(Samples()), "outputs 'a', .* one tensor of shape", "loss='mse'"),
        (lambda: trainer(loss={"name": "mse"}).fit(Samples()), "outputs 'name', .* one tensor", "Give the loss itself"),
    ],
)
async def test_what_a_fit_cannot_take_is_told_what_to_give(fit: Callable[[], Any], told: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        await fit()
    assert hint in caught.value.hint


async def test_a_best_where_there_is_no_checkpoint_is_told_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="resume='best': there is no checkpoint in") as caught:
        await trainer(run_dir=tmp_path).fit(Samples(), resume="best")
    assert "'auto', which starts fresh" in caught.value.hint
