"""What a fit refuses before anything is written; its law: what can't be known yet is asked again once it can be."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch.optim.lr_scheduler import LRScheduler

from streamtrain.callbacks.defaults import directions, watched
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.data.source import Stream
from streamtrain.dotted import is_path
from streamtrain.errors import ConfigError
from streamtrain.life import Life
from streamtrain.monitors import check_monitors, validation_names
from streamtrain.options import Limits, refuse_world_size
from streamtrain.parts import Parts
from streamtrain.resume import Resume, check
from streamtrain.schedulers import LearningRate
from streamtrain.streams import length, serves_one_epoch
from streamtrain.tasks import modules_of
from streamtrain.threads import TrainThread

logger = logging.getLogger(__name__)


class Checks:
    """The checks of one fit."""

    def __init__(self, parts: Parts, callbacks: Sequence[object], validation: Mapping[str, Stream]) -> None:
        self._parts, self._callbacks, self._validation = parts, callbacks, validation

    def arguments(self, train: Stream, limits: Limits, resume: Resume, run_dir: Path | None) -> None:
        """Refuse what can be refused without looking at a disk."""
        refuse_world_size()
        if resume is not None:
            check(resume)
        self._manual()
        if run_dir is None and not self._parts.options.dev:
            self._without_folder(resume)
        if self._parts.objective.lossless:
            raise ConfigError(
                "there is no loss",
                hint="Give loss= (--loss mse), step=, override training_step, or a model that takes `labels` and "
                "returns its loss.",
            )
        self._learned_losses()
        if sum(isinstance(callback, ModelCheckpoint) for callback in self._callbacks) > 1:
            raise ConfigError(
                "there are several ModelCheckpoints: a run's folder has one rule for when to save and what stays",
                hint="Give one: every=, save_top_k= of monitor=, and keep_last= go together.",
            )
        self._named_twice()
        self._directions()
        for callback in self._callbacks:
            self._watched(type(callback).__name__, watched(callback))
        if any(stream is train for stream in self._validation.values()):
            raise ConfigError(
                "the same stream can't be trained and validated on: it has one position",
                hint="Make a second one of the same store.",
            )
        if serves_one_epoch(train) and limits.max_epochs is not None and limits.max_epochs > 1:
            raise ConfigError(
                f"max_epochs={limits.max_epochs}, but the stream is an iterator, which serves one epoch",
                hint="Give something that can be iterated again: a list, a DataLoader, a ZarrStream.",
            )
        if run_dir is not None:
            self._say_bests()

    def _named_twice(self) -> None:
        """A stream `a_b` and a metric `b_loss` of a stream `a` may meet in a name, where one would hide the other."""
        names = self._logged_names()
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ConfigError(
                f"two numbers of the validation would be logged as {twice[0]!r}: of the streams "
                f"{', '.join(map(repr, self._validation))}",
                hint="Name a stream or a metric otherwise.",
            )

    def _say_bests(self) -> None:
        """Two callbacks may mean two things by the best, of which a result can name one."""
        rule = next((callback for callback in self._callbacks if isinstance(callback, ModelCheckpoint)), None)
        if rule is None or not rule.keeps_best or (rule.monitor.startswith("val_") and not self._validation):
            return
        for callback in self._callbacks:
            monitor = next(iter(watched(callback)), rule.monitor)
            if getattr(callback, "restore_best", False) and monitor != rule.monitor:
                logger.warning(
                    "the result's best, and resume='best', are by %s, which ModelCheckpoint monitors, while %s puts "
                    "the weights of the best %s into the model: ModelCheckpoint(monitor=%r) means the same by both",
                    *(rule.monitor, type(callback).__name__, monitor, monitor),
                )

    def _directions(self) -> None:
        """What is better has one meaning in a run: what one rule keeps as the best another one restores."""
        known: dict[str, tuple[str, str]] = {}
        for callback in self._callbacks:
            for monitor, way in directions(callback).items():
                who, other = known.setdefault(monitor, (type(callback).__name__, way))
                if way != other:
                    raise ConfigError(
                        f"{monitor}: {who} has mode {other!r}, and {type(callback).__name__} {way!r}",
                        hint=f"Give both the same: monitor={monitor!r}, mode='max' where more is better.",
                    )

    def _learned_losses(self) -> None:
        """A loss that wants to learn, and neither is a part of the model nor in an optimizer of the user's own."""
        groups = [] if self._parts.optimizer is None else self._parts.optimizer.param_groups
        known = {id(parameter) for group in groups for parameter in group["params"]}
        known |= set(map(id, self._parts.model.parameters()))
        for called, loss in modules_of(self._parts.objective.loss).items():
            for name, parameter in loss.named_parameters():
                if parameter.requires_grad and id(parameter) not in known:
                    raise ConfigError(
                        f"{called} ({type(loss).__name__}) has parameters to learn, such as {name}, which nothing "
                        "would update or save",
                        hint="Make it a part of the model before: model.criterion = loss; or freeze them, "
                        "loss.requires_grad_(False).",
                    )

    def _manual(self) -> None:
        parts = self._parts
        if parts.objective.manual is None:
            return
        if parts.objective.steps.training is None:
            raise ConfigError(
                "several optimizers need a training step that calls manual_update(loss, name)",
                hint="Override training_step, or give step=; with one optimizer name it: {'name': 'adamw', ...}.",
            )
        if parts.options.rollback:
            raise ConfigError("nonfinite='rollback' is for one optimizer", hint="Give 'skip' or 'raise'.")
        if parts.options.accumulate > 1:
            raise ConfigError(
                "accumulate_grad_batches is for one optimizer: with several the training step makes the updates",
                hint="Give larger batches.",
            )

    def _without_folder(self, resume: Resume) -> None:
        if resume is not None:
            raise ConfigError(f"resume={resume!r} needs a run_dir", hint="Give run_dir=, the folder of the run.")
        for callback in self._callbacks:
            if isinstance(callback, ModelCheckpoint) or getattr(callback, "needs_folder", False):
                raise ConfigError(f"{type(callback).__name__} needs a run_dir", hint="Give run_dir=, or leave it out.")

    def _watched(self, name: str, monitors: Sequence[str]) -> None:
        for monitor in monitors:
            if monitor.startswith("val_") and not self._validation:
                raise ConfigError(f"{name} monitors {monitor!r}, but fit has no validation stream")
        self._monitors(name, monitors)

    def _monitors(self, who: str, monitors: Iterable[str], *, said: bool = False) -> None:
        """Refuse monitors that nothing will log; `said`: whether `log_metrics` may bring names of training as well."""
        steps = self._parts.objective.steps
        own, names = steps.training is not None, self._logged_names()
        any_name = names and (own or steps.validation is not None)
        check_monitors(
            who,
            monitors,
            training=None if own or said else self._training_names(),
            validation=None if any_name else names,
        )

    def _training_names(self) -> list[str]:
        parts = self._parts
        return [*parts.objective.loss_names, *(["grad_norm"] if parts.options.clip_norm is not None else ())]

    def _logged_names(self) -> list[str]:
        return validation_names(self._validation, self._parts.objective.evaluated_names)

    def scheduler(self, scheduler: LearningRate) -> None:
        """Refuse a schedule that watches what nothing will log."""
        if (monitor := getattr(scheduler, "monitor", None)) is not None:
            self._monitors("the scheduler", [monitor], said=True)

    def lengths(self, train: Stream, limits: Limits) -> None:
        """Refuse what can be refused once it is known how long the streams are."""
        for stream in self._validation.values():
            self._parts.options.batches(length(stream))
        spec = self._parts.scheduler_spec
        name = spec.get("name") if isinstance(spec, Mapping) else spec
        made = isinstance(name, LRScheduler)  # bound to the real optimizer
        groups = self._parts.optimizer is not None or (isinstance(name, str) and not is_path(name))
        if isinstance(spec, str | Mapping) and not made and groups:
            self.scheduler(self._parts.schedule(limits, train))

    async def validations(self, thread: TrainThread, life: Life) -> None:
        """Before a life gives up what lies beyond its checkpoint: whether the user's own functions log what is watched.

        In a fresh one it is asked of the sanity check, when nothing is there to be lost.
        """
        names = [name for callback in self._callbacks for name in watched(callback) if name.startswith("val_")]
        sanity = self._parts.options.sanity
        if not sanity or set(names) <= set(self._logged_names()):
            return
        values: dict[str, float] = {}
        for name, stream in self._validation.items():
            if serves_one_epoch(stream):
                return  # it could not start over
            stream.set_epoch(0)
            means = await self._parts.evaluator.run(stream, thread, life.rng, limit=sanity)
            values |= {(f"val_{name}_" if name else "val_") + metric: value for metric, value in means.items()}
        check_monitors("the resumed fit", names, training=None, validation=list(values))
