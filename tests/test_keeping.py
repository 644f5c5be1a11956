"""What is kept of a fit: of one state one checkpoint, whoever asks for it."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from streamtrain import checkpoint
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.checkpoint import Committed
from streamtrain.control import Save
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
