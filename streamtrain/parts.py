"""What is trained, and with what: model, loss, optimizer, schedule, metrics, random state, and how they are made.

Its law: nothing here knows of epochs, files or limits of a run beyond what a schedule must be told.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from streamtrain.averaging import Average
from streamtrain.callbacks.bus import Bus
from streamtrain.compiling import Compiled, runs_in_graphs
from streamtrain.data.batch import Batch
from streamtrain.data.budget import format_bytes
from streamtrain.data.iterable import IterableStream
from streamtrain.data.source import Stream
from streamtrain.device import deterministic_kernels
from streamtrain.differences import check_weights, habits, other_rate, schedule_name, settings
from streamtrain.errors import CheckpointError, ConfigError, DataError
from streamtrain.evaluation import evaluating
from streamtrain.expanded import own_memory, refuse_trained
from streamtrain.freezing import Freezing
from streamtrain.learned import Learned
from streamtrain.life import Life, first_rng
from streamtrain.manual import ManualStep, ManualUpdates
from streamtrain.objective import Objective, UserSteps
from streamtrain.optimizers import OptimizerSpec, build_optimizer, check_lr
from streamtrain.options import Limits, Options
from streamtrain.outside_changes import digest
from streamtrain.parameter_groups import table
from streamtrain.progress import Progress
from streamtrain.recomputing import recompute
from streamtrain.refusing import refusing
from streamtrain.rng import Rng
from streamtrain.rollback import Rollback
from streamtrain.schedulers import LearningRate, SchedulerSpec, build_scheduler
from streamtrain.several_optimizers import build_optimizers, is_several
from streamtrain.state import Snapshot
from streamtrain.step import Door, Gauge, TrainStep
from streamtrain.streams import behind, least, length
from streamtrain.supply import supply
from streamtrain.switching import Switch, switch_of
from streamtrain.taking_up import check_schedule, check_state
from streamtrain.tasks import Losses, modules_of
from streamtrain.threads import TrainThread
from streamtrain.toggled import Toggled
from streamtrain.unkept import Unkept
from streamtrain.untrained import Untrained
from streamtrain.warm_start import begin_with

T = TypeVar("T")
logger = logging.getLogger(__name__)
LONG = 1 << 20
"""Epochs, or steps of one, that no run has."""


class Parts:
    """The live objects of one trainer."""

    def __init__(
        self,
        model: nn.Module,
        loss: Losses | None,
        options: Options,
        *,
        loss_weights: Mapping[Any, float] | Sequence[float] | None = None,
        optimizer: OptimizerSpec,
        lr: float,
        scheduler: SchedulerSpec,
        metrics: Mapping[str, Any],
        steps: UserSteps,
    ) -> None:
        self.model, self.options = model, options
        self.objective = Objective(
            model,
            loss,
            options,
            weights=loss_weights,
            metrics=metrics,
            steps=steps,
            manual=ManualUpdates() if is_several(optimizer) else None,
        )
        self.lr, self.optimizer_spec, self.scheduler_spec = check_lr(lr), optimizer, scheduler
        self.optimizer: Optimizer | None = None
        """None while the model has parameters whose size only the first batch tells."""
        self.untrained: Untrained | None = None
        """What the optimizer leaves out of the model."""
        self.switch: Switch | None = None
        """Of an optimizer that learns with other weights than those to be judged by."""
        self.scheduler: LearningRate | None = None
        """Bound at the beginning of a fit, which knows how long the run is."""
        self._schedule_left: tuple[str, Any, float] | None = None
        """Name and state of a loaded checkpoint's schedule, and by what the rate is another now, until one is bound."""
        self.average: Average | None = None
        """The moving average of the weights, if one is wanted."""
        self.compiled: Compiled | None = None
        self.rollback: Rollback | None = None
        self.freezing: Freezing | None = None
        self._toggled: Toggled | None = None
        """What else was frozen, thawed or put into another mode since the first fit began."""
        self.rng: Rng | None = None
        self._left: list[tuple[object, ...]] | None = None
        """Of the weights that a fit or a loaded checkpoint left; None while a fit goes on, and before the first."""
        self._settings: dict[str, Any] = {}
        self._told = False
        """The optimizer's groups were said."""
        if not any(map(is_lazy, model.parameters())):
            self.build()
        self.evaluator = self.objective.evaluator(self._judged)

    def build(self) -> None:
        """Bring the model to its device and make the optimizer; where that is refused, the model is as it was."""
        self._refuse_empty()
        refuse_trained(self.model)
        own_memory(self.model)
        self.model.to(self.options.device)
        self.objective.move_loss()
        required = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            self._build()
            self._refuse_sparse()
        except BaseException:
            for parameter, before in required:
                parameter.requires_grad_(before)
            raise
        if self.options.recompute:
            recompute(self.model, self.options.recompute, compiled=self.options.compile is not None)
        if self.options.compile is not None:
            self.compiled = Compiled(self.model, self.options.compile, self.options.device)

    def _refuse_empty(self) -> None:
        """Raise ConfigError for weights that have no values."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        if meta := [name for name, tensor in named if tensor.is_meta]:
            raise ConfigError(
                f"the model has weights on the device meta, which have no values: {', '.join(meta[:4])}",
                hint="Give them some first: model.to_empty(device=...) and their initialisation, or "
                "model.load_state_dict(weights, assign=True).",
            )

    def _refuse_sparse(self) -> None:
        """Raise ConfigError for gradients that torch can't clip."""
        if self.options.clip_norm is None and self.options.clip_value is None:
            return
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
                raise ConfigError(
                    f"{name or type(module).__name__} has sparse gradients (sparse=True), which torch can't clip",
                    hint="Make it with sparse=False, or leave gradient_clip_norm and gradient_clip_value out.",
                )

    def _build(self) -> None:
        if self.options.freeze:
            self.freezing = Freezing(self.model, self.options.freeze)
        if is_several(self.optimizer_spec):
            self.optimizer = build_optimizers(self.model, self.optimizer_spec, self.lr)
        else:
            self.optimizer = build_optimizer(self.model, self.optimizer_spec, self.lr)
        self.untrained = Untrained(
            self.model, self.optimizer, () if self.freezing is None else self.freezing.for_good()
        )
        self.switch = switch_of(self.model, self.optimizer)
        if self.freezing is not None:
            self.freezing.check(self.optimizer)
        self._settings = settings(self.model, self.optimizer)
        if self.options.ema is not None:
            if self.switch is not None:
                raise ConfigError(
                    f"ema={self.options.ema} beside {type(self.optimizer).__name__}, which averages the weights itself",
                    hint="Leave ema out, or take another optimizer.",
                )
            self.average = Average(self.model, self.options.ema)
            logger.info("ema: a second copy of the weights is kept (%s)", format_bytes(self.average.bytes))
        if self.options.rollback:
            self.rollback = Rollback(self.model, self.optimizer, self.average)
            logger.info("rollback: a copy of the weights and of the optimizer is kept in memory and in checkpoints")

    def set_loss(self, loss: Losses | None) -> None:
        """Another loss, from the next fit on."""
        self.objective.set_loss(loss)
        self.evaluator = self.objective.evaluator(self._judged)

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Within it the model has the weights that count; a switch leaves them there until the next update."""
        if self.switch is not None:
            self.switch.judge()
        with ExitStack() as stack:
            if self.options.deterministic:
                stack.enter_context(deterministic_kernels())
            if self.average is not None:
                stack.enter_context(self.average.swapped_in())
            yield

    # --- before the first update ---

    def random(self) -> Rng:
        """The random state of the trainer, from its first use on."""
        if self.rng is None:
            self.rng = first_rng(self.options.seed)
        return self.rng

    def drawing(self) -> Rng:
        """For what draws without training: the fit's state, or what it would begin with."""
        return self.rng or first_rng(self.options.seed)

    async def prepare(self, train: Stream, thread: TrainThread) -> None:
        """The random state, and the sizes of lazy parameters from the first batch."""
        own = Rng(self.random().state)
        if self.optimizer is not None:
            return

        async def pull(fn: Callable[[], Batch | None]) -> Batch | None:
            return await thread.run(lambda: _drawing_from(own, fn))

        batches = supply(train, limit=1, runner=pull)
        try:
            if await batches.finished():
                raise DataError("the training stream gave no batch", hint="Check its split, its filters and drop_last.")
            batch = batches.take()
            assert batch is not None
            await thread.run(lambda: _drawing_from(own, lambda: self._materialise(batch)))
            if isinstance(train, IterableStream) and train.one_epoch:
                train.put_back(batch)  # before its pass is closed, and an iterator for good with it
        finally:
            await batches.aclose()

    def _materialise(self, batch: Batch) -> None:
        self.model.to(self.options.device)
        self.objective.move_loss()
        with evaluating(self.model):
            self.objective.compute(self.objective.move(batch))
        self.build()

    def schedule(self, limits: Limits, train: Stream | None, optimizer: Optimizer | None = None) -> LearningRate:
        """The learning rate's schedule for a run of this length, bound to the optimizer, or to one that stands in."""
        known = None if train is None else length(train)
        most = self.options.batches(known)
        batches = least(known, most)
        per_epoch = None if batches is None else -(-batches // self.options.accumulate)
        total = None if per_epoch is None or limits.max_epochs is None else per_epoch * limits.max_epochs
        samples = None if train is None or known is None or batches != known else train.num_samples
        return build_scheduler(
            optimizer or self._stand_in(),
            self.scheduler_spec,
            total_steps=least(total, limits.max_steps),
            total_epochs=limits.max_epochs,
            total_samples=None if samples is None or limits.max_epochs is None else samples * limits.max_epochs,
            total_seconds=limits.max_time,
            steps_per_epoch=per_epoch,
            samples_per_epoch=samples,
        )

    def _stand_in(self) -> Optimizer:
        """An optimizer with the groups of the real one, for a schedule that is only checked: binding sets rates."""
        real = self.optimizer
        if real is None:
            return torch.optim.SGD([torch.zeros(1)], lr=self.lr)
        groups = [{**copy.deepcopy(_options(group)), "params": [torch.zeros(1)]} for group in real.param_groups]
        return Optimizer(groups, real.defaults)

    def _schedule_of_any_length(self, limits: Limits, train: Stream | None, optimizer: Optimizer) -> LearningRate:
        """The schedule where it is only to be saved: how long the run is does not matter."""
        return build_scheduler(
            optimizer,
            self.scheduler_spec,
            total_steps=LONG * LONG,
            total_epochs=LONG,
            total_samples=LONG * LONG,
            total_seconds=float(LONG),
            steps_per_epoch=LONG,
            samples_per_epoch=LONG,
        )

    # --- between two fits ---

    def to_device(self) -> None:
        """Have the model where it is computed with, and what is kept beside it of its weights; on the train thread."""
        self.model.to(self.options.device)
        self.take_up()

    def begin(self, *, resumed: bool) -> None:
        """A fit begins, which may do with the weights what it likes; on the train thread."""
        if not resumed:  # else all is as the checkpoint has it
            self.take_up()
        self._left = None

    def leave(self) -> None:
        """Remember what is frozen, and the weights, of which all is that is kept beside; on the train thread."""
        if self._toggled is not None:
            self._toggled.leave()
        if self.switch is None and self.average is None and self.rollback is None:
            return
        try:
            self._left = digest(self.model)
        except RuntimeError as error:  # of a device that failed, which is told elsewhere
            logger.warning("the weights can't be read any more: %s", str(error).partition("\n")[0])

    def take_up(self) -> None:
        """Have what is kept beside the model follow weights that were put into it since; on the train thread."""
        if self._left is not None and self._left != (now := digest(self.model)):
            self._left = now
            told = []
            if self.switch is not None:
                self.switch.forget()
                told.append("those to learn with follow from them")
            if self.average is not None:
                self.average.restart()
                told.append("their average begins anew")
            if self.rollback is not None:
                self.rollback.forget()
                told.append("a rollback goes back to them at most")
            logger.warning("the model was given other weights since its last fit: %s", ", ".join(told))

    # --- a life ---

    def life(self, train: Stream | None, progress: Progress, bus: Bus, door: Door, limits: Limits) -> Life:
        """All live objects of a fit; on the train thread."""
        options, optimizer = self.options, self.optimizer
        assert optimizer is not None
        if train is not None and self.untrained is not None:
            self.untrained.refuse()
        if train is not None and not self._told:
            self._told = True
            logger.info("%s", "\n".join(table(optimizer)))
        bind = self.schedule if train is not None else self._schedule_of_any_length
        self.scheduler = self._go_on_with(bind, limits, train, optimizer)
        if self._toggled is not None:
            self._toggled.take_up()
        if train is not None and not self.model.training:
            self.model.train()
            if self._toggled is not None:
                self._toggled.as_left()
        if self.freezing is not None:
            self.freezing.begin()
        if self._toggled is None:
            self._toggled = Toggled(self.model, self.freezing)
        fixed: dict[str, Any] = {
            "scheduler": schedule_name(self.scheduler),
            "seed": options.seed,
            "precision": options.precision,
        }
        fixed["loss"] = self.objective.loss_said()
        clip = {"gradient_clip_norm": options.clip_norm, "gradient_clip_value": options.clip_value}
        frozen = [[rule.pattern.pattern, rule.until, rule.unit] for rule in options.freeze] or None
        return Life(
            model=self.model,
            optimizer=optimizer,
            lr=self.scheduler,
            switch=self.switch,
            step=self._step(optimizer, self.scheduler, door, progress.step, _gauges(bus)),
            stream=train,
            average=self.average,
            rollback=self.rollback,
            freezing=self.freezing,
            toggled=self._toggled,
            groups=len(self._settings["optimizer"]["groups"]),
            compiled=self.compiled,
            unkept=Unkept(self.model, modules_of(self.objective.loss)),
            untrained=self.untrained,
            rng=self.random(),
            progress=progress,
            callbacks=bus.named(),
            settings={**self._settings, **fixed},
            habits=habits(
                options.device,
                accumulate_grad_batches=options.accumulate,
                ema=options.ema,
                freeze=frozen,
                compile=options.compile is not None,
                **clip,
                **_batch_size(train),
            ),
            config=options.config,
        )

    def _go_on_with(
        self, bind: Callable[..., LearningRate], limits: Limits, train: Stream | None, optimizer: Optimizer
    ) -> LearningRate:
        """The schedule where the last fit of this process, or a loaded checkpoint, left it.

        torch's schedulers set rates when they are made, and know only afterwards that they are to go on.
        """
        left = self._schedule_left
        if self.scheduler is not None and left is None:
            left = schedule_name(self.scheduler), self.scheduler.state_dict(), 1.0
        self._schedule_left = None
        before = [_options(group) for group in optimizer.param_groups]
        scheduler = bind(limits, train, optimizer)
        if left is None:
            return scheduler
        name, state, factor = left
        if name != schedule_name(scheduler):
            logger.warning(
                "the schedule of the checkpoint is %s, not %s: this one takes over from here",
                name,
                schedule_name(scheduler),
            )
        else:
            scheduler.load_state_dict(state)
            for group, options in zip(optimizer.param_groups, before, strict=True):
                group.update(options)
        if factor != 1.0:
            other_rate(optimizer, scheduler, self._settings, factor)
        return scheduler

    def _step(
        self, optimizer: Optimizer, lr: LearningRate, door: Door, begin: int, gauges: tuple[Gauge, ...]
    ) -> TrainStep:
        options, objective = self.options, self.objective
        kind: Callable[..., TrainStep] = TrainStep
        if objective.manual is not None:
            kind = partial(ManualStep, updates=objective.manual)
        step = kind(
            self.model,
            optimizer,
            objective.compute,
            lr,
            move=objective.move,
            door=door,
            device=options.device,
            accumulate=options.accumulate,
            clip_norm=options.clip_norm,
            clip_value=options.clip_value,
            precision=options.precision,
            skip=options.skip,
            log_every=options.log_every,
            average=self.average,
            rollback=self.rollback,
            moves=options.device_transform is not None,
            graphs=runs_in_graphs(options.compile),
        )
        step.step = begin
        step.gauges = gauges
        objective.trained.ask = step.number
        return step

    def begin_with(self, weights: Mapping[str, Tensor], path: Path, *, partial: bool) -> None:
        """Other weights before the first update; on the train thread. Raises CheckpointError."""
        begin_with(weights, self.model, path, partial=partial)
        if self.optimizer is None and not any(map(is_lazy, self.model.parameters())):
            self.build()

    @refusing
    def load(self, path: Path, snapshot: Snapshot, progress: Progress) -> None:
        """Weights, optimizer, counts and random state of a checkpoint; on the train thread. The learning rate may be
        another: it is so from the next fit on, as in a life that is restored. The loss may not, where there is one.
        Raises CheckpointError, and has changed nothing then."""
        check_state(snapshot.state, path)
        if self.optimizer is None:  # sizes that only the first batch would tell, or a checkpoint
            check_weights(snapshot.model, self.model, path)
            self._sized(snapshot, path)._check(snapshot, path)
            self.model.load_state_dict(snapshot.model)
            self.build()
        rate = self._check(snapshot, path)
        self._learned.load(snapshot)
        if self.average is None and (snapshot.state["average"] or {}).get("updates"):
            logger.warning(
                "%s has a moving average of its weights, by which its run was judged, and here is none: the weights "
                "themselves are validated and predicted with. Give ema=%s",
                *(path.name, snapshot.state["habits"].get("ema")),
            )
        self.leave()
        progress.load_state_dict(snapshot.state["progress"], path.parent)
        name, left = snapshot.state["settings"]["scheduler"], snapshot.state["scheduler"]
        self.rng, self._schedule_left = Rng(snapshot.state["rng"]), (name, left, rate)

    def _sized(self, snapshot: Snapshot, path: Path) -> Parts:
        """The same with a copy of the model that has the sizes of a checkpoint, and an optimizer of its own: to be held
        against it. Raises CheckpointError."""
        model = copy.deepcopy(self.model)
        try:
            model.load_state_dict(snapshot.model)
        except RuntimeError as error:
            raise CheckpointError(f"checkpoint {path} does not fit: {' '.join(str(error).split())}") from error
        options, spec = replace(self.options, compile=None, recompute=False), self.optimizer_spec
        given: dict[str, Any] = {
            "lr": self.lr,
            "scheduler": self.scheduler_spec,
            "metrics": {},
            "steps": self.objective.steps,
        }
        sized = Parts(model, None, options, optimizer=spec, **given)
        sized.objective.loss = self.objective.loss
        return sized

    @property
    def _learned(self) -> Learned:
        assert self.optimizer is not None
        return Learned(
            model=self.model,
            optimizer=self.optimizer,
            switch=self.switch,
            average=self.average,
            rollback=self.rollback,
        )

    def _check(self, snapshot: Snapshot, path: Path) -> float:
        """Raise what a checkpoint that does not fit raises; by what the learning rate is another."""
        fixed = self._settings if self.objective.lossless else {**self._settings, "loss": self.objective.loss_said()}
        rate = self._learned.check(snapshot, fixed, path)
        self._check_schedule(snapshot.state["settings"]["scheduler"], snapshot.state["scheduler"])
        return rate

    def _check_schedule(self, name: str, state: dict[str, Any]) -> None:
        """Raise what the schedule would that the next fit binds, if it is of this name; an object of the user's own is
        bound to the real optimizer already, and is left alone."""
        spec = self.scheduler_spec
        if isinstance(spec.get("name") if isinstance(spec, Mapping) else spec, LRScheduler):
            return
        bound = self._schedule_of_any_length(Limits(), None, self._stand_in())
        if schedule_name(bound) == name:
            check_schedule(bound, state)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What is set of a group, beside its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def _gauges(bus: Bus) -> tuple[Gauge, ...]:
    """What the callbacks read at each line of the log."""
    gauges = (getattr(callback, "gauge", None) for callback in bus.named().values())
    return tuple(gauge for gauge in gauges if callable(gauge))


def _drawing_from(rng: Rng, fn: Callable[[], T]) -> T:
    with rng.swapped_in():
        return fn()


def _batch_size(train: Stream | None) -> dict[str, int]:
    """The samples of a batch, where the source tells."""
    size = getattr(behind(train), "batch_size", None) if train is not None else None
    return {"batch_size": size} if isinstance(size, int) else {}
