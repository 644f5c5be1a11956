"""A stop or a save, asked for wherever a fit is, is made there, and the next life loses and repeats nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from streamtrain.callbacks.base import Callback
from streamtrain.progress import FitResult
from streamtrain.trainer import Trainer
from tests.engine import Recorder, Samples, bare_loop, network, pairs, same

SEED = 5


def trainer(**options: Any) -> Trainer:
    return Trainer(network(), nn.MSELoss(), **{"seed": SEED, "device": "cpu", "log_every": 5, **options})


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


class Stuck(Samples):
    """A stream of which no batch comes before the gate opens, and that says when one is waited for."""

    def __init__(self, at: int = 0) -> None:
        super().__init__(40)
        self.entered = asyncio.Event()
        self.gates[at] = Gate(self.entered)


class Gate(asyncio.Event):
    """Says when somebody waits at it."""

    def __init__(self, entered: asyncio.Event) -> None:
        super().__init__()
        self._entered = entered

    async def wait(self) -> bool:  # type: ignore[override]
        self._entered.set()
        return await super().wait()


@asynccontextmanager
async def fitting(fitted: Trainer, *arguments: Any, **options: Any) -> AsyncIterator[asyncio.Task[FitResult]]:
    task = asyncio.create_task(fitted.fit(*arguments, **options))
    try:
        async with asyncio.timeout(30):
            yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


WHERE: dict[str, tuple[dict[str, Any], int, int]] = {
    "the sanity validation": ({}, 0, 0),
    "a validation within an epoch": ({"validate_every": "4steps", "sanity_batches": 0}, 0, 4),
    "the validation after an epoch": ({"sanity_batches": 0}, 16, 13),
}


@pytest.mark.parametrize("how", ["stop", "cancel"])
@pytest.mark.parametrize("where", WHERE)
async def test_a_validation_whose_data_hangs_keeps_no_stop_waiting(tmp_path: Path, where: str, how: str) -> None:
    options, at, step = WHERE[where]
    stuck = Stuck(at)
    fitted = trainer(run_dir=tmp_path, **options)
    async with fitting(fitted, Samples(), validation=stuck, max_epochs=3) as task:
        await stuck.entered.wait()
        if how == "stop":
            fitted.stop("enough")
            result = await task
            assert (result.reason, result.detail, result.step) == ("stopped", "enough", step)
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert fitted.state.step == step
    assert steps(tmp_path) == ([step] if step else [])
    await ends_as_undisturbed(tmp_path, options)


async def ends_as_undisturbed(run_dir: Path, options: dict[str, Any]) -> None:
    recorder = Recorder()
    again = trainer(run_dir=run_dir, callbacks=[recorder], **options)
    await again.fit(Samples(), validation=Samples(40), max_epochs=3, resume="auto")
    whole = trainer(**options, callbacks=[whole_recorder := Recorder()])
    await whole.fit(Samples(), validation=Samples(40), max_epochs=3)
    assert same(again.model, bare_loop(network(), pairs(Samples(), 3), seed=SEED))
    validated = [
        [event.step for event in of.events("on_validation_end") if not event.sanity]
        for of in (recorder, whole_recorder)
    ]
    assert validated[0] == validated[1]


@pytest.mark.parametrize("where", WHERE)
async def test_what_is_asked_for_in_a_validation_is_saved_there(tmp_path: Path, where: str) -> None:
    options, at, step = WHERE[where]
    stuck, saved = Stuck(at), asyncio.Event()

    class Saved(Callback):
        async def on_checkpoint(self, event: Any) -> None:
            saved.set()

    fitted = trainer(run_dir=tmp_path, callbacks=[Saved()], **options)
    async with fitting(fitted, Samples(), validation=stuck, max_epochs=3):
        await stuck.entered.wait()
        fitted.request_checkpoint()
        await saved.wait()
        assert steps(tmp_path) == [step]
    await ends_as_undisturbed(tmp_path, options)


ASKS: list[Callable[[Trainer], None]] = [
    lambda fitted: fitted.stop(),
    lambda fitted: fitted.control.stop("signal", "X"),
]


@pytest.mark.parametrize("ask", ASKS, ids=["stop", "signal"])
@pytest.mark.parametrize("where", ["before the first batch", "paused", "at a batch that does not come"])
async def test_a_stop_is_obeyed_where_no_update_is_made(
    tmp_path: Path, where: str, ask: Callable[[Trainer], None]
) -> None:
    at = {"before the first batch": 0, "at a batch that does not come": 2, "paused": 3}[where]
    stuck = Stuck(8 * at)
    fitted = trainer(run_dir=tmp_path)
    async with fitting(fitted, stuck, max_epochs=3) as task:
        await stuck.entered.wait()
        while fitted.state.step < at:  # noqa: ASYNC110  (nobody tells this test of a step)
            await asyncio.sleep(0)
        if where == "paused":
            fitted.pause()
            await asyncio.sleep(0)
            stuck.gates[8 * at].set()
        ask(fitted)
        result = await task
    assert result.step == at
    assert steps(tmp_path) == [at][:at]
