"""What a batch comes to: by the model and its loss, or by the user's own steps, and what is measured of it.

Its law: training, validation and `predict` compute by what stands here, and nothing here learns or remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from streamtrain.compiling import runs_in_graphs
from streamtrain.data.batch import Batch
from streamtrain.device import MoveBatch, mover
from streamtrain.errors import ConfigError
from streamtrain.evaluation import Evaluator
from streamtrain.losses import described
from streamtrain.manual import ManualUpdates
from streamtrain.metrics import names_of
from streamtrain.options import Options
from streamtrain.outcome import Compute, Numbering, called, custom, given, may_give_loss, own_loss, supervised
from streamtrain.tasks import Function, Losses, TaskLosses, as_loss, as_metrics, modules_of


@dataclass(frozen=True, kw_only=True)
class UserSteps:
    """What the user's own functions do in place of the model and the loss; None where they don't."""

    training: Function | None = None
    validation: Function | None = None


class Objective:
    """The loss and the metrics of one model, and the steps that make them of a batch."""

    def __init__(
        self,
        model: nn.Module,
        loss: Losses | None,
        options: Options,
        *,
        weights: Mapping[Any, float] | Sequence[float] | None,
        metrics: Mapping[str, Any],
        steps: UserSteps,
        manual: ManualUpdates | None,
    ) -> None:
        """`weights`: of several losses. `manual`: where the training step makes its updates itself. Raises
        ConfigError."""
        self.steps, self.manual = steps, manual
        self.trained, self.evaluated = Numbering(), Numbering()
        """Which batch a training step is given, of its epoch, and which one a step in an evaluation, of that."""
        self.loss = as_loss(loss, weights)
        self.metrics = as_metrics(metrics)
        for name in self.metrics:
            if name in self.loss_names:
                raise ConfigError(f"a metric can't be named {name!r}: the loss itself is", hint="Name it otherwise.")
        self._model, self._options, self._weights = model, options, weights

    def set_loss(self, loss: Losses | None) -> None:
        """Another loss."""
        self.loss = as_loss(loss, self._weights)
        self.move_loss()

    def move_loss(self) -> None:
        """Have what a loss holds (weights of classes) where the outputs will be."""
        for module in modules_of(self.loss).values():
            module.to(self._options.device)

    # --- what it is called ---

    @property
    def loss_names(self) -> list[str]:
        """What the losses are logged as."""
        return ["loss", *(self.loss.names if isinstance(self.loss, TaskLosses) else ())]

    @property
    def evaluated_names(self) -> list[str]:
        """What an evaluation logs, as far as the losses and metrics tell."""
        return [*self.loss_names, *(n for name, metric in self.metrics.items() for n in names_of(name, metric))]

    @property
    def lossless(self) -> bool:
        """Whether nothing can give a loss."""
        return self.loss is None and self.steps.training is None and not may_give_loss(self._model)

    def loss_said(self) -> Any:
        """What the loss is, to be compared between two lives."""
        if self.steps.training is not None:
            return f"step {getattr(self.steps.training, '__qualname__', type(self.steps.training).__qualname__)}"
        if isinstance(self.loss, TaskLosses):
            return {name: [described(loss), self.loss.weights[name]] for name, loss in self.loss.losses.items()}
        return described(self.loss)

    # --- what a batch comes to ---

    @property
    def move(self) -> MoveBatch:
        """Brings a batch to the device."""
        return mover(self._options.device, self._options.device_transform)

    @property
    def compute(self) -> Compute:
        """What a batch comes to in training."""
        return self._computed(self.trained)

    @property
    def measured(self) -> Compute:
        """The same in an evaluation, where the user has no step for that."""
        return self._computed(self.evaluated)

    def _computed(self, numbering: Numbering) -> Compute:
        if self.manual is not None and self.steps.training is not None:
            return self.manual.compute(called(self.manual.given(self.steps.training), self._model, numbering))
        if self.steps.training is not None:
            return custom(called(self.steps.training, self._model, numbering))
        return self.judged(self._model)

    def judged(self, model: nn.Module) -> Compute:
        """What a batch comes to by the model and its loss, whatever steps the user has."""
        return own_loss(model) if self.loss is None else supervised(model, self.loss)

    def outputs(self, batch: Batch) -> Any:
        """What the model makes of a batch's inputs."""
        own = self.loss is None and self.steps.training is None
        return own_loss(self._model)(replace(batch, targets=None)).outputs if own else given(self._model, batch.inputs)

    def evaluator(self, weights: Callable[[], AbstractContextManager[None]]) -> Evaluator:
        """What a stream comes to in validation; `weights`: within it the model has those that count."""
        compute, options = self.measured, self._options
        if self.steps.validation is not None:
            compute = custom(called(self.steps.validation, self._model, self.evaluated), needs_loss=False)
        return Evaluator(
            self._model,
            compute,
            self.metrics,
            move=self.move,
            device=options.device,
            precision=options.precision,
            weights=weights,
            graphs=runs_in_graphs(options.compile),
            numbering=self.evaluated,
        )
