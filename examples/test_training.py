"""How to test a training: a tiny store, a real `fit`, under two seconds.

pytest examples/test_training.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from streamtrain import Trainer, ZarrStream


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """512 rows of which y is a linear function of x."""
    x = np.random.default_rng(0).standard_normal((512, 8), dtype=np.float32)
    group = zarr.create_group(tmp_path / "tiny.zarr")
    group.create_array("x", data=x, chunks=(64, 8))
    group.create_array("y", data=x @ np.arange(8, dtype=np.float32), chunks=(64,))
    return tmp_path / "tiny.zarr"


def stream(store: Path, **keywords: object) -> ZarrStream:
    return ZarrStream(store, inputs="x", targets="y", batch_size=32, memory="8MiB", **keywords)  # type: ignore[arg-type]


def trainer(run_dir: Path | None = None) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))
    return Trainer(model, nn.MSELoss(), optimizer="sgd", lr=0.1, run_dir=run_dir, seed=0)


@pytest.mark.asyncio
async def test_the_model_learns(store: Path) -> None:
    train, valid = stream(store, split=(0.0, 0.8), shuffle="block"), stream(store, split=(0.8, 1.0))
    result = await trainer().fit(train, validation=valid, max_epochs=5)
    assert result.reason == "completed"
    assert result.metrics["val_loss"] < 0.01


@pytest.mark.asyncio
async def test_a_run_in_two_lives_ends_like_one_in_one(store: Path, tmp_path: Path) -> None:
    whole, second = trainer(), trainer(tmp_path / "run")
    await whole.fit(stream(store, shuffle="block"), max_steps=40)
    await trainer(tmp_path / "run").fit(stream(store, shuffle="block"), max_steps=13)
    result = await second.fit(stream(store, shuffle="block"), max_steps=40, resume="auto")
    assert result.step == 40
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
