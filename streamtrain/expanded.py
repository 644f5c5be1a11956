"""Buffers whose elements share memory, or that have become larger; its law: what a model has given can be put back into
this very model.

torch saves a buffer made by `expand` and refuses to load it (`Tensor.copy_`: "more than one element of the written-to
tensor refers to a single memory location"), as it refuses one of another shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from streamtrain.errors import ConfigError


def own_memory(model: nn.Module) -> None:
    """Give each persistent buffer that was expanded memory of its own, with the same values; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or not _is_expanded(buffer):
                continue
            if id(buffer) not in made:
                made[id(buffer)] = buffer.clone(memory_format=torch.contiguous_format)
            module._buffers[name] = made[id(buffer)]


def refuse_trained(model: nn.Module) -> None:
    """Raise ConfigError for parameters to be trained of which several elements are one: torch updates no such tensor,
    and its fused kernels write behind its memory."""
    named = [name for name, one in model.named_parameters() if one.requires_grad and _is_expanded(one)]
    if named:
        raise ConfigError(
            f"parameters made by expand() have elements that share memory, and can't be trained: {', '.join(named)}",
            hint="Make the parameter of the small tensor and expand it in forward, or clone() it first.",
        )


def as_large(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give each persistent buffer the shape that it had in `weights`, which this model gave; its values are none."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            given = weights.get(f"{path}.{name}" if path else name)
            if buffer is None or given is None or name in module._non_persistent_buffers_set:
                continue
            if buffer.shape != given.shape:
                module._buffers[name] = torch.empty_like(given, dtype=buffer.dtype, device=buffer.device)


def _is_expanded(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided
    return strided and any(not step and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
