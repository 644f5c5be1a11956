"""What the wheel needs of a stream of batches, wherever they come from; people's own streams may satisfy it too."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn, Protocol, runtime_checkable

from streamtrain.data.batch import Batch, Cursor

logger = logging.getLogger(__name__)


def say_superseded() -> None:
    """Somebody asks a pass for more that another one has ended: it must not pass for the end of an epoch."""
    logger.warning(
        "a pass ends before its epoch is over: another one over this stream began (give each reader one of its own)"
    )


class Ending:
    """How a pass over a stream ends: where another one ended it, or an error, who asks it for more is told, once."""

    _superseded = False
    _untold: Exception | None = None
    """What went wrong, where whoever was to be told was cancelled meanwhile: it must not pass for an epoch's end."""

    def _end_by_another(self, live: bool) -> None:
        """Another pass begins; `live`: this one had not ended yet."""
        self._superseded = self._superseded or live

    def _no_more(self) -> NoReturn:
        """Give nothing more. Raises StopAsyncIteration, or what nobody was told of yet."""
        untold, self._untold = self._untold, None
        if untold is not None:
            try:
                raise untold
            finally:
                del untold  # its traceback leads to this very frame: a cycle that would keep the pass's memory
        if self._superseded:
            self._superseded = False
            say_superseded()
        raise StopAsyncIteration


class Pass(Protocol):
    """One epoch's batches, or the rest of them."""

    def __aiter__(self) -> AsyncIterator[Batch]:
        """Itself."""

    async def __anext__(self) -> Batch:
        """The next batch; StopAsyncIteration at the epoch's end."""

    def next_nowait(self) -> Batch | None:
        """The next batch if it is ready, None if not yet; StopAsyncIteration at the end, or the pass's failure."""

    async def aclose(self) -> None:
        """End the pass and its tasks and threads."""


@runtime_checkable
class Stream(Protocol):
    """Epochs of batches, with a position that can be saved."""

    pulls_inside: bool
    """A synchronous source: its pass is pulled on the train thread, by `next_nowait` alone."""

    @property
    def epoch(self) -> int:
        """The epoch in which the position lies."""

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch; None where nobody knows."""

    @property
    def batch_size(self) -> int | None:
        """Samples of a full batch; None where it is the source's affair."""

    async def open(self) -> None:
        """Read metadata, off the loop. Raises DataError or ConfigError; a second call does nothing."""

    def __len__(self) -> int:
        """Batches of a whole epoch. Raises TypeError where nobody knows."""

    def __aiter__(self) -> Pass:
        """Start a pass: the current epoch over, or from where `load_state_dict` went. Ends the pass that was live."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of this epoch; does nothing within it."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch returned, or under `follow` the last one trained; JSON values only."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there. Raises DataError if it belongs to other data, CheckpointError if to another order."""

    def follow(self, driven: bool) -> None:
        """While `driven`, the position that `state_dict` tells is moved by `trained` alone."""

    def trained(self, cursor: Cursor) -> None:
        """All before this position is part of a finished update."""

    def statistics(self) -> Any:
        """How it does: a frozen dataclass."""

    async def aclose(self) -> None:
        """End what is live and give memory back."""
