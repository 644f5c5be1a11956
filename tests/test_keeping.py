"""What is kept of a fit: of one state one checkpoint, whoever asks for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from torch import nn

from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.trainer import Trainer
from tests.engine import Recorder, Samples, network


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
