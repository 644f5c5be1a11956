"""`mix`: batches of several streams, drawn in a keyed order, resumable from any of them.

Its law: the draws are arithmetic (data.draws), so a position is the number of draws and the position of each source;
the sources' own prefetching changes none.
"""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from streamtrain.data.batch import START, Batch, Cursor, cursor_of
from streamtrain.data.draws import Draws, Weights
from streamtrain.data.iterable import IterableStream, as_stream
from streamtrain.data.loader import Loader
from streamtrain.data.mix_pass import MixPass, at
from streamtrain.data.options import at_least
from streamtrain.data.permutation import derive_key
from streamtrain.data.source import Pass, Stream
from streamtrain.errors import ConfigError, DataError


def mix(
    sources: Sequence[Any],
    *,
    weights: Weights | None = None,
    stop: Literal["first", "all"] | int = "first",
    seed: int = 0,
) -> Mix:
    """A stream of the batches of several: draw i picks its source by a keyed function of seed, weights and i.

    `sources`: streams, or what `from_iterable` takes; each has its own batch size. They may share a `Budget`.
    `weights`: one number a source (equal by default), or a function of i that gives them. See `Mix.set_weights`.
    `stop`: "first": an epoch ends when a source is drawn that has no further batch; "all": such a source starts over
    (with another order, where it shuffles) until each was through once, as `interleave_datasets(...,
    stopping_strategy="all_exhausted")` does; a number: an epoch has so many batches, the next one goes on in each
    source where that one ended, and sources start over as often as it takes.

    Raises ConfigError.
    """
    return Mix(sources, weights=weights, stop=stop, seed=seed)


@dataclass(frozen=True, slots=True)
class MixStatistics:
    """How a mix does."""

    drawn: tuple[int, ...]
    """Batches from each source since the mix was made. Far from the weights: too few draws yet, or they changed."""
    restarts: tuple[int, ...]
    """How often each source started over within an epoch. Many: it is small beside its weight, and is seen often."""
    sources: tuple[Any, ...]
    """The statistics of each; the one whose `queue.wait_seconds` is largest is what the mix waits for."""


class Mix:
    """Several streams as one; made by `mix`."""

    def __init__(
        self, sources: Sequence[Any], *, weights: Weights | None, stop: Literal["first", "all"] | int, seed: int
    ) -> None:
        if not isinstance(sources, list | tuple) or not sources:
            raise ConfigError(f"mix takes a list of streams, not {sources!r:.80}")
        if len({id(source) for source in sources}) < len(sources):
            raise ConfigError("mix was given one stream twice: it has one position", hint="make two of it, or weigh it")
        if any(isinstance(source, Mix) for source in sources):
            raise ConfigError("a mix of mixes", hint="mix all sources at once: weights multiply")
        if stop not in ("first", "all") and (isinstance(stop, bool) or not isinstance(stop, int) or stop < 1):
            raise ConfigError(f'stop must be "first", "all" or a number of batches above 0, not {stop!r}')
        self.sources = [as_stream(source) for source in sources]
        self.stop, self.seed = stop, at_least(seed, 0, "seed")
        self.draws = Draws(len(sources), weights, self.seed)
        self.pulls_inside = all(source.pulls_inside for source in self.sources)
        self.needs_loop = any(getattr(source, "needs_loop", True) or source.pulls_inside for source in self.sources)
        """Whether something of it gets on only while its loop turns."""
        self.drawn, self.restarts = [0] * len(sources), [0] * len(sources)
        self._cursor = START
        """After the last batch returned, or (driven) trained."""
        self._heads = [START for _ in sources]
        """The position of each source there."""
        self._begins = [START for _ in sources]
        """Where each stood when the epoch began."""
        self._begins_before = self._begins
        self._resume = False
        self._driven = False
        self._head = START
        """After the last batch returned."""
        self._untrained: collections.deque[tuple[Cursor, int, Cursor]] = collections.deque()
        self._live: MixPass | None = None
        self._kept: dict[int, Pass] = {}
        """Passes over foreign sources that go on in the next epoch."""

    # ---- what it holds

    async def open(self) -> None:
        """Read the metadata of all sources, off the loop. Raises what they raise."""
        await asyncio.gather(*(source.open() for source in self.sources))

    @property
    def epoch(self) -> int:
        """The epoch in which the position lies."""
        return self._head.epoch

    @property
    def num_samples(self) -> int | None:
        """Not known: sources start over, or end early."""
        return None

    @property
    def batch_size(self) -> int | None:
        """That of all sources; None where they differ."""
        sizes = {source.batch_size for source in self.sources}
        return sizes.pop() if len(sizes) == 1 else None

    def __len__(self) -> int:
        """Batches of an epoch. Raises TypeError where a source does not know its own, or where weights change."""
        if isinstance(self.stop, int):
            return self.stop
        if not self.draws.fixed:
            raise TypeError("where weights change, only the end tells how long an epoch is; give stop= a number")
        return self.draws.length([len(source) for source in self.sources], every=self.stop == "all")

    def set_weights(self, from_step: int, weights: Sequence[float]) -> None:
        """Other weights from draw `from_step` on, kept in the position. Raises ConfigError for what was drawn already.

        Draws are counted within an epoch; over all epochs where `stop` is a number.
        """
        if at_least(from_step, 0, "from_step") < (now := self.step_of(self._head)):
            raise ConfigError(
                f"set_weights from step {from_step}, but {now} are drawn already", hint="name a later one"
            )
        self.draws.change(from_step, weights)

    def step_of(self, cursor: Cursor) -> int:
        """The number of the draw at this position."""
        return cursor.position + (cursor.epoch * self.stop if isinstance(self.stop, int) else 0)

    # ---- a pass

    def __aiter__(self) -> MixPass:
        """Start a pass: the current epoch over, or from where `load_state_dict` went. Ends the one that was live."""
        if self._live is not None:
            self._live.supersede()
        kept, self._kept = self._kept, {}
        if not self._resume:
            self._go_to(Cursor(self.epoch, 0), self._begins)
        self._resume = False
        before = self._live if not self.pulls_inside else None
        self._live = MixPass(self, self._head, list(self._heads), kept, before)
        return self._live

    def _go_to(self, cursor: Cursor, heads: Sequence[Cursor]) -> None:
        self._cursor = self._head = cursor
        self._heads = list(heads)
        self._untrained.clear()
        self._kept = {}

    def handed(self, cursor: Cursor, number: int, theirs: Cursor) -> None:
        """A pass hands over the batch of this source, which then stands there."""
        self._head = cursor
        self.drawn[number] += 1
        if self._driven:
            self._untrained.append((cursor, number, theirs))
        else:
            self._cursor, self._heads[number] = cursor, theirs

    def finished(self, epoch: int, heads: Sequence[Cursor], kept: dict[int, Pass]) -> None:
        """A pass has come to its end: the position moves to the next epoch."""
        following = Cursor(epoch + 1, 0)
        self._begins_before = self._begins
        self._begins = [*heads] if isinstance(self.stop, int) else [following for _ in heads]
        self._head = following
        if not self._driven:
            self._go_to(following, self._begins)
        self._kept = kept

    def as_loader(self, collate: Callable[[Batch], Any] | None = None) -> Loader:
        """A plain iterable over this stream, for Lightning, Accelerate, Hugging Face and bare loops.

        It gives batches (`x, y = batch`), or what `collate` makes of each: `lambda b: {"x": b.inputs, "labels":
        b.targets}`. It has `len`, `set_epoch`, `state_dict` and `load_state_dict`; while it is iterated nobody else
        can read the stream.
        """
        return Loader(self, collate)

    # ---- position

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of this epoch, and of each source's epoch of that number; does nothing within it."""
        if at_least(epoch, 0, "epoch") != self.epoch:
            if self._live is not None:
                self._live.end()
            goes_on = self._head == (epoch - 1, self.stop)  # loaded where an epoch of a number of batches ended
            self._begins = list(self._heads) if goes_on else [Cursor(epoch, 0) for _ in self.sources]
            self._go_to(Cursor(epoch, 0), self._begins)
            self._resume = False

    def follow(self, driven: bool) -> None:
        """While `driven`, the position that `state_dict` tells is moved by `trained` alone. Raises ConfigError."""
        followed: list[Stream] = []
        try:
            for source in self.sources:
                source.follow(driven)
                followed.append(source)
        except ConfigError:
            for source in followed:
                source.follow(not driven)
            raise
        if self._driven and not driven:
            self._settle()
        self._driven = driven

    def _settle(self) -> None:
        """Nobody trains any more: what was drawn and not trained is given again."""
        if not self._untrained:
            return self._go_to(self._head, self._begins if not self._head.position else self._heads)
        if self._live is not None:
            self._live.end()
        if self._cursor.epoch != self._head.epoch:
            self._begins = self._begins_before
        return self._go_to(self._cursor, self._heads)

    def trained(self, cursor: Cursor) -> None:
        """All before this position is part of a finished update."""
        if cursor == self._head and not cursor.position:  # all of the epoch before
            kept = self._kept
            self._go_to(cursor, self._begins)
            self._kept = kept
            return
        self._cursor = cursor
        while self._untrained and self._untrained[0][0] <= cursor:
            _, number, theirs = self._untrained.popleft()
            self._heads[number] = theirs
            self.sources[number].trained(theirs)

    def state_dict(self) -> dict[str, Any]:
        """The position, and that of each source; JSON, at most 1 KiB for up to 12 `ZarrStream`s."""
        state = {
            "kind": "mix",
            "epoch": self._cursor.epoch,
            "position": self._cursor.position,
            "of": self._fingerprint(),
            "sources": [self._source_state(number) for number in range(len(self.sources))],
        }
        if isinstance(self.stop, int):
            state["begins"] = [list(begin) for begin in self._begins]
        if not self.draws.fixed:
            state["weights"] = self.draws.changes
        return state

    def _fingerprint(self) -> dict[str, Any]:
        weights = self.draws.changes[0][1] if self.draws.changes and self.draws.changes[0][0] == 0 else "a function"
        text = weights if len(json.dumps(weights)) <= 80 else f"digest {derive_key(json.dumps(weights)):016x}"
        return {"seed": self.seed, "stop": self.stop, "weights": text, "sources": len(self.sources)}

    def foreign(self, number: int) -> bool:
        """Whether this source holds no thread and no memory of ours."""
        return isinstance(self.sources[number], IterableStream)

    def _source_state(self, number: int) -> Any:
        source, (epoch, position) = self.sources[number], self._heads[number]
        state = source.state_dict()
        if "of" in state:
            known = state.get("skipped") if (state["epoch"], state["position"]) == (epoch, position) else None
            digest = f"{derive_key(json.dumps(state['of'], sort_keys=True)):016x}"
            return [epoch, position, digest] if known is None else [epoch, position, digest, known]
        return at(state, epoch, position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; the next pass continues there. Raises DataError, naming the difference."""
        given: object = state
        if isinstance(given, Mapping) and given.get("kind") != "mix":
            raise DataError(f"a position in a {given.get('kind', 'ZarrStream')} is none in a mix")
        cursor = cursor_of(state, "a mix", ["kind", "of", "sources"], ["begins", "weights"])
        if not isinstance(state["of"], Mapping):
            raise DataError(f"this is no position of a mix: of {state['of']!r:.40}")
        mine = self._fingerprint()
        table = [
            f"{key}: {state['of'].get(key)} then, {mine[key]} now" for key in mine if mine[key] != state["of"].get(key)
        ]
        if table:
            raise DataError(
                f"the saved position belongs to another mix: {'; '.join(table)}",
                hint="use the same sources, weights, stop and seed, or start over",
            )
        if self._live is not None:
            self._live.end()
        heads = [self._load_source(number, saved) for number, saved in enumerate(state["sources"])]
        if "weights" in state:
            self.draws.restore([(step, weights) for step, weights in state["weights"]])
        start = Cursor(cursor.epoch, 0)
        begins = state.get("begins")
        self._begins = [Cursor(*begin) for begin in begins] if begins is not None else [start for _ in heads]
        self._go_to(cursor, heads)
        self._resume = True

    def _load_source(self, number: int, saved: Any) -> Cursor:
        """Have a source check a position; the pass goes there."""
        source = self.sources[number]
        if isinstance(saved, dict):
            source.load_state_dict(saved)
            return Cursor(saved["epoch"], saved["position"])
        epoch, position, digest, *skipped = saved
        state = source.state_dict()
        if digest != f"{derive_key(json.dumps(state.get('of'), sort_keys=True)):016x}":
            raise DataError(
                f"the saved position belongs to other data or another order: source {number} of the mix differs",
                hint="use the same data, seed, split and shuffle for it, or start over",
            )
        rest: dict[str, Any] = {"skipped": skipped[0]} if skipped else {}
        source.load_state_dict({"epoch": epoch, "position": position, **rest, "of": state["of"]})
        return Cursor(epoch, position)

    def statistics(self) -> MixStatistics:
        """How it does."""
        return MixStatistics(
            tuple(self.drawn), tuple(self.restarts), tuple(source.statistics() for source in self.sources)
        )

    async def __aenter__(self) -> Mix:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End what is live, and give the memory of all sources back."""
        if self._live is not None:
            await self._live.aclose()
        kept, self._kept = self._kept, {}
        for passing in kept.values():
            await passing.aclose()
        for source in self.sources:
            await source.aclose()
