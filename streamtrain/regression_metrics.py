"""Metrics of numbers against numbers: errors by element, and the share of the variance that is explained.

The law: outputs and targets are matched element by element or refused, never broadcast; and a gap in the targets is a
gap only where its user said so. An update asks nothing of the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from streamtrain.errors import ConfigError
from streamtrain.means import Mean


def matched(who: str, outputs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Both detached, in float64 and of one shape: their own, or (N,) where (B, 1) stands beside (B,).

    Where one is complex both are complex128. Raises ConfigError where they are no tensors or cannot be matched element
    by element.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        raise no_tensors(who, outputs, targets)
    outputs = outputs.detach()
    if outputs.shape != targets.shape:
        if outputs.shape[:1] != targets.shape[:1] or outputs.numel() != targets.numel():
            raise ConfigError(
                f"{who}: outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}",
                hint="they must have the same shape; broadcasting them would average over wrong pairs",
            )
        outputs, targets = outputs.reshape(-1), targets.reshape(-1)
    # Promoted first: unsigned or half-precision differences would wrap or round.
    dtype = torch.complex128 if outputs.is_complex() or targets.is_complex() else torch.float64
    return outputs.to(dtype), targets.to(dtype)


def no_tensors(who: str, outputs: object, targets: object) -> ConfigError:
    """The error for a metric that is given something else than a tensor each."""
    if isinstance(outputs, dict | list | tuple):
        return ConfigError(
            f"{who}: the model has several outputs",
            hint='name the one that is meant: metrics={"output": {"name": metric}}',
        )
    if isinstance(targets, dict | list | tuple):
        return ConfigError(f"{who}: there are several targets for one output", hint="give the stream one target")
    if targets is None:
        return ConfigError(f"{who} needs targets", hint="give the stream targets=, or use another metric")
    return ConfigError(f"{who}: outputs are a {type(outputs).__name__}, targets a {type(targets).__name__}")


def check_nan(who: str, nan: object) -> bool:
    """Whether gaps are left out, of `nan="propagate"` or `"ignore"`; ConfigError for anything else."""
    if nan not in ("propagate", "ignore"):
        raise ConfigError(
            f"{who}: nan must be 'propagate' or 'ignore', not {nan!r}",
            hint="'ignore' leaves out the elements whose target is NaN; an output that is NaN still counts",
        )
    return nan == "ignore"


class _ElementError(Mean):
    """A mean over elements of an error between outputs and targets of the same number of elements.

    `nan="ignore"` leaves out elements whose *target* is NaN, as of masked fields. An output that is NaN where there is
    a target makes the value NaN: a model that diverged must not look good.
    """

    def __init__(self, *, nan: str = "propagate") -> None:
        super().__init__()
        self._gaps = check_nan(type(self).__name__, nan)

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Add the errors of one batch; ConfigError where outputs and targets cannot be matched element by element."""
        out, true = matched(type(self).__name__, outputs, targets)
        difference = out - true
        if self._gaps:
            there = ~true.isnan()
            self.add(self._error(torch.where(there, difference, 0.0)).sum(), there.sum())
        else:
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
    """Mean of |output - target|^2 over all elements; outputs (B, 1) and targets (B,) are matched."""

    @staticmethod
    def _error(difference: Tensor) -> Tensor:
        return difference.abs().square()


class RootMeanSquaredError(MeanSquaredError):
    """The square root of the mean of (output - target)^2 over all elements, of all batches together."""

    def compute(self) -> float:
        """The root of the mean; nan over nothing."""
        mean = super().compute()
        return math.sqrt(mean) if mean >= 0 else mean


class R2:
    """1 - (sum of squared errors) / (sum of squares of the targets about their mean), the coefficient of determination.

    Outputs and targets (B,) or (B, 1) are one output; of (B, ...) each place behind the first dimension is an output of
    its own. `average="uniform"` is the mean over outputs, `"variance"` weighs them by their targets' sums of squares
    (scikit-learn's `uniform_average` and `variance_weighted`). An output whose targets do not vary counts 1 where all
    errors are 0, else 0, as there; one with fewer than two targets is left out. `nan` is as in the errors.

    Targets' sums of squares are kept about their running mean and joined by Chan, Golub and LeVeque's formula
    ("Updating formulae and a pairwise algorithm for computing sample variances", 1979), so that targets far from zero
    lose nothing. Four float64 numbers an output.
    """

    def __init__(self, *, average: str = "uniform", nan: str = "propagate") -> None:
        if average not in ("uniform", "variance"):
            raise ConfigError(f"R2: average must be 'uniform' or 'variance', not {average!r}")
        self._average, self._gaps = average, check_nan("R2", nan)
        self._sums: Tensor | None = None
        """(4, outputs): targets, their mean, their squares about it, squared errors."""

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Add one batch; ConfigError where shapes do not fit together, or to the batches before."""
        out, true = matched("R2", outputs, targets)
        if out.is_complex():
            raise ConfigError("R2 is of real numbers, not complex ones", hint="give it one part: a function, or mse")
        if not out.numel():
            return
        rows = out.shape[0] if out.ndim else 1
        out, true = out.reshape(rows, -1), true.reshape(rows, -1)
        there = ~true.isnan() if self._gaps else torch.ones_like(true, dtype=torch.bool)
        count = there.sum(0).double()
        true, error = torch.where(there, true, 0.0), torch.where(there, out - true, 0.0)
        # The mean of equal targets is theirs to the bit, so that they have no spread at all: a sum rounds.
        least, most = (torch.where(there, true, edge) for edge in (math.inf, -math.inf))
        mean = (true.sum(0) / count.clamp(min=1)).clamp(least.amin(0), most.amax(0))
        mean = torch.where(count > 0, mean, 0.0)
        spread = torch.where(there, true - mean, 0.0).square().sum(0)
        self._join(torch.stack([count, mean, spread, error.square().sum(0)]))

    def _join(self, other: Tensor) -> None:
        mine = self._sums
        if mine is None:
            self._sums = other
            return
        if mine.shape != other.shape:
            raise ConfigError(
                f"R2: {other.shape[1]} outputs a sample after {mine.shape[1]}", hint="samples must be of one shape"
            )
        other = other.to(mine.device)
        (n, mean, spread, errors), (m, mean2, spread2, errors2) = mine, other
        total, shift = n + m, mean2 - mean
        share = m / total.clamp(min=1)
        spread = spread + spread2 + shift.square() * n * share
        self._sums = torch.stack([total, mean + shift * share, spread, errors + errors2])

    def compute(self) -> float:
        """At most 1; nan where no output has two targets."""
        if self._sums is None:
            return math.nan
        count, _, spread, errors = self._sums.cpu()
        spread, errors = spread[count >= 2], errors[count >= 2]
        if not len(spread) or errors.isnan().any():
            return math.nan
        if self._average == "variance" and (spread > 0).any():
            return 1 - float(errors[spread > 0].sum() / spread.sum())
        return float(torch.where(spread == 0, (errors == 0).double(), 1 - errors / spread).mean())

    def reset(self) -> None:
        """Forget everything."""
        self._sums = None

    def merge(self, other: R2) -> None:
        """Join the other's sums."""
        if other._sums is not None:
            self._join(other._sums)

    def state_dict(self) -> dict[str, Any]:
        """`{"sums": 4 lists of a float an output, or None}`."""
        return {"sums": None if self._sums is None else self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._sums = None if state["sums"] is None else torch.tensor(state["sums"], dtype=torch.float64)
