"""Metrics of classes: counts of right and wrong answers, whole numbers that no order of batches can change.

The law: what an answer is follows from the shapes alone, one way for all of them here:

    outputs                              targets          classes
    scores (B, C, *), C > 1              (B, *)           C: the highest score is the answer, of equal ones the first
    logits of any shape, (B,) or (B, 1)  as many, 0 or 1  2: yes where the logit exceeds `threshold`
    integers or booleans, as many        integers         answers as they are; of integers `classes=` tells how many

`ignore_index`: targets of this class are not counted. `nan="ignore"`: those that are NaN are not either, as classes
of fields with gaps come when they are decoded. An update asks nothing of the device, so that a target that is no class
is found only when the value is computed: a DataError (the two accuracies count it as answered wrong). Scores that are
NaN are no answer: the accuracies count it as wrong, and the ratios become NaN.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamtrain.errors import ConfigError, DataError
from streamtrain.means import Mean
from streamtrain.regression_metrics import check_nan, no_tensors

logger = logging.getLogger(__name__)

AVERAGES = ("auto", "binary", "macro", "micro", "weighted")


class Answers(NamedTuple):
    """What a batch comes to, an element each: answers and targets (N,), and how many classes there are."""

    given: Tensor
    """-1 where the scores are NaN."""
    true: Tensor
    classes: int
    """0 where only the user can know."""
    yes_or_no: bool = False
    """There is one score an element, or a boolean: class 1 is the one that is meant."""


def answers(who: str, outputs: object, targets: object, threshold: float = 0.0) -> Answers:
    """Flat answers and targets of one batch. Raises ConfigError where the shapes do not fit together."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        raise no_tensors(who, outputs, targets)
    outputs, targets = outputs.detach(), signed(targets)
    as_many = outputs.numel() == targets.numel() and outputs.shape[:1] == targets.shape[:1]
    if as_many and not (outputs.is_floating_point() or outputs.is_complex()):
        yes_or_no = outputs.dtype is torch.bool
        return Answers(signed(outputs).reshape(-1), targets.reshape(-1), 2 if yes_or_no else 0, yes_or_no)
    if outputs.ndim >= 2 and outputs.shape[1] > 1 and not outputs.is_complex():
        places = outputs.shape[:1] + outputs.shape[2:]
        if targets.shape in (places, (places[0], 1, *places[1:])):
            outputs = signed(outputs)
            given = outputs.argmax(dim=1)
            if outputs.is_floating_point():
                given = given.masked_fill(outputs.isnan().any(dim=1), -1)
            return Answers(given.reshape(-1), targets.reshape(-1), outputs.shape[1])
    if as_many and not outputs.is_complex():
        given = (outputs > threshold).long().masked_fill(outputs.isnan(), -1)
        return Answers(given.reshape(-1), targets.reshape(-1), 2, True)
    raise ConfigError(
        f"{who}: outputs of shape {tuple(outputs.shape)} {outputs.dtype} and targets of shape {tuple(targets.shape)}",
        hint="expected (B, C) scores and (B,) classes, or (B,) or (B, 1) logits and as many targets of 0 or 1",
    )


def signed(numbers: Tensor) -> Tensor:
    """Whole numbers of more than a byte without a sign as int64: torch compares them with nothing else."""
    return numbers.long() if numbers.dtype in (torch.uint16, torch.uint32, torch.uint64) else numbers


class _Counted:
    """Which targets count: all, or all but those of one class, or those that are there."""

    def __init__(self, who: str, *, ignore_index: int | None, nan: str) -> None:
        if ignore_index is not None and type(ignore_index) is not int:
            raise ConfigError(f"{who}: ignore_index must be a class number, not {ignore_index!r}")
        self._ignored, self._gaps = ignore_index, check_nan(who, nan)

    def of(self, true: Tensor) -> Tensor | None:
        """A mask of the shape of `true`; None where all count."""
        mask = None if self._ignored is None else true != self._ignored
        if self._gaps and true.is_floating_point():
            mask = ~true.isnan() if mask is None else mask & ~true.isnan()
        return mask


class _Yes:
    """The range of the scores of a yes: where all are from 0 to 1 they are probabilities, which 0 does not part.

    The logits of a network that has learned nothing yet may lie there too, close together: of those it is said only if
    they do so once more.
    """

    def __init__(self, who: str, threshold: float) -> None:
        self._who, self._threshold = who, threshold
        self._least: Tensor | None = None
        self._most: Tensor | None = None
        self._said = self._before = False

    def take(self, scores: Tensor) -> None:
        """Scores of one batch, of any shape; asks nothing of the device."""
        if self._threshold or self._said or not scores.is_floating_point() or not scores.numel():
            return
        least, most = scores.detach().aminmax()
        if self._least is None or self._most is None or self._least.device != least.device:
            self._least, self._most = least, most
        else:
            self._least, self._most = torch.minimum(self._least, least), torch.maximum(self._most, most)

    def say(self) -> None:
        """Say once that they are probabilities, if they look so."""
        if self._least is None or self._most is None:
            return
        within = bool(self._least >= 0 and self._most <= 1)
        if within and (self._before or self._most - self._least > 0.5):
            self._said = True
            logger.warning(
                "%s: all scores of a yes are from 0 to 1, and all above 0 count as yes, as of logits: if they are "
                "probabilities, give threshold=0.5",
                self._who,
            )
        self._before, self._least, self._most = within, None, None


class Accuracy(Mean):
    """The share of right answers, from 0 to 1.

    Outputs (B, C) with C > 1 are scores of C classes and targets (B,) integer classes; outputs (B, C, *) with
    targets (B, *) count every position. Outputs (B,) or (B, 1) are logits of a yes (over `threshold` is yes) and
    targets, of as many elements, 0 or 1. Integer or boolean outputs are answers and are compared as they are.
    """

    def __init__(self, *, threshold: float = 0.0, ignore_index: int | None = None, nan: str = "propagate") -> None:
        super().__init__()
        self._threshold, self._yes = threshold, _Yes("Accuracy", threshold)
        self._counted = _Counted("Accuracy", ignore_index=ignore_index, nan=nan)

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Count the right answers of one batch; ConfigError where the shapes do not fit together."""
        given, true, _, yes_or_no = answers("Accuracy", outputs, targets, self._threshold)
        if yes_or_no:
            self._yes.take(outputs)
        right, mask = given == true, self._counted.of(true)
        if mask is None:
            self.add(right.sum(), right.numel())
        else:
            self.add((right & mask).sum(), mask.sum())

    def compute(self) -> float:
        """From 0 to 1; nan over nothing."""
        self._yes.say()
        return super().compute()


class TopKAccuracy(Mean):
    """The share of targets that are among the `k` classes of the highest scores, from 0 to 1.

    Outputs (B, C, *) are scores, targets (B, *) classes. Of equal scores the lower class number comes first, so that
    `k=1` is the accuracy, and a model that says the same of all classes gains nothing by it.
    """

    def __init__(self, k: int = 5, *, ignore_index: int | None = None, nan: str = "propagate") -> None:
        super().__init__()
        if type(k) is not int or k < 1:
            raise ConfigError(f"TopKAccuracy: k must be an integer of at least 1, not {k!r}")
        self.k = k
        self._counted = _Counted("TopKAccuracy", ignore_index=ignore_index, nan=nan)

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Count one batch; ConfigError where the outputs are no scores of more than `k` classes for these targets."""
        _, true, classes, _ = answers("TopKAccuracy", outputs, targets)
        if outputs.ndim < 2 or classes != outputs.shape[1] or classes <= self.k:
            raise ConfigError(
                f"TopKAccuracy(k={self.k}): outputs of shape {tuple(outputs.shape)}",
                hint="expected (B, C, ...) scores of more than k classes",
            )
        scores = outputs.detach().movedim(1, -1).reshape(-1, classes)
        mask = self._counted.of(true)
        place = true.nan_to_num(-1).long() if true.is_floating_point() else true.long()
        known = (place >= 0) & (place < classes)
        own = scores.gather(1, place.clamp(0, classes - 1)[:, None])
        earlier = torch.arange(classes, device=scores.device) < place[:, None]
        rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
        right = (rank < self.k) & known & ~scores.isnan().any(1)
        if mask is None:
            self.add(right.sum(), right.numel())
        else:
            self.add((right & mask).sum(), mask.sum())


class _Counts:
    """Whole numbers by class, and how many elements were none; `classes` is needed only for answers as integers."""

    def __init__(self, *, classes: int | None, threshold: float, ignore_index: int | None, nan: str) -> None:
        self._who = type(self).__name__
        if classes is not None and (type(classes) is not int or classes < 2):
            raise ConfigError(f"{self._who}: classes must be an integer of at least 2, not {classes!r}")
        self._classes, self._threshold, self._yes = classes, threshold, _Yes(self._who, threshold)
        self._counted = _Counted(self._who, ignore_index=ignore_index, nan=nan)
        self._counts: Tensor | None = None
        self._odd: Tensor | int = 0
        self._nan: Tensor | int = 0
        """Scores that count and are NaN."""
        self._yes_or_no = False

    def update(self, outputs: Tensor, targets: object = None) -> None:
        """Count one batch; ConfigError where the shapes do not fit together, or to the classes before."""
        given, true, classes, self._yes_or_no = answers(self._who, outputs, targets, self._threshold)
        if self._yes_or_no:
            self._yes.take(outputs)
        classes = classes or self._classes or 0
        if not classes:
            raise ConfigError(f"{self._who}: nobody knows how many classes there are", hint="give classes=")
        if self._classes not in (None, classes):
            raise ConfigError(f"{self._who}: outputs of {classes} classes, expected {self._classes}")
        mask = self._counted.of(true)
        whole = true.nan_to_num(-1).long() if true.is_floating_point() else true.long()
        given = given.long()
        good = (whole == true) & (whole >= 0) & (whole < classes)
        if outputs.is_floating_point():
            lost = (given < 0) & good
            self._nan = self._nan + (lost if mask is None else lost & mask).sum()
        else:
            lost = torch.zeros_like(good)
            good = good & (given >= 0) & (given < classes)
        odd = ~good if mask is None else ~good & mask
        good = good & ~lost if mask is None else good & ~lost & mask
        self._odd = self._odd + odd.sum()
        given, whole = given.clamp(0, classes - 1), whole.clamp(0, classes - 1)
        self._join(self._count(given, whole, good.long(), classes))

    def _count(self, given: Tensor, true: Tensor, weight: Tensor, classes: int) -> Tensor:
        raise NotImplementedError

    def _join(self, counts: Tensor) -> None:
        mine = self._counts
        if mine is not None and mine.shape != counts.shape:
            raise ConfigError(f"{self._who}: {counts.shape[-1]} classes after {mine.shape[-1]}")
        self._counts = counts if mine is None else mine + counts.to(mine.device)

    def _checked(self) -> Tensor | None:
        """The counts, in memory; None over nothing. Raises DataError if anything that was counted is no class."""
        self._yes.say()
        counts = None if self._counts is None else self._counts.cpu()
        if counts is not None and int(self._odd):
            raise DataError(
                f"{self._who}: {int(self._odd)} targets or answers are no class from 0 to {counts.shape[-1] - 1}",
                hint="Mend the data, or leave them out by ignore_index=, or nan='ignore'.",
            )
        return counts if counts is not None and counts.any() else None

    def reset(self) -> None:
        """Forget everything."""
        self._counts, self._odd, self._nan = None, 0, 0

    def merge(self, other: _Counts) -> None:
        """Add the other's counts; exact."""
        self._odd, self._nan = int(self._odd) + int(other._odd), int(self._nan) + int(other._nan)
        if other._counts is not None:
            self._join(other._counts)
            self._yes_or_no = other._yes_or_no

    def state_dict(self) -> dict[str, Any]:
        """`{"counts": lists of integers or None, "odd": int, "nan": int, "yes_or_no": bool}`."""
        counts = None if self._counts is None else self._counts.tolist()
        return {"counts": counts, "odd": int(self._odd), "nan": int(self._nan), "yes_or_no": self._yes_or_no}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._counts = None if state["counts"] is None else torch.tensor(state["counts"], dtype=torch.int64)
        self._odd, self._nan = int(state["odd"]), int(state["nan"])
        self._yes_or_no = bool(state["yes_or_no"])


class ConfusionMatrix(_Counts):
    """How often each class (row) was answered as each (column): a table of int64, C x C, also in memory.

    Where the scores are NaN there is no answer, and nothing is counted.
    """

    names = ()
    """It is no number that could be monitored."""

    def __init__(
        self,
        *,
        classes: int | None = None,
        threshold: float = 0.0,
        ignore_index: int | None = None,
        nan: str = "propagate",
    ) -> None:
        super().__init__(classes=classes, threshold=threshold, ignore_index=ignore_index, nan=nan)

    def _count(self, given: Tensor, true: Tensor, weight: Tensor, classes: int) -> Tensor:
        flat = torch.zeros(classes * classes, dtype=torch.int64, device=true.device)
        return flat.scatter_add_(0, true * classes + given, weight).reshape(classes, classes)

    def compute(self) -> Tensor:
        """(C, C) of int64; (0, 0) over nothing. Raises DataError for targets that are no class."""
        counts = self._checked()
        return torch.zeros(0, 0, dtype=torch.int64) if counts is None else counts


class _ByClass(_Counts):
    """A ratio of counts by class, averaged.

    `average`: `"binary"` is the ratio of class 1 of two; `"macro"` the mean over the classes that occur among targets
    or answers, `"weighted"` that weighted by their targets, `"micro"` the ratio of all counts together; `"auto"` is
    binary for logits of a yes or boolean answers, macro else. A ratio of nothing is 0, as in scikit-learn.
    """

    def __init__(
        self,
        *,
        average: str = "auto",
        classes: int | None = None,
        threshold: float = 0.0,
        ignore_index: int | None = None,
        nan: str = "propagate",
    ) -> None:
        super().__init__(classes=classes, threshold=threshold, ignore_index=ignore_index, nan=nan)
        if average not in AVERAGES:
            raise ConfigError(
                f"{self._who}: average must be {', '.join(map(repr, AVERAGES))}, not {average!r}",
                hint="for each class alone: ConfusionMatrix(), or an object of torchmetrics with average=None",
            )
        self._average = average

    def _count(self, given: Tensor, true: Tensor, weight: Tensor, classes: int) -> Tensor:
        zeros = torch.zeros(3, classes, dtype=torch.int64, device=true.device)
        zeros[0].scatter_add_(0, true, weight * (given == true))
        zeros[1].scatter_add_(0, given, weight)
        zeros[2].scatter_add_(0, true, weight)
        return zeros

    def compute(self) -> float:
        """From 0 to 1; nan over nothing, and where a score is. Raises DataError for targets that are no class."""
        counts = self._checked()
        if counts is None or int(self._nan):
            return math.nan
        average = self._average
        if average == "auto":
            average = "binary" if self._yes_or_no else "macro"
        if average == "binary" and counts.shape[1] != 2:
            raise ConfigError(
                f"{self._who}: average='binary' of {counts.shape[1]} classes", hint="give macro, micro or weighted"
            )
        if average == "micro":
            counts = counts.sum(1, keepdim=True)
        right, given, true = counts.double()
        above, below = self._ratio(right, given, true)
        each = torch.where(below > 0, above / below.clamp(min=1), 0.0)
        if average == "binary":
            return float(each[1])
        weight = true if average == "weighted" else (given + true > 0).double()
        return float((each * weight).sum() / weight.sum())

    @staticmethod
    def _ratio(right: Tensor, given: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Precision(_ByClass):
    """The share of right ones among the answers of a class."""

    @staticmethod
    def _ratio(right: Tensor, given: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        return right, given


class Recall(_ByClass):
    """The share of a class's targets that were answered right."""

    @staticmethod
    def _ratio(right: Tensor, given: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        return right, true


class F1(_ByClass):
    """The harmonic mean of precision and recall, for each class, then averaged."""

    @staticmethod
    def _ratio(right: Tensor, given: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * right, given + true
