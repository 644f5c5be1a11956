"""What hangs is named, with where it stands; and whatever hangs, whoever ends the fit is not kept waiting for ever."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain import checkpoint
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.errors import CheckpointError, UserCodeError
from streamtrain.run_folder import RunFolder
from streamtrain.trainer import Trainer
from tests.engine import Samples, network

Caplog = pytest.LogCaptureFixture


class Hang:
    """Something that does not return before `gate` opens."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()

    def hang_here(self) -> None:
        self.entered.set()
        self.gate.wait(60)


@pytest.fixture
def hang() -> Iterator[Hang]:
    made = Hang()
    yield made
    made.gate.set()


class Hook(Callback):
    def __init__(self, hang: Hang) -> None:
        self.hang = hang

    def on_epoch_begin(self, event: Any) -> None:
        self.hang.hang_here()


class AsyncHook(Callback):
    def __init__(self, hang: Hang) -> None:
        self.hang = hang

    async def on_epoch_end(self, event: Any) -> None:
        self.hang.entered.set()
        await self.hang_here()

    async def hang_here(self) -> None:
        while not self.hang.gate.is_set():  # noqa: ASYNC110  (another thread opens it)
            await asyncio.sleep(0.01)


class Stuck(nn.Module):
    """A model whose third step does not return."""

    def __init__(self, hang: Hang) -> None:
        super().__init__()
        self.inner, self.hang, self.calls = network(), hang, 0

    def forward(self, inputs: torch.Tensor) -> Any:
        self.calls += 1
        if self.calls == 3:
            self.hang.hang_here()
        return self.inner(inputs)


class Late(Samples):
    """A stream whose third batch does not come."""

    def __init__(self, hang: Hang) -> None:
        super().__init__()
        self.gates[16] = Opened(hang)


class Opened(asyncio.Event):
    def __init__(self, hang: Hang) -> None:
        super().__init__()
        self.hang = hang

    async def wait(self) -> bool:  # type: ignore[override]
        await AsyncHook(self.hang).hang_here()
        self.set()
        return True


def fitted(tmp_path: Path, what: str, hang: Hang, patch: pytest.MonkeyPatch, **options: Any) -> tuple[Trainer, Samples]:
    """A trainer in which this hangs, and what it trains on."""
    callbacks: list[object] = [ModelCheckpoint(every="4steps")]
    callbacks += [Hook(hang)] * (what == "a hook") + [AsyncHook(hang)] * (what == "an async hook")
    if what == "a save":
        commit = checkpoint.commit

        def slow(*arguments: Any, **named: Any) -> Any:
            hang.hang_here()
            return commit(*arguments, **named)

        patch.setattr(checkpoint, "commit", slow)
    model = Stuck(hang) if what == "a step" else network()
    options = {"seed": 5, "device": "cpu", "run_dir": tmp_path, "callbacks": callbacks, **options}
    return Trainer(model, nn.MSELoss(), **options), Late(hang) if what == "a batch" else Samples()


NAMES = {
    "a hook": "callback Hook, in on_epoch_begin,",
    "an async hook": "callback AsyncHook, in on_epoch_end,",
    "a save": "the save of step 4",
    "a step": "a job of the train thread",
    "a batch": "the next batch of the training stream",
}


@pytest.mark.parametrize("what", NAMES)
async def test_what_hangs_is_named_once_with_where_it_stands_and_waited_for(
    tmp_path: Path, what: str, hang: Hang, monkeypatch: pytest.MonkeyPatch, caplog: Caplog
) -> None:
    trainer, stream = fitted(tmp_path, what, hang, monkeypatch, watchdog=0.1)
    task = asyncio.create_task(trainer.fit(stream, max_epochs=2))
    said = re.compile(rf"{NAMES[what]} has not come back for .* s, since \d\d:\d\d:\d\d: .*\n(.*\n)*.*in hang_here")
    async with asyncio.timeout(60):
        while not said.search(caplog.text):  # noqa: ASYNC110  (nobody tells of a line)
            await asyncio.sleep(0.01)
        hang.gate.set()
        assert (await task).reason == "completed"
    assert caplog.text.count(f"{NAMES[what]} has not come back") == 1


async def test_nothing_is_named_where_nobody_wants_it(
    tmp_path: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch, caplog: Caplog
) -> None:
    trainer, stream = fitted(tmp_path, "a save", hang, monkeypatch, watchdog=0)
    task = asyncio.create_task(trainer.fit(stream, max_epochs=1))
    while not hang.entered.is_set():  # noqa: ASYNC110  (another thread sets it)
        await asyncio.sleep(0.01)
    hang.gate.set()
    await task
    assert "has not come back" not in caplog.text


@pytest.fixture
async def _nothing_of_ours_runs() -> AsyncIterator[None]:
    yield
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("streamtrain")] == []


@pytest.mark.usefixtures("_nothing_of_ours_runs")
@pytest.mark.parametrize("what", NAMES)
async def test_a_cancelled_fit_ends_whatever_hangs(
    tmp_path: Path, what: str, hang: Hang, monkeypatch: pytest.MonkeyPatch, caplog: Caplog
) -> None:
    trainer, stream = fitted(tmp_path, what, hang, monkeypatch, grace=1)
    task = asyncio.create_task(trainer.fit(stream, max_epochs=2))
    while not (hang.entered.is_set() or what == "a batch"):  # noqa: ASYNC110  (another thread sets it)
        await asyncio.sleep(0.01)
    task.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [name for name in map(asyncio.Task.get_name, asyncio.all_tasks()) if name.startswith("streamtrain")] == []
    if what in ("a save", "a step"):
        assert "where it stands:" in caplog.text
        assert " in hang_here" in caplog.text
        assert "left behind" in caplog.text
    if what != "a save":
        assert "stays locked" not in caplog.text
        again = RunFolder(tmp_path)
        await asyncio.to_thread(again.lock)
        await asyncio.to_thread(again.release)


async def test_no_fit_goes_on_where_a_step_was_left_behind(
    tmp_path: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, stream = fitted(tmp_path, "a step", hang, monkeypatch, grace=0.1)
    task = asyncio.create_task(trainer.fit(stream, max_epochs=2))
    while not hang.entered.is_set():  # noqa: ASYNC110  (another thread sets it)
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(CheckpointError, match="the weights are those of no step"):
        await trainer.fit(Samples(), max_epochs=2)


class StuckInValidation(Stuck):
    """A model that does not return from its third batch of validation."""

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.inner(inputs) if self.training else super().forward(inputs)


async def test_a_cancelled_fit_ends_though_its_validation_hangs(tmp_path: Path, hang: Hang) -> None:
    model = StuckInValidation(hang)
    trainer = Trainer(model, nn.MSELoss(), run_dir=tmp_path, device="cpu", grace=1, sanity_batches=0)
    task = asyncio.create_task(trainer.fit(Samples(), Samples(40)))
    while not hang.entered.is_set():  # noqa: ASYNC110  (another thread sets it)
        await asyncio.sleep(0.01)
    task.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [name for name in map(asyncio.Task.get_name, asyncio.all_tasks()) if name.startswith("streamtrain")] == []


@pytest.mark.usefixtures("_nothing_of_ours_runs")
async def test_an_error_comes_out_though_the_save_after_it_hangs(
    tmp_path: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch, caplog: Caplog
) -> None:
    trainer, stream = fitted(tmp_path, "a save", hang, monkeypatch, watchdog=0.2)
    stream.failures[56] = UserCodeError("the seventh batch")
    async with asyncio.timeout(30):
        with pytest.raises(UserCodeError, match="the seventh batch"):
            await trainer.fit(stream)
    assert "saving after the error failed" in caplog.text
    assert "the thread that waits for it is left behind" in caplog.text
