"""Host memory for snapshots, taken once and used again by each save of a fit; it belongs to no stream's budget.

Its law: what was copied stays as it is until the next snapshot is taken, which waits until the save before is through.
Most of what a copy into fresh memory costs is the kernel's zeroing of pages: here it is paid once, beside training.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamtrain.dense import is_dense
from streamtrain.errors import EnvironmentProblem
from streamtrain.tensor_file import memory_of

logger = logging.getLogger(__name__)

_ALIGN = 64
"""Bytes; copies of whole cache lines."""
_SMALL = 1 << 15
"""Elements up to which torch copies a tensor on the thread that asks."""
_SHARE, _MORE = 1.02, 1 << 20
"""Of what is needed, and bytes on top: states grow a little, and a larger block is made anew."""


def needed(tensors: Iterable[Tensor]) -> int:
    """Bytes for copies of these tensors."""
    return sum(-(-tensor.numel() * tensor.itemsize // _ALIGN) * _ALIGN for tensor in tensors)


class Buffers:
    """The buffers of one fit; `copies` is for the train thread, `reserve` and `landed` for the one that saves."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._layout: list[tuple[torch.dtype, torch.Size, tuple[int, ...]]] = []
        self._views: list[Tensor] = []
        self._copied: list[torch.cuda.Event] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def bytes(self) -> int:
        """What they take."""
        return self._block.numel()

    def reserve(self, size: int, *, pinned: bool = False) -> None:
        """Have at least `size` bytes, in memory that the kernel has given already; what was in them is lost.

        `pinned`: from which a CUDA device reads and writes by itself. Raises EnvironmentProblem if there is no memory.
        """
        if size <= self.bytes:
            return
        # Of pinned memory torch takes powers of two (CachingHostAllocator.h): a little more may be twice as much.
        size = 1 << (size - 1).bit_length() if pinned else int(size * _SHARE) + _MORE
        self._block, self._layout, self._views = torch.empty(0, dtype=torch.uint8), [], []  # the old ones go first
        try:
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pinned else _pages(size)
        except (MemoryError, RuntimeError, OSError) as error:
            raise EnvironmentProblem(
                f"no memory for a snapshot: {size:,} bytes beside the model and the optimizer ({error!s:.120})",
                hint="lower `memory` of the streams, or take a larger machine",
            ) from error
        logger.info("snapshots take %.1f MiB of memory, beside the budgets of streams", size / 2**20)

    def reserve_for(self, tensors: Collection[Tensor]) -> None:
        """The same for copies of these."""
        self.reserve(needed(tensors), pinned=any(tensor.is_cuda for tensor in tensors))

    def copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors by name, on the CPU, of the same shapes and, where they are dense, strides.

        Those of a CUDA device are on their way when this returns, and the device changes nothing before they are:
        wait for `landed`. All are valid until the next call.
        """
        found = list(tensors.values())
        self.reserve_for(found)
        layout = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in found]
        if layout != self._layout:
            self._layout, self._views = layout, self._laid_out(found)
        self._copied = []
        small: list[tuple[Tensor, Tensor]] = []
        for view, tensor in zip(self._views, found, strict=True):
            if tensor.is_cuda:
                self._from_device(view, tensor)
            elif tensor.device.type != "cpu" or not _is_dense(tensor) or tensor.numel() < _SMALL:
                small.append((view, tensor))
            else:
                # One thread comes near the memory's speed; torch's team waits for each other where cores are busy.
                np.copyto(np.asarray(memory_of(view)), np.asarray(memory_of(tensor)))
        if small:
            torch._foreach_copy_([view for view, _ in small], [tensor for _, tensor in small])
        self._fence()
        return dict(zip(tensors, self._views, strict=True))

    def landed(self) -> None:
        """Wait until all copies have arrived."""
        for event in self._copied:
            event.synchronize()

    def _laid_out(self, tensors: list[Tensor]) -> list[Tensor]:
        views, first = [], 0
        for tensor in tensors:
            size = tensor.numel() * tensor.itemsize
            flat = self._block[first : first + size].view(tensor.dtype)
            stride: Any = tensor.stride() if _is_dense(tensor) else None
            views.append(flat.view(tensor.shape) if stride is None else flat.as_strided(tensor.shape, stride))
            first += -(-size // _ALIGN) * _ALIGN
        return views

    def _from_device(self, view: Tensor, tensor: Tensor) -> None:
        device = tensor.device
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            view.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def _fence(self) -> None:
        """The device goes on once it has copied: it waits by itself, the host does not."""
        for device, stream in self._streams.items():
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            torch.cuda.current_stream(device).wait_event(event)
            self._copied.append(event)


def _is_dense(tensor: Tensor) -> bool:
    return is_dense(tensor.shape, tensor.stride())


def _pages(size: int) -> Tensor:
    """Memory whose pages are there, large ones where the kernel has them; it goes back when nothing refers to it."""
    block = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        block.madvise(mmap.MADV_HUGEPAGE)
    pages = np.frombuffer(block, np.uint8)[:size]
    pages[:] = 0
    return torch.from_numpy(pages)
