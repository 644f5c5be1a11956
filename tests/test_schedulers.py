"""Learning rates: equal to torch's where torch has them, and a pure function of progress."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from streamtrain.errors import ConfigError
from streamtrain.schedulers import Schedule, build_scheduler, get_lr, parse_span, set_group_lr


def optimizer(*rates: float) -> Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (0.5,)])


def of_torch(make: Callable[[Optimizer], LRScheduler], steps: int, base: float = 0.5) -> list[float]:
    """The rates with which torch would make these updates."""
    inner = optimizer(base)
    schedule = make(inner)
    rates = []
    for _ in range(steps):
        rates.append(get_lr(inner))
        inner.step()
        schedule.step()
    return rates


def ours(spec: Any, steps: int, base: float = 0.5, **known: Any) -> list[float]:
    inner = optimizer(base)
    schedule = build_scheduler(inner, spec, **known)
    rates = []
    for step in range(steps):
        schedule.before_update(step, 0)
        rates.append(get_lr(inner))
        inner.step()
        schedule.after_update()
    return rates


@settings(max_examples=30)
@given(st.integers(1, 40), st.sampled_from([0.0, 0.1]))
def test_cosine_is_torchs(total: int, floor: float) -> None:
    expected = of_torch(lambda inner: CosineAnnealingLR(inner, total, floor), total + 1)
    assert ours({"name": "cosine", "min_lr": floor}, total + 1, total_steps=total) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30)
@given(st.integers(1, 40), st.sampled_from([0.0, 0.1]))
def test_linear_is_torchs(total: int, floor: float) -> None:
    expected = of_torch(lambda inner: LinearLR(inner, 1.0, floor / 0.5, total), total + 5)
    assert ours({"name": "linear", "min_lr": floor}, total + 5, total_steps=total) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30)
@given(st.integers(1, 10), st.floats(0.1, 1.0))
def test_step_is_torchs(size: int, gamma: float) -> None:
    expected = of_torch(lambda inner: StepLR(inner, size, gamma), 30)
    assert ours({"name": "step", "step_size": size, "gamma": gamma}, 30) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30)
@given(st.integers(2, 10), st.integers(1, 20))
def test_warm_up_and_what_follows_are_torchs(warmup: int, rest: int) -> None:
    def make(inner: Optimizer) -> LRScheduler:
        up = LinearLR(inner, 1 / warmup, 1.0, warmup - 1)
        return SequentialLR(inner, [up, CosineAnnealingLR(inner, rest)], [warmup])

    spec = {"name": "cosine", "warmup": f"{warmup}steps"}
    rates = ours(spec, warmup + rest, total_steps=warmup + rest)
    assert rates == pytest.approx(of_torch(make, warmup + rest), abs=1e-12)


def test_past_its_total_a_rate_stays_at_the_floor() -> None:
    for name in ("cosine", "linear"):
        schedule = Schedule(name=name, total=10, min_lr=0.1)
        assert [schedule.lr(0.5, t) for t in (10, 11, 1000)] == pytest.approx([0.1] * 3)
        assert Schedule(name=name, total=10, min_lr=0.1).lr(0.05, 7) == pytest.approx(0.05)


def test_none_and_constant_leave_the_rates_alone() -> None:
    assert ours(None, 3) == ours("constant", 3) == [0.5] * 3


@given(st.integers(0, 100), st.sampled_from(["cosine", "linear", "step", "constant"]))
def test_a_rate_needs_no_history(step: int, name: str) -> None:
    spec = {"name": name, "warmup": 7}
    rates = ours(spec, 101, total_steps=80)
    inner = optimizer()
    build_scheduler(inner, spec, total_steps=80).before_update(step, 0)
    assert get_lr(inner) == rates[step]


def test_each_group_keeps_its_own_base() -> None:
    inner = optimizer(0.5, 0.1)
    build_scheduler(inner, "linear", total_steps=10).before_update(5, 0)
    assert [group["lr"] for group in inner.param_groups] == pytest.approx([0.25, 0.05])


def test_by_epoch_the_rate_changes_between_epochs_only() -> None:
    inner = optimizer()
    schedule = build_scheduler(inner, {"name": "step", "interval": "epoch", "gamma": 0.5})
    rates = []
    for step in range(6):
        schedule.before_update(step, step // 2)
        rates.append(get_lr(inner))
    assert rates == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_epochs_are_counted_in_steps_where_the_epoch_is_known() -> None:
    spec = {"name": "step", "step_size": "2epochs"}
    assert ours(spec, 7, steps_per_epoch=3)[5:] == pytest.approx([0.5, 0.05])
    with pytest.raises(ConfigError, match=r"scheduler\.step_size: '2epochs' can't be counted in steps here"):
        build_scheduler(optimizer(), spec)


def test_a_tensor_rate_is_set_in_place() -> None:
    rate = torch.tensor(0.5)
    group: dict[str, Any] = {"lr": rate}
    set_group_lr(group, 0.25)
    assert group["lr"] is rate
    assert float(rate) == 0.25


@pytest.mark.parametrize("spec", [None, "constant", "cosine", lambda inner: StepLR(inner, 3)])
def test_a_scaled_rate_stays_scaled_and_goes_through_a_checkpoint(spec: Any) -> None:
    inner, later = optimizer(), optimizer()
    schedule, resumed = (build_scheduler(of, spec, total_steps=10) for of in (inner, later))
    expected = ours(spec, 10, total_steps=10)
    for step in range(4):
        schedule.before_update(step, 0)
        inner.step()
        schedule.after_update()
    schedule.scale(0.5)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    later.load_state_dict(inner.state_dict())
    for step in range(4, 10):
        for of, on in ((schedule, inner), (resumed, later)):
            of.before_update(step, 0)
            assert get_lr(on) == pytest.approx(expected[step] / 2)
            on.step()
            of.after_update()


def test_torch_schedulers_are_stepped_after_each_update() -> None:
    def make(inner: Optimizer) -> LRScheduler:
        return OneCycleLR(inner, 0.5, total_steps=20)

    assert ours(make, 20) == of_torch(make, 20)
    assert ours({"name": make, "interval": "step"}, 20) == of_torch(make, 20)


def test_torch_schedulers_may_be_stepped_after_each_epoch() -> None:
    inner = optimizer()
    schedule = build_scheduler(inner, {"name": lambda of: StepLR(of, 1, 0.5), "interval": "epoch"})
    inner.step()
    schedule.after_update()
    assert get_lr(inner) == 0.5
    schedule.after_epoch({})
    assert get_lr(inner) == 0.25


@pytest.mark.parametrize("monitor", [None, "val_loss", "val_mae"])
def test_a_plateau_is_torchs(monitor: str | None) -> None:
    inner, reference = optimizer(), optimizer()
    spec = {"name": lambda of: ReduceLROnPlateau(of, patience=1, factor=0.5), "monitor": monitor}
    schedule, plateau = build_scheduler(inner, spec), ReduceLROnPlateau(reference, patience=1, factor=0.5)
    for value in (1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.9):
        schedule.after_epoch({"val_loss": 7.0, monitor or "val_loss": value})
        plateau.step(value)
        assert get_lr(inner) == get_lr(reference)
    assert get_lr(inner) < 0.5


def test_a_plateau_without_its_monitor_says_what_is_logged() -> None:
    schedule = build_scheduler(optimizer(), ReduceLROnPlateau)
    with pytest.raises(ConfigError, match="monitors 'val_loss', which nothing logs") as caught:
        schedule.after_epoch({"loss": 1.0, "acc": 2.0})
    assert caught.value.hint == "logged: acc, loss"


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("cosin", "unknown name 'cosin'", "Did you mean 'cosine'?"),
        ({"name": "cosine", "warm_up": 3}, "unknown key 'warm_up'", "Did you mean 'warmup'?"),
        ({"name": "cosine", "interval": "batch"}, "interval must be 'step' or 'epoch'", ""),
        ({"name": "cosine", "monitor": "val_loss"}, "monitor is for ReduceLROnPlateau", ""),
        ("cosine", "needs to know how long the run is", "Give max_steps"),
        ({"name": "step", "min_lr": -1}, "min_lr must be a finite number", ""),
        ({"name": "step", "gamma": math.nan}, "gamma must be a finite number", ""),
        ({"name": "step", "gamma": True}, "gamma must be a finite number", ""),
        ({"name": "step", "step_size": 0}, "step_size must be at least 1", ""),
        ({"name": "step", "step_size": "10min"}, "can't be counted in steps", ""),
        ({"name": "step", "warmup": -1}, "warmup must be a whole number of steps", ""),
        ({"name": "step", "warmup": "soon"}, "must be like '500steps'", ""),
        ({"name": "step", "warmup": None}, "must be like '500steps'", ""),
        ({}, "unknown name None", "Known: "),
        ({"name": "cosine", "total": "x"}, "scheduler.total must be a number of steps of at least 1, not 'x'", ""),
        ({"name": "cosine", "total": 0}, "scheduler.total must be a number of steps of at least 1, not 0", ""),
        ({"name": "linear", "total": -5, "interval": "epoch"}, "must be a number of epochs of at least 1, not -5", ""),
        (Schedule(name="cosine", total=0), "scheduler.total must be a number of steps of at least 1, not 0", ""),
        ({"name": "constant", "total": True}, "scheduler.total must be a number", ""),
        ({"name": "step", "step_size": "x"}, "scheduler.step_size must be like '500steps'", ""),
        ({"name": ReduceLROnPlateau, "monitor": 5}, "scheduler.monitor must be the name of a metric", ""),
        (lambda inner: 3, "gave a int, not a torch LRScheduler", ""),
        ({"name": ReduceLROnPlateau, "interval": "step"}, "can't be stepped after each update", ""),
    ],
)
def test_what_cannot_work_is_refused(spec: Any, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_scheduler(optimizer(), spec)
    assert message in str(caught.value)
    assert caught.value.hint.startswith(hint)


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="belongs to another optimizer"):
        build_scheduler(optimizer(), {"name": StepLR(optimizer(), 1)})


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("500steps", (500, "step")),
        ("1 epoch", (1, "epoch")),
        ("10min", (600, "second")),
        ("1.5h", (5400, "second")),
        ("30s", (30, "second")),
        (7, (7, "step")),
        (0, (0, "step")),
    ],
)
def test_spans_are_read(text: Any, span: tuple[float, str]) -> None:
    assert parse_span(text, "x") == span


@pytest.mark.parametrize(
    "text", ["", "steps", "1.5steps", "0steps", "-3steps", "3 days", True, 1.5, None, math.nan, math.inf]
)
def test_what_is_no_span_is_refused_with_its_name(text: Any) -> None:
    with pytest.raises(ConfigError, match="warmup must be") as caught:
        parse_span(text, "warmup")
    assert text != "3 days" or "step, epoch, s, sec, second, min, minute, h and hour" in caught.value.hint
