"""Learning rates as functions of progress: `lr(base, t)` needs no history, so a run may begin anywhere.

Its law: `base`, the optimizer's own rate, is the highest that a schedule reaches, and where torch has the schedule, the
rates of a run are torch's to the bit. torch multiplies its way from rate to rate; so do those that have `following`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from streamtrain.errors import ConfigError
from streamtrain.metrics import direction


@dataclass(kw_only=True)
class Scheduler:
    """A schedule of learning rates; subclass it, and give an object or the class as `scheduler=`.

    Override `lr`; `observe`, `state_dict` and `load_state_dict` too where it learns from what is logged. An `__init__`
    of one's own need not call this one: the fields below are class attributes as well. What is bound is a copy.
    """

    interval: str = "step"
    """What `t` counts: updates ("step"), epochs ("epoch"), samples ("samples") or seconds ("time"), from 0."""
    warmup: float = 0
    """So many `t` of linear growth from base/warmup to base come first; `lr` counts from their end."""
    total: float | None = None
    """How many `t` the whole run has, warm-up included; None where that is not known."""
    monitor: str | None = None
    """What must be logged for `observe`; None where nothing need be."""

    needs_total: ClassVar[bool] = False
    """Whether it can't do without `total`."""

    @property
    def length(self) -> float:
        """How many `t` come after the warm-up, at least 1."""
        return max(1, (self.total or 0) - self.warmup)

    def lr(self, base: float, t: float) -> float:
        """The rate at progress `t` after the warm-up of a group whose own rate is `base`."""
        return base

    def following(self, lr: float, base: float, t: int) -> float:
        """The rate at `t` where that at `t - 1` was `lr`; `base` at 0. It may differ from `lr(base, t)` by rounding."""
        return self.lr(base, t)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """An epoch and its validation are done; `metrics` holds the last value of all that is logged."""

    def state_dict(self) -> dict[str, Any]:
        """What `lr` depends on beside its arguments: None, bool, int, float, str, tensors, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def rising(self, lr: float, base: float, t: float) -> float:
        """The rate at `t` within the warm-up, where that at `t - 1` was `lr`; torch's LinearLR from 1/warmup to 1."""
        start = 1.0 / self.warmup
        if t == 0:
            return base * start
        return lr * (1.0 + (1.0 - start) / ((self.warmup - 1) * start + (t - 1) * (1.0 - start)))

    def risen(self, base: float, t: float) -> float:
        """The same from nothing but `t`."""
        return base * min(1.0, (t + (self.interval != "time")) / self.warmup)


@dataclass(kw_only=True)
class Constant(Scheduler):
    """The optimizer's own rate, after a warm-up if there is one."""

    name: ClassVar[str] = "constant"

    def following(self, lr: float, base: float, t: int) -> float:
        return base


@dataclass(kw_only=True)
class Decay(Scheduler):
    """Between the base and a floor: a factor of the height above it, and its ratio to the factor before."""

    min_lr: float = 0.0
    """The floor; a group whose base is lower keeps its base."""

    def factor(self, t: float) -> float:
        """The height at `t`, of 1."""
        raise NotImplementedError

    def ratio(self, t: int) -> float | None:
        """The height at `t` over that at `t - 1`; None where only `factor` tells."""
        return None

    def lr(self, base: float, t: float) -> float:
        floor = min(self.min_lr, base)
        return floor + (base - floor) * self.factor(t)

    def following(self, lr: float, base: float, t: int) -> float:
        if t == 0:
            return base
        ratio = self.ratio(t)
        if ratio is None:
            return self.lr(base, t)
        if ratio == 1.0:
            return lr
        floor = min(self.min_lr, base)
        return ratio * (lr - floor) + floor


@dataclass(kw_only=True)
class Step(Decay):
    """Times `gamma` each `step_size`; torch's StepLR."""

    name: ClassVar[str] = "step"
    step_size: float = 1
    gamma: float = 0.1

    def factor(self, t: float) -> float:
        return float(self.gamma ** (t // self.step_size))

    def ratio(self, t: int) -> float:
        return 1.0 if t % self.step_size else self.gamma


@dataclass(kw_only=True)
class MultiStep(Decay):
    """Times `gamma` at each milestone; torch's MultiStepLR."""

    name: ClassVar[str] = "multistep"
    milestones: tuple[float, ...] = ()
    """In any order; one that stands there twice counts twice."""
    gamma: float = 0.1

    def factor(self, t: float) -> float:
        return float(self.gamma ** bisect_right(sorted(self.milestones), t))

    def ratio(self, t: int) -> float:
        times = self.milestones.count(t)
        return float(self.gamma**times) if times else 1.0


@dataclass(kw_only=True)
class Exponential(Decay):
    """Times `gamma` for each `t`; torch's ExponentialLR."""

    name: ClassVar[str] = "exponential"
    gamma: float = 0.1

    def factor(self, t: float) -> float:
        return float(self.gamma**t)

    def ratio(self, t: int) -> float:
        return self.gamma


@dataclass(kw_only=True)
class Cosine(Decay):
    """Half a cosine down to the floor, where it stays; torch's CosineAnnealingLR (Loshchilov and Hutter 2017)."""

    name: ClassVar[str] = "cosine"
    needs_total: ClassVar[bool] = True

    def factor(self, t: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * min(t, self.length) / self.length))

    def ratio(self, t: int) -> float | None:
        if t > self.length:
            return None
        return (1 + math.cos(math.pi * t / self.length)) / (1 + math.cos(math.pi * (t - 1) / self.length))


@dataclass(kw_only=True)
class Linear(Decay):
    """A line down to the floor, where it stays; torch's LinearLR from 1 to min_lr/base."""

    name: ClassVar[str] = "linear"
    needs_total: ClassVar[bool] = True

    def lr(self, base: float, t: float) -> float:
        return base * (1.0 + self._fall(base) * min(self.length, t) / self.length)

    def following(self, lr: float, base: float, t: int) -> float:
        fall = self._fall(base)
        if not fall or not 0 < t <= self.length:
            return base if t == 0 else self.lr(base, t)
        return lr * (1.0 + fall / (self.length + (t - 1) * fall))

    def _fall(self, base: float) -> float:
        """From 1 to the floor, in terms of the base."""
        return min(self.min_lr, base) / base - 1.0 if base else 0.0


@dataclass(kw_only=True)
class Polynomial(Decay):
    """(1 - t/length) to a power, down to the floor; torch's PolynomialLR."""

    name: ClassVar[str] = "polynomial"
    needs_total: ClassVar[bool] = True
    power: float = 1.0

    def factor(self, t: float) -> float:
        return float((1.0 - min(t, self.length) / self.length) ** self.power)

    def ratio(self, t: int) -> float | None:
        if t > self.length:
            return None
        return float(((1.0 - t / self.length) / (1.0 - (t - 1) / self.length)) ** self.power)


@dataclass(kw_only=True)
class CosineRestarts(Decay):
    """A cosine down to the floor and up again at once, each `period`, which grows by `period_factor` each time; torch's
    CosineAnnealingWarmRestarts (SGDR, Loshchilov and Hutter 2017)."""

    name: ClassVar[str] = "cosine_restarts"
    period: float = 0
    period_factor: int = 1

    def factor(self, t: float) -> float:
        period = self.period
        if self.period_factor == 1:
            t = t % period
        while t >= period:
            t, period = t - period, period * self.period_factor
        return (1 + math.cos(math.pi * t / period)) / 2

    def following(self, lr: float, base: float, t: int) -> float:
        return self.lr(base, t)


@dataclass(kw_only=True)
class Cyclic(Decay):
    """Lines up from the floor to the base and down again; torch's CyclicLR (Smith 2017) without its momentum.

    `mode`: "triangular", "triangular2" (half the height each time) or "exp_range" (times `gamma` to the power of t).
    """

    name: ClassVar[str] = "cyclic"
    step_size_up: float = 2000
    step_size_down: float | None = None
    """None: as many as up."""
    mode: str = "triangular"
    gamma: float = 1.0

    def lr(self, base: float, t: float) -> float:
        floor = min(self.min_lr, base)
        whole = float(self.step_size_up) + float(self.step_size_down or self.step_size_up)
        up = self.step_size_up / whole
        cycle = math.floor(1 + t / whole)
        x = 1.0 + t / whole - cycle
        height = (base - floor) * (x / up if x <= up else (x - 1) / (up - 1))
        if self.mode == "triangular2":
            return floor + height * (1 / (2.0 ** (cycle - 1)))
        return floor + height * (self.gamma**t if self.mode == "exp_range" else 1.0)

    def following(self, lr: float, base: float, t: int) -> float:
        return self.lr(base, t)


@dataclass(kw_only=True)
class OneCycle(Scheduler):
    """Up from base/div_factor to the base, and down to that over final_div_factor; torch's OneCycleLR (Smith and Topin
    2017) without its momentum. `three_phase`: down as long as up, and then to the lowest rate."""

    name: ClassVar[str] = "onecycle"
    needs_total: ClassVar[bool] = True
    pct_start: float = 0.3
    """The share of the run that goes up."""
    anneal: str = "cos"
    """Along a cosine ("cos") or a line ("linear")."""
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def lr(self, base: float, t: float) -> float:
        first = base / self.div_factor
        last, whole = first / self.final_div_factor, self.length
        phases = [(self.pct_start * whole - 1, first, base)]
        if self.three_phase:
            phases.append((2 * self.pct_start * whole - 2, base, first))
        phases.append((whole - 1, first if self.three_phase else base, last))
        begin = 0.0
        for end, high, low in phases:
            if t <= end:
                return self._between(high, low, (t - begin) / (end - begin) if end > begin else 1.0)
            begin = end
        return last

    def _between(self, start: float, end: float, done: float) -> float:
        if self.anneal == "linear":
            return (end - start) * done + start
        return end + (start - end) / 2.0 * (math.cos(math.pi * done) + 1)


@dataclass(kw_only=True)
class InverseSqrt(Decay):
    """The square root of timescale/(t + timescale), where the timescale is the warm-up, or 10,000 without one (Vaswani
    et al. 2017): after w of warm-up it falls as the root of w over what was trained."""

    name: ClassVar[str] = "inverse_sqrt"
    timescale: float | None = None

    def factor(self, t: float) -> float:
        scale = self.timescale or self.warmup or 10_000
        return math.sqrt(scale / (t + scale))


@dataclass(kw_only=True)
class WarmupStableDecay(Decay):
    """The base until the last part of the run, the `decay`, which goes down to the floor (Hu et al. 2024, MiniCPM).

    `shape`: "linear", "cosine", or "sqrt" for one minus the root of what is done of it (Hägele et al. 2024).
    """

    name: ClassVar[str] = "wsd"
    needs_total: ClassVar[bool] = True
    decay: float = 0.1
    """A share of the run below 1, or a number of `t`; at most all that comes after the warm-up."""
    shape: str = "linear"

    def factor(self, t: float) -> float:
        last = min(self.length, max(1e-9, self.decay * (self.total or 0) if self.decay < 1 else self.decay))
        done = min(1.0, max(0.0, (t - (self.length - last)) / last))
        if self.shape == "sqrt":
            return 1.0 - math.sqrt(done)
        return 1.0 - done if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(kw_only=True)
class Plateau(Scheduler):
    """Times `factor` once the monitor has not improved for more than `patience` epochs; torch's ReduceLROnPlateau.

    An improvement is by more than `threshold`, of the best value ("rel") or in itself ("abs"); NaN is none. After a
    reduction `cooldown` epochs are not counted. `mode`: min, max, or auto by the monitor's name. Values that come
    within the warm-up count too.
    """

    name: ClassVar[str] = "plateau"
    monitor: str | None = "val_loss"
    mode: str = "auto"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_lr: float = 0.0
    eps: float = 1e-8
    """A smaller reduction is not made."""

    def __post_init__(self) -> None:
        if self.mode == "auto":
            self.mode = direction(self.monitor or "")
        self._best = math.inf if self.mode == "min" else -math.inf
        self._bad = self._cooling = self._reductions = 0

    def lr(self, base: float, t: float) -> float:
        for _ in range(self._reductions):
            lower = max(base * self.factor, self.min_lr)
            if base - lower <= self.eps:
                break
            base = lower
        return base

    def observe(self, metrics: Mapping[str, float]) -> None:
        value = float(metrics[self.monitor or ""])
        if self._better(value):
            self._best, self._bad = value, 0
        else:
            self._bad += 1
        if self._cooling:
            self._cooling, self._bad = self._cooling - 1, 0
        if self._bad > self.patience:
            self._reductions, self._cooling, self._bad = self._reductions + 1, self.cooldown, 0

    def _better(self, value: float) -> bool:
        relative = self.threshold_mode == "rel"
        if self.mode == "min":
            return value < (self._best * (1.0 - self.threshold) if relative else self._best - self.threshold)
        return value > (self._best * (self.threshold + 1.0) if relative else self._best + self.threshold)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "bad": self._bad, "cooling": self._cooling, "reductions": self._reductions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._bad = float(state["best"]), int(state["bad"])
        self._cooling, self._reductions = int(state["cooling"]), int(state["reductions"])


@dataclass(kw_only=True)
class FunctionOf(Scheduler):
    """The base times a function of the share of the run that is done (`progress`, from 0.0 to 1.0), or of `t`; that of
    `t` is torch's LambdaLR."""

    name: ClassVar[str] = "function"
    function: Callable[[float], Any]
    of_progress: bool = True

    def lr(self, base: float, t: float) -> float:
        given = self.function(min(1.0, t / self.length) if self.of_progress else t)
        try:
            value = math.nan if isinstance(given, str) else float(given)  # numpy's and tensors of one value too
        except (TypeError, ValueError, RuntimeError):
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise ConfigError(
                f"scheduler: the function gave {given!r:.60} at {t:g}, not a finite number of at least 0",
                hint="It gives the factor by which the optimizer's learning rate is multiplied.",
            )
        return base * value


NAMED: dict[str, type[Scheduler]] = {
    kind.name: kind
    for kind in (
        *(Constant, Step, MultiStep, Exponential, Cosine, CosineRestarts, Cyclic, OneCycle, Linear, Polynomial),
        *(InverseSqrt, WarmupStableDecay, Plateau),
    )
}
"""By the names that `build_scheduler` takes."""
