"""The threads of one pass: they take jobs in order and end when told. The only file of this room that makes threads.

Submitting never blocks, so the event loop may do it; a job's own failure is the job's to report.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import queue
import threading
from collections.abc import Callable

from streamtrain.data.reading import Scratch

Job = Callable[[Scratch], None]


def default_threads() -> int:
    """Threads that decode unless told otherwise: as many as this process may use cores, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0))))


class Workers:
    """`count` threads with a shared queue of jobs; `submit(..., front=True)` overtakes what waits."""

    def __init__(self, count: int, name: str, *, leave: Callable[[Scratch], None] | None = None) -> None:
        """`leave`: called in each thread at its end."""
        self._leave = leave
        self._jobs: collections.deque[Job] = collections.deque()
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._stopped = False
        self._lock = threading.Lock()
        self._working = count
        self._at_end: list[Callable[[], None]] = []
        self.scratches: list[Scratch] = []
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def stopped(self) -> bool:
        """Whether they were told to end."""
        return self._stopped

    def submit(self, job: Job, *, front: bool = False) -> None:
        """Queue a job; jobs that wait when the workers are stopped never run."""
        if self._stopped:
            return  # kept here, it would keep its buffers
        if front:
            self._jobs.appendleft(job)
        else:
            self._jobs.append(job)
        self._tokens.put(True)

    def _work(self) -> None:
        try:
            self._serve()
        finally:
            with self._lock:
                self._working -= 1
                calls = [] if self._working else list(self._at_end)
            for call in calls:
                call()

    def _serve(self) -> None:
        scratch = Scratch()
        self.scratches.append(scratch)
        while self._tokens.get() and not self._stopped:
            try:
                job = self._jobs.popleft()
            except IndexError:  # its job was dropped by `stop`
                continue
            job(scratch)
            del job  # an idle thread keeps no block alive
        if self._leave is not None:
            self._leave(scratch)

    def stop(self) -> None:
        """Tell the threads to end after the job each has in hand. Never blocks."""
        self._stopped = True
        self._jobs.clear()
        for _ in self._threads:
            self._tokens.put(False)

    @property
    def alive(self) -> bool:
        """Whether a thread still works."""
        return any(thread.is_alive() for thread in self._threads)

    async def joined(self, timeout: float) -> bool:
        """Wait for the threads' end without blocking the loop; False if one still works after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not ended.done():
                ended.set_result(None)

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed under us; nobody waits any more
                loop.call_soon_threadsafe(settle)

        with self._lock:
            self._at_end.append(tell)
            over = self._working == 0
        if not over:
            await asyncio.wait([ended], timeout=timeout)
            if not ended.done():
                return False
        self.join()
        return True

    def join(self, timeout: float | None = None) -> None:
        """Wait for the threads' end."""
        for thread in self._threads:
            thread.join(timeout)
