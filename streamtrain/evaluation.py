"""A stream through the model without learning from it: means of the loss and of metrics, weighted by samples.

Its law: an evaluation leaves nothing behind. Modes of modules are put back one by one, random numbers come from a copy
of the fit's, and no gradient is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from streamtrain.blame import explained
from streamtrain.data.batch import Batch
from streamtrain.data.source import Stream
from streamtrain.device import MoveBatch, autocast
from streamtrain.ending import to_its_end
from streamtrain.errors import ConfigError, DataError
from streamtrain.metrics import Mean, Metric, flattened
from streamtrain.outcome import Compute, Numbering, Outcome
from streamtrain.rng import Rng
from streamtrain.supply import Supply, supply
from streamtrain.tally import logged_number
from streamtrain.threads import TrainThread

T = TypeVar("T")
BURST = 0.02
"""Seconds of work on the train thread at a time."""


class Stopped(Exception):
    """A stop was asked for in the middle of it."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if modes[0][1]:
            model.train()
        for module, training in modes:
            module.training = training


class Evaluator:
    """Computes means over streams; what `validate`, `evaluate` and `predict` have in common."""

    def __init__(
        self,
        model: nn.Module,
        compute: Compute,
        metrics: Mapping[str, Metric],
        *,
        move: MoveBatch,
        device: torch.device,
        precision: str = "32",
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
        graphs: bool = False,
        numbering: Numbering | None = None,
    ) -> None:
        """`weights`: within it the model has those that count, if they are not those that it trains with. `graphs`: it
        runs in CUDA graphs. `numbering`: is told which batch of its pass is computed."""
        self.metrics = dict(metrics)
        self.tables: dict[str, list[Any]] = {}
        """Of the last run: what metrics came to that is no number, by their names, as nested lists."""
        self._model, self._compute, self._move = model, compute, move
        self._autocast, self._weights, self._graphs = autocast(precision, device), weights, graphs
        self._numbering = numbering or Numbering()
        self._turns: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    def _turn(self) -> asyncio.Lock:
        """The lock of the running loop: two runs at once would add to the same metrics."""
        loop = asyncio.get_running_loop()
        if self._turns is None or self._turns[0] is not loop:
            self._turns = loop, asyncio.Lock()
        return self._turns[1]

    async def run(
        self,
        stream: Stream,
        thread: TrainThread,
        rng: Rng,
        *,
        limit: int | None = None,
        stopping: Callable[[], bool] = lambda: False,
        gone: asyncio.Future[None] | None = None,
    ) -> dict[str, float]:
        """The means over one pass of `stream`, of `limit` batches at most: `loss` and the metrics by their names.

        One run at a time: another one waits for its turn. Raises DataError if it gives nothing, Stopped once
        `stopping()` says so. `gone`: settled once nobody is to wait any more for a burst that does not return.
        """
        async with self._turn():
            sums = _Sums(self.metrics)
            async with aclosing(self._bursts(stream, thread, rng, limit, sums.add, gone=gone)) as bursts:
                async for _ in bursts:
                    if stopping():
                        raise Stopped
            if not sums.samples:
                raise DataError("a stream to evaluate on gave no batch", hint="Check its split and filters.")
            values = await thread.run(sums.compute)
            self.tables = {name: value for name, value in values.items() if isinstance(value, list)}
            return {name: value for name, value in values.items() if not isinstance(value, list)}

    def each(
        self, stream: Stream, thread: TrainThread, rng: Rng, compute: Compute, use: Callable[[Batch, Outcome], T]
    ) -> AsyncGenerator[list[T], None]:
        """What `use` makes of each batch and what it came to, on the train thread: a list for each burst, in order."""
        return self._bursts(stream, thread, rng, None, use, compute)

    async def _bursts(
        self,
        stream: Stream,
        thread: TrainThread,
        rng: Rng,
        limit: int | None,
        use: Callable[[Batch, Outcome], T],
        compute: Compute | None = None,
        gone: asyncio.Future[None] | None = None,
    ) -> AsyncGenerator[list[T], None]:
        """Run `use(batch, outcome)` for each batch on the train thread; a list of its results for each burst."""
        own = Rng(rng.state)
        batches = _supply(stream, thread, own, limit)
        each, done = 0.0, _Done()
        flying: asyncio.Future[tuple[list[T], float]] | None = None
        try:
            while await batches.wait():
                batches.burst(max(1, int(BURST / each)) if each else 1)
                flying = thread.submit(lambda: self._burst(batches, own, use, compute or self._compute, done))
                made, seconds = await asyncio.shield(flying)
                batches.burst(None)
                if made:
                    each = seconds / len(made)
                    yield made
        finally:
            try:
                if flying is not None and not flying.done():
                    either: set[asyncio.Future[Any]] = {flying} if gone is None else {flying, gone}
                    ended = asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                    await to_its_end(ended, "streamtrain-burst-end")
            finally:
                await batches.aclose()

    def _burst(
        self, batches: Supply, rng: Rng, use: Callable[[Batch, Outcome], T], compute: Compute, done: _Done
    ) -> tuple[list[T], float]:
        began = time.perf_counter()
        self._numbering.ask = done.asked  # another pass may have computed meanwhile
        made: list[T] = []
        batch: Batch | None = None
        with rng.swapped_in(), self._weights(), evaluating(self._model):
            while time.perf_counter() - began < BURST and (batch := batches.take()) is not None:
                try:
                    batch = self._move(batch)
                    if len(batch):  # a filter may drop every row
                        if self._graphs:
                            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                        with self._autocast():
                            outcome = compute(batch)
                            made.append(use(batch, outcome.copied() if self._graphs else outcome))
                        done.batches += 1
                except BaseException as error:  # a user's sys.exit() too: it must not end the host's loop
                    problem = explained(error, batch, "in evaluation")
                    raise problem from problem.__cause__
        return made, time.perf_counter() - began


class _Done:
    """How many batches of a pass are computed."""

    def __init__(self) -> None:
        self.batches = 0

    def asked(self) -> int:
        return self.batches


def _supply(stream: Stream, thread: TrainThread, rng: Rng, limit: int | None) -> Supply:
    async def run(fn: Callable[[], Batch | None]) -> Batch | None:
        def job() -> Batch | None:
            with rng.swapped_in():
                return fn()

        return await thread.run(job)

    return supply(stream, limit=limit, runner=run)


class _Sums:
    """The loss, the metrics, and what a step function returned beside them."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.samples = 0
        self._metrics = metrics
        self._means: dict[str, Mean] = {}
        for metric in metrics.values():
            metric.reset()

    def add(self, batch: Batch, outcome: Outcome) -> None:
        samples = len(batch)
        self.samples += samples
        values = dict(outcome.logged or {})
        if outcome.loss is not None:
            values = {"loss": outcome.loss, **values}
        for name, value in values.items():
            mean = logged_number(name, value)
            self._means.setdefault(name, Mean()).add(mean * samples, samples)
        if self._metrics and outcome.outputs is None:
            raise ConfigError(
                "metrics need outputs, and the step returned none",
                hint="Have it return {'loss': ..., 'outputs': ..., 'targets': ...}.",
            )
        targets = batch.inputs if outcome.targets is None else outcome.targets
        for name, metric in self._metrics.items():
            try:
                metric.update(outcome.outputs, targets)
            except Exception as error:
                problem = explained(error, batch, "in evaluation", who=f"the metric {name!r}")
                raise problem from problem.__cause__

    def compute(self) -> dict[str, Any]:
        values: dict[str, Any] = {name: mean.compute() for name, mean in self._means.items()}
        for name, metric in self._metrics.items():
            try:
                values.update(flattened(name, metric.compute()))
            except Exception as error:
                problem = explained(error, None, "in evaluation", who=f"the metric {name!r} (its compute)")
                raise problem from problem.__cause__
        return values
