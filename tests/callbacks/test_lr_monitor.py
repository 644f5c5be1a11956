"""What the monitor of rates promises: each line has every group's, as they were in its very update, in any life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain.callbacks.lr_monitor import LearningRateMonitor
from streamtrain.errors import ConfigError
from streamtrain.trainer import Trainer
from tests.engine import Samples, lines, network


def groups(model: nn.Module) -> torch.optim.Optimizer:
    first, second, *rest = model.parameters()
    named: dict[str, Any] = {"params": [second, *rest], "lr": 1e-2, "name": "rest"}
    return torch.optim.SGD([{"params": [first]}, named], lr=1e-3, momentum=0.9)


async def fit(folder: Path, steps: int, **options: Any) -> list[dict[str, Any]]:
    trainer = Trainer(
        model := network(),
        nn.MSELoss(),
        optimizer=groups(model),
        scheduler={"name": "cosine", "warmup": "4steps"},
        callbacks=[LearningRateMonitor(**options)],
        run_dir=folder,
        log_every=2,
        seed=0,
        device="cpu",
    )
    await trainer.fit(Samples(64), max_steps=steps, max_epochs=3, resume="auto")
    return lines(folder)


async def test_each_line_has_every_groups_rate_of_its_own_update(tmp_path: Path) -> None:
    rows = await fit(tmp_path, 24)
    assert all(row["lr_0"] == row["lr"] for row in rows)
    assert [round(row["lr_rest"] / row["lr"], 9) for row in rows] == [10.0] * 12
    assert len({row["lr"] for row in rows}) > 6
    assert {row["momentum_0"] for row in rows} == {row["momentum_rest"] for row in rows} == {0.9}


def test_groups_of_one_name_each_have_their_rate() -> None:
    """As those of several optimizers with rules."""
    rates = {"all others": 0.1, "rule 'bias'": 0.2}
    made = [{"params": [nn.Parameter(torch.zeros(1))], "name": name, "lr": rate} for name, rate in rates.items()]
    again = [{**group, "params": [nn.Parameter(torch.zeros(1))], "lr": 0.3} for group in made[:1]]
    optimizer = torch.optim.SGD([*made, *again])
    values = LearningRateMonitor(momentum=False).gauge(optimizer, 0)
    assert values == {"lr_all others_0": 0.1, "lr_rule 'bias'": 0.2, "lr_all others_2": 0.3}


def test_the_momentum_of_an_optimizer_with_betas_is_the_first_of_them() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1, betas=(0.8, 0.9))
    assert LearningRateMonitor().gauge(optimizer, 0) == {"lr_0": 0.1, "momentum_0": 0.8}


async def test_by_epoch_the_first_line_of_each_has_them_in_any_life(tmp_path: Path) -> None:
    whole = await fit(tmp_path / "whole", 24, interval="epoch")
    await fit(tmp_path / "parts", 12, interval="epoch")
    assert [row["step"] for row in whole if "lr_0" in row] == [2, 10, 18]
    steps = [row["step"] for row in await fit(tmp_path / "parts", 24, interval="epoch") if "lr_0" in row]
    assert steps == [2, 10, 18]


async def test_momentum_may_be_left_out(tmp_path: Path) -> None:
    assert "momentum_0" not in (await fit(tmp_path, 4, momentum=False))[0]


@pytest.mark.parametrize("options", [{"interval": "day"}, {"momentum": 1}], ids=str)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        LearningRateMonitor(**options)
