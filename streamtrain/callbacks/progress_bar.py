"""How far a fit has come, on stderr: one line drawn over and over on a terminal, plain lines at a low rate elsewhere.

Its law: looking on costs the training nothing. Hooks only add to sums; a thread of our own draws. A terminal that went
away, a closed pipe or a locale without UTF-8 never raise: what can't be shown is not shown.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TextIO, cast

from rich.console import Console
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.mailbox import coalesce
from streamtrain.errors import ConfigError
from streamtrain.events import (
    BatchEnd,
    EpochBegin,
    Event,
    Log,
    TrainBegin,
    TrainEnd,
    ValidationBegin,
    ValidationEnd,
)

_SPAN = 30.0
"""Seconds of the past from which the time left is told."""
_SHOWN = 3
"""Metrics shown beside the loss."""
_NEWS = 1000
"""Batch events that wait for a look; further ones are merged: nobody may look any more, at a pipe that was closed."""


@dataclass(slots=True)
class Standing:
    """What there is to show; hooks write on the loop, `facts` reads on the drawing thread."""

    begin: TrainBegin = field(default_factory=TrainBegin)
    now: Event = field(default_factory=Event)
    lr: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    validating: bool = False
    loss: float = math.nan
    rate: float = math.nan
    wait: float = math.nan
    news: deque[BatchEnd] = field(default_factory=deque)
    past: deque[tuple[float, int]] = field(default_factory=deque)
    """(clock, step) of the last `_SPAN` seconds."""
    looked: float = 0.0

    def hear(self, event: BatchEnd) -> None:
        """Add a batch event, on the loop."""
        if len(self.news) >= _NEWS:
            with suppress(IndexError):  # it was looked at just now
                event = cast(BatchEnd, coalesce(self.news.pop(), event))
        self.news.append(event)

    def look(self, clock: float) -> None:
        """Bring loss, rate and wait up to date with the batches since the last look."""
        taken: list[BatchEnd] = []
        while self.news:
            taken.append(self.news.popleft())
        span, self.looked = clock - self.looked, clock
        self.past.append((clock, self.now.step))
        while self.past[0][0] < clock - _SPAN and len(self.past) > 2:
            self.past.popleft()
        samples = sum(event.batch_samples for event in taken)
        if samples and span > 0:
            self.loss = sum(event.loss_sum for event in taken) / samples
            self.rate = samples / span
            self.wait = min(1.0, sum(event.data_wait for event in taken) / span)

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None where nobody knows."""
        begin = self.begin
        bounds = [] if begin.max_steps is None else [begin.max_steps]
        if begin.max_epochs is not None and begin.steps_per_epoch is not None:
            bounds.append(begin.max_epochs * begin.steps_per_epoch)
        return min(bounds, default=None)

    @property
    def left(self) -> float | None:
        """Seconds to the end at the pace of the last half minute; None where nobody knows."""
        if self.steps is None or not self.past:
            return None
        (began, first), (ended, last) = self.past[0], self.past[-1]
        if last <= first:
            return None
        return max(0, self.steps - last) * (ended - began) / (last - first)

    def epoch(self, now: Event) -> int:
        """The epoch as people count; once all are finished, or more than are asked for now, the last one."""
        last = self.begin.max_epochs
        return now.epoch if last is not None and now.epoch >= last > 0 else now.epoch + 1

    def facts(self) -> list[str]:
        """What is shown, the most important first: a narrow terminal cuts the rest off."""
        begin, now = self.begin, self.now
        of = "" if begin.max_epochs is None else f"/{begin.max_epochs}"
        facts = [f"epoch {self.epoch(now)}{of}", f"step {now.step:,}" + (f"/{self.steps:,}" if self.steps else "")]
        if self.left is not None:
            facts.append(f"{_clock(self.left)} left")
        if self.validating:
            facts.append("validating")
        if not math.isnan(self.rate):
            facts.append(f"loss {self.loss:.4g}")
        facts += [f"{name} {value:.4g}" for name, value in list(self.metrics.items())[:_SHOWN]]
        if not math.isnan(self.lr):
            facts.append(f"lr {self.lr:.3g}")
        if not math.isnan(self.rate):
            facts += [f"{self.rate:,.0f} samples/s", f"loader wait {self.wait:.1%}"]
        return facts


class ProgressBar(Callback):
    """Shows epoch, step, loss, metrics, learning rate, samples/s, the share of time waited for data, and time left.

    `stream`: where to, None for stderr. On a terminal a bar is drawn four times a second; elsewhere a plain line is
    written each `every` seconds, after each validation, and at both ends.
    """

    def __init__(self, *, stream: TextIO | None = None, every: float = 10.0) -> None:
        if stream is not None and not hasattr(stream, "write"):
            raise ConfigError(f"ProgressBar: stream must be an open text file such as sys.stderr, not {stream!r}")
        if type(every) not in (int, float) or not 0 < every <= threading.TIMEOUT_MAX:
            raise ConfigError(f"ProgressBar: every must be a number of seconds above 0, not {every!r}")
        self._given = stream
        self._every = every
        self._standing = Standing()
        self._stream: TextIO | None = None
        self._bar = False
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    async def on_train_begin(self, event: TrainBegin) -> None:
        """Start to show."""
        self._standing = Standing(begin=event, now=event, looked=time.perf_counter())
        self._stream = sys.stderr if self._given is None else self._given
        self._bar = _draws(self._stream)
        self._stop, self._wake = threading.Event(), threading.Event()
        self._wake.set()
        # A daemon, so that a terminal which takes no more output cannot keep the process from ending.
        self._thread = threading.Thread(target=self._draw, name="streamtrain-progress", daemon=True)
        self._thread.start()

    def on_train_end(self, event: TrainEnd) -> None:
        """Show the end and join the thread."""
        self._standing.now = event
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
            if self._thread.is_alive():  # whoever should read does not: the fit waits no longer
                self._stream = None
            self._thread = None
        reason = f"{event.reason}: {event.detail}" if event.detail else event.reason
        if self._bar:
            self._write(self._line() + "\n")
        self._write(
            _plain(
                self._stream,
                f"{reason} at epoch {self._standing.epoch(event)}, step {event.step:,}, {_clock(event.time)}\n",
            )
        )

    async def on_epoch_begin(self, event: EpochBegin) -> None:
        """An epoch begins."""
        self._standing.now = event

    async def on_batch_end(self, event: BatchEnd) -> None:
        """Add to the sums."""
        self._standing.now = event
        self._standing.lr = event.lr
        self._standing.hear(event)

    async def on_log(self, event: Log) -> None:
        """Remember the newest metrics."""
        self._standing.metrics.update(_others(event.values))

    async def on_validation_begin(self, event: ValidationBegin) -> None:
        """Say that a validation runs."""
        self._standing.validating = True

    async def on_validation_end(self, event: ValidationEnd) -> None:
        """Show its metrics."""
        self._standing.validating = False
        if not event.sanity:
            values = {name: value for name, value in event.metrics.items() if name.startswith("val_")}
            self._standing.metrics = {**values, **self._standing.metrics, **values}
            self._wake.set()

    def _draw(self) -> None:
        every = 0.25 if self._bar else self._every
        while self._stream is not None:
            self._wake.wait(every)
            if self._stop.is_set():
                return
            self._wake.clear()
            self._standing.look(time.perf_counter())
            self._write(self._line() if self._bar else _plain(self._stream, "  ".join(self._standing.facts()) + "\n"))

    def _line(self) -> str:
        """The bar as it goes to the terminal, over the one before."""
        stream = self._stream
        if stream is None:
            return ""
        try:
            width = os.get_terminal_size(stream.fileno()).columns
        except (OSError, ValueError):
            width = 80
        console = Console(file=stream, force_terminal=True, width=max(width - 1, 20), legacy_windows=False)
        table = Table.grid(padding=(0, 1))
        first, *rest = self._standing.facts()
        total, step = self._standing.steps, self._standing.now.step
        bar = Bar(total=total, completed=min(step, total or 0), width=min(24, width // 8), pulse=total is None)
        table.add_row(first, bar, Text(_plain(stream, "  ".join(rest)), no_wrap=True, overflow="crop"))
        try:
            with console.capture() as captured:
                console.print(table, end="", no_wrap=True, overflow="crop", crop=True)
        except (OSError, ValueError):  # at its end it flushes what the stream still holds
            self._stream = None
            return ""
        return "\r\x1b[2K" + captured.get().replace("\n", "")

    def _write(self, text: str) -> None:
        """Write if there is still somewhere to write to."""
        stream = self._stream
        if stream is None:
            return
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):  # closed by us or by whoever read it
            self._stream = None


def _others(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in ("loss", "lr")}


def on_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at it: of a process without a terminal stderr may be None, closed, or any object."""
    try:
        return stream is not None and bool(stream.isatty())
    except (AttributeError, ValueError):  # ValueError: closed
        return False


def _draws(stream: TextIO | None) -> bool:
    """Whether a line can be drawn over and over."""
    return on_terminal(stream) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _plain(stream: TextIO | None, text: str) -> str:
    """The text with what the stream's encoding lacks escaped."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
