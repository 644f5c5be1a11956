"""Buffers whose elements share memory; its law: what a checkpoint holds can be put back into the model it came from.

torch saves a buffer made by `expand` and refuses to load it (`Tensor.copy_`: "more than one element of the written-to
tensor refers to a single memory location").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def _is_expanded(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided
    return strided and any(not step and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
