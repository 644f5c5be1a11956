"""`as_loader()`: a stream as a plain iterable, for loops and trainers that know no asyncio.

Its law: it gives what `async for` would, and its position is that of what was given. Where the loop turns, `handing`
knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.handing import Run, run_of
from streamtrain.data.source import Stream, say_superseded


class Loader:
    """What `as_loader` gives: iterate it once an epoch.

    Epochs follow each other as they do in `async for`: a finished one moves to the next, one that was left starts over.
    `state_dict` is the position after the last batch that the loop was given. Not for several threads at a time.
    """

    num_workers = 0
    sampler = batch_sampler = None
    pin_memory = persistent_workers = False

    def __init__(self, stream: Stream, collate: Callable[[Batch], Any] | None = None) -> None:
        self.stream = stream
        self._collate = collate
        self._run: Run | None = None
        self._superseded: set[Run] = set()
        """Ended by another iteration, while somebody may still ask them for a batch."""

    @property
    def batch_size(self) -> int | None:
        """Samples of a full batch; None where it differs."""
        return self.stream.batch_size

    @property
    def dataset(self) -> Samples:
        """Something with a length: that of an epoch in samples."""
        return Samples(self.stream)

    @property
    def drop_last(self) -> bool:
        """Whether a short last batch is left out."""
        return bool(getattr(self.stream, "drop_last", False))

    def __len__(self) -> int:
        """Batches of an epoch. Raises TypeError where nobody knows."""
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of this epoch; does nothing within it."""
        if epoch != self.stream.epoch:
            self.close()
        self.stream.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was given; JSON."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position: the next iteration continues there. Raises DataError if it is one of other data."""
        self.close()
        self.stream.load_state_dict(state)

    def close(self) -> None:
        """End a live iteration, and its threads."""
        run, self._run = self._run, None
        if run is not None:
            run.close()

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch over, or go on where `load_state_dict` went. Ends the iteration that was live, which says
        so (a warning) where it is asked for another batch: it must not pass for the end of an epoch."""
        self._supersede()
        give = self._collate
        batches = self._pulled() if self.stream.pulls_inside else self._handed()
        return batches if give is None else map(give, batches)

    def _pulled(self) -> Iterator[Batch]:
        """A synchronous source needs no thread."""
        passing = aiter(self.stream)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                batch = passing.next_nowait()
                assert batch is not None
                yield batch

    def _supersede(self) -> None:
        """Another iteration begins."""
        run = self._run
        if run is not None and not run.closed:
            self._superseded.add(run)
        self.close()

    def _handed(self) -> Iterator[Batch]:
        self._supersede()
        run = self._run = run_of(self.stream)
        trained = self.stream.trained
        try:
            while (bunch := run.get()) is not None:
                while bunch:
                    run.turn()
                    if run.closed:  # another iteration has begun, or the position has moved
                        break
                    trained(bunch[0].cursor)
                    yield bunch.popleft()
            if not run.closed:
                run.ended = True
                trained(Cursor(run.epoch + 1, 0))
            elif run in self._superseded:
                say_superseded()
        finally:
            self._superseded.discard(run)
            run.close()


class Samples:
    """What `loader.dataset` is: its `len` is the number of samples; the data itself comes by the loader alone."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        """Samples of an epoch. Raises TypeError where nobody knows."""
        count = self._stream.num_samples
        if count is None:
            raise TypeError("nobody knows how many samples this stream has")
        return count
