"""The wheel: one coroutine that turns batches into a trained model.

    tell all that training begins; look at some validation batches, so that what is broken there breaks now
    do what was asked for already
    until a limit is reached or a stop was asked for:
        go to the epoch's order; tell that it begins
        while the epoch has batches:
            run a burst of updates on the train thread, to the nearest of 20 ms, the next save or validation, the end
            tell the batches and the lines of the log (the next burst runs meanwhile)
            unless the epoch has ended: validate and save if it is time
            do what was asked for: learning rate, saves, pause
        if it ended: validate, tell its means, step the learning rate, stop or save as the deciders say
    save; load the best weights if that is wanted; tell that training ended

Its law: between two awaits the counts, the position and the weights belong to the same finished update.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from streamtrain.control import Control
from streamtrain.data.source import Stream
from streamtrain.driving import Driver
from streamtrain.errors import DataError, words
from streamtrain.evaluation import Evaluator, Stopped
from streamtrain.events import (
    EpochBegin,
    EpochEnd,
    Event,
    ExceptionRaised,
    Interrupt,
    TrainBegin,
    TrainEnd,
    ValidationBegin,
    ValidationEnd,
    Verdict,
)
from streamtrain.keeping import Keeper
from streamtrain.life import Life
from streamtrain.plan import Plan
from streamtrain.supply import Supply
from streamtrain.tally import Report
from streamtrain.telling import Teller
from streamtrain.threads import TrainThread

logger = logging.getLogger(__name__)

OVER = ("completed", "early_stopping", "max_time")
"""The reasons for which a run ends that is not to go on."""
NOTES = 5.0
"""Seconds after which what callbacks leave for the log is told, where no batch comes."""


class Wheel:
    """Turns for one fit."""

    def __init__(
        self,
        life: Life,
        plan: Plan,
        *,
        validation: Mapping[str, Stream],
        evaluator: Evaluator,
        control: Control,
        thread: TrainThread,
        driver: Driver,
        teller: Teller,
        keeper: Keeper,
        patience: float | None = None,
    ) -> None:
        """`patience`: seconds for which a save after an error is waited for."""
        assert life.stream is not None
        self._life, self._plan = life, plan
        self._validation, self._evaluator = validation, evaluator
        self._control, self._thread = control, thread
        self._driver, self._teller, self._keeper = driver, teller, keeper
        self._progress, self._step, self._stream = life.progress, life.step, life.stream
        self._patience = patience
        self._stop: tuple[str, str] | None = None
        self._interrupted = self._told_line = self._told_end = False
        self._last: dict[str, float] = {}
        """The metrics with those of the last line, where that is told."""
        self._validated = life.progress.step
        """The last step whose validation within an epoch is made; before this life they are, or are owed."""

    async def turn(self) -> tuple[str, str]:
        """Train to the end; reason and detail of the end. Raises what went wrong, after having saved."""
        try:
            await self._begin()
            await self._obey_requests()
            while not self._over():
                await self._epoch()
            reason, detail = self._ending()
            await self._finish(reason, detail)
        except BaseException as error:
            await self._fail(error)
            raise
        self._control.unbind()
        return reason, detail

    async def _begin(self) -> None:
        await self._emit("on_train_begin", TrainBegin, **self._plan.announcement)
        await self._keeper.attend(self._teller.heard())
        if self._plan.sanity and self._validation:
            with contextlib.suppress(Stopped):
                await self._validate(sanity=True)

    async def _epoch(self) -> None:
        """One epoch, or the rest of it."""
        progress, driver = self._progress, self._driver
        if self._plan.overfit and not progress.batch:
            self._stream.set_epoch(1)  # a resumed pass would go on behind the last of the first batches
        self._stream.set_epoch(self._plan.stream_epoch(progress.epoch))
        await self._emit("on_epoch_begin", EpochBegin)
        if progress.owes.startswith("epoch"):
            return await self._end_epoch()
        updated = False
        async with driver.batches() as batches:
            await self._make_up(batches)
            while driver.ahead or await self._ready(batches):
                report = await driver.burst(self._most_updates, wanted=self._wanted)
                if report is not None:
                    await self._tell(report)
                    updated = updated or report.updates > 0
                if updated and not driver.ahead and not self._step.partial:  # else what is due waits
                    updated = False
                    if self._due():
                        await self._after_due(batches)
                    await self._obey_requests()
            ended = batches.finished_nowait() and not self._step.partial  # else its last group is still to be trained
            await driver.leave_partial()
        if ended:
            await self._end_epoch()
        return None

    async def _tell(self, report: Report) -> None:
        """All of a burst, and then the error that ended it: the lines of the updates before are in no later log."""
        telling = self._teller.burst(report, self._driver.take_waited())
        try:
            await (telling if self._teller.at_once(report) else self._keeper.attend(telling))
        finally:
            if report.error is not None:
                raise report.error
        self._keeper.check()

    def _wanted(self) -> bool:
        """Whether anything is to be done once no burst is under way."""
        return self._control.pending or self._control.paused or self._over() or self._due()

    async def _make_up(self, batches: Supply) -> None:
        """What the life before owes to its last update, unless that ended an epoch, where all waits for its end."""
        progress = self._progress
        if not progress.owes:
            return
        finished = await self._finished(batches)
        if progress.owes == "validation" and not finished:
            await self._validate_now()
        elif progress.owes == "validation" or not (finished or self._stopping()):
            if progress.owes == "validation":
                self._validated = -1  # it is made at the epoch's end
            progress.owes = ""

    async def _after_due(self, batches: Supply) -> None:
        """What is due after the last update; at an epoch's end it comes with that, and is owed until then."""
        finished = await self._finished(batches)
        if not finished:
            await self._between()
        if finished or (self._stopping() and self._plan.batches is None):  # a stop waits for no batch that would tell
            self._owe_end()

    async def _between(self) -> None:
        """What is due after an update that does not end an epoch."""
        if self._plan.validation_due(self._progress):
            await self._validate_now()
        if not self._progress.owes:
            await self._tell_last_line()
            await self._keeper.save_if_due(self._progress.epoch)

    async def _end_epoch(self) -> None:
        """Metrics, validation, callbacks, learning rate, early stopping: in this order."""
        progress, metrics = self._progress, self._life.metrics
        if not progress.batch:
            raise DataError("the training stream gave no batch", hint="Check its split, its filters and drop_last.")
        means = self._step.tally.epoch.compute()
        # Where all that came behind the last update was batches without rows, nobody knew then that it was the last.
        made = not progress.owes and self._plan.validation_due(progress) and self._validated == progress.step
        if progress.owes in ("", "end"):
            metrics.update(means)
            progress.owes = "epoch"
            self._driver.ended()
        if progress.owes == "epoch":
            if not made and self._plan.validation_due(progress, epoch_end=True):
                try:
                    progress.verdicts = await self._validate()
                except Stopped:
                    return
            progress.owes = "epoch_end"
        validated = self._plan.validated(progress)
        found = {name: value for name, value in metrics.items() if validated and name.startswith("val_")}
        told = await self._keeper.ask("on_epoch_end", EpochEnd, metrics=means | found)
        verdicts = progress.verdicts + told
        self._life.lr.after_epoch(metrics, validated=validated)
        ended, progress.owes, progress.verdicts = progress.epoch, "", []
        progress.epoch, progress.batch, progress.passed = ended + 1, 0, 0
        self._step.tally.epoch.reset()
        self._stream.set_epoch(self._plan.stream_epoch(progress.epoch))
        await self._obey(verdicts, ended)
        await self._keeper.save_if_due(ended, epoch_end=True)
        await self._obey_requests()

    async def _emit(self, hook: str, kind: type[Event], /, **fields: Any) -> None:
        if self._teller.wanted(hook):
            await self._keeper.attend(self._teller.emit(hook, kind, **fields))

    # --- when ---

    def _over(self) -> bool:
        return self._ending() != ("", "")

    def _ending(self) -> tuple[str, str]:
        """Reason and detail of the end, both empty while there is none."""
        if (stop := self._control.stopping) is not None:
            return stop.reason, stop.detail
        if self._stop is not None:
            return self._stop
        if self._life.ended is not None:
            return self._life.ended
        self._teller.elapsed()
        return self._plan.reached(self._progress)

    def _due(self) -> bool:
        """Whether something is to be done after this update that at the epoch's end comes after its validation."""
        progress = self._progress
        if progress.step == self._plan.max_steps or self._plan.validation_due(progress):
            return True
        return self._keeper.due(progress.epoch)

    def _most_updates(self) -> int | None:
        """Updates to the nearest step at which something is due by its number."""
        step = self._progress.step
        cuts = (self._plan.next_step(step), self._keeper.next_step(step))
        return min((cut - step for cut in cuts if cut is not None), default=None)

    def _left(self) -> float | None:
        """Seconds until `max_time`; None if there is none."""
        most = self._plan.max_time
        return None if most is None else max(0.001, most - self._teller.elapsed())

    # --- waiting for data ---

    async def _ready(self, batches: Supply) -> bool:
        """Wait for a batch; False at the end of the epoch or of the fit."""
        return not self._over() and await self._wait(batches, self._over) and not self._over()

    async def _finished(self, batches: Supply) -> bool:
        """Whether the epoch has no further batch: its length tells, or the next batch, unless a stop was asked for."""
        if self._plan.batches is not None and self._progress.taken < self._plan.batches:
            return batches.finished_nowait()
        if not batches.finished_nowait():
            await self._wait(batches, self._stopping)
            if self._stream.pulls_inside and not self._stopping():
                await batches.finished()
        return batches.finished_nowait()

    def _stopping(self) -> bool:
        return self._control.stopping is not None

    async def _wait(self, batches: Supply, give_up: Callable[[], bool]) -> bool:
        """Wait until a burst has something to do, doing meanwhile what is asked for; False if there is nothing more."""
        began = time.perf_counter()
        waiting: asyncio.Task[bool] | None = None
        if not (batches.ready or self._step.partial):
            await self._obey_requests()
        try:
            while not batches.ready and not give_up():
                if waiting is None:
                    waiting, self._driver.waiting = asyncio.create_task(batches.wait()), time.monotonic()
                knocked = asyncio.create_task(self._control.knocked())
                patience = min(NOTES, self._left() or NOTES)
                try:
                    await asyncio.wait({waiting, knocked}, return_when=asyncio.FIRST_COMPLETED, timeout=patience)
                finally:
                    knocked.cancel()
                if self._teller.noted:
                    await self._keeper.attend(self._teller.take_notes())
                if not self._step.partial:
                    await self._obey_requests()
        finally:
            self._driver.waiting = None
            if waiting is not None:
                self._driver.waited += time.perf_counter() - began
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
        return batches.ready and (await batches.wait() or self._step.partial)

    # --- validation, verdicts and requests ---

    async def _validate(self, *, sanity: bool = False) -> list[Verdict]:
        """The means over all validation streams, told and judged; what is to be saved is saved meanwhile, and a stop
        waits for no batch. Raises Stopped."""
        batches = self._plan.sanity if sanity else None
        if not sanity:
            with contextlib.suppress(TypeError):
                batches = sum(len(stream) for stream in self._validation.values())
        await self._emit("on_validation_begin", ValidationBegin, batches=batches)
        values: dict[str, float] = {}
        tables: dict[str, list[Any]] = {}
        for name, stream in self._validation.items():
            if sanity and getattr(stream, "one_epoch", False):
                continue  # it could not start over
            stream.set_epoch(0)
            limit = self._plan.sanity if sanity else self._plan.validation_limits.get(name)
            how: dict[str, Any] = {"limit": limit, "stopping": self._stopping, "gone": self._driver.gone}
            evaluating = self._evaluator.run(stream, self._thread, self._life.rng, **how)
            means = await self._keeper.attend(evaluating, unless=self._stopping)
            prefix = f"val_{name}_" if name else "val_"
            values |= {prefix + metric: value for metric, value in means.items()}
            tables |= {prefix + metric: table for metric, table in self._evaluator.tables.items()}
        if not sanity:
            self._life.metrics.update(values)
            self._life.validated.update(values)
            if self._teller.noted:
                await self._keeper.attend(self._teller.take_notes())
        metrics = {**self._step.tally.epoch.compute(), **values}
        told = {"metrics": metrics, "tables": tables, "sanity": sanity}
        return await self._keeper.ask("on_validation_end", ValidationEnd, line=None if sanity else values, **told)

    async def _validate_now(self) -> None:
        """A validation within an epoch, and what follows from it."""
        self._progress.owes = "validation"
        try:
            verdicts = await self._validate()
        except Stopped:
            return
        self._progress.owes, self._validated = "", self._progress.step
        await self._obey(verdicts, self._progress.epoch)

    async def _obey(self, verdicts: list[Verdict], epoch: int) -> None:
        """What the deciders want: another learning rate, a stop, a save of this very step."""
        for verdict in verdicts:
            if verdict.lr_factor is not None:
                self._life.lr.scale(verdict.lr_factor)
            if verdict.stop and self._stop is None:
                self._stop = (verdict.reason, verdict.detail)
                if verdict.reason == "early_stopping":  # known to the saves of this step, and whatever comes next
                    self._life.ended = self._stop
        kind = await self._keeper.judge(verdicts, epoch)
        await self._tell_last_line()
        if kind:
            await self._keeper.save(kind)

    async def _obey_requests(self) -> None:
        """Do what was asked for since the last time; wait here while paused, until `max_time` at most."""
        control = self._control
        while control.pending or control.paused:
            requests = control.take()
            if requests.lr is not None:
                self._keeper.set_lr(requests.lr)
            await self._keeper.save_all(requests.saves)
            if requests.stop is not None:
                if not self._interrupted:
                    self._interrupted = True
                    stop = requests.stop
                    await self._emit("on_interrupt", Interrupt, reason=stop.reason, detail=stop.detail)
                return
            if control.paused and not control.pending:
                self._teller.status("paused")
                try:
                    async with asyncio.timeout(self._left()):
                        await control.knocked()
                except TimeoutError:
                    return

    # --- the end ---

    async def _finish(self, reason: str, detail: str) -> None:
        await self._obey_requests()
        if self._life.untrained is not None:
            await self._thread.run(self._life.untrained.tell)  # of a fit that saves nothing
        if self._life.switch is not None:
            await self._thread.run(self._life.switch.judge)
        over = reason in OVER
        await self._tell_last_line()
        await self._keeper.save_at_end()
        self._keeper.check()
        self._life.metrics = {
            **self._life.metrics,
            **self._last,
        }  # behind the save, as a life that goes on has them too
        if self._progress.batch:  # of the epoch in which it ended
            self._life.metrics.update(self._step.tally.epoch.compute())
        if over:
            await self._keeper.load_best()
        await self._keeper.attend(self._teller.last_notes())
        self._teller.status(reason)
        metrics = dict(self._life.metrics)
        self._told_end = True
        await self._emit("on_train_end", TrainEnd, reason=reason, detail=detail, metrics=metrics)
        await self._keeper.attend(self._teller.heard())

    async def _tell_last_line(self) -> None:
        """Once training is over: before the save of its last step, which keeps what a kill would take from the file,
        and of which no life makes another."""
        over = self._ending()[0] in OVER or self._life.ended is not None
        if not self._told_line and (over or self._plan.reached(self._progress) != ("", "")):
            self._last = await self._keeper.attend(self._teller.last_line())
            self._told_line = True

    async def _fail(self, error: BaseException) -> None:
        """Save what is finished, and tell; whatever goes wrong here is logged, since `error` is what the user gets."""
        with _logged("saving after the error"):
            await self._driver.landed()
            for report in self._driver.take_untold():
                with contextlib.suppress(Exception):  # what a callback raised is told already
                    async with asyncio.timeout(self._patience):
                        await self._teller.burst(report, self._driver.take_waited())
            with _logged("forgetting the batches that are part of no update"):  # what is whole is saved all the same
                if not self._step.torn:
                    await self._driver.leave_partial()
            self._owe()
            async with asyncio.timeout(self._patience):  # a disk that hangs must not keep the error from its reader
                await self._keeper.save_after_error()
        self._control.unbind()  # who waits for a save is told first, and can then be told of the error
        with _logged("telling the callbacks of the error"):
            self._teller.status("failed")
            await self._teller.emit("on_exception", ExceptionRaised, error=error)
            if not self._told_end:
                await self._teller.emit("on_train_end", TrainEnd, reason="failed", detail=words(error))

    def _owe(self) -> None:
        """An error that came between an update and its validation leaves this to the next life."""
        progress, batches = self._progress, self._plan.batches
        within = progress.batch > 0 and (batches is None or progress.taken < batches)
        if within and not progress.owes and progress.step != self._validated and self._plan.validation_due(progress):
            progress.owes = "validation"
        if not self._told_line:
            self._owe_end()

    def _owe_end(self) -> None:
        """The last update that `max_steps` allows is made, and what comes with it, the epoch's end perhaps, is not."""
        progress = self._progress
        last = progress.batch > 0 and progress.step == self._plan.max_steps
        if last and not progress.owes and self._life.ended is None:
            progress.owes = "end"


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception("%s failed", what)
