"""Bursts driven over an epoch's batches, each handed over before the last one is told.

Its law: whatever interrupts, a burst that began is waited for and counted; and nobody saves, validates or changes
anything while there is one ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch

from streamtrain import own_rng
from streamtrain.blame import exhausted
from streamtrain.data.batch import Batch
from streamtrain.device import deterministic_kernels
from streamtrain.errors import EnvironmentProblem
from streamtrain.evaluation import BURST
from streamtrain.life import Life
from streamtrain.plan import Plan
from streamtrain.rng import RngState, drawn_aside
from streamtrain.step import Door
from streamtrain.supply import Supply, supply
from streamtrain.tally import Report
from streamtrain.threads import TrainThread

logger = logging.getLogger(__name__)


class _Row:
    """Bursts of an epoch that follow each other without a word from the event loop; counted on the train thread."""

    def __init__(self, life: Life, until: int | None) -> None:
        """`until`: the step at which it ends at the latest."""
        progress = life.progress
        self.epoch, self.batches, self.samples, self.until = progress.epoch, progress.batch, progress.samples, until
        self.taken = progress.taken
        self.begun = self.over = False
        """A burst has begun; no further one does, which either side may say, and neither takes back."""
        self._since = time.perf_counter() - progress.time

    @property
    def elapsed(self) -> float:
        """Seconds of the run so far."""
        return time.perf_counter() - self._since


class Driver:
    """Runs the train step of one fit on the train thread."""

    def __init__(
        self,
        life: Life,
        plan: Plan,
        thread: TrainThread,
        *,
        door: Door,
        deterministic: bool,
        gone: asyncio.Future[None],
    ) -> None:
        assert life.stream is not None
        self._door = door
        self._life, self._plan, self._thread, self._stream = life, plan, thread, life.stream
        self._kernels = deterministic_kernels if deterministic else contextlib.nullcontext
        self.gone = gone
        """Settled once nobody is to wait any more for a burst that does not return."""
        self._row: _Row | None = None
        self._flying: deque[asyncio.Future[Report | None]] = deque()
        """The burst under way, and the one behind it; None of one that did not begin."""
        self._untold: deque[Report] = deque()
        """Counted, and not given back yet."""
        self._batches: Supply | None = None
        """Of the epoch under way."""
        self.waiting: float | None = None
        """Since when a batch is waited for, on `time.monotonic`'s clock."""
        self.waited = 0.0
        """Seconds for which the steps waited for data since the last report."""

    @asynccontextmanager
    async def batches(self) -> AsyncIterator[Supply]:
        """The epoch's batches, or the rest of them."""
        life, progress, limit = self._life, self._life.progress, self._plan.limit
        if self._stream.epoch != self._plan.stream_epoch(progress.epoch):
            limit = 0  # a stream that counts the end of an epoch as the next one's beginning
        elif limit is not None:
            limit = max(0, limit - progress.taken)
        if life.resumed:
            await self._thread.run(self._hire)
            own_rng.restore(self._stream, life.own_rng)
            life.resumed = False
        elif not progress.batch:
            life.own_rng = own_rng.capture(self._stream)
        life.step.tally.passed.clear()  # of a pass that was left: they come again
        self._batches = source = supply(self._stream, limit=limit, runner=self._pull)
        try:
            if self._stream.pulls_inside:
                if progress.batch and life.epoch_rng is not None:
                    await self._replay(source, life.epoch_rng)
                else:
                    life.epoch_rng = life.rng.state
            yield source
        except Exception as error:  # while the pass lives: what it holds can still be told
            raised, held = error, self._stream.statistics()
            problem = await self._thread.run(lambda: exhausted(raised, held))
            if problem is error:
                raise
            raise problem from error
        finally:
            try:
                await self.landed()
            finally:
                if life.before_ahead is not None:
                    life.rng.state, life.before_ahead = life.before_ahead, None
                await source.aclose()

    def ended(self) -> None:
        """All of the epoch is trained, and no life will ask for its batches again: the next epoch begins with the
        generators as they are now."""
        self._life.own_rng = own_rng.capture(self._stream)

    def _hire(self) -> None:
        with self._life.rng.swapped_in(keep=False):
            own_rng.hire(self._stream)

    async def _pull(self, fn: Callable[[], Batch | None]) -> Batch | None:
        """Pull a batch before its burst; until that begins, a life is put down as if it had not been pulled."""
        life = self._life

        def job() -> Batch | None:
            before = life.rng.state
            try:
                with life.rng.swapped_in():
                    batch = fn()
            except BaseException:
                life.rng.state = before  # what it drew before it raised
                raise
            life.before_ahead = None if batch is None else before
            return batch

        return await self._thread.run(job)

    async def _replay(self, source: Supply, state: Any) -> None:
        """Have a source produce again what was trained, with the random numbers that it had then; no more than that."""
        rng = self._life.rng

        def job() -> None:
            now, rng.state = rng.state, state
            try:
                with rng.swapped_in():
                    source.go_there()
            finally:
                rng.state = now

        await self._thread.run(job)

    @property
    def ahead(self) -> bool:
        """Whether bursts are under way, or were counted and not given back yet."""
        return bool(self._flying or self._untold)

    async def burst(self, most: Callable[[], int | None], *, wanted: Callable[[], bool]) -> Report | None:
        """The next burst, counted; an error that ended it is in the report, to be raised once what came before is told.
        None: it was not to begin any more.

        Where nothing is ahead one is begun; `most()`: updates that it and those behind it may make together. The first
        is alone, and ends what follows if it found no more batches; else two are always ahead, until `wanted()` says,
        once one is counted, that something is to be done when none is under way.
        """
        if not self.ahead:
            updates = most()
            self._row = _Row(self._life, None if updates is None else self._life.step.step + updates)
            self._hand_over(self._row)
        row = self._row
        assert row is not None
        report = self._untold.popleft() if self._untold else await self._next()
        if wanted():  # nothing but True is ever written: the train thread may have, while this was asked
            row.over = True
        while len(self._flying) < 2 and not row.over:
            self._hand_over(row)
        return report

    def _hand_over(self, row: _Row) -> None:
        batches = self._batches
        assert batches is not None

        def job() -> Report | None:
            try:
                if row.begun and self._door.pending:
                    row.over = True
                return None if row.over else self._made(batches, row)
            except BaseException:
                row.over = True
                raise

        self._flying.append(self._thread.submit(job))
        batches.burst(self._batches_of(None if row.until is None else row.until - self._life.step.step))

    def _made(self, batches: Supply, row: _Row) -> Report:
        """One burst, and whether another one follows; on the train thread."""
        life, step = self._life, self._life.step
        begin = None if step.partial else life.before_ahead or life.rng.state
        row.begun, life.before_ahead = True, None
        if life.switch is not None:
            life.switch.learn()
        updates = None if row.until is None else row.until - step.step
        waited, seconds = batches.waited, step.seconds
        # Whoever awaits elsewhere within torch.no_grad() has set that for all of the loop's thread.
        with life.rng.swapped_in(), self._kernels(), torch.enable_grad():
            if life.freezing is not None:
                life.freezing.apply(step.step, row.epoch)
            report = step.run(
                batches,
                updates=updates if seconds else 1,  # nobody knows yet how long one takes
                seconds=BURST,
                epoch=row.epoch,
                remaining=self._plan.remaining(row.taken + step.taken),
                batches=row.batches,
                samples=row.samples,
                elapsed=row.elapsed,
            )
        if report.error is not None and begin is not None:
            self._put_back(report, begin)
        if life.compiled is not None and life.compiled.grown():
            step.seconds = seconds  # compiling took the time
        report.waited = batches.waited - waited
        row.batches, row.samples = row.batches + report.batches, row.samples + report.samples
        row.taken += report.batches + report.passed
        if (
            report.error is not None
            or not report.updates
            or step.step == row.until
            or step.partial
            or not batches.ready
            or batches.finished_nowait()
        ):
            row.over = True
        return report

    def _put_back(self, report: Report, begin: RngState) -> None:
        """After an error, what a source drew for the batches of no update: all of it where the burst began with them.

        Else a step puts torch's numbers back; states of the others cost as much as a small step, and are not kept.
        """
        rng = self._life.rng
        if not report.updates:
            rng.state = begin
        elif self._stream.pulls_inside and drawn_aside(begin, rng.state):
            logger.warning(
                "numbers that the data drew from numpy's or Python's generator for the batch that failed stay drawn: "
                "a run that goes on from here is not exact. Let them draw from torch's, or from one of their own"
            )

    def _batches_of(self, updates: int | None) -> int:
        """About how many batches a burst takes; never none, where the one under way has just made the last update that
        they may make together: nothing more would be fetched, and what comes after waits for it."""
        each = self._life.step.seconds
        predicted = round(BURST / each) if each else 1
        return max(1, predicted if updates is None else min(predicted, updates)) * self._life.step.accumulate

    async def _next(self) -> Report | None:
        """Wait for the burst under way, and count it."""
        await asyncio.wait([self._flying[0]])
        return self._land()

    def _land(self) -> Report | None:
        """Count what a burst that is over has finished."""
        over = self._flying.popleft()
        if not self._flying and self._batches is not None:
            self._batches.burst(None)
        report = over.result()
        if report is not None:
            self._count(report)
        return report

    def _count(self, report: Report) -> None:
        progress = self._life.progress
        progress.step += report.updates
        progress.samples += report.samples
        progress.batch += report.batches
        progress.passed += report.passed
        self.waited += report.waited
        if report.updates:
            progress.owes = ""
        if report.cursor is not None:
            self._stream.trained(report.cursor)

    async def landed(self) -> Sequence[Report]:
        """Wait for what is under way, let nothing follow it, and count it: `burst` gives it back, which this shows.
        Raises EnvironmentProblem if it hangs, or if another job of the train thread does."""
        if self._row is not None:
            self._row.over = True
        while self._flying:
            with contextlib.suppress(asyncio.CancelledError):
                either: set[asyncio.Future[Any]] = {self._flying[0], self.gone}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not self._flying[0].done():
                    break
                report = self._land()
                if report is not None:
                    self._untold.append(report)
        if self.gone.done() and self._thread.since is not None:
            self._life.left_behind = True
            raise EnvironmentProblem("a step has not returned in time", hint="It is left behind.")
        return tuple(self._untold)

    def take_untold(self) -> list[Report]:
        """What was counted and will not be given back any more."""
        untold = list(self._untold)
        self._untold.clear()
        return untold

    async def leave_partial(self) -> None:
        """Forget batches that are not part of a finished update: the next life takes them again."""
        step, rng = self._life.step, self._life.rng
        if not step.partial:
            return

        def job() -> None:
            with rng.swapped_in():
                step.undo()

        await self._thread.run(job)

    def take_waited(self) -> float:
        """Seconds for which the steps waited for data since this was last asked."""
        waited, self.waited = self.waited, 0.0
        return waited
