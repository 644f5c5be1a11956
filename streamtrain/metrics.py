"""Metrics: sums that are exact in any order of batches, and one shape for whatever the user brings.

The law: a metric keeps sums and counts, never means, so that batches of different sizes and merged parts weigh
by their samples. `update` runs on the train thread and leaves its sums on the outputs' device; only `compute`
makes a Python float.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from streamtrain.errors import ConfigError

_RISING = ("acc", "auc", "f1", "precision", "recall", "r2", "iou", "dice")
_FALLING = ("loss", "err")


def direction(name: str, mode: str = "auto") -> str:
    """`"min"` or `"max"`: which way of the metric `name` is better.

    `"auto"`: max for names with a part that begins with acc, auc, f1, precision, recall, r2, iou or dice, unless
    another part is a loss or an error; else min. Raises ConfigError for any other mode.
    """
    if mode in ("min", "max"):
        return mode
    if mode != "auto":
        raise ConfigError(f"mode={mode!r}: expected 'min', 'max' or 'auto'", hint="max where more is better")
    parts = re.split(r"[^a-z0-9]+", name.lower())
    rises = any(part.startswith(_RISING) for part in parts) and not any(part.startswith(_FALLING) for part in parts)
    return "max" if rises else "min"


def no_such_monitor(who: str, monitor: str, metrics: Iterable[str]) -> ConfigError:
    """The error for a monitor that nothing logs: lists what is logged, the nearest name first in the hint."""
    logged = sorted(metrics)
    near = difflib.get_close_matches(monitor, logged, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "name one of these, or add the metric to metrics="
    return ConfigError(f"{who}: nothing logs {monitor!r}; logged: {', '.join(logged) or 'nothing'}", hint=hint)


@runtime_checkable
class Metric(Protocol):
    """What the trainer needs of a metric."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in one batch: the model's outputs and the batch's targets (its inputs where there are none)."""

    def compute(self) -> float:
        """The value over all that was taken in since the last reset; nan over nothing."""

    def reset(self) -> None:
        """Forget everything."""

    def merge(self, other: Self) -> None:
        """Take in what another metric of this kind has; exact."""

    def state_dict(self) -> dict[str, Any]:
        """The sums, to go on with later."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Mean:
    """A mean weighted by counts: the base of the others, and a metric for values that are already per-sample losses.

    As a metric of its own it averages `outputs` over all their elements and ignores `targets`.
    """

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._count: int = 0

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Add every element of `outputs` (any shape, any real dtype)."""
        self.add(outputs.detach().sum(dtype=torch.float64), outputs.numel())

    def add(self, total: Tensor | float, count: int) -> None:
        """Add a sum over `count` things; a tensor (0-d) stays on its device."""
        self._total = self._total + (total.double() if isinstance(total, Tensor) else total)
        self._count += count

    def compute(self) -> float:
        """Sum over count; nan over nothing."""
        return float(self._total) / self._count if self._count else math.nan

    def reset(self) -> None:
        """Forget everything."""
        self._total, self._count = 0.0, 0

    def merge(self, other: Mean) -> None:
        """Add the other's sum and count."""
        self.add(other._total, other._count)

    def state_dict(self) -> dict[str, Any]:
        """`{"total": float, "count": int}`."""
        return {"total": float(self._total), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._total, self._count = float(state["total"]), int(state["count"])


class Accuracy(Mean):
    """The share of right answers, from 0 to 1.

    Outputs (B, C) with C > 1 are scores of C classes and targets (B,) integer classes; outputs (B, C, *) with
    targets (B, *) count every position. Outputs (B,) or (B, 1) are logits of a yes (over 0 is yes) and targets,
    of as many elements, 0 or 1. Integer or boolean outputs are answers and are compared as they are.
    """

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Count the right answers of one batch; ConfigError where the shapes do not fit together."""
        if not isinstance(targets, Tensor):
            raise ConfigError("Accuracy needs targets", hint="give the stream targets=, or use another metric")
        outputs = outputs.detach()
        if not outputs.is_floating_point() and outputs.shape == targets.shape:
            answers = outputs
        elif outputs.ndim >= 2 and outputs.shape[1] > 1 and outputs.shape[:1] + outputs.shape[2:] == targets.shape:
            answers = outputs.argmax(dim=1)
        elif outputs.numel() == targets.numel() and outputs.shape[:1] == targets.shape[:1]:
            answers, targets = (outputs > 0).reshape(-1), targets.reshape(-1)
        else:
            raise ConfigError(
                f"Accuracy: outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}",
                hint="expected (B, C) scores and (B,) classes, or (B,) or (B, 1) logits and as many targets of 0 or 1",
            )
        self.add((answers == targets).sum(), answers.numel())


class _ElementError(Mean):
    """A mean over elements of an error between outputs and targets of the same number of elements."""

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Add the errors of one batch; ConfigError where outputs and targets cannot be matched element by element."""
        if not isinstance(targets, Tensor):
            raise ConfigError(f"{type(self).__name__} needs targets", hint="give the stream targets=")
        outputs = outputs.detach()
        if outputs.shape != targets.shape:
            if outputs.shape[:1] != targets.shape[:1] or outputs.numel() != targets.numel():
                raise ConfigError(
                    f"{type(self).__name__}: outputs of shape {tuple(outputs.shape)} and targets of shape "
                    f"{tuple(targets.shape)}",
                    hint="they must have the same shape; broadcasting them would average over wrong pairs",
                )
            outputs, targets = outputs.reshape(-1), targets.reshape(-1)
        # Promoted first: unsigned or half-precision differences would wrap or round.
        difference = outputs.double() - targets.double()
        self.add(self._error(difference).sum(), difference.numel())

    @staticmethod
    def _error(difference: Tensor) -> Tensor:
        raise NotImplementedError


class MeanAbsoluteError(_ElementError):
    """Mean of |output - target| over all elements; outputs (B, 1) and targets (B,) are matched."""

    @staticmethod
    def _error(difference: Tensor) -> Tensor:
        return difference.abs()


class MeanSquaredError(_ElementError):
    """Mean of (output - target)^2 over all elements; outputs (B, 1) and targets (B,) are matched."""

    @staticmethod
    def _error(difference: Tensor) -> Tensor:
        return difference.square()


class FunctionMetric(Mean):
    """A function `(outputs, targets) -> number, or tensor of one value or of one a sample`, averaged over samples.

    One value counts as the mean of its batch and weighs by the batch's samples; a tensor whose first dimension is
    the batch's is averaged over all its elements.
    """

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.function = function

    def update(self, outputs: Any, targets: object = None) -> None:
        """Call the function with one batch and add what it returned."""
        value = self.function(outputs, targets)
        samples = _samples(targets if isinstance(targets, Tensor) else outputs)
        if isinstance(value, Tensor):
            value = value.detach()
            self.add(value.double().mean() * samples, samples)
        else:
            self.add(float(value) * samples, samples)


class _Torchmetric:
    """A torchmetrics object in our shape."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        # States live in checkpoints only where they are persistent, and torchmetrics' are not by default.
        metric.persistent(True)

    def update(self, outputs: Any, targets: Any) -> None:
        if isinstance(outputs, Tensor) and getattr(self.metric, "device", outputs.device) != outputs.device:
            self.metric.to(outputs.device)
        self.metric.update(outputs, targets)

    def compute(self) -> float:
        return float(self.metric.compute())

    def reset(self) -> None:
        self.metric.reset()

    def merge(self, other: _Torchmetric) -> None:
        self.metric.merge_state(other.metric)

    def state_dict(self) -> dict[str, Any]:
        return {"update_count": self.metric.update_count, "states": dict(self.metric.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metric.load_state_dict(state["states"])
        self.metric._update_count = int(state["update_count"])


def as_metric(x: object) -> Metric:
    """What the user brought as a metric of ours.

    A metric object is used as it is; a class of metrics is made into one; a torchmetrics object is wrapped; a
    function `(outputs, targets) -> value` is averaged over samples. Anything else raises ConfigError.
    """
    if inspect.isclass(x):
        try:
            x = x()
        except TypeError as error:
            raise ConfigError(f"metric {x!r}: {error}", hint="give an object of it, not the class") from error
    if hasattr(x, "merge_state") and hasattr(x, "persistent"):
        return _Torchmetric(x)
    if isinstance(x, Metric):
        return x
    has = [
        name for name in ("update", "compute", "reset", "merge", "state_dict", "load_state_dict") if hasattr(x, name)
    ]
    if callable(x) and "update" not in has:
        return FunctionMetric(x)
    raise ConfigError(
        f"metric {x!r} is neither a function nor a metric (it has {', '.join(has) or 'none of the methods'})",
        hint="expected f(outputs, targets), or update, compute, reset, merge, state_dict and load_state_dict",
    )


def _samples(x: object) -> int:
    """Number of samples in a tensor, or in the first of a dict or list of them; 1 where there is none to count."""
    while isinstance(x, dict | list | tuple) and x:
        x = next(iter(x.values())) if isinstance(x, dict) else x[0]
    return len(x) if isinstance(x, Tensor) and x.ndim else 1
