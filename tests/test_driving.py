"""Bursts follow each other without a word from the event loop, and nothing that is kept or told shows it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain import checkpoint
from streamtrain.callbacks.base import Callback
from streamtrain.data.iterable import IterableStream, from_iterable
from streamtrain.driving import Driver
from streamtrain.events import BatchEnd, Log
from streamtrain.loop import Wheel
from streamtrain.supply import Pumped
from streamtrain.tally import Report
from streamtrain.telling import Teller
from streamtrain.trainer import Trainer
from tests.engine import Samples, lines, network, pairs

BOUND = 20.0


def pulled() -> IterableStream:
    """2100 batches of a synchronous source: the next one is always there."""
    return from_iterable(list(pairs(Samples(8 * 2100), 1)[0]))


class Counted(nn.Module):
    """Tells when it has made a number of forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.passes = 0

    def forward(self, inputs: Tensor) -> Any:
        self.passes += 1
        return self.inner(inputs)

    def reaches(self, passes: int) -> bool:
        """Keep this thread, a loop's too, until there are so many; False if they do not come."""
        bound = time.monotonic() + BOUND
        while self.passes < passes and time.monotonic() < bound:
            os.sched_yield()
        return self.passes >= passes


def trainer(model: nn.Module, **options: Any) -> Trainer:
    given: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "seed": 7, "device": "cpu", **options}
    return Trainer(model, nn.MSELoss(), **given)


def test_the_next_burst_begins_before_the_last_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counted()
    heard: list[bool] = []
    telling = Teller.burst

    async def held(teller: Teller, report: Report, waited: float) -> None:
        if report.before >= 8 * 20 and not heard:  # how long a step takes is known
            heard.append(model.reaches(report.first_step + report.updates))  # the loop stands still
        await telling(teller, report, waited)

    monkeypatch.setattr(Teller, "burst", held)
    asyncio.run(trainer(model).fit(pulled(), max_steps=1000))
    assert heard == [True]


@pytest.mark.parametrize("where", ["in a hook", "beside it"])
def test_nothing_is_made_ahead_of_a_save_that_waits_for_its_step(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "in a hook":
        monkeypatch.setattr("streamtrain.driving.BURST", 0.2)  # more lines of the log than a mailbox takes
    model = network()
    weights: list[Tensor] = []

    def keep(*_: Any) -> None:
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())

    keep()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(keep)
    kept: list[Path] = []

    class Saves(Callback):
        """In a hook for which the wheel waits: there is no room for the lines that come meanwhile."""

        async def on_log(self, event: Log) -> None:
            if event.step % 100 == 0:
                kept.append(await fitted.save_checkpoint(tmp_path / f"hook-{event.step}"))

    async def asked(fit: asyncio.Task[Any]) -> None:
        while not fit.done():
            saving = asyncio.create_task(fitted.save_checkpoint(tmp_path / f"beside-{len(kept)}"))
            await asyncio.wait([saving])
            if saving.exception() is None:
                kept.append(saving.result())

    hooks = [Saves()] if where == "in a hook" else []
    fitted = trainer(model, optimizer=optimizer, log_every=1, callbacks=hooks, run_dir=tmp_path / "run")

    async def main() -> None:
        fit = asyncio.create_task(fitted.fit(pulled(), max_steps=2000))
        await asyncio.gather(fit, *([] if hooks else [asked(fit)]))

    asyncio.run(main())
    assert len(kept) > 5
    for path in kept:
        saved = checkpoint.read(path)
        step = saved.state["progress"]["step"]
        assert saved.state["progress"]["batch"] == step
        assert saved.state["progress"]["samples"] == 8 * step
        same = nn.utils.parameters_to_vector([saved.model[name] for name, _ in model.named_parameters()])
        assert torch.equal(same, weights[step]), (path, step)
    rows = [row["step"] for row in lines(tmp_path / "run") if row["split"] == "train"]
    assert rows == [*range(1, 2001)]


def test_a_save_that_a_hook_waits_for_has_the_lines_of_all_that_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the next bursts are made already, and there is no room for their lines: a kill may come right after it."""
    monkeypatch.setattr("streamtrain.driving.BURST", 0.2)
    kept: dict[Path, list[str]] = {}

    class Saves(Callback):
        async def on_log(self, event: Log) -> None:
            if event.step % 100 == 0:
                path = await fitted.save_checkpoint(tmp_path / f"hook-{event.step}")
                kept[path] = await asyncio.to_thread(written)

    def written() -> list[str]:
        return (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)

    fitted = trainer(network(), log_every=1, callbacks=[Saves()], run_dir=tmp_path / "run")
    asyncio.run(fitted.fit(pulled(), max_steps=2000))
    assert len(kept) > 5
    for path, there in kept.items():
        state = checkpoint.read(path).state
        rows = map(json.loads, {*there, *state["callbacks"]["JSONLogger"].get("unwritten", ())})
        assert {*range(1, state["step"] + 1)} <= {row["step"] for row in rows if row["split"] == "train"}, path
    assert [row["step"] for row in lines(tmp_path / "run")] == [*range(1, 2001)]


def test_a_supply_knows_that_no_burst_runs_whoever_waited_for_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it waits for the end of one where its own batches hold all memory."""
    running: list[bool] = []
    burst = Driver.burst

    async def waited_for(driver: Driver, most: Any, **how: Any) -> Report | None:
        report = await burst(driver, most, **how)
        if driver.ahead:
            await driver.landed()  # as for a save in a hook
            assert isinstance(driver._batches, Pumped)
            running.append(driver._batches._running)
        return report

    monkeypatch.setattr(Driver, "burst", waited_for)
    asyncio.run(trainer(network()).fit(Samples(8 * 2100), max_steps=2000))
    assert running
    assert not any(running)


def test_a_burst_behind_one_that_has_just_made_the_last_update_still_has_batches_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the pump finds no room for any, and the fit waits for ever."""
    wanted: list[int] = []
    hand_over = Driver._hand_over

    def reached(driver: Driver, row: Any) -> None:
        if row.begun:
            row.until, row.over = driver._life.step.step, True
        hand_over(driver, row)
        assert isinstance(driver._batches, Pumped)
        wanted.append(driver._batches._batches)

    monkeypatch.setattr(Driver, "_hand_over", reached)
    asyncio.run(trainer(network()).fit(Samples(8 * 2100), max_steps=300))
    assert len(wanted) > 3
    assert min(wanted) == 1


@pytest.mark.parametrize("log_every", [1, 7])
def test_where_a_callback_raises_all_lines_up_to_what_is_saved_are_in_the_log(tmp_path: Path, log_every: int) -> None:
    model = Counted()

    class Raises(Callback):
        """Once the burst behind has begun."""

        def on_batch_end(self, event: BatchEnd) -> None:
            if event.step > 20:
                model.reaches(event.step + 1)
                raise ValueError("no")

    fitted = trainer(model, run_dir=tmp_path, log_every=log_every, callbacks=[Raises()])
    with pytest.raises(Exception, match="no"):
        asyncio.run(fitted.fit(pulled(), max_steps=1000))
    newest = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert newest is not None
    rows = [row["step"] for row in lines(tmp_path) if row["split"] == "train"]
    assert rows == list(range(log_every, newest.step + 1, log_every))
    assert newest.step == model.passes == fitted.state.step


def test_a_step_is_told_where_it_stands_however_many_bursts_are_not_told_yet() -> None:
    told: list[tuple[int, int, int]] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        state = fitted.state
        told.append((state.step, state.batch, state.samples))
        return nn.functional.mse_loss(outputs, targets)

    fitted = Trainer(network(), loss, optimizer="adamw", lr=1e-3, seed=7, device="cpu")
    asyncio.run(fitted.fit(pulled(), max_steps=1000))
    assert told == [(step, step, 8 * step) for step in range(1000)]


@pytest.mark.parametrize("most", [40, 200])
def test_what_ends_a_burst_ends_what_follows_though_the_loop_is_just_asking_what_it_wants(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The train thread says so between the loop's look at it and the loop's own word, which was written over it."""
    asked = Wheel._wanted

    def slowly(wheel: Wheel) -> bool:
        said, through = asked(wheel), threading.Event()
        wheel._thread.submit(through.set)  # behind the bursts that are under way
        bound = time.monotonic() + BOUND
        while not through.is_set() and time.monotonic() < bound:
            os.sched_yield()
        return said

    monkeypatch.setattr(Wheel, "_wanted", slowly)
    result = asyncio.run(trainer(network()).fit(pulled(), max_steps=most))
    assert result.step == most
