"""In what a checkpoint is another run's than this one: settings, rates, models, in words.

Its law: what must not change is refused with all that differs, saved and now. A learning rate may.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

import streamtrain
from streamtrain.errors import CheckpointError
from streamtrain.optimizer_state import names_of, signature
from streamtrain.schedulers import LearningRate, get_lr, set_group_lr

logger = logging.getLogger(__name__)


def refuse(told: list[str], path: Path) -> None:
    """Raise CheckpointError if there are differences."""
    if told:
        more = f"; and {len(told) - 12} more" if len(told) > 12 else ""
        hint = "Set these back, or train in another run_dir."
        if all(each.startswith("scheduler:") for each in told):
            hint = "Set it back; or await load_checkpoint(path), and fit without resume: there another one takes over."
        raise CheckpointError(f"checkpoint {path} does not fit (saved -> now): {'; '.join(told[:12])}{more}", hint=hint)


def settings(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What of an optimizer must not change between two lives of a run; to be asked before its first update."""
    return {"optimizer": {**signature(optimizer), "names": [sorted(names) for names in names_of(optimizer, model)]}}


def schedule_name(lr: LearningRate) -> str:
    """What a schedule is called, to be compared between two lives."""
    schedule = getattr(lr, "schedule", None) or getattr(lr, "scheduler", None)
    return str(getattr(schedule, "name", type(schedule).__name__))


def rate_change(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[float, list[str]]:
    """By what the learning rate is another, 1 for the same, and all other differences: those of the groups' rates too
    where they are in no one proportion."""
    pairs = [
        (one.get("lr"), other.get("lr"))
        for one, other in zip(
            (saved.get("optimizer") or {}).get("groups", ()), now["optimizer"]["groups"], strict=False
        )
    ]
    known = all(isinstance(rate, int | float) for pair in pairs for rate in pair)
    moved = [(old, new) for old, new in pairs if old or new] if known else []
    factors = [new / old if old else 0.0 for old, new in moved]
    first = factors[0] if factors else 0.0
    if not first or not all(math.isclose(each, first) for each in factors):
        return 1.0, list(differences(saved, dict(now)))
    return first, list(differences(_without_rates(saved), _without_rates(now)))


def _without_rates(settings: Mapping[str, Any]) -> dict[str, Any]:
    optimizer = settings["optimizer"]
    groups = [{key: value for key, value in group.items() if key != "lr"} for group in optimizer["groups"]]
    return {**settings, "optimizer": {**optimizer, "groups": groups}}


def habits(device: torch.device, **given: Any) -> dict[str, Any]:
    """What may change between two lives, but is said."""
    return {
        "device": _named(device),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "streamtrain": streamtrain.__version__,
        **given,
    }


def _named(device: torch.device) -> str:
    """With the number and the make of a GPU: another make rounds otherwise, another number has another generator."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def other_rate(optimizer: Optimizer, lr: LearningRate, settings: Mapping[str, Any], factor: float) -> None:
    """The learning rate is another from here on, in proportion to what the schedule has made of it; `settings`: with
    the rates of now."""
    before = get_lr(optimizer)
    lr.scale(factor)
    for group, now in zip(optimizer.param_groups, settings["optimizer"]["groups"], strict=True):
        if math.isclose(float(group["lr"]), now["lr"], rel_tol=1e-12):
            set_group_lr(group, now["lr"])  # without the last bit of a product
    logger.info("the learning rate is another: %g -> %g", before, get_lr(optimizer))


def check_weights(saved: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    """Raise CheckpointError with a table of the differences if these are of another model, as far as its sizes are
    known."""
    refuse(list(model_differences(saved, model)), path)


def differences(saved: Any, now: Any, path: str = "") -> Iterator[str]:
    """`path: saved -> now` of each leaf that differs."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys(), key=str):
            yield from differences(saved.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(saved, list | tuple) and isinstance(now, list | tuple) and len(saved) == len(now):
        for number, (one, other) in enumerate(zip(saved, now, strict=True)):
            yield from differences(one, other, f"{path}[{number}]")
    elif saved != now:
        yield f"{path}: {saved!r:.60} -> {now!r:.60}"


def model_differences(saved: Mapping[str, Any], model: nn.Module) -> Iterator[str]:
    """The same of the names, dtypes and shapes of a model's weights."""
    live = model.state_dict()
    for name in [*live, *(name for name in saved if name not in live)]:
        if name not in live:
            yield f"model.{name}: {_shape(saved[name])} -> not there"
        elif name not in saved:
            yield f"model.{name}: not there -> {_shape(live[name])}"
        elif not is_lazy(live[name]) and _shape(saved[name]) != _shape(live[name]):
            yield f"model.{name}: {_shape(saved[name])} -> {_shape(live[name])}"


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
