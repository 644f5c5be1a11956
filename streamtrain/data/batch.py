"""What a pass hands over: batches, each with the cursor after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from streamtrain.errors import DataError


class Cursor(NamedTuple):
    """A position in the order: so many source samples of this epoch lie behind."""

    epoch: int
    position: int


START = Cursor(0, 0)
MOST = 1 << 63
"""Epochs, and samples of one, are fewer."""


def cursor_of(state: Mapping[str, Any], what: str, keys: Sequence[str], optional: Sequence[str] = ()) -> Cursor:
    """The position in a state of this kind of stream, which has `epoch`, `position` and these keys, and no others.

    Raises DataError with the key's name.
    """
    if not isinstance(state, Mapping):
        raise DataError(f"this is no position of {what}: {state!r:.80}", hint=_FROM)
    needed = ("epoch", "position", *keys)
    for key in (*needed, *state):
        if key not in state or key not in (*needed, *optional):
            said = "has no" if key not in state else "has an unknown"
            raise DataError(f"this is no position of {what}: it {said} key {key!r}", hint=_FROM)
    for key in ("epoch", "position"):
        number = state[key]
        if type(number) is not int or not 0 <= number < MOST:
            raise DataError(
                f"this is no position of {what}: {key!r} is {number!r:.40}, not a whole number from 0 to 2**63 - 1",
                hint=_FROM,
            )
    return Cursor(state["epoch"], state["position"])


_FROM = "load what `state_dict()` gave, as it is"
"""What to do with a state that is none."""


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
