"""Bursts driven over an epoch's batches; its law: whatever interrupts, a burst that began is waited for and counted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import torch

from streamtrain import own_rng
from streamtrain.blame import exhausted
from streamtrain.data.batch import Batch
from streamtrain.errors import EnvironmentProblem
from streamtrain.evaluation import BURST
from streamtrain.life import Life
from streamtrain.plan import Plan
from streamtrain.supply import Supply, supply
from streamtrain.tally import Report
from streamtrain.threads import TrainThread


class Driver:
    """Runs the train step of one fit on the train thread."""

    def __init__(
        self, life: Life, plan: Plan, thread: TrainThread, *, deterministic: bool, gone: asyncio.Future[None]
    ) -> None:
        assert life.stream is not None
        self._life, self._plan, self._thread, self._stream = life, plan, thread, life.stream
        self._kernels = _deterministic if deterministic else contextlib.nullcontext
        self.gone = gone
        """Settled once nobody is to wait any more for a burst that does not return."""
        self._flying: asyncio.Future[Report] | None = None
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
            limit = max(0, limit - progress.batch)
        if life.resumed:
            await self._thread.run(self._hire)
            own_rng.restore(self._stream, life.own_rng)
            life.resumed = False
        elif not progress.batch:
            life.own_rng = own_rng.capture(self._stream)
        source = supply(self._stream, limit=limit, runner=self._pull)
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
                if source.finished_nowait():
                    life.own_rng = own_rng.capture(self._stream)  # the next epoch begins with it
                if life.before_ahead is not None:
                    life.rng.state, life.before_ahead = life.before_ahead, None
                await source.aclose()

    def _hire(self) -> None:
        with self._life.rng.swapped_in(keep=False):
            own_rng.hire(self._stream)

    async def _pull(self, fn: Callable[[], Batch | None]) -> Batch | None:
        """Pull a batch before its burst; until that begins, a life is put down as if it had not been pulled."""
        life = self._life

        def job() -> Batch | None:
            before = life.rng.state
            with life.rng.swapped_in():
                batch = fn()
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

    async def burst(self, batches: Supply, updates: int | None) -> Report:
        """One burst of `updates` updates at most, counted; an error that ended it is in the report, to be raised once
        what came before is told."""
        step, rng, progress = self._life.step, self._life.rng, self._life.progress
        if not step.seconds:
            updates = 1  # nobody knows yet how long one takes
        remaining, epoch, kernels = self._plan.remaining(progress, step.taken), progress.epoch, self._kernels
        samples, elapsed = progress.samples, progress.time

        def job() -> Report:
            self._life.before_ahead = None
            if self._life.switch is not None:
                self._life.switch.learn()
            with rng.swapped_in(), kernels():
                if self._life.freezing is not None:
                    self._life.freezing.apply(step.step, epoch)
                return self._run(
                    batches, updates=updates, epoch=epoch, remaining=remaining, samples=samples, elapsed=elapsed
                )

        waited = batches.waited
        self._flying = self._thread.submit(job)
        batches.burst(self._batches_of(updates))
        report = await asyncio.shield(self._flying)
        batches.burst(None)
        self.waited += batches.waited - waited
        self._land(report)
        return report

    def _run(self, batches: Supply, **how: Any) -> Report:
        step, compiled = self._life.step, self._life.compiled
        before = step.seconds
        report = step.run(batches, seconds=BURST, **how)
        if compiled is not None and compiled.grown():
            step.seconds = before  # compiling took the time: nobody knows yet how long an update takes
        return report

    def _batches_of(self, updates: int | None) -> int:
        """About how many batches a burst takes."""
        each = self._life.step.seconds
        predicted = max(1, int(BURST / each)) if each else 1
        return (predicted if updates is None else min(predicted, updates)) * self._life.step.accumulate

    def _land(self, report: Report) -> None:
        """Count what a burst has finished."""
        self._flying = None
        progress = self._life.progress
        progress.step += report.updates
        progress.samples += report.samples
        progress.batch += report.batches
        if report.updates:
            progress.owes = ""
        if report.cursor is not None:
            self._stream.trained(report.cursor)

    async def landed(self) -> None:
        """Wait for a burst that nobody waits for any more, and count it. Raises EnvironmentProblem if it hangs, or if
        another job of the train thread does."""
        while self._flying is not None:
            with contextlib.suppress(asyncio.CancelledError):
                either: set[asyncio.Future[Any]] = {self._flying, self.gone}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not self._flying.done():
                    break
                flying, self._flying = self._flying, None
                self._land(flying.result())
        if self.gone.done() and self._thread.since is not None:
            raise EnvironmentProblem("a step has not returned in time", hint="It is left behind.")

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


@contextmanager
def _deterministic() -> Iterator[None]:
    """Have torch take deterministic kernels alone, and put back what was chosen before."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
