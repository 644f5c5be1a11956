"""What a cancellation costs: fits are cancelled at the n-th wake-up of the loop, natively and by scopes of all kinds.

Each n of one short fit in turn, and random ones. Nothing may be torn: every checkpoint holds the very weights that an
undisturbed run had after that step, and the last one those of the last step trained. Nothing may be left: no task, no
thread, no descriptor; and the cancellation must come out again. Every tenth run is resumed to its end.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import torch
from torch import nn

from data_tools.synth import synth
from streamtrain import ModelCheckpoint, Trainer, ZarrStream, checkpoint
from tests.bench import life
from tests.bench.measure import Measure, Options

COLUMNS, ROWS, BATCH, EPOCHS, EVERY, SEED = 3, 160, 16, 2, 3, 5
Fit = Callable[[], Awaitable[object]]
Act = Callable[[], object]


class Wakeups(asyncio.SelectorEventLoop):
    """Counts what it is asked to run soon, and acts at numbers that are given: within the very call."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._acts: dict[int, Act] = {}

    def arm(self, acts: dict[int, Act]) -> None:
        """Count from 0 again, and act at these."""
        self.count, self._acts = 0, dict(acts)

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *arguments: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """As a loop has it."""
        self.count += 1
        if self._acts and (act := self._acts.pop(self.count, None)) is not None:
            act()
        return super().call_soon(callback, *arguments, context=context)


class Fails(Exception):
    """What a sibling raises."""


async def native(loop: Wakeups, fit: Fit, at: int) -> None:
    """`task.cancel()`, once."""
    task = asyncio.ensure_future(fit())
    loop.arm({at: task.cancel})
    await asyncio.wait([task])


async def twice(loop: Wakeups, fit: Fit, at: int) -> None:
    """Twice, at once."""
    task = asyncio.ensure_future(fit())
    loop.arm({at: task.cancel, at + 1: task.cancel})
    await asyncio.wait([task])


async def later(loop: Wakeups, fit: Fit, at: int) -> None:
    """Again and again, while the end is under way."""
    task = asyncio.ensure_future(fit())
    loop.arm({at + 7 * n: task.cancel for n in range(5)})
    await asyncio.wait([task])


async def timeout(loop: Wakeups, fit: Fit, at: int) -> None:
    """`asyncio.timeout`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(None) as scope:
            loop.arm({at: lambda: scope.reschedule(loop.time())})
            await fit()


async def sibling(loop: Wakeups, fit: Fit, at: int) -> None:
    """Another task of an `asyncio.TaskGroup` fails."""
    now = asyncio.Event()

    async def fail() -> None:
        await now.wait()
        raise Fails

    with suppress(BaseExceptionGroup):
        async with asyncio.TaskGroup() as group:
            failing = group.create_task(fail())
            task = asyncio.ensure_future(fit())
            task.add_done_callback(lambda task: now.set())
            loop.arm({at: now.set})
            await task
        await failing


async def scope(loop: Wakeups, fit: Fit, at: int) -> None:
    """An anyio scope is cancelled."""
    with anyio.CancelScope() as cancelled:
        loop.arm({at: cancelled.cancel})
        await fit()


async def move_on(loop: Wakeups, fit: Fit, at: int) -> None:
    """The deadline of `anyio.move_on_after` is there."""
    with anyio.move_on_after(1000) as cancelled:
        loop.arm({at: lambda: setattr(cancelled, "deadline", loop.time())})
        await fit()


async def fail_after(loop: Wakeups, fit: Fit, at: int) -> None:
    """The same of `anyio.fail_after`, in a task of anyio's."""
    with suppress(BaseExceptionGroup):
        async with anyio.create_task_group() as group:

            async def work() -> None:
                with suppress(TimeoutError), anyio.fail_after(1000) as cancelled:
                    loop.arm({at: lambda: setattr(cancelled, "deadline", loop.time())})
                    await fit()

            group.start_soon(work)


Way = Callable[[Wakeups, Fit, int], Coroutine[Any, Any, None]]
WAYS: tuple[Way, ...] = (native, twice, later, timeout, sibling, scope, move_on, fail_after)


@dataclass
class Counts:
    """What came of all the cancellations."""

    cancelled: int = 0
    """Fits that were cancelled before their end."""
    begun: int = 0
    """Of those, such as had trained a step."""
    swallowed: int = 0
    """Cancellations that did not come out again."""
    torn: int = 0
    """Checkpoints that are damaged, or hold the weights of no step."""
    lost: int = 0
    """Fits whose last checkpoint is not of the last step that was trained."""
    left: list[str] = field(default_factory=list)
    """Tasks, threads and descriptors that were there afterwards, and were not before."""
    errors: list[str] = field(default_factory=list)
    """What was logged as one."""
    resumed: int = 0
    unequal: int = 0
    """Resumed runs that ended with other weights."""


class Campaign:
    """One store, one undisturbed run, and as many cancelled ones as are asked for."""

    def __init__(self, room: Path) -> None:
        self.room, self.counts = room, Counts()
        self.store = synth(room / "x.zarr", rows=ROWS, columns=COLUMNS, chunk_rows=16)
        self.digests: dict[int, str] = {}
        """Of the weights after each step."""
        self._number = 0

    def trainer(self, folder: Path | None) -> tuple[Trainer, nn.Module]:
        """A new one, with a new model."""
        model = life.network(COLUMNS)
        saves = [] if folder is None else [ModelCheckpoint(every=f"{EVERY}steps", keep_last=-1)]
        made = Trainer(
            model,
            nn.MSELoss(),
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
            callbacks=saves,
            run_dir=folder,
            seed=SEED,
            log_every=3,
            validate_every="5steps",
            grace=60,
            device="cpu",
        )
        return made, model

    def stream(self, split: tuple[float, float]) -> ZarrStream:
        """Of the training or the validation data."""
        shuffle = split[0] == 0
        options: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": BATCH, "memory": "8MiB"}
        return ZarrStream(self.store, split=split, shuffle="block" if shuffle else False, seed=SEED, **options)

    async def fit(self, trainer: Trainer, **options: Any) -> None:
        """The whole of it."""
        async with self.stream((0.0, 0.8)) as train, self.stream((0.8, 1.0)) as valid:
            await trainer.fit(train, validation=valid, max_epochs=EPOCHS, **options)

    async def whole(self, loop: Wakeups) -> int:
        """The undisturbed run; its wake-ups."""
        trainer, model = self.trainer(None)
        steps = iter(range(1, 10**6))
        self.digests = {0: life.digest(model.state_dict())}

        def after(*_: object) -> None:
            self.digests[next(steps)] = life.digest(model.state_dict())

        assert trainer.optimizer is not None
        hook = trainer.optimizer.register_step_post_hook(after)
        await self.fit(trainer)
        hook.remove()
        saving, _ = self.trainer(self.room / "whole")
        loop.arm({})
        await self.fit(saving)
        return loop.count

    def cancel(self, runner: asyncio.Runner, way: Way, at: int) -> None:
        """One fit, cancelled at a wake-up; what came of it."""
        self._number += 1
        folder = self.room / f"run-{self._number}"
        before = _alive(runner)
        ended, step = runner.run(self._cancelled(runner, folder, way, at))
        counts = self.counts
        counts.left += [f"{way.__name__} at {at}: {what}" for what in _alive(runner) - before]
        if ended[-1:] == ["done"]:
            return
        counts.cancelled += 1
        counts.begun += step > 0
        counts.swallowed += bool(ended) and ended[-1] != "cancelled"
        self._check(folder, step)
        if self._number % 10 == 0 and step:
            runner.run(self._resume(folder))

    async def _cancelled(self, runner: asyncio.Runner, folder: Path, way: Way, at: int) -> tuple[list[str], int]:
        """How it ended, and how many steps it had trained then; neither the trainer nor its streams are kept."""
        trainer, _ = self.trainer(folder)
        ended: list[str] = []

        async def fit() -> None:
            ended.append("begun")
            try:
                await self.fit(trainer)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            ended.append("done")

        loop = _wakeups(runner)
        await way(loop, fit, at)
        loop.arm({})
        return ended, trainer.state.step

    def _check(self, folder: Path, step: int) -> None:
        entries = checkpoint.scan(folder / "checkpoints")
        self.counts.lost += step > 0 and (not entries or entries[-1].step != step)
        for entry in entries:
            whole = entry.problem is None
            kept = life.digest(checkpoint.read(entry.path).model) if whole else ""
            self.counts.torn += kept != self.digests.get(entry.step)

    async def _resume(self, folder: Path) -> None:
        trainer, model = self.trainer(folder)
        await self.fit(trainer, resume="auto")
        self.counts.resumed += 1
        self.counts.unequal += life.digest(model.state_dict()) != self.digests[max(self.digests)]

    def run(self, cancellations: int, *, every: bool, seed: int = 0) -> Counts:
        """So many cancellations; with `every`, each wake-up of one fit natively first."""
        rng = random.Random(seed)
        errors = _Errors(self.counts.errors)
        logging.getLogger("streamtrain").addHandler(errors)
        try:
            with _one_thread(), asyncio.Runner(loop_factory=Wakeups) as runner:
                wakeups = runner.run(self.whole(_wakeups(runner)))
                self.cancel(runner, native, 10**9)  # what is made once in a process is made now
                gc.freeze()  # what is there by now need not be looked through after each fit
                for at in range(1, wakeups if every else 1):
                    self.cancel(runner, native, at)
                number = 0
                while self.counts.cancelled < cancellations:
                    self.cancel(runner, WAYS[number % len(WAYS)], rng.randrange(1, wakeups))
                    number += 1
        finally:
            gc.unfreeze()
            logging.getLogger("streamtrain").removeHandler(errors)
        return self.counts


def _wakeups(runner: asyncio.Runner) -> Wakeups:
    loop = runner.get_loop()
    assert isinstance(loop, Wakeups)
    return loop


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch computes in one: beside others, two for so small a model wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Errors(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())


def _alive(runner: asyncio.Runner) -> set[str]:
    """Tasks, threads and descriptors that are there."""
    gc.collect()
    tasks = {f"task {task.get_name()}" for task in asyncio.all_tasks(runner.get_loop())}
    threads = {f"thread {thread.name}" for thread in threading.enumerate()}
    links: set[str] = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists
            links.add(f"descriptor {number} of {os.readlink(f'/proc/self/fd/{number}')}")
    return tasks | threads | links


def run(options: Options) -> Iterator[Measure]:
    """1,000 cancellations, every wake-up of one fit among them."""
    with options.room() as room:
        counts = Campaign(room).run(40 if options.quick else 1000, every=not options.quick)
    yield from report(counts)


def report(counts: Counts) -> Iterator[Measure]:
    """A line for each thing that may go wrong."""
    for what in (counts.left + counts.errors)[:8]:
        yield Measure(name=f"  {what}", values=(1,))
    yield Measure(name="fits cancelled", values=(counts.cancelled,))
    yield Measure(name="  after their first step", values=(counts.begun,), at_least=counts.cancelled / 3)
    yield Measure(name="cancellations that did not come out again", values=(counts.swallowed,), at_most=0)
    yield Measure(name="torn snapshots", values=(counts.torn,), at_most=0)
    yield Measure(name="fits that lost a step", values=(counts.lost,), at_most=0)
    yield Measure(name="tasks, threads, descriptors left", values=(len(counts.left),), at_most=0)
    yield Measure(name="errors logged", values=(len(counts.errors),), at_most=0)
    yield Measure(name="runs resumed to the end", values=(counts.resumed,))
    yield Measure(name="  with other weights", values=(counts.unequal,), at_most=0)
