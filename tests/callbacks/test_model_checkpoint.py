"""The rules of saving: when one is due, which is among the best, which ones stay."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint, Schedule, TopK, retain
from streamtrain.errors import ConfigError
from streamtrain.events import CheckpointCommitted, EpochEnd, ValidationEnd, Verdict


@dataclass
class Saved:
    name: str
    step: int
    problem: str | None = None


def saved(*steps: int, damaged: tuple[int, ...] = ()) -> list[Saved]:
    return [Saved(f"step-{step}", step, "model.safetensors, cut" if step in damaged else None) for step in steps]


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("500steps", Schedule(steps=500)),
        ("1step", Schedule(steps=1)),
        (" 2 epochs ", Schedule(epochs=2)),
        ("10min", Schedule(seconds=600)),
        ("90s", Schedule(seconds=90)),
        ("0.5h", Schedule(seconds=1800)),
        ("5m", Schedule(seconds=300)),
        ("2 Hours", Schedule(seconds=7200)),
        ("auto", Schedule(seconds=30, auto=True)),
    ],
)
def test_intervals_are_read(text: str, schedule: Schedule) -> None:
    assert Schedule.parse(text) == schedule


@pytest.mark.parametrize(
    "text", ["", "0steps", "1.5epochs", "-1s", "0min", "ten min", "5", "5 parsecs", "nan s", "500ms", "5samples"]
)
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no interval") as caught:
        Schedule.parse(text)
    assert "times are in s, sec, second, m, min, minute, h or hour" in caught.value.hint


@given(st.integers(1, 50), st.integers(0, 200))
def test_the_next_step_is_the_first_one_that_is_due(every: int, step: int) -> None:
    schedule = Schedule(steps=every)
    due = [later for later in range(step + 1, step + every + 1) if schedule.due(later, 0, 0.0)]
    assert due == [schedule.next_step(step)]


def test_epochs_and_seconds_are_due_by_themselves() -> None:
    assert [Schedule(epochs=2).due(7, epoch, 1e9, epoch_end=True) for epoch in range(4)] == [False, True, False, True]
    assert not Schedule(epochs=1).due(7, 0, 1e9)
    assert [Schedule(seconds=60).due(7, 0, seconds) for seconds in (59.9, 60.0)] == [False, True]
    assert Schedule(seconds=60).next_step(7) is None


@pytest.mark.parametrize(("stall", "interval"), [(0.0, 30.0), (0.5, 50.0), (100.0, 900.0)])
async def test_auto_keeps_the_stall_at_one_percent(stall: float, interval: float) -> None:
    callback = ModelCheckpoint()
    await callback.on_checkpoint(CheckpointCommitted(seconds=stall))
    assert callback.schedule.seconds == interval


async def test_a_stall_that_no_interval_makes_up_for_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    callback = ModelCheckpoint(every="auto")
    for seconds in (8.9, 9.1, 100.0):
        await callback.on_checkpoint(CheckpointCommitted(seconds=seconds))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["a save stalls training for 9.1 s"]
    await ModelCheckpoint(every="10min").on_checkpoint(CheckpointCommitted(seconds=100.0))
    assert len(caplog.records) == 1


async def test_an_interval_that_was_given_stays() -> None:
    callback = ModelCheckpoint(every="10min")
    await callback.on_checkpoint(CheckpointCommitted(seconds=100.0))
    assert callback.schedule == Schedule(seconds=600)


@given(st.lists(st.floats(), max_size=30), st.integers(-1, 5), st.sampled_from(["min", "max"]))
def test_the_table_holds_the_best(values: list[float], k: int, mode: str) -> None:
    top = TopK(k, mode)
    for step, value in enumerate(values):
        rank = top.offer(step, value)
        assert (rank is not None) == ((step, value) in top.table)
        if rank is not None:
            assert top.table[rank] == (step, value)
    finite = [(step, value) for step, value in enumerate(values) if math.isfinite(value)]
    best = sorted(finite, key=lambda row: row[1] if mode == "min" else -row[1])
    assert top.table == (best[:k] if k >= 0 else best)


@given(
    st.lists(st.integers(0, 50), unique=True, max_size=12),
    st.sets(st.integers(0, 50)),
    st.sets(st.integers(0, 50)),
    st.integers(-1, 5),
)
def test_pinned_and_newest_stay_and_damaged_ones_do_not_count(
    steps: list[int], pinned: set[int], damaged: set[int], keep_last: int
) -> None:
    entries = saved(*steps, damaged=tuple(damaged))
    stay = retain(entries, keep_last=keep_last, pinned=pinned)
    free = sorted(step for step in steps if step not in pinned | damaged)
    newest = free if keep_last < 0 else free[-keep_last:] if keep_last else []
    assert stay == {f"step-{step}" for step in steps if step in pinned | damaged | set(newest)}


async def test_a_new_best_is_saved_at_once_and_pinned() -> None:
    callback = ModelCheckpoint(save_top_k=2, keep_last=1)
    async with Bus([callback]) as bus:
        answers = [
            await bus.ask("on_validation_end", ValidationEnd(step=step, metrics={"val_loss": value}))
            for step, value in [(1, 0.5), (2, 0.7), (3, 0.9), (4, 0.4), (5, math.nan)]
        ]
    assert answers == [
        [Verdict(save="best", value=0.5, monitor="val_loss")],
        [Verdict(save="request", value=0.7, monitor="val_loss")],
        [],
        [Verdict(save="best", value=0.4, monitor="val_loss")],
        [],
    ]
    assert callback.retain(saved(1, 2, 3, 4, 5, 6), pins={"step-2"}) == {"step-1", "step-2", "step-4", "step-6"}


async def offer(callback: ModelCheckpoint, *rows: tuple[int, float]) -> list[bool]:
    """Whether each value, at its step, was to be saved."""
    events = [ValidationEnd(step=step, metrics={"val_loss": value}) for step, value in rows]
    return [await callback.on_validation_end(event) is not None for event in events]


async def test_a_best_that_never_came_to_the_disk_pushes_nothing_out() -> None:
    callback = ModelCheckpoint(save_top_k=2, keep_last=1)
    await offer(callback, (1, 0.5), (2, 0.7))
    assert callback.retain(saved(1, 2)) == {"step-1", "step-2"}
    await offer(callback, (3, 0.6))
    assert callback.retain(saved(1, 2)) == {"step-1", "step-2"}  # 3 may still come
    assert callback.retain(saved(1, 2, 4)) == {"step-1", "step-2", "step-4"}  # it never did
    assert await offer(callback, (5, 0.65), (6, 0.8)) == [True, False]
    assert callback.retain(saved(1, 2, 4, 5)) == {"step-1", "step-4", "step-5"}


async def test_a_best_that_came_to_the_disk_pushes_the_worst_out() -> None:
    callback = ModelCheckpoint(save_top_k=2, keep_last=1)
    await offer(callback, (1, 0.5), (2, 0.7), (3, 0.6))
    assert callback.retain(saved(1, 2)) == {"step-1", "step-2"}  # by a save that was under way
    assert callback.retain(saved(1, 2, 3)) == {"step-1", "step-3", "step-2"}  # 2 as the newest of the others
    assert callback.retain(saved(1, 2, 3, 4)) == {"step-1", "step-3", "step-4"}


async def test_what_was_pushed_out_by_what_is_not_saved_yet_goes_through_a_checkpoint() -> None:
    callback, later = ModelCheckpoint(save_top_k=1, keep_last=1), ModelCheckpoint(save_top_k=1, keep_last=1)
    await offer(callback, (1, 0.5), (3, 0.4))
    later.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert later.retain(saved(1, 2, 4)) == {"step-1", "step-4"}


@given(
    st.lists(st.tuples(st.integers(-9, 9).map(float), st.booleans(), st.booleans()), max_size=15),
    st.integers(1, 4),
    st.integers(1, 3),
)
async def test_whatever_saves_fail_the_best_of_what_was_saved_stay(
    rows: list[tuple[float, bool, bool]], k: int, keep_last: int
) -> None:
    """At each step a value is offered; a periodic save is due or not; the disk takes what is to be saved or not."""
    callback, disk, taken = ModelCheckpoint(save_top_k=k, keep_last=keep_last), set[int](), dict[int, float]()
    for step, (value, periodic, works) in enumerate(rows):
        (among_the_best,) = await offer(callback, (step, value))
        if (among_the_best or periodic) and works:
            disk.add(step)
            if among_the_best:
                taken[step] = value
            disk = {int(name.removeprefix("step-")) for name in callback.retain(saved(*disk), pins={f"step-{step}"})}
            assert disk >= set(sorted(taken, key=lambda step: (taken[step], step))[:k])
            assert step in disk
            assert len(disk) <= k + keep_last + 1


async def test_a_sanity_check_is_no_value() -> None:
    event = ValidationEnd(sanity=True, metrics={"val_loss": 0.0})
    assert await ModelCheckpoint().on_validation_end(event) is None


async def test_a_monitor_of_training_is_looked_at_after_epochs() -> None:
    callback = ModelCheckpoint(monitor="accuracy")
    assert await callback.on_validation_end(ValidationEnd(metrics={"accuracy": 1.0})) is None
    verdict = await callback.on_epoch_end(EpochEnd(step=9, metrics={"accuracy": 0.5}))
    assert verdict == Verdict(save="best", monitor="accuracy", value=0.5)
    assert callback.mode == "max"


async def test_a_monitor_that_nothing_logs_is_refused_only_if_it_was_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    event = ValidationEnd(metrics={"val_mae": 1.0, "loss": 2.0})
    default = ModelCheckpoint()
    assert [await default.on_validation_end(event) for _ in range(2)] == [None, None]
    assert await ModelCheckpoint(save_top_k=0).on_validation_end(event) is None
    assert [record.getMessage() for record in caplog.records] == [
        "no best checkpoint is kept: nothing logs val_loss; give ModelCheckpoint a monitor: val_mae"
    ]
    with pytest.raises(ConfigError, match="nothing logs 'val_maw'; logged: loss, val_mae") as caught:
        await ModelCheckpoint(monitor="val_maw").on_validation_end(event)
    assert caught.value.hint == "did you mean 'val_mae'?"


async def test_the_table_goes_through_a_checkpoint() -> None:
    callback, later = ModelCheckpoint(save_top_k=3), ModelCheckpoint(save_top_k=1)
    for step, value in [(1, 0.5), (2, 0.3)]:
        await callback.on_validation_end(ValidationEnd(step=step, metrics={"val_loss": value}))
    later.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert later._best.table == [(2, 0.3)]
    assert await later.on_validation_end(ValidationEnd(step=3, metrics={"val_loss": 0.4})) is None


def test_a_table_that_none_is_wanted_of_any_more_pins_nothing() -> None:
    before = ModelCheckpoint(save_top_k=2, keep_last=1)
    for step, value in ((10, 0.5), (20, 0.4)):
        before._best.offer(step, value)
    after = ModelCheckpoint(save_top_k=0, keep_last=1)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.retain(saved(10, 20, 30)) == {"step-30"}
    assert after._best.table == []


def test_a_table_of_another_monitor_starts_anew_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    callback = ModelCheckpoint(monitor="val_mae")
    callback.load_state_dict({"monitor": "val_loss", "mode": "min", "best": [[1, 0.5]]})
    assert callback._best.table == []
    assert "starts anew" in caplog.text


@pytest.mark.parametrize(
    "bad",
    [
        {"save_top_k": -2},
        {"save_top_k": "x"},
        {"save_top_k": 1.5},
        {"save_top_k": True},
        {"keep_last": 0},
        {"keep_last": -2},
        {"keep_last": "x"},
        {"mode": "up"},
        {"mode": 5},
        {"monitor": 5},
        {"monitor": ""},
        {"monitor": ["val_loss"]},
        {"every": 5},
        {"every": True},
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ModelCheckpoint(**bad)
