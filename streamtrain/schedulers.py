"""Schedules by name, object, class, function or torch scheduler, checked and bound to an optimizer.

    constant                                                      the optimizer's own rate
    step multistep exponential                                    times gamma, now and then
    cosine linear polynomial wsd onecycle                         down by the end of the run
    cosine_restarts cyclic inverse_sqrt                           without an end
    plateau                                                       down when the monitor no longer improves

Its law: a key that a schedule does not know, and a value that it can't use, are refused before training.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from streamtrain.dotted import found_at, is_path
from streamtrain.errors import ConfigError
from streamtrain.learning_rate import (
    FixedLearningRate,
    LearningRate,
    ScheduledLearningRate,
    TorchLearningRate,
    get_lr,
    set_group_lr,
)
from streamtrain.schedules import NAMED, FunctionOf, Scheduler

__all__ = [
    "FixedLearningRate",
    "LearningRate",
    "ScheduledLearningRate",
    "Scheduler",
    "SchedulerSpec",
    "TorchLearningRate",
    "build_scheduler",
    "get_lr",
    "parse_span",
    "set_group_lr",
]

UNIT_OF = {"step": "step", "epoch": "epoch", "samples": "sample", "time": "second"}
"""What an interval counts in."""
_SPAN = re.compile(
    r"\s*(\d+(?:\.\d+)?)\s*(?:(step|epoch|sample|sec|second|min|minute|hour)s?|([smh]))\s*", re.IGNORECASE
)
_SECONDS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
UNITS = "The units are step, epoch, s, sec, second, m, min, minute, h and hour; words with or without an s behind them."

SchedulerSpec = Any
"""None, a name, a dict with a name, a Scheduler, a function of progress, or a callable from optimizer to scheduler."""


def parse_span(text: str | float, what: str, *, bare: str = "step", samples: bool = False) -> tuple[float, str]:
    """Read "500steps", "1epoch" or "10min" as (500, "step"), (1, "epoch") or (600, "second"); a number is of `bare`.

    Steps and epochs must be whole and at least 1 (0 is allowed for a bare number). `samples`: whether "1000samples" is
    allowed as well. Raises ConfigError naming `what`.
    """
    if isinstance(text, str):
        match = _SPAN.fullmatch(text)
        unit = "" if match is None else (match[2] or match[3]).lower()
        if match is None or (unit == "sample" and not samples):
            raise ConfigError(f"{what} must be like '500steps', '1epoch' or '10min', not {text!r}", hint=UNITS)
        amount = float(match[1])
        if unit in _SECONDS:
            return amount * _SECONDS[unit], "second"
    elif type(text) in (int, float):
        amount, unit = float(text), bare
    else:
        raise ConfigError(f"{what} must be like '500steps' or '1epoch', not {text!r}", hint=UNITS)
    if unit != "second" and (not amount.is_integer() or amount < 0 or (isinstance(text, str) and amount < 1)):
        raise ConfigError(f"{what} must be a whole number of {unit}s, at least 1, not {text!r}")
    return amount, unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """How long the run is, as far as that is known: in each interval's unit, and of an epoch."""

    totals: Mapping[str, float | None]
    epochs: Mapping[str, float | None]

    def span(self, value: Any, key: str, interval: str) -> float:
        """A span in units of the interval."""
        unit = UNIT_OF[interval]
        amount, given = parse_span(value, f"scheduler.{key}", bare=unit, samples=True)
        if given == "epoch" and interval in ("step", "samples") and self.epochs[interval] is not None:
            amount, given = amount * (self.epochs[interval] or 0), unit
        if given != unit:
            raise ConfigError(
                f"scheduler.{key}: {value!r} can't be counted in {unit}s here",
                hint=f"The interval {interval!r} counts in {unit}s.",
            )
        if not math.isfinite(amount) or amount < 0:
            raise ConfigError(f"scheduler.{key} must be a finite number of {unit}s, at least 0, not {value!r}")
        return amount if interval == "time" else int(amount)

    def warmup(self, value: Any, interval: str, total: float | None) -> float:
        """The warm-up in units of the interval: a span, or (but of seconds, which are no whole numbers) a share of
        the run, rounded up as in Hugging Face's `warmup_ratio`."""
        if type(value) is not float or not 0.0 < value < 1.0 or interval == "time":
            return self.span(value, "warmup", interval)
        if total is None:
            raise ConfigError(
                f"scheduler.warmup={value} is a share of a run of unknown length",
                hint=f"Give max_epochs or max_steps, or a number of {UNIT_OF[interval]}s.",
            )
        return math.ceil(value * total)

    def total(self, table: Mapping[str, Any], interval: str) -> float | None:
        """The length of the run, as the table says or as it is known."""
        if "total" not in table:
            return self.totals[interval]
        value, unit = table["total"], UNIT_OF[interval]
        if isinstance(value, str) and _SPAN.fullmatch(value):
            value = self.span(value, "total", interval)
        whole = type(value) is int or (interval == "time" and type(value) is float and math.isfinite(value))
        if not whole or value < 1:
            raise ConfigError(f"scheduler.total must be a number of {unit}s of at least 1, not {table['total']!r}")
        return float(value) if interval == "time" else int(value)


def build_scheduler(
    optimizer: Optimizer,
    spec: SchedulerSpec,
    *,
    total_steps: int | None = None,
    total_epochs: int | None = None,
    total_samples: int | None = None,
    total_seconds: float | None = None,
    steps_per_epoch: int | None = None,
    samples_per_epoch: int | None = None,
) -> LearningRate:
    """Bind a schedule to an optimizer.

    `spec`: None; a name (see the module), a dict such as {"name": "cosine", "warmup": "500steps", "min_lr": 1e-6,
    "interval": "step"} with the fields of the schedule's class as keys; a Scheduler, or its class; a function with
    a parameter named `progress` (0.0 to 1.0 of the run) or `t` (the count), which gives the factor of the rate; or a
    torch scheduler, its class, a path to it ("torch.optim.lr_scheduler.StepLR"), or a callable from optimizer to one.
    All of these may be the dict's "name"; further keys are its keywords. Keys for all: `warmup` (a number, "2epochs",
    or a share of the run, 0.05), `interval` (what is counted: "step", "epoch", "samples" or "time", the last two not
    for torch's) and `total`. Without an interval torch's are stepped after each update, ReduceLROnPlateau (with
    "monitor") after each epoch's validation. All of them count steps, also those whose update was left out because of
    a number that is not finite: the rate of a step is that of its number, on any device (a GPU tells of such an
    update only later).

    Raises ConfigError.
    """
    if spec is None:
        return FixedLearningRate(optimizer)
    table: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name, interval, monitor = table.pop("name", None), table.get("interval"), table.get("monitor")
    if monitor is not None and not (isinstance(monitor, str) and monitor):
        raise ConfigError(f"scheduler.monitor must be the name of a metric such as 'val_loss', not {monitor!r}")
    if interval not in (None, *UNIT_OF):
        raise ConfigError(f"scheduler.interval must be 'step', 'epoch', 'samples' or 'time', not {interval!r}")
    run = _Run(
        totals={"step": total_steps, "epoch": total_epochs, "samples": total_samples, "time": total_seconds},
        epochs={"step": steps_per_epoch, "samples": samples_per_epoch},
    )
    if isinstance(name, str) and is_path(name):
        name = found_at(name, "scheduler")
    if isinstance(name, str) or name is None:
        return ScheduledLearningRate(optimizer, _named(name, table, run))
    if isinstance(name, Scheduler):
        return ScheduledLearningRate(optimizer, _given(copy.copy(name), table, run))
    if isinstance(name, LRScheduler):
        return _torch(optimizer, name, table, run)
    if not callable(name):
        raise ConfigError(f"scheduler: unknown name {name!r}", hint=_nearest("", NAMED))
    if inspect.isclass(name) and issubclass(name, Scheduler):
        return ScheduledLearningRate(optimizer, _of_class(name, table, run))
    return _called(optimizer, name, table, run)


def _called(optimizer: Optimizer, make: Callable[..., Any], table: dict[str, Any], run: _Run) -> LearningRate:
    """What a function of progress comes to, or what a callable makes of the optimizer."""
    parameters = _parameters(make)
    first = next(iter(parameters), "")
    ours: dict[str, Any] = {key: table.pop(key) for key in ("warmup", "interval", "total", "monitor") if key in table}
    open_to_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in table:
        if parameters and key not in parameters and not open_to_all:
            raise ConfigError(
                f"scheduler: unknown key {key!r}", hint=_nearest(str(key), [*list(parameters)[1:], *ours])
            )
    bound = functools.partial(make, **table) if table else make
    if first in ("progress", "t"):
        function = FunctionOf(function=bound, of_progress=first == "progress")
        return ScheduledLearningRate(optimizer, _given(function, ours, run, needs_total=first == "progress"))
    try:
        made = bound(optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler: {_called_name(make)}: {error}",
            hint="Its keywords stand beside its name, {'name': ..., 'step_size': 3}; a function that gives a factor "
            "has a parameter named progress, or t.",
        ) from error
    if isinstance(made, Scheduler):
        return ScheduledLearningRate(optimizer, _given(made, ours, run))
    return _torch(optimizer, made, ours, run)


def _called_name(make: Callable[..., Any]) -> str:
    return str(getattr(make, "__name__", type(make).__name__))


def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(make).parameters
    except (TypeError, ValueError):  # of C
        return {}


def _torch(optimizer: Optimizer, scheduler: object, table: Mapping[str, Any], run: _Run) -> LearningRate:
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(
            f"the scheduler callable gave a {type(scheduler).__name__}, not a torch LRScheduler",
            hint="A function that gives a factor has a parameter named progress, or t.",
        )
    if scheduler.optimizer is not optimizer:
        raise ConfigError("the scheduler belongs to another optimizer", hint="Give a callable: lambda optimizer: ...")
    for key in table:
        if key not in ("warmup", "interval", "monitor"):
            raise ConfigError(
                f"scheduler: unknown key {key!r}", hint="Of a torch scheduler: warmup, interval, monitor."
            )
    interval = table.get("interval")
    if interval in ("samples", "time"):
        raise ConfigError(
            f"torch's schedulers count their steps: interval={interval!r} can't be",
            hint="interval='step' or 'epoch', or a schedule by name.",
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        if interval == "step":
            raise ConfigError("ReduceLROnPlateau can't be stepped after each update", hint="interval='epoch'")
        interval = "epoch"
    interval = interval or "step"
    warmup = int(run.warmup(table.get("warmup", 0), interval, run.totals[interval]))
    return TorchLearningRate(optimizer, scheduler, interval=interval, monitor=table.get("monitor"), warmup=warmup)


def _named(name: str | None, table: dict[str, Any], run: _Run) -> Scheduler:
    """One of ours, its values checked."""
    if name is None:
        raise ConfigError(
            "scheduler has no name",
            hint="Give {'name': 'cosine', ...}; of several optimizers it moves all rates together.",
        )
    plain = name.lower().replace("-", "_")
    if plain not in NAMED:
        raise ConfigError(f"scheduler: unknown name {name!r}", hint=_nearest(name, NAMED))
    kind = NAMED[plain]
    known = [field.name for field in dataclasses.fields(kind)]
    if kind.monitor is None:
        known.remove("monitor")
        if "monitor" in table:
            raise ConfigError(f"scheduler.monitor is for ReduceLROnPlateau and 'plateau', not for {name!r}")
    for key in table:
        if key not in known:
            raise ConfigError(f"scheduler: unknown key {key!r}", hint=_nearest(str(key), ["name", *known]))
    interval = table.get("interval") or "step"
    values = {key: _value(plain, key, value, interval, run) for key, value in table.items() if key not in _COMMON}
    if plain == "multistep" and "milestones" not in values:
        raise ConfigError("scheduler.milestones is missing", hint="For instance [1000, 2000], or ['10epochs'].")
    if plain == "cosine_restarts" and "period" not in values:
        raise ConfigError("scheduler.period is missing", hint="How long the first cosine is, such as '10epochs'.")
    return _given(kind(**values), table, run)


_COMMON = ("warmup", "interval", "total")


def _of_class(kind: type[Scheduler], table: dict[str, Any], run: _Run) -> Scheduler:
    """One of the user's, its keywords checked against its signature."""
    known = _parameters(kind)
    own = {key: value for key, value in table.items() if key not in _COMMON or key in known}
    for key in own:
        if key not in known and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            raise ConfigError(f"scheduler: unknown key {key!r}", hint=_nearest(str(key), [*known, *_COMMON]))
    try:
        made = kind(**{key: value for key, value in own.items() if key not in _COMMON})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler: {kind.__name__}: {error}") from error
    return _given(made, table, run)


def _given(schedule: Scheduler, table: Mapping[str, Any], run: _Run, *, needs_total: bool = False) -> Scheduler:
    """The same with what is said of it, and of the run, put in."""
    name = getattr(schedule, "name", type(schedule).__name__)
    interval = schedule.interval = table.get("interval") or schedule.interval
    if interval not in UNIT_OF:
        raise ConfigError(f"scheduler.interval must be 'step', 'epoch', 'samples' or 'time', not {interval!r}")
    if table.get("monitor") is not None:
        schedule.monitor = table["monitor"]
    given = {"total": schedule.total} if schedule.total is not None and "total" not in table else table
    schedule.total = run.total(given, interval)
    schedule.warmup = run.warmup(table.get("warmup", schedule.warmup), interval, schedule.total)
    if schedule.total is None and (schedule.needs_total or needs_total):
        limit = {
            "step": "max_steps",
            "epoch": "max_epochs",
            "samples": "max_epochs (and no limit of batches)",
            "time": "max_time",
        }[interval]
        raise ConfigError(
            f"the {name} schedule needs to know how long the run is",
            hint=f"Give {limit}, or scheduler={{..., 'total': number of {UNIT_OF[interval]}s}}.",
        )
    return schedule


_SPANS = ("step_size", "period", "step_size_up", "step_size_down", "timescale")
_CHOICES = {
    ("cyclic", "mode"): ("triangular", "triangular2", "exp_range"),
    ("plateau", "mode"): ("auto", "min", "max"),
    ("plateau", "threshold_mode"): ("rel", "abs"),
    ("onecycle", "anneal"): ("cos", "linear"),
    ("wsd", "shape"): ("linear", "cosine", "sqrt"),
}
_COUNTS = {"patience": 0, "cooldown": 0, "period_factor": 1}
_ABOVE_ZERO = ("div_factor", "final_div_factor")


def _value(name: str, key: str, value: Any, interval: str, run: _Run) -> Any:
    """A value of one of our schedules. Raises ConfigError."""
    where = f"scheduler.{key}"
    if key == "monitor":
        return value
    if key in _SPANS:
        span = run.span(value, key, interval)
        if span <= 0:
            raise ConfigError(f"{where} must be at least 1, not {value!r}")
        return span
    if key == "milestones":
        if not isinstance(value, list | tuple) or not value:
            raise ConfigError(f"{where} must be a list such as [1000, 2000] or ['10epochs'], not {value!r}")
        return tuple(run.span(one, f"milestones[{number}]", interval) for number, one in enumerate(value))
    if (choices := _CHOICES.get((name, key))) is not None:
        if value not in choices:
            raise ConfigError(f"{where} must be {', '.join(map(repr, choices))}, not {value!r}")
        return value
    if key in _COUNTS:
        if type(value) is not int or value < _COUNTS[key]:
            raise ConfigError(f"{where} must be a whole number of at least {_COUNTS[key]}, not {value!r}")
        return value
    if key == "three_phase":
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, not {value!r}")
        return value
    if key == "decay" and (isinstance(value, str) or (_is_number(value) and value >= 1)):
        return run.span(value, key, interval)
    number = _number(value, key)
    if key in _ABOVE_ZERO and not number:
        raise ConfigError(f"{where} must be a finite number above 0, not {value!r}")
    if (key == "pct_start" and number > 1) or (name == "plateau" and key == "factor" and number >= 1):
        raise ConfigError(f"{where} must be below 1, not {value!r}")
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, key: str) -> float:
    if not _is_number(value) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"scheduler.{key} must be a finite number, at least 0, not {value!r}")
    return float(value)


def _nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, known, 1)
    return f"Did you mean {found[0]!r}?" if found else f"Known: {', '.join(known)}."
