"""Whether a model's weights are still those that a fit left; its law: they are compared by value, never by who wrote.

What is kept beside a model (an average, weights to learn with, a state to go back to) is of those weights, and would
put them back over any that the user gives it between two fits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(model: nn.Module) -> list[tuple[object, ...]]:
    """What `digest_of` gives for each parameter."""
    return digest_of(model.parameters())


@torch.no_grad()
def digest_of(tensors: Iterable[Tensor]) -> list[tuple[object, ...]]:
    """Its shape, and something of each tensor that changes with its values alone (no device, no order of summation).

    It is the sum of their bits as whole numbers, so that it takes no memory, and one pass over the weights; of a tensor
    without bits of its own (sparse, or of a class of its own) it is how often it was written.
    """
    return [_of(tensor.detach()) for tensor in tensors]


def _of(tensor: Tensor) -> tuple[object, ...]:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    shape = tuple(tensor.shape)
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.itemsize not in _INTEGERS:
        return shape, tensor._version
    return shape, int(tensor.view(_INTEGERS[tensor.itemsize]).sum())
