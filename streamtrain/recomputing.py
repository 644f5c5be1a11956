"""Gradient checkpointing: blocks whose activations are computed again in the backward pass instead of being kept.

Its law: the weights are those without it, to the bit. Random numbers are drawn again as they were
(`torch.utils.checkpoint`, non-reentrant, with the generators' states preserved; Chen et al. 2016), and layers with
running statistics (BatchNorm) take in a batch once, not once more when it is computed again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from streamtrain.errors import ConfigError

HINT = "For instance gradient_checkpointing=r'^blocks\\.\\d+$', a regex of names of modules."


class Recomputed:
    """Stands in for a module's forward: keeps its inputs, and computes the rest again when gradients ask for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._norms = [layer for layer in module.modules() if isinstance(layer, _NormBase)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = partial(type(self.module).forward, self.module)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        options: dict[str, Any] = {"context_fn": self._contexts} if self._norms else {}
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._statistics_at_rest()

    @contextmanager
    def _statistics_at_rest(self) -> Iterator[None]:
        """Have the norms take the batch's statistics into copies, which are thrown away."""
        before = [(layer, dict(layer._buffers)) for layer in self._norms]
        for layer, buffers in before:
            layer._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        try:
            yield
        finally:
            for layer, buffers in before:
                layer._buffers.update(buffers)


def recompute(model: nn.Module, which: str | bool, *, compiled: bool = False) -> list[str]:
    """Have blocks of the model computed again in the backward pass; their names.

    `which`: a regex of names of modules (of nested ones the outermost), or True: the children of the `nn.Sequential` or
    `nn.ModuleList` that has most of them. It is done once; state_dict and names stay what they are. Raises ConfigError,
    also where the call is `compiled` and a block has running statistics: torch's compiler would take them in twice.
    """
    blocks = _named(model, which) if isinstance(which, str) else _children(model)
    for name, block in blocks:
        if compiled and any(isinstance(layer, _NormBase) for layer in block.modules()):
            raise ConfigError(
                f"gradient_checkpointing of {name}, which has running statistics (BatchNorm), can't be compiled",
                hint="Leave compile or gradient_checkpointing out, or name blocks without them by a regex.",
            )
    for _, block in blocks:
        block.forward = Recomputed(block)
    return [name for name, _ in blocks]


def _named(model: nn.Module, regex: str) -> list[tuple[str, nn.Module]]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ConfigError(f"gradient_checkpointing: {regex!r} is no regular expression: {error}", hint=HINT) from error
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():  # outer ones first
        if name and pattern.search(name) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    if not found:
        names = ", ".join(name for name, _ in list(model.named_modules())[1:9])
        raise ConfigError(f"gradient_checkpointing: {regex!r} names no module", hint=f"Names: {names}.")
    lists = [name for name, module in found if isinstance(module, nn.ModuleList | nn.ModuleDict)]
    if lists:
        raise ConfigError(f"gradient_checkpointing: {lists[0]} is never called itself: name what it holds", hint=HINT)
    return found


def _children(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those of the container that has most blocks (children with parameters); of several the one with most numbers."""
    best: Sequence[tuple[str, nn.Module]] = ()
    most = (1, 0)
    for name, container in model.named_modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        blocks = [(f"{name}.{key}".lstrip("."), child) for key, child in container.named_children() if _size(child)]
        size = len(blocks), sum(_size(child) for _, child in blocks)
        if len(blocks) > 1 and size > most:
            best, most = blocks, size
    if not best:
        raise ConfigError("gradient_checkpointing: the model has no nn.Sequential or ModuleList of blocks", hint=HINT)
    return list(best)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
