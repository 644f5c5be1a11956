"""Which bytes of far objects to request together, and how many requests at once. Pure.

Its law: a request costs a latency whatever its size, so neighbours share one; and as many are under way as the threads
could use up, and the store gives, in that time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

GAP_BYTES = 256 << 10
"""Chunks of one object with at most so many bytes between them are requested together: at 20 ms a request and 50 MB/s
a connection, these bytes take a quarter of the time that a request of its own would wait."""
SPAN_BYTES = 8 << 20
"""No request is made larger than this by joining chunks: more, and fewer of them could be under way together."""
RATE_PER_THREAD = 1 << 30
"""Bytes a second that a thread decodes and gathers at best: what the requests under way are to keep up with."""
HEADROOM = 4.0
"""Times as many requests as the answers that came lately account for: so the number grows, and waits even out."""
MIN_REQUESTS = 16
"""At least so many are under way, where the budget allows: one connection gives a fraction of what a store can."""
MAX_REQUESTS = 64
"""At most so many: each holds a connection."""
BUDGET_SHARE = 4
"""Of a stream's memory, fetched bytes that wait for a thread take at most one part in so many."""


@dataclass(frozen=True)
class Span(Generic[T]):
    """Bytes of one object that are requested together, and what lies in them."""

    start: int
    stop: int
    members: tuple[tuple[int, int, T], ...]
    """Start and stop in the object, and whose bytes these are."""


def coalesce(wanted: Iterable[tuple[int, int, T]], *, gap: int = GAP_BYTES, most: int = SPAN_BYTES) -> list[Span[T]]:
    """Spans that cover what is wanted, `(start, stop, whose)` in any order, in the order of their bytes.

    Neighbours with at most `gap` bytes between them share a span of at most `most` bytes; a larger one stands alone.
    """
    spans: list[Span[T]] = []
    members: list[tuple[int, int, T]] = []
    start = stop = 0
    for first, last, whose in sorted(wanted, key=lambda one: one[:2]):
        if members and (first - stop > gap or max(stop, last) - start > most):
            spans.append(Span(start, stop, tuple(members)))
            members = []
        if not members:
            start = stop = first
        members.append((first, last, whose))
        stop = max(stop, last)
    if members:
        spans.append(Span(start, stop, tuple(members)))
    return spans


def requests_at_once(*, seconds: float, answers: float, request_bytes: float, threads: int, memory: int) -> int:
    """How many requests are to be under way together.

    What the threads could use up, and what the store gives, each for as long as a request takes:

        wanted = min(threads * RATE_PER_THREAD * seconds, memory / BUDGET_SHARE) / request_bytes
        given  = HEADROOM * answers * seconds
        result = min(wanted, given) + threads, within MIN_REQUESTS and MAX_REQUESTS

    `seconds`: the shortest that a request of this pass took, so that waiting in a queue that is ours is left out;
    `answers`: how many came in a second lately. Where more requests bring more answers, `given` grows until
    they bring no more: a store that is saturated is not asked for more than it can give.
    """
    wanted = min(threads * RATE_PER_THREAD * seconds, memory / BUDGET_SHARE) / max(1.0, request_bytes)
    given = HEADROOM * answers * seconds
    return max(MIN_REQUESTS, min(MAX_REQUESTS, math.ceil(min(wanted, given)) + threads))
