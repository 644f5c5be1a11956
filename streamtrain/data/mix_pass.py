"""One epoch of a mix: each draw asks its source, which starts when it is first drawn, and over where it must.

Its law: nothing is drawn ahead of what is handed over; what the sources read ahead is their own affair.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.budget import BudgetHeld
from streamtrain.data.pulling import Puller
from streamtrain.data.source import Ending, Pass
from streamtrain.errors import DataError

if TYPE_CHECKING:
    from streamtrain.data.mix import Mix

AGAIN = 1 << 20
"""A source that starts over within epoch e goes to its epochs e + AGAIN, e + 2 * AGAIN, ...: no order comes twice."""


class MixPass(Ending):
    """One epoch's draws from a position on."""

    def __init__(
        self, mix: Mix, start: Cursor, heads: list[Cursor], kept: dict[int, Pass], before: MixPass | None
    ) -> None:
        """`kept`: passes that are live already; `before`: a pass that is to end first."""
        self._before = before
        self._mix, self._at, self._heads = mix, start, heads
        self._passes = kept
        self._over: list[Pass] = []
        self._opened = False
        self._fresh: set[int] = set()
        """Sources that began an epoch and gave nothing yet."""
        self._puller: Puller | None = None
        self._ended = False

    def __aiter__(self) -> MixPass:
        return self

    async def __anext__(self) -> Batch:
        """The next batch. Raises what the drawn source raises."""
        try:
            if self._before is not None:
                await self._before.aclose()
                self._before = None
            if not self._opened:
                await self._mix.open()
                self._opened = True
            while (batch := self.next_nowait()) is None:
                number = self._number()
                try:
                    batch = await self._pulled(number)
                except StopAsyncIteration:
                    if not self._ended:
                        self._exhausted(number)
                else:
                    if not self._ended:  # else closed meanwhile: as at any other time, nothing more is given
                        return self._taken(number, batch)
            return batch
        except BudgetHeld:
            raise
        except (StopAsyncIteration, Exception) as error:
            try:
                await self.aclose()
            except asyncio.CancelledError:
                self._untold = None if isinstance(error, StopAsyncIteration) else error
                raise
            raise

    async def _pulled(self, number: int) -> Batch:
        """The next batch of a source; a synchronous one among others is pulled in a thread of ours."""
        if not self._mix.sources[number].pulls_inside:
            return await anext(self._pass(number))
        if self._puller is None:
            self._puller = Puller("streamtrain-mix")
        return await self._puller.pull(self._pass(number))

    def next_nowait(self) -> Batch | None:
        """The next batch if the drawn source has it ready."""
        while True:
            if self._before is not None:
                return None
            number = self._number()
            if self._mix.sources[number].pulls_inside and not self._mix.pulls_inside:
                return None
            try:
                batch = self._pass(number).next_nowait()
            except StopAsyncIteration:
                self._exhausted(number)
                continue
            return None if batch is None else self._taken(number, batch)

    def _number(self) -> int:
        """The source of the next batch; StopAsyncIteration at the end."""
        if not self._ended and self._at.position == self._mix.stop:
            self._finish()
        if self._ended:
            self._no_more()
        return self._mix.draws.source(self._mix.step_of(self._at))

    def _pass(self, number: int) -> Pass:
        """The live pass of a source, started where it stands."""
        if number not in self._passes:
            source, (epoch, position) = self._mix.sources[number], self._heads[number]
            if position:
                source.load_state_dict(at(source.state_dict(), epoch, position))
            else:
                source.set_epoch(epoch)
                self._fresh.add(number)
            self._passes[number] = aiter(source)
        return self._passes[number]

    def _taken(self, number: int, batch: Batch) -> Batch:
        theirs = self._heads[number] = batch.cursor
        self._fresh.discard(number)
        self._at = Cursor(self._at.epoch, self._at.position + 1)
        batch.epoch, batch.cursor = self._at.epoch, self._at
        self._mix.handed(self._at, number, theirs)
        return batch

    def _exhausted(self, number: int) -> None:
        """A drawn source has no further batch: that ends the epoch, or it starts over."""
        mix, epoch = self._mix, self._at.epoch
        self._over.append(self._passes.pop(number))
        if number in self._fresh:
            raise DataError(f"source {number} of the mix gave no batch", hint="check its split and filters")
        if mix.stop == "first":
            return self._finish()
        self._heads[number] = Cursor(self._heads[number].epoch + (AGAIN if mix.stop == "all" else 1), 0)
        if mix.stop == "all" and all(
            head.epoch != epoch for other, head in enumerate(self._heads) if mix.draws.ever(other)
        ):
            return self._finish()
        mix.restarts[number] += 1
        return None

    def _finish(self) -> None:
        self._ended = True
        goes_on = isinstance(self._mix.stop, int)
        kept = {number: passing for number, passing in self._passes.items() if goes_on and self._mix.foreign(number)}
        self._passes = {number: passing for number, passing in self._passes.items() if number not in kept}
        self._mix.finished(self._at.epoch, self._heads, kept)

    def supersede(self) -> None:
        """Another pass begins: end, and say so to who asks for more."""
        self._end_by_another(not self._ended)
        self.end()

    def end(self) -> None:
        """Give nothing any more."""
        self._ended = True

    async def aclose(self) -> None:
        """End the passes of all sources."""
        self._ended = True
        if self._before is not None:
            await self._before.aclose()
            self._before = None
        self._over += self._passes.values()
        self._passes = {}
        while self._over:
            passing = self._over[-1]
            await passing.aclose()  # who is cancelled here may call again
            self._over = [other for other in self._over if other is not passing]
        if self._puller is not None:
            await self._puller.aclose()


def at(state: dict[str, Any], epoch: int, position: int) -> dict[str, Any]:
    """A source's state with another position; where it has moved on, its own state is not that of this position."""
    if (state.get("epoch"), state.get("position")) == (epoch, position):
        return state
    replayed = {"source_position": 0, "source": None} if "source_position" in state else {}
    lasting = {key: value for key, value in state.items() if key != "skipped"}
    return {**lasting, **replayed, "epoch": epoch, "position": position}
