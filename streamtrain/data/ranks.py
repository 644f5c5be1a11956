"""Several ranks read one order: which positions of each batch are this rank's. Pure.

Its law: position p of the epoch belongs to rank p mod world, whatever the lanes, the memory or the batch size; so the
ranks together have each batch exactly once, and a position that was saved goes on in any other number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamtrain.data.permutation import Ints


@dataclass(frozen=True)
class Ranks:
    """Rank number `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def alone(self) -> bool:
        return self.world == 1

    def share(self, batch_size: int) -> int:
        """Most samples of a batch that are this rank's."""
        return -(-batch_size // self.world)

    def count(self, start: int, stop: int) -> int:
        """How many of the positions start..stop-1 are this rank's."""
        first = start + (self.rank - start) % self.world
        return max(0, -(-(stop - first) // self.world))

    def begin(self, batch: int, origin: int, batch_size: int) -> int:
        """Where this batch begins: its position in the epoch, or among the rank's own where there are several."""
        return origin + batch * batch_size if self.alone else batch * self.share(batch_size)

    def places(self, at: Ints, origin: int, batch_size: int) -> Ints:
        """Where this rank's positions lie among its own, batches of `share` places counted from `origin` on."""
        batch = (at - origin) // batch_size
        begin = origin + batch * batch_size
        first = (self.rank - begin) % self.world
        places: Ints = batch * self.share(batch_size) + (at - begin - first) // self.world
        return places
