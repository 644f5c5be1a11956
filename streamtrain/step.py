"""A burst: some batches through forward, loss, backward, clip and update, in plain synchronous torch.

Its law: what a burst leaves behind is whole updates. Nothing but tensors without a graph outlives a batch, the numbers
are read once a burst, and an update whose loss or gradients are not finite is not made. It knows nothing of loops,
epochs or files, and runs on the train thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from streamtrain.blame import explained, non_finite
from streamtrain.data.batch import Batch, Cursor
from streamtrain.device import MoveBatch
from streamtrain.errors import ConfigError
from streamtrain.progress import Means
from streamtrain.schedulers import LearningRate, get_lr

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What one batch came to."""

    loss: Any
    """A tensor of one value, with a graph; None where there is no loss (prediction, evaluation without one)."""
    outputs: Any = None
    targets: Any = None
    logged: Mapping[str, Any] | None = None
    """More numbers to be logged."""


Compute = Callable[[Batch], Outcome]


def supervised(model: nn.Module, loss: Callable[[Any, Any], Any] | None) -> Compute:
    """`loss(model(inputs), targets)`, or `loss(model(inputs), inputs)` where there are no targets."""

    def compute(batch: Batch) -> Outcome:
        outputs = model(batch.inputs)
        targets = batch.inputs if batch.targets is None else batch.targets
        return Outcome(None if loss is None else loss(outputs, targets), outputs, targets)

    return compute


def custom(function: Callable[[Batch], Any]) -> Compute:
    """What a user's function gives for a batch: a loss, or a dict with `loss`, `outputs`, `targets` and more to log."""

    def compute(batch: Batch) -> Outcome:
        made = function(batch)
        if not isinstance(made, Mapping):
            return Outcome(made)
        rest = {key: value for key, value in made.items() if key not in ("loss", "outputs", "targets")}
        targets = made.get("targets", batch.targets)
        return Outcome(made.get("loss"), made.get("outputs"), targets, rest)

    return compute


def custom_outputs(function: Callable[[Batch], Any]) -> Compute:
    """What a user's function gives for a batch, as outputs without a loss."""
    return lambda batch: Outcome(None, function(batch))


class Source(Protocol):
    """Where a burst's batches come from."""

    ended: bool

    def take(self) -> Batch | None:
        """The next batch; None if there is none now."""


class Door(Protocol):
    """Where requests knock."""

    pending: bool


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
    updates: int = 0
    batches: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    """Over samples."""
    cursor: Cursor | None = None
    """The position after the last finished update; None if there was none."""
    rows: list[Row] = field(default_factory=list)
    skipped: int = 0
    """Updates that were not made because of a number that is not finite."""
    lr: float = 0.0
    began: float = 0.0
    seconds: float = 0.0
    error: BaseException | None = None
    """What ended the burst; the updates before it are finished and counted."""


class TrainStep:
    """Makes updates out of batches; keeps the running means."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        compute: Compute,
        lr: LearningRate,
        *,
        move: MoveBatch,
        door: Door,
        device: torch.device,
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        precision: str = "32",
        skip: bool = False,
        log_every: int = 50,
    ) -> None:
        self.step = 0
        """Updates made over the run's life."""
        self.lr = lr
        self.accumulate = accumulate
        """Batches of a full update."""
        self.window = Means()
        """Since the last line of the log."""
        self.means = Means()
        """Since the epoch began."""
        self.skipped = 0
        """Updates over this life that were not made because of a number that is not finite."""
        self.scaler = torch.amp.GradScaler("cuda") if precision == "16" else None
        self.torn = False
        """The optimizer raised in the middle of an update: the weights are worth nothing."""
        self.seconds = 0.0
        """About how long an update takes; 0 before the first."""
        self._compute = compute
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._move, self._door, self._device = move, door, device
        self._skip, self._log_every = skip, log_every
        self._clip_norm, self._clip_value = clip_norm, clip_value
        self._autocast = autocast(precision, device)
        self._one = torch.ones((), device=device)
        self._found = torch.zeros((), device=device)
        self._kernel_skips = device.type == "cuda" and bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._flags: list[Tensor] = []
        self._buffers = _running_statistics(model)
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._generator: Tensor | None = None
        # Batches since the burst began, and those of the group that is not updated yet:
        self._losses: list[Tensor] = []
        self._counts: list[int] = []
        self._logged: list[tuple[int, str, Any]] = []
        self._marks: list[tuple[int, int, float, float]] = []
        self._group = 0
        self._divisor = accumulate
        self._indices: list[Any] = []
        self._batch: Batch | None = None
        self._cursor: Cursor | None = None

    @property
    def taken(self) -> int:
        """Batches that were taken and are not part of a finished update yet."""
        return self._group

    @property
    def partial(self) -> bool:
        """Whether batches were taken that are not part of a finished update yet."""
        return self._group > 0

    def run(self, source: Source, *, updates: int | None, seconds: float, epoch: int, remaining: int | None) -> Report:
        """Make updates until `updates` are made, `seconds` are over, a request knocks, or nothing is ready.

        `epoch`: what the learning rate may depend on. `remaining`: batches that the epoch still has, as far as that is
        known: a last group that will be short is divided by its real size. An error is returned in the report; the
        batches of the group in which it came are as if they had not been taken.
        """
        report = Report(self.step + 1, began=time.perf_counter())
        before = self.seconds
        try:
            while True:
                ended = source.ended  # asked first: only then can nothing come after an empty hand
                batch = source.take()
                if batch is None:
                    if not (ended and self._group):
                        break
                else:
                    self._add(batch, remaining)
                    del batch
                    if remaining is not None:
                        remaining -= 1
                    if self._group < self.accumulate:
                        continue
                self._update(report, epoch)
                if report.updates == updates or self._door.pending:
                    break
                if time.perf_counter() - report.began + before > seconds:
                    break
        except Exception as error:
            report.error = explained(error, self._batch, f"step {self.step + 1}")
            self.undo()
        self._batch = None
        report.seconds = time.perf_counter() - report.began
        self._read(report)
        if report.updates:
            each = report.seconds / report.updates
            self.seconds = each if not before else 0.8 * before + 0.2 * each
        return report

    def undo(self) -> None:
        """Forget the batches of a group that was not updated: gradients, running statistics, random numbers."""
        if not self._group and self._batch is None:
            return
        self._optimizer.zero_grad(set_to_none=True)
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        if self._generator is not None:
            torch.default_generator.set_state(self._generator)
        keep = len(self._losses) - self._group
        del self._losses[keep:], self._counts[keep:]
        self._logged = [item for item in self._logged if item[0] < keep]
        self._begin_group()

    def _add(self, batch: Batch, remaining: int | None) -> None:
        """Forward and backward of one batch."""
        self._batch = batch
        if not self._group:
            if self._buffers:
                torch._foreach_copy_(self._kept, self._buffers)
            self._generator = torch.default_generator.get_state()
            short = remaining is not None and remaining < self.accumulate
            self._divisor = max(remaining or 1, 1) if short else self.accumulate
        batch = self._batch = self._move(batch)
        samples = len(batch)
        with self._autocast():
            loss, _, _, logged = self._compute(batch)
        _check_loss(loss)
        scaled = loss if self._divisor == 1 else loss / self._divisor
        if self._divisor != self.accumulate and self._group and samples != self._counts[-self._group]:
            scaled = scaled * (samples / self._counts[-self._group])
        (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
        place = len(self._losses)
        self._losses.append(loss.detach())
        self._counts.append(samples)
        if logged:
            self._logged += [(place, name, _plain(value)) for name, value in logged.items()]
        self._group += 1
        self._indices.append(batch.index)
        self._cursor = batch.cursor

    def _update(self, report: Report, epoch: int) -> None:
        """One update from the gradients of the group."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._weigh(gradients)
        if self._finite(gradients):
            if self._clip_value is not None:
                nn.utils.clip_grad_value_(self._parameters, self._clip_value)
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
            self.lr.before_update(self.step, epoch)
            self.torn = True
            if self.scaler is None:
                self._optimizer.step()
            else:
                self.scaler.step(self._optimizer)
                self.scaler.update()
            self.torn = False
            rate = get_lr(self._optimizer)
            self._optimizer.zero_grad(set_to_none=True)
            self.lr.after_update()
        else:
            rate = get_lr(self._optimizer)
            self._refuse(report)
        self.step += 1
        report.updates += 1
        report.lr = rate
        report.cursor = self._cursor
        if self.step % self._log_every == 0:
            self._marks.append((len(self._losses), self.step, rate, time.perf_counter()))
        self._begin_group()

    def _begin_group(self) -> None:
        self._group = 0
        self._indices.clear()
        self._batch = None

    def _weigh(self, gradients: list[Tensor]) -> None:
        """Bring the gradients of a short group to the mean over its samples."""
        if self._group == self._divisor == self.accumulate:
            return
        counts = self._counts[-self._group :]
        if self._divisor != self.accumulate:  # each was weighted by its size in terms of the first
            factor = self._divisor * counts[0] / sum(counts)
        else:
            factor = self._divisor / self._group
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)

    def _finite(self, gradients: list[Tensor]) -> bool:
        """Whether the update may be made; on CUDA the fused kernels look at the flag themselves."""
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
            return True
        values = [value for gradient in gradients for value in _values(gradient)]
        values += self._losses[-self._group :]
        if self._kernel_skips:
            if self._skip:
                self._found = torch.zeros((), device=self._device)  # else it stays: no later update is made either
            torch._amp_foreach_non_finite_check_and_unscale_(values, self._found, self._one)
            self._optimizer.found_inf = self._found  # type: ignore[attr-defined]
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]
            self._flags.append(self._found.clone())
            return True
        self._found.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(values, self._found, self._one)
        return not self._found.item()

    def _refuse(self, report: Report) -> None:
        """Not make this update: leave all as it was, and say so."""
        assert self._batch is not None or self._indices
        losses = [float(loss) for loss in self._losses[-self._group :]]
        problem = non_finite(self._batch, self._indices, losses, self.step + 1)
        if not self._skip:
            raise problem
        logger.warning("%s; the update is skipped", problem)
        self._optimizer.zero_grad(set_to_none=True)
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        keep = len(self._losses) - self._group
        self._logged = [item for item in self._logged if item[0] < keep]
        self._losses[keep:] = [torch.full_like(loss, float("nan")) for loss in self._losses[keep:]]
        report.skipped += 1
        self.skipped += 1

    def _read(self, report: Report) -> None:
        """Turn the finished updates' tensors into floats, once, and the marks into lines of the log."""
        done = len(self._losses) - self._group
        if not done:
            return
        losses = torch.stack([loss.reshape(()) for loss in self._losses[:done]]).tolist()
        if self._flags:
            self._read_flags(report, losses)
        named: dict[int, list[tuple[str, float]]] = {}
        for place, name, value in self._logged:
            if place < done:
                named.setdefault(place, []).append((name, float(value)))
        marks = iter([*self._marks, (-1, 0, 0.0, 0.0)])
        mark = next(marks)
        skipped = report.skipped > 0
        for place, (loss, samples) in enumerate(zip(losses, self._counts, strict=False)):
            if place == mark[0]:
                report.rows.append(self._row(mark, report.samples))
                mark = next(marks)
            report.samples += samples
            if skipped and loss != loss:
                continue
            report.loss_sum += loss * samples
            for name, value in [("loss", loss), *named.get(place, ())]:
                self.window.add(name, value, samples)
                self.means.add(name, value, samples)
        if mark[0] == done:
            report.rows.append(self._row(mark, report.samples))
        report.batches = done
        del self._losses[:done], self._counts[:done]
        self._logged = [(place - done, name, value) for place, name, value in self._logged if place >= done]
        self._marks.clear()

    def _read_flags(self, report: Report, losses: list[float]) -> None:
        """On CUDA: which updates the kernels left out, known only now."""
        flags = torch.stack(self._flags).tolist()
        self._flags.clear()
        bad = [number for number, flag in enumerate(flags) if flag]
        if not bad:
            return
        step = report.first_step + bad[0]
        problem = non_finite(None, [], losses, step)
        if self._skip:
            logger.warning("%s; %d updates are skipped", problem, len(bad))
            report.skipped += len(bad)
            self.skipped += len(bad)
        elif report.error is None:
            report.error = problem

    def _row(self, mark: tuple[int, int, float, float], samples: int) -> Row:
        _, step, rate, at = mark
        values = self.window.compute()
        self.window.reset()
        return Row(step, samples, at, {**values, "lr": rate})


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What the forward pass and the loss run under."""
    if precision == "32":
        nothing: AbstractContextManager[Any] = nullcontext()
        return lambda: nothing
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype)


def _check_loss(loss: Any) -> None:
    if type(loss) is Tensor and loss.requires_grad and loss.numel() == 1:
        return
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"the loss is {'missing' if loss is None else f'a {type(loss).__name__}, not a tensor'}",
            hint="Give loss=, or have step= return the loss, or a dict with a 'loss'.",
        )
    if loss.numel() != 1:
        raise ConfigError(
            f"the loss must be one number, but has the shape {tuple(loss.shape)}", hint="Average it: loss.mean()."
        )
    if not loss.requires_grad:
        raise ConfigError(
            "the loss does not depend on any parameter that requires a gradient",
            hint="Was it detached, or computed under no_grad?",
        )


def _values(gradient: Tensor) -> list[Tensor]:
    """The numbers of a gradient as the fused check takes them."""
    if gradient.is_sparse:
        return [gradient._values()]
    return [torch.view_as_real(gradient)] if gradient.is_complex() else [gradient]


def _plain(value: Any) -> Any:
    return value.detach().double().mean() if isinstance(value, Tensor) else value


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """Buffers that a forward pass changes: what an update that is not made has to give back."""
    layers = [layer for layer in model.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
