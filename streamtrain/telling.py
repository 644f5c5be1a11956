"""What a fit says: events to callbacks, lines to the log, the status file. Its law: what it tells has happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from streamtrain.callbacks.bus import Bus
from streamtrain.events import BatchBegin, BatchEnd, Event, Log, Verdict
from streamtrain.life import Life
from streamtrain.plan import Plan
from streamtrain.schedulers import get_lr
from streamtrain.tally import Report
from streamtrain.threads import TrainThread

T = TypeVar("T")


class Teller:
    """Tells where one fit stands."""

    def __init__(
        self,
        life: Life,
        plan: Plan,
        bus: Bus,
        thread: TrainThread,
        *,
        status: Callable[[dict[str, Any]], None],
        said: Callable[[], dict[str, float]],
    ) -> None:
        self._life, self._plan, self._bus, self._thread = life, plan, bus, thread
        self._status, self._said = status, said
        self._base, self._born = life.progress.time, time.monotonic()
        self._status_when = self._born
        self._first_step = life.progress.step

    def elapsed(self) -> float:
        """Seconds of training over the run's life; kept in the progress too."""
        self._life.progress.time = self._base + time.monotonic() - self._born
        return self._life.progress.time

    def standing(self) -> dict[str, Any]:
        """What every event carries."""
        progress, now = self._life.progress, self.elapsed()
        counts = {"epoch": progress.epoch, "step": progress.step, "samples": progress.samples, "time": now}
        return {**counts, "runner": self._on_train_thread}

    async def _on_train_thread(self, fn: Callable[[Any, Any], T]) -> T:
        return await self._thread.run(lambda: fn(self._life.model, self._life.optimizer))

    def wanted(self, hook: str) -> bool:
        """Whether anybody wants such an event."""
        return hook in self._bus.wants

    async def emit(self, hook: str, kind: type[Event], /, **fields: Any) -> None:
        """Tell an event, if anybody wants it."""
        if hook in self._bus.wants:
            await self._bus.emit(hook, kind(**{**self.standing(), **fields}))

    async def ask(self, hook: str, kind: type[Event], /, **fields: Any) -> list[Verdict]:
        """Tell an event, and what the deciders answer."""
        if hook not in self._bus.wants:
            return []
        return await self._bus.ask(hook, kind(**{**self.standing(), **fields}))

    async def heard(self) -> None:
        """Wait until everybody has taken in what was told. Raises what a callback raised."""
        await self._bus.drain()
        self._bus.check()

    async def burst(self, report: Report, waited: float) -> None:
        """The news of a burst, its lines of the log, and now and then the status."""
        life = self._life
        if report.batches:
            self._news(report, waited)
        before = life.progress.samples - report.samples
        for row in report.rows:
            when = self.elapsed() - (time.perf_counter() - row.at)
            values = {**row.values, **self._said()}
            life.metrics.update(values)
            await self.emit("on_log", Log, step=row.step, samples=before + row.samples, time=when, values=values)
        self._bus.check()
        if time.monotonic() - self._status_when > 1.0:
            self.status("running")

    def _news(self, report: Report, waited: float) -> None:
        first: dict[str, Any] = {"first_step": report.first_step, "count": report.batches}
        if "on_batch_begin" in self._bus.wants:
            self._bus.news("on_batch_begin", BatchBegin(**self.standing(), **first))
        if "on_batch_end" in self._bus.wants:
            sums: dict[str, Any] = {"loss_sum": report.loss_sum, "batch_samples": report.samples, "lr": report.lr}
            self._bus.news("on_batch_end", BatchEnd(**self.standing(), **first, **sums, data_wait=waited))

    async def last_line(self) -> None:
        """The log ends with the last step; where another life may go on its lines stay as they would have been."""
        life, progress = self._life, self._life.progress
        values = life.step.tally.window.compute()
        if progress.step > self._first_step and values:
            values = {**values, "lr": get_lr(life.optimizer), **self._said()}
            epoch = progress.epoch if progress.batch else progress.epoch - 1
            await self.emit("on_log", Log, epoch=epoch, values=values)

    def status(self, state: str) -> None:
        """Have the status file say where it stands."""
        self._status_when = time.monotonic()
        standing = self.standing()
        del standing["runner"]
        limits = {"max_epochs": self._plan.max_epochs, "max_steps": self._plan.max_steps}
        self._status({"state": state, **standing, **limits, "metrics": dict(self._life.metrics)})
