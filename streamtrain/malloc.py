"""What the C library keeps of freed memory: enough for a step to find the pages that the one before has freed.

glibc gives what is free at the end of a heap back to the kernel once it is more than a threshold: twice the largest
block that was mapped for itself and freed, of up to 32 MiB, and 128 KiB as long as there was none (mallopt(3),
M_TRIM_THRESHOLD). A thread's own heap meets it at each step, which then pays for the pages of its gradients anew: of
updates of 9 ms each took 220 page faults and a tenth longer than on the main thread.
"""

from __future__ import annotations

import torch

BLOCK = 4 << 20
"""Bytes of a block that moves the threshold, to twice as much. More is kept for larger models by themselves: each of
their tensors that is mapped and freed moves it on, up to 64 MiB. All heaps of the process keep as much, which counts as
memory of the fit, so that it is not more than that from the beginning."""


def keep_freed() -> None:
    """Let the threshold rise by a block that is mapped, left untouched and freed: no page of it is ever there. A host
    that has set the threshold itself (`MALLOC_TRIM_THRESHOLD_`, `mallopt`) keeps it, and other allocators take no
    notice."""
    torch.empty(BLOCK, dtype=torch.uint8, device="cpu")
