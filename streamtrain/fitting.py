"""One fit: opens, locks, restores or goes on, turns the wheel, and closes all again in the opposite order.

Its law: when `run` returns or raises nothing of it is left running. What lasts to the next fit is in a `Run`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from streamtrain import resume
from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.checks import Checks
from streamtrain.compiling import find_compiler
from streamtrain.control import Control
from streamtrain.data.source import Stream
from streamtrain.disk import LOCAL, Disk
from streamtrain.driving import Driver
from streamtrain.errors import ConfigError, EnvironmentProblem
from streamtrain.failure import standing
from streamtrain.file_thread import Files, file_thread
from streamtrain.grace import saving_on_cancel
from streamtrain.keeping import Keeper
from streamtrain.life import Life
from streamtrain.loop import Wheel
from streamtrain.notes import Notes
from streamtrain.options import Limits
from streamtrain.parts import Parts
from streamtrain.plan import planned
from streamtrain.progress import FitResult, Progress
from streamtrain.resume import Resume
from streamtrain.run_folder import RunFolder
from streamtrain.saving import Saver
from streamtrain.state import Snapshot
from streamtrain.status_file import StatusFile
from streamtrain.streams import behind, serves_one_epoch
from streamtrain.switching import Switch
from streamtrain.telling import Teller
from streamtrain.threads import TrainThread, train_thread
from streamtrain.watchdog import Busy, Watchdog

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Run:
    """What lasts from one fit to the next, and is used outside of fits too."""

    parts: Parts
    state: Progress
    control: Control
    notes: Notes
    disk: Disk = LOCAL
    life: Life | None = None
    """That of the last fit whose wheel was to turn; None after a checkpoint was loaded."""
    position: tuple[Stream, dict[str, Any]] | None = None
    """The stream of the last fit, and where that fit left it."""
    checkpoint: Path | None = None
    """The last committed one, or the one that the run went on from."""
    saved: set[Path] = field(default_factory=set)
    """The checkpoints of its folder that were saved outside of a fit."""
    loaded: Mapping[str, Any] | None = None
    """The state of a checkpoint from which no fit has gone on yet."""
    origin: Path | None = None
    """That checkpoint."""


class Fit:
    """One fit of a run. To be made on the loop; raises ConfigError for what can't be, before anything is written."""

    def __init__(
        self,
        run: Run,
        train: Stream,
        validation: dict[str, Stream],
        limits: Limits,
        resume_from: Resume,
        *,
        callbacks: Sequence[object],
        run_dir: Path | None,
        allow_data_change: bool,
    ) -> None:
        self._run, self._options = run, run.parts.options
        self._train, self._validation = train, validation
        self._limits, self._resume_from = limits, resume_from
        self._callbacks, self._run_dir = callbacks, run_dir
        self._allow_data_change = allow_data_change
        self._checks = Checks(run.parts, callbacks, validation)
        self._checks.arguments(train, limits, resume_from, run_dir)
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Settled once nobody is to wait any more for what hangs."""
        self._bus: Bus | None = None
        """Once the wheel turns."""
        self._saver: Saver | None = None
        """Once it is known what is restored, if there is a folder."""

    @property
    def saved(self) -> Path | None:
        """The last checkpoint that it committed."""
        return None if self._saver is None else self._saver.last

    async def run(self) -> FitResult:
        """Train; one that is cancelled has its `grace` to save what was trained, and CancelledError is raised again."""
        self._run.control.bind(self._hasten)
        return await saving_on_cancel(self._open(), self._end_cancelled, self._options.grace, self._leave)

    # --- its end ---

    def _end_cancelled(self, fit: asyncio.Task[FitResult]) -> None:
        """End a cancelled fit: by a stop where there are steps to save, at once where there are none yet."""
        self._run.control.stop("cancelled", "the task was cancelled", within=self._options.grace)
        if self._bus is None:
            fit.cancel()

    def _leave(self) -> None:
        """Nobody waits any more for a disk or a step that does not return."""
        if not self._gone.done():
            self._gone.set_result(None)

    async def _leave_weights(self, thread: TrainThread) -> None:
        if not self._gone.done():  # else a step hangs, before which no job comes
            await thread.run(self._run.parts.leave)

    def _hasten(self) -> None:
        """Where the end has a deadline callbacks have half of the time: the other half is for a save that waited."""
        stop = self._run.control.stopping
        if self._bus is not None and stop is not None and stop.deadline is not None:
            self._bus.hurry(max(0.0, stop.deadline - time.monotonic()) / 2)

    # --- its beginning ---

    async def _open(self) -> FitResult:
        """Open the streams and lock the folder; write down what went wrong."""
        run, options = self._run, self._options
        async with AsyncExitStack() as stack:
            files = await stack.enter_async_context(file_thread(gone=self._gone))
            folder = None if self._run_dir is None else RunFolder(self._run_dir, disk=run.disk)
            if folder is not None and self._resume_from is None and not run.state.step and run.loaded is None:
                await files(lambda: resume.refuse_unasked(folder.checkpoints, run.saved))
            context = contextvars.copy_context()  # torch keeps its configuration there
            await files(lambda: context.run(find_compiler, options.compile, options.device))
            for stream in (self._train, *self._validation.values()):
                await stream.open()
            self._checks.lengths(self._train, self._limited(found=False))
            if folder is not None:
                stack.push_async_callback(_unlock, files, folder)
                await files(folder.lock)
                await files(folder.forget_error)
            before = run.life
            try:
                return await self._turn(files, folder)
            except Exception as error:
                if folder is None:
                    raise
                failure, life = await _first(error, files, folder), None if run.life is before else run.life
                try:
                    await files(lambda: self._write_down(folder, failure, life))
                except Exception as problem:  # whatever it is: the error itself is what the user gets
                    logger.warning("error.json is not written: %s: %s", type(problem).__name__, problem)
                if failure is error:
                    raise
                raise failure from error

    def _limited(self, *, found: bool) -> Limits:
        """The limits, or their default: one epoch, or one more within this process."""
        if self._limits.none or self._options.dev:
            return Limits(max_epochs=1 if found else self._run.state.epoch + 1)
        return self._limits

    def _write_down(self, folder: RunFolder, error: Exception, life: Life | None) -> None:
        """`error.json`; `life`: none where it had not begun."""
        folder.write_error(error, None if life is None else standing(life, folder.path, self._run.checkpoint))

    async def _turn(self, files: Files, folder: RunFolder | None) -> FitResult:
        """Make or restore the life, turn the wheel until it stands, and keep what the next fit needs."""
        run, options, parts = self._run, self._options, self._run.parts
        found = None
        if folder is not None and self._resume_from is not None:
            checkpoints, wanted = folder.checkpoints, self._resume_from
            found = await files(lambda: resume.find(checkpoints, wanted, disk=run.disk))
        if found is None and run.life is not None:
            run.life.check_whole()
        async with AsyncExitStack() as stack:
            thread = await stack.enter_async_context(train_thread(self._gone))
            bus = await stack.enter_async_context(Bus(self._callbacks, grace=options.grace))
            self._train.follow(True)
            stack.callback(self._train.follow, False)
            await parts.prepare(self._train, thread)
            await thread.run(lambda: parts.begin(resumed=found is not None))
            stack.push_async_callback(self._leave_weights, thread)
            limits = self._limited(found=found is not None)
            life = await thread.run(lambda: parts.life(self._train, run.state, bus, run.control, limits))
            self._checks.scheduler(life.lr)
            if folder is not None:
                life.check()
                await thread.run(life.try_loading)
            path = None
            if found is not None:
                path, snapshot = found
                await self._restore(life, path, snapshot, files, folder, thread)
                del found, snapshot
                await self._checks.validations(thread, life)
                if folder is not None and self._resume_from != "auto":
                    await self._set_newer_aside(path, files, folder)
            else:
                origin = None if run.loaded is None else run.origin
                self._go_on(life)
                if origin is not None:
                    run.checkpoint = origin
                    if folder is not None:
                        await self._set_newer_aside(origin, files, folder)
            run.life = life
            wheel = self._assembled(stack, life, limits, path, files, folder, thread, bus)
            self._bus = bus
            self._hasten()
            try:
                reason, detail = await wheel.turn()
            except Exception:
                if self._saver is not None and self._saver.busy:  # it was waited for as long as it may be
                    self._leave()
                raise
            finally:
                if life.switch is not None and not self._gone.done():
                    await _judged(life.switch, thread)
                if self._saver is not None:
                    await self._saver.end()
                    run.checkpoint = self._saver.last or run.checkpoint
                run.position = (self._train, self._train.state_dict())
        state = run.state
        return FitResult(
            reason, detail, state.epoch, state.step, state.samples, dict(life.metrics), state.best, run.checkpoint
        )

    async def _set_newer_aside(self, path: Path, files: Files, folder: RunFolder) -> None:
        """Out of the way of `resume="auto"`: the run goes on from `path`."""
        step, disk = self._run.state.step, self._run.disk
        await files(partial(resume.set_newer_aside, folder.checkpoints, path, step, disk=disk))

    async def _restore(
        self,
        life: Life,
        path: Path,
        snapshot: Snapshot,
        files: Files,
        folder: RunFolder | None,
        thread: TrainThread,
    ) -> None:
        """Give the life the state of a checkpoint, and say so."""
        run, other = self._run, self._allow_data_change
        checkpoints = None if folder is None else folder.checkpoints
        await thread.run(lambda: life.restore(snapshot, path, checkpoints, allow_data_change=other))
        again = 0 if folder is None else await files(lambda: resume.repeated(folder.path, run.state.step))
        more = f"; {again} steps that were made after it are repeated" if again else ""
        logger.info("going on from %s at step %d%s", path, run.state.step, more)
        if life.ended is not None:
            logger.info("it had ended by early stopping (%s): a larger patience lets it go on", life.ended[1])
        run.checkpoint, run.loaded = path, None

    def _go_on(self, life: Life) -> None:
        """Where the last fit of this process ended in the middle of an epoch: continue there."""
        run, train = self._run, self._train
        if run.loaded is not None and run.origin is not None:
            life.check_go_on(run.loaded, run.origin)
        loaded, run.loaded = run.loaded, None
        if loaded is not None and life.go_on(loaded):
            return
        last = run.life
        if last is not None:
            life.restores, life.weights = last.restores, last.weights
            life.restored, life.told_restored = last.restored, last.told_restored
            life.metrics = last.metrics
            if not last.line_told:
                life.step.tally.window = last.step.tally.window
            life.step.take_over(last.step)
            life.ask_again(last)
        stream, position = run.position or (None, {})
        if stream is not None and behind(stream) is behind(train) and run.state.batch:
            if serves_one_epoch(train) and not hasattr(behind(train), "load_state_dict"):
                raise ConfigError(
                    f"this {type(behind(train)).__name__} was begun by an earlier fit: what it read ahead is gone",
                    hint="Give something that can be iterated again, or a new iterator: the epoch begins anew with it.",
                )
            train.load_state_dict(position)
            if last is not None:  # the order that a synchronous source drew, and the epoch's sums
                life.epoch_rng, life.own_rng, life.resumed = last.epoch_rng, last.own_rng, True
                life.step.tally.epoch = last.step.tally.epoch
        elif run.state.batch:
            logger.warning(
                "another stream: epoch %d begins anew, with batches that may have been trained on", run.state.epoch
            )
            run.state.batch, run.state.owes, run.state.verdicts = 0, "", []

    def _assembled(
        self,
        stack: AsyncExitStack,
        life: Life,
        limits: Limits,
        path: Path | None,
        files: Files,
        folder: RunFolder | None,
        thread: TrainThread,
        bus: Bus,
    ) -> Wheel:
        """The wheel and what turns with it; `path`: of the checkpoint that the life was given."""
        run, options, parts = self._run, self._options, self._run.parts
        plan = planned(
            options,
            limits,
            self._train,
            self._validation,
            thaws=() if parts.freezing is None else tuple(parts.freezing.steps()),
            fresh=path is None and not run.state.step,
            places={
                "run_dir": None if folder is None else str(folder.path),
                "resumed_from": None if path is None else str(path),
            },
        )
        status = StatusFile(files, folder)
        stack.push_async_callback(status.written)
        saver = None
        if folder is not None:
            rule, before = self._rule(), run.checkpoint
            saver = Saver(
                folder.checkpoints,
                rule,
                files,
                before=before,
                held=folder.check,
                logged=folder.sync_lines,
                disk=run.disk,
            )
        self._saver = saver
        teller = Teller(life, plan, bus, thread, status=status.write, notes=run.notes)
        driver = Driver(
            life,
            plan,
            thread,
            door=run.control,
            deterministic=options.deterministic,
            gone=self._gone,
        )
        stack.enter_context(Watchdog(options.watchdog, lambda: busy(thread, bus, saver, driver)))
        return Wheel(
            life,
            plan,
            validation=self._validation,
            evaluator=parts.evaluator,
            control=run.control,
            thread=thread,
            driver=driver,
            teller=teller,
            keeper=Keeper(
                life,
                saver,
                teller=teller,
                bus=bus,
                thread=thread,
                control=run.control,
                files=files,
                disk=run.disk,
                landed=driver.landed,
            ),
            patience=options.watchdog or None,
        )

    def _rule(self) -> ModelCheckpoint:
        return next(callback for callback in self._callbacks if isinstance(callback, ModelCheckpoint))


def busy(thread: TrainThread, bus: Bus, saver: Saver | None, driver: Driver) -> Iterator[Busy]:
    """What has begun and is not over, for the watchdog."""
    yield from bus.busy()
    if (since := thread.since) is not None:  # read once: its thread may end the job meanwhile
        yield Busy("a job of the train thread", since, thread="streamtrain-train")
    if saver is not None and saver.busy:
        yield Busy(f"the save of step {saver.step}", saver.since, thread="streamtrain-files-0")
    if driver.waiting is not None:
        yield Busy("the next batch of the training stream", driver.waiting, task="streamtrain-supply")


async def _judged(switch: Switch, thread: TrainThread) -> None:
    """Have the model with the weights to be judged by; where an error keeps it from that, the user gets the first."""
    try:
        await thread.run(switch.judge)
    except Exception:
        logger.exception("the model is left with the weights to learn with: the optimizer's eval() failed")


async def _first(error: Exception, files: Files, folder: RunFolder) -> Exception:
    """`error`; or that somebody has moved the folder, where some file that can't be found there was met before that."""
    if isinstance(error, EnvironmentProblem):
        try:
            await files(folder.check)
        except EnvironmentProblem as moved:
            return moved
    return error


async def _unlock(files: Files, folder: RunFolder) -> None:
    try:
        await files(folder.release)
    except EnvironmentProblem as problem:
        logger.error("%s stays locked until this process ends: %s", folder.path, problem)
