"""OpenMP's pools of threads: a thread that hands its work over gives its idle pool up.

GNU OpenMP keeps a pool for each thread that ever ran a parallel operator. Once these have more threads in all than
there are cores, waiting at the end of an operator turns from spinning into sleeping, and a step of small operators
takes two to four times as long. A pool that was given up is made again by the next parallel operator, in about 100 us.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch  # it brings the library in

SOFT = 1
"""`omp_pause_soft`: free what is idle, keep all settings."""


def _find() -> Callable[[int], int] | None:
    """`omp_pause_resource_all` of the GNU library that torch has loaded; of no other, where pools are shared."""
    try:
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
        for path in sorted(paths):
            pause: Callable[[int], int] = ctypes.CDLL(path).omp_pause_resource_all
            return pause
    except (OSError, AttributeError):
        pass
    return None


_pause = _find() if torch.backends.openmp.is_available() else None  # type: ignore[no-untyped-call]


def give_up_pool() -> None:
    """Free the calling thread's idle pool; about a microsecond where there is none."""
    if _pause is not None:
        _pause(SOFT)
