"""What a fit can be told, checked when it is told; its law: a value that cannot work is named with what it must be."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from streamtrain.errors import ConfigError
from streamtrain.freezing import Rule
from streamtrain.schedulers import parse_span
from streamtrain.spelling import precision_meant

PRECISIONS = ("32", "bf16", "16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How every fit of one trainer goes."""

    step: Callable[..., Any] | None
    precision: str
    accumulate: int
    """Batches of one update."""
    clip_norm: float | None
    clip_value: float | None
    device: torch.device
    device_transform: Callable[..., Any] | None
    seed: int | None
    deterministic: bool
    skip: bool
    """Updates that are not finite are left out rather than an error."""
    rollback: bool
    """After one that is not finite the run goes back to weights of a while ago."""
    log_every: int
    validate_every: tuple[int, str]
    dev: int
    """Batches of a `fast_dev_run`; 0 for none."""
    limit: int | float | None
    """Batches of an epoch, or a share of them."""
    overfit: int | None
    sanity: int
    ema: float | None
    """The decay of the weights' moving average."""
    freeze: tuple[Rule, ...]
    """Which parameters are not trained, or not yet."""
    compile: Mapping[str, Any] | None
    """Keywords of `torch.compile`; None: not compiled."""
    recompute: str | bool
    """Blocks of the model whose activations are not kept: a regex of their names, True for the usual ones."""
    grace: float
    watchdog: float
    """Seconds until what does not come back is named; 0: never."""
    config: Mapping[str, Any]

    def batches(self, known: int | None) -> int | None:
        """The most batches of a stream that are used, of which `known` are there; None for all."""
        if self.dev:
            return self.dev
        if self.overfit is not None:
            return self.overfit
        if isinstance(self.limit, float):
            if known is None:
                raise ConfigError(
                    f"limit_batches={self.limit} is a share of a stream whose length nobody knows",
                    hint="Give a number of batches.",
                )
            return max(1, int(self.limit * known))
        return self.limit


@dataclass(frozen=True, slots=True)
class Limits:
    """When a fit is over; totals over the run's life."""

    max_epochs: int | None = None
    max_steps: int | None = None
    max_time: float | None = None

    @property
    def none(self) -> bool:
        """Whether nothing is limited."""
        return self.max_epochs is self.max_steps is self.max_time is None


def count(value: object, name: str, *, least: int = 1) -> int:
    """`value` as an integer of at least `least`; numpy's integers are some too."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r}")
    return int(value)


def seeding(value: object) -> int | None:
    """`value` as what torch's and numpy's generators take, or None."""
    if value is None:
        return None
    if isinstance(value, Integral) and int(value) >= 1 << 63:
        raise ConfigError(f"seed must be below 2^63, not {value!r}")
    return count(value, "seed", least=0)


def rehearsed(value: object) -> int:
    """The batches of a `fast_dev_run`: one where it is just True, 0 where it is False."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, Integral):
        return count(value, "fast_dev_run")
    raise ConfigError(f"fast_dev_run must be true, false or a number of batches, not {value!r}")


def function(value: object, name: str) -> Callable[..., Any] | None:
    """`value` as a function, or None."""
    if value is None or callable(value):
        return value
    raise ConfigError(f"{name} must be a function, not {value!r:.80}")


def place(value: object, name: str) -> Path | None:
    """`value` as the absolute path of a folder or a file, or None."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{name} must be a path, not {value!r:.80}")
    path = os.fsdecode(value)
    if path.partition("/")[0] == "~":
        raise ConfigError(
            f"{name} must be a path, not {path!r:.80}: what ~ stands for only a shell puts there",
            hint="Give os.path.expanduser(path), or the whole path.",
        )
    if "\0" in path:
        raise ConfigError(f"{name} must be a path, not {path!r:.80}")
    return Path(os.path.abspath(path))


def number(value: Any, name: str) -> float:
    """`value`, or the one that a tensor or an array holds, as a float."""
    try:
        if not isinstance(value, str):
            return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch raises RuntimeError for several values
        pass
    raise ConfigError(f"{name} must be one number, not {value!r:.80}", hint="Log texts with logging, means of tensors.")


def finite(value: object, name: str) -> float:
    """`value` as a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} must be a finite number of at least 0, not {value!r}")
    return float(value)


def flag(value: object, name: str) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {value!r}")
    return value


def monitored(value: object, name: str) -> str:
    """`value` as the name of something that is logged."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be the name of a metric such as 'val_loss', not {value!r}")
    return value


def positive(value: object, name: str) -> float | None:
    """`value` as a finite number above 0, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} must be a finite number above 0, not {value!r}")
    return float(value)


def flag_or_regex(value: object, name: str) -> str | bool:
    """`value` if it is True, False or a text; False of None."""
    if value is None or isinstance(value, bool | str):
        return value or False
    raise ConfigError(f"{name} must be true, false or a regex of names, not {value!r}")


def inner_share(value: object, name: str) -> float | None:
    """`value` as a number above 0 and below 1, or None."""
    if value is None or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ConfigError(f"{name} must be a number above 0 and below 1, such as 0.999, not {value!r}")


def seconds(value: object, name: str) -> float:
    """`value` as a finite number of seconds of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} must be a finite number of seconds of at least 0, not {value!r}")
    return float(value)


def at_least(value: object, least: float, name: str) -> float:
    """`value` as a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise ConfigError(f"{name} must be a finite number of at least {least:g}, not {value!r}")
    return float(value)


def one_of(value: object, known: Collection[str], name: str) -> str:
    """`value` if it is one of these texts."""
    text = str(value) if isinstance(value, str | int) else ""
    if text not in known:
        raise ConfigError(f"{name} must be {', '.join(map(repr, known))}, not {value!r}")
    return text


def computed_in(value: object) -> str:
    """`value` as the precision of the computation, by its name or the number of its bits."""
    text = str(value) if isinstance(value, str | int) else ""
    if text not in PRECISIONS:
        raise ConfigError(f"precision must be '32', 'bf16' or '16', not {value!r:.80}", hint=precision_meant(value))
    return text


def share_or_count(value: object, name: str) -> int | float | None:
    """`value` as a number of at least 1 (int), or a share above 0.0 and up to 1.0 (float)."""
    if value is None or (type(value) is int and value >= 1):
        return value
    if type(value) is float and 0 < value <= 1:
        return value
    raise ConfigError(f"{name} must be a number of at least 1, or a share above 0.0 and up to 1.0, not {value!r}")


def every(value: Any, name: str) -> tuple[int, str]:
    """`value`, such as "1epoch" or "500steps", as a number and its unit."""
    told = ConfigError(f"{name} must be like '500steps' or '1epoch', not {value!r:.80}", hint=_EVERY)
    amount, unit = _span(value, name, told)
    if unit == "second" or amount < 1:
        raise told
    return int(amount), unit


_EVERY = "Whole numbers, in steps (updates) or epochs; a bare number is of steps."


def _span(value: Any, name: str, told: ConfigError, *, bare: str = "step") -> tuple[float, str]:
    try:
        return parse_span(value, name, bare=bare)
    except ConfigError:
        raise told from None


def duration(value: Any, name: str) -> float:
    """`value`, such as "2h" or 90 (seconds), in seconds."""
    told = ConfigError(
        f"{name} must be a time above 0, such as '2h' or 90 (seconds), not {value!r:.80}",
        hint="The units are s, sec, second, m, min, minute, h and hour.",
    )
    amount, unit = _span(value, name, told, bare="second")
    if unit != "second" or amount <= 0 or not math.isfinite(amount):
        raise told
    return amount


def table(value: object, name: str) -> Mapping[str, Any]:
    """`value` as a dict; None is an empty one."""
    if value is None or isinstance(value, Mapping):
        return value or {}
    raise ConfigError(f"{name} must be a dict, not {value!r:.80}")


def refuse_later(**given: Any) -> None:
    """Raise ConfigError for what is not built yet."""
    for name, value in given.items():
        if value not in (None, False, "auto"):
            raise ConfigError(f"{name}={value!r}: this comes later", hint=f"Leave {name} out.")


def refuse_world_size() -> None:
    """Raise ConfigError in a process that was launched as one of several."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdigit() and int(size) > 1:
        raise ConfigError(
            f"WORLD_SIZE is {size}: training on several processes is not supported yet",
            hint="Start one process, without torchrun.",
        )
