"""What a fit says: events to callbacks, lines to the log, the status file. Its law: what it tells has happened."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from streamtrain.callbacks.bus import Bus
from streamtrain.events import BatchBegin, BatchEnd, Event, Log, Verdict
from streamtrain.life import Life
from streamtrain.notes import Notes
from streamtrain.plan import Plan
from streamtrain.tally import Report
from streamtrain.threads import TrainThread

T = TypeVar("T")
logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds for which the last line waits for the numbers of callbacks that lag: a save comes behind it."""


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
        notes: Notes,
    ) -> None:
        self._life, self._plan, self._bus, self._thread = life, plan, bus, thread
        self._status, self._notes = status, notes
        self._base, self._born = life.progress.time, time.monotonic()
        self._status_when = self._born
        self._began_at = self._at()
        self._telling: Report | None = None
        """The burst whose lines are being told."""
        self._unseen = False
        self._refused: set[str] = set()
        """Names of numbers that were left though the run has them already, and that was said."""
        self._own: set[str] = set()
        """Names that lines of the training had themselves."""

    def _at(self) -> tuple[int, int, str]:
        """How far the run is; an epoch's end is made in a life of its own where an error came before it."""
        progress = self._life.progress
        return progress.step, progress.epoch, progress.owes

    def elapsed(self) -> float:
        """Seconds of training over the run's life; kept in the progress too."""
        self._life.progress.time = self._base + time.monotonic() - self._born
        return self._life.progress.time

    def _counts(self) -> dict[str, Any]:
        progress, now = self._life.progress, self.elapsed()
        return {"epoch": progress.epoch, "step": progress.step, "samples": progress.samples, "time": now}

    def standing(self) -> dict[str, Any]:
        """What every event carries."""
        return {**self._counts(), "runner": self._on_train_thread, "desk": self}

    def updates(self) -> int:
        """Updates made by now, those of a burst under way too."""
        return self._life.step.step

    def log(self, values: Mapping[str, Any], split: str | None) -> None:
        """Numbers of a callback: for the next line, or as a line of their own; from any thread."""
        if split is None:
            self._notes.metrics(values)
        else:
            self._notes.line(values, split)

    async def _on_train_thread(self, fn: Callable[[Any, Any], T]) -> T:
        def run() -> T:
            made = fn(self._life.model, self._life.optimizer)
            if self._life.untrained is not None:
                self._life.untrained.tell()  # it is here that parameters are thawed by hand
            return made

        return await self._thread.run(run)

    def wanted(self, hook: str) -> bool:
        """Whether anybody wants such an event."""
        return hook in self._bus.wants

    async def emit(self, hook: str, kind: type[Event], /, **fields: Any) -> None:
        """Tell an event, if anybody wants it, after what was left for the log before.

        What was left before the fit comes behind its beginning: no logger is open sooner.
        """
        if hook != "on_train_begin":
            await self.take_notes()
        if hook in self._bus.wants:
            await self._bus.emit(hook, kind(**{**self.standing(), **fields}))

    async def ask(self, hook: str, kind: type[Event], /, **fields: Any) -> list[Verdict]:
        """Tell an event, and what the deciders answer."""
        await self.take_notes()
        if hook not in self._bus.wants:
            return []
        return await self._bus.ask(hook, kind(**{**self.standing(), **fields}))

    async def heard(self) -> None:
        """Wait until everybody has taken in what was told. Raises what a callback raised."""
        await self._bus.drain()
        self._bus.check()

    @property
    def noted(self) -> bool:
        """Whether something was left for the log that is not told yet."""
        return self._notes.waiting

    async def take_notes(self) -> None:
        """Tell the lines and media that were left for the log."""
        if not self._notes.waiting:
            return
        for note in self._notes.take():
            handles: dict[str, Any] = {"runner": self._on_train_thread, "desk": self}
            when = max(0.0, self._base + note.at - self._born)
            if note.hook in self._bus.wants:
                await self._bus.emit(note.hook, note.kind(**note.fields, **handles, time=when))
            elif not self._unseen:
                self._unseen = True
                logger.warning(
                    "nobody takes what log_media is given: no callback has on_media, and there is no run_dir"
                )

    def at_once(self, report: Report) -> bool:
        """Whether a burst can be told without a wait for any callback."""
        lines = len(report.rows) - report.told
        return not self._notes.waiting and (not lines or self._bus.has_room(lines))

    async def burst(self, report: Report, waited: float) -> None:
        """The news of a burst, its lines of the log, and now and then the status."""
        self._telling = report
        self._news(report, waited)
        await self.take_notes()
        while (line := self._line(report)) is not None:
            await self.emit("on_log", Log, **line)
        self._telling = None
        self._bus.check()
        if time.monotonic() - self._status_when > 1.0:
            self.status("running")

    def burst_nowait(self, reports: Iterable[Report]) -> None:
        """Put into the mailboxes, full or not, what the burst that is being told has left to tell, and then these: a
        checkpoint of what they made is to have their lines, and the one that has no room may be waiting for it."""
        for report in [*([] if self._telling is None else [self._telling]), *reports]:
            self._news(report, 0.0)
            while (line := self._line(report)) is not None:
                if "on_log" in self._bus.wants:
                    self._bus.put("on_log", Log(**{**self.standing(), **line}))

    def _line(self, report: Report) -> dict[str, Any] | None:
        """What the next line of a burst's tells; None where all of them are told."""
        if report.told == len(report.rows):
            return None
        row = report.rows[report.told]
        report.told += 1
        when = self.elapsed() - (time.perf_counter() - row.at)
        values = {**row.values, **self._left_beside(row.values)}
        self._life.metrics.update(values)
        return {"step": row.step, "samples": report.before + row.samples, "time": when, "values": values}

    def _news(self, report: Report, waited: float) -> None:
        if not report.batches or report.announced:
            return
        report.announced = True
        first: dict[str, Any] = {"first_step": report.first_step, "count": report.batches}
        if "on_batch_begin" in self._bus.wants:
            self._bus.news("on_batch_begin", BatchBegin(**self.standing(), **first))
        if "on_batch_end" in self._bus.wants:
            sums: dict[str, Any] = {"loss_sum": report.loss_sum, "batch_samples": report.samples, "lr": report.lr}
            self._bus.news("on_batch_end", BatchEnd(**self.standing(), **first, **sums, data_wait=waited))

    def _left_beside(self, own: Mapping[str, float]) -> dict[str, float]:
        """The numbers that were left for a line; of a name that the line has already, or a validation, theirs stands,
        which is said."""
        left = self._notes.take_metrics()
        self._own |= own.keys()
        for name in sorted(left.keys() & (own.keys() | self._life.validated)):
            del left[name]
            if name not in self._refused:
                self._refused.add(name)
                logger.warning("log_metrics: the run logs a %r of its own, which stands; name yours otherwise", name)
        return left

    async def last_line(self) -> dict[str, float]:
        """The log ends with the last step; where another life may go on its lines stay as they would have been. The
        metrics with those of the line, which a life that made no step has too: for the result, not for a checkpoint,
        which some earlier save may have made."""
        life, progress = self._life, self._life.progress
        means = life.step.tally.window.compute()
        read = await self._thread.run(life.step.gauged)  # as in a burst: a gauge may ask the device
        if means and self._began_at != self._at():  # else the line is there
            with contextlib.suppress(TimeoutError):  # what callbacks say of the last validation and epoch goes with it
                async with asyncio.timeout(PATIENCE):
                    await self._bus.drain()
            read = {**read, **self._left_beside({**means, **read})}
            epoch = progress.epoch if progress.batch else progress.epoch - 1
            await self.emit("on_log", Log, epoch=epoch, values={**means, **read})
            life.line_told = True
        return {**means, **life.metrics, **read}  # an epoch's means stand

    async def last_notes(self) -> None:
        """Before loggers hear of the end: what callbacks still leave in the hooks that they were told of. Numbers for
        which no line comes any more are in the result, and said."""
        await self._bus.drain()
        await self.take_notes()
        if self._began_at == self._at():
            return
        left = {name: value for name, value in self._notes.numbers().items() if name not in self._own}
        late = {name: value for name, value in left.items() if name not in self._life.validated}
        self._life.metrics.update(late)
        if late and not self._notes.late_said:
            self._notes.late_said = True
            logger.warning(
                "log_metrics: %s came behind the last line of the log: the fit's result has it, and the first line of "
                "a next fit; event.log_metrics(..., split='mine') makes a line at once",
                ", ".join(map(repr, sorted(late))),
            )

    def status(self, state: str) -> None:
        """Have the status file say where it stands."""
        self._status_when = time.monotonic()
        limits = {"max_epochs": self._plan.max_epochs, "max_steps": self._plan.max_steps}
        self._status({"state": state, **self._counts(), **limits, "metrics": dict(self._life.metrics)})
