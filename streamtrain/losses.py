"""The losses that go by a short name, taking targets as stores hold them.

Their law: a shape that does not fit is refused, never broadcast. Targets of shape (B,) are put beside outputs of
shape (B, 1), and cast to what the loss computes with.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamtrain.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class ElementLoss(nn.Module):
    """A loss that compares element by element: outputs and targets of one shape, of floating dtype."""

    def __init__(self, name: str, loss: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            # An output without dimensions is a batch of one, squeezed.
            other_batch = outputs.ndim > 0 and outputs.shape[:1] != targets.shape[:1]
            if other_batch or outputs.squeeze().shape != targets.squeeze().shape:
                raise _mismatch(self.name, outputs, targets, "give both the same shape")
            targets = targets.reshape(outputs.shape)
        if not targets.dtype.is_floating_point:
            targets = targets.to(outputs.dtype)
        result: Tensor = self.loss(outputs, targets)
        return result


class ClassLoss(nn.Module):
    """Cross-entropy: outputs (B, C, ...) of logits, targets (B, ...) of class numbers or (B, C, ...) of shares."""

    def __init__(self, name: str, loss: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not targets.dtype.is_floating_point:
            targets = targets.to(torch.int64)
            wanted = (outputs.shape[0], *outputs.shape[2:])
            if targets.shape == (outputs.shape[0], 1, *outputs.shape[2:]):
                targets = targets.squeeze(1)
            if outputs.ndim < 2 or targets.shape != wanted:
                raise _mismatch(self.name, outputs, targets, "outputs are (B, classes), targets (B,) of class numbers")
        elif targets.shape != outputs.shape:
            raise _mismatch(self.name, outputs, targets, "targets are (B,) integers, or shares of the outputs' shape")
        result: Tensor = self.loss(outputs, targets)
        return result


def _mismatch(name: str, outputs: Tensor, targets: Tensor, hint: str) -> ConfigError:
    return ConfigError(
        f"the loss {name} got outputs of shape {tuple(outputs.shape)} {outputs.dtype} and targets of shape "
        f"{tuple(targets.shape)} {targets.dtype}, which do not fit",
        hint=f"{hint[:1].upper()}{hint[1:]}.",
    )


LOSSES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "mse": (ElementLoss, nn.MSELoss),
    "mae": (ElementLoss, nn.L1Loss),
    "l1": (ElementLoss, nn.L1Loss),
    "huber": (ElementLoss, nn.HuberLoss),
    "bce": (ElementLoss, nn.BCEWithLogitsLoss),
    "cross_entropy": (ClassLoss, nn.CrossEntropyLoss),
}
"""Short name: how targets are taken, and torch's loss, whose keywords may be given."""


def described(loss: Any) -> str | None:
    """What a loss is, to be compared between two lives of a run: kind and arguments, wherever it was defined.

    What torch's own losses hold (weights of classes) counts too; what those of others hold may be learned.
    """
    if isinstance(loss, ElementLoss | ClassLoss):
        loss = loss.loss
    if isinstance(loss, functools.partial):
        more = [*map(repr, loss.args), *(f"{key}={value!r}" for key, value in sorted(loss.keywords.items()))]
        return _ADDRESS.sub("", f"{described(loss.func)}({', '.join(more)})")
    if type(loss).__module__.startswith("torch.nn."):
        plain = {key: value for key, value in vars(loss).items() if isinstance(value, bool | int | float | str)}
        told = [f"{key}={value!r}" for key, value in sorted(plain.items()) if key != "training" and key[0] != "_"]
        held = [(name, value.tolist()) for name, value in loss.state_dict().items()]
        told += [f"digest {hashlib.sha256(repr(held).encode()).hexdigest()[:8]}"] if held else []
        return f"{type(loss).__name__}({', '.join(told)})"
    if isinstance(loss, nn.Module):
        return " ".join(_ADDRESS.sub("", repr(loss)).split())
    if loss is None:
        return None
    return str(getattr(loss, "__qualname__", type(loss).__qualname__))


def short_loss(name: str, arguments: dict[str, Any]) -> Loss:
    """The loss of this short name; `arguments` go to torch's class."""
    taker, loss = LOSSES[name]
    made: Loss = taker(name, loss(**arguments))
    return made
