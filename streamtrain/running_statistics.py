"""The running statistics of a model's norms: what its forward changes, and an update that is not made gives back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class _Alike(NamedTuple):
    """Buffers of one dtype and device; two copies of them, each in one piece and as views of the buffers' shapes."""

    buffers: list[Tensor]
    kept: Tensor
    kept_views: list[Tensor]
    now: Tensor
    now_views: list[Tensor]


class RunningStatistics:
    """Those of all layers that track them."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        kinds = dict.fromkeys((buffer.dtype, buffer.device) for buffer in buffers)
        self._alike = [_alike([b for b in buffers if (b.dtype, b.device) == kind]) for kind in kinds]

    def __bool__(self) -> bool:
        return bool(self._alike)

    def keep(self) -> None:
        """Those of now are the ones to be given back."""
        for alike in self._alike:
            torch._foreach_copy_(alike.kept_views, alike.buffers)

    def give_back(self) -> None:
        """They are what was kept."""
        for alike in self._alike:
            torch._foreach_copy_(alike.buffers, alike.kept_views)

    def give_back_where(self, refused: Tensor) -> None:
        """The same where `refused` (0-d, on the device) is not 0, without reading it: three calls for each dtype."""
        bad = refused != 0
        for alike in self._alike:
            torch._foreach_copy_(alike.now_views, alike.buffers)
            torch.where(bad, alike.kept, alike.now, out=alike.now)
            torch._foreach_copy_(alike.buffers, alike.now_views)


def _alike(buffers: list[Tensor]) -> _Alike:
    kept, now = (torch.cat([buffer.detach().reshape(-1) for buffer in buffers]) for _ in range(2))
    return _Alike(buffers, kept, _views(kept, buffers), now, _views(now, buffers))


def _views(whole: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = torch.split(whole, [buffer.numel() for buffer in like])
    return [part.view(buffer.shape) for part, buffer in zip(parts, like, strict=True)]
