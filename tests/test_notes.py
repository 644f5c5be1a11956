"""What any thread leaves for the log is told: lines and media at the step where they were left, whoever lags."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from streamtrain.callbacks.base import Callback
from streamtrain.errors import ConfigError
from streamtrain.events import EpochEnd, Event, Log, Media
from streamtrain.notes import MOST, Notes
from streamtrain.progress import Progress
from streamtrain.trainer import Trainer
from tests.engine import AtStep, Samples, network


class Heard(Callback):
    """Notes the lines and media that it is told of."""

    def __init__(self) -> None:
        self.logs: list[Log] = []
        self.media: list[Media] = []

    async def on_log(self, event: Log) -> None:
        self.logs.append(event)

    async def on_media(self, event: Media) -> None:
        self.media.append(event)


def made(*callbacks: object, **options: Any) -> Trainer:
    return Trainer(network(), nn.MSELoss(), callbacks=callbacks, device="cpu", **options)


async def test_media_reach_the_loggers_with_the_step_where_they_were_left() -> None:
    heard = Heard()
    trainer = made(heard, AtStep(3, lambda: trainer.log_media({"map": np.zeros((2, 3))})))
    await trainer.fit(Samples(80), max_steps=10)
    (event,) = heard.media
    assert list(event.values) == ["map"]
    assert event.step >= 3


async def test_media_of_the_last_hooks_come_before_the_end() -> None:
    ended = threading.Event()

    class Draws(Callback):
        def on_epoch_end(self, event: EpochEnd) -> None:
            ended.wait(0.2)  # the end would come meanwhile, did it not wait for this
            trainer.log_media({"at_the_end": np.zeros(3)})

    class Sees(Callback):
        async def on_train_end(self, event: Event) -> None:
            ended.set()

    heard = Heard()
    trainer = made(heard, Draws(), Sees())
    await trainer.fit(Samples(16), max_epochs=1)
    assert [list(event.values) for event in heard.media] == [["at_the_end"]]


def log(trainer: Trainer) -> None:
    trainer.log_media({"x": np.zeros(3)})


async def test_media_that_nobody_takes_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer = made(AtStep(1, lambda: log(trainer)), AtStep(2, lambda: log(trainer)))
    await trainer.fit(Samples(80), max_steps=5)
    assert caplog.text.count("nobody takes what log_media is given") == 1


async def test_without_a_logger_that_shows_them_media_are_files(tmp_path: Path) -> None:
    trainer = made(AtStep(1, lambda: trainer.log_media({"a/b": np.zeros((2, 2))})), run_dir=tmp_path)
    await trainer.fit(Samples(80), max_steps=5)
    assert [path.suffix for path in (tmp_path / "media" / "a-b").iterdir()] == [".png"]


async def test_media_from_before_a_fit_are_shown_by_it(tmp_path: Path) -> None:
    trainer = made(run_dir=tmp_path)
    trainer.log_media({"first": np.zeros((2, 2))})
    await trainer.fit(Samples(80), max_steps=5)
    trainer.log_media({"between": np.zeros((2, 2))})
    await trainer.fit(Samples(80), max_steps=9)
    shown = sorted(str(path.relative_to(tmp_path / "media")) for path in (tmp_path / "media").rglob("*.png"))
    assert shown == ["between/step-000000005.png", "first/step-000000000.png"]


async def test_a_logger_that_shows_media_replaces_the_folder(tmp_path: Path) -> None:
    heard = Heard()
    trainer = made(heard, AtStep(1, lambda: trainer.log_media({"x": np.zeros((2, 2))})), run_dir=tmp_path)
    await trainer.fit(Samples(80), max_steps=5)
    assert len(heard.media) == 1
    assert not (tmp_path / "media").exists()


async def test_a_callback_adds_numbers_and_lines_through_its_event() -> None:
    class Says(Callback):
        async def on_epoch_begin(self, event: Event) -> None:
            event.log_metrics({"mine": 3.0})
            event.log_metrics({"cpu": 0.5}, split="resource")

    heard = Heard()
    await made(Says(), heard, log_every=5).fit(Samples(80), max_steps=10)
    assert [log.values for log in heard.logs if log.split == "resource"] == [{"cpu": 0.5}]
    assert [log.values.get("mine") for log in heard.logs if log.split == "train"] == [3.0, None]


@pytest.mark.parametrize("hook", ["on_validation_end", "on_epoch_end"])
async def test_numbers_of_the_last_validation_and_epoch_are_in_the_last_line_and_the_result(hook: str) -> None:
    ended = threading.Event()

    class Says(Callback):
        pass

    def says(self: Callback, event: Event) -> None:
        if event.step == 20:
            ended.wait(0.2)  # the last line would come meanwhile, did it not wait for this
        event.log_metrics({"mine": float(event.step)})

    setattr(Says, hook, says)

    class Sees(Callback):
        async def on_log(self, event: Log) -> None:
            if event.step == 20 and event.split == "train":
                ended.set()

    heard = Heard()
    result = await made(Says(), Sees(), heard, log_every=8, sanity_batches=0).fit(
        Samples(80), Samples(24), max_epochs=2
    )
    train = [(log.step, log.values.get("mine")) for log in heard.logs if log.split == "train"]
    assert train == [(8, None), (16, 10.0), (20, 20.0)]
    assert result.metrics["mine"] == 20.0


async def test_numbers_behind_the_last_line_are_in_the_result_and_the_next_fit_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Says(Callback):
        async def on_validation_end(self, event: Event) -> None:
            event.log_metrics({"mine": float(event.step), "val_loss": -1.0})

    heard = Heard()
    trainer = made(Says(), heard, log_every=5, sanity_batches=0)
    for epochs in (1, 2):
        result = await trainer.fit(Samples(80), Samples(24), max_epochs=epochs)
        assert result.metrics["mine"] == 10.0 * epochs
        assert result.metrics["val_loss"] > 0
    train = [(log.step, log.values.get("mine")) for log in heard.logs if log.split == "train"]
    assert train == [(5, None), (10, None), (15, 10.0), (20, None)]
    assert caplog.text.count("log_metrics: 'mine' came behind the last line of the log") == 1


async def test_a_number_that_the_run_logs_itself_is_not_replaced_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Says(Callback):
        async def on_epoch_begin(self, event: Event) -> None:
            event.log_metrics({"loss": 0.5}, split="mine")

        def gauge(self, optimizer: Any, epoch: int) -> dict[str, float]:
            trainer.log_metrics({"grad_norm": -1.0, "val_loss": -1.0, "mine": 3.0})
            return {}

    heard = Heard()
    trainer = made(Says(), heard, log_every=5, gradient_clip_norm=1.0)
    result = await trainer.fit(Samples(80), Samples(24), max_steps=18)
    assert [log.values for log in heard.logs if log.split == "mine"][:1] == [{"loss": 0.5}]
    train = [log.values for log in heard.logs if log.split == "train"]
    assert train[0]["mine"] == train[-1]["mine"] == 3.0
    assert result.metrics["val_loss"] > 0
    assert all(values["grad_norm"] > 0 for values in train)
    for name in ("grad_norm", "val_loss"):
        assert caplog.text.count(f"log_metrics: the run logs a '{name}' of its own") == 1


@pytest.mark.parametrize("clip", [None, 1.0])
async def test_a_step_that_returns_what_the_run_logs_itself_does_not_change_it_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture, clip: float | None
) -> None:
    def step(model: nn.Module, batch: Any) -> dict[str, Any]:
        loss = nn.functional.mse_loss(model(batch.inputs), batch.targets)
        return {"loss": loss, "lr": -1.0, "grad_norm": -1.0, "mine": 3.0}

    alone, beside = Heard(), Heard()
    options: dict[str, Any] = {"log_every": 5, "gradient_clip_norm": clip, "seed": 0}
    await made(alone, **options).fit(Samples(80), max_steps=15)
    trainer = Trainer(network(), step=step, callbacks=[beside], device="cpu", **options)
    result = await trainer.fit(Samples(80), max_steps=15)
    own = {"mine": 3.0} if clip else {"mine": 3.0, "grad_norm": -1.0}
    assert [log.values for log in beside.logs] == [{**log.values, **own} for log in alone.logs]
    assert result.metrics["lr"] > 0
    for name in ("lr", "grad_norm"):
        said = caplog.text.count(f"the step: the run logs a '{name}' of its own")
        assert said == int(name not in own)


async def test_what_is_left_while_no_batch_comes_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamtrain.loop.NOTES", 0.01)
    stream, told = Samples(80), asyncio.Event()
    stream.gates[16] = told  # the third batch comes once the line is told

    class Says(Callback):
        async def on_batch_end(self, event: Event) -> None:
            if event.step == 2:  # and a moment later, so that the wheel stands still
                asyncio.get_running_loop().call_later(0.05, lambda: event.log_metrics({"cpu": 1.0}, split="resource"))

    class Hears(Callback):
        async def on_log(self, event: Log) -> None:
            told.set()

    async with asyncio.timeout(30):
        await made(Says(), Hears()).fit(stream, max_steps=5)


async def test_within_the_train_thread_the_number_of_updates_is_exact() -> None:
    seen: list[tuple[int, int]] = []

    class Asks(Callback):
        async def on_batch_end(self, event: Event) -> None:
            seen.append(await event.on_train_thread(lambda model, optimizer: (event.updates(), _updates(optimizer))))

    await made(Asks()).fit(Samples(80), max_steps=20)
    assert seen
    assert all(told == real for told, real in seen)


def _updates(optimizer: Any) -> int:
    """As the optimizer's own state counts them."""
    return int(next(iter(optimizer.state.values()))["step"])


@pytest.mark.parametrize(
    "leave",
    [
        lambda notes: notes.metrics({"a": 1.0, "b": "x"}),
        lambda notes: notes.media({"a": np.zeros(3), "b": 1}),
        lambda notes: notes.metrics(3),
        lambda notes: notes.metrics({"a": 1.0, "batch": 2.0, "loss": 0.0}),
        lambda notes: notes.metrics({"lr": 0.1}),
        lambda notes: notes.line({"step": 3.0}, "mine"),
        lambda notes: notes.media([np.zeros(3)]),
    ],
)
def test_a_note_that_is_refused_leaves_nothing(leave: Callable[[Notes], None]) -> None:
    notes = Notes(Progress())
    with pytest.raises(ConfigError, match=r"b|what the line of the log tells itself"):
        leave(notes)
    assert (notes.take_metrics(), notes.take()) == ({}, [])


def test_notes_that_nobody_takes_are_bounded_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes(Progress())
    for number in range(MOST + 3):
        notes.line({"n": number}, "resource")
    assert [note.fields["values"]["n"] for note in notes.take()] == list(range(3, MOST + 3))
    assert caplog.text.count("the oldest are dropped") == 1


def test_numbers_that_nobody_takes_are_kept_by_name_alone() -> None:
    notes = Notes(Progress())
    tracemalloc.start()
    try:
        for number in range(20_000):
            notes.metrics({"a": number + 0.5, "b": 1})
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 200_000
    assert notes.take_metrics() == {"a": 19_999.5, "b": 1.0}
    assert notes.take_metrics() == {}
