"""A run that begins with weights of elsewhere: which tensors fit the model, which stay, which nobody takes.

Its law: nothing is put into the model before it is known what fits, and what does not is never left out unsaid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from streamtrain.errors import CheckpointError
from streamtrain.foreign import bare

logger = logging.getLogger(__name__)

SHOWN = 12
"""Names in a message."""


@dataclass
class Match:
    """How some weights and a model fit."""

    taken: dict[str, Tensor] = field(default_factory=dict)
    """By the model's names."""
    left: list[str] = field(default_factory=list)
    """Of the model, for which there is nothing."""
    unused: list[str] = field(default_factory=list)
    """Of the weights, for which the model has no place."""
    misfits: list[str] = field(default_factory=list)
    """`name: saved -> now` of those of another shape or kind."""

    @property
    def whole(self) -> bool:
        """Whether each has its place, and each place its tensor."""
        return not (self.left or self.unused or self.misfits)


def match(weights: Mapping[str, Tensor], model: nn.Module) -> Match:
    """Hold weights against a model's parameters and buffers by their names."""
    live: dict[str, Any] = model.state_dict(keep_vars=True)
    found = Match()
    named = bare(dict(weights), set(live))
    for name, tensor in named.items():
        if name not in live:
            found.unused.append(name)
        elif _fits(tensor, live[name]):
            found.taken[name] = tensor
        else:
            found.misfits.append(f"{name}: {_shape(tensor)} -> {_shape(live[name])}")
    met = {id(live[name]) for name in found.taken}  # tied ones may be saved under one of their names
    found.left = [name for name in live if name not in named and id(live[name]) not in met]
    return found


def _fits(saved: Tensor, live: Any) -> bool:
    if is_lazy(live):
        return True
    kinds = saved.is_floating_point() == live.is_floating_point() and saved.is_complex() == live.is_complex()
    return bool(kinds and saved.shape == live.shape)


def _shape(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def begin_with(weights: Mapping[str, Tensor], model: nn.Module, path: Path, *, partial: bool) -> Match:
    """Put what fits into the model and say what that is; on the train thread.

    Raises CheckpointError with a table, and changes nothing, if something does not fit and it is not `partial`, or if
    nothing does.
    """
    found = match(weights, model)
    if not found.taken or not (partial or found.whole):
        raise CheckpointError(
            f"the weights of {path} do not fit the model: {'; '.join(_table(found))}",
            hint="Take what fits with partial=True ([model] partial = true, --partial-weights), or mend the model."
            if found.taken
            else "Not one tensor fits: is it another model's file?",
        )
    with torch.no_grad():
        model.load_state_dict(found.taken, strict=False)
    logger.info("the model begins with weights of %s: %d tensors", path, len(found.taken))
    for line in _table(found):
        logger.warning("weights of %s: %s", path, line)
    return found


def _table(found: Match) -> list[str]:
    told = []
    if found.misfits:
        told.append(f"of another shape (saved -> now): {_names(found.misfits)}")
    if found.left:
        told.append(f"left as they were, for there is nothing for them: {_names(found.left)}")
    if found.unused:
        told.append(f"unused, for the model has no place: {_names(found.unused)}")
    return told


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{', '.join(listed[:SHOWN])}{more}"
