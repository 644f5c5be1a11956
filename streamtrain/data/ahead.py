"""Fetching ahead of the threads: chunks that are elsewhere are asked for in order, many at a time, before their turn.

    add       a unit's jobs, each with the chunks that it wants                                        (any thread)
    arrange   chunks of one object together; its index first, where it has one and it is not known      (private loop)
    advance   while a slot is free and the budget grants the bytes: the next request                    (private loop)
    arrived   a job whose chunks are all there goes to the threads                                      (private loop)
    done      its bytes are given back                                                                  (private loop)

Its law: nothing is fetched that was not granted, and nobody waits for a grant for ever: where no request is under way
and no job is out, the first job goes to the threads as it is, and they fetch what it lacks on the spot. Until the
answers to all that the first unit needs have begun, nothing else is asked for: read-ahead never delays the first batch,
since what is asked for then begins to come a latency later.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from streamtrain.data.budget import Share
from streamtrain.data.daemons import LEAVE_SECONDS
from streamtrain.data.feed import Feed
from streamtrain.data.fetch import RECENT, Account
from streamtrain.data.filters import Bytes
from streamtrain.data.parcels import Grants, Group, Haul, Order, Parcel, Request
from streamtrain.data.reading import Scratch, under
from streamtrain.data.remote import RemoteReader, Want
from streamtrain.data.spans import MIN_REQUESTS, RATE_PER_THREAD, Span, coalesce, requests_at_once
from streamtrain.data.workers import Job
from streamtrain.data.zarr_lane import ZarrLoop

logger = logging.getLogger(__name__)


class Ahead:
    """Fetches for one pass. Its state is touched on the private loop only."""

    def __init__(
        self, readers: Sequence[RemoteReader], share: Share, submit: Callable[[Job], None], threads: int
    ) -> None:
        self._loop: ZarrLoop = readers[0].loop
        self._fetcher = readers[0].fetcher
        self._account = Account()
        for reader in readers:
            reader.fetcher.account = self._account
        self._share, self._submit, self._threads = share, submit, threads
        self._grants = Grants(share)
        self._parcels: dict[Want, Parcel] = {}
        self._waiting: dict[Order, None] = {}
        self._groups: collections.deque[Group] = collections.deque()
        self._requests: collections.deque[Request] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._out = self._units = 0
        self._first_left = 0
        """Parcels of the first unit whose answer has not begun."""
        self._mean = 0.0
        """Bytes of a request, of the last ones."""
        self._shortest = math.inf
        """Seconds of the quickest request."""
        self._answers: collections.deque[float] = collections.deque(maxlen=RECENT)
        """When the last ones came."""
        self._used = self._stopped = False
        self.since: float | None = None
        """When something last began or arrived, while requests are under way (`time.monotonic`)."""

    @classmethod
    def over(cls, feeds: Sequence[Feed], share: Share, submit: Callable[[Job], None], threads: int) -> Ahead | None:
        """For these feeds; None where none of them is elsewhere."""
        inner = [under(RemoteReader, each.reader) for feed in feeds for each in (feed, *feed.beside)]
        readers = [reader for reader in inner if reader is not None]
        return cls(readers, share, submit, threads) if readers else None

    # ---- from other threads

    def add(self, jobs: Sequence[tuple[Sequence[Want], Job]]) -> None:
        """The jobs of one more unit; each is submitted when its chunks are there."""
        if not self._stopped:
            self._used = True
            with contextlib.suppress(RuntimeError):  # the private loop was closed: the pass has ended
                self._loop.call(self._guarded, self._arrange, jobs)

    def stop(self) -> None:
        """Ask for nothing more."""
        self._stopped = True

    async def aclose(self) -> None:
        """End what is under way, and give all bytes back. From the caller's loop."""
        self.stop()
        with contextlib.suppress(RuntimeError):
            if self._used:
                await asyncio.wait([asyncio.wrap_future(self._loop.submit(self._cancel()))], timeout=LEAVE_SECONDS)
        self._grants.close()

    def abandon(self) -> None:
        """The same from a finalizer."""
        self.stop()
        self._let_go()
        self._grants.close(finalizing=True)

    def blocks(self, size: int, usual: int) -> int:
        """Buffers of `size` bytes to fill beyond the `usual` ones: as many as the threads could fill in the time that
        a request takes, within half of the memory."""
        seconds = self._shortest if self._shortest < math.inf else 0.0
        return max(
            0, min(int(self._threads * RATE_PER_THREAD * seconds / size), self._share.total // 2 // size - usual)
        )

    def hung(self, now: float) -> str | None:
        """What to say where the private loop itself has stood still for longer than any request may take."""
        since = self.since
        if since is None or now - since < self._fetcher.longest:
            return None
        return f"a request to {self._fetcher.source.url('')} has not ended"

    # ---- on the private loop

    async def _cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._let_go()

    def _let_go(self) -> None:
        """Keep no job, and so no buffer: orders and parcels refer to each other."""
        for parcel in list(self._parcels.values()):
            parcel.jobs = []
        self._waiting = {}

    def _guarded(self, call: Callable[..., None], *arguments: object) -> None:
        """A fault of ours must not leave the consumer waiting: the threads then fetch for themselves."""
        try:
            call(*arguments)
            self._advance()
        except Exception:
            logger.exception("fetching ahead failed; the threads fetch for themselves")
            for order in list(self._waiting):
                self._hand_over(order)

    def _arrange(self, jobs: Sequence[tuple[Sequence[Want], Job]]) -> None:
        unit, self._units = self._units, self._units + 1
        groups: dict[tuple[int, str], Group] = {}
        for wants, job in jobs:
            order = Order(job)
            self._waiting[order] = None
            for want in dict.fromkeys(wants):
                self._await(order, want, unit, groups)
        self._groups.extend(groups.values())
        for order in [order for order in self._waiting if not order.waiting]:
            self._hand_over(order)

    def _await(self, order: Order, want: Want, unit: int, groups: dict[tuple[int, str], Group]) -> None:
        parcel = self._parcels.get(want)
        if parcel is None:
            parcel = self._parcels[want] = Parcel()
            key = want.reader.layout.key(want.chunk)
            group = groups.setdefault((id(want.reader), key), Group(want.reader, key, unit))
            group.wants.append(want)
            self._first_left += unit == 0
        parcel.users += 1
        order.parcels[want] = parcel
        if not parcel.there:
            order.waiting += 1
            parcel.jobs.append(order)

    def _advance(self) -> None:
        """Start requests while there is room for them; hand a job over where there is none for anybody."""
        self._account.at_once = limit = self._limit()
        while not self._stopped and len(self._tasks) < limit:
            if self._requests:
                if not any(self._parcels[want].users for *_, want in self._requests[0][5]):
                    for *_, want in self._requests.popleft()[5]:  # the threads have fetched it for themselves
                        self._forget(want)
                    continue
                if not self._grants.acquire(self._requests[0][4]):
                    break
                self._start(self._fetch(self._requests.popleft()))
            elif self._groups and (self._groups[0].unit == 0 or self._first_left <= 0):
                group = self._groups.popleft()
                if group.reader.knows(group.key):
                    self._place(group)
                else:
                    self._start(self._locate(group))
            else:
                break
        if not self._tasks and not self._out and self._waiting and not self._stopped:
            self._first_left = 0
            self._hand_over(next(iter(self._waiting)))
        self.since = time.monotonic() if self._tasks else None

    def _limit(self) -> int:
        if len(self._answers) < 2:
            return MIN_REQUESTS
        return requests_at_once(
            seconds=self._shortest,
            answers=(len(self._answers) - 1) / max(1e-6, time.monotonic() - self._answers[0]),
            request_bytes=self._mean,
            threads=self._threads,
            memory=self._share.total,
        )

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and not self._stopped:
            self._guarded(_nothing)

    async def _locate(self, group: Group) -> None:
        """Read the index of a shard, then place what is wanted of it."""
        try:
            await group.reader.read_index(group.key)
        except Exception as error:
            for want in group.wants:
                self._arrived(want, None, error)
            return
        self._place(group)

    def _place(self, group: Group) -> None:
        """Turn what is wanted of an object into requests; a whole object is one of its own."""
        wanted: list[tuple[int, int, Want]] = []
        for want in group.wants:
            if not self._parcels[want].users:
                self._forget(want)
                continue
            try:
                place = group.reader.place(want)
            except ValueError as error:
                self._arrived(want, None, error)
                continue
            if place is None:
                self._arrived(want, None, None)
            elif place.stop is None:
                self._requests.append((group.reader, group.key, 0, None, place.bound, ((0, place.bound, want),)))
            else:
                wanted.append((place.start, place.stop, want))
        self._requests.extend(self._spans(group, wanted))

    def _spans(self, group: Group, wanted: list[tuple[int, int, Want]]) -> Iterator[Request]:
        spans: list[Span[Want]] = coalesce(wanted)
        for span in spans:
            yield group.reader, group.key, span.start, span.stop, span.stop - span.start, span.members

    async def _fetch(self, request: Request) -> None:
        reader, key, start, stop, bound, members = request
        haul = Haul(bound, len(members))
        self.since = began = time.monotonic()

        def sized(size: int) -> None:
            if size < haul.granted:
                self._grants.release(haul.granted - size)
                haul.granted = size
            gated = self._first_left > 0
            for *_, want in members:
                self._begun(self._parcels[want])
            if gated and self._first_left <= 0:
                asyncio.get_running_loop().call_soon(self._guarded, _nothing)

        data: Bytes | None = None
        failed: Exception | None = None
        try:
            data = await reader.bytes_at(key, start, stop, sized=sized)
        except Exception as error:
            failed = error
        if data is not None:
            now = time.monotonic()
            self._answers.append(now)
            self._shortest = min(self._shortest, now - began)
            self._mean = 0.9 * self._mean + 0.1 * len(data) if self._mean else len(data)
        for first, last, want in members:
            part = data[first - start : last - start] if data is not None else None
            self._arrived(want, part, failed, haul)

    def _arrived(self, want: Want, data: Bytes | None, error: Exception | None, haul: Haul | None = None) -> None:
        parcel = self._parcels[want]
        parcel.there, parcel.data, parcel.error, parcel.haul = True, data, error, haul
        self._begun(parcel)
        orders, parcel.jobs = parcel.jobs, []
        if not parcel.users:
            self._forget(want)
        for order in orders:
            order.waiting -= 1
            if not order.waiting and order in self._waiting:
                self._hand_over(order)

    def _begun(self, parcel: Parcel) -> None:
        if not parcel.begun:
            parcel.begun = True
            self._first_left -= 1

    def _hand_over(self, order: Order) -> None:
        """To the threads, with what is there."""
        del self._waiting[order]
        self._out += 1
        self._submit(lambda scratch: self._do(order, scratch))

    def _do(self, order: Order, scratch: Scratch) -> None:
        """In a worker's thread."""
        scratch.fetched = {want: parcel.take for want, parcel in order.parcels.items() if parcel.there}
        try:
            order.job(scratch)
        finally:
            scratch.fetched = {}
            with contextlib.suppress(RuntimeError):  # the private loop was closed: the pass has ended
                if not self._stopped:
                    self._loop.call(self._guarded, self._done, order)

    def _done(self, order: Order) -> None:
        self._out -= 1
        for want, parcel in order.parcels.items():
            parcel.users -= 1
            if not parcel.users and parcel.there:
                self._forget(want)

    def _forget(self, want: Want) -> None:
        """Nobody uses it any more."""
        parcel = self._parcels.pop(want)
        haul, parcel.jobs = parcel.haul, []
        if haul is not None:
            haul.left -= 1
            if not haul.left:
                self._grants.release(haul.granted)


def _nothing() -> None:
    """What `_guarded` calls where only advancing is left to do."""
