"""What is kept of a fit, and when: periodic saves, the best, what was asked for, the end.

Its law: a checkpoint is taken between two updates, after all that its step brings with it, and never twice of the same
state.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from streamtrain import checkpoint
from streamtrain.callbacks.bus import Bus
from streamtrain.checkpoint import Committed
from streamtrain.control import Control, Save
from streamtrain.disk import LOCAL, Disk
from streamtrain.errors import ConfigError, EnvironmentProblem, StreamtrainError
from streamtrain.evaluation import Stopped
from streamtrain.events import CheckpointCommitted, CheckpointFailed, Event, Log, Verdict
from streamtrain.file_thread import Files
from streamtrain.grace import lost
from streamtrain.learning_rate import bring_to
from streamtrain.life import Life, has_state
from streamtrain.progress import Best
from streamtrain.saving import Saver
from streamtrain.state import Snapshot, Tree, fresh
from streamtrain.tally import Report
from streamtrain.telling import Teller
from streamtrain.threads import TrainThread

T = TypeVar("T")
logger = logging.getLogger(__name__)

_PATIENCE = 0.1
"""Seconds for which training waits until callbacks with a state have taken in what was told."""
_ASKED = 0.5
"""The same for a save that somebody waits for, who may be in a hook: nobody is waited for after it."""
_LATE = 30.0
"""Seconds for which a save, while training goes on, waits for the states of those that lag more; where all has to be
over soon, no more than a quarter of what is left."""
_LOOK = 0.1
"""Seconds until it is seen that a hook waits for another save, for which none is waited for any longer."""


class Keeper:
    """Decides on the saves of one fit and takes its snapshots; without a `saver` only the best weights, in memory."""

    def __init__(
        self,
        life: Life,
        saver: Saver | None,
        *,
        teller: Teller,
        bus: Bus,
        thread: TrainThread,
        control: Control,
        files: Files,
        disk: Disk = LOCAL,
        landed: Callable[[], Awaitable[Sequence[Report]]],
    ) -> None:
        """`landed`: waits until no burst is under way, and gives those that are not told yet."""
        self._disk, self._landed = disk, landed
        self._life, self.saver, self._teller, self._bus = life, saver, teller, bus
        self._thread, self._control, self._files = thread, control, files
        if saver is not None:
            saver.pins = self._pins
        self._when = time.monotonic()
        elsewhere = saver is not None and saver.last is not None and saver.last.parent != saver.checkpoints
        self._saved = None if elsewhere else self._mark()
        """The state that was last saved in the run's own folder; None where it goes on from another run's."""
        self._coming: list[Best] = []
        """The best of the last judged step, by monitor, which are named once they are saved."""
        self._joined = 0
        """Periodic saves that were due while another was under way."""
        self._before: dict[str, asyncio.Future[Tree | None]] = {}
        """While deciders are asked, and where that failed: the states of before of the callbacks that lag, by name."""
        self._pressed = asyncio.Event()
        """Somebody waits until the save under way is over."""
        self._told_behind: set[str] = set()

    def _mark(self) -> tuple[int, int, str, bool]:
        """What tells one state that is worth saving from another."""
        progress = self._life.progress
        return progress.step, progress.epoch, progress.owes, self._life.ended is not None

    def _pins(self) -> set[str]:
        bests = self._life.progress.bests.values()
        return {best.checkpoint.name for best in bests if best.checkpoint is not None}

    def next_step(self, step: int) -> int | None:
        """The next step at which a save is due by its number."""
        return None if self.saver is None else self.saver.rule.schedule.next_step(step)

    def due(self, epoch: int, *, epoch_end: bool = False) -> bool:
        """Whether a periodic save is due; `epoch_end`: the last update of `epoch` was just made."""
        if self.saver is None or self._saved == self._mark():
            return False
        self.saver.reserve(self._content)
        since = time.monotonic() - self._when
        return self.saver.rule.schedule.due(self._life.progress.step, epoch, since, epoch_end=epoch_end)

    async def _content(self) -> list[Tensor]:
        return await self._thread.run(self._life.tensors)

    async def save_if_due(self, epoch: int, *, epoch_end: bool = False) -> None:
        """Begin a periodic save, unless the one before is still under way."""
        if not self.due(epoch, epoch_end=epoch_end):
            return
        assert self.saver is not None
        if not self.saver.busy:
            await self.save("periodic")
            return
        if not self._joined:
            message = "a save is due at step %d while the one before is under way: it is joined with the next"
            logger.warning(message, self._life.progress.step)
        self._joined += 1

    async def judge(self, verdicts: list[Verdict], epoch: int) -> str:
        """Take in what the deciders want kept of this very step, of `epoch`: as what it is to be saved, if it is."""
        kind = ""
        for verdict in verdicts:
            if verdict.restore:
                self._life.restores = verdict.monitor
            if verdict.save and kind != "best":
                kind = verdict.save
            if verdict.save == "best" and verdict.value is not None:
                await self._offer(verdict.monitor, verdict.value, epoch, in_memory=verdict.restore)
        return kind

    async def _offer(self, monitor: str, value: float, epoch: int, *, in_memory: bool) -> None:
        """A new best; where there is a folder it is named once its save is committed: until then the old one stands."""
        progress, saver = self._life.progress, self.saver
        if saver is not None:
            best = Best(monitor, value, epoch, progress.step, saver.path(progress.step))
            self._coming = [*(other for other in self._coming if other.monitor != monitor), best]
            return
        progress.offer(Best(monitor, value, epoch, progress.step), primary=monitor)
        if in_memory:
            self._life.weights = await self._thread.run(self._life.best_weights)

    async def save(self, kind: str, request: Save | None = None) -> None:
        """Take a snapshot and have it committed while training goes on."""
        saver = self.saver
        if saver is None:
            if request is not None:
                await self._save_elsewhere(request)
            return None
        began = time.perf_counter()
        self._pressed.set()
        try:
            await saver.wait()  # one at a time: there is memory for one copy
        finally:
            self._pressed.clear()
        path, done = (None, None) if request is None else (request.path, request.done)
        if path is None and (kept := last_weights(self._life)) is not None:
            return None if done is None else done(kept, None)
        step, rule = self._life.progress.step, saver.rule
        where = {**self._teller.standing(), "kind": kind}  # of this step, not of the later one

        async def failed(error: Exception, failures: int) -> None:
            about = {**where, "path": str(saver.path(step)), "error": error, "failures": failures}
            await self._teller.emit("on_checkpoint_failed", CheckpointFailed, **about)

        def given_up(problem: EnvironmentProblem) -> None:
            if path is not None and done is not None:  # it concerns only whoever asked
                return done(None, problem)
            self._saved, self._when = self._mark(), time.monotonic()
            return saver.give_up(problem, kind=kind, failed=failed, done=done)

        if path is None and (problem := await saver.lack_of_room(step)) is not None:
            return given_up(problem)
        coming = [best for best in self._coming if best.step == step and path is None]
        late = await self._settled(_PATIENCE if done is None else _ASKED)
        try:
            snapshot = await self._snapshot(coming, primary=rule.monitor, late=late if done is None else ())
        except EnvironmentProblem as problem:  # there is no memory for it
            return given_up(problem)
        stall = time.perf_counter() - began
        if path is None:
            self._saved, self._when = self._mark(), time.monotonic()

        async def told(committed: Committed) -> None:
            for best in coming:
                self._life.progress.offer(best, primary=rule.monitor)
            about = {**where, "path": str(committed.path), "bytes": committed.bytes, "seconds": stall}
            about["buffers"] = saver.buffers.bytes
            await self._teller.emit("on_checkpoint", CheckpointCommitted, **about)

        async def complete() -> None:
            await self._complete(snapshot, late)

        if done is not None:  # a hook may wait for it, and none comes to its mark before that is over
            self._say_behind(late, logging.INFO)
        brings = complete if late and done is None else None
        return saver.begin(snapshot, step, kind=kind, told=told, failed=failed, path=path, done=done, complete=brings)

    async def save_all(self, requests: Sequence[Save]) -> None:
        """Save as was asked, once into the run's folder; where that raises, all who wait for one are told before."""
        left = deque(_at_once(requests))
        try:
            while left:
                await self.save("request", left[0])
                left.popleft()
        except BaseException as error:
            for request in left:
                if request.done is not None:
                    request.done(None, error if isinstance(error, Exception) else None)
            raise

    async def _save_elsewhere(self, request: Save) -> None:
        """A save that was asked for in a fit without a folder: training waits for it."""
        path, done = request.path, request.done or (lambda path, error: None)
        if path is None:
            logger.warning("a checkpoint was asked for without a path, in a fit without a run_dir: none is made")
            return done(None, ConfigError("a fit without a run_dir saves only to a path", hint="Give one."))
        try:
            self._say_behind(await self._settled(_ASKED), logging.INFO)
            snapshot = await self._snapshot()
            committed = await self._files(lambda: checkpoint.commit(path, snapshot, disk=self._disk))
        except Exception as error:
            return done(None, error)
        return done(committed.path, None)

    async def _snapshot(
        self, coming: Sequence[Best] = (), *, primary: str = "", late: Collection[str] = ()
    ) -> Snapshot:
        """What the last finished update left, copied; it names the best that it is itself, and lacks the states of the
        callbacks that are `late`. A learning rate that was asked for before is part of it."""
        if (lr := self._control.take_rate()) is not None:
            self.set_lr(lr)
        with self._life.progress.offered(coming, primary=primary):
            state = self._life.state(late)
        copier = fresh if self.saver is None else self.saver.buffers.copies
        return await self._thread.run(lambda: self._life.snapshot(state, copier))

    async def ask(
        self, hook: str, kind: type[Event], /, *, line: Mapping[str, float] | None = None, **fields: Any
    ) -> list[Verdict]:
        """What the deciders answer, and the line of a validation before; a checkpoint made meanwhile, or after an error
        in it, is of before, and the life that goes on, from it or in this process, tells and asks all again."""
        asked: dict[str, Tree] = {}
        self._before = self._bus.mark(_told_again, partial(self._taken, into=asked))
        asked |= self._life.states(self._names(_told_again).difference(self._before))
        self._life.asked = asked
        answers = await self.attend(self._answers(hook, kind, line, **fields))
        self._life.asked, self._before = {}, {}
        return answers

    async def _answers(
        self, hook: str, kind: type[Event], line: Mapping[str, float] | None, /, **fields: Any
    ) -> list[Verdict]:
        if line is not None:
            await self._teller.emit("on_log", Log, split="val", values=line)
        return await self._teller.ask(hook, kind, **fields)

    async def attend(self, telling: Coroutine[Any, Any, T], *, unless: Callable[[], bool] = lambda: False) -> T:
        """Wait for callbacks; a save for which one of their hooks waits is made meanwhile, else both wait for ever.

        Raises Stopped once `unless()` says so, when what was waited for has been cancelled and has ended.
        """
        told = asyncio.create_task(telling)
        try:
            while not told.done():
                if unless():
                    raise Stopped
                if self._control.saves_wait:
                    self._teller.burst_nowait(await self._landed())
                    await self.save_all(() if self._life.step.partial else self._control.take_saves())
                knocked = asyncio.create_task(self._control.knocked())
                try:
                    await asyncio.wait({told, knocked}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    knocked.cancel()
        finally:
            told.cancel()
            await asyncio.wait([told])
        return told.result()

    async def _settled(self, seconds: float) -> dict[str, asyncio.Future[Tree | None]]:
        """Let callbacks that have a state take in what was told. One that lags is not waited for long: its state comes
        once it has, copied before it is given anything more; where those of before are to be kept, these, and of now
        what those write that write lines."""
        asking = bool(self._before or self._life.asked)
        marked = _writes_lines if asking else has_state
        marks = self._before | self._bus.mark(marked, partial(self._taken, into={}))
        late = [mark for mark in marks.values() if not mark.done()]
        if late:
            await asyncio.wait(late, timeout=seconds)
        return {name: mark for name, mark in marks.items() if not mark.done()}

    async def _taken(self, callback: object, *, into: dict[str, Tree]) -> Tree:
        """A copy of one callback's state, put down before it is given anything more."""
        names = [name for name, each in self._life.callbacks.items() if each is callback]
        states = await self._thread.run(lambda: self._life.states(names))
        into |= states
        return states[names[0]]

    def _names(self, only: Callable[[object], bool]) -> set[str]:
        """The names of the callbacks that `only` picks."""
        return {name for name, callback in self._life.callbacks.items() if only(callback)}

    async def _complete(self, snapshot: Snapshot, late: Mapping[str, asyncio.Future[Tree | None]]) -> None:
        """Have the states of those that lag in a snapshot, as they are once they have taken in what was told before."""
        now, stop = time.monotonic(), self._control.stopping
        deadline = None if stop is None else stop.deadline
        until = now + (_LATE if deadline is None else min(_LATE, (deadline - now) / 4))
        pressed: asyncio.Future[Any] = asyncio.create_task(self._pressed.wait())
        try:
            while not (pressed.done() or self._control.saves_wait) and (left := until - time.monotonic()) > 0:
                lagging: set[asyncio.Future[Any]] = {mark for mark in late.values() if not mark.done()}
                if not lagging:
                    break
                await asyncio.wait({*lagging, pressed}, timeout=min(_LOOK, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            pressed.cancel()
        states = {name: mark.result() for name, mark in late.items() if mark.done()}
        behind = [name for name in late if states.get(name) is None]
        self._say_behind(behind)
        states |= self._life.states(behind)
        snapshot.state["callbacks"].update(states)

    def _say_behind(self, names: Iterable[str], level: int = logging.WARNING) -> None:
        """Once for each whose state is saved as it is, behind its step."""
        for name in [name for name in names if name not in self._told_behind | self._life.asked.keys()]:
            self._told_behind.add(name)
            logger.log(
                level,
                "callback %s had not taken in all that it was told when a checkpoint could not wait for it any longer: "
                "a run that goes on from there does not tell it again",
                name,
            )

    def set_lr(self, lr: float) -> None:
        """Bring the first group's rate to `lr`, between two updates: what was saved of this step before lacks it."""
        if bring_to(self._life.lr, self._life.optimizer, lr):
            self._saved = None

    def check(self) -> None:
        """Raise the error of saves that failed too often."""
        if self.saver is not None:
            self.saver.check()

    async def save_at_end(self) -> None:
        """Save the last state, unless it is saved, and wait until it is."""
        if self.saver is None:
            return
        await self.saver.wait()
        unsaved = self._life.progress.step and (self._saved != self._mark() or self.saver.behind)
        if unsaved and await self._fits():
            await self.save("end")
        await self.saver.wait()
        if self._joined:
            logger.warning("%d saves were due while another was under way: joined with later ones", self._joined)
            self._joined = 0

    async def _fits(self) -> bool:
        """Whether a save can be over when all has to be: one that can't be is not begun, and that is said."""
        stop, saver, step = self._control.stopping, self.saver, self._life.progress.step
        if stop is None or stop.deadline is None or saver is None:
            return True
        forecast = await saver.forecast(lambda: self._thread.run(self._life.bytes))
        left = max(0.0, stop.deadline - time.monotonic())
        if forecast is None or forecast.seconds <= left:
            return True
        last = saver.last
        kept = f"{last.name} is the last checkpoint{lost(last, step)}" if last else "there is no checkpoint yet"
        message = "step %d is not saved: that would take %s, and %.3g s of the grace are left; %s"
        logger.warning(message, step, forecast, left, kept)
        return False

    async def save_after_error(self) -> None:
        """The same where saving itself may be what went wrong, or the weights may be worth nothing: then only what is
        under way is waited for. So too where batches are taken that are part of no update: their random numbers are."""
        saver, made, step = self.saver, self._life.step, self._life.progress.step
        if saver is not None and (saver.failing or made.torn or made.partial):
            return await saver.wait()
        await self.save_at_end()
        if saver is not None and saver.failing:
            try:
                saver.check()
            except StreamtrainError as problem:
                left = lost(saver.last, step) if saver.last is not None else ""
                logger.error("after the error step %d could not be saved either: %s%s", step, problem, left)
        return None

    async def load_best(self) -> None:
        """Put the weights of the best value into the model; the checkpoint of the end keeps the last ones."""
        life = self._life
        best = life.progress.bests.get(life.restores or "")
        if not self._restoring():
            return None
        if best is None:
            return self._say_no_best()
        if best.step == life.progress.step:
            if life.average is not None:
                self._keep_last()
                await self._thread.run(life.average.into_model)
            return None
        weights, average, path = life.weights, None, best.checkpoint
        if path is not None and await self._files(path.is_dir):
            snapshot = await self._files(lambda: checkpoint.read(path, disk=self._disk))
            weights, average = snapshot.model, snapshot.state["average"]
        told = f"the weights of step {best.step}, the best {best.monitor} ({best.value:g})"
        if weights:
            self._keep_last()
            await self._thread.run(lambda: life.load_weights(weights, average))
            logger.info("the model has %s", told)
        else:
            logger.warning("%s, are not at hand: the model keeps the last ones", told)
        return None

    def _say_no_best(self) -> None:
        """Somebody asks for the best weights by name, and there are none."""
        callbacks = self._life.callbacks.items()
        asking = [
            name for name, each in callbacks if getattr(each, "decides", False) and getattr(each, "restore_best", False)
        ]
        if asking and self._life.progress.step:
            of = self._life.restores or "what it monitors"
            logger.warning(
                "%s was to restore the best weights, but no best value of %s is known: the model keeps the last ones",
                *(", ".join(asking), of),
            )

    def _keep_last(self) -> None:
        """The model is given the best weights: what the run goes on from is saved, and not to be replaced by them."""
        if self.saver is not None and self.saver.last is not None:
            self._life.restored = self._life.progress.step, self.saver.last

    def _restoring(self) -> bool:
        """Whether a decider of this life may want the best weights at the end: an earlier life's may be gone."""
        rule = None if self.saver is None else self.saver.rule
        others = [callback for callback in self._life.callbacks.values() if callback is not rule]
        return any(getattr(other, "decides", False) and getattr(other, "restore_best", True) for other in others)


def _writes_lines(callback: object) -> bool:
    """Whether a callback has a state that tells which lines are written: they are, whatever is told again."""
    return has_state(callback) and bool(getattr(callback, "writes_lines", False))


def _told_again(callback: object) -> bool:
    """Whether a callback has the state of before where a life tells again what the one before told."""
    return has_state(callback) and not _writes_lines(callback)


def _at_once(requests: Sequence[Save]) -> list[Save]:
    """One save for all that go into the run's folder, and those to places of their own: their state is the same."""
    own = [request for request in requests if request.path is None]
    if len(own) < 2:
        return list(requests)

    def done(path: Path | None, error: BaseException | None) -> None:
        for request in own:
            if request.done is not None:
                request.done(path, error)

    return [Save(done=done), *(request for request in requests if request.path is not None)]


def last_weights(life: Life) -> Path | None:
    """The checkpoint of this step that has the last weights, while the model has the best ones: it is not replaced by
    them, for the run goes on from it, and that is said once. None where the model has the last weights itself."""
    step, path = life.restored or (-1, None)
    if step != life.progress.step or path is None:
        return None
    if not life.told_restored:
        life.told_restored = True
        logger.warning(
            "nothing is saved: the model has the best weights, and %s stays, which has the last ones, from which the "
            "run goes on (save_checkpoint(path) saves the best)",
            path,
        )
    return path
