"""What the progress bar promises: it tells the truth, in ASCII where it must, and no dead terminal is an error."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import sys
import termios
from collections.abc import Callable
from fcntl import ioctl
from typing import Any, TextIO

import pytest
from torch import nn

from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.defaults import with_defaults
from streamtrain.callbacks.progress_bar import ProgressBar, Standing
from streamtrain.errors import ConfigError
from streamtrain.events import BatchEnd, EpochBegin, Event, Log, TrainBegin, TrainEnd, ValidationBegin, ValidationEnd
from streamtrain.trainer import Trainer
from tests.engine import Samples

EVENTS: list[tuple[str, Event]] = [
    ("on_epoch_begin", EpochBegin(epoch=1)),
    ("on_batch_end", BatchEnd(epoch=1, step=1500, loss_sum=32.0, batch_samples=64, data_wait=0.001, lr=3e-4)),
    ("on_log", Log(values={"loss": 0.5, "größe": 0.25})),
    ("on_validation_begin", ValidationBegin()),
    ("on_validation_end", ValidationEnd(metrics={"val_accuracy": 0.875, "loss": 0.5})),
]


async def show(bar: ProgressBar) -> None:
    async with Bus([bar]) as bus:
        await bus.emit("on_train_begin", TrainBegin(max_epochs=3, steps_per_epoch=1000))
        for hook, event in EVENTS:
            await bus.emit(hook, event)
        await bus.emit("on_train_end", TrainEnd(epoch=1, step=1500, time=3725.0, reason="signal", detail="SIGTERM"))
    bus.check()


def batch(step: int) -> BatchEnd:
    return BatchEnd(epoch=2, step=step, loss_sum=32.0, batch_samples=64, data_wait=0.25, lr=3e-4)


def test_the_facts_are_means_over_what_was_trained_since_the_last_look() -> None:
    standing = Standing(begin=TrainBegin(max_epochs=4, steps_per_epoch=1000), looked=100.0)
    standing.look(100.0)
    standing.lr = 3e-4
    for step in (10, 20):
        standing.now = batch(step)
        standing.news.append(batch(step))
    standing.look(102.0)
    standing.metrics["mae"] = 0.123456
    assert standing.facts() == [
        "epoch 3/4",
        "step 20/4,000",
        "0:06:38 left",
        "loss 0.5",
        "mae 0.1235",
        "lr 0.0003",
        "64 samples/s",
        "loader wait 25.0%",
    ]


async def test_news_that_nobody_looks_at_take_no_more_and_more_memory_and_are_all_told() -> None:
    bar = ProgressBar(stream=io.StringIO())
    standing = bar._standing = Standing(looked=100.0)
    for step in range(3000):
        await bar.on_batch_end(batch(step))
    assert len(standing.news) < 1500
    standing.look(102.0)
    assert (standing.rate, standing.loss, standing.wait) == (3000 * 64 / 2, 0.5, 1.0)


@pytest.mark.parametrize(
    ("begin", "steps"),
    [
        (TrainBegin(), None),
        (TrainBegin(max_steps=7), 7),
        (TrainBegin(max_epochs=2), None),
        (TrainBegin(max_epochs=2, steps_per_epoch=5), 10),
        (TrainBegin(max_epochs=2, steps_per_epoch=5, max_steps=7), 7),
    ],
)
def test_the_end_is_told_where_it_is_known(begin: TrainBegin, steps: int | None) -> None:
    assert Standing(begin=begin).steps == steps


def test_the_time_left_goes_on_from_the_restored_step() -> None:
    begin = TrainBegin(step=900, max_steps=1000)
    standing = Standing(begin=begin, now=begin)
    standing.look(0.0)
    standing.now = batch(910)
    standing.look(1.0)
    assert standing.facts()[1:3] == ["step 910/1,000", "0:00:09 left"], "at the pace of this life"


def test_after_the_last_epoch_no_further_one_is_shown() -> None:
    ended = Standing(begin=TrainBegin(max_epochs=2), now=TrainEnd(epoch=2, step=8))
    assert ended.facts()[0] == "epoch 2/2"
    assert Standing(begin=TrainBegin(), now=TrainEnd(epoch=2)).facts()[0] == "epoch 3"
    beyond = Standing(begin=TrainBegin(max_epochs=2), now=TrainEnd(epoch=5))
    assert beyond.facts()[0] == "epoch 5/2"


async def test_without_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    await show(ProgressBar(stream=stream))
    first, *_, last = stream.getvalue().splitlines()
    assert first.startswith(("epoch 1/3  step 0/3,000", "epoch 2/3  step 1,500/3,000"))
    assert last == "signal: SIGTERM at epoch 2, step 1,500, 1:02:05"
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


async def test_it_goes_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    await show(ProgressBar())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1,500" in captured.err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
async def test_what_the_locale_lacks_is_not_sent(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    await show(ProgressBar(stream=stream))
    assert raw.getvalue().decode(encoding).endswith("1:02:05\n")


def _closed() -> TextIO:
    stream = io.StringIO()
    stream.close()
    return stream


def _broken_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def _full() -> TextIO:
    return open("/dev/full", "w")


@pytest.mark.parametrize("make", [_closed, _broken_pipe, _full])
async def test_a_stream_that_takes_nothing_is_no_error(make: Callable[[], TextIO]) -> None:
    stream = make()
    await show(ProgressBar(stream=stream))
    with contextlib.suppress(OSError):
        stream.close()


async def test_no_stderr_at_all_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    await show(ProgressBar())


class Bare:
    """What some hosts put in its place: it takes texts and knows nothing else."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("make", [lambda: None, _closed, Bare])
async def test_a_trainer_needs_no_stderr(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> None:
    """Windowed processes have none, and could not make a Trainer."""
    monkeypatch.setattr(sys, "stderr", make())
    result = await Trainer(nn.Linear(4, 1), nn.MSELoss(), device="cpu", callbacks=[ProgressBar()]).fit(Samples())
    assert result.reason == "completed"
    assert not any(isinstance(each, ProgressBar) for each in with_defaults([], None, dev=False))


@pytest.mark.parametrize(("encoding", "columns"), [("utf-8", 100), ("ascii", 100), ("ascii", 30), ("utf-8", 1)])
async def test_on_a_terminal_one_line_is_drawn_over_and_over(
    monkeypatch: pytest.MonkeyPatch, encoding: str, columns: int
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    reader, terminal = os.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(terminal, "w", encoding=encoding) as stream:
        await show(ProgressBar(stream=stream))
        raw = b""
        while b"1:02:05" not in raw:  # a terminal hands over what it has so far
            raw += os.read(reader, 1 << 16)
    os.close(reader)
    text = raw.decode(encoding)
    *bars, last = text.rstrip().rsplit("\r\n", 2)
    assert last.startswith("signal: SIGTERM")
    drawn = [re.sub(r"\x1b\[[0-9;]*[mK]|\n", "", bar) for line in bars for bar in line.split("\r") if bar.strip()]
    assert drawn
    assert all(bar.startswith("epoch") for bar in drawn)
    assert all(len(bar) < max(columns, 21) for bar in drawn)
    if columns == 100:
        assert "step 1,500/3,000" in drawn[-1]


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"every": "x"}, {"every": True}, {"every": 1e300}, {"stream": "stderr"}], ids=str
)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ProgressBar(**options)
