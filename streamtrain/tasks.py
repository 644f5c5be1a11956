"""Models with several outputs: a loss and metrics for each, by its name.

Its law: what a name has among the outputs belongs to what it has among the targets, and a name that is missing is
refused with the nearest. Outputs are a dict, a named tuple, or a list or tuple, whose names are "0", "1", ...
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from streamtrain.errors import ConfigError
from streamtrain.losses import LOSSES, short_loss
from streamtrain.metrics import Metric, as_metric
from streamtrain.spelling import nearest

Function = Callable[..., Any]
Losses = Function | str | Mapping[Any, Function | str] | Sequence[Function | str]
"""One loss, or one for each output: by name, or in their order."""


def picked(what: str, tree: Any, task: str) -> Any:
    """What `task` names among several `what` ("outputs", "targets"). Raises ConfigError."""
    if isinstance(tree, Mapping):
        if task in tree:
            return tree[task]
        names = [str(name) for name in tree]
    elif isinstance(tree, list | tuple):
        if task.isdecimal() and int(task) < len(tree):
            return tree[int(task)]
        names = list(getattr(tree, "_fields", ())) or [str(number) for number in range(len(tree))]
        if task in names:
            return getattr(tree, task)
    else:
        kind = f"one tensor of shape {tuple(tree.shape)}" if isinstance(tree, Tensor) else f"a {type(tree).__name__}"
        raise ConfigError(f"the {what} are {kind}, of which none is {task!r}", hint=_SEVERAL[what])
    other = f"Name them as the {what} are named."
    if task.isdecimal() and isinstance(tree, Mapping):
        other = (
            f"A list or tuple goes by number, and these {what} by name: have the model return a dict, and name both."
        )
    raise ConfigError(
        f"there is no {task!r} among the {what} {', '.join(map(repr, names)) or '(none)'}",
        hint=_instead(task, names, other),
    )


_SEVERAL = {
    "outputs": "Have the model return a dict of them by name, or give one loss and plain metrics.",
    "targets": 'Give the stream targets=["a", "b"], a list of the arrays that the outputs are named for.',
}


def _instead(word: str, known: list[str], other: str) -> str:
    near = nearest(word, known)
    return f"Did you mean {near!r}?" if near else other


class TaskLosses:
    """The weighted sum of a loss for each output: what `loss={"a": ..., "b": ...}` comes to.

    `weights` by the same names (a list: by number), 1 where none is given; a loss of weight 0 is logged and not
    learned from. Each loss is logged as `loss_<name>`, before its weight.
    """

    def __init__(
        self, losses: Mapping[str, Function], weights: Mapping[str, Any] | Sequence[Any] | None = None
    ) -> None:
        self.losses = dict(losses)
        self.weights = dict.fromkeys(self.losses, 1.0)
        if isinstance(weights, list | tuple):
            weights = {str(number): weight for number, weight in enumerate(weights)}
        if weights is not None and not isinstance(weights, Mapping):
            raise ConfigError(f"loss_weights must be a dict by the losses' names, not {weights!r:.80}")
        for name, weight in (weights or {}).items():
            if str(name) not in self.losses:
                hint = _instead(str(name), list(self.losses), f"The losses are {', '.join(self.losses)}.")
                raise ConfigError(f"loss_weights: there is no loss {name!r}", hint=hint)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ConfigError(f"loss_weights: {name!r} must be a finite number, not {weight!r}")
            self.weights[str(name)] = float(weight)
        if not any(self.weights.values()):
            raise ConfigError("loss_weights are all 0: nothing would be learned", hint="Give one of them a weight.")

    @property
    def names(self) -> list[str]:
        """What is logged beside the loss."""
        return [f"loss_{name}" for name in self.losses]

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """The weighted sum: a tensor of one value. Raises ConfigError for names that do not fit."""
        return self.parts(outputs, targets)[0]

    def parts(self, outputs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
        """The weighted sum, in the order of the losses, and each of them by the name under which it is logged."""
        if isinstance(outputs, Tensor):
            raise ConfigError(
                f"loss= has a loss for each of the outputs {', '.join(map(repr, self.losses))}, and the model returned "
                f"one tensor of shape {tuple(outputs.shape)}",
                hint="Give the loss itself, such as loss='mse', or have the model return a dict with these names.",
            )
        total: Any = None
        parts: dict[str, Any] = {}
        for name, loss in self.losses.items():
            value = parts[f"loss_{name}"] = loss(picked("outputs", outputs, name), picked("targets", targets, name))
            weight = self.weights[name]
            if weight:
                weighted = value if weight == 1.0 else weight * value
                total = weighted if total is None else total + weighted
        return total, parts


class TaskMetric:
    """A metric of one output of several, and of the target of that name."""

    def __init__(self, task: str, metric: Metric) -> None:
        self.task, self.metric = task, metric

    @property
    def names(self) -> Any:
        """As the metric's own."""
        return getattr(self.metric, "names", None)

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in one batch. Raises ConfigError for names that do not fit."""
        self.metric.update(picked("outputs", outputs, self.task), picked("targets", targets, self.task))

    def compute(self) -> Any:
        """The metric's value."""
        return self.metric.compute()

    def reset(self) -> None:
        """Forget everything."""
        self.metric.reset()

    def merge(self, other: TaskMetric) -> None:
        """Take in what another one of this output has."""
        self.metric.merge(other.metric)

    def state_dict(self) -> dict[str, Any]:
        """The metric's."""
        return self.metric.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.metric.load_state_dict(state)


def as_loss(loss: Any, weights: Mapping[Any, float] | Sequence[float] | None = None) -> Function | None:
    """A loss that is a function of (outputs, targets), or goes by a short name, or one for each output with weights.

    Raises ConfigError.
    """
    if isinstance(loss, Mapping | list | tuple):
        named = loss.items() if isinstance(loss, Mapping) else enumerate(loss)
        losses = {str(name): one for name, given in named if (one := _of_output(str(name), given)) is not None}
        if not losses:
            raise ConfigError("loss names no loss", hint='Give one for each output: loss={"a": "mse", "b": "mae"}.')
        return TaskLosses(losses, weights)
    if weights:
        raise ConfigError(
            "loss_weights are for losses by name",
            hint='Give loss={"a": ..., "b": ...}, or leave loss_weights out.',
        )
    if loss is None or (callable(loss) and not inspect.isclass(loss)):
        made: Function | None = loss
        return made
    if isinstance(loss, str) and loss in LOSSES:
        return short_loss(loss, {})
    raise ConfigError(
        f"loss must be a function of (outputs, targets), not {loss!r}",
        hint=f"Give an object such as nn.MSELoss(), or one of {', '.join(LOSSES)}.",
    )


def _of_output(name: str, loss: Any) -> Function | None:
    try:
        return as_loss(loss)
    except ConfigError as error:
        raise ConfigError(f"the loss of the output {name!r}: {error}", hint=error.hint) from error


def modules_of(loss: Any) -> dict[str, nn.Module]:
    """The modules among the losses that are learned from, by what a message calls them."""
    if isinstance(loss, TaskLosses):
        named = {f"the loss {name!r}": one for name, one in loss.losses.items() if loss.weights[name]}
    else:
        named = {"the loss": loss}
    return {called: one for called, one in named.items() if isinstance(one, nn.Module)}


def as_metrics(metrics: Mapping[str, Any]) -> dict[str, Metric]:
    """Metrics by their names; those under an output's name are of that output, `<output>_<metric>`."""
    made: dict[str, Metric] = {}
    if not hasattr(metrics, "items"):
        raise ConfigError(
            f"metrics must be a dict by name, not {metrics!r:.60}", hint='For example metrics={"mae": "mae"}.'
        )
    users: dict[int, str] = {}
    for name, given in metrics.items():
        several = isinstance(given, Mapping)
        if not isinstance(name, str) and not several:
            raise ConfigError(f"metrics are named by texts, not {name!r}", hint=f"For example {{{str(name)!r}: ...}}.")
        for full, one in ({f"{name}_{key}": one for key, one in given.items()} if several else {name: given}).items():
            metric = as_metric(one)
            if full in made:
                raise ConfigError(f"two metrics would be logged as {full!r}", hint="Name one of them otherwise.")
            own = hasattr(one, "update") and not inspect.isclass(one)
            if own and (other := users.setdefault(id(one), full)) != full:
                raise ConfigError(
                    f"the metrics {other!r} and {full!r} are one object, which would take in the batches of both",
                    hint="Give each an object of its own.",
                )
            made[full] = TaskMetric(str(name), metric) if several else metric
    return made
