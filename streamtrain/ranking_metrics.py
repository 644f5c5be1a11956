"""How well scores rank: the area under the ROC curve, from counts in bins of the scores.

Its law: memory does not grow with the samples, and what the bins cost is bounded and told.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from streamtrain.class_metrics import _Counted, signed
from streamtrain.errors import ConfigError, DataError
from streamtrain.regression_metrics import no_tensors


class AUROC:
    """The chance that a sample of the class has a higher score than one that is not of it; equal scores count half.

    Outputs (B,) or (B, 1) are scores of a yes, logits or probabilities alike (only their order counts), and targets 0
    or 1. Outputs (B, C, *) with targets (B, *) are logits of C classes, or their probabilities where those of a sample
    are at least 0 and add up to 1: each class by its probability against the rest, and the mean over the classes that
    have both. NaN among the scores gives NaN.

    Scores lie in bins by the `bits` highest bits of their float32: at 16 those hold a sign, an exponent and 7 bits of
    the mantissa, so that scores that differ by a 128th of their size (or more) never share a bin, whatever their scale;
    memory is 2^bits * 16 bytes a class (1 MiB). Pairs that share a bin count half, so that the value is off by no more
    than `bound()`: half the sum over bins of (share of positives in it) * (share of negatives in it).
    """

    def __init__(self, *, bits: int = 16, ignore_index: int | None = None, nan: str = "propagate") -> None:
        if type(bits) is not int or not 10 <= bits <= 24:
            raise ConfigError(f"AUROC: bits must be an integer from 10 to 24, not {bits!r}")
        self._bits = bits
        self._counted = _Counted("AUROC", ignore_index=ignore_index, nan=nan)
        self._counts: Tensor | None = None
        """(2, classes, 2^bits) of int64: in each bin, how many are not of the class, and how many are."""
        self._odd: Tensor | int = 0
        self._nan: Tensor | int = 0

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Count one batch; ConfigError where the shapes do not fit together, or to the classes before."""
        scores, true = _scores(outputs, targets)
        classes, size = scores.shape[0], 1 << self._bits
        mask = self._counted.of(true)
        mask = torch.ones_like(true, dtype=torch.bool) if mask is None else mask
        whole = true.nan_to_num(-1).long() if true.is_floating_point() else true.long()
        good = (whole == true) & (whole >= 0) & (whole < max(2, classes))
        self._odd = self._odd + (mask & ~good).sum()
        good = good & mask
        self._nan = self._nan + (scores.isnan().any(0) & good).sum()
        numbers = torch.arange(classes, device=scores.device)[:, None]
        member = whole == (numbers if classes > 1 else 1)
        place = (member.long() * classes + numbers) * size + self._bins(scores)
        counts = torch.zeros(2 * classes * size, dtype=torch.int64, device=scores.device)
        counts.scatter_add_(0, place.reshape(-1), good.long().expand(classes, -1).reshape(-1))
        self._join(counts.reshape(2, classes, size))

    def _bins(self, scores: Tensor) -> Tensor:
        """From 0 to 2^bits - 1, in the order of the scores: that of their bits, turned round for negative ones."""
        raw = (scores.nan_to_num(0.0) + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
        return torch.where(raw < 0, ~raw, raw + (1 << 31)) >> (32 - self._bits)

    def _join(self, counts: Tensor) -> None:
        mine = self._counts
        if mine is not None and mine.shape != counts.shape:
            raise ConfigError(f"AUROC: {counts.shape[1]} classes after {mine.shape[1]}")
        self._counts = counts if mine is None else mine.add_(counts.to(mine.device))

    def compute(self) -> float:
        """From 0 to 1; nan where there is no pair to compare. Raises DataError for targets that are no class."""
        counted = self._both()
        if counted is None or int(self._nan):
            return math.nan
        negative, positive = counted
        below = negative.cumsum(-1) - negative / 2  # whole and half numbers: a perfect order is 1, and not an ulp more
        areas = (positive * below).sum(-1) / (positive.sum(-1) * negative.sum(-1))
        return float(areas.clamp(0.0, 1.0).mean())

    def bound(self) -> float:
        """By how much `compute` can be off at most, because of the bins; nan where it is."""
        counted = self._both()
        if counted is None:
            return math.nan
        negative, positive = (counts / counts.sum(-1, keepdim=True) for counts in counted)
        return float((negative * positive).sum(-1).mean()) / 2

    def _both(self) -> tuple[Tensor, Tensor] | None:
        """(classes, 2^bits) of float64 each: the negatives and positives in each bin, of the classes that have both."""
        if self._counts is None:
            return None
        if int(self._odd):
            raise DataError(
                f"AUROC: {int(self._odd)} targets are no class from 0 to {max(2, self._counts.shape[1]) - 1}",
                hint="Mend the data, or leave them out by ignore_index=, or nan='ignore'.",
            )
        negative, positive = self._counts.cpu().double()
        both = (negative.sum(-1) > 0) & (positive.sum(-1) > 0)
        if not both.any():
            return None
        return negative[both], positive[both]

    def reset(self) -> None:
        """Forget everything."""
        self._counts, self._odd, self._nan = None, 0, 0

    def merge(self, other: AUROC) -> None:
        """Add the other's counts; exact. Raises ConfigError where its bins are others."""
        if other._bits != self._bits:
            raise ConfigError(f"AUROC: bins of {other._bits} bits cannot be merged with those of {self._bits}")
        self._odd, self._nan = int(self._odd) + int(other._odd), int(self._nan) + int(other._nan)
        if other._counts is not None:
            self._join(other._counts if self._counts is not None else other._counts.clone())

    def state_dict(self) -> dict[str, Any]:
        """`{"counts": tensor or None, "odd": int, "nan": int}`."""
        counts = None if self._counts is None else self._counts.clone()
        return {"counts": counts, "odd": int(self._odd), "nan": int(self._nan)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._counts = None if state["counts"] is None else state["counts"].clone()
        self._odd, self._nan = int(state["odd"]), int(state["nan"])


def _scores(outputs: object, targets: object) -> tuple[Tensor, Tensor]:
    """(classes, N) of float32 and (N,); one class stands for a yes. Raises ConfigError."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        raise no_tensors("AUROC", outputs, targets)
    scores, targets = outputs.detach(), signed(targets)
    if scores.is_floating_point() and scores.ndim >= 2 and scores.shape[1] > 1:
        places = scores.shape[:1] + scores.shape[2:]
        if targets.shape in (places, (places[0], 1, *places[1:])):
            # log p - log(1 - p) has the order of p, and tells apart what is all but sure.
            log_p = _log_probabilities(scores.movedim(1, 0).reshape(scores.shape[1], -1))
            return (log_p - torch.log(-torch.expm1(log_p))).float(), targets.reshape(-1)
    if scores.is_floating_point() and scores.numel() == targets.numel() and scores.shape[:1] == targets.shape[:1]:
        return scores.reshape(1, -1).float(), targets.reshape(-1)
    raise ConfigError(
        f"AUROC: outputs of shape {tuple(scores.shape)} {scores.dtype} and targets of shape {tuple(targets.shape)}",
        hint="expected (B,) or (B, 1) scores and targets of 0 or 1, or (B, C) logits and (B,) classes",
    )


def _log_probabilities(scores: Tensor) -> Tensor:
    """(classes, N) of float64 from logits, or from probabilities, which rows of logits hardly ever look like: of two
    classes in bfloat16 one in 150 does, so that most rows of a batch must."""
    exact = scores.double()
    off = max(1e-5, 4 * torch.finfo(scores.dtype).eps)  # by which rounding alone may have them miss 1
    probable = (exact >= 0).all(0) & ((exact.sum(0) - 1).abs() <= off)
    taken = probable & (2 * probable.sum() > probable.numel())
    return torch.where(taken, exact.clamp(max=1).log(), torch.log_softmax(exact, dim=0))
