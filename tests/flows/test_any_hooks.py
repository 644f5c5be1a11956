"""Whatever hooks do, and however they lag: a run that goes on to its end is the undisturbed one.

Callbacks that keep a state count what they are told, at their leisure; others raise, save, stop or cancel, once, in a
hook and at a step that are drawn.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamtrain import checkpoint, keeping
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.json_logger import JSONLogger
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import StreamtrainError
from streamtrain.events import BatchEnd, Event, Log, Verdict
from streamtrain.telling import Teller
from streamtrain.trainer import Trainer
from tests.engine import Samples, lines, network, same

HOOKS = ("on_batch_end", "on_log", "on_validation_begin", "on_validation_end", "on_epoch_end", "on_checkpoint")
KINDS = ("batches", "lines", "validations", "epochs")
WAYS = ("raise", "save", "await save", "stop", "cancel", "save, and kill")


class Counting(Callback):
    """Counts what it is told in its state; in each hook it lets the loop turn so often."""

    state_key = "async"

    def __init__(self, lags: int) -> None:
        self.lags, self.told = lags, dict.fromkeys(KINDS, 0)

    async def _count(self, what: str, more: int = 1) -> None:
        for _ in range(self.lags):
            await asyncio.sleep(0)
        self.told[what] += more

    async def on_batch_end(self, event: BatchEnd) -> None:
        await self._count("batches", event.count)

    async def on_log(self, event: Log) -> None:
        await self._count("lines")

    async def on_validation_end(self, event: Event) -> None:
        await self._count("validations")

    async def on_epoch_end(self, event: Event) -> None:
        await self._count("epochs")

    def state_dict(self) -> dict[str, int]:
        return dict(self.told)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.told = dict(state)


class InThread(Callback):
    """The same in a thread of its own, so many hundredths of a millisecond each."""

    state_key = "thread"

    def __init__(self, lags: int) -> None:
        self.lags, self.told = lags, dict.fromkeys(KINDS, 0)

    def _count(self, what: str, more: int = 1) -> None:
        if self.lags:
            time.sleep(self.lags * 1e-5)
        self.told[what] += more

    def on_batch_end(self, event: BatchEnd) -> None:
        self._count("batches", event.count)

    def on_log(self, event: Log) -> None:
        self._count("lines")

    def on_validation_end(self, event: Event) -> None:
        self._count("validations")

    def on_epoch_end(self, event: Event) -> None:
        self._count("epochs")

    def state_dict(self) -> dict[str, int]:
        return dict(self.told)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.told = dict(state)


@dataclass(frozen=True)
class Deed:
    """What is done once, in the first event of a hook at or behind a step."""

    hook: str
    step: int
    way: str
    decides: bool
    """Whether the wheel waits for it, where it asks."""


class Doing(Callback):
    """Does its deed, once over all lives."""

    trainer: Trainer
    task: asyncio.Task[Any]

    def __init__(self, deed: Deed, done: set[int], number: int, killed: Path) -> None:
        """`killed`: where the run's folder is put as a kill leaves it."""
        self.deed, self.done, self.number, self.killed = deed, done, number, killed
        self.decides = deed.decides
        setattr(self, deed.hook, self._do)

    async def _do(self, event: Event) -> None:
        if event.step < self.deed.step or self.number in self.done:
            return
        self.done.add(self.number)
        match self.deed.way:
            case "raise":
                raise ValueError("not now")
            case "save":
                self.trainer.request_checkpoint()
            case "await save":
                await self.trainer.save_checkpoint()
            case "stop":
                self.trainer.stop()
            case "cancel":
                self.task.cancel()
            case "save, and kill" if not self.killed.exists():
                folder = (await self.trainer.save_checkpoint()).parent.parent
                shutil.copytree(folder, self.killed, symlinks=True)
                self.task.cancel()


class Lowering(Callback):
    """Decides by the step alone."""

    decides = True

    async def on_validation_end(self, event: Event) -> Verdict | None:
        return Verdict(lr_factor=0.5) if event.step % 3 == 0 else None

    async def on_epoch_end(self, event: Event) -> Verdict | None:
        return Verdict(lr_factor=0.7)


@dataclass(frozen=True)
class How:
    """What a run consists of, and how its lives follow each other."""

    validate_every: str
    save_every: str
    accumulate: int
    lags: int
    lags_in_thread: int
    resumed: bool
    """By a trainer of its own each time, else by the same one."""
    first: bool
    """Whether those that do something come before those that count."""
    log_every: int
    asked: bool
    """Whether somebody decides at each epoch's end."""


def made(folder: Path, how: How, counting: list[Any], *others: Callback) -> Trainer:
    rest = [*others, *counting] if how.first else [*counting, *others]
    return Trainer(
        network(),
        nn.MSELoss(),
        seed=5,
        lr=1e-2,
        device="cpu",
        log_every=how.log_every,
        sanity_batches=0,
        accumulate_grad_batches=how.accumulate,
        validate_every=how.validate_every,
        run_dir=folder,
        callbacks=[
            ModelCheckpoint(every=how.save_every),
            *([EarlyStopping("val_loss", patience=50, restore_best=False), Lowering()] if how.asked else []),
            JSONLogger(),
            *rest,
        ],
    )


async def lived(folder: Path, how: How, deeds: list[Deed]) -> tuple[Trainer, list[dict[str, int]]]:
    """All lives of a run, to its end: the trainer of the last one, and what was counted."""
    done: set[int] = set()
    trainer: Trainer | None = None
    train, held_out = Samples(), Samples(20, seed=3)
    counting: list[Any] = []
    doing: list[Doing] = []
    killed = folder.with_name(f"{folder.name}, killed")
    for _ in range(len(deeds) + 2):
        resume = "auto" if how.resumed or trainer is None else None
        if trainer is None or how.resumed:
            counting = [Counting(how.lags), InThread(how.lags_in_thread)]
            doing = [Doing(deed, done, number, killed) for number, deed in enumerate(deeds)]
            trainer = made(folder, how, counting, *doing)
            train, held_out = Samples(), Samples(20, seed=3)
        fit = asyncio.create_task(trainer.fit(train, held_out, max_epochs=2, resume=resume))
        for each in doing:
            each.trainer, each.task = trainer, fit
        await asyncio.wait([fit])
        if killed.exists():
            shutil.rmtree(folder)
            killed.rename(folder)
            trainer = None
            continue
        if fit.cancelled() or isinstance(fit.exception(), StreamtrainError):
            continue
        if fit.result().reason == "completed":
            return trainer, [each.told for each in counting]
    raise AssertionError("not at its end")


def best(trainer: Trainer) -> tuple[str, float, int, int, str]:
    """The best at the end, and the name of its checkpoint."""
    found = trainer.state.best
    assert found is not None
    assert found.checkpoint is not None
    return found.monitor, found.value, found.epoch, found.step, found.checkpoint.name


class Heard(logging.Handler):
    """Whether it was said that a state was saved behind its step."""

    behind = False

    def emit(self, record: logging.LogRecord) -> None:
        self.behind = self.behind or "had not taken in all" in record.getMessage()


HOWS = st.builds(
    How,
    validate_every=st.sampled_from(["1epoch", "2epochs", "4steps", "13steps", "7steps"]),
    save_every=st.sampled_from(["2steps", "5steps", "1000steps", "1epoch"]),
    accumulate=st.sampled_from([1, 2]),
    lags=st.sampled_from([0, 3, 40]),
    lags_in_thread=st.sampled_from([0, 30, 300]),
    resumed=st.booleans(),
    first=st.booleans(),
    log_every=st.sampled_from([1, 7]),
    asked=st.booleans(),
)
PLAIN = How(
    "1epoch", "1epoch", accumulate=1, lags=0, lags_in_thread=0, resumed=True, first=True, log_every=7, asked=False
)
DEEDS = st.lists(
    st.builds(
        Deed, hook=st.sampled_from(HOOKS), step=st.integers(1, 26), way=st.sampled_from(WAYS), decides=st.booleans()
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("decides", [False, True])
@pytest.mark.parametrize("hook", [*HOOKS, "on_train_end"])
def test_a_kill_in_a_hook_of_the_last_step_costs_neither_its_line_nor_its_best(
    hook: str, decides: bool, tmp_path: Path
) -> None:
    whole, told = asyncio.run(lived(tmp_path / "whole", PLAIN, []))
    deeds = [Deed(hook, 26, "save, and kill", decides)]
    broken, again = asyncio.run(lived(tmp_path / "broken", PLAIN, deeds))
    assert same(whole.model, broken.model)
    assert best(whole) == best(broken)
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    assert again == told


async def test_a_save_while_the_last_line_is_told_names_the_best_of_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, told, saved = made(tmp_path, PLAIN, []), Teller.last_line, list[str]()

    async def last_line(self: Teller) -> dict[str, float]:
        path = await trainer.save_checkpoint()
        saved.append((await asyncio.to_thread(checkpoint.read, path)).state["progress"]["bests"][0][-1])
        return await told(self)

    monkeypatch.setattr(Teller, "last_line", last_line)
    await trainer.fit(Samples(), Samples(20, seed=3), max_epochs=2)
    assert best(trainer)[-1] == "step-000000026"
    assert saved == ["step-000000026"]


@pytest.mark.timeout(600)
@settings(max_examples=8, deadline=None)
@given(how=HOWS, deeds=DEEDS)
def test_whatever_hooks_do_a_run_that_goes_on_is_the_undisturbed_one(how: How, deeds: list[Deed]) -> None:
    with tempfile.TemporaryDirectory() as room, pytest.MonkeyPatch.context() as patch:
        heard = Heard()
        logging.getLogger("streamtrain.keeping").addHandler(heard)
        patch.setattr(keeping, "_PATIENCE", 0.0)
        try:
            whole, told = asyncio.run(lived(Path(room, "whole"), how, []))
            broken, again = asyncio.run(lived(Path(room, "broken"), how, deeds))
        finally:
            logging.getLogger("streamtrain.keeping").removeHandler(heard)
        assert same(whole.model, broken.model)
        assert best(whole) == best(broken)
        assert lines(Path(room, "whole")) == lines(Path(room, "broken"))
        assert again == told or heard.behind  # which is said
