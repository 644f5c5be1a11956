"""What a fit is to do, worked out; its law: when something is due is a pure function of the counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamtrain.data.source import Stream
from streamtrain.options import Limits, Options
from streamtrain.progress import Progress
from streamtrain.streams import least, length


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Limits, intervals and lengths of one fit."""

    max_epochs: int | None
    max_steps: int | None
    max_time: float | None
    validates: bool = False
    validate_every: tuple[int, str] = (1, "epoch")
    """A number of epochs or steps."""
    accumulate: int = 1
    """Batches of an update."""
    batches: int | None = None
    """Of an epoch, as far as that is known; limits are counted in."""
    limit: int | None = None
    """Batches of an epoch, at most."""
    overfit: bool = False
    """Each epoch has the batches of the first one."""
    validation_limits: Mapping[str, int | None] = field(default_factory=dict)
    thaws: tuple[int, ...] = ()
    """Steps at which parameters are unfrozen."""
    sanity: int = 0
    """Batches of each validation stream to look at before training."""
    announcement: Mapping[str, Any] = field(default_factory=dict)
    """The fields of TrainBegin."""

    def reached(self, progress: Progress) -> tuple[str, str]:
        """Reason and detail of the end if a limit is reached and nothing is owed; else both empty."""
        if self.max_steps is not None and progress.step >= self.max_steps and not progress.owes:
            return "completed", ""
        if self.max_epochs is not None and progress.epoch >= self.max_epochs:
            return "completed", ""
        if self.max_time is not None and progress.time >= self.max_time:
            return "max_time", f"{self.max_time:g} s"
        return "", ""

    def validation_due(self, progress: Progress, *, epoch_end: bool = False) -> bool:
        """Whether to validate after the update that was just made."""
        number, unit = self.validate_every
        if not self.validates:
            return False
        if unit == "step":
            return progress.step % number == 0
        return epoch_end and (progress.epoch + 1) % number == 0

    def validated(self, progress: Progress) -> bool:
        """Whether what a validation found last belongs to this epoch, whose last update was just made."""
        if self.validate_every[1] == "epoch":
            return self.validation_due(progress, epoch_end=True)
        number, begun = self.validate_every[0], progress.step - -(-progress.batch // self.accumulate)
        return self.validates and progress.step // number > begun // number

    def next_step(self, step: int) -> int | None:
        """The next step after `step` at which something is due by its number alone."""
        number, unit = self.validate_every
        validation = (step // number + 1) * number if self.validates and unit == "step" else None
        thaws = (thaw for thaw in self.thaws if thaw > step)
        return min((cut for cut in (self.max_steps, validation, *thaws) if cut is not None), default=None)

    def stream_epoch(self, epoch: int) -> int:
        """The stream's epoch in an epoch of the fit."""
        return 0 if self.overfit else epoch

    def remaining(self, taken: int) -> int | None:
        """Batches that the epoch still has once so many are taken; None if nobody knows."""
        return None if self.batches is None else max(0, self.batches - taken)


def planned(
    options: Options,
    limits: Limits,
    train: Stream,
    validation: Mapping[str, Stream],
    *,
    thaws: tuple[int, ...],
    fresh: bool,
    places: Mapping[str, str | None],
) -> Plan:
    """The plan of a fit on streams that are open; `fresh`: nothing was trained before; `places`: of of TrainBegin."""
    known = length(train)
    limit = options.batches(known)
    batches = least(known, limit)
    return Plan(
        max_epochs=limits.max_epochs,
        max_steps=limits.max_steps,
        max_time=limits.max_time,
        validates=bool(validation),
        validate_every=(1, "epoch") if options.dev else options.validate_every,
        accumulate=options.accumulate,
        batches=batches,
        limit=limit,
        overfit=options.overfit is not None,
        validation_limits={name: options.batches(length(stream)) for name, stream in validation.items()},
        thaws=thaws,
        sanity=options.sanity if fresh and not options.dev else 0,
        announcement={
            **places,
            "max_epochs": limits.max_epochs,
            "max_steps": limits.max_steps,
            "batches_per_epoch": batches,
            "steps_per_epoch": None if batches is None else -(-batches // options.accumulate),
            "config": options.config,
        },
    )
