"""What is kept of a fit: of one state one checkpoint, whoever asks for it."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from streamtrain import checkpoint, keeping
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.checkpoint import Committed
from streamtrain.control import Save
from streamtrain.data.batch import Batch
from streamtrain.errors import UserCodeError
from streamtrain.events import BatchEnd, CheckpointCommitted, EpochEnd, Event, Log, ValidationEnd
from streamtrain.trainer import Trainer
from tests.engine import AtStep, Recorder, Samples, network


async def test_saves_that_are_asked_for_at_once_are_one_and_all_who_asked_are_told(tmp_path: Path) -> None:
    recorder, rare = Recorder(), ModelCheckpoint(every="1000steps")
    trainer = Trainer(network(), nn.MSELoss(), device="cpu", run_dir=tmp_path, callbacks=[recorder, rare])
    trainer.pause()
    fit = asyncio.create_task(trainer.fit(Samples(), max_steps=3))
    await asyncio.sleep(0)
    trainer.request_checkpoint()
    asked = [trainer.save_checkpoint(), trainer.save_checkpoint(tmp_path / "other"), trainer.save_checkpoint()]
    own = tmp_path / "checkpoints" / "step-000000000"
    assert await asyncio.gather(*asked) == [own, tmp_path / "other", own]
    trainer.resume()
    await fit
    assert [(event.step, event.kind) for event in recorder.events("on_checkpoint")] == [
        (0, "request"),
        (0, "request"),
        (3, "end"),
    ]


def saves(recorder: Recorder) -> list[tuple[int, str]]:
    return [(event.step, event.kind) for event in recorder.events("on_checkpoint")]


async def test_a_state_that_is_saved_is_not_saved_again_at_the_end(tmp_path: Path) -> None:
    recorder = Recorder()
    rule = ModelCheckpoint(every="10steps")
    trainer = Trainer(network(), nn.MSELoss(), device="cpu", run_dir=tmp_path, callbacks=[recorder, rule])
    await trainer.fit(Samples(), max_steps=10)
    assert saves(recorder) == [(10, "periodic")]


async def test_a_state_that_is_saved_elsewhere_is_saved_in_the_runs_folder_too(tmp_path: Path) -> None:
    def act() -> None:
        trainer.control.save(Save(tmp_path / "other"))
        trainer.stop()

    recorder, rare = Recorder(), ModelCheckpoint(every="1000steps")
    trainer = Trainer(
        network(), nn.MSELoss(), device="cpu", run_dir=tmp_path / "run", callbacks=[recorder, rare, AtStep(3, act)]
    )
    result = await trainer.fit(Samples(), max_epochs=1000)
    assert saves(recorder) == [(result.step, "request"), (result.step, "end")]
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / f"step-{result.step:09d}"


class Steering(Callback):
    """Does something while the wheel waits for it, once."""

    decides = True

    def __init__(self, act: Callable[[], Awaitable[object]]) -> None:
        self.act, self.done = act, False

    async def on_validation_end(self, event: ValidationEnd) -> None:
        if not self.done:
            self.done = True
            await self.act()


def steered(folder: Path, act: Callable[[], Awaitable[object]]) -> Trainer:
    callbacks = [Steering(act), ModelCheckpoint(every="1000steps", save_top_k=0)]
    more: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "sanity_batches": 0, "callbacks": callbacks}
    return Trainer(network(), nn.MSELoss(), device="cpu", run_dir=folder, **more)


def rate(path: Path | None) -> float:
    assert path is not None
    return float(checkpoint.read(path).optimizer["param_groups"][0]["lr"])


async def test_a_save_that_is_asked_for_behind_a_learning_rate_has_it(tmp_path: Path) -> None:
    async def act() -> None:
        trainer.set_lr(0.01)
        saved.append(await trainer.save_checkpoint())

    saved: list[Path] = []
    trainer = steered(tmp_path, act)
    await trainer.fit(Samples(), Samples(), max_epochs=2)
    assert await asyncio.to_thread(rate, saved[0]) == pytest.approx(0.01)


async def test_a_learning_rate_that_is_set_behind_a_save_of_the_same_step_is_not_lost_at_a_stop(tmp_path: Path) -> None:
    class Paused(Trainer):
        def training_step(self, model: nn.Module, batch: Batch) -> Any:
            if self.state.step == 3:
                self.request_checkpoint()
                self.pause()
            return super().training_step(model, batch)

    class Steers(Callback):
        async def on_checkpoint(self, event: CheckpointCommitted) -> None:
            if event.kind == "request":
                trainer.set_lr(0.01)
                trainer.stop()

    rare = ModelCheckpoint(every="1000steps")
    more: dict[str, Any] = {"device": "cpu", "run_dir": tmp_path, "optimizer": "sgd", "lr": 0.1}
    trainer = Paused(network(), nn.MSELoss(), callbacks=[Steers(), rare], **more)
    result = await trainer.fit(Samples(), max_epochs=2)
    assert result.step == 4
    assert await asyncio.to_thread(rate, result.checkpoint) == pytest.approx(0.01)


async def test_a_save_each_epoch_is_none_at_a_validation_within_it(tmp_path: Path) -> None:
    recorder, rule = Recorder(), ModelCheckpoint(every="1epoch", save_top_k=0)
    trainer = Trainer(
        network(),
        nn.MSELoss(),
        device="cpu",
        run_dir=tmp_path,
        callbacks=[recorder, rule],
        validate_every="3steps",
        sanity_batches=0,
    )
    await trainer.fit(Samples(), Samples(16), max_epochs=1)
    assert saves(recorder) == [(13, "periodic")]


async def test_many_periodic_saves_in_one_that_is_under_way_are_said_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, made = checkpoint.commit, threading.Event()

    def slow(*arguments: Any, **named: Any) -> Committed:
        assert made.wait(20)  # until the last step of the run
        return commit(*arguments, **named)

    monkeypatch.setattr(checkpoint, "commit", slow)
    trainer = Trainer(
        network(),
        nn.MSELoss(),
        device="cpu",
        run_dir=tmp_path,
        callbacks=[ModelCheckpoint(every="2steps"), AtStep(9, made.set)],
    )
    await trainer.fit(Samples(), max_steps=10)
    said = [record.getMessage() for record in caplog.records if "joined with" in record.getMessage()]
    assert said[0].startswith("a save is due at step 4 while the one before is under way")
    assert re.fullmatch(r"[2-4] saves were due while another was under way: joined with later ones", said[-1])


class Lagging(Callback):
    """Counts batches, epochs and lines in its state; from the fourth step on it waits at its gate for each of them."""

    def __init__(self) -> None:
        self.counts = {"batches": 0, "epochs": 0, "lines": 0}
        self.gate = asyncio.Event()

    async def on_batch_end(self, event: BatchEnd) -> None:
        await self._count("batches", event, event.count)

    async def on_epoch_end(self, event: EpochEnd) -> None:
        await self._count("epochs", event)

    async def on_log(self, event: Log) -> None:
        await self._count("lines", event)

    async def _count(self, what: str, event: Event, more: int = 1) -> None:
        if event.step >= 4:
            await self.gate.wait()
        self.counts[what] += more

    def state_dict(self) -> dict[str, Any]:
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = dict(state)


class Opening(Callback):
    """Opens a gate at a step, and perhaps raises then."""

    decides = True

    def __init__(self, gate: asyncio.Event, step: int, hook: str = "on_batch_end", error: Exception | None = None):
        self._gate, self._step, self._error = gate, step, error
        setattr(self, hook, self._opens)

    async def _opens(self, event: Event) -> None:
        if event.step >= self._step:
            self._gate.set()
            if self._error is not None:
                raise self._error


def lagging_states(folder: Path) -> dict[int, dict[str, int]]:
    """By the step of each checkpoint."""
    entries = checkpoint.scan(folder / "checkpoints")
    return {entry.step: checkpoint.read(entry.path).state["callbacks"]["Lagging"] for entry in entries}


def fitted(folder: Path, *callbacks: object) -> Trainer:
    return Trainer(network(), nn.MSELoss(), seed=5, device="cpu", log_every=1, run_dir=folder, callbacks=callbacks)


async def test_a_save_waits_for_the_state_of_a_callback_that_lags_and_training_does_not(tmp_path: Path) -> None:
    lagging = Lagging()
    opening, rule = Opening(lagging.gate, 20), ModelCheckpoint(every="5steps", keep_last=-1)
    result = await fitted(tmp_path, lagging, opening, rule).fit(Samples(), max_steps=30)
    states = await asyncio.to_thread(lagging_states, tmp_path)
    assert {5, 30} <= states.keys()
    assert states == {step: {"batches": step, "epochs": step // 13, "lines": step} for step in states}, (
        "an event that was told is in no checkpoint's state, or in one of before"
    )
    assert result.step == 30


async def test_a_life_that_goes_on_from_a_failed_question_tells_those_that_lagged_again(tmp_path: Path) -> None:
    lagging = Lagging()
    opening = Opening(lagging.gate, 13, "on_epoch_end", ValueError("not now"))
    with pytest.raises(UserCodeError, match="not now"):
        await fitted(tmp_path, lagging, opening).fit(Samples(), max_steps=30)
    assert await asyncio.to_thread(lagging_states, tmp_path) == {13: {"batches": 13, "epochs": 0, "lines": 13}}
    again = Lagging()
    again.gate.set()
    await fitted(tmp_path, again).fit(Samples(), max_steps=30, resume="auto")
    assert again.counts == {"batches": 30, "epochs": 2, "lines": 30}


async def test_a_state_of_before_is_put_down_before_its_callback_is_given_anything_more(tmp_path: Path) -> None:
    class Looks(Lagging):
        seen: object = None

        async def on_epoch_end(self, event: EpochEnd) -> None:
            await super().on_epoch_end(event)
            life = trainer._run.life
            assert life is not None
            self.seen = self.seen or life.state()["callbacks"]["Looks"]  # as a save at this very moment would

    looks = Looks()
    opening = Opening(looks.gate, 13, "on_epoch_end", ValueError("not now"))
    trainer = fitted(tmp_path, looks, opening)
    with pytest.raises(UserCodeError, match="not now"):
        await trainer.fit(Samples(), max_steps=30)
    assert looks.seen == {"batches": 13, "epochs": 0, "lines": 13}


@pytest.mark.parametrize("error", [ValueError("not now"), None], ids=["failed", "answered"])
async def test_what_is_saved_while_deciders_are_asked_is_of_before_for_those_that_are_slow_then(
    tmp_path: Path, error: Exception | None
) -> None:
    class Slow(Callback):
        def __init__(self) -> None:
            self.told: list[int] = []
            self.gate = asyncio.Event()

        async def on_batch_end(self, event: BatchEnd) -> None:
            self.told += range(event.first_step, event.first_step + event.count)

        async def on_validation_end(self, event: ValidationEnd) -> None:
            await self.gate.wait()
            self.told.append(event.step)

        def state_dict(self) -> dict[str, Any]:
            return {"told": list(self.told)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.told = list(state["told"])

    class Saves(Callback):
        decides = True

        async def on_validation_end(self, event: ValidationEnd) -> None:
            await trainer.save_checkpoint(kept)
            if error is not None:
                asyncio.get_running_loop().call_later(0.2, slow.gate.set)
                raise error
            slow.gate.set()

    kept = tmp_path / "kept"
    slow = Slow()
    options: dict[str, Any] = {"seed": 5, "device": "cpu", "log_every": 1, "run_dir": tmp_path, "sanity_batches": 0}
    rare = ModelCheckpoint(every="1000steps", save_top_k=0)
    trainer = Trainer(network(), nn.MSELoss(), callbacks=[slow, Saves(), rare], **options)
    with nullcontext() if error is None else pytest.raises(UserCodeError, match="not now"):
        await trainer.fit(Samples(), Samples(20, seed=3), max_steps=13)
    again = Slow()
    again.gate.set()
    other = Trainer(network(), nn.MSELoss(), callbacks=[again, rare], **options)
    await other.fit(Samples(), Samples(20, seed=3), max_steps=13, resume="auto" if error is not None else kept)
    assert again.told == [*range(1, 14), 13], "the end of the validation is told once"


async def test_a_save_waits_only_so_long_for_a_callback_that_lags_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeping, "_LATE", 0.01)
    lagging = Lagging()
    rule = ModelCheckpoint(every="5steps")
    opening = Opening(lagging.gate, 5, "on_checkpoint")
    await fitted(tmp_path, lagging, opening, rule).fit(Samples(), max_steps=5)
    assert caplog.text.count("callback Lagging had not taken in all that it was told") == 1


async def test_a_save_waits_for_no_callback_until_the_grace_is_spent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lagging = Lagging()
    opening = Opening(lagging.gate, 5, "on_checkpoint")
    trainer = fitted(tmp_path, lagging, opening, AtStep(5, lambda: trainer.control.stop("signal", within=8)))
    assert (await trainer.fit(Samples(), max_steps=10**6)).checkpoint is not None
    assert "left behind" not in caplog.text
    assert caplog.text.count("callback Lagging had not taken in all that it was told") == 1


async def test_a_hook_that_waits_for_a_save_is_not_waited_for_by_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Saves(Lagging):
        trainer: Trainer

        async def on_batch_end(self, event: BatchEnd) -> None:
            if event.step >= 4:
                self.path = await self.trainer.save_checkpoint()

    monkeypatch.setattr(keeping, "_LATE", 10**6)
    saves = Saves()
    saves.gate.set()
    saves.trainer = fitted(tmp_path, saves, ModelCheckpoint(every="2steps"))
    await saves.trainer.fit(Samples(), max_steps=12)
    assert saves.path.is_dir()
