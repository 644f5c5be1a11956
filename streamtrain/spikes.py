"""Gradient norms that stand out: each is held against the median of those before it.

Its law: it only tells. Norms are known where gradients are clipped by their norm, for a norm of its own would cost more
than the rest of an update's bookkeeping.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

logger = logging.getLogger(__name__)

MANY = 10.0
"""So many times the median is a spike."""
WINDOW, LEAST = 100, 20
"""Norms that the median is taken over, and how many there must be."""


class Spikes:
    """The norms of the last updates, before they were clipped."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._told = -WINDOW
        self._silent = 0
        """Spikes since the last one that was told."""

    def offer(self, step: int, norms: Sequence[float]) -> None:
        """Take in the norms of the updates from `step` on; a spike is said, at most one in 100 steps."""
        for at, norm in enumerate(norms, step):
            if not math.isfinite(norm):
                continue  # that update was not made, and is said elsewhere
            if len(self._norms) >= LEAST and norm > MANY * (usual := median(self._norms)):
                self._tell(at, norm, usual)
            self._norms.append(norm)

    def _tell(self, step: int, norm: float, usual: float) -> None:
        if step - self._told < WINDOW:
            self._silent += 1
            return
        more = f"; {self._silent} more since step {self._told}" if self._silent else ""
        logger.warning(
            "step %d: the gradient's norm is %.4g, %.0f times the median of the last %d (%.4g)%s",
            *(step, norm, norm / usual if usual else math.inf, len(self._norms), usual, more),
        )
        self._told, self._silent = step, 0

    def state_dict(self) -> dict[str, Any]:
        """`{"norms", "told", "silent"}`."""
        return {"norms": list(self._norms), "told": self._told, "silent": self._silent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._norms = deque(map(float, state["norms"]), WINDOW)
        self._told, self._silent = int(state["told"]), int(state["silent"])
