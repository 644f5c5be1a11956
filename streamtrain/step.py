"""A burst: some batches through forward, loss, backward, clip and update, in plain synchronous torch.

Its law: what a burst leaves behind is whole updates. Nothing but tensors without a graph outlives a batch, the numbers
are read once a burst, and an update whose loss or gradients are not finite is not made. It knows nothing of loops,
epochs or files, and runs on the train thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamtrain.averaging import Average
from streamtrain.blame import Culprit, explained, no_loss, non_finite
from streamtrain.data.batch import Batch, Cursor
from streamtrain.device import MoveBatch, autocast, generators
from streamtrain.errors import DataError, NonFiniteError, StreamtrainError
from streamtrain.flagged import LOWEST, Flag, Flags, Rates, scaled_after
from streamtrain.outcome import Compute
from streamtrain.rollback import Rollback
from streamtrain.running_statistics import RunningStatistics
from streamtrain.schedulers import FixedLearningRate, LearningRate, get_lr
from streamtrain.spikes import Spikes
from streamtrain.tally import Report, Tally
from streamtrain.unrecorded import drop_gradients, make_update

logger = logging.getLogger(__name__)

Gauge = Callable[[Optimizer, int], Mapping[str, float]]
"""`gauge(optimizer, epoch)`: numbers for a line of the log, read on the train thread right after its update."""


class Source(Protocol):
    """Where a burst's batches come from."""

    ended: bool

    def take(self) -> Batch | None:
        """The next batch; None if there is none now."""


class Door(Protocol):
    """Where requests knock."""

    pending: bool


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
        average: Average | None = None,
        rollback: Rollback | None = None,
        moves: bool = False,
        graphs: bool = False,
    ) -> None:
        """`moves`: `move` does something even to tensors on the CPU. `graphs`: the model runs in CUDA graphs."""
        self.step = 0
        """Updates made over the run's life."""
        self.lr = lr
        self.accumulate = accumulate
        """Batches of a full update."""
        self.tally = Tally(own=("lr",) if clip_norm is None else ("lr", "grad_norm"))
        self.gauges: tuple[Gauge, ...] = ()
        """Asked at each line of the log, and never else."""
        self.skipped = 0
        """Updates over this life that were not made because of a number that is not finite."""
        self.scaler = torch.amp.GradScaler(device.type) if precision == "16" else None
        self.torn = False
        """The optimizer raised in the middle of an update: the weights are worth nothing."""
        self.seconds = 0.0
        """About how long an update takes; 0 before the first."""
        self._compute = compute
        self._optimizer = optimizer
        self._parameters = _parameters(optimizer)
        self._order = {id(parameter): number for number, parameter in enumerate(model.parameters())}
        """A norm is summed in the model's order, as in the loops of others, however the optimizer groups them."""
        self.spikes = Spikes()
        """Of the gradients' norms, where these are clipped."""
        self._odd = _has_odd_gradients(model)
        self._narrow = False
        """The device's check takes no bfloat16: CUDA's."""
        self._scheduled = not isinstance(lr, FixedLearningRate)
        self._rated = lr.interval in ("samples", "time")
        self._samples, self._elapsed = 0, 0.0
        self._before = 0, 0
        """Batches of the epoch and samples of the run before the burst."""
        self._move, self._door, self._device = move, door, device
        self._behind = device.type == "cuda"
        """Updates are queued faster than they are made: how long they take is known once the burst's end is read."""
        self._moves, self._graphs = moves or device.type != "cpu", graphs
        self._skip, self._log_every = skip, log_every
        self._average, self._rollback = average, rollback
        self._clip_norm, self._clip_value = clip_norm, clip_value
        self._autocast = None if precision == "32" else autocast(precision, device)
        self.culprit: Culprit | None = None
        """The batch that was computed when an error came up."""
        self._one = torch.ones((), dtype=torch.float32, device=device)  # torch's check takes no other
        self._found = torch.zeros((), dtype=torch.float32, device=device)
        self._epoch = 0
        self._kernel_skips = device.type == "cuda" and bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._looks = accumulate > 1 and device.type == "cpu"
        """Each loss of a group is looked at as it comes, while its batch is there; elsewhere that would wait."""
        self._flags = Flags(device, lasting=not skip)
        self._rates: Rates | None = None
        self._scale: dict[str, Any] = {}
        """The scaler's state when the burst began."""
        self._statistics = RunningStatistics(model)
        self._sources = generators(device)
        self._generators: list[Tensor] = []
        # The group of batches that is not updated yet:
        self._group = 0
        self._divisor = accumulate
        self._indices: list[Any] = []
        self._batch: Batch | None = None
        self._suspect: tuple[int, Batch] | None = None
        """The first batch of it whose loss is not finite."""
        self._loss: Any = None
        self._running: int | None = None
        """The thread that makes updates just now."""
        self._cursor: Cursor | None = None

    @property
    def taken(self) -> int:
        """Batches that were taken and are not part of a finished update yet, those without rows too; between bursts."""
        return self._group + len(self.tally.passed)

    @property
    def partial(self) -> bool:
        """Whether batches were taken that are not part of a finished update yet."""
        return self._group > 0

    def run(
        self,
        source: Source,
        *,
        updates: int | None,
        seconds: float,
        epoch: int,
        remaining: int | None,
        batches: int = 0,
        samples: int = 0,
        elapsed: float = 0.0,
    ) -> Report:
        """Make updates until `updates` are made, about `seconds` are over, a request knocks, or nothing is ready.

        `epoch`, `samples` (trained before) and `elapsed` (seconds of the run so far): what the learning rate may depend
        on. `batches`: trained of the epoch before. `remaining`: batches that the epoch still has, as far as that is
        known: a last group that will be short is divided by its real size. An error is returned in the report; the
        batches of the group in which it came are as if they had not been taken.
        """
        report = Report(self.step + 1, before=samples, began=time.perf_counter())
        self._samples, self._elapsed = samples, elapsed
        self._before = batches, samples
        before, self._epoch, asked = self.seconds, epoch, False
        self._running = threading.get_ident()
        try:
            try:
                self._begin()
                while True:
                    ended = source.ended  # asked first: only then can nothing come after an empty hand
                    if not self._group:  # before the batch is taken: a source that is pulled draws from them too
                        self._generators = [generator.get_state() for generator in self._sources]
                        asked = True
                    batch = source.take()
                    asked = False
                    if batch is None:
                        if self._group and not ended and source.ended:
                            continue  # the last look told: a group that is left waiting costs the next life its draws
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
                    if report.updates == updates or self._door.pending or (self._flags and self._wants_flags()):
                        break
                    spent = time.perf_counter() - report.began
                    if self._behind:
                        spent = max(spent, report.updates * before)
                    if spent + before / 2 >= seconds:
                        break  # one more would end further from them than this one has
            except BaseException as error:  # a user's sys.exit() too: it must not end the host's loop
                report.error = no_loss(error, self._loss) or explained(error, self._batch, f"step {self.step + 1}")
                pulling = isinstance(error, StreamtrainError) and self._group < self.accumulate and not source.ended
                self.culprit = None if pulling else Culprit.of(self._batch, self.step + 1)
                try:
                    if asked:  # what it drew before it raised
                        self._set_generators(self._generators)
                    self.undo()
                except Exception:  # all the rest of it is done, and what the user gets is the error
                    logger.exception("dropping the gradients after the error failed")
            self._batch = self._loss = self._running = None
            try:
                self._read(report)
            finally:
                report.seconds = time.perf_counter() - report.began
        except BaseException as error:  # the device itself has failed: nobody knows what it holds
            self.torn = True
            report.error = report.error or explained(error, None, f"step {self.step + 1}")
        if report.updates:
            each = report.seconds / report.updates
            self.seconds = each if not before else 0.8 * before + 0.2 * each
        return report

    def _begin(self) -> None:
        """What a burst must know before its first batch."""
        if self._rollback is not None and not self._group:
            self._rollback.keep(self.step)
        self._parameters = _parameters(self._optimizer)  # a callback may have added a group between bursts
        if self._clip_norm is not None:
            self._parameters.sort(key=lambda parameter: self._order.get(id(parameter), len(self._order)))
        if self.scaler is not None:
            self._scale = self.scaler.state_dict()
        late = self._kernel_skips or self.scaler is not None
        self._rates = Rates(self.lr, self._optimizer) if late and self._scheduled else None

    def _read(self, report: Report) -> None:
        """What the burst came to: all that has to be asked of the device, and was not asked before."""
        if self._flags:
            self._read_flags(report)
            if self._rollback is not None and report.error is None:
                self._rollback.keep(self.step)
        report.lr = get_lr(self._optimizer)
        if self._clip_norm is not None:
            for step, norm in self.tally.take_norms():
                self.spikes.offer(step, (norm,))
        self.tally.read(report, len(self.tally.losses) - self._group)

    def made_here(self) -> tuple[int, int] | None:
        """Batches of the epoch and samples of the run that are trained by now, to the last update of the burst under
        way; None outside of it."""
        if self._running != threading.get_ident():
            return None
        done = len(self.tally.counts) - self._group
        return self._before[0] + done, self._before[1] + sum(self.tally.counts[:done])

    def number(self) -> int:
        """Of the batch that is computed just now, in its epoch, from 0; those without rows are not counted."""
        return self._before[0] + len(self.tally.counts)

    def gauged(self) -> dict[str, float]:
        """What a line of the log says beside the means: the learning rate, and what the gauges read."""
        values = {"lr": get_lr(self._optimizer)}
        for gauge in self.gauges:
            values.update(gauge(self._optimizer, self._epoch))
        return values

    def undo(self) -> None:
        """Forget the batches of a group that was not updated: gradients, running statistics, random numbers.

        All of it is done though a part raises, as an optimizer's own `zero_grad` may; where statistics or random
        numbers stay those of half a group, the weights count as torn.
        """
        if not self._group and self._batch is None:
            return
        with ExitStack() as stack:  # from below
            stack.callback(self._begin_group)
            stack.callback(self.tally.drop, self._group)
            stack.callback(self._give_back)
            self._zero_grad()

    def _give_back(self) -> None:
        try:
            self._statistics.give_back()
            self._set_generators(self._generators)
        except BaseException:
            self.torn = True
            raise

    def take_over(self, other: TrainStep) -> None:
        """Go on with what another step of the same run has learned of gradients: their usual norm, and fp16's scale."""
        self.spikes = other.spikes
        if self.scaler is not None and other.scaler is not None:
            self.scaler.load_state_dict(other.scaler.state_dict())

    def _set_generators(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._sources, states, strict=False):
            generator.set_state(state)

    def _add(self, batch: Batch, remaining: int | None) -> None:
        """Forward and backward of one batch."""
        self._batch = batch
        if not self._group:
            self._remember()
            if self.accumulate > 1:
                short = remaining is not None and remaining < self.accumulate
                self._divisor = max(remaining or 1, 1) if short else self.accumulate
        inputs = batch.inputs
        if self._moves or type(inputs) is not Tensor or type(batch.targets) is not Tensor or inputs.is_inference():
            batch = self._batch = self._move(batch)
            samples = len(batch)
        else:  # nearly every batch on the CPU: nothing to move, and each call here is one of its microseconds
            samples = len(inputs) if inputs.ndim else len(batch)
        if not samples:
            self.tally.pass_over()  # a filter dropped every row: its mean is no number
            return
        if self._autocast is None:
            loss, _, _, logged = self._compute(batch)
        else:
            with self._autocast():
                loss, _, _, logged = self._compute(batch)
        self._loss = loss
        if self._looks and self._suspect is None and not math.isfinite(loss.item()):
            self._suspect = self._group, batch  # kept for its data to be looked at, should the update be refused
        tally = self.tally
        if self._divisor > 1 or self.scaler is not None:
            self._scaled(loss, samples).backward()
        else:
            loss.backward()
        if logged:
            tally.add_logged(logged)
        tally.losses.append(loss.detach().clone() if self._graphs else loss.detach())
        tally.counts.append(samples)
        self._group += 1
        index = batch.index
        if self._outlives and isinstance(index, Tensor):
            index = index.clone()  # it outlives its batch: a view would keep a whole block of the stream's memory
        self._indices.append(index)
        self._cursor = batch.cursor
        self._loss = None

    def _remember(self) -> None:
        """What is put back, beside random numbers, if the group that begins is not updated.

        Where the model runs in CUDA graphs torch is told that what they gave before may be written over; not between
        the batches of a group, whose gradients lie there too (torch's documentation of CUDAGraph Trees).
        """
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if self._statistics:
            self._statistics.keep()

    @property
    def _outlives(self) -> bool:
        """Whether sample numbers are kept for longer than their batch."""
        return self.accumulate > 1 or self._kernel_skips or self.scaler is not None

    def _scaled(self, loss: Tensor, samples: int) -> Any:
        """This batch's part of its update's loss."""
        scaled = loss if self._divisor == 1 else loss / self._divisor
        if self._divisor != self.accumulate and self._group:
            first = self.tally.counts[-self._group]
            if samples != first:
                scaled = scaled * (samples / first)
        return scaled if self.scaler is None else self.scaler.scale(scaled)

    def _update(self, report: Report, epoch: int) -> None:
        """One update from the gradients of the group."""
        optimizer = self._optimizer
        gradients = [gradient for p in self._parameters if (gradient := p.grad) is not None]
        if self._group != self.accumulate or self._divisor != self.accumulate:
            self._weigh(gradients)
        if self._rated:
            since = time.perf_counter() - report.began
            self.lr.before_update(self.step, epoch, self._samples, self._elapsed + since)
        elif self._scheduled:
            self.lr.before_update(self.step, epoch)
        if self._finite(gradients):
            if self._clip_value is not None:
                nn.utils.clip_grad_value_(self._parameters, self._clip_value)
            if self._clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
                self.tally.add_norm(norm, self.step + 1)
            self.torn = True
            flag = self._flags.last
            try:
                if self.scaler is not None:
                    self.scaler.step(optimizer)
                    self.scaler.update()
                elif flag is None:
                    make_update(optimizer)
                elif self._odd:
                    self._step_if_good(flag)
                else:
                    kernel: Any = optimizer
                    kernel.found_inf, kernel.grad_scale = flag.bad, None
                    try:
                        make_update(optimizer)
                    finally:  # it is the user's, who may step it by himself after the fit
                        del kernel.found_inf, kernel.grad_scale
            except StreamtrainError:
                raise
            except BaseException as error:
                raise self._of_optimizer(error, optimizer) from error
            if flag is not None and self._statistics:
                self._statistics.give_back_where(flag.bad)
            if self._average is not None:
                self._average.update(None if flag is None else flag.left_out)
            if (self.step + 1) % self._log_every == 0:
                self.tally.mark(self.step + 1, self.gauged())
            del gradients
            self._zero_grad()
        else:
            self._refuse(report)
            self._optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask for it
        if self._scheduled:
            self.lr.after_update()
        self._end_group(report)
        if self._rollback is not None and not self._flags:
            self._rollback.keep(self.step)

    def _of_optimizer(self, error: BaseException, optimizer: Optimizer) -> StreamtrainError:
        """What an optimizer raised, as its own: no line of the model's is to be looked for. A GPU tells of the model's
        mistakes there too."""
        who = f"the {'' if self._device.type == 'cpu' else 'model, loss or '}optimizer {type(optimizer).__name__}"
        return explained(error, self._batch, f"step {self.step + 1}", who=who)

    def _end_group(self, report: Report) -> None:
        """Count the update that was made of the group, or refused; until then its weights are those of no step."""
        if self._rated:
            self._samples += sum(self.tally.counts[-self._group :])
        self.step += 1
        report.updates += 1
        report.cursor = self._cursor
        self._begin_group()
        self.torn = False

    def _zero_grad(self) -> None:
        drop_gradients(self._optimizer, self._parameters)

    def _begin_group(self) -> None:
        self._group = 0
        self._indices.clear()
        self._batch = self._suspect = None

    def _weigh(self, gradients: list[Tensor]) -> None:
        """Bring the gradients of a short group to the mean over its samples; over its batches, as of a whole group,
        where nobody knew before that it would be short."""
        counts = self.tally.counts[-self._group :]
        if self._divisor != self.accumulate:  # each was weighted by its size in terms of the first
            factor = self._divisor * counts[0] / sum(counts)
        else:
            factor = self._divisor / self._group
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)

    def _finite(self, gradients: list[Tensor]) -> bool:
        """Whether the update may be made; on CUDA the fused kernels look at the flag themselves."""
        if self.scaler is not None:
            return self._unscaled(self.scaler)
        return self._looked_at([*gradients, *self.tally.losses[-self._group :]])

    def _looked_at(self, numbers: list[Tensor]) -> bool:
        """The same of these gradients and losses, whatever their layout and dtype."""
        values = [_dense(value) for value in numbers] if self._odd else numbers
        try:
            return self._checked(_sums(values) if self._narrow else values)
        except NotImplementedError:
            if not self._odd and any(value.is_sparse or value.is_complex() for value in values):
                self._meet_odd()
            elif not self._narrow and any(value.dtype is torch.bfloat16 for value in values):
                self._narrow = True
            else:
                raise
            return self._looked_at(numbers)

    def _meet_odd(self) -> None:
        """A gradient is sparse though no module says so: from now on each is looked at, by kernels that take it."""
        self._odd = True
        for group in self._optimizer.param_groups:
            if group.get("fused"):
                group["fused"] = False

    def _unscaled(self, scaler: torch.amp.GradScaler) -> bool:
        """Gradients without fp16's scale; the scaler leaves the update out where they overflow, or the loss has."""
        scaler.unscale_(self._optimizer)
        bad = self._flags.raised(self.tally.losses[-self._group :])
        left_out = bad
        for left_out in scaler._found_inf_per_device(self._optimizer).values():
            torch.maximum(left_out, bad, out=left_out)
        self._flag(bad, left_out)
        return True

    def _flag(self, bad: Tensor, left_out: Tensor) -> None:
        place = len(self.tally.losses) - self._group
        self._flags.add(Flag(bad, left_out, place, self._cursor, self._indices.copy(), self._generators))

    def _checked(self, values: list[Tensor]) -> bool:
        found = self._found
        if self._kernel_skips:
            found = self._flags.raised(values)
            self._flag(found, found)
            return True
        torch._amp_foreach_non_finite_check_and_unscale_(values, found, self._one)
        if found.item():
            found.zero_()
            return False
        return True

    def _step_if_good(self, flag: Flag) -> None:
        """The update by kernels that take sparse gradients, which know of no flag: it is read before."""
        if flag.bad.item():
            self._optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask for it
        else:
            make_update(self._optimizer)

    def _refuse(self, report: Report) -> None:
        """Not make this update: leave all as it was, and say so."""
        losses = [float(loss) for loss in self.tally.losses[-self._group :]]
        at, batch = (len(losses) - 1, self._batch) if self._suspect is None else self._suspect
        problem = non_finite(batch, self._indices, losses, self.step + 1, at=at)
        back = self._rollback is not None and not isinstance(problem, DataError)  # good weights meet bad data
        if not self._skip and self._rollback is None:
            raise problem
        if not back:
            logger.warning("%s; the update is skipped", problem)
        self._zero_grad()
        self._statistics.give_back()
        if back and self._rollback is not None:
            self._rollback.back(problem, self.step + 1)
        self.tally.leave_out(self._group)
        if (self.step + 1) % self._log_every == 0:
            self.tally.mark(self.step + 1, self.gauged())
        report.skipped += 1
        self.skipped += 1

    def _wants_flags(self) -> bool:
        """Whether the flags must be read before the next update: which batches a rollback gives up must not depend on
        where a burst ends; or fp16's scale may be at the lowest, since each update can halve it."""
        if self._rollback is not None:
            return True
        if self.scaler is None or self._skip:
            return False
        least: float = self._scale["scale"] * self._scale["backoff_factor"] ** len(self._flags)
        return least <= LOWEST

    def _read_flags(self, report: Report) -> None:
        """Which updates were left out, known only now: pass over them, or put everything back to before the first."""
        flags, bad, left_out = self._flags.take()
        ends = [*(flag.place for flag in flags[1:]), len(self.tally.losses) - self._group]
        scale = None if self.scaler is None else float(self.scaler.get_scale())
        if scale is not None and left_out[-1] and scale <= LOWEST and not self._skip:
            bad = [*bad[:-1], True]
        self.tally.leave_out_norms(ends[at] - 1 for at, out in enumerate(left_out) if out)
        report.skipped = sum(left_out)
        if self._average is not None:
            self._average.leave_out(report.skipped)
        if True in bad:
            first = bad.index(True)
            losses = [float(loss) for loss in self.tally.losses[flags[first].place : ends[first]]]
            problem = non_finite(None, flags[first].indices, losses, report.first_step + first, scale=scale)
            error = self._passed_over(problem, report.first_step + first, bad, left_out)
            if error is not None:
                if report.error is not None:  # of a batch that the run has not come to now
                    logger.warning("behind it came up in the same burst: %s", report.error)
                report.error = error
                self.culprit = self._culprit(flags[first], losses, report.first_step + first)
                self._back_to(report, flags, first, left_out)
            else:
                for at, refused in enumerate(bad):
                    if refused:
                        self.tally.leave_out_places(range(flags[at].place, ends[at]))
        self.skipped += report.skipped

    def _culprit(self, flag: Flag, losses: list[float], step: int) -> Culprit | None:
        """The batch of update `step`, which was left out, whose loss is not finite, or its last; `losses`: of each."""
        if flag.cursor is None:
            return None
        at = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), len(losses) - 1)
        return Culprit.gone(flag.indices[at], flag.cursor, self.tally.counts[flag.place + at], step)

    def _passed_over(
        self, problem: StreamtrainError, step: int, bad: list[bool], left_out: list[bool]
    ) -> StreamtrainError | None:
        """Go on without the bad updates, of which `step` is the first; else what is to be raised."""
        if self._rollback is not None:
            try:
                self._rollback.back(problem, step)
            except NonFiniteError as error:
                return error
            self._flags.lower()
            if self.scaler is not None:  # not halved by those that were given up; from the lowest it begins anew
                after = scaled_after(self._scale, left_out[: bad.index(True) + 1])
                self.scaler.load_state_dict({**after, "scale": 2.0**16} if after["scale"] <= LOWEST else after)
            return None
        if self._skip:
            logger.warning("%s; %d updates are skipped", problem, sum(bad))
            return None
        return problem

    def _back_to(self, report: Report, flags: list[Flag], first: int, left_out: list[bool]) -> None:
        """All is as it was before update `first` of the burst, which is not made, nor any later one."""
        self.undo()  # of a group that was begun after them
        report.updates, report.skipped = first, sum(left_out[:first])
        report.cursor = flags[first - 1].cursor if first else None
        self.step = report.first_step + first - 1
        place = flags[first].place
        if self._rates is not None:
            samples = self._samples - sum(self.tally.counts[place:])
            self._rates.count(self.step - first, first, self._epoch, samples, self._elapsed)
        self.tally.drop(len(self.tally.losses) - place)
        self._set_generators(flags[first].generators)
        if self.scaler is not None:
            self.scaler.load_state_dict(scaled_after(self._scale, left_out[:first]))


def _parameters(optimizer: Optimizer) -> list[Any]:
    """All that it updates, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _dense(gradient: Tensor) -> Tensor:
    """The numbers of a gradient as the fused check takes them."""
    if gradient.is_sparse:
        return gradient._values()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _sums(values: list[Tensor]) -> list[Tensor]:
    """The same with one number for each tensor of bfloat16, which CUDA's check does not take: the sum of its
    magnitudes in float32, which is finite where they are, unless gradients come near 1e38 divided by their number."""
    narrow = [value for value in values if value.dtype is torch.bfloat16]
    if not narrow:
        return values
    sums = torch._foreach_norm(narrow, 1, dtype=torch.float32)
    return [*(value for value in values if value.dtype is not torch.bfloat16), torch.stack(sums)]


def _has_odd_gradients(model: nn.Module) -> bool:
    """Whether a gradient may be sparse or complex."""
    sparse = any(getattr(module, "sparse", False) for module in model.modules())
    return sparse or any(parameter.is_complex() for parameter in model.parameters())
