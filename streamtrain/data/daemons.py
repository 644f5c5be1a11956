"""An executor whose threads are daemons: one that waits for a disk which never answers keeps no process alive.

A `ThreadPoolExecutor` would: Python joins its threads, without a limit, before it ends.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

LEAVE_SECONDS = 2.0
"""How long `shutdown` waits for calls that are under way."""


class DaemonExecutor(concurrent.futures.ThreadPoolExecutor):
    """Up to `max_workers` daemon threads in place of the pool's own, started as they are needed."""

    def __init__(self, max_workers: int, name: str) -> None:
        super().__init__(max_workers)  # a loop takes nothing else; it starts no thread before its own `submit`
        self._name, self._limit, self._ended, self._waited = name, max_workers, False, False
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], concurrent.futures.Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._daemons: list[threading.Thread] = []

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        """Queue a call. Raises RuntimeError after `shutdown`."""
        if self._ended:
            raise RuntimeError(f"the threads {self._name} have been ended")
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._calls.put((call, future))
        if len(self._daemons) < self._limit:
            name = f"{self._name}-{len(self._daemons)}"
            self._daemons.append(threading.Thread(target=self._serve, name=name, daemon=True))
            self._daemons[-1].start()
        return future

    def _serve(self) -> None:
        while item := self._calls.get():
            item[0]()
            del item  # an idle thread keeps nothing alive

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads; the first call that is to wait waits for those that end within LEAVE_SECONDS."""
        if cancel_futures:
            with contextlib.suppress(queue.Empty):
                while True:
                    item = self._calls.get_nowait()
                    if item is not None:
                        item[1].cancel()
        self._ended = True
        for _ in self._daemons:
            self._calls.put(None)
        waited, self._waited = self._waited, self._waited or wait
        deadline = time.monotonic() + LEAVE_SECONDS
        for thread in self._daemons if wait and not waited else ():
            thread.join(max(0.0, deadline - time.monotonic()))
