"""What the profiler promises: the steps asked for are in the trace, exactly, and nothing of it is there around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain.callbacks.profiler import Profiler
from streamtrain.errors import ConfigError
from streamtrain.trainer import Trainer
from tests.engine import Samples, network, same


async def fit(folder: Path, steps: int, *callbacks: object) -> Trainer:
    trainer = Trainer(network(), nn.MSELoss(), callbacks=callbacks, run_dir=folder, log_every=2, seed=0, device="cpu")
    await trainer.fit(Samples(160), max_steps=steps, resume="auto")
    return trainer


def updates(path: Path) -> int:
    """Updates of the optimizer in a trace."""
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    return len([name for name in names if name.startswith("Optimizer.step#")])


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 4), (3, 8), (6, 6)])
async def test_exactly_the_steps_asked_for_are_profiled(tmp_path: Path, first: int, last: int) -> None:
    trainer = await fit(tmp_path, 12, Profiler(first=first, last=last))
    path = tmp_path / "profile" / f"steps-{first:09d}-{last:09d}.json"
    assert updates(path) == last - first + 1
    assert "aten::addmm" in path.with_suffix(".txt").read_text()
    assert trainer.optimizer is not None
    assert not trainer.optimizer._optimizer_step_post_hooks


async def test_the_weights_are_those_of_a_run_without_it(tmp_path: Path) -> None:
    profiled = await fit(tmp_path / "a", 12, Profiler(first=3, last=6, shapes=True, memory=True, stack=True))
    bare = await fit(tmp_path / "b", 12)
    assert same(profiled.model, bare.model)


async def test_a_run_that_ends_early_writes_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await fit(tmp_path, 5, Profiler(first=4, last=9))
    assert updates(tmp_path / "profile" / "steps-000000004-000000005.json") == 2
    assert "the run ended at step 5: the profile stops there" in caplog.text


async def test_a_run_that_ends_before_or_begins_behind_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await fit(tmp_path, 5, Profiler(first=9, last=9))
    assert "the run ended at step 5, before step 9" in caplog.text
    await fit(tmp_path, 7, Profiler(first=4, last=9))
    assert "the run goes on at step 5, behind step 4" in caplog.text
    assert not (tmp_path / "profile").exists()
    assert not torch.autograd.profiler._is_profiler_enabled


@pytest.mark.parametrize("options", [{"first": 0}, {"last": "x"}, {"first": 5, "last": 4}, {"stack": 1}], ids=str)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Profiler"):
        Profiler(**options)
