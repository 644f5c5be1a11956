"""Anything that can be iterated, as a stream: lists, generators, async generators, a DataLoader.

Its law: the position is a number of items. To go there again the source is asked for its own state if it has one,
else its items are produced again and thrown away, and it is said how many.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streamtrain.data.batch import START, Batch, Cursor, cursor_of
from streamtrain.data.loader import Loader
from streamtrain.data.source import Ending, Stream
from streamtrain.errors import ConfigError, DataError, StreamtrainError, UserCodeError, named

logger = logging.getLogger(__name__)


def from_iterable(source: Any) -> IterableStream:
    """A stream of the items of `source`, an iterable or async iterable: `(x, y)`, a dict (inputs), or a Batch.

    Each epoch iterates it again; an iterator, which can't start over, serves one. If it has `state_dict` and
    `load_state_dict` they are used to resume, `set_epoch` is called where it is defined. Raises ConfigError.
    """
    return IterableStream(source)


def as_stream(source: Any) -> Stream:
    """`source` itself if it is a stream, else what `from_iterable` makes of it."""
    if is_stream(source):
        stream: Stream = source
        return stream
    return from_iterable(source)


def is_stream(source: object) -> bool:
    """Whether it is a stream already."""
    return all(hasattr(type(source), name) for name in ("follow", "trained", "load_state_dict", "set_epoch"))


def _refuse_samples(source: Any) -> None:
    """Raise ConfigError for what gives samples, not batches: a table of them, as an array or as torch's dataset."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(source).__mro__}  # no torch here
    dataset = ("torch.utils.data.dataset", "Dataset") in kinds and not hasattr(source, "__iter__")
    array = ("torch", "Tensor") in kinds or isinstance(source, np.ndarray)
    if dataset or (array and source.ndim < 3):
        hint = f"Give a DataLoader({'dataset' if dataset else 'TensorDataset(x, y)'}, batch_size=..., shuffle=True)."
        if dataset:
            hint = f"{hint[:-1]}, or with batch_size=None where it gives batches."
        raise ConfigError(f"a {type(source).__name__} gives samples, not batches", hint=hint)


@dataclass(frozen=True, slots=True)
class IterableStatistics:
    """How a foreign source does."""

    items: int
    """Items that it gave, discarded ones included."""
    discarded: int
    """Items that were produced only to get to a position again: the cost of a source without `state_dict`."""


class IterableStream:
    """A foreign source in the shape of a stream; made by `from_iterable`."""

    def __init__(self, source: Any) -> None:
        self.pulls_inside = not hasattr(source, "__aiter__")
        self.needs_loop = not self.pulls_inside
        if self.pulls_inside and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
            raise ConfigError(
                f"a stream must be iterable, got {type(source).__name__}",
                hint="Give a ZarrStream, a DataLoader, or anything that `for` or `async for` takes.",
            )
        if isinstance(source, str | bytes | Mapping):
            hint = "Give a list of (x, y)."
            if isinstance(source, str):
                hint = f"Give the stream of a store: ZarrStream({source!r:.60}, batch_size=...)."
            raise ConfigError(f"a {type(source).__name__} is no series of batches", hint=hint)
        _refuse_samples(source)
        self.source = source
        self.one_epoch = isinstance(source, Iterator | AsyncIterator)
        """An iterator: it can't start over."""
        self._cursor = self._trained = START
        self._driven = False
        self._resume: dict[str, Any] | None = None
        self._known: tuple[int, dict[str, Any] | None] = (0, None)
        """The source's own state, and how many items it had given by then."""
        self._first: tuple[int, Any] | None = None
        """The same after the first item of the live pass, of use once that is trained."""
        self._next: Any = None
        """The source's own state at the end of the last pass: there its next epoch begins."""
        self._stateful = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self._live: IterablePass | None = None
        self._again: list[Any] = []
        """What an iterator has given already and is to give once more, before the rest."""
        self._used = False
        self._items = self._discarded = 0

    @property
    def epoch(self) -> int:
        """The epoch in which the position lies."""
        return self._position.epoch

    @property
    def _position(self) -> Cursor:
        return self._trained if self._driven else self._cursor

    @property
    def num_samples(self) -> int | None:
        """Not known."""
        return None

    @property
    def batch_size(self) -> int | None:
        """The source's, where it tells."""
        size = getattr(self.source, "batch_size", None)
        return size if type(size) is int else None

    async def open(self) -> None:
        """There is nothing to open."""

    def __len__(self) -> int:
        """Items of an epoch, where the source knows. Raises TypeError."""
        return len(self.source)

    def __aiter__(self) -> IterablePass:
        """Start a pass; ends the one that was live."""
        if self._live is not None:
            self._live.supersede()
        resume, self._resume = self._resume, None
        if resume is None:
            self._cursor = self._trained = Cursor(self.epoch, 0)
            self._known = (0, None)
        self._first = None
        if self.one_epoch and (self._used or self.epoch > 0):
            raise ConfigError(
                f"this {type(self.source).__name__} can't start over: it serves one epoch",
                hint="Give something that can be iterated again: a list, a DataLoader, an object with __iter__.",
            )
        self._used = True
        self._live = IterablePass(self, resume)
        return self._live

    def as_loader(self, collate: Callable[[Batch], Any] | None = None) -> Loader:
        """A plain iterable over this stream, for Lightning, Accelerate, Hugging Face and bare loops.

        It gives batches (`x, y = batch`), or what `collate` makes of each: `lambda b: {"x": b.inputs, "labels":
        b.targets}`. It has `len`, `set_epoch`, `state_dict` and `load_state_dict`; while it is iterated nobody else
        can read the stream.
        """
        return Loader(self, collate)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of this epoch; does nothing within it."""
        if epoch != self.epoch:
            before, self._resume = self._resume, None
            self._cursor = self._trained = Cursor(epoch, 0)
            self._known, self._first = (0, None), None
            if before is not None and before["epoch"] == epoch - 1 and before.get("next") is not None:
                self._known = (0, before["next"])  # the epoch before was trained, and its end alone was owed
                self._resume = {"position": 0, "source_position": 0, "source": before["next"]}

    def state_dict(self) -> dict[str, Any]:
        """The position, and the source's own state at or before it."""
        epoch, position = self._position
        if self._stateful and self._position == self._cursor and self._live is not None and not self._again:
            self._remember(position)
        if self._first is not None and self._known[0] < self._first[0] <= position:
            self._known = self._first
        at, state = self._known
        told = {"kind": "iterable", "epoch": epoch, "position": position, "source_position": at, "source": state}
        ended = position > 0 and self._cursor == (epoch + 1, 0)
        return {**told, "next": self._next} if ended and self._next is not None else told

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there; the next pass continues. Raises DataError."""
        given: object = state
        if isinstance(given, Mapping) and given.get("kind") != "iterable":
            raise DataError(f"a position in a {given.get('kind', 'foreign')} stream is none in an iterable")
        cursor = cursor_of(state, "an iterable", ["kind", "source_position", "source"], ["next"])
        if type(state["source_position"]) is not int:
            raise DataError(f"this is no position of an iterable: source_position {state['source_position']!r:.40}")
        self._cursor = self._trained = cursor
        self._known, self._first = (state["source_position"], state["source"]), None
        self._resume = state

    def follow(self, driven: bool) -> None:
        """While `driven`, only `trained` moves the position."""
        if self._driven and not driven and self._trained != self._cursor:  # what was not trained is given again
            if self._live is not None:
                self._live.end()
            self._live, self._cursor = None, self._trained
        self._driven, self._trained = driven, self._position

    def trained(self, cursor: Cursor) -> None:
        """All before this position is part of a finished update."""
        self._trained = cursor

    def statistics(self) -> IterableStatistics:
        """How it does."""
        return IterableStatistics(self._items, self._discarded)

    async def __aenter__(self) -> IterableStream:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the live pass."""
        if self._live is not None:
            await self._live.aclose()

    def put_back(self, batch: Batch) -> None:
        """Give `batch`, the first that an iterator gave, once more before the rest; its pass leaves it open."""
        if self._live is not None:
            self._live.end()
        self._again, self._used = [batch], False
        self._cursor = Cursor(self._cursor.epoch, 0)

    def _remember(self, position: int) -> None:
        """Keep the source's own state as the one after `position` items."""
        self._known = self._asked(position) or self._known

    def _asked(self, position: int) -> tuple[int, Any] | None:
        """The source's own state, as the one after `position` items; None where JSON can't hold it, which is said. A
        copy: it may be what the source goes on with."""
        try:
            state = self.source.state_dict()
            json.dumps(state, allow_nan=False)
            state = copy.deepcopy(state)
        except (TypeError, ValueError) as error:
            self._stateful = False
            logger.warning("the state of %s can't be kept as JSON (%s): resuming replays", _name(self.source), error)
            return None
        return position, state

    def began(self) -> None:
        """A pass is to ask for the first item of an epoch, whose order may be another than that of a new source."""
        self._known = self._peeked(0) or self._known

    def gave(self, position: int) -> None:
        """A pass has its first item. What a source tells then is of this epoch, whatever it tells at the end of one;
        it is ahead of what is trained from now on, and may not be asked again before the epoch's end."""
        if self._first is None:
            self._first = self._peeked(position)

    def ended(self) -> None:
        """A pass has given all of its epoch."""
        self._next = (self._peeked(0) or (0, None))[1]

    def _peeked(self, position: int) -> tuple[int, Any] | None:
        """As `_asked`; None, too, where it can't tell: that is raised where a state is needed."""
        with suppress(Exception):
            return self._asked(position) if self._stateful else None
        return None


class IterablePass(Ending):
    """One epoch's items; a synchronous source gives each at once."""

    def __init__(self, stream: IterableStream, resume: dict[str, Any] | None) -> None:
        self._stream = stream
        self._epoch = stream.epoch
        self._resume = resume
        self._position = 0
        self._iterator: Any = None
        self._begun = False
        self._at_an_end = False
        """It began with a state of the source's that may be that of the end of an epoch: then nothing comes first."""
        self._ended = False

    def __aiter__(self) -> IterablePass:
        return self

    async def __anext__(self) -> Batch:
        """The next batch."""
        if self._stream.pulls_inside:
            batch = self.next_nowait()
            assert batch is not None
            return batch
        if self._ended:
            self._no_more()
        try:
            if not self._begun:
                for _ in range(self._begin(lambda: aiter(self._stream.source))):
                    await self._draw_async()
            try:
                return self._taken(await self._draw_async())
            except StopAsyncIteration:
                if not self._at_an_end:
                    raise
                self._iterator, self._at_an_end = aiter(self._stream.source), False
                return self._taken(await self._draw_async())
        except StopAsyncIteration:
            self._finish()
            raise
        except StreamtrainError:
            raise
        except Exception as error:
            raise _raised(self._stream.source, error) from error

    def next_nowait(self) -> Batch | None:
        """The next item of a synchronous source; None from an asynchronous one, which only `await` can ask."""
        if not self._stream.pulls_inside:
            return None
        if self._ended:
            self._no_more()
        return self._taken(self._asked(self._next))

    def begin_nowait(self) -> None:
        """Have a synchronous source produce again what comes before the position, and nothing more."""
        if not self._begun:
            self._asked(self._replay)

    def _next(self) -> Any:
        if not self._begun:
            self._replay()
        elif self._stream._stateful and self._stream._trained == (self._epoch, self._position):
            self._stream._remember(self._position)  # the only moment at which it is the state of a trained position
        try:
            return self._draw()
        except StopIteration:
            if not self._at_an_end:
                raise
            self._iterator, self._at_an_end = iter(self._stream.source), False
            return self._draw()

    def _replay(self) -> None:
        for _ in range(self._begin(lambda: iter(self._stream.source))):
            self._draw()

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except StopIteration:
            self._finish()
            raise StopAsyncIteration from None
        except StreamtrainError:
            raise
        except Exception as error:
            raise _raised(self._stream.source, error) from error

    def _draw(self) -> Any:
        return self._stream._again.pop() if self._stream._again else next(self._iterator)

    async def _draw_async(self) -> Any:
        return self._stream._again.pop() if self._stream._again else await anext(self._iterator)

    def _begin(self, start: Any) -> int:
        """Start the iterator where the pass begins; how many items are to be produced again and discarded."""
        stream, source = self._stream, self._stream.source
        if hasattr(source, "set_epoch"):
            source.set_epoch(self._epoch)
        repeat = 0
        if self._resume is not None:
            position, at, state = (self._resume[key] for key in ("position", "source_position", "source"))
            if state is None or not stream._stateful:
                at = 0
            else:
                source.load_state_dict(state)
                stream._again.clear()
                self._at_an_end = not position
            repeat = position - at
            self._position = position
            if repeat:
                stream._discarded += repeat
                logger.info("%s: %d batches are produced again and discarded to resume", _name(source), repeat)
        else:
            stream.began()
        self._iterator, self._begun = start(), True
        return int(repeat)

    def _taken(self, item: Any) -> Batch:
        self._position += 1
        self._at_an_end = False
        self._stream._items += 1
        cursor = Cursor(self._epoch, self._position)
        self._stream._cursor = cursor
        if self._stream._stateful:
            self._stream.gave(self._position)
        return _batch(item, cursor)

    def _finish(self) -> None:
        if not self._ended:
            self._ended = True
            self._stream._cursor = Cursor(self._epoch + 1, 0)
            self._stream.ended()

    def supersede(self) -> None:
        """Another pass begins: end, and say so to who asks for more."""
        self._end_by_another(not self._ended)
        self.end()

    def end(self) -> None:
        """Give nothing any more."""
        self._ended, self._iterator = True, None

    async def aclose(self) -> None:
        """End the pass, and an async generator with it. Raises UserCodeError where that fails."""
        iterator, self._ended, self._iterator = self._iterator, True, None
        if hasattr(iterator, "aclose"):
            try:
                await iterator.aclose()
            except Exception as error:
                raise _raised(self._stream.source, error) from error


def _batch(item: Any, cursor: Cursor) -> Batch:
    if isinstance(item, Batch):
        return replace(item, epoch=cursor.epoch, cursor=cursor)
    if isinstance(item, tuple | list) and len(item) in (1, 2):
        return Batch(item[0], item[1] if len(item) == 2 else None, epoch=cursor.epoch, cursor=cursor)
    if isinstance(item, Mapping):
        return Batch(dict(item), epoch=cursor.epoch, cursor=cursor)
    if hasattr(item, "shape"):
        return Batch(item, epoch=cursor.epoch, cursor=cursor)
    many = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    raise DataError(
        f"item {cursor.position - 1} of the iterable is a {type(item).__name__}{many}, not a batch",
        hint="Items are (inputs, targets), a dict of inputs, or a streamtrain.Batch.",
    )


def _name(source: Any) -> str:
    return type(source).__name__


def _raised(source: Any, error: Exception) -> UserCodeError:
    return UserCodeError(
        f"the data source {_name(source)} raised {named(error)}",
        hint="The traceback (--debug) shows the line.",
    )
