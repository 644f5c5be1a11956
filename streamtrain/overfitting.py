"""The first batches of a source that shuffles, the same ones in each epoch: `overfit_batches=`.

Its law: they are pulled again each time, from generators that are put where they were the first time, so that a resumed
run has the same ones too and nothing of the source is kept. Streams of ours need none of it: they go to their first
epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from streamtrain import own_rng, rng
from streamtrain.data.iterable import IterableStream, from_iterable
from streamtrain.data.source import Stream

logger = logging.getLogger(__name__)


class SameBatches:
    """Iterates the first `count` items of a synchronous source."""

    def __init__(self, stream: IterableStream, count: int) -> None:
        self.source, self._stream, self._count = stream.source, stream, count
        self.batch_size = stream.batch_size
        self._own = own_rng.capture(stream)
        """How the generators that the source keeps stood the first time, and stand again each time."""

    def __iter__(self) -> Iterator[Any]:
        """All of them at once: they are few."""
        own_rng.put_back(self._stream, self._own)
        try:
            with rng.Rng(rng.seeded(0)).swapped_in():
                return iter(list(islice(iter(self.source), self._count)))
        finally:
            own_rng.put_back(self._stream, self._own)


def same_batches(stream: Stream, count: int) -> Stream:
    """A stream whose first `count` batches are the same in each epoch."""
    if not isinstance(stream, IterableStream) or stream.one_epoch or isinstance(stream.source, list | tuple):
        return stream
    if not stream.pulls_inside:
        name = type(stream.source).__name__
        logger.warning("overfit_batches: %s is asynchronous: whether its epochs begin alike is its own affair", name)
        return stream
    return from_iterable(SameBatches(stream, count))
