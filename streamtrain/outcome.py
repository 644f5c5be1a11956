"""What a batch comes to: a loss, outputs, targets and more to log, from the model and loss or from a user's function.

Its law: what a function returned is taken as it is, or refused with what it should have been.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from streamtrain.data.batch import Batch
from streamtrain.errors import ConfigError
from streamtrain.tasks import TaskLosses


class Outcome(NamedTuple):
    """What one batch came to."""

    loss: Any
    """A tensor of one value, with a graph; None where there is none (prediction, evaluation without a loss)."""
    outputs: Any = None
    targets: Any = None
    logged: Mapping[str, Any] | None = None
    """More numbers to be logged."""


Compute = Callable[[Batch], Outcome]


def supervised(model: nn.Module, loss: Callable[[Any, Any], Any] | None) -> Compute:
    """`loss(model(inputs), targets)`, or `loss(model(inputs), inputs)` where there are no targets.

    Of several losses by name each is logged as well.
    """
    if isinstance(loss, TaskLosses):
        several = loss

        def compute_tasks(batch: Batch) -> Outcome:
            outputs = model(batch.inputs)
            targets = batch.inputs if batch.targets is None else batch.targets
            total, parts = several.parts(outputs, targets)
            return Outcome(total, outputs, targets, parts)

        return compute_tasks

    def compute(batch: Batch) -> Outcome:
        outputs = model(batch.inputs)
        targets = batch.inputs if batch.targets is None else batch.targets
        return Outcome(None if loss is None else loss(outputs, targets), outputs, targets)

    return compute


def custom(function: Callable[[Batch], Any], *, needs_loss: bool = True) -> Compute:
    """What a user's function gives for a batch: a loss, or a dict with `loss`, `outputs`, `targets` and more to log."""

    def compute(batch: Batch) -> Outcome:
        made = function(batch)
        if needs_loss and (made is None or (isinstance(made, Mapping) and made.get("loss") is None)):
            raise ConfigError("the step returned no loss", hint="Return the loss, or a dict with a 'loss'.")
        if not isinstance(made, Mapping):
            return Outcome(made)
        rest = {key: value for key, value in made.items() if key not in ("loss", "outputs", "targets")}
        targets = made.get("targets", batch.targets)
        return Outcome(made.get("loss"), made.get("outputs"), targets, rest)

    return compute


def custom_outputs(function: Callable[[Batch], Any]) -> Compute:
    """What a user's function gives for a batch, as outputs without a loss."""
    return lambda batch: Outcome(None, function(batch))


def called(function: Callable[..., Any], model: nn.Module) -> Callable[[Batch], Any]:
    """A step of the user as a function of the batch: it takes (model, batch), (batch) or (batch, batch_idx)."""
    names = list(inspect.signature(function).parameters)
    if names[:1] == ["batch"] and len(names) == 1:
        return function
    if names[:1] == ["batch"]:
        number = itertools.count()
        return lambda batch: function(batch, next(number))
    return lambda batch: function(model, batch)
