"""One pass: an epoch's blocks are filled ahead by our threads, and handed over batch by batch on the event loop.

    pump      while a buffer is granted: start the next unit, a job for each handful of its pieces         (loop)
    fill      read, decode, and scatter rows to their places                                               (threads)
    done      the unit's last job: one hop, then its batches are ready, in order                            (loop)
    next      a batch is a view of its block; what was drained lets the pump go on                          (loop)

A *unit* is what is filled together: one block of the order, or several small ones in a row. A batch lies in the unit
where it begins; rows of later units that belong to it are put there.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from streamtrain.data.ahead import Ahead
from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.block import Block, Column, Places, Pool
from streamtrain.data.budget import BudgetHeld, Share, format_bytes
from streamtrain.data.crews import Assignment, runner
from streamtrain.data.feed import Box, Feed, Part, Rows
from streamtrain.data.gathering import Gathering
from streamtrain.data.laying import Laid, lay
from streamtrain.data.options import Crew
from streamtrain.data.order import EpochOrder, Piece
from streamtrain.data.permutation import Ints, numbers_in
from streamtrain.data.queue import ReadyQueue
from streamtrain.data.ranks import Ranks
from streamtrain.data.readahead import Readahead
from streamtrain.data.reading import Scratch
from streamtrain.data.remote import Want
from streamtrain.data.routes import routes_of
from streamtrain.data.skipping import Losses, Skips, Watch
from streamtrain.data.source import Ending
from streamtrain.data.survey import Place
from streamtrain.data.together import Together
from streamtrain.data.transform import Transform
from streamtrain.data.transforming import Made, Ready, Rooms, ThreadRunner, TransformStage
from streamtrain.data.units import Sizes, unit_spans
from streamtrain.data.wants import wants_of
from streamtrain.data.workers import Job, Workers
from streamtrain.errors import EnvironmentProblem, UserCodeError

logger = logging.getLogger(__name__)

JOB_BYTES = 1 << 20
"""Small pieces are filled by one job until they have so many bytes."""
BLOCKS_AHEAD = 3
"""Buffers in use at most: one that is consumed, one that is ready or filled, one that is filled (and more where what
is fetched for them takes long to come: `Ahead.blocks`)."""
JOIN = 5.0
"""Seconds until a thread or task that does not end is left behind."""
POLL = 0.02
"""Seconds between two looks at a budget that other streams hold."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a pass needs to know of its stream."""

    feeds: Sequence[Sequence[Feed]]
    """One for each array, store by store."""
    columns: Sequence[Column]
    places: Sequence[Place]
    """Where each array's rows go, and then the sample numbers."""
    ranks: Ranks
    cache_bytes: int
    sizes: Sizes
    share: Share
    batch_size: int
    drop_last: bool
    seed: int
    threads: int
    prefetch: int | None
    read_timeout: float
    transform: Transform | None
    crew: Crew
    """Who transforms."""
    payload: bytes | None
    """The transform as it goes to processes; None: it runs here."""
    assemble: Callable[[Sequence[NDArray[Any]]], Batch]
    """Columns of one batch to a Batch, epoch and cursor left out."""
    finish: Callable[[Batch], Batch]
    """A transformed batch as it is handed over."""
    at_end: Callable[[], Awaitable[None]]
    """Ends what the readers have started: zarr's private loop and its threads."""
    pool: Pool
    """Kept between passes, so that its pages are touched but once."""
    rooms: Pool | None = None
    """The same for batches that are laid out when they are made: of rows of different lengths, and such as are to leave
    their block free."""
    max_skipped: float | None = None
    """Share of an epoch's samples that bad chunks may cost; None where one of them ends the pass."""
    skipped: int = 0
    """Samples of the epoch that they have cost before the pass begins."""

    @property
    def ragged(self) -> bool:
        """Whether rows of some array have different lengths."""
        return any(column.area_bytes for column in self.columns)


class Unit:
    """Consecutive positions that are filled together; `left` counts its unfinished jobs."""

    def __init__(self, start: int, stop: int, begin: int, edge: int, block: Block | None, head: Block | None) -> None:
        self.start, self.stop = start, stop
        self.begin, self.edge = begin, edge
        """Where its rows begin, and where those of its own block do; the ones before go to the head."""
        self.block = block
        """Holds the batches that begin here; None if none does."""
        self.head = head
        """Holds the batch that began before and goes on here; None if its rows were handed over in another life."""
        self.left = 0
        self.done = False
        self.losses = Losses()
        self.error: BaseException | None = None

    def lay(self, number: int, first: int, lengths: Ints) -> None:
        """Set aside room for rows of these lengths, at the positions from `first` on, in the blocks."""
        early = max(0, self.edge - first)
        if self.head is not None and early:
            self.head.lay(number, first, lengths[:early])
        if self.block is not None and len(lengths) > early:
            self.block.lay(number, first + early, lengths[early:])

    def put(self, number: int, at: Places, values: Any, part: Part | None) -> None:
        """Copy rows of one column to their places in the blocks."""
        first = self.edge
        if first > self.begin:
            early = at.start < first if isinstance(at, slice) else bool((at < first).any())
            if early:
                positions = numbers_in(at)
                mine = positions >= first
                if self.head is not None:
                    _put(self.head, number, positions[~mine], values[~mine], part)
                at, values = positions[mine], values[mine]
        _put(self.block, number, at, values, part)


def _put(block: Block | None, number: int, at: Places, values: Any, part: Part | None) -> None:
    if block is None or not len(values):
        return
    if part is None:
        block.put(number, at, values)
    else:
        block.put_part(number, at, values, part)


class ZarrPass(Ending):
    """The batches of one epoch from `start` on; an async iterator, used on one event loop."""

    def __init__(
        self,
        recipe: Recipe,
        order: EpochOrder,
        start: Cursor,
        returned: Callable[[Cursor, bool], None],
        *,
        before: ZarrPass | None = None,
    ) -> None:
        """`before`: a pass that was stopped; its threads are joined first, since this one needs its memory."""
        self._before = before
        self._recipe, self._order = recipe, order
        # Weak, so that letting go of a stream ends its pass at once, without a garbage collection.
        self._returned = weakref.WeakMethod(returned)
        self.epoch, self._origin = start
        rest = max(0, order.num_samples - self._origin)
        size = recipe.batch_size
        self._batches = rest // size if recipe.drop_last else -(-rest // size)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._workers: Workers | None = None
        self._ahead: Ahead | None = None
        """Fetches for the workers what is elsewhere; None where nothing is."""
        self._routes = [routes_of(feeds, recipe.places) for feeds in recipe.feeds]
        """Store by store: what is read, and where its rows go."""
        self._readahead = Readahead.over(feed for feeds in recipe.feeds for feed in feeds)
        """Tells the kernel what will be read of arrays that memory can't hold; None where there is none."""
        self._pool = recipe.pool
        self._queue: ReadyQueue[Ready | Made] = ReadyQueue(max_items=None, max_bytes=recipe.share.total)
        self._slot_bytes = sum(column.batch_bytes for column in recipe.columns)
        self._lock = threading.Lock()
        self._units: collections.deque[Unit] = collections.deque()
        end = min(self._origin + self._batches * size, order.num_samples)
        first, last = (self._origin, end) if recipe.ranks.alone else (0, self._place(self._batches))
        mine = recipe.ranks.count(0, order.num_samples)
        self.skips = Skips(first, last, mine, recipe.max_skipped or 0.0, before=recipe.skipped)
        self._spans = unit_spans(order, recipe.sizes, self._origin, self._origin + self._batches * size)
        self._next_span: tuple[int, int, list[int]] | None = None
        self._unplanned: collections.deque[tuple[Unit, Sequence[int]]] = collections.deque()
        self._planning = False
        self._blocks: collections.deque[tuple[int, Block]] = collections.deque()
        self._draining: collections.deque[int] = collections.deque()
        self._started = self._emitted = self._taken = 0
        self._filling = 0
        self._stage: TransformStage | None = None
        self._scratch_granted = 0
        alone = recipe.ranks.alone and not recipe.ragged
        numbers = recipe.places[-1].column
        self._gathering = Gathering.of(self._routes, recipe.columns, numbers) if alone else None
        plain = alone and not order.scattered and recipe.sizes.beside_bytes
        self._together = Together.of(self._routes, recipe.columns, numbers) if plain else None
        self.paused = False
        self.closed = False
        self._finished = False
        self._broken: BaseException | None = None
        self.retired: list[Scratch] = []
        if self._batches == 0:
            self._queue.end()

    # ---- the consumer's side

    def __aiter__(self) -> ZarrPass:
        return self

    async def __anext__(self) -> Batch:
        if self._queue.awaited:
            raise UserCodeError(
                "two consumers ask one pass for its next batch", hint="give each a stream of its own, or take turns"
            )
        while True:
            try:
                if self._before is not None:
                    await self._after()
                batch = self.next_nowait()
                if batch is None:
                    await self._wait()
            except StopAsyncIteration:
                await self.aclose()
                raise
            except BudgetHeld:
                raise
            except Exception as error:
                try:
                    await self.aclose()
                except asyncio.CancelledError:
                    self._untold = error
                    raise
                raise
            if batch is not None:
                return batch

    def next_nowait(self) -> Batch | None:
        """The next batch, or None if it is not ready; StopAsyncIteration at the end, or what failed."""
        if self.closed:
            self._no_more()
        if self._before is not None:
            return None
        if self._loop is None and not self._start():
            return None
        while True:
            try:
                item = self._queue.get_nowait()
            except StopAsyncIteration:
                self._finish()
                raise
            if item is None:
                self._go_on()
                return None
            batch = self._take(item)
            if batch is not None:
                return batch

    def _go_on(self) -> None:
        """Memory may have come back."""
        if self._stage is not None and self._stage.starved:
            self._stage.pump()
        self._pump()

    async def _after(self) -> None:
        """Wait for the end of the pass before."""
        before = self._before
        if before is not None:
            await before.aclose()
            self._before = None

    def _take(self, item: Ready | Made) -> Batch | None:
        if isinstance(item, Ready):
            batch: Batch | None = None
            if item.dropped is None or len(item.dropped) < item.rows or not self._recipe.ranks.alone:
                batch = _assembled(self._recipe, item)  # else all its rows lay in bad chunks
            self._drained()
        else:
            batch = item.batch
            assert self._stage is not None
            self._stage.taken(item)
        if batch is not None:
            self._tell(batch.cursor, False)
        return batch

    def _tell(self, cursor: Cursor, finished: bool) -> None:
        returned = self._returned()
        if returned is not None:
            returned(cursor, finished)

    def _drained(self) -> None:
        self._taken += 1
        if self._draining and self._taken >= self._draining[0]:
            self._draining.popleft()
            self._pump()

    @property
    def _busy(self) -> bool:
        """Whether something is ready or under way that gives a batch."""
        stage = self._stage is not None and self._stage.busy and not self._stage.stuck
        return bool(self._filling or len(self._queue) or stage)

    async def _wait(self) -> None:
        """Wait for something to change. Raises BudgetHeld where nothing is under way that could give the next batch."""
        timeout = self._recipe.read_timeout
        deadline = time.monotonic() + timeout
        while not (self._busy or self._queue.closed or self.paused):
            if not self._recipe.share.others_hold or time.monotonic() > deadline:
                raise self._held()
            # What other streams have may come back; nobody tells when.
            if await self._queue.wait(min(POLL, timeout)):
                return
            if self._loop is None:
                self._start()
            else:
                self._go_on()
        if not await self._queue.wait(timeout):
            self._check_reads()

    def _held(self) -> BudgetHeld:
        """Why the next batch can't be granted."""
        share, pool = self._recipe.share, self._pool
        if self._stage is not None and self._stage.starved and self._recipe.rooms is not None:
            pool = self._recipe.rooms
        held = pool.out
        least = self._recipe.sizes.scratch_bytes if self._loop is None else pool.size
        room = f"memory={format_bytes(share.budget.total)} has no {format_bytes(least)} free for the next"
        if share.others_hold:
            return BudgetHeld(
                f"other streams keep what this one needs: {room} after {self._recipe.read_timeout:g} s",
                hint="close streams that are not read (aclose), let go of their batches, or raise memory",
            )
        return BudgetHeld(
            f"you hold batches in {held} buffers of {format_bytes(pool.size)}, and {room}",
            hint="let go of batches, keep clones of them (x.clone()), or raise memory",
        )

    def _check_reads(self) -> None:
        """Raise EnvironmentProblem where a read has hung for longer than the timeout."""
        now = time.monotonic()
        for scratch in self.scratches:
            reading = scratch.reading
            if reading is not None and now - reading[1] >= self._recipe.read_timeout:
                frame = sys._current_frames().get(scratch.thread)
                calls = [f"{at.f_code.co_filename}:{line}" for at, line in traceback.walk_stack(frame)] if frame else []
                logger.error("%s is being read for %.3g s, in %s", reading[0], now - reading[1], " < ".join(calls))
                raise EnvironmentProblem(
                    f"{reading[0]} was not read within {self._recipe.read_timeout:g} s",
                    hint="check the storage, or raise read_timeout",
                )
        if self._ahead is not None and (what := self._ahead.hung(now)) is not None:
            raise EnvironmentProblem(what, hint="check the storage")

    # ---- the producers' side, on the loop

    def _start(self) -> bool:
        """Begin, if the bytes for that are free."""
        if self._batches == 0:
            self._loop = asyncio.get_running_loop()
            return True
        sizes, share = self._recipe.sizes, self._recipe.share
        total = share.total
        threads = sizes.threads_within(total, self._recipe.threads, self._recipe.cache_bytes)
        share.least = sizes.needed(total, threads)
        if threads < self._recipe.threads:
            logger.info("memory=%s: %d of %d threads", format_bytes(total), threads, self._recipe.threads)
        granted = threads * sizes.scratch_bytes + sizes.kept_bytes
        if not share.try_acquire(granted):
            return False
        self._scratch_granted = granted
        self._loop = asyncio.get_running_loop()  # now it has started: before, it may be tried again
        self._workers = Workers(threads, "streamtrain-data")
        self._stage = self._transforms(self._workers)
        self._ahead = Ahead.over(
            [feed for feeds in self._recipe.feeds for feed in feeds], share, self._workers.submit, threads
        )
        self._filling = 1
        self._workers.submit(self._prepare)
        return True

    def _transforms(self, workers: Workers) -> TransformStage | None:
        """What stands between the blocks and the queue: nothing, without a transform."""
        recipe = self._recipe
        if recipe.transform is None:
            return None if recipe.rooms is None else self._layout(workers, recipe.rooms)
        given = Assignment(
            transform=recipe.transform,
            crew=recipe.crew,
            payload=recipe.payload,
            seed=recipe.seed,
            prefetch=recipe.prefetch,
            assembled=partial(_assembled, recipe),
            finish=recipe.finish,
        )
        least, slot, threads = recipe.sizes.least, self._slot_bytes, recipe.threads
        return TransformStage(
            runner(given, workers, threads=threads, share=recipe.share, least=least, slot_bytes=slot),
            self._queue,
            recipe.share,
            slot_bytes=self._slot_bytes,
            prefetch=recipe.prefetch,
            keep_empty=not recipe.ranks.alone,
            rooms=None if recipe.rooms is None else Rooms(recipe.rooms, _left_for_blocks(recipe), False),
            drained=self._drained,
            settled=self._end_if_over,
        )

    def _layout(self, workers: Workers, rooms: Pool) -> TransformStage:
        """What lays out batches in rooms of their own, in the threads that read: in half of them at a time,
        since memory takes no more, and what is laid out far ahead has left the processor's cache."""
        recipe = self._recipe
        ahead = max(1, recipe.threads // 2)
        return TransformStage(
            ThreadRunner(partial(_assembled, recipe), workers, ahead=ahead, own=False),
            self._queue,
            recipe.share,
            slot_bytes=self._slot_bytes,
            prefetch=recipe.prefetch,
            keep_empty=not recipe.ranks.alone,
            rooms=Rooms(rooms, _left_for_blocks(recipe), True),
            drained=self._drained,
            settled=self._end_if_over,
        )

    def _prepare(self, scratch: Scratch) -> None:
        """In a thread: work out where the epoch's blocks begin, which takes a while for uneven ones."""
        try:
            self._hop(self._prepared, next(self._spans, None), None)
        except BaseException as error:
            self._hop(self._prepared, None, error)

    def _prepared(self, span: tuple[int, int, list[int]] | None, error: BaseException | None) -> None:
        self._filling -= 1
        self._next_span = span
        if error is not None:
            self._queue.fail(error)
        self._pump()
        if not self._busy:
            self._queue.wake()

    def _pump(self) -> None:
        """Start units while there is room for them."""
        while self._next_span is not None and self._workers is not None and not (self.paused or self.closed):
            start, stop, blocks = self._next_span
            size = self._recipe.batch_size
            first = max(0, -(-(start - self._origin) // size))
            last = max(first, -(-(stop - self._origin) // size))
            slots = last - first
            block = None
            if slots > 0:
                if not self._room(slots):
                    return
                root = self._pool.take(keep_free=self._room_to_make())
                if root is None:
                    return
                block = Block(root, self._recipe.columns, self._place(first), slots)
                del root
            head = self._blocks[-1][1] if self._blocks else None
            if block is not None:
                self._blocks.append((first, block))
                self._draining.append(min(last, self._batches))
            self._started += max(0, slots)
            self._next_span = next(self._spans, None)
            begin = start if self._recipe.ranks.alone else self._place((start - self._origin) // size)
            self._start_unit(Unit(start, stop, begin, self._place(first), block, head), blocks)

    def _place(self, batch: int) -> int:
        """Where this batch begins: its position in the epoch, or among this rank's own."""
        return self._recipe.ranks.begin(batch, self._origin, self._recipe.batch_size)

    def _room(self, slots: int) -> bool:
        if not self._draining or not self._busy:
            return True
        prefetch = self._recipe.prefetch
        if prefetch is not None and self._started - self._taken >= prefetch:
            return False
        far = self._ahead.blocks(self._pool.size, BLOCKS_AHEAD) if self._ahead is not None else 0
        return len(self._draining) < BLOCKS_AHEAD + far

    def _room_to_make(self) -> int:
        """Bytes that a further buffer must leave free, for transforms to go on."""
        if self._stage is None or self._pool.out < self._recipe.sizes.buffers:
            return 0
        return self._stage.reserve

    def _start_unit(self, unit: Unit, blocks: Sequence[int]) -> None:
        assert self._workers is not None
        self._units.append(unit)
        self._filling += 1
        with self._lock:
            self._unplanned.append((unit, blocks))
            plan, self._planning = not self._planning, True
        if plan:
            self._workers.submit(self._plan)

    def _plan(self, scratch: Scratch) -> None:
        """In a thread: what the next unit is made of, as jobs behind those of the unit before."""
        workers, order = self._workers, self._order
        with self._lock:
            if not self._unplanned:
                return  # stopped meanwhile
            unit, blocks = self._unplanned.popleft()
        try:
            if order.scattered:
                pieces = order.run(unit.start, unit.stop)
            else:
                pieces = [piece for block in blocks for piece in order.pieces(block)]
            if self._recipe.ragged:
                lay(unit, [laid for piece in pieces if (laid := self._laid(piece)) is not None], self._recipe)
            runs, wants = self._gathered(unit, pieces), []
            if runs is None:
                jobs = self._jobs(pieces)
                wants = [self._wants(job) for job in jobs]
                runs = [partial(self._run, unit, partial(self._fill_all, unit, job)) for job in jobs]
                if self._readahead is not None:
                    runs = [self._readahead.around(self._reads(job), run) for job, run in zip(jobs, runs, strict=True)]
        except BaseException as error:
            unit.error, wants, runs = error, [], []
        unit.left = len(runs)
        if self._ahead is not None:
            self._ahead.add(list(zip(wants, runs, strict=True)))
        elif workers is not None:
            for run in runs:
                workers.submit(run)
        if not runs:
            self._hop(self._unit_done, unit)
        with self._lock:
            self._planning = bool(self._unplanned)
            more = self._planning
        if more and workers is not None:
            workers.submit(self._plan)

    def _gathered(self, unit: Unit, pieces: Sequence[Piece]) -> list[Job] | None:
        """Jobs that fill the unit without a look at each chunk, where that can be done."""
        if self._gathering is None:
            return None
        rows = self._job_rows(unit.stop - unit.start)
        fills = self._gathering.jobs(self._order, unit, pieces, rows)
        return None if fills is None else [partial(self._run, unit, fill) for fill in fills]

    def _job_rows(self, rows: int) -> int:
        """Rows of a job, of so many together: of at least JOB_BYTES, but enough jobs for all threads."""
        sizes = self._recipe.sizes
        if not self._recipe.ragged:
            row = max(1, self._slot_bytes // self._recipe.columns[0].batch_size)
        else:
            row = max(1, sizes.buffer_bytes // sizes.unit_rows)
        return max(1, min(JOB_BYTES // row + 1, -(-rows // (2 * self._recipe.threads))))

    def _jobs(self, pieces: Sequence[Piece]) -> list[Sequence[Piece]]:
        """Pieces by the handful."""
        least = self._job_rows(sum(_count(piece) for piece in pieces))
        jobs: list[Sequence[Piece]] = []
        job: list[Piece] = []
        count = 0
        for piece in pieces:
            job.append(piece)
            count += _count(piece)
            if count >= least:
                jobs.append(job)
                job, count = [], 0
        return [*jobs, job] if job else jobs

    def _wants(self, pieces: Sequence[Piece]) -> list[Want]:
        """What a job's pieces will read of arrays that are elsewhere."""
        if self._ahead is None:
            return []
        return [want for feed, box, rows in self._reads(pieces) for want in wants_of(feed, box, rows)]

    def _reads(self, pieces: Sequence[Piece]) -> Iterator[tuple[Feed, Box, Rows]]:
        """The cells that a job's pieces will read from, and which rows, array by array."""
        split = self._order.split
        for piece in pieces:
            if self._recipe.ranks.alone and piece.base >= self._origin:  # then its places need not be known
                rows = piece.rows if piece.rows is not None else split.rows(piece.cell, piece.lower, piece.upper)
            else:
                mine = self._mine(piece)
                if mine is None:
                    continue
                rows = mine[0]
            store, cell, grid = split.grid.part(piece.cell)
            box = Box.of(grid, cell)
            for feed, _ in self._routes[store]:
                yield feed, box, rows

    def _unit_done(self, unit: Unit) -> None:
        """The hop: the batches that are complete now become ready."""
        unit.done = True
        self._filling -= 1
        while self._units and self._units[0].done and self._broken is None:
            unit = self._units.popleft()
            self._broken = unit.error or self.skips.add(unit.losses)
            if self._broken is None:
                self._emit(unit)
            unit.block = unit.head = None  # its last job may still hold it: no buffer may wait for a thread
        self._end_if_over()
        self._pump()
        if not self._busy:  # there was no room for the next: the consumer may know why
            self._queue.wake()

    def _emit(self, unit: Unit) -> None:
        """Hand on the batches whose last row lies in this unit, or before it."""
        size = self._recipe.batch_size
        end = min(self._origin + self._batches * size, self._order.num_samples)
        complete = self._batches if unit.stop >= end else (unit.stop - self._origin) // size
        while self._emitted < complete:
            first, block = self._blocks[0]
            stop = min(complete, first + block.slots)
            make, count = self._maker(block, first, self._emitted), stop - self._emitted
            self._emitted = stop
            if self._stage is None:
                self._queue.put_run(make, count, self._slot_bytes)
            else:
                self._stage.put_run(make, count)
            if stop == first + block.slots:  # what is taken must hold no buffer
                self._blocks.popleft()
        if self._emitted == self._batches:
            self._blocks.clear()
        if self._stage is not None:
            self._stage.pump()

    def _maker(self, block: Block, first: int, start: int) -> Callable[[int], Ready]:
        """Makes the ready batches from number `start` on, which lie in this block, whose first is number `first`."""
        size, end, origin, epoch = self._recipe.batch_size, self._order.num_samples, self._origin, self.epoch
        ranks, alone = self._recipe.ranks, self._recipe.ranks.alone
        skips = self.skips  # not the pass itself, which its queue must not keep alive

        def make(number: int) -> Ready:
            position = origin + (start + number) * size
            stop = min(position + size, end)
            rows = stop - position if alone else ranks.count(position, stop)
            dropped: Ints | None = None
            if skips.pending:
                begin = ranks.begin(start + number, origin, size)
                dropped = skips.within(begin, begin + ranks.share(size), stop)
            return Ready(block, start + number - first, rows, Cursor(epoch, stop), dropped)

        return make

    def _end_if_over(self) -> None:
        """What follows the last batch that is ready: the end, or the failure that stopped the pass there."""
        if self._stage is not None and self._stage.busy:
            return
        if self._broken is not None:
            self._queue.fail(self._broken)
        elif self._emitted == self._batches:
            self._queue.end()

    # ---- in the threads

    def _fill_all(self, unit: Unit, pieces: Sequence[Piece], scratch: Scratch) -> None:
        def over() -> bool:
            return self.closed or unit.error is not None

        if self._together is not None:
            self._together.fill(unit, self._order, self._origin, pieces, scratch, over)
            return
        for piece in pieces:
            if over():
                break
            self._fill(unit, piece, scratch)

    def _run(self, unit: Unit, fill: Job, scratch: Scratch) -> None:
        try:
            if not self.closed and unit.error is None:
                fill(scratch)
        except BaseException as error:
            logger.debug("a job of the pass failed", exc_info=error)
            if not self.closed:  # nobody would be told, and its traceback leads to the unit: a cycle with its buffers
                unit.error = error
        with self._lock:
            unit.left -= 1
            last = unit.left == 0
        if last:
            self._hop(self._unit_done, unit)

    def _mine(self, piece: Piece) -> tuple[Rows, Places] | None:
        """Rows of the piece's cell and their places, as far as they are this rank's, and were not handed over in
        another life; None where none is."""
        found = self._order.place_since(piece, self._origin)
        if found is None:
            return None
        rows, at = found
        ranks = self._recipe.ranks
        if ranks.alone:
            return rows, at
        positions = numbers_in(at)
        mine = positions % ranks.world == ranks.rank
        if not mine.any():
            return None
        places = ranks.places(positions[mine], self._origin, self._recipe.batch_size)
        if mine.all():
            return rows, places
        return numbers_in(rows)[mine], places

    def _laid(self, piece: Piece) -> Laid | None:
        """Which of a store's rows the piece's are, and where they go."""
        mine = self._mine(piece)
        if mine is None:
            return None
        rows, at = mine
        store, cell, grid = self._order.split.grid.part(piece.cell)
        return Laid(store, Box.of(grid, cell), rows, at)

    def _fill(self, unit: Unit, piece: Piece, scratch: Scratch) -> None:
        mine = self._mine(piece)
        if mine is None:
            return
        rows, at = mine
        grid = self._order.split.grid
        store, cell, part_of = grid.part(piece.cell)
        box, watch = Box.of(part_of, cell), Watch(scratch)
        for feed, places in self._routes[store]:

            def put(wanted: Rows, values: Any, part: Part | None, places: Sequence[Place] = places) -> None:
                where = _subset(at, wanted)
                if damages := watch.tainted():
                    unit.losses.add(where, damages)
                for place in places:  # of a stack it is a channel
                    unit.put(place.column, where, values, (*place.part, *(part or ())) if place.part else part)

            feed.fill(box, rows, put, scratch)
        unit.put(self._recipe.places[-1].column, at, grid.numbers(piece.cell, numbers_in(rows)), None)

    def _hop(self, call: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop was closed under us; nobody waits any more
            self._loop.call_soon_threadsafe(call, *arguments)

    # ---- the end

    def _finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._tell(Cursor(self.epoch, self._order.num_samples), True)
        self.stop()

    def supersede(self) -> None:
        """Another pass begins: end, and say so to who asks for more."""
        self._end_by_another(not self.closed)
        self.stop()

    def stop(self) -> None:
        """End without waiting: threads end after the job each has in hand, memory comes back as it is let go."""
        if self.closed:
            return
        self.closed = True
        if self._workers is not None:
            self._workers.stop()
        if self._ahead is not None:
            self._ahead.stop()
        with self._lock:
            self._unplanned.clear()
        for unit in self._units:
            unit.error = None  # its traceback leads back here: a cycle would keep the buffers
        self._units.clear()
        self._blocks.clear()
        self._queue.clear()
        if self._stage is not None:
            self._stage.stop()
        self._queue.end()

    async def aclose(self) -> None:
        """End the pass: join its threads and give its memory back. A read that hangs is left behind, and said.

        Where it is cancelled, a further call goes on with that.
        """
        self.stop()
        await self._after()
        workers = self._workers
        if workers is None:
            return
        if not await workers.joined(timeout=JOIN):
            logger.error("a read has not returned within %g s; its thread is left behind", JOIN)
        if self._ahead is not None:
            await self._ahead.aclose()
        if self._stage is not None and not await self._stage.joined(JOIN):
            logger.error("a transform has not returned within %g s, and is left behind", JOIN)
        self._workers, self.retired = None, workers.scratches
        self._recipe.share.release(self._scratch_granted)
        self._scratch_granted = 0
        await self._recipe.at_end()

    def __del__(self) -> None:
        self.closed = True
        if getattr(self, "_workers", None) is not None:
            self._workers.stop()  # type: ignore[union-attr]
        if getattr(self, "_ahead", None) is not None:
            self._ahead.abandon()  # type: ignore[union-attr]
        # What `aclose` and `stop` have not given back, each byte once.
        granted = getattr(self, "_scratch_granted", 0)
        if getattr(self, "_stage", None) is not None:
            granted += self._stage.abandon()  # type: ignore[union-attr]
        if granted:
            self._recipe.share.release_from_finalizer(granted)

    # ---- how it does

    @property
    def scratches(self) -> list[Scratch]:
        """The threads' own accounts."""
        return self.retired if self._workers is None else self._workers.scratches

    @property
    def transform_seconds(self) -> float:
        """Time in transforms."""
        shared = sum(scratch.seconds["transform"] for scratch in self.scratches)
        return shared + (0.0 if self._stage is None else self._stage.seconds)

    @property
    def queue(self) -> ReadyQueue[Ready | Made]:
        """What is ready."""
        return self._queue

    @property
    def buffers(self) -> int:
        """Buffers in use."""
        return self._pool.out

    def go_on(self) -> None:
        """After `paused` was cleared."""
        if self._loop is not None and not self.closed:
            self._pump()


def _left_for_blocks(recipe: Recipe) -> Callable[[], int]:
    """Bytes that batches must leave, until there are the buffers without which nothing is read."""
    needed, pool = min(recipe.sizes.units, recipe.sizes.buffers), recipe.pool
    return lambda: max(0, needed - pool.made) * pool.size


def _assembled(recipe: Recipe, ready: Ready) -> Batch:
    """The batch that lies in its block: views, no copies, unless it has a room of its own."""
    batch = recipe.assemble(ready.columns())
    batch.epoch, batch.cursor = ready.cursor.epoch, ready.cursor
    return batch


def _count(piece: Piece) -> int:
    return len(piece.rows) if piece.rows is not None else piece.upper - piece.lower


def _subset(at: Places, wanted: Rows) -> Places:
    if isinstance(wanted, slice):
        if wanted.start is None and wanted.stop is None:
            return at
        if isinstance(at, slice):
            return slice(at.start + wanted.start, at.start + wanted.stop)
        return at[wanted]
    return at.start + wanted if isinstance(at, slice) else at[wanted]
