"""Metrics, and one shape for whatever the user brings: ours, functions, torchmetrics' objects and collections.

The law: a metric keeps sums and counts, never means (`means`), so that merged parts are the whole and memory does not
grow with the samples. `update` runs on the train thread, asks nothing of the device and leaves its sums there; only
`compute` makes numbers of them. A value that is one number is logged by the metric's name; a dict of them by
`<name>_<key>`; an array (a confusion matrix) is a table, which lines of numbers leave out.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from streamtrain.class_metrics import F1, Accuracy, ConfusionMatrix, Precision, Recall, TopKAccuracy
from streamtrain.errors import ConfigError
from streamtrain.means import FunctionMetric, Mean
from streamtrain.ranking_metrics import AUROC
from streamtrain.regression_metrics import R2, MeanAbsoluteError, MeanSquaredError, RootMeanSquaredError
from streamtrain.spelling import nearest

logger = logging.getLogger(__name__)

__all__ = [
    "AUROC",
    "F1",
    "R2",
    "SHORT",
    "Accuracy",
    "ConfusionMatrix",
    "FunctionMetric",
    "Mean",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "Metric",
    "Precision",
    "Recall",
    "RootMeanSquaredError",
    "TopKAccuracy",
    "as_metric",
    "direction",
    "flattened",
    "names_of",
    "no_such_monitor",
]

SHORT: dict[str, Callable[..., Any]] = {
    "accuracy": Accuracy,
    "auroc": AUROC,
    "confusion": ConfusionMatrix,
    "f1": F1,
    "mae": MeanAbsoluteError,
    "mean": Mean,
    "mean_absolute_error": MeanAbsoluteError,
    "mean_squared_error": MeanSquaredError,
    "mse": MeanSquaredError,
    "precision": Precision,
    "r2": R2,
    "recall": Recall,
    "rmse": RootMeanSquaredError,
    "top_k": TopKAccuracy,
}
"""The metrics that go by a short name."""

_RISING = re.compile(
    r"(acc|auc|auroc|bleu|corr|dice|explained|f1|m?iou|jaccard|kappa|kge|matthews|mcc|ndcg|nse|pearson|precision|psnr|r2"
    r"|recall|reward|rouge|sensitivity|spearman|specificity|ssim).*|(top|map)(k|\d+)?"
)
_FALLING = ("loss", "err", "mae", "mse", "rmse", "mape", "smape", "brier", "crps", "nll", "perplexity")


def direction(name: str, mode: str = "auto") -> str:
    """`"min"` or `"max"`: which way of the metric `name` is better.

    `"auto"`: max for names with a part that begins with acc, auc, auroc, bleu, corr, dice, explained, f1, iou, miou,
    jaccard, kappa, kge, matthews, mcc, ndcg, nse, pearson, precision, psnr, r2, recall, reward, rouge, sensitivity,
    spearman, specificity or ssim, or is top, topk, top5, map or map50; else min, as where another part begins with
    loss, err, mae, mse, rmse, mape, smape, brier, crps, nll or perplexity. Parts are what other signs set apart, and
    CapitalLetters within these too. That a name tells neither is said. Raises ConfigError for any other mode.
    """
    if mode in ("min", "max"):
        return mode
    if mode != "auto":
        raise ConfigError(f"mode={mode!r}: expected 'min', 'max' or 'auto'", hint="max where more is better")
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    parts = re.split(r"[^a-z0-9]+", f"{name} {apart}".lower())
    falls = any(part.startswith(_FALLING) for part in parts)
    rises = any(_RISING.fullmatch(part) for part in parts) and not falls
    if name and not (rises or falls):
        _say_guessed(name)
    return "max" if rises else "min"


@functools.cache
def _say_guessed(name: str) -> None:
    """Once for each name: of a score the worst would be kept as the best."""
    message = "nothing in the name %r tells which way is better: less is taken to be; give mode='max' (or 'min')"
    logger.warning(message, name)


def no_such_monitor(who: str, monitor: str, metrics: Iterable[str]) -> ConfigError:
    """The error for a monitor that nothing logs: lists what is logged, the nearest name first in the hint."""
    logged = sorted(metrics)
    near = difflib.get_close_matches(monitor, logged, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "name one of these, or add the metric to metrics="
    return ConfigError(f"{who}: nothing logs {monitor!r}; logged: {', '.join(logged) or 'nothing'}", hint=hint)


@runtime_checkable
class Metric(Protocol):
    """What the trainer needs of a metric."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in one batch: the model's outputs and the batch's targets (its inputs where there are none)."""

    def compute(self) -> Any:
        """The value over all that was taken in since the last reset: a number (nan over nothing), a dict, a table."""

    def reset(self) -> None:
        """Forget everything."""

    def merge(self, other: Self) -> None:
        """Take in what another metric of this kind has; exact."""

    def state_dict(self) -> dict[str, Any]:
        """The sums, to go on with later."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class _Torchmetric:
    """A torchmetrics object in our shape."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        # States live in checkpoints only where they are persistent, and torchmetrics' are not by default.
        metric.persistent(True)

    def update(self, outputs: Any, targets: Any) -> None:
        _bring(self.metric, getattr(self.metric, "device", None), outputs)
        self.metric.update(outputs, targets)

    def compute(self) -> Any:
        return self.metric.compute()

    def reset(self) -> None:
        self.metric.reset()

    def merge(self, other: _Torchmetric) -> None:
        self.metric.merge_state(other.metric)

    def state_dict(self) -> dict[str, Any]:
        return {"update_count": self.metric.update_count, "states": dict(self.metric.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metric.load_state_dict(state["states"])
        self.metric._update_count = int(state["update_count"])


class _TorchmetricCollection:
    """A torchmetrics MetricCollection in our shape: its values go by their names there."""

    def __init__(self, collection: Any) -> None:
        self.collection = collection

    @property
    def names(self) -> list[str]:
        return list(self.collection.keys())

    def _members(self) -> dict[str, _Torchmetric]:
        # Members of a compute group share one state until somebody asks for them: asked so, each has its own.
        return {name: _Torchmetric(metric) for name, metric in self.collection.items()}

    def update(self, outputs: Any, targets: Any) -> None:
        first = next(iter(self.collection.values(copy_state=False)), None)
        _bring(self.collection, getattr(first, "device", None), outputs)
        self.collection.update(outputs, targets)

    def compute(self) -> dict[str, Any]:
        made: dict[str, Any] = self.collection.compute()
        return made

    def reset(self) -> None:
        self.collection.reset()

    def merge(self, other: _TorchmetricCollection) -> None:
        theirs = other._members()
        for name, metric in self._members().items():
            metric.merge(theirs[name])

    def state_dict(self) -> dict[str, Any]:
        return {name: metric.state_dict() for name, metric in self._members().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, metric in self._members().items():
            metric.load_state_dict(state[name])


def _bring(metric: Any, device: object, outputs: object) -> None:
    """Bring a torchmetrics object to where the outputs are."""
    while isinstance(outputs, Mapping | list | tuple) and outputs:
        outputs = next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs[0]
    if isinstance(outputs, Tensor) and device is not None and device != outputs.device:
        metric.to(outputs.device)


def as_metric(x: object) -> Metric:
    """What the user brought as a metric of ours.

    A metric object is used as it is; a class of metrics, or a short name (`"mae"`), is made into one; a torchmetrics
    object or collection is wrapped; a function `(outputs, targets) -> value` is averaged over samples. Anything else
    raises ConfigError.
    """
    if isinstance(x, str):
        if x not in SHORT:
            near = nearest(x, SHORT)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(SHORT)}"
            raise ConfigError(f"there is no metric {x!r}", hint=hint)
        x = SHORT[x]
    if inspect.isclass(x):
        try:
            x = x()
        except TypeError as error:
            raise ConfigError(f"metric {x!r}: {error}", hint="give an object of it, not the class") from error
    if hasattr(x, "merge_state") and hasattr(x, "persistent"):
        return _Torchmetric(x)
    if hasattr(x, "persistent") and hasattr(x, "keys"):
        return _TorchmetricCollection(x)
    if isinstance(x, Metric):
        return x
    has = [
        name for name in ("update", "compute", "reset", "merge", "state_dict", "load_state_dict") if hasattr(x, name)
    ]
    if callable(x) and "update" not in has:
        return FunctionMetric(x)
    raise ConfigError(
        f"metric {x!r} is neither a function nor a metric (it has {', '.join(has) or 'none of the methods'})",
        hint="expected f(outputs, targets), or update, compute, reset, merge, state_dict and load_state_dict",
    )


def names_of(name: str, metric: object) -> list[str]:
    """The names under which a metric's numbers are logged: its own, or `<name>_<key>` of those that it tells."""
    keys = getattr(metric, "names", None)
    return [name] if keys is None else [f"{name}_{key}" for key in keys]


def _for_numpy(tensor: Tensor) -> Tensor:
    """Of a dtype that numpy has: it has no bfloat16."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


def flattened(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A metric's value as numbers by their full names, and tables as nested lists."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from flattened(f"{name}_{key}", part)
        return
    if isinstance(value, Tensor | np.ndarray | list | tuple):
        array = np.asarray(_for_numpy(value) if isinstance(value, Tensor) else value)
        value = array.item() if array.size == 1 else array.tolist()
    yield name, value if isinstance(value, list) else float(value)
