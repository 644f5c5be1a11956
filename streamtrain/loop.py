"""The wheel: one coroutine that turns batches into a trained model.

    tell all that training begins; look at some validation batches, so that what is broken there breaks now
    until a limit is reached or a stop was asked for:
        go to the epoch's order; tell that it begins
        while the epoch has batches:
            run a burst of updates on the train thread, to the nearest of 20 ms, the next save or validation, the end
            tell the batches and the lines of the log
            unless the epoch has ended: validate and save if it is time
            do what was asked for: learning rate, calls, saves, pause
        if it ended: tell its means, validate, ask the deciders, step the learning rate, stop or save as they say
    save; load the best weights if that is wanted; tell that training ended

Its law: between two awaits the counts, the position and the weights belong to the same finished update.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from streamtrain import checkpoint
from streamtrain import state as trees
from streamtrain.callbacks.bus import Bus
from streamtrain.checkpoint import Committed
from streamtrain.control import Control, Save
from streamtrain.data.batch import Batch
from streamtrain.data.source import Stream
from streamtrain.errors import DataError
from streamtrain.evaluation import BURST, Evaluator, Stopped
from streamtrain.events import (
    BatchBegin,
    BatchEnd,
    CheckpointCommitted,
    EpochBegin,
    EpochEnd,
    Event,
    ExceptionRaised,
    Interrupt,
    Log,
    TrainBegin,
    TrainEnd,
    ValidationBegin,
    ValidationEnd,
    Verdict,
)
from streamtrain.life import Life, has_state
from streamtrain.progress import Best
from streamtrain.saving import Saver
from streamtrain.schedulers import get_lr, set_group_lr
from streamtrain.supply import Supply, supply
from streamtrain.tally import Report
from streamtrain.threads import TrainThread

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fit is to do, worked out."""

    max_epochs: int | None
    max_steps: int | None
    max_time: float | None
    validate_every: tuple[int, str] = (1, "epoch")
    """A number of epochs or steps."""
    batches: int | None = None
    """Of an epoch, as far as that is known; limits are counted in."""
    limit: int | None = None
    """Batches of an epoch, at most."""
    overfit: bool = False
    """Each epoch has the batches of the first one."""
    validation_limits: Mapping[str, int | None] = field(default_factory=dict)
    sanity: int = 0
    """Batches of each validation stream to look at before training."""
    announcement: Mapping[str, Any] = field(default_factory=dict)
    """The fields of TrainBegin."""


class Wheel:
    """Turns for one fit."""

    def __init__(
        self,
        life: Life,
        plan: Plan,
        *,
        validation: Mapping[str, Stream],
        evaluator: Evaluator,
        bus: Bus,
        control: Control,
        thread: TrainThread,
        saver: Saver | None,
        status: Callable[[dict[str, Any]], None] = lambda status: None,
        said: Callable[[], dict[str, float]] = dict,
        deterministic: bool = False,
    ) -> None:
        assert life.stream is not None
        if saver is not None:
            saver.pins = self._pins
        self.life, self.plan, self.saver = life, plan, saver
        self._validation, self._evaluator = validation, evaluator
        self._bus, self._control, self._thread = bus, control, thread
        self._status, self._said, self._deterministic = status, said, deterministic
        self._progress, self._step, self._stream = life.progress, life.step, life.stream
        self._base, self._born = life.progress.time, time.monotonic()
        self._saved_when = self._status_when = self._born
        self._saved, self._first_step = self._mark(), life.progress.step
        self._stop: tuple[str, str] | None = None
        self._restore: str | None = None
        self._weights: dict[str, Tensor] = {}
        self._flying: asyncio.Future[Report] | None = None
        self._waited = 0.0
        self._interrupted = self._coalesced = False

    async def turn(self) -> tuple[str, str]:
        """Train to the end; reason and detail of the end. Raises what went wrong, after having saved."""
        try:
            await self._begin()
            while not self._over():
                await self._epoch()
            reason, detail = self._ending()
            await self._finish(reason, detail)
        except BaseException as error:
            await self._fail(error)
            raise
        return reason, detail

    async def _begin(self) -> None:
        await self._emit("on_train_begin", TrainBegin, **self.plan.announcement)
        await self._bus.drain()
        self._bus.check()
        if self.plan.sanity and self._validation:
            await self._validate(sanity=True)

    async def _epoch(self) -> None:
        """One epoch, or the rest of it."""
        progress = self._progress
        self._stream.set_epoch(0 if self.plan.overfit else progress.epoch)
        await self._emit("on_epoch_begin", EpochBegin)
        if progress.owes == "epoch":
            return await self._end_epoch()
        if progress.owes == "validation":
            await self._validate_now()
        async with self._batches() as batches:
            while not self._over() and await self._ready(batches):
                report = await self._burst(batches)
                await self._tell(report)
                if report.updates and not self._step.partial:
                    if self._due() and not await self._finished(batches):
                        await self._between()
                    await self._obey_requests()
            await self._leave_partial()
            ended = batches.finished_nowait()
        if ended:
            await self._end_epoch()
        return None

    async def _end_epoch(self) -> None:
        """Metrics, validation, callbacks, learning rate, early stopping: in this order."""
        progress, verdicts = self._progress, []
        if not progress.batch:
            raise DataError("the training stream gave no batch", hint="Check its split, its filters and drop_last.")
        if progress.owes != "epoch":
            means = self._step.tally.epoch.compute()
            self.life.metrics.update(means)
            verdicts += await self._ask("on_epoch_end", EpochEnd, metrics=means)
            progress.owes = "epoch"
        if self._validation and self._validation_due(epoch_end=True):
            try:
                verdicts += await self._validate()
            except Stopped:
                return
        self.life.lr.after_epoch(self.life.metrics)
        ended, progress.owes = progress.epoch, ""
        progress.epoch, progress.batch = ended + 1, 0
        self._step.tally.epoch.reset()
        self._stream.set_epoch(0 if self.plan.overfit else progress.epoch)
        await self._obey(verdicts, ended)
        await self._save_if_due(ended, epoch_end=True)
        await self._obey_requests()

    # --- when ---

    def _over(self) -> bool:
        return self._ending() != ("", "")

    def _ending(self) -> tuple[str, str]:
        """Reason and detail of the end, both empty while there is none."""
        stop, plan, progress = self._control.stopping, self.plan, self._progress
        if stop is not None:
            return stop.reason, stop.detail
        if self._stop is not None:
            return self._stop
        if self.life.ended is not None:
            return self.life.ended
        if plan.max_steps is not None and progress.step >= plan.max_steps and progress.owes == "":
            return "completed", ""
        if plan.max_epochs is not None and progress.epoch >= plan.max_epochs:
            return "completed", ""
        if plan.max_time is not None and self._elapsed() >= plan.max_time:
            return "max_time", f"{plan.max_time:g} s"
        return "", ""

    def _validation_due(self, *, epoch_end: bool) -> bool:
        number, unit = self.plan.validate_every
        if unit == "step":
            return self._progress.step % number == 0
        return epoch_end and (self._progress.epoch + 1) % number == 0

    def _due(self) -> bool:
        """Whether something is to be done after this update that at the epoch's end comes after its validation."""
        progress = self._progress
        if progress.step == self.plan.max_steps or (self._validation and self._validation_due(epoch_end=False)):
            return True
        return self._save_due(progress.epoch, epoch_end=False)

    def _save_due(self, epoch: int, *, epoch_end: bool) -> bool:
        if self.saver is None or self._saved == self._mark():
            return False
        since = time.monotonic() - self._saved_when
        return self.saver.rule.schedule.due(self._progress.step, epoch, since, epoch_end=epoch_end)

    def _most_updates(self) -> int | None:
        """Updates to the nearest step at which something is due by its number."""
        step, plan = self._progress.step, self.plan
        if not self._step.seconds:
            return 1
        cuts = [plan.max_steps, None if self.saver is None else self.saver.rule.schedule.next_step(step)]
        number, unit = plan.validate_every
        if unit == "step" and self._validation:
            cuts.append((step // number + 1) * number)
        return min((cut - step for cut in cuts if cut is not None), default=None)

    # --- batches and bursts ---

    @contextlib.asynccontextmanager
    async def _batches(self) -> Any:
        """The epoch's batches, or the rest of them."""
        life, progress, limit = self.life, self._progress, self.plan.limit
        if self._stream.epoch != (0 if self.plan.overfit else progress.epoch):
            limit = 0  # a stream that counts the end of an epoch as the next one's beginning
        elif limit is not None:
            limit = max(0, limit - progress.batch)
        source = supply(self._stream, limit=limit, runner=self._pull)
        try:
            if self._stream.pulls_inside:
                if progress.batch and life.epoch_rng is not None:
                    await self._replay(source, life.epoch_rng)
                else:
                    life.epoch_rng = life.rng.state
            yield source
        finally:
            await self._landed()
            await source.aclose()

    async def _pull(self, fn: Callable[[], Batch | None]) -> Batch | None:
        def job() -> Batch | None:
            with self.life.rng.swapped_in():
                return fn()

        return await self._thread.run(job)

    async def _replay(self, source: Supply, state: Any) -> None:
        """Have a source produce again what was trained, with the random numbers that it had then."""
        now, self.life.rng.state = self.life.rng.state, state
        try:
            await source.finished()
        finally:
            self.life.rng.state = now

    async def _ready(self, batches: Supply) -> bool:
        """Wait for a batch; False at the end of the epoch or of the fit."""
        return await self._wait(batches, self._over) and not self._over()

    async def _finished(self, batches: Supply) -> bool:
        """Whether the epoch has no further batch: its length tells, or the next batch, unless a stop was asked for."""
        if self.plan.batches is not None and self._progress.batch < self.plan.batches:
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
        try:
            while not batches.ready and not give_up():
                waiting = waiting or asyncio.create_task(batches.wait())
                knocked = asyncio.create_task(self._control.knocked())
                left = None if self.plan.max_time is None else max(0.0, self.plan.max_time - self._elapsed())
                await asyncio.wait({waiting, knocked}, return_when=asyncio.FIRST_COMPLETED, timeout=left or None)
                knocked.cancel()
                if not self._step.partial:
                    await self._obey_requests()
        finally:
            if waiting is not None:
                self._waited += time.perf_counter() - began
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
        return batches.ready and (await batches.wait() or self._step.partial)

    async def _burst(self, batches: Supply) -> Report:
        updates, progress, plan = self._most_updates(), self._progress, self.plan
        remaining = None if plan.batches is None else max(0, plan.batches - progress.batch - self._step.taken)
        epoch, step, rng = progress.epoch, self._step, self.life.rng
        deterministic = _deterministic if self._deterministic else contextlib.nullcontext

        def job() -> Report:
            with rng.swapped_in(), deterministic():
                return step.run(batches, updates=updates, seconds=BURST, epoch=epoch, remaining=remaining)

        waited = batches.waited
        self._flying = self._thread.submit(job)
        batches.burst(self._batches_of_a_burst(updates))
        report = await asyncio.shield(self._flying)
        self._waited += batches.waited - waited
        batches.burst(None)
        self._land(report)
        if report.error is not None:
            raise report.error
        return report

    def _batches_of_a_burst(self, updates: int | None) -> int:
        each = self._step.seconds
        predicted = max(1, int(BURST / each)) if each else 1
        return (predicted if updates is None else min(predicted, updates)) * self._step.accumulate

    def _land(self, report: Report) -> None:
        """Count what a burst has finished."""
        self._flying = None
        progress = self._progress
        progress.step += report.updates
        progress.samples += report.samples
        progress.batch += report.batches
        progress.time = self._elapsed()
        if report.updates:
            progress.owes = ""
        if report.cursor is not None:
            self._stream.trained(report.cursor)

    async def _landed(self) -> None:
        """Wait for a burst that nobody waits for any more, and count it."""
        while self._flying is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([self._flying])
                flying, self._flying = self._flying, None
                self._land(flying.result())

    async def _leave_partial(self) -> None:
        """Forget batches that are not part of a finished update: the next life takes them again."""
        if self._step.partial:

            def job() -> None:
                with self.life.rng.swapped_in():
                    self._step.undo()

            await self._thread.run(job)

    # --- telling ---

    def _elapsed(self) -> float:
        return self._base + time.monotonic() - self._born

    def _common(self) -> dict[str, Any]:
        progress = self._progress
        progress.time = self._elapsed()
        counts = {"epoch": progress.epoch, "step": progress.step, "samples": progress.samples, "time": progress.time}
        return {**counts, "runner": self._on_train_thread}

    async def _on_train_thread(self, fn: Callable[[Any, Any], T]) -> T:
        return await self._thread.run(lambda: fn(self.life.model, self.life.optimizer))

    async def _emit(self, hook: str, kind: type[Event], /, **fields: Any) -> None:
        if hook in self._bus.wants:
            await self._bus.emit(hook, kind(**{**self._common(), **fields}))

    async def _ask(self, hook: str, kind: type[Event], /, **fields: Any) -> list[Verdict]:
        if hook not in self._bus.wants:
            return []
        return await self._bus.ask(hook, kind(**{**self._common(), **fields}))

    async def _tell(self, report: Report) -> None:
        """The news of a burst, and its lines of the log."""
        if report.batches:
            self._news(report)
        before = self._progress.samples - report.samples
        for row in report.rows:
            when = self._elapsed() - (time.perf_counter() - row.at)
            values = {**row.values, **self._said()}
            self.life.metrics.update(values)
            await self._emit("on_log", Log, step=row.step, samples=before + row.samples, time=when, values=values)
        self._bus.check()
        if self.saver is not None:
            self.saver.check()
        if time.monotonic() - self._status_when > 1.0:
            self._write_status("running")

    async def _last_line(self) -> None:
        """The log ends with the last step; where another life may go on its lines stay as they would have been."""
        values = self._step.tally.window.compute()
        if self._progress.step > self._first_step and values:
            values = {**values, "lr": get_lr(self.life.optimizer), **self._said()}
            progress = self._progress
            await self._emit(
                "on_log", Log, epoch=progress.epoch if progress.batch else progress.epoch - 1, values=values
            )

    def _news(self, report: Report) -> None:
        first: dict[str, Any] = {"first_step": report.first_step, "count": report.batches}
        if "on_batch_begin" in self._bus.wants:
            self._bus.news("on_batch_begin", BatchBegin(**self._common(), **first))
        if "on_batch_end" in self._bus.wants:
            sums: dict[str, Any] = {"loss_sum": report.loss_sum, "batch_samples": report.samples, "lr": report.lr}
            self._bus.news("on_batch_end", BatchEnd(**self._common(), **first, **sums, data_wait=self._waited))
        self._waited = 0.0

    def _write_status(self, state: str) -> None:
        self._status_when = time.monotonic()
        progress = self._progress
        counts = {"epoch": progress.epoch, "step": progress.step, "samples": progress.samples, "time": progress.time}
        limits = {"max_epochs": self.plan.max_epochs, "max_steps": self.plan.max_steps}
        self._status({"state": state, **counts, **limits, "metrics": dict(self.life.metrics)})

    # --- validation and verdicts ---

    async def _validate(self, *, sanity: bool = False) -> list[Verdict]:
        """The means over all validation streams, told and judged. Raises Stopped."""
        batches = None
        with contextlib.suppress(TypeError):
            batches = sum(len(stream) for stream in self._validation.values())
        await self._emit("on_validation_begin", ValidationBegin, batches=self.plan.sanity if sanity else batches)
        values: dict[str, float] = {}
        for name, stream in self._validation.items():
            if sanity and getattr(stream, "one_epoch", False):
                continue  # it could not start over
            stream.set_epoch(0)
            limit = self.plan.sanity if sanity else self.plan.validation_limits.get(name)
            means = await self._evaluator.run(
                stream, self._thread, self.life.rng, limit=limit, stopping=lambda: self._control.stopping is not None
            )
            prefix = f"val_{name}_" if name else "val_"
            values |= {prefix + metric: value for metric, value in means.items()}
        if not sanity:
            self.life.metrics.update(values)
            await self._emit("on_log", Log, split="val", values=values)
        metrics = {**self._step.tally.epoch.compute(), **values}
        return await self._ask("on_validation_end", ValidationEnd, metrics=metrics, sanity=sanity)

    async def _validate_now(self) -> None:
        """A validation within an epoch, and what follows from it."""
        self._progress.owes = "validation"
        try:
            verdicts = await self._validate()
        except Stopped:
            return
        self._progress.owes = ""
        await self._obey(verdicts, self._progress.epoch)

    async def _between(self) -> None:
        """What is due after an update that does not end an epoch."""
        if self._validation and self._validation_due(epoch_end=False) and self.plan.validate_every[1] == "step":
            await self._validate_now()
        if not self._progress.owes:
            await self._save_if_due(self._progress.epoch)

    async def _obey(self, verdicts: list[Verdict], epoch: int) -> None:
        """What the deciders want: another learning rate, a stop, a save of this very step."""
        progress, kind = self._progress, ""
        for verdict in verdicts:
            if verdict.lr_factor is not None:
                self.life.lr.scale(verdict.lr_factor)
            if verdict.restore:
                self._restore = verdict.monitor
            if verdict.stop and self._stop is None:
                self._stop = (verdict.reason, verdict.detail)
            if verdict.save and kind != "best":
                kind = verdict.save
            if verdict.save == "best" and verdict.value is not None:
                path = None if self.saver is None else self.saver.path(progress.step)
                best = Best(verdict.monitor, verdict.value, epoch, progress.step, path)
                progress.offer(best, primary=verdict.monitor if self.saver is None else self.saver.rule.monitor)
                if verdict.restore and self.saver is None:
                    self._weights = await self._thread.run(lambda: trees.clone(dict(self.life.model.state_dict())))
        if kind:
            await self._save(kind)

    # --- saves and requests ---

    def _mark(self) -> tuple[int, int, str, bool]:
        """What tells one state that is worth saving from another."""
        progress = self._progress
        return progress.step, progress.epoch, progress.owes, self.life.ended is not None

    async def _save_if_due(self, epoch: int, *, epoch_end: bool = False) -> None:
        if not self._save_due(epoch, epoch_end=epoch_end):
            return
        assert self.saver is not None
        if not self.saver.busy:
            await self._save("periodic")
        elif not self._coalesced:
            self._coalesced = True
            logger.warning("a save is due at step %d while the one before is under way: left out", self._progress.step)

    async def _save(self, kind: str, request: Save | None = None) -> None:
        """Take a snapshot and have it committed while training goes on."""
        path = None if request is None else request.path
        if self.saver is None:
            return
        await self.saver.wait()  # one at a time: there is memory for one copy
        began = time.perf_counter()
        await self._settled()
        state = self.life.state()
        snapshot = await self._thread.run(lambda: self.life.snapshot(state))
        stall = time.perf_counter() - began
        if path is None:
            self._saved, self._saved_when = self._mark(), time.monotonic()
        done = None if request is None else request.done
        fields = {**self._common(), "kind": kind, "seconds": stall}  # of the step that is saved, not of the later one

        async def told(committed: Committed) -> None:
            about = {**fields, "path": str(committed.path), "bytes": committed.bytes}
            await self._emit("on_checkpoint", CheckpointCommitted, **about)

        self.saver.begin(snapshot, self._progress.step, kind=kind, told=told, path=path, done=done)

    async def _settled(self) -> None:
        """Let callbacks that have a state take in what was told; one that lags is not waited for long."""
        drained = asyncio.create_task(self._bus.drain(has_state))
        await asyncio.wait([drained], timeout=0.5)
        drained.cancel()

    def _pins(self) -> set[str]:
        """Names of the checkpoints that hold the best values."""
        return {best.checkpoint.name for best in self._progress.bests.values() if best.checkpoint is not None}

    async def _obey_requests(self) -> None:
        """Do what was asked for since the last time; wait here while paused."""
        control = self._control
        while control.pending or control.paused:
            requests = control.take()
            if requests.lr is not None:
                self._set_lr(requests.lr)
            for call in requests.calls:
                await self._thread.run(call)
            for save in requests.saves:
                await self._save("request", save)
            if requests.stop is not None:
                if not self._interrupted:
                    self._interrupted = True
                    stop = requests.stop
                    await self._emit("on_interrupt", Interrupt, reason=stop.reason, detail=stop.detail)
                return
            if control.paused and not control.pending:
                self._write_status("paused")
                await control.knocked()

    def _set_lr(self, lr: float) -> None:
        now = get_lr(self.life.optimizer)
        if now > 0:
            self.life.lr.scale(lr / now)
        else:
            for group in self.life.optimizer.param_groups:
                set_group_lr(group, lr)

    # --- the end ---

    async def _finish(self, reason: str, detail: str) -> None:
        await self._obey_requests()
        if self._progress.owes == "" and reason == "early_stopping":
            self.life.ended = (reason, detail)
        await self._save_at_end()
        if self.saver is not None:
            self.saver.check()
        if reason != "stopped" and reason != "signal" and reason != "cancelled":
            await self._last_line()
            await self._load_best()
        self._write_status(reason)
        fields = {"reason": reason, "detail": detail, "metrics": dict(self.life.metrics)}
        await self._emit("on_train_end", TrainEnd, **fields)
        await self._bus.drain()
        self._bus.check()

    async def _save_at_end(self) -> None:
        if self.saver is None:
            return
        await self.saver.wait()
        if self._progress.step and (self._saved != self._mark() or self.saver.behind):
            await self._save("end")
        await self.saver.wait()

    async def _load_best(self) -> None:
        """Put the weights of the best value into the model; the checkpoint of the end keeps the last ones."""
        best = self._progress.bests.get(self._restore or "")
        if best is None or best.step == self._progress.step:
            return
        weights = self._weights
        if self.saver is not None and best.checkpoint is not None:
            path: Path = best.checkpoint
            weights = (await self.saver.files(lambda: checkpoint.read(path))).model
        await self._thread.run(lambda: self.life.model.load_state_dict(weights))
        logger.info("the model has the weights of step %d, the best %s (%g)", best.step, best.monitor, best.value)

    async def _fail(self, error: BaseException) -> None:
        """Save what is finished, and tell; whatever goes wrong here is logged, since `error` is what the user gets."""
        await self._landed()
        with _logged("saving after the error"):
            if self.saver is not None and self.saver.failing:
                await self.saver.wait()
            elif not self._step.torn and not isinstance(error, GeneratorExit):
                await self._leave_partial()
                await self._save_at_end()
        with _logged("telling the callbacks of the error"):
            self._write_status("failed")
            await self._emit("on_exception", ExceptionRaised, error=error)
            await self._emit("on_train_end", TrainEnd, reason="failed", detail=str(error))
            await self._bus.drain()


@contextlib.contextmanager
def _logged(what: str) -> Any:
    try:
        yield
    except Exception:
        logger.exception("%s failed", what)


@contextlib.contextmanager
def _deterministic() -> Any:
    """Have torch take deterministic kernels alone, and put back what was chosen before."""
    before, only_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)
