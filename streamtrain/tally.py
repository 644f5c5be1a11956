"""What a burst's batches came to: tensors while it runs, floats once at its end, lines of the log, running means.

Its law: no number is read while a burst runs; and sums are made batch by batch in their order, so that they are the
same however the batches were divided into bursts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamtrain.data.batch import Cursor
from streamtrain.errors import UserCodeError
from streamtrain.progress import Means

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Row:
    """A line of the log: what happened since the line before."""

    step: int
    samples: int
    """Samples of this burst up to here."""
    at: float
    """When, by `time.perf_counter`."""
    values: dict[str, float]


@dataclass(slots=True)
class Report:
    """What a burst did, in finished updates."""

    first_step: int
    """The update to which its first batch belongs."""
    before: int = 0
    """Samples that the run had trained before it."""
    updates: int = 0
    batches: int = 0
    passed: int = 0
    """Batches without rows that came before the last of those."""
    samples: int = 0
    loss_sum: float = 0.0
    """Over samples."""
    cursor: Cursor | None = None
    """The position after the last finished update; None if there was none."""
    rows: list[Row] = field(default_factory=list)
    told: int = 0
    """Rows that callbacks were told."""
    announced: bool = False
    """Its batches were told."""
    skipped: int = 0
    """Updates that were not made because of a number that is not finite."""
    lr: float = 0.0
    began: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds for which it waited for a source that is pulled inside."""
    error: BaseException | None = None
    """What ended the burst; the updates before it are finished and counted."""


class _Mark(NamedTuple):
    place: int
    step: int
    gauged: Mapping[str, float]
    at: float


class Tally:
    """Losses and logged numbers of the batches since the last report."""

    def __init__(self, own: Collection[str] = ()) -> None:
        """`own`: what the lines of the log tell by themselves, whatever a step returns by these names."""
        self.window = Means()
        """Since the last line of the log."""
        self.epoch = Means()
        """Since the epoch began."""
        self.losses: list[Tensor] = []
        self.counts: list[int] = []
        """Samples of each batch."""
        self.passed: list[int] = []
        """Of batches without rows: how many with rows came before each."""
        self._logged: list[tuple[int, str, Any]] = []
        self._norms: list[tuple[int, int, Tensor]] = []
        """Place of the last batch, number of the update, norm (0-d)."""
        self._marks: list[_Mark] = []
        self._left_out: set[int] = set()
        self._lossless: set[int] = set()
        """Places of batches that have no loss."""
        self._own, self._refused = frozenset(own), set[str]()

    def add_logged(self, logged: Mapping[str, Any]) -> None:
        """More numbers of the batch that is added next; of a name that is the run's own its number stands, which is
        said."""
        place = len(self.losses)
        for name, value in logged.items():
            if name in self._own:
                if name not in self._refused:
                    self._refused.add(name)
                    logger.warning("the step: the run logs a %r of its own, which stands; name yours otherwise", name)
                continue
            self._logged.append((place, name, logged_number(name, value)))

    def add_norm(self, norm: Tensor, step: int) -> None:
        """The norm of the gradients (0-d) of update `step`, whose last batch was added last."""
        place = len(self.losses) - 1
        self._norms.append((place, step, norm))
        self._logged.append((place, "grad_norm", norm))

    def take_norms(self) -> list[tuple[int, float]]:
        """Update and norm since this was last asked, but of what is left out; to be asked before `read`."""
        norms, self._norms = [each for each in self._norms if each[0] not in self._left_out], []
        values = torch.stack([norm for _, _, norm in norms]).tolist() if norms else []
        return [(step, value) for (_, step, _), value in zip(norms, values, strict=True)]

    def leave_out_norms(self, places: Iterable[int]) -> None:
        """Not to log the norms of updates that were not made, of which these batches are the last."""
        if without := set(places):
            self._norms = [each for each in self._norms if each[0] not in without]
            self._logged = [item for item in self._logged if item[1] != "grad_norm" or item[0] not in without]

    def mark(self, step: int, gauged: Mapping[str, float]) -> None:
        """A line of the log ends with the last batch; `gauged`: what it says beside the means."""
        self._marks.append(_Mark(len(self.losses), step, gauged, time.perf_counter()))

    def drop(self, batches: int) -> None:
        """Forget the last so many batches."""
        keep = len(self.losses) - batches
        del self.losses[keep:], self.counts[keep:]
        self.passed = [place for place in self.passed if place < keep]
        self._logged = [item for item in self._logged if item[0] < keep]
        self._norms = [each for each in self._norms if each[0] < keep]
        self._marks = [mark for mark in self._marks if mark.place <= keep]

    def leave_out(self, batches: int) -> None:
        """Count the samples of the last so many batches, but not their numbers."""
        self.leave_out_places(range(len(self.losses) - batches, len(self.losses)))

    def leave_out_places(self, places: Iterable[int]) -> None:
        """The same of batches by their places since the last report."""
        self._left_out.update(places)

    def pass_over(self) -> None:
        """A batch has no rows."""
        self.passed.append(len(self.losses))

    def without_loss(self) -> None:
        """The last batch has none: what stands for it is no number, and its others count."""
        self._lossless.add(len(self.losses) - 1)

    def read(self, report: Report, done: int) -> None:
        """Account for the first `done` batches, and forget them."""
        if not done:
            return
        losses = _floats(self.losses[:done])
        named: dict[int, list[tuple[str, float]]] = {}
        logged = [item for item in self._logged if item[0] < done]
        for (place, name, _), value in zip(logged, _numbers([value for _, _, value in logged]), strict=True):
            named.setdefault(place, []).append((name, value))
        begin = 0
        for mark in self._marks:
            self._account(report, losses, named, begin, mark.place)
            values = {**self.window.compute(), **mark.gauged}
            report.rows.append(Row(mark.step, report.samples, mark.at, values))
            self.window.reset()
            begin = mark.place
        self._account(report, losses, named, begin, done)
        report.batches = done
        report.passed = sum(place < done for place in self.passed)
        self.passed = [place - done for place in self.passed if place >= done]
        del self.losses[:done], self.counts[:done]
        self._logged = [(place - done, name, value) for place, name, value in self._logged if place >= done]
        self._marks.clear()
        self._left_out.clear()
        self._lossless.clear()

    def _account(
        self, report: Report, losses: list[float], named: dict[int, list[tuple[str, float]]], begin: int, end: int
    ) -> None:
        counts = self.counts
        without = self._left_out | self._lossless
        places = [place for place in range(begin, end) if place not in without] if without else range(begin, end)
        for means in (self.window, self.epoch):
            total, weight = means.get("loss")
            for place in places:
                total += losses[place] * counts[place]
                weight += counts[place]
            if weight or not self._left_out.isdisjoint(range(begin, end)):  # of nothing but such batches it is NaN
                means.put("loss", total, weight)
            for place in named:
                if begin <= place < end and place not in self._left_out:
                    for name, value in named[place]:
                        means.add(name, value, counts[place])
        report.samples += sum(counts[begin:end])
        for place in places:
            if math.isfinite(losses[place]):
                report.loss_sum += losses[place] * counts[place]


def logged_number(name: str, value: Any) -> Any:
    """What a step gave to be logged: the mean of a tensor (float64, not read yet), else a float."""
    try:
        return value.detach().double().mean() if isinstance(value, Tensor) else float(value)
    except (TypeError, ValueError) as error:
        raise UserCodeError(f"the step's {name!r} must be one number, not {value!r:.80}") from error


def _numbers(values: list[Any]) -> list[float]:
    """Numbers and tensors of one value, these read together where they lie on one device."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len({tensor.device for tensor in tensors}) != 1:
        return [float(value) for value in values]
    read = iter(torch.stack([tensor.double().reshape(()) for tensor in tensors]).tolist())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


def _floats(losses: list[Tensor]) -> list[float]:
    """The values of 0-d (or one-element) tensors, read together."""
    if all(loss.ndim == 0 for loss in losses):
        values: list[float] = torch.stack(losses).tolist()
        return values
    return [float(loss) for loss in losses]
