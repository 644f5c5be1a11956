"""A machine of one thread, played by a seed: an event loop whose clock jumps, and workers that it tells to get on.

What real threads do in some order, they do here in an order that is drawn, and that comes again with the seed. A job is
taken, and made, in one step each; between any two steps of theirs the loop may turn as often as it likes.
"""

from __future__ import annotations

import asyncio
import collections
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

from streamtrain.data import passes
from streamtrain.data.reading import Scratch
from streamtrain.data.workers import Job

T = TypeVar("T")

TURNS = 2_000_000
"""Turns of the loop after which nothing will come of it any more; a wait for what another stream keeps takes 3,000."""
TIMERS = 0.03
"""How often a timer is over before a job that is under way is, where both could be next."""


class Deadlock(AssertionError):
    """Nothing is ready, no timer runs and no job is under way, but somebody waits."""


class SeededLoop(asyncio.BaseEventLoop):
    """A loop that never sleeps: where nothing is ready, a worker gets on or the clock jumps to the next timer."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng, self.now, self.turns = rng, 0.0, 0
        self.crews: list[SeededWorkers] = []
        self._selector = self

    def time(self) -> float:
        """Seconds that nobody has waited for."""
        return self.now

    monotonic = perf_counter = time
    """For files that ask the module `time`."""

    def select(self, timeout: float | None) -> list[Any]:
        """Let others get on: sometimes where the loop has work itself, always where it has none.

        Raises Deadlock where nobody can.
        """
        self.turns += 1
        if self.turns > TURNS:
            raise Deadlock(f"{TURNS} turns of the loop, and no end")
        if timeout == 0:
            while self.rng.random() < 0.4 and self._work():
                pass
        elif (timeout is not None and self.rng.random() < TIMERS) or not self._work():
            if timeout is None:
                raise Deadlock("somebody waits for what nobody does")
            self.now += timeout
        return []

    def _work(self) -> bool:
        """One step of a worker; False if none has anything to do."""
        steps = [step for crew in self.crews for step in crew.steps()]
        if steps:
            self.rng.choice(steps)()
        return bool(steps)

    def _process_events(self, event_list: list[Any]) -> None:
        """There are no files."""

    def _write_to_self(self) -> None:
        """It never sleeps."""

    def drain(self) -> None:
        """Let the workers make what they have in hand, and the loop what follows."""
        while self._work():
            self.run_until_complete(asyncio.sleep(0))


class SeededWorkers:
    """Stands for `streamtrain.data.workers.Workers`: the same promises, kept in steps."""

    def __init__(self, count: int, name: str, *, leave: Callable[[Scratch], None] | None = None) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SeededLoop)
        assert leave is None
        self._loop = loop
        self._jobs: collections.deque[Job] = collections.deque()
        self._in_hand: list[Job | None] = [None] * count
        self._stopped = False
        self._ended: list[asyncio.Future[None]] = []
        self.scratches = [Scratch() for _ in range(count)]
        loop.crews.append(self)

    def stopped(self) -> bool:
        """Whether they were told to end."""
        return self._stopped

    def submit(self, job: Job, *, front: bool = False) -> None:
        """Queue a job."""
        if self._stopped:
            return
        if front:
            self._jobs.appendleft(job)
        else:
            self._jobs.append(job)

    def stop(self) -> None:
        """Tell them to end after what each has in hand."""
        self._stopped = True
        self._jobs.clear()

    def steps(self) -> Iterator[Callable[[], None]]:
        """What could happen next."""
        for number, job in enumerate(self._in_hand):
            if job is not None:
                yield lambda number=number: self._make(number)  # type: ignore[misc]
            elif self._jobs:
                yield lambda number=number: self._take(number)  # type: ignore[misc]
        if self._stopped and self._ended and not self.alive:
            yield self._leave

    def _take(self, number: int) -> None:
        self._in_hand[number] = self._jobs.popleft()

    def _make(self, number: int) -> None:
        job, self._in_hand[number] = self._in_hand[number], None
        assert job is not None
        job(self.scratches[number])

    def _leave(self) -> None:
        for future in self._ended:
            if not future.done():
                future.set_result(None)
        self._ended.clear()

    @property
    def alive(self) -> bool:
        """Whether one has a job in hand."""
        return any(job is not None for job in self._in_hand)

    async def joined(self, timeout: float) -> bool:
        """Wait for their end; False if it does not come within `timeout` seconds."""
        future = self._loop.create_future()
        self._ended.append(future)
        await asyncio.wait([future], timeout=timeout)
        return future.done()


@contextmanager
def seeded(rng: random.Random) -> Iterator[SeededLoop]:
    """A loop; passes that begin on it have its workers, and its clock."""
    loop = SeededLoop(rng)
    asyncio.set_event_loop(loop)
    try:
        with patch.object(passes, "Workers", SeededWorkers), patch.object(passes, "time", loop):
            yield loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def run(rng: random.Random, main: Coroutine[Any, Any, T]) -> T:
    """What a coroutine gives on such a loop. Raises Deadlock if it never ends, and for a task that it leaves behind."""
    with seeded(rng) as loop:
        result = loop.run_until_complete(main)
        loop.drain()
        left = asyncio.all_tasks(loop)
        assert not left, f"tasks left behind: {left}"
        return result
