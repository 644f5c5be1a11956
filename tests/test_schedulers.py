"""Learning rates: equal to torch's where torch has them, and a pure function of progress."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from streamtrain.errors import ConfigError, UserCodeError
from streamtrain.learning_rate import ScheduledLearningRate
from streamtrain.schedulers import build_scheduler, get_lr, parse_span, set_group_lr
from streamtrain.schedules import NAMED, Cosine, Scheduler
from streamtrain.trainer import Trainer
from tests.engine import Recorder, Samples, network


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


LENGTH, BASE = st.integers(1, 40), st.sampled_from([0.5, 0.01, 3e-4])
FLOOR, GAMMA = st.sampled_from([0.0, 1e-5, 1e-3]), st.floats(0.1, 1.0)
IN_TORCH: dict[str, tuple[Any, Callable[..., LRScheduler], dict[str, Any]]] = {
    "constant": ({}, lambda of, **_: ConstantLR(of, 1.0), {}),
    "step": ({"step_size": "size"}, lambda of, size, gamma, **_: StepLR(of, size, gamma), {"gamma": GAMMA}),
    "multistep": (
        {"milestones": "milestones"},
        lambda of, milestones, gamma, **_: MultiStepLR(of, milestones, gamma),
        {"gamma": GAMMA, "milestones": st.lists(st.integers(1, 40), min_size=1, max_size=5)},
    ),
    "exponential": ({}, lambda of, gamma, **_: ExponentialLR(of, gamma), {"gamma": GAMMA}),
    "cosine": (
        {"total": "total"},
        lambda of, total, min_lr, **_: CosineAnnealingLR(of, total, min_lr),
        {"min_lr": FLOOR},
    ),
    "cosine_restarts": (
        {"period": "size"},
        lambda of, size, period_factor, min_lr, **_: CosineAnnealingWarmRestarts(of, size, period_factor, min_lr),
        {"period_factor": st.integers(1, 3), "min_lr": FLOOR},
    ),
    "cyclic": (
        {"step_size_up": "size"},
        lambda of, size, step_size_down, mode, gamma, min_lr, base, **_: CyclicLR(
            of, min_lr, base, size, step_size_down, mode, gamma, cycle_momentum=False
        ),
        {
            "step_size_down": st.integers(1, 9),
            "mode": st.sampled_from(["triangular", "triangular2", "exp_range"]),
            "gamma": st.floats(0.9, 1.0),
            "min_lr": FLOOR,
        },
    ),
    "onecycle": (
        {"total": "total"},
        lambda of, total, anneal, three_phase, pct_start, div_factor, base, **_: OneCycleLR(
            *(of, base, total),
            pct_start=pct_start,
            anneal_strategy=anneal,
            three_phase=three_phase,
            div_factor=div_factor,
            cycle_momentum=False,
        ),
        {
            "anneal": st.sampled_from(["cos", "linear"]),
            "three_phase": st.booleans(),
            "pct_start": st.sampled_from([0.3, 0.45]),
            "div_factor": st.sampled_from([25.0, 10.0]),
        },
    ),
    "linear": (
        {"total": "total"},
        lambda of, total, min_lr, base, **_: LinearLR(of, 1.0, min_lr / base, total),
        {"min_lr": FLOOR},
    ),
    "polynomial": (
        {"total": "total"},
        lambda of, total, power, **_: PolynomialLR(of, total, power),
        {"power": st.sampled_from([1.0, 2.0, 0.5])},
    ),
}
"""Names, what of the drawn numbers they are told, torch's own with the same, and what else is drawn."""


def drawn(data: st.DataObject, name: str) -> tuple[dict[str, Any], Callable[[Optimizer], LRScheduler], int, float]:
    """A spec, torch's own, so many updates as the run has, and the base rate."""
    told, make, kinds = IN_TORCH[name]
    values = {key: data.draw(kind, key) for key, kind in kinds.items()}
    base = data.draw(BASE, "base")
    values |= {"min_lr": min(values["min_lr"], base)} if "min_lr" in values else {}
    total = data.draw(LENGTH, "total") + 4 * (name == "onecycle")
    given = {**values, "size": data.draw(st.integers(1, 9), "size"), "total": total, "base": base}
    spec = {"name": name, **values, **{key: given[of] for key, of in told.items()}}
    return spec, lambda of: make(of, **given), total, base


@pytest.mark.parametrize("name", IN_TORCH)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_rates_of_a_run_are_torchs_to_the_bit(name: str, data: st.DataObject) -> None:
    spec, make, total, base = drawn(data, name)
    updates = total if name == "onecycle" else total + 1 if "total" in spec else 40
    assert ours(spec, updates, base) == of_torch(make, updates, base)


@pytest.mark.parametrize("name", sorted(IN_TORCH.keys() - {"onecycle", "cyclic"}))
@settings(max_examples=25, deadline=None)
@given(data=st.data(), warmup=st.integers(2, 10))
def test_a_warm_up_in_front_is_torchs_to_the_bit(name: str, data: st.DataObject, warmup: int) -> None:
    spec, make, total, base = drawn(data, name)
    if "total" in spec:
        spec["total"] += warmup

    def both(of: Optimizer) -> LRScheduler:
        return SequentialLR(of, [LinearLR(of, 1 / warmup, 1.0, warmup - 1), make(of)], [warmup])

    updates = warmup + (total if "total" in spec else 30)
    with warnings.catch_warnings():  # older torch steps by a number, which it has deprecated
        warnings.simplefilter("ignore", UserWarning)
        expected = of_torch(both, updates, base)
    assert ours({**spec, "warmup": warmup}, updates, base) == expected


@given(st.integers(1, 30), st.sampled_from(["linear", "cosine", "sqrt"]), st.integers(0, 5))
def test_wsd_is_torchs_constant_and_decay_one_after_the_other(rest: int, shape: str, warmup: int) -> None:
    decay, total = 8, rest + 8 + warmup
    curve: Callable[[float], float] = {
        "linear": lambda done: 1 - done,
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        "sqrt": lambda done: 1 - math.sqrt(done),
    }[shape]

    def factor(t: int) -> float:
        if t < warmup:
            return (t + 1) / warmup
        return float(curve(max(0, t - (total - decay)) / decay))

    spec = {"name": "wsd", "decay": decay, "shape": shape, "warmup": warmup}
    expected = of_torch(lambda of: LambdaLR(of, factor), total)
    assert ours(spec, total, total_steps=total) == pytest.approx(expected, abs=1e-15)


def test_the_share_of_wsd_is_of_the_whole_run() -> None:
    rates = ours({"name": "wsd", "decay": 0.25}, 20, total_steps=20)
    assert rates[:16] == [0.5] * 16
    assert rates[16:] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.1)
    assert len(set(rates[15:])) == 5


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("decay", [8, 0.95, "100steps"])
def test_a_decay_that_is_longer_than_the_run_begins_with_it(decay: Any, warmup: int) -> None:
    total = 8 + warmup if decay == 8 else 8
    rates = ours({"name": "wsd", "decay": decay, "warmup": warmup}, total, base=1.0, total_steps=total)
    rest = total - warmup if decay != 0.95 or warmup else 0.95 * total
    assert rates[warmup:] == pytest.approx([min(1.0, (total - t) / rest) for t in range(warmup, total)])


@given(st.integers(1, 20))
def test_the_inverse_root_is_that_of_vaswani(warmup: int) -> None:
    def factor(t: int) -> float:
        return min((t + 1) / warmup, math.sqrt(warmup / max(t, warmup)))

    expected = of_torch(lambda of: LambdaLR(of, factor), 60)
    assert ours({"name": "inverse_sqrt", "warmup": warmup}, 60) == pytest.approx(expected, rel=1e-12)


def test_a_function_of_the_count_is_torchs_lambda() -> None:
    expected = of_torch(lambda of: LambdaLR(of, lambda count: 0.9**count), 30)
    assert ours(lambda t: 0.9**t, 30) == expected


def test_a_function_of_progress_runs_from_zero_to_one_after_the_warm_up() -> None:
    seen: list[float] = []

    def factor(progress: float, floor: float = 0.0) -> float:
        seen.append(progress)
        return 1.0 - progress * (1.0 - floor)

    rates = ours({"name": factor, "warmup": 2, "floor": 0.5}, 12, base=1.0, total_steps=10)
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == pytest.approx([1 - 0.5 * n / 8 for n in range(9)] + [0.5])
    assert seen == [min(1.0, n / 8) for n in range(10)]


def test_a_function_that_gives_no_factor_is_named() -> None:
    for made in (-1, "1", None, math.nan, torch.ones(2), [1.0]):
        with pytest.raises(ConfigError, match=re.escape(f"the function gave {made!r} at 0, not a finite number")):
            ours(lambda t, made=made: made, 1)


@pytest.mark.parametrize("half", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)])
def test_a_factor_may_be_a_number_of_any_kind(half: Any) -> None:
    assert ours(lambda t: half, 2, base=1.0) == [0.5, 0.5]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([1.0, 0.99995, 0.9, 0.5, 2.0, math.nan]), max_size=30),
    st.sampled_from(["min", "max"]),
    st.sampled_from(["rel", "abs"]),
    st.integers(0, 3),
    st.integers(0, 2),
)
def test_plateau_is_torchs_to_the_bit(
    values: list[float], mode: Any, threshold_mode: Any, patience: int, cooldown: int
) -> None:
    known: dict[str, Any] = {"factor": 0.3, "patience": patience, "cooldown": cooldown, "min_lr": 1e-3, "eps": 3e-3}
    inner, reference = optimizer(0.5, 0.01), optimizer(0.5, 0.01)
    spec = {"name": "plateau", "monitor": "val_x", "mode": mode, "threshold_mode": threshold_mode, **known}
    schedule = build_scheduler(inner, spec)
    plateau = ReduceLROnPlateau(reference, mode=mode, threshold_mode=threshold_mode, **known)
    for step, value in enumerate(values):
        schedule.before_update(step, step)
        assert [group["lr"] for group in inner.param_groups] == [group["lr"] for group in reference.param_groups]
        schedule.after_epoch({"val_x": value})
        plateau.step(value)
        again = build_scheduler(inner, spec)
        again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        schedule = again


def test_plateau_knows_which_way_is_better_by_the_monitors_name() -> None:
    for monitor, values in (("val_accuracy", (0.1, 0.2, 0.3)), ("val_loss", (0.3, 0.2, 0.1))):
        inner = optimizer()
        schedule = build_scheduler(inner, {"name": "plateau", "monitor": monitor, "patience": 0})
        for value in values:
            schedule.after_epoch({monitor: value})
        schedule.before_update(3, 3)
        assert get_lr(inner) == 0.5


@pytest.mark.parametrize("spec", ["constant", "cosine", "plateau", StepLR, lambda t: 1.0])
def test_each_has_a_warm_up_in_front(spec: Any) -> None:
    keywords = {"step_size": 100} if spec is StepLR else {}
    rates = ours({"name": spec, "warmup": "4steps", **keywords}, 5, total_steps=10)
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])


@pytest.mark.parametrize("spec", ["constant", "cosine", "plateau", StepLR, lambda t: 1.0])
def test_a_warm_up_may_be_a_share_of_the_run_rounded_up(spec: Any) -> None:
    table = {"name": spec, **({"step_size": 100} if spec is StepLR else {})}
    assert ours({**table, "warmup": 0.31}, 10, total_steps=10) == ours({**table, "warmup": 4}, 10, total_steps=10)
    with pytest.raises(ConfigError, match=r"scheduler.warmup=0\.31 is a share of a run of unknown length"):
        ours({**table, "warmup": 0.31, "name": "constant" if spec == "cosine" else spec}, 10)


def test_a_warm_up_in_seconds_is_no_share() -> None:
    schedule = build_scheduler(optimizer(), {"name": "constant", "interval": "time", "warmup": 0.5}, total_seconds=10.0)
    assert isinstance(schedule, ScheduledLearningRate)
    assert schedule.schedule.warmup == 0.5


def test_the_first_rate_after_a_warm_up_is_rounded_as_torchs() -> None:
    def both(of: Optimizer) -> LRScheduler:
        return SequentialLR(of, [LinearLR(of, 1 / 2, 1.0, 1), CosineAnnealingLR(of, 10, 1e-3)], [2])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = of_torch(both, 12, 0.01)
    assert expected[2] != 0.01
    assert ours({"name": "cosine", "total": 12, "min_lr": 1e-3, "warmup": 2}, 12, 0.01) == expected


def test_a_torch_schedule_begins_when_its_warm_up_is_over() -> None:
    def both(of: Optimizer) -> LRScheduler:
        return SequentialLR(of, [LinearLR(of, 1 / 4, 1.0, 3), ExponentialLR(of, 0.9)], [4])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = of_torch(both, 20)
    assert ours({"name": ExponentialLR, "gamma": 0.9, "warmup": 4}, 20) == expected
    assert ours({"name": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9, "warmup": 4}, 20) == expected


def test_by_samples_a_rate_follows_the_samples_that_were_trained() -> None:
    inner = optimizer()
    spec = {"name": "linear", "interval": "samples", "warmup": "100samples"}
    schedule = build_scheduler(inner, spec, total_samples=1100)
    for samples, rate in ((49, 0.25), (100, 0.5), (600, 0.25), (850, 0.125), (1100, 0.0), (5000, 0.0)):
        schedule.before_update(7, 0, samples)
        assert get_lr(inner) == pytest.approx(rate)


def test_by_time_a_rate_follows_the_clock() -> None:
    inner = optimizer()
    schedule = build_scheduler(inner, {"name": "cosine", "interval": "time", "total": "2h", "warmup": "10min"})
    for seconds, rate in ((0, 0.0), (300, 0.25), (600, 0.5), (3900, 0.25), (7200, 0.0)):
        schedule.before_update(7, 0, 0, seconds)
        assert get_lr(inner) == pytest.approx(rate)


class Halving(Scheduler):
    """Halves whenever it is told something: a schedule with a state of its own."""

    monitor = "val_loss"

    def __init__(self, factor: float = 0.5) -> None:
        self.factor, self.times = factor, 0

    def lr(self, base: float, t: float) -> float:
        return base * self.factor**self.times

    def observe(self, metrics: Mapping[str, float]) -> None:
        self.times += 1

    def state_dict(self) -> dict[str, Any]:
        return {"times": self.times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.times = state["times"]


@pytest.mark.parametrize(
    "spec", [Halving(), Halving, {"name": Halving}, {"name": Halving, "factor": 0.5}, lambda of: Halving()]
)
def test_a_subclass_with_a_state_is_bound_and_goes_through_a_checkpoint(spec: Any) -> None:
    inner, later = optimizer(), optimizer()
    schedule = build_scheduler(inner, spec)
    assert schedule.monitor == "val_loss"  # type: ignore[attr-defined]
    schedule.before_update(0, 0)
    schedule.after_epoch({"val_loss": 1.0})
    schedule.after_epoch({"val_loss": 1.0}, validated=False)  # an earlier epoch's
    schedule.before_update(1, 1)
    assert get_lr(inner) == 0.25
    resumed = build_scheduler(later, spec)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    resumed.before_update(2, 1)
    assert get_lr(later) == 0.25


def test_a_subclass_is_told_how_long_the_run_is_and_may_have_a_warm_up() -> None:
    class Down(Scheduler):
        needs_total = True

        def lr(self, base: float, t: float) -> float:
            return base * (1 - t / self.length)

    assert ours({"name": Down, "warmup": 2}, 6, base=1.0, total_steps=6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ConfigError, match="the Down schedule needs to know how long the run is"):
        build_scheduler(optimizer(), Down)


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential", "polynomial"])
def test_a_life_that_goes_on_has_the_rates_of_one_that_never_stopped(name: str) -> None:
    spec = {"name": name, "warmup": 5}
    expected = ours(spec, 40, base=3e-4, total_steps=40)
    for stop in (1, 5, 6, 20):
        inner, later = optimizer(3e-4), optimizer(3e-4)
        first = build_scheduler(inner, spec, total_steps=40)
        for step in range(stop):
            first.before_update(step, 0)
        between = build_scheduler(optimizer(3e-4), spec, total_steps=1)  # as where it is saved outside of a fit
        between.load_state_dict(json.loads(json.dumps(first.state_dict())))
        second = build_scheduler(later, spec, total_steps=40)
        second.load_state_dict(json.loads(json.dumps(between.state_dict())))
        rates = []
        for step in range(stop, 40):
            second.before_update(step, 0)
            rates.append(get_lr(later))
        assert rates == expected[stop:]


def test_a_run_that_was_made_longer_has_the_longer_schedule() -> None:
    inner = optimizer()
    first, second = (build_scheduler(inner, "linear", total_steps=total) for total in (10, 20))
    for step in range(10):
        first.before_update(step, 0)
    second.load_state_dict(first.state_dict())
    second.before_update(10, 0)
    assert get_lr(inner) == 0.25


def test_past_its_total_a_rate_stays_at_the_floor() -> None:
    for name in ("cosine", "linear", "polynomial", "wsd"):
        rates = ours({"name": name, "min_lr": 0.1}, 30, total_steps=10)
        assert rates[10:] == pytest.approx([0.1] * 20)
        assert ours({"name": name, "min_lr": 0.1}, 30, base=0.05, total_steps=10) == pytest.approx([0.05] * 30)
    assert ours("onecycle", 30, total_steps=10)[9:] == pytest.approx([0.5 / 25 / 1e4] * 21)


def test_none_and_constant_leave_the_rates_alone() -> None:
    assert ours(None, 3) == ours("constant", 3) == [0.5] * 3


@given(st.integers(0, 100), st.sampled_from(sorted(NAMED)))
def test_a_rate_needs_no_history(step: int, name: str) -> None:
    needed: dict[str, Any] = {
        "multistep": {"milestones": [10, 20]},
        "cosine_restarts": {"period": 13, "period_factor": 2},
    }
    spec = {"name": name, "warmup": 7, **needed.get(name, {})}
    rates = ours(spec, 101, total_steps=80)
    inner = optimizer()
    build_scheduler(inner, spec, total_steps=80).before_update(step, 0)
    assert get_lr(inner) == pytest.approx(rates[step], rel=1e-12, abs=1e-15)


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


@pytest.mark.parametrize(
    "spec", [None, "constant", "cosine", lambda inner: StepLR(inner, 3), {"name": StepLR, "step_size": 3, "warmup": 3}]
)
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


@pytest.mark.parametrize(
    "spec",
    [
        lambda inner: OneCycleLR(inner, 0.5, total_steps=20),
        lambda inner: CyclicLR(inner, 0.1, 0.5, step_size_up=4, cycle_momentum=False),
        lambda inner: CosineAnnealingLR(inner, 20, eta_min=0.01),
        lambda inner: SequentialLR(inner, [LinearLR(inner, 0.1, 1.0, 8), CosineAnnealingLR(inner, 12)], [8]),
        lambda inner: ChainedScheduler([LambdaLR(inner, lambda t: 1 / (1 + t)), StepLR(inner, 7)], inner),
        {"name": StepLR, "step_size": 3, "warmup": 8},
    ],
)
@given(at=st.lists(st.integers(0, 19), max_size=3), factor=st.sampled_from([0.1, 0.3, 3.0]), cut=st.integers(0, 19))
def test_a_scale_of_any_torch_scheduler_is_of_all_later_rates(
    spec: Any, at: list[int], factor: float, cut: int
) -> None:
    expected, inner, product = ours(spec, 20), optimizer(), 1.0
    schedule = build_scheduler(inner, spec)
    for step in range(20):
        if step == cut:  # a life that goes on
            inner, before = optimizer(), (inner.state_dict(), json.loads(json.dumps(schedule.state_dict())))
            schedule = build_scheduler(inner, spec)
            inner.load_state_dict(before[0])
            schedule.load_state_dict(before[1])
        for _ in range(at.count(step)):
            schedule.scale(factor)
            product *= factor
        assert get_lr(inner) == pytest.approx(expected[step] * product, rel=1e-9)
        inner.step()
        schedule.after_update()


def test_a_rate_that_somebody_else_sets_is_gone_on_from_beside_a_scale() -> None:
    inner = optimizer()
    schedule = build_scheduler(inner, lambda of: StepLR(of, 1, 0.5))
    schedule.scale(0.1)
    inner.param_groups[0]["lr"] = 8.0
    inner.step()
    schedule.after_update()
    assert get_lr(inner) == pytest.approx(4.0)


def test_torch_schedulers_are_stepped_after_each_update() -> None:
    def make(inner: Optimizer) -> LRScheduler:
        return OneCycleLR(inner, 0.5, total_steps=20)

    assert ours(make, 20) == of_torch(make, 20)
    assert ours({"name": make, "interval": "step"}, 20) == of_torch(make, 20)


@pytest.mark.filterwarnings("error")
async def test_a_refused_update_is_a_step_of_each_schedule_torchs_too() -> None:
    rates = []
    specs: list[Any] = [{"name": "step", "step_size": 2, "gamma": 0.5}, lambda of: StepLR(of, 2, gamma=0.5)]
    for spec in specs:
        stream = Samples(64)
        order = list(stream.batches(0))
        for number in (0, 3):
            stream.inputs[int(order[number].index[0])] = float("nan")
        seen = Recorder()
        fitted = Trainer(
            nn.Linear(4, 1), nn.MSELoss(), lr=1.0, scheduler=spec, nonfinite="skip", log_every=1, callbacks=[seen]
        )
        await fitted.fit(stream)
        rates.append([event.values["lr"] for event in seen.events("on_log")])
    assert rates[0] == rates[1] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


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
        ({"name": "cosine", "interval": "batch"}, "interval must be 'step', 'epoch', 'samples' or 'time'", ""),
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
        ({}, "scheduler has no name", "Give {'name': 'cosine', ...}"),
        ({"name": "cosine", "total": "x"}, "scheduler.total must be a number of steps of at least 1, not 'x'", ""),
        ({"name": "cosine", "total": 0}, "scheduler.total must be a number of steps of at least 1, not 0", ""),
        ({"name": "linear", "total": -5, "interval": "epoch"}, "must be a number of epochs of at least 1, not -5", ""),
        (Cosine(total=0), "scheduler.total must be a number of steps of at least 1, not 0", ""),
        ({"name": "constant", "total": True}, "scheduler.total must be a number", ""),
        ({"name": "step", "step_size": "x"}, "scheduler.step_size must be like '500steps'", ""),
        ({"name": ReduceLROnPlateau, "monitor": 5}, "scheduler.monitor must be the name of a metric", ""),
        (lambda inner: 3, "gave a int, not a torch LRScheduler", "A function that gives a factor"),
        (lambda progress: 1.0, "the function schedule needs to know how long the run is", "Give max_steps"),
        ({"name": "cosine", "interval": "time"}, "needs to know how long the run is", "Give max_time"),
        ({"name": "cosine", "interval": "samples"}, "needs to know how long the run is", "Give max_epochs"),
        ({"name": "cosine", "gamma": 0.5}, "unknown key 'gamma'", "Known: name, interval"),
        ("multistep", "scheduler.milestones is missing", "For instance"),
        ({"name": "multistep", "milestones": 3}, "milestones must be a list", ""),
        ({"name": "multistep", "milestones": [3, "x"]}, "milestones[1] must be like", ""),
        ("cosine_restarts", "scheduler.period is missing", ""),
        ({"name": "cosine_restarts", "period": 3, "period_factor": 0.5}, "period_factor must be a whole number", ""),
        (
            {"name": "cyclic", "mode": "square"},
            "mode must be 'triangular', 'triangular2', 'exp_range', not 'square'",
            "",
        ),
        ({"name": "onecycle", "total": 9, "pct_start": 2}, "pct_start must be below 1", ""),
        ({"name": "onecycle", "total": 9, "div_factor": 0}, "div_factor must be a finite number above 0", ""),
        ({"name": "plateau", "patience": -1}, "patience must be a whole number of at least 0", ""),
        ({"name": "plateau", "factor": 1}, "factor must be below 1", ""),
        ({"name": "step", "interval": "time", "step_size": "3steps"}, "'3steps' can't be counted in seconds", ""),
        ({"name": StepLR, "step_size": 1, "interval": "time"}, "torch's schedulers count their steps", ""),
        ({"name": StepLR, "stepsize": 1}, "unknown key 'stepsize'", "Did you mean 'step_size'?"),
        ("torch.optim.lr_scheduler.StpLR", "module torch.optim.lr_scheduler has no StpLR", "Did you mean StepLR?"),
        ("no_such_package.Name", "importing 'no_such_package' (for no_such_package.Name) failed", ""),
        ({"name": ReduceLROnPlateau, "interval": "step"}, "can't be stepped after each update", ""),
    ],
)
def test_what_cannot_work_is_refused(spec: Any, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_scheduler(optimizer(), spec)
    assert message in str(caught.value)
    assert caught.value.hint.startswith(hint)


def test_a_function_of_no_known_argument_is_refused_with_what_it_is_called_with() -> None:
    with pytest.raises(ConfigError, match="<lambda>: unsupported operand") as caught:
        build_scheduler(optimizer(), lambda p: 1 - p)
    assert "a parameter named progress, or t" in caught.value.hint


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
        ("5m", (300, "second")),
        ("2 Hours", (7200, "second")),
        (7, (7, "step")),
        (0, (0, "step")),
    ],
)
def test_spans_are_read(text: Any, span: tuple[float, str]) -> None:
    assert parse_span(text, "x") == span


@pytest.mark.parametrize(
    "text",
    ["", "steps", "1.5steps", "0steps", "-3steps", "3 days", "500ms", "5ss", True, 1.5, None, math.nan, math.inf],
)
def test_what_is_no_span_is_refused_with_its_name(text: Any) -> None:
    with pytest.raises(ConfigError, match="warmup must be") as caught:
        parse_span(text, "warmup")
    assert text != "3 days" or "step, epoch, s, sec, second, m, min, minute, h and hour" in caught.value.hint


class Odd(Scheduler):
    """What a user's schedule may give or raise, by what its `lr` calls."""

    def __init__(self, give: Callable[[], Any]) -> None:
        self._give = give

    def lr(self, base: float, t: float) -> float:
        given: float = self._give()
        return given


@pytest.mark.parametrize("given", [math.nan, math.inf, "0.1"])
async def test_a_rate_that_is_no_finite_number_is_refused_before_its_update(given: Any) -> None:
    """The weights of the update were NaN, and said to be the last good ones."""
    for scheduler in Odd(lambda: given), lambda inner: LambdaLR(inner, lambda t: given if t else 1.0):
        if given == "0.1" and not isinstance(scheduler, Scheduler):
            continue  # torch itself multiplies by it
        model = network()
        with pytest.raises(ConfigError, match=r"the scheduler \w+ gave .* as a learning rate, which is no finite"):
            await Trainer(model, nn.MSELoss(), scheduler=scheduler, device="cpu").fit(Samples(), max_steps=4)
        assert all(bool(weight.isfinite().all()) for weight in model.parameters())


async def test_what_a_schedule_raises_is_its_own_error() -> None:
    def fails() -> float:
        raise KeyError("mine")

    class Seeing(Scheduler):
        def observe(self, metrics: Mapping[str, float]) -> None:
            fails()

    for scheduler in Odd(fails), Seeing(), lambda inner: LambdaLR(inner, lambda t: fails() if t else 1.0):
        with pytest.raises(UserCodeError, match=r"^the scheduler (Odd|Seeing|LambdaLR) raised KeyError: 'mine'"):
            await Trainer(network(), nn.MSELoss(), scheduler=scheduler, device="cpu").fit(Samples())
