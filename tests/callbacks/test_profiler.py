"""What the profiler promises: the steps asked for are in the trace, exactly, and nothing of it is there around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain.callbacks.profiler import Profiler
from streamtrain.data.batch import Batch
from streamtrain.errors import ConfigError, UserCodeError
from streamtrain.events import TrainBegin
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


async def test_several_in_a_run_and_other_hooks_of_the_optimizer_go_on(tmp_path: Path) -> None:
    """The first one ended the run when it took its hook away while torch went through them."""
    seen = []

    class Hooked:
        async def on_train_begin(self, event: TrainBegin) -> None:
            await event.on_train_thread(lambda model, optimizer: optimizer.register_step_post_hook(self.seen))

        def seen(self, *_: Any) -> None:
            seen.append(1)

    await fit(tmp_path, 12, Profiler(first=2, last=3), Profiler(first=6, last=9), Hooked())
    assert [updates(path) for path in sorted((tmp_path / "profile").glob("*.json"))] == [2, 4]
    assert len(seen) == 12


async def test_a_process_has_one_profile_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """torch ended the process."""
    both = [Profiler(first=1, last=5), Profiler(first=4, last=8)]
    await fit(tmp_path / "a", 12, *both)
    assert [path.stem for path in (tmp_path / "a" / "profile").glob("*.json")] == ["steps-000000001-000000005"]
    assert caplog.text.count("another profiler is running in this process: no profile of steps 4 to 8") == 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        await fit(tmp_path / "b", 12, Profiler(first=1, last=5))
    assert not (tmp_path / "b" / "profile").exists()
    await fit(tmp_path / "c", 12, Profiler(first=1, last=5))
    assert updates(tmp_path / "c" / "profile" / "steps-000000001-000000005.json") == 5


async def test_after_a_step_that_raised_another_run_is_profiled(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Batch) -> Any:
        loss = nn.functional.mse_loss(model(batch.inputs), batch.targets)
        if batch.cursor.position > 30:
            raise ValueError("no more")
        return loss

    failing = Trainer(network(), step=step, callbacks=[Profiler(first=2, last=9)], run_dir=tmp_path / "a", device="cpu")
    with pytest.raises(UserCodeError, match="no more"):
        await failing.fit(Samples())
    await fit(tmp_path / "b", 12, Profiler(first=1, last=5))
    assert updates(tmp_path / "b" / "profile" / "steps-000000001-000000005.json") == 5


@pytest.mark.parametrize("method", ["start", "stop"])
async def test_a_profiler_that_fails_ends_no_run_and_lets_the_next_one_be_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    class Failing(torch.profiler.profile):
        pass

    def fails(self: Failing) -> None:
        if method == "stop":
            super(Failing, self).stop()
        raise RuntimeError("no counters")

    setattr(Failing, method, fails)
    with monkeypatch.context() as patch:
        patch.setattr("streamtrain.callbacks.profiler.profile", Failing)
        assert (await fit(tmp_path / "a", 12, Profiler(first=2, last=5))).state.step == 12
    assert caplog.text.count("no profile of steps 2 to 5: RuntimeError: no counters") == 1
    assert not (tmp_path / "a" / "profile").exists()
    await fit(tmp_path / "b", 12, Profiler(first=1, last=5))
    assert updates(tmp_path / "b" / "profile" / "steps-000000001-000000005.json") == 5


@pytest.mark.parametrize("options", [{"first": 0}, {"last": "x"}, {"first": 5, "last": 4}, {"stack": 1}], ids=str)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Profiler"):
        Profiler(**options)
