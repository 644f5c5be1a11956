"""What a pass hands over: batches, each with the cursor after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from streamtrain.errors import DataError


class Cursor(NamedTuple):
    """A position in the order: so many source samples of this epoch lie behind."""

    epoch: int
    position: int


START = Cursor(0, 0)


class NoRows(DataError, TypeError):
    """A batch whose inputs have no rows that could be counted."""


@dataclass(slots=True)
class Batch:
    """A batch: `x, y = batch`.

    `inputs`: array or tensor of shape (B, ...), or a dict of them by array name; `targets` the same, or None.
    `index`: int64 of shape (B,), the numbers of the samples in the unsplit array (None from a foreign iterable).
    All are private to the holder, writable, and valid for as long as anybody refers to them.
    """

    inputs: Any
    targets: Any = None
    index: Any = None
    epoch: int = 0
    cursor: Cursor = START
    """The position after this batch."""
    rng: np.random.Generator | None = None
    """In transforms only: a generator keyed by seed, epoch and position."""

    def __iter__(self) -> Iterator[Any]:
        yield self.inputs
        yield self.targets

    def __len__(self) -> int:
        """Number of samples in this batch (rows of the first input where there is no index). Raises DataError."""
        if self.index is not None:
            return len(self.index)
        first: Any = self.inputs
        try:
            while isinstance(first, dict | list | tuple) and not hasattr(first, "shape"):
                first = next(iter(first.values())) if isinstance(first, dict) else first[0]
            sparse = isinstance(first, tuple)
            return int(getattr(first, "shape", (0,))[0]) if sparse else len(first)
        except (TypeError, StopIteration, IndexError) as error:
            raise NoRows(
                f"a batch whose inputs are {self.inputs!r:.80} has no rows",
                hint="inputs are arrays or tensors of shape (rows, ...), or dicts of them; a sample is a batch of one",
            ) from error
