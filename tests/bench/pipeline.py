"""The pipeline under a seed: order, queue, cursor and budget with delays, errors and cancellations in random order.

Real streams over real stores, on the loop and the workers of `seeded`. Each seed draws a store, a stream and what its
reader does: it trains in groups of batches, keeps some, waits, is cancelled, lets go, dies, meets reads that fail, and
now and then looks at another stream that shares its budget. Every sample must be trained once an epoch, in the order
that order.py says; the position is always that of what was trained; nobody waits for ever; the budget is never
exceeded, and all of it comes back. `python -m tests.bench.pipeline SEED` runs one.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from streamtrain import ZarrStream
from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.budget import Budget, BudgetHeld
from streamtrain.data.order import EpochOrder, Shuffle
from streamtrain.data.permutation import numbers_in
from streamtrain.data.reading import ChunkReader, Scratch
from streamtrain.errors import DataError
from tests.bench import seeded
from tests.bench.measure import Measure, Options

SEEDS, QUICK = 10_000, 300
COLUMNS = 3
OTHER: dict[str, Any] = {"shuffle": False, "transform": None, "split": None}
"""What the other stream has otherwise."""


def run(options: Options) -> Iterator[Measure]:
    """Every seed, and what happened in all."""
    seeds = QUICK if options.quick else SEEDS
    done, failed = collections.Counter[str](), []
    with options.room() as room, quiet():
        for seed in range(seeds):
            try:
                done.update(played(seed, room))
            except Exception as error:
                failed.append(seed)
                print(f"seed {seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    yield Measure(name="seeds", values=(seeds,), at_least=seeds)
    yield Measure(name="seeds that fail", values=(len(failed),), at_most=0)
    for what, count in sorted(done.items()):
        yield Measure(name=f"  {what}", values=(count,))


class quiet:  # noqa: N801 (used as a verb)
    """What is said of failing reads is not said here."""

    def __enter__(self) -> None:
        logging.getLogger("streamtrain").setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("streamtrain").setLevel(logging.NOTSET)


@dataclass(frozen=True)
class Case:
    """What a seed draws."""

    rows: int
    chunk: int
    codec: str | None
    keywords: dict[str, Any]
    spare: int
    """Bytes of memory over the least that works."""
    group: int
    """Batches of an update."""
    epochs: int
    hold: int
    """Batches that the reader keeps."""
    cancels: float
    """How often of 1 it is cancelled while it waits for a batch, and so on."""
    waits: float
    leaves: float
    dies: float
    fails: float
    """How often of 1 a read fails."""
    glances: float
    """How often it looks at another stream of the same budget after an update."""

    @classmethod
    def draw(cls, rng: random.Random) -> Case:
        """One of many."""
        rows = rng.choice([rng.randint(1, 30), rng.randint(1, 300)])

        def often(most: float) -> float:
            return rng.choice([0.0, 0.0, rng.random() * most])

        keywords: dict[str, Any] = {
            "batch_size": rng.randint(1, max(1, min(40, rows // 2))),
            "shuffle": rng.choice([False, "block", "block", "global"]),
            "shuffle_blocks": rng.choice([None, rng.randint(1, 4)]),
            "seed": rng.randrange(100),
            "threads": rng.randint(1, 4),
            "prefetch": rng.choice([None, rng.randint(1, 6)]),
            "cache": rng.choice(["auto", 0, rng.randint(0, 4000)]),
            "drop_last": rng.random() < 0.2,
            "io": rng.choice(["auto", "pread"]),
            "transform": rng.choice([None, None, plain, awaited]),
        }
        if rows > 3 and rng.random() < 0.3:
            keywords |= {"split": (0.0, 0.7), "split_by": rng.choice(["range", "chunk", "sample"])}
        return cls(
            rows=rows,
            chunk=rng.randint(1, 20),
            codec=rng.choice([None, "auto"]),
            keywords=keywords,
            spare=rng.choice([0, 0, rng.randrange(20_000), 1 << 20]),
            group=rng.randint(1, 4),
            epochs=rng.randint(1, 3),
            hold=rng.choice([0, 0, 1, 3]),
            cancels=often(0.5),
            waits=often(0.5),
            leaves=often(0.1),
            dies=often(0.05),
            fails=often(0.05),
            glances=often(0.2),
        )


def plain(batch: Batch) -> tuple[Any, Any]:
    """A transform in a thread."""
    return batch.inputs + 1, batch.targets


async def awaited(batch: Batch) -> tuple[Any, Any]:
    """A transform on the loop."""
    await asyncio.sleep(len(batch) % 3)
    return batch.inputs + 1, batch.targets


class Failing:
    """A reader whose disk fails now and then."""

    def __init__(self, inner: ChunkReader, play: Play) -> None:
        self.inner, self._play = inner, play

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        """What is there, or an error."""
        if self._play.rng.random() < self._play.case.fails:
            raise DataError("this read fails")
        return self.inner.read(chunk, rows, scratch, few=few)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class Play:
    """One seed's run."""

    seed: int
    rng: random.Random
    case: Case
    store: Path
    values: NDArray[np.float32]
    budget: Budget
    stream: ZarrStream = field(init=False)
    other: ZarrStream | None = field(init=False)
    done: collections.Counter[str] = field(default_factory=collections.Counter)
    trained: list[int] = field(default_factory=list)
    """Samples of the epoch, in the order in which they were."""
    held: collections.deque[Batch] = field(default_factory=collections.deque)

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        """Streams whose metadata is known already: that is no part of the play."""
        self.stream = stream_of(self.store, self.case, self.budget)
        self.other = stream_of(self.store, self.case, self.budget, **OTHER) if self.case.glances else None
        for stream in (self.stream, self.other):
            if stream is not None:
                stream.open_blocking()
                for feed in stream._known().feeds[0]:
                    feed.reader = Failing(feed.reader, self) if self.case.fails else feed.reader

    @cached_property
    def offset(self) -> int:
        """What the transform adds."""
        return 0 if self.case.keywords["transform"] is None else 1

    def ordered(self, epoch: int) -> list[int]:
        """The samples of an epoch, as they must come."""
        keywords, survey = self.case.keywords, self.stream._known().survey
        mode: Shuffle = keywords["shuffle"] or "none"
        order = EpochOrder(survey.epoch(keywords["seed"], epoch), mode, survey.cells_per_block, keywords["seed"], epoch)
        where = np.full(order.num_samples, -1, dtype=np.int64)
        if order.scattered:
            pieces = order.run(0, order.num_samples)
        else:
            pieces = [piece for block in range(order.num_blocks) for piece in order.pieces(block)]
        for piece in pieces:
            rows, at = order.place(piece)
            where[at] = piece.cell * self.case.chunk + numbers_in(rows)
        assert len(set(where.tolist())) == len(where)
        assert where.min(initial=0) >= 0
        full = self.case.keywords["batch_size"]
        count = len(where) // full * full if keywords["drop_last"] else len(where)
        found: list[int] = where[:count].tolist()
        return found

    # ---- the reader

    async def fit(self) -> None:
        """Train all epochs, whatever happens."""
        self.stream.follow(True)
        while self.stream.epoch < self.case.epochs:
            epoch = self.stream.epoch
            try:
                whole = await self._epoch()
            except DataError:
                self.done["reads that failed"] += 1
                whole = False
            if whole:
                assert self.trained == self.ordered(epoch), "samples left out, given twice, or in another order"
                assert self.stream.epoch == epoch + 1
                self.stream.trained(Cursor(epoch + 1, 0))
                self.trained.clear()
                self.done["epochs"] += 1
            else:
                await self._again()
        self.stream.follow(False)
        await self._closed()

    async def _again(self) -> None:
        """Go on from what was trained: in this stream, or in another life."""
        state = self.stream.state_dict()
        assert state["position"] == len(self.trained)
        if self.rng.random() < 0.3:
            self.held.clear()
            self.stream.follow(False)
            await self._closed()
            self.open()
            self.stream.follow(True)
            self.done["lives"] += 1
        self.stream.load_state_dict(state)

    async def _closed(self) -> None:
        await self.stream.aclose()
        if self.other is not None:
            await self.other.aclose()

    async def _epoch(self) -> bool:
        """Train on one pass; False if it is given up before its end."""
        passing, case, rng = aiter(self.stream), self.case, self.rng
        group: list[int] = []
        while True:
            batch = await self._next(passing)
            if batch is not None:
                self._check(batch, len(self.trained) + len(group))
                group += batch.index.tolist()
            if group and (batch is None or rng.random() < 1 / case.group):
                self.trained += group
                group.clear()
                at = Cursor(self.stream.epoch if batch is not None else self.stream.epoch - 1, len(self.trained))
                self.stream.trained(at)
                state = self.stream.state_dict()
                assert (state["epoch"], state["position"]) == at, "the position is not what was trained"
                await self._glance()
            if batch is None:
                return True
            if case.hold:
                self.held.append(batch)
                while len(self.held) > case.hold:
                    self.held.popleft()
            del batch
            if rng.random() < case.waits:
                await asyncio.sleep(rng.choice([0, 0.01, 100]))
            if rng.random() < case.leaves:
                self.done["passes let go"] += 1
                if rng.random() < 0.5:
                    await self._end(passing)
                return False

    async def _next(self, passing: Any) -> Batch | None:
        """The next batch, however often the wait for it is cancelled; None at the end."""
        while True:
            waiting = asyncio.ensure_future(_one(passing))
            await self._perhaps_cancelled(waiting)
            try:
                return await waiting
            except asyncio.CancelledError:
                self.done["waits cancelled"] += 1
            except BudgetHeld:
                assert self.held, "nobody holds a batch, and the next one can't be granted"
                self.held.clear()
                self.done["times all was held"] += 1

    async def _end(self, passing: Any) -> None:
        """Close a pass, however often that is cancelled."""
        closing = asyncio.ensure_future(passing.aclose())
        await self._perhaps_cancelled(closing)
        await asyncio.wait([closing])
        await passing.aclose()

    async def _perhaps_cancelled(self, task: asyncio.Future[Any]) -> None:
        if self.rng.random() < self.case.cancels:
            for _ in range(self.rng.randrange(4)):
                await asyncio.sleep(0)
            task.cancel()

    def _check(self, batch: Batch, position: int) -> None:
        """Its values are those of its samples, and its cursor tells where it ends."""
        assert batch.cursor.position == position + len(batch)
        assert (batch.inputs == self.values[batch.index] + self.offset).all(), "other values than the store's"
        for kept in self.held:
            assert (kept.inputs == self.values[kept.index] + self.offset).all(), "a batch that is held has changed"
        stands = self.budget.statistics()
        assert stands.peak <= stands.total, "more memory than the budget"
        self.done["batches"] += 1

    async def _glance(self) -> None:
        """Take some batches of the other stream, as validation does; or all."""
        if self.other is None or self.rng.random() >= self.case.glances:
            return
        self.done["other passes"] += 1
        most, count = self.rng.choice([1, 2, 1000]), 0
        self.held.clear()
        passing: Any = aiter(self.other)
        try:
            async for batch in passing:
                assert (batch.inputs == self.values[batch.index]).all()
                count += len(batch)
                del batch
                most -= 1
                if not most:
                    break
            else:
                full = self.case.keywords["batch_size"]
                assert count == (self.case.rows // full * full if self.case.keywords["drop_last"] else self.case.rows)
        except DataError:
            pass
        finally:
            await passing.aclose()


async def _one(passing: Any) -> Batch | None:
    """A coroutine's result can't be StopAsyncIteration."""
    batch: Batch | None = await anext(passing, None)
    return batch


def stream_of(store: Path, case: Case, budget: Budget, **changes: Any) -> ZarrStream:
    """A stream as the seed drew it."""
    return ZarrStream(store, **{"output": "numpy", "memory": budget, **case.keywords, **changes})


def played(seed: int, room: Path) -> collections.Counter[str]:
    """Run one seed; what happened. Raises AssertionError for what must not."""
    gc.disable()  # what comes back only with the garbage comes back too late
    try:
        return _played(seed, room)
    finally:
        gc.enable()


def _played(seed: int, room: Path) -> collections.Counter[str]:
    rng = random.Random(seed)
    case = Case.draw(rng)
    with tempfile.TemporaryDirectory(dir=room) as folder:
        store, values = Path(folder) / "s.zarr", np.random.default_rng(seed).random((case.rows, COLUMNS), np.float32)
        compressors: Any = case.codec
        chunks = (case.chunk, COLUMNS)
        zarr.create_array(str(store), data=values, chunks=chunks, compressors=compressors, zarr_format=2)
        least = [stream_of(store, case, Budget("64MiB"), **changes).plan().memory_least for changes in ({}, OTHER)]
        memory = 2 * max(least) if case.glances else least[0]
        play = Play(seed, rng, case, store, values, Budget(memory + case.spare))
        seeded.run(rng, play.fit())
        play.held.clear()
        del play.stream, play.other
        used = play.budget.statistics().used
        if used:
            gc.collect()  # an error's traceback leads to who raised it
            used = play.budget.statistics().used
        assert used == 0, f"{used} bytes never came back"
        return play.done


if __name__ == "__main__":
    print(dict(played(int(sys.argv[1]), Path(tempfile.gettempdir()))))
