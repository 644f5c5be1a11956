"""Means: sums and counts, from which only the end makes a mean.

The law: a metric keeps sums and counts, never means, so that batches of different sizes and merged parts weigh by
their samples. An update asks nothing of the device: what it adds up stays there until `compute`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streamtrain.errors import ConfigError


class Mean:
    """A mean weighted by counts: the base of the others, and a metric for values that are already per-sample losses.

    As a metric of its own it averages `outputs` over all their elements and ignores `targets`.
    """

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._count: Tensor | int = 0

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Add every element of `outputs` (any shape, any real dtype); ConfigError for complex ones."""
        _real(outputs)
        self.add(outputs.detach().sum(dtype=torch.float64), outputs.numel())

    def add(self, total: Tensor | float, count: Tensor | int) -> None:
        """Add a sum over `count` things; tensors (0-d) stay on their device."""
        self._total = self._total + (total.double() if isinstance(total, Tensor) else total)
        self._count = self._count + count

    def compute(self) -> float:
        """Sum over count; nan over nothing."""
        count = int(self._count)
        return float(self._total) / count if count else math.nan

    def reset(self) -> None:
        """Forget everything."""
        self._total, self._count = 0.0, 0

    def merge(self, other: Mean) -> None:
        """Add the other's sum and count, from whatever device they are on."""
        self.add(float(other._total), int(other._count))

    def state_dict(self) -> dict[str, Any]:
        """`{"total": float, "count": int}`."""
        return {"total": float(self._total), "count": int(self._count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._total, self._count = float(state["total"]), int(state["count"])


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
            _real(value)
            self.add(value.double().mean() * samples, samples)
        else:
            self.add(float(value) * samples, samples)


def _real(values: Tensor) -> None:
    if values.is_complex():
        raise ConfigError("a mean of complex numbers is no metric", hint="Take their absolute values, or one part.")


def _samples(x: object) -> int:
    """Number of samples in a tensor, or in the first of a dict or list of them; 1 where there is none to count."""
    while isinstance(x, dict | list | tuple) and x:
        x = next(iter(x.values())) if isinstance(x, dict) else x[0]
    return len(x) if isinstance(x, Tensor) and x.ndim else 1
