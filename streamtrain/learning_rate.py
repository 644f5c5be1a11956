"""A schedule bound to an optimizer: what sets the rates before each update.

Its law: the rates of an update depend on the schedule, its state and the progress alone, and are put down with them: a
life that goes on has the rates of one that never stopped.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from streamtrain.errors import ConfigError, StreamtrainError, UserCodeError, named
from streamtrain.schedules import Scheduler

T = TypeVar("T")
logger = logging.getLogger(__name__)


class LearningRate(Protocol):
    """What the wheel needs of a schedule that is bound to an optimizer."""

    interval: str
    """What it counts: "step", "epoch", "samples" or "time"."""

    def before_update(self, step: int, epoch: int, samples: int = 0, seconds: float = 0.0) -> None:
        """Set the rates for update number `step` (from 0) of epoch `epoch`, after `samples` samples of training.

        `samples` and `seconds` (on the clock, of fits of this run) are told only where the interval counts them.
        """

    def after_update(self) -> None:
        """An update was made, or refused for a number that is not finite: each is a step."""

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


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _scale_groups(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        set_group_lr(group, float(group["lr"]) * factor)


def bring_to(schedule: LearningRate, optimizer: Optimizer, lr: float) -> bool:
    """Bring the first group's rate to `lr`, the others and the schedule in proportion; whether that could be, which is
    said where it could not: of a rate of 0 no other is a multiple."""
    now = get_lr(optimizer)
    if now > 0:
        schedule.scale(lr / now)
    elif not isinstance(schedule, FixedLearningRate):
        if lr:
            logger.warning("set_lr(%g) changes nothing: the rate of the schedule is 0, of which it is no multiple", lr)
        return False
    elif any(_rates(optimizer)):
        logger.warning(
            "set_lr(%g) changes nothing: the first group's rate is 0, and those of others are no multiple of it; set "
            "them one by one, in optimizer.param_groups",
            lr,
        )
        return False
    else:
        schedule.wake(lr)
    return True


def _own_rates(optimizer: Optimizer) -> list[float]:
    """The rates that the groups had before any schedule."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return [float(group["initial_lr"]) for group in optimizer.param_groups]


def _observable(monitor: str, metrics: Mapping[str, float], *, validated: bool) -> bool:
    """Whether there is a value of this epoch to be seen. Raises ConfigError where nothing logs it."""
    if monitor.startswith("val_") and not validated:
        return False  # what it would see is an earlier epoch's
    if monitor not in metrics:
        logged = ", ".join(sorted(metrics)) or "nothing"
        raise ConfigError(f"the scheduler monitors {monitor!r}, which nothing logs", hint=f"logged: {logged}")
    return True


def _asked(schedule: object, ask: Callable[..., T], *arguments: Any) -> T:
    """`ask(*arguments)`; what it raises is the schedule's own: no line of the model's is to be looked for."""
    try:
        return ask(*arguments)
    except StreamtrainError:
        raise
    except Exception as error:
        raise UserCodeError(
            f"the scheduler {type(schedule).__name__} raised {named(error)}",
            hint="The traceback (--debug) shows the line.",
        ) from error


def _refuse_odd(schedule: object, rates: Iterable[Any]) -> None:
    """Raise ConfigError for rates that are no finite numbers, before an update is made with them: they would leave no
    weight as it was."""
    for rate in rates:
        try:
            finite = math.isfinite(rate)
        except (TypeError, ValueError, RuntimeError):  # no number, or several
            finite = False
        if not finite:
            raise ConfigError(
                f"the scheduler {type(schedule).__name__} gave {rate!r} as a learning rate, which is no finite number"
            )


class FixedLearningRate:
    """No schedule: the optimizer's rates are left alone."""

    interval = "step"

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[float] = []
        """The rates before they were scaled to 0."""

    def before_update(self, step: int, epoch: int, samples: int = 0, seconds: float = 0.0) -> None:
        pass

    def after_update(self) -> None:
        pass

    def after_epoch(self, metrics: Mapping[str, float], *, validated: bool = True) -> None:
        pass

    def scale(self, factor: float) -> None:
        rates = _rates(self._optimizer)
        if not factor and any(rates):
            self._before = rates
        _scale_groups(self._optimizer, factor)

    def wake(self, lr: float) -> None:
        """From rates of 0: the first group's is `lr`, and others are in the proportion in which they last were, alike
        where they never were in any."""
        known = self._before if len(self._before) == len(self._optimizer.param_groups) and self._before[0] else []
        for group, before in itertools.zip_longest(self._optimizer.param_groups, known):
            set_group_lr(group, lr if before is None else lr * (before / known[0]))

    def state_dict(self) -> dict[str, Any]:
        return {"before": list(self._before)} if self._before else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = [float(rate) for rate in state.get("before", ())]


class ScheduledLearningRate:
    """A Scheduler applied to the base rates that the groups have when it is bound."""

    def __init__(self, optimizer: Optimizer, schedule: Scheduler) -> None:
        self.interval, self.schedule = schedule.interval, schedule
        self.monitor = schedule.monitor
        """What must be logged; None where nothing need be."""
        self._optimizer = optimizer  # not its groups: loading a state makes new ones
        self._bases = _own_rates(optimizer)
        self._counts = schedule.interval in ("step", "epoch")
        self._t: float | None = None
        """Where `_rates` are of; None where they are of nowhere on the schedule."""
        self._rates: list[float] = []
        self._held: dict[str, Any] = {}
        """What was loaded of the rates, until there is an update."""
        self._observes = type(schedule).observe is not Scheduler.observe

    def before_update(self, step: int, epoch: int, samples: int = 0, seconds: float = 0.0) -> None:
        interval = self.interval
        t = (
            step
            if interval == "step"
            else epoch
            if interval == "epoch"
            else samples
            if interval == "samples"
            else seconds
        )
        if t != self._t:
            self._rates = _asked(self.schedule, self._next, t)
            _refuse_odd(self.schedule, self._rates)
            self._t, self._held = t, {}
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            set_group_lr(group, rate)

    def _next(self, t: float) -> list[float]:
        """The rates at `t`: from those of the count before where they are known, as torch does it."""
        schedule, bases, warmup = self.schedule, self._bases, self.schedule.warmup
        counted = self._counts and (t == 0 or (self._t is not None and t == self._t + 1))
        if t < warmup:
            if not counted:
                return [schedule.risen(base, t) for base in bases]
            before = self._rates if t else bases
            return [schedule.rising(rate, base, t) for rate, base in zip(before, bases, strict=True)]
        since = t - warmup
        if not counted or (warmup and since == 0):
            return [schedule.lr(base, since) for base in bases]
        before = self._rates if t else bases
        return [schedule.following(rate, base, int(since)) for rate, base in zip(before, bases, strict=True)]

    def after_update(self) -> None:
        pass

    def after_epoch(self, metrics: Mapping[str, float], *, validated: bool = True) -> None:
        if not self._observes:
            return
        if self.monitor is None or _observable(self.monitor, metrics, validated=validated):
            _asked(self.schedule, self.schedule.observe, metrics)
            self._t = None  # what it has learned counts from the next update on

    def scale(self, factor: float) -> None:
        self._bases = [base * factor for base in self._bases]
        self._t, self._held = None, {}
        _scale_groups(self._optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        rates = self._held or {"t": self._t, "rates": list(self._rates), "form": self._form()}
        return {"bases": list(self._bases), **rates, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._bases = [float(base) for base in state["bases"]]
        self.schedule.load_state_dict(copy.deepcopy(state["schedule"]))
        self._held = {key: state[key] for key in ("t", "rates", "form")}
        if state["form"] == self._form():
            self._t, self._rates = state["t"], [float(rate) for rate in state["rates"]]
        else:  # a longer run, say: the new schedule, wherever the old one stood
            self._t, self._rates = None, []

    def _form(self) -> dict[str, Any]:
        """What the rates of this schedule depend on, as far as it is plain."""
        plain = {key: value for key, value in vars(self.schedule).items() if not key.startswith("_")}
        if not self.schedule.needs_total:
            plain.pop("total", None)
        return {key: value for key, value in plain.items() if type(value) in (bool, int, float, str)}


class TorchLearningRate:
    """A torch scheduler, stepped after each update or each epoch, from the end of the warm-up on.

    Some of torch's go on from the groups' rates, some from rates that they keep, and some have others within. Where the
    rates are scaled, each of them is stepped among rates of its own, of which the groups then have a multiple.
    """

    def __init__(
        self, optimizer: Optimizer, scheduler: LRScheduler, *, interval: str, monitor: str | None, warmup: int = 0
    ) -> None:
        self.interval, self.scheduler = interval, scheduler
        self.monitor = (monitor or "val_loss") if isinstance(scheduler, ReduceLROnPlateau) else None
        """What must be logged; None where nothing need be."""
        self._optimizer = optimizer
        self._warmup, self._done = Scheduler(interval=interval, warmup=warmup), 0
        self._firsts = _rates(optimizer)
        """The rates with which the scheduler itself begins."""
        self._factor = 1.0
        """What `scale` has made of its rates."""
        self._own: list[float] = []
        """Its rates before they are multiplied, as it last set them."""
        if warmup:
            self._rise()

    def _rise(self) -> None:
        """The rates of the warm-up, or the scheduler's first ones after it."""
        warmup, done = self._warmup, self._done
        for group, first in zip(self._optimizer.param_groups, self._firsts, strict=False):
            rate = warmup.rising(float(group["lr"]), first, done) if done < warmup.warmup else first
            set_group_lr(group, rate)

    def before_update(self, step: int, epoch: int, samples: int = 0, seconds: float = 0.0) -> None:
        rates = [group["lr"] for group in self._optimizer.param_groups]
        _refuse_odd(self.scheduler, (rate for rate in rates if not isinstance(rate, Tensor)))  # else it would wait

    def after_update(self) -> None:
        if self.interval == "step":
            self._advance()

    def _advance(self, *value: float) -> None:
        if self._factor == 1.0:
            return self._go_on(*value)
        for group, rate in zip(self._optimizer.param_groups, self._unscaled(), strict=True):
            set_group_lr(group, rate)
        self._go_on(*value)
        return self._take(_rates(self._optimizer))

    def _unscaled(self) -> list[float]:
        """Its own rates; by what somebody else has made of the groups' where these are others."""
        factor, rates = self._factor, _rates(self._optimizer)
        known = [*self._own, *[math.nan] * len(rates)]
        return [
            own if not factor or math.isclose(rate, own * factor, rel_tol=1e-6) else rate / factor
            for rate, own in zip(rates, known, strict=False)
        ]

    def _take(self, own: list[float]) -> None:
        """Give the groups what comes of its own rates."""
        self._own = own
        for group, rate in zip(self._optimizer.param_groups, own, strict=True):
            set_group_lr(group, rate * self._factor)

    def _go_on(self, *value: float) -> None:
        if self._done < self._warmup.warmup:
            self._done += 1
            self._rise()
        else:
            _asked(self.scheduler, self.scheduler.step, *value)

    def after_epoch(self, metrics: Mapping[str, float], *, validated: bool = True) -> None:
        if self.interval != "epoch":
            return
        if self.monitor is None:
            self._advance()
        elif _observable(self.monitor, metrics, validated=validated):
            self._advance(metrics[self.monitor])

    def scale(self, factor: float) -> None:
        own = _rates(self._optimizer) if self._factor == 1.0 else self._unscaled()
        self._factor *= factor
        self._take(own)

    def state_dict(self) -> dict[str, Any]:
        scaled = {"factor": self._factor, "own": list(self._own)}
        own = {"scheduler": dict(self.scheduler.state_dict()), "done": self._done, "firsts": list(self._firsts)}
        return own if self._factor == 1.0 else own | scaled

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))  # torch's CyclicLR takes it apart
        self._done, self._firsts = int(state["done"]), [float(first) for first in state["firsts"]]
        self._factor, self._own = float(state.get("factor", 1.0)), [float(own) for own in state.get("own", ())]
