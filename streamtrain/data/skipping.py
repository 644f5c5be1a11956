"""Bad chunks left out: their rows are dropped from their batches, counted, and too many of them stop the pass.

Its law: which rows are left out follows from the data and the order alone, never from threads, memory or batches; a
chunk that was bad once stays left out as long as the stream lives, so that all its cells agree.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.permutation import Ints
from streamtrain.data.ragged import SparseRows
from streamtrain.data.reading import BadChunk, ChunkDamage, ChunkReader, ChunkUnreadable, Scratch, Version
from streamtrain.data.trust import Verify
from streamtrain.errors import DataError

logger = logging.getLogger(__name__)

OnBadChunk = Literal["raise", "skip"]
MAX_SKIPPED = 0.05
"""Share of an epoch's samples that may be left out. A disk that rots or a copy that broke off loses far more than one
chunk in twenty soon enough, while a scratch of a few chunks (1 % of them, or one of a small store's 20) may pass."""


class SkippingReader:
    """A reader that gives fill for chunks that can't be used, and notes them in the thread's scratch."""

    def __init__(self, reader: ChunkReader) -> None:
        self.inner = self._reader = reader
        self._lock = threading.Lock()
        self._bad: dict[tuple[int, ...], BadChunk] = {}

    @property
    def lane(self) -> str:
        return self._reader.lane

    def vouch(self, verify: Verify) -> str | None:
        """See the reader that it wraps."""
        return self._reader.vouch(verify)

    def version(self, chunk: Sequence[int]) -> Version | None:
        """See the reader that it wraps."""
        return self._reader.version(chunk)

    def look(self, chunk: Sequence[int], scratch: Scratch) -> None:
        """See the reader that it wraps; why it can't be asked, the read will say."""
        with contextlib.suppress(ChunkDamage, ChunkUnreadable):
            self._reader.look(chunk, scratch)

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        """The chunk; None (fill) for one that is bad."""
        where = tuple(chunk)
        damage = self._bad.get(where)
        if damage is None:
            try:
                return self._reader.read(chunk, rows, scratch, few=few)
            except (ChunkDamage, ChunkUnreadable) as error:
                damage = self._first(where, error)
        scratch.damages.append((scratch.chunks, damage))
        return None

    def _first(self, where: tuple[int, ...], error: BadChunk) -> BadChunk:
        """Keep the first error of a chunk, and say it."""
        # Kept with them, it would keep the frames, and their buffers, alive.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        with self._lock:
            known = self._bad.setdefault(where, error)
        if known is error:
            logger.warning("skipped, with all its rows: %s", error)
        return known


@dataclass
class Losses:
    """What one unit's jobs have to leave out; lists grow from several threads."""

    positions: list[Ints] = field(default_factory=list)
    damages: list[BadChunk] = field(default_factory=list)

    def add(self, at: slice | Ints, damages: Sequence[BadChunk]) -> None:
        """These positions of the epoch, for this reason."""
        self.positions.append(np.arange(at.start, at.stop, dtype=np.int64) if isinstance(at, slice) else at)
        self.damages.extend(damages)


class Watch:
    """Tells, for one piece of work in one thread, which rows hold what a bad chunk should have given.

    A put hands on rows of the chunks that were read since the put before, or of the last one that was read.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._seen = 0
        scratch.damages.clear()

    def tainted(self) -> Sequence[BadChunk]:
        """Why the rows that are put now are to be left out; empty where they are sound."""
        damages = self._scratch.damages
        if not damages:
            return ()
        if self._scratch.tainted is not None:  # the feed knows which of its samples a bad chunk has touched
            return self._scratch.tainted
        fresh, self._seen = damages[self._seen :], len(damages)
        last = damages[-1:] if damages[-1][0] == self._scratch.chunks else []
        return [damage for _, damage in fresh or last]


class Skips:
    """The account of one pass, kept on its loop: units report in the order of the epoch."""

    def __init__(self, origin: int, end: int, samples: int, most: float, *, before: int = 0) -> None:
        """Positions `origin` to `end` of an epoch of `samples` will be given; `most` is the share that may be lost, of
        which `before` samples were lost before `origin`, in another life."""
        self._origin, self._end = origin, end
        self._most, self._share = int(most * samples), most
        self._waiting: Ints = np.empty(0, dtype=np.int64)
        self._chunks: set[tuple[str, tuple[int, ...]]] = set()
        self.rows = 0
        """Samples left out so far, by this pass."""
        self._before = self._behind = self._handed = before
        self._marks: deque[tuple[int, int]] = deque()
        """Cursors behind batches that have lost rows, and how many of the epoch are lost up to there."""

    @property
    def chunks(self) -> int:
        """Chunks that could not be used."""
        return len(self._chunks)

    def add(self, losses: Losses) -> DataError | None:
        """Take in what a unit has lost; an error where that is too much."""
        if not losses.positions:
            return None
        lost = np.unique(np.concatenate(losses.positions))
        lost = lost[(lost >= self._origin) & (lost < self._end)]
        self.rows += len(lost)
        if len(lost):
            self._chunks |= {(damage.array, damage.chunk) for damage in losses.damages}
        self._waiting = np.union1d(self._waiting, lost)
        if not len(lost) or self._before + self.rows <= self._most:
            return None
        example = min(losses.damages, key=lambda damage: (damage.array, damage.chunk))
        earlier = f", {self._before} before the run went on," if self._before else ""
        return DataError(
            f"{self.rows} samples in {self.chunks} bad chunks{earlier} were skipped, more than {self._share:g} of the "
            f"epoch ({self._most} samples), such as {example}",
            hint="`streamtrain verify DATA --deep` lists the damage; restore the data, or raise max_skipped",
        )

    @property
    def pending(self) -> bool:
        """Whether some of what was lost has not been asked about yet."""
        return len(self._waiting) > 0

    def within(self, start: int, stop: int, cursor: int) -> Ints:
        """Which of these positions are left out, counted from `start`; what lies before is forgotten. `cursor`: the
        position of the epoch that is reached with them."""
        first, last = np.searchsorted(self._waiting, (start, stop))
        found = self._waiting[first:last] - start
        self._waiting = self._waiting[last:]
        if len(found):
            self._handed += len(found)
            self._marks.append((cursor, self._handed))
        return found

    def behind(self, cursor: int) -> int:
        """Samples of the epoch that were left out before this position, which never goes back."""
        while self._marks and self._marks[0][0] <= cursor:
            self._behind = self._marks.popleft()[1]
        return self._behind


def compact(columns: Sequence[Any], dropped: Ints) -> list[Any]:
    """The columns without these rows: the others move up in place, so that nothing is granted and addresses stay."""
    keep = np.delete(np.arange(len(columns[-1])), dropped)
    result = []
    for column in columns:
        if isinstance(column, SparseRows):
            result.append(column.take(keep))
            continue
        column[: len(keep)] = column[keep]
        result.append(column[: len(keep)])
    return result
