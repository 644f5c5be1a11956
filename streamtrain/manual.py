"""Manual mode: a training step of the user's that makes its updates itself, of one optimizer after another.

    def training_step(self, model, batch):
        fake = model.gen(batch.inputs)
        self.manual_update(d_loss(model.disc(batch.targets), model.disc(fake.detach())), "disc")
        self.manual_update(g_loss(model.disc(fake)), "gen")

One call of the step is one step, however many updates it makes. Each of these is a bare loop's: gradients dropped,
backward, clipped (by each optimizer for itself), the optimizer stepped, gradients dropped. A function given as `step=`
takes `update` as a third argument.

Its law: an update whose loss or gradients are not finite is not made; where one of the same batch was made before it,
the weights are no step's any more, so that a run goes on from its last checkpoint.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamtrain.blame import non_finite
from streamtrain.data.batch import Batch
from streamtrain.errors import ConfigError, StreamtrainError
from streamtrain.flagged import LOWEST
from streamtrain.outcome import Compute, Outcome
from streamtrain.several_optimizers import Optimizers
from streamtrain.step import Source, TrainStep
from streamtrain.tally import Report, Tally
from streamtrain.unrecorded import make_update

logger = logging.getLogger(__name__)


class ManualUpdates:
    """What `manual_update` reaches: the step that is under way, or none."""

    def __init__(self) -> None:
        self.step: ManualStep | None = None
        self.active = False
        """A training step of the user's is being computed."""
        self.training = False
        """It is one of a fit's own, not of an evaluation."""
        self._losses: list[Tensor] = []

    def update(self, loss: Any, name: str, **backward: Any) -> bool:
        """Update by `loss` what the optimizer `name` holds; whether it was made. In validation only the loss is
        counted. Raises ConfigError."""
        if not self.active:
            raise ConfigError(
                "manual_update is for the training_step of a fit with optimizer={name: ..., name: ...}",
                hint="With one optimizer return the loss; several are a table without 'name'.",
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"the shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise ConfigError(
                f"manual_update needs a loss of one number, not one of {what}", hint="Average it: .mean()"
            )
        self._losses.append(loss.detach())
        if not self.training:
            return False
        assert self.step is not None
        return self.step.update(loss, name, backward)

    def given(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The user's function with `update`, if it takes one."""
        if "update" in inspect.signature(function).parameters:
            return partial(function, update=self.update)
        return function

    def compute(self, function: Callable[[Batch], Any]) -> Compute:
        """What a batch comes to: the sum of the losses that were given to `update`, and what more the step returned."""

        def compute(batch: Batch) -> Outcome:
            self._losses, self.active = [], True
            try:
                made = function(batch)
            finally:
                self.active = False
            rest: Mapping[str, Any] = made if isinstance(made, Mapping) else {}
            if (made is not None and not isinstance(made, Mapping)) or "loss" in rest:
                raise ConfigError(
                    "a training_step with several optimizers returns no loss: nobody would know whose it is",
                    hint="Call self.manual_update(loss, name), and return None or a dict of more to log.",
                )
            logged = {key: value for key, value in rest.items() if key not in ("outputs", "targets")}
            losses, self._losses = self._losses, []
            total = sum(losses[1:], losses[0]) if losses else None
            return Outcome(total, rest.get("outputs"), rest.get("targets", batch.targets), logged)

        return compute


class ManualStep(TrainStep):
    """A step whose updates the user's function asks for."""

    def __init__(self, model: nn.Module, optimizer: Optimizers, *arguments: Any, updates: ManualUpdates, **more: Any):
        super().__init__(model, optimizer, *arguments, **more)
        self.tally = Tally(own=("lr",))  # norms of several optimizers are clipped, and not logged
        self._members, self._epoch = optimizer.members, 0
        self._made = self._refused = self._overflowed = 0
        self._unscaled_since: set[str] = set()
        """The optimizers whose gradients were unscaled since fp16's scale was last changed."""
        self._kernel_skips = self._told = False
        self._updates, updates.step = updates, self

    def run(self, source: Source, *, epoch: int, **how: Any) -> Report:
        """As in the automatic mode; when the burst began is known before the first update of a batch."""
        self._began = time.perf_counter()
        return super().run(source, epoch=epoch, **how)

    def _add(self, batch: Batch, remaining: int | None) -> None:
        """One call of the user's step, which makes its updates."""
        self._batch = batch
        self._remember()
        batch = self._batch = self._move(batch)
        samples = len(batch)
        if not samples:
            self.tally.pass_over()
            return
        self._made = self._refused = self._overflowed = 0
        if self._rated:
            since = time.perf_counter() - self._began
            self.lr.before_update(self.step, self._epoch, self._samples, self._elapsed + since)
        elif self._scheduled:
            self.lr.before_update(self.step, self._epoch)
        self._updates.training = True
        try:
            if self._autocast is None:
                loss, _, _, logged = self._compute(batch)
            else:
                with self._autocast():
                    loss, _, _, logged = self._compute(batch)
        finally:
            self._updates.training = False
        if logged:
            self.tally.add_logged(logged)
        counted = torch.zeros((), device=self._device) if loss is None else loss
        self.tally.losses.append(counted.clone() if self._graphs else counted)
        self.tally.counts.append(samples)
        self._group += 1
        if self._refused:
            self.tally.leave_out(1)
        elif loss is None:
            self.tally.without_loss()
        if loss is None and not self._told:
            self._told = True
            logger.warning(
                "step %d made no update: training_step did not call manual_update, and nothing was learned from its "
                "batch; a loss that it returns among others to log is only logged",
                self.step + 1,
            )
        self._indices.append(batch.index)
        self._cursor = batch.cursor

    def update(self, loss: Tensor, name: str, backward: Mapping[str, Any]) -> bool:
        """One update of one optimizer; whether it was made."""
        if name not in self._members:
            known = ", ".join(map(repr, self._members))
            raise ConfigError(f"manual_update: there is no optimizer {name!r}", hint=f"There are: {known}.")
        self._zero_grad()
        if name in self._unscaled_since:  # a second time in this step
            self._change_scale()
        with torch.autocast(self._device.type, enabled=False):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward(**backward)  # type: ignore[no-untyped-call]
            made = self._stepped(name, loss)
        self._zero_grad()
        return made

    def _change_scale(self) -> None:
        """As its last gradients tell; torch takes those of each optimizer once between two times."""
        if self.scaler is not None and self._unscaled_since:
            self.scaler.update()
            self._unscaled_since.clear()

    def _stepped(self, name: str, loss: Tensor) -> bool:
        optimizer = self._members[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [gradient for p in parameters if (gradient := p.grad) is not None]
        if self.scaler is not None:
            if not self._scaled_well(self.scaler, name, loss):
                return False
        elif not self._looked_at([*gradients, loss.detach()]):
            return self._refused_one(loss)
        if self._clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self._clip_value)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        self._made += 1
        self.torn = True
        try:
            if self.scaler is None:
                make_update(optimizer)
            else:
                self.scaler.step(optimizer)
        except StreamtrainError:
            raise
        except BaseException as error:
            raise self._of_optimizer(error, optimizer) from error
        return True

    def _scaled_well(self, scaler: torch.amp.GradScaler, name: str, loss: Tensor) -> bool:
        """Have the gradients of one optimizer without fp16's scale; whether its update may be made. Where they overflow
        it is left out, and the next scale is a smaller one, down to where that can't be the scale's fault."""
        if not math.isfinite(loss.item()):
            return self._refused_one(loss)
        optimizer = self._members[name]
        scaler.unscale_(optimizer)
        self._unscaled_since.add(name)
        if not any(found.item() for found in scaler._found_inf_per_device(optimizer).values()):
            return True
        scale = float(scaler.get_scale())
        if scale <= LOWEST and not self._skip:
            return self._refused_one(loss, scale)
        self._overflowed += 1
        return False

    def _refused_one(self, loss: Tensor, scale: float | None = None) -> bool:
        index = [self._batch and self._batch.index]
        problem = non_finite(self._batch, index, [float(loss.detach())], self.step + 1, scale=scale)
        if not self._skip:
            raise problem
        logger.warning("%s; the update is skipped", problem)
        self._refused += 1
        return False

    def _update(self, report: Report, epoch: int) -> None:
        """The end of a step: what all its updates have in common."""
        self._change_scale()
        if self._refused:
            self._statistics.give_back()  # not earlier: a graph of the same batch may need them as they are
        if self._refused or self._overflowed:
            report.skipped += 1
            self.skipped += 1
        if self._average is not None and self._made:
            self._average.update()
        if (self.step + 1) % self._log_every == 0:
            self.tally.mark(self.step + 1, self.gauged())
        if self._scheduled:
            self._optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask for it
            self.lr.after_update()
        self._end_group(report)
