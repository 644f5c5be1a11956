"""The course of a number in bounded memory: once there are too many points, neighbours become one.

A series of a million steps and one of a hundred have the same size, and each point is the mean of as many others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST = 2000
"""Points that are kept: more than a plot has pixels."""


class Series:
    """Pairs of a place (that never falls) and a value."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._every = 1
        """Values that make up a point."""
        self._places: list[float] = []
        self._values: list[float] = []
        self._sum, self._place, self._count = 0.0, 0.0, 0

    def add(self, place: float, value: float) -> None:
        """One more; what is not finite is a gap, which no mean covers."""
        self._sum += value
        self._place = place
        self._count += 1
        if self._count == self._every:
            self._close()
            if len(self._values) > self._most:
                self._halve()

    @property
    def points(self) -> tuple[Sequence[float], Sequence[float]]:
        """Places and values, the last one of fewer values where they do not come out even."""
        if not self._count:
            return tuple(self._places), tuple(self._values)
        return (*self._places, self._place), (*self._values, self._sum / self._count)

    def _close(self) -> None:
        value = self._sum / self._count
        self._places.append(self._place)
        self._values.append(value if math.isfinite(value) else math.nan)
        self._sum, self._count = 0.0, 0

    def _halve(self) -> None:
        even = len(self._values) // 2 * 2
        rest = list(zip(self._places[even:], self._values[even:], strict=True))
        first, second = self._values[0:even:2], self._values[1:even:2]
        self._places = self._places[1:even:2]
        self._values = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        for place, value in rest:  # of half as many values as a point has from now on
            self._sum, self._place, self._count = value * self._every, place, self._every
        self._every *= 2
