"""Learning rates as pure functions of progress: `Schedule.lr(base, t)` needs no history, so nothing can drift.

    constant   1
    linear     from 1 to the floor over what is left after the warm-up
    cosine     half a cosine, likewise
    step       gamma ** (t // step_size)

`t` counts updates from 0 (`interval="step"`) or epochs (`interval="epoch"`). Any torch scheduler works as well: give a
callable that takes the optimizer.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from streamtrain.errors import ConfigError

NAMES = ("constant", "cosine", "linear", "step")
_KEYS = ("name", "warmup", "min_lr", "interval", "total", "step_size", "gamma", "monitor")
_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(step|epoch|s|sec|second|min|minute|h|hour)s?\s*", re.IGNORECASE)
_SECONDS = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
UNITS = "The units are step, epoch, s, sec, second, min, minute, h and hour, with or without an s behind them."

SchedulerSpec = Any
"""None, a name, a dict with a name, a Schedule, or a callable from optimizer to a torch scheduler."""


def parse_span(text: str | float, what: str, *, bare: str = "step") -> tuple[float, str]:
    """Read "500steps", "1epoch" or "10min" as (500, "step"), (1, "epoch") or (600, "second"); a number is of `bare`.

    Steps and epochs must be whole and at least 1 (0 is allowed for a bare number). Raises ConfigError naming `what`.
    """
    if isinstance(text, str):
        match = _SPAN.fullmatch(text)
        if match is None:
            raise ConfigError(f"{what} must be like '500steps', '1epoch' or '10min', not {text!r}", hint=UNITS)
        amount, unit = float(match[1]), match[2].lower()
        if unit in _SECONDS:
            return amount * _SECONDS[unit], "second"
    elif type(text) in (int, float):
        amount, unit = float(text), bare
    else:
        raise ConfigError(f"{what} must be like '500steps' or '1epoch', not {text!r}", hint=UNITS)
    if unit != "second" and (not amount.is_integer() or amount < 0 or (isinstance(text, str) and amount < 1)):
        raise ConfigError(f"{what} must be a whole number of {unit}s, at least 1, not {text!r}")
    return amount, unit


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate as a function of progress."""

    name: str = "constant"
    warmup: int = 0
    """Updates (or epochs) of linear growth from base/warmup to base."""
    total: int | None = None
    """Updates (or epochs) of the whole run; cosine and linear need it. Past it the rate stays at the floor."""
    min_lr: float = 0.0
    """The floor; a group whose base is lower keeps its base."""
    interval: str = "step"
    """What `t` counts: "step" or "epoch"."""
    step_size: int = 1
    """For "step": so many `t` between two reductions."""
    gamma: float = 0.1
    """For "step": the factor of each reduction."""

    def lr(self, base: float, t: int) -> float:
        """The learning rate of the update made at progress `t`."""
        if t < self.warmup:
            return base * (t + 1) / self.warmup
        floor = min(self.min_lr, base)
        return floor + (base - floor) * self._shape(t - self.warmup)

    def _shape(self, t: int) -> float:
        if self.name == "step":
            return float(self.gamma ** (t // self.step_size))
        if self.name == "constant" or self.total is None:
            return 1.0
        done = min(1.0, t / max(1, self.total - self.warmup))
        return 1.0 - done if self.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class LearningRate(Protocol):
    """What the wheel needs of a schedule that is bound to an optimizer."""

    by_epoch: bool

    def before_update(self, step: int, epoch: int) -> None:
        """Set the rates for update number `step` (from 0) of epoch `epoch`."""

    def after_update(self) -> None:
        """An update was made."""

    def after_epoch(self, metrics: Mapping[str, float], *, validated: bool = True) -> None:
        """An epoch and its validation, if it had one, are done; `metrics` holds what can be monitored."""

    def scale(self, factor: float) -> None:
        """Multiply the rates by `factor`, now and for the rest of the schedule."""

    def state_dict(self) -> dict[str, Any]:
        """What can't be computed from progress."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def get_lr(optimizer: Optimizer) -> float:
    """The first group's learning rate."""
    return float(optimizer.param_groups[0]["lr"])


def set_group_lr(group: dict[str, Any], lr: float) -> None:
    """Set one group's rate; where it is a tensor (capturable optimizers), in place."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


class FixedLearningRate:
    """No schedule: the optimizer's rates are left alone."""

    by_epoch = False

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def before_update(self, step: int, epoch: int) -> None:
        pass

    def after_update(self) -> None:
        pass

    def after_epoch(self, metrics: Mapping[str, float], *, validated: bool = True) -> None:
        pass

    def scale(self, factor: float) -> None:
        for group in self._optimizer.param_groups:
            set_group_lr(group, float(group["lr"]) * factor)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ScheduledLearningRate:
    """A Schedule applied to the base rates that the groups have when it is bound."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.by_epoch = schedule.interval == "epoch"
        self.schedule = schedule
        self._optimizer = optimizer  # not its groups: loading a state makes new ones
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        self._bases = [float(group["initial_lr"]) for group in optimizer.param_groups]

    def before_update(self, step: int, epoch: int) -> None:
        t = epoch if self.by_epoch else step
        lr = self.schedule.lr
        for group, base in zip(self._optimizer.param_groups, self._bases, strict=False):
            set_group_lr(group, lr(base, t))

    def after_update(self) -> None:
        pass

    def after_epoch(self, metrics: Mapping[str, float], *, validated: bool = True) -> None:
        pass

    def scale(self, factor: float) -> None:
        self._bases = [base * factor for base in self._bases]
        for group in self._optimizer.param_groups:
            set_group_lr(group, float(group["lr"]) * factor)

    def state_dict(self) -> dict[str, Any]:
        return {"bases": list(self._bases)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bases = [float(base) for base in state["bases"]]


class TorchLearningRate:
    """A torch scheduler, stepped after each update or each epoch."""

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler, *, interval: str, monitor: str | None) -> None:
        self.by_epoch = interval == "epoch"
        self.scheduler = scheduler
        self.monitor = (monitor or "val_loss") if isinstance(scheduler, ReduceLROnPlateau) else None
        """What must be logged; None where nothing need be."""
        self._optimizer = optimizer

    def before_update(self, step: int, epoch: int) -> None:
        pass

    def after_update(self) -> None:
        if not self.by_epoch:
            self.scheduler.step()

    def after_epoch(self, metrics: Mapping[str, float], *, validated: bool = True) -> None:
        if not self.by_epoch:
            return
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
            return
        assert self.monitor is not None
        if self.monitor.startswith("val_") and not validated:
            return  # what it would see is an earlier epoch's
        if self.monitor not in metrics:
            logged = ", ".join(sorted(metrics)) or "nothing"
            raise ConfigError(f"the scheduler monitors {self.monitor!r}, which nothing logs", hint=f"logged: {logged}")
        self.scheduler.step(metrics[self.monitor])

    def scale(self, factor: float) -> None:
        for group in self._optimizer.param_groups:
            set_group_lr(group, float(group["lr"]) * factor)
        if isinstance(bases := getattr(self.scheduler, "base_lrs", None), list):
            self.scheduler.base_lrs = [base * factor for base in bases]

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


def build_scheduler(
    optimizer: Optimizer,
    spec: SchedulerSpec,
    *,
    total_steps: int | None = None,
    total_epochs: int | None = None,
    steps_per_epoch: int | None = None,
) -> LearningRate:
    """Bind a schedule to an optimizer.

    `spec`: None; "constant", "cosine", "linear" or "step"; a dict such as {"name": "cosine", "warmup": "500steps",
    "min_lr": 1e-6, "interval": "step"}; a Schedule; or a callable from optimizer to a torch scheduler, alone or as a
    dict's "name" (then with "interval" and, for ReduceLROnPlateau, "monitor"). Without an interval torch's schedulers
    are stepped after each update, ReduceLROnPlateau after each epoch's validation.

    Raises ConfigError.
    """
    if spec is None:
        return FixedLearningRate(optimizer)
    if isinstance(spec, Schedule):
        if spec.total is not None:
            _total(spec.total, spec.interval)
        return ScheduledLearningRate(optimizer, spec)
    table: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"scheduler: unknown key {key!r}", hint=_nearest(str(key), _KEYS))
    name, interval, monitor = table.get("name"), table.get("interval"), table.get("monitor")
    if monitor is not None and not (isinstance(monitor, str) and monitor):
        raise ConfigError(f"scheduler.monitor must be the name of a metric such as 'val_loss', not {monitor!r}")
    if interval not in (None, "step", "epoch"):
        raise ConfigError(f"scheduler.interval must be 'step' or 'epoch', not {interval!r}")
    if isinstance(name, LRScheduler) or callable(name):
        return _torch(optimizer, name, interval, monitor)
    if name not in NAMES:
        raise ConfigError(f"scheduler: unknown name {name!r}", hint=_nearest(str(name or ""), NAMES))
    if "monitor" in table:
        raise ConfigError(f"scheduler.monitor is for ReduceLROnPlateau, not for {name!r}")
    return ScheduledLearningRate(
        optimizer, _schedule(table, interval or "step", total_steps, total_epochs, steps_per_epoch)
    )


def _torch(
    optimizer: Optimizer, made: LRScheduler | Callable[[Optimizer], Any], interval: str | None, monitor: str | None
) -> LearningRate:
    scheduler = made if isinstance(made, LRScheduler) else made(optimizer)
    if isinstance(scheduler, Schedule):
        return ScheduledLearningRate(optimizer, scheduler)
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(f"the scheduler callable gave a {type(scheduler).__name__}, not a torch LRScheduler")
    if scheduler.optimizer is not optimizer:
        raise ConfigError("the scheduler belongs to another optimizer", hint="Give a callable: lambda optimizer: ...")
    if isinstance(scheduler, ReduceLROnPlateau):
        if interval == "step":
            raise ConfigError("ReduceLROnPlateau can't be stepped after each update", hint="interval='epoch'")
        interval = "epoch"
    return TorchLearningRate(optimizer, scheduler, interval=interval or "step", monitor=monitor)


def _schedule(
    table: Mapping[str, Any], interval: str, steps: int | None, epochs: int | None, per_epoch: int | None
) -> Schedule:
    """Work out a Schedule from its table: spans in units of the interval, and the total."""

    def span(key: str, default: float) -> int:
        amount, unit = parse_span(table.get(key, default), f"scheduler.{key}", bare=interval)
        if unit == interval:
            return int(amount)
        if unit == "epoch" and per_epoch is not None:
            return int(amount) * per_epoch
        raise ConfigError(f"scheduler.{key}: {table[key]!r} can't be counted in {interval}s here")

    name = table["name"]
    total = _total(table["total"], interval) if "total" in table else (steps if interval == "step" else epochs)
    if name in ("cosine", "linear") and total is None:
        raise ConfigError(
            f"the {name} schedule needs to know how long the run is",
            hint="Give max_steps, or scheduler={..., 'total': number of steps}.",
        )
    number = {key: _number(table.get(key, default), key) for key, default in (("min_lr", 0.0), ("gamma", 0.1))}
    step_size = span("step_size", 1)
    if name == "step" and step_size < 1:
        raise ConfigError(f"scheduler.step_size must be at least 1, not {table.get('step_size')!r}")
    return Schedule(
        name=name,
        warmup=span("warmup", 0),
        total=total,
        interval=interval,
        step_size=max(1, step_size),
        min_lr=number["min_lr"],
        gamma=number["gamma"],
    )


def _total(value: object, interval: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"scheduler.total must be a number of {interval}s of at least 1, not {value!r}")
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"scheduler.{key} must be a finite number, at least 0, not {value!r}")
    return float(value)


def _nearest(word: str, known: tuple[str, ...]) -> str:
    found = difflib.get_close_matches(word, known, 1)
    return f"Did you mean {found[0]!r}?" if found else f"Known: {', '.join(known)}."
