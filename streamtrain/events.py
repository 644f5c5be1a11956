"""Frozen facts of what happened in a run: the only thing that callbacks are given.

An event is made on the loop after the fact and never changes. Batch events are news (they coalesce for a callback
that lags); all others are never dropped.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from streamtrain.media import Medium

T = TypeVar("T")

OnTrainThread = Callable[[Callable[[Any, Any], Any]], Awaitable[Any]]
"""`await runner(fn)` runs `fn(model, optimizer)` between two bursts and returns its result."""


class Desk(Protocol):
    """Where a callback asks and leaves what goes beyond its event."""

    def updates(self) -> int:
        """Updates made by now."""

    def log(self, values: Mapping[str, Any], split: str | None) -> None:
        """Leave numbers for the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What every event carries."""

    epoch: int = 0
    """Number of the epoch, from 0."""
    step: int = 0
    """Finished optimizer updates over the run's life."""
    samples: int = 0
    """Samples trained over the run's life, all ranks."""
    time: float = 0.0
    """Seconds for which fits of this run were going on, pauses included, the time between two lives not."""
    runner: OnTrainThread | None = field(default=None, repr=False, compare=False)
    desk: Desk | None = field(default=None, repr=False, compare=False)

    async def on_train_thread(self, fn: Callable[[Any, Any], T]) -> T:
        """Run `fn(model, optimizer)` on the train thread between two bursts and return its result.

        Raises RuntimeError where no training is running.
        """
        if self.runner is None:
            raise RuntimeError("this event does not come from a running fit")
        result: T = await self.runner(fn)
        return result

    def updates(self) -> int:
        """Updates made by now; in a function that `on_train_thread` runs, exactly those whose weights it sees."""
        return self.step if self.desk is None else self.desk.updates()

    def log_metrics(self, values: Mapping[str, Any], *, split: str | None = None) -> None:
        """Add numbers to the next line of the log, or have a line of their own of this `split`; from any thread.

        Raises ConfigError, and adds nothing, if one is no number, or has a name that the line tells itself (`loss`,
        `lr`, `step`, ...; in a line of its own only `step`, `epoch`, `samples`, `time`, `split`); does nothing where no
        fit is running.
        """
        if self.desk is not None:
            self.desk.log(values, split)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBegin(Event):
    """`on_train_begin`: everything is built, checked and restored; no step of this life was made yet."""

    run_dir: str | None = None
    resumed_from: str | None = None
    """Path of the checkpoint that was loaded; None for a fresh start."""
    max_epochs: int | None = None
    max_steps: int | None = None
    batches_per_epoch: int | None = None
    """None where the stream does not know its length."""
    steps_per_epoch: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainEnd(Event):
    """`on_train_end`: the last event of a fit, sent once, also after an error or cancellation.

    Only the error of a hook that was given it is told after it, to `on_exception`.
    """

    reason: str = "completed"
    detail: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochBegin(Event):
    """`on_epoch_begin`: sent also when a resumed fit goes on in the middle of an epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochEnd(Event):
    """`on_epoch_end`: after the epoch's last update and its validation, before the learning rate's step."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """The epoch's training means, by name: `loss` and what `step=` returned; and what a validation in it or at its end
    found last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBegin(Event):
    """`on_batch_begin` (news): a burst of `count` batches, the first of step `first_step`, was handed over."""

    first_step: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEnd(Event):
    """`on_batch_end` (news): `count` batches were trained, the last of them by update `step`."""

    first_step: int = 0
    """The update to which the first of these batches belongs."""
    count: int = 1
    """Number of batches (micro-steps) that this event stands for."""
    loss_sum: float = 0.0
    """Sum over samples of the loss (its mean times the batch's size)."""
    batch_samples: int = 0
    """Samples in these batches; `loss_sum / batch_samples` is their mean loss."""
    data_wait: float = 0.0
    """Seconds for which the steps waited for data."""
    lr: float = 0.0

    @property
    def loss(self) -> float:
        """Mean loss per sample over the batches that this event stands for."""
        return self.loss_sum / self.batch_samples if self.batch_samples else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationBegin(Event):
    """`on_validation_begin`."""

    batches: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationEnd(Event):
    """`on_validation_end`: callbacks with `decides = True` return their Verdict from here."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """All that can be monitored: `val_loss`, `val_<metric>`, `val_<stream>_<metric>`, and the training means."""
    tables: Mapping[str, list[Any]] = field(default_factory=dict)
    """Metrics that are no single number, by their full names, as nested lists: `val_<confusion matrix>`."""
    sanity: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommitted(Event):
    """`on_checkpoint`: a checkpoint is durable and verified."""

    path: str = ""
    kind: str = "periodic"
    """`periodic`, `best`, `request` or `end`."""
    bytes: int = 0
    """Of its files."""
    seconds: float = 0.0
    """For which training stood still."""
    buffers: int = 0
    """Bytes of memory that are kept for snapshots, beside the budgets of the streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed(Event):
    """`on_checkpoint_failed`: a save of this step failed; what was saved before is untouched."""

    path: str = ""
    """Where it was to lie."""
    kind: str = "periodic"
    """As of CheckpointCommitted."""
    error: BaseException | None = None
    failures: int = 1
    """Failed saves in a row; after the third, training ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExceptionRaised(Event):
    """`on_exception`: the fit is about to raise `error`."""

    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupt(Event):
    """`on_interrupt`: a stop was asked for by a signal, a call or a cancellation."""

    reason: str = "stopped"
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log(Event):
    """`on_log`: one line of metrics, for loggers; never dropped."""

    split: str = "train"
    values: Mapping[str, float] = field(default_factory=dict)
    """Plain Python floats by their full names (`loss`, `lr`, `val_loss`, ...); may be non-finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Media(Event):
    """`on_media`: what `log_media` was given, for loggers; never dropped."""

    values: Mapping[str, Medium] = field(default_factory=dict)
    """Images, tables and histograms (streamtrain.media) by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a deciding callback answers; the wheel obeys at the step where it asked."""

    stop: bool = False
    reason: str = "early_stopping"
    """The FitResult's reason if `stop`."""
    detail: str = ""
    save: str = ""
    """`best` or `request` to save a checkpoint of this very step; empty for none."""
    monitor: str = ""
    value: float | None = None
    """With `save="best"`: the metric and its value, kept in the checkpoint's state and in FitResult.best."""
    restore: bool = False
    """Load the best checkpoint's weights at the end."""
    lr_factor: float | None = None
    """Multiply every group's learning rate by this now."""
