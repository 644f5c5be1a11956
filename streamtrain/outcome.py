"""What a batch comes to: a loss, outputs, targets and more to log, from the model and loss or from a user's function.

Its law: what a function returned is taken as it is, or refused with what it should have been.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streamtrain.data.batch import Batch
from streamtrain.errors import ConfigError, UserCodeError
from streamtrain.tasks import TaskLosses
from streamtrain.tensors import map_tree


class Outcome(NamedTuple):
    """What one batch came to."""

    loss: Any
    """A tensor of one value, with a graph; None where there is none (prediction, evaluation without a loss)."""
    outputs: Any = None
    targets: Any = None
    logged: Mapping[str, Any] | None = None
    """More numbers to be logged."""

    def table(self) -> dict[str, Any]:
        """As a step of the user's may return it."""
        found = {"loss": self.loss, "outputs": self.outputs, "targets": self.targets}
        return {**(self.logged or {}), **{name: value for name, value in found.items() if value is not None}}

    def copied(self) -> Outcome:
        """The same in memory of its own: what a CUDA graph gives lies where its next run writes."""
        return Outcome(*(map_tree(_copied, part) for part in self))


Compute = Callable[[Batch], Outcome]


def supervised(model: nn.Module, loss: Callable[[Any, Any], Any] | None) -> Compute:
    """`loss(model(inputs), targets)`, or `loss(model(inputs), inputs)` where there are no targets.

    Of several losses by name each is logged as well.
    """
    if isinstance(loss, TaskLosses):
        several = loss

        def compute_tasks(batch: Batch) -> Outcome:
            outputs = given(model, batch.inputs)
            targets = batch.inputs if batch.targets is None else batch.targets
            total, parts = several.parts(outputs, targets)
            return Outcome(total, outputs, targets, parts)

        return compute_tasks

    def compute(batch: Batch) -> Outcome:
        outputs = given(model, batch.inputs)
        targets = batch.inputs if batch.targets is None else batch.targets
        try:
            return Outcome(None if loss is None else loss(outputs, targets), outputs, targets)
        except (TypeError, AttributeError) as error:
            if isinstance(outputs, Mapping | list | tuple):
                raise _of_several(outputs, error) from error
            raise

    return compute


def given(model: nn.Module, inputs: Any) -> Any:
    """`model(inputs)`. Raises UserCodeError, with what to do, for a dict of inputs that the model takes by keywords."""
    try:
        return model(inputs)
    except (TypeError, AttributeError) as error:
        if not isinstance(inputs, dict) or not _by_name(model, inputs):
            raise
        own = " If it gives its own loss, leave loss= out." if may_give_loss(model) else ""
        names = ", ".join(map(repr, list(inputs)[:4]))
        raise UserCodeError(
            f"{type(model).__name__} was called with one dict of inputs ({names}), and raised "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            hint="Have its forward take that dict, or give steps that call model(**batch.inputs): step=, or "
            f"training_step and predict_step.{own}",
        ) from error


def _of_several(outputs: Any, error: Exception) -> UserCodeError:
    """The error for one loss that could not take several outputs."""
    names = list(outputs) if isinstance(outputs, Mapping) else list(range(len(outputs)))
    table = ", ".join(f"{name!r}: ..." for name in names[:4])
    return UserCodeError(
        f"the model returned a {type(outputs).__name__} of {len(names)} outputs, and the loss raised "
        f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
        hint=f"Give one loss for each output, loss={{{table}}}, or a function that takes them all.",
    )


def own_loss(model: nn.Module) -> Compute:
    """What a model that computes its own loss gives, as those of Hugging Face do: an object or a dict with `loss`.

    It is called as `spread` says. Outputs are its `logits` where it has any, else all that it gave. Without gradients
    (validation, prediction) the loss may be missing.
    """
    call = spread(model)

    def compute(batch: Batch) -> Outcome:
        made = call(batch.inputs, batch.targets)
        loss, logits = _member(made, "loss"), _member(made, "logits")
        if loss is None and torch.is_grad_enabled():
            raise ConfigError(
                f"there is no loss: {type(model).__name__} returned a {type(made).__name__} without one",
                hint="Give loss= or step=, or have it return an object or dict with `loss` if it is given `labels`.",
            )
        return Outcome(loss, made if logits is None else logits, _labels(batch))

    return compute


def spread(model: nn.Module) -> Callable[[Any, Any], Any]:
    """A model's call with (inputs, targets): a dict of inputs whose keys its forward takes becomes its keywords
    (`model(**inputs)`), anything else its only argument; targets are `labels` where it takes them."""
    any_name, named = _keywords(model)
    labelled = any_name or "labels" in named

    def call(inputs: Any, targets: Any) -> Any:
        labels = {"labels": targets} if labelled and targets is not None else {}
        if isinstance(inputs, dict) and (any_name or inputs.keys() <= named):
            return model(**inputs, **labels)
        return model(inputs, **labels)

    return call


def _keywords(model: nn.Module) -> tuple[bool, set[str]]:
    """Whether a model's forward takes keywords of any name, and those that it names."""
    parameters = _signature(model).parameters
    any_name = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return any_name, {
        name for name, each in parameters.items() if each.kind not in (each.VAR_POSITIONAL, each.POSITIONAL_ONLY)
    }


def _by_name(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether these inputs may be a model's keywords."""
    any_name, named = _keywords(model)
    return any_name or inputs.keys() <= named


def may_give_loss(model: nn.Module) -> bool:
    """Whether a model's outputs may hold its loss: its forward takes `labels`, or keywords of any name."""
    parameters = _signature(model).parameters
    return "labels" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _signature(model: nn.Module) -> inspect.Signature:
    """Of its forward; one of nothing where Python can't tell (scripted modules)."""
    try:
        return inspect.signature(model.forward)
    except (ValueError, TypeError):
        return inspect.Signature()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _member(made: Any, name: str) -> Any:
    return made.get(name) if isinstance(made, Mapping) else getattr(made, name, None)


def _labels(batch: Batch) -> Any:
    if batch.targets is None and isinstance(batch.inputs, dict):
        return batch.inputs.get("labels")
    return batch.targets


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


class Numbering:
    """Which batch of its pass is computed just now, from 0: whoever computes says where to ask."""

    def __init__(self) -> None:
        self.ask: Callable[[], int] = itertools.count().__next__
        """By itself it counts how often it was asked."""


def called(
    function: Callable[..., Any], model: nn.Module, numbering: Numbering | None = None
) -> Callable[[Batch], Any]:
    """A step of the user as a function of the batch: it takes (model, batch), (batch) or (batch, batch_idx), where the
    last one is the number of the batch in its epoch, or in its evaluation."""
    names = list(inspect.signature(function).parameters)
    if names in (["batch"], ["batch", "update"]):
        return function
    if names[:1] == ["batch"]:
        numbers = numbering or Numbering()
        return lambda batch: function(batch, numbers.ask())
    return lambda batch: function(model, batch)
