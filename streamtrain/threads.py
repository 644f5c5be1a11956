"""The one train thread of the process: steps, validation, prediction and snapshots, first in, first out.

Its law: a job runs to its end whoever stops waiting for it, so that no cancellation can tear a snapshot. The first
user starts the thread, the last one joins it; it is never a worker of the default executor. A job sees its caller's
context variables, default device, gradient mode, CUDA device and number of threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any, ClassVar, TypeVar

import torch

from streamtrain.ending import to_its_end
from streamtrain.malloc import keep_freed
from streamtrain.openmp import give_up_pool

T = TypeVar("T")
logger = logging.getLogger(__name__)


class _Job:
    """A function with the caller's surroundings and the future that waits for it."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self._fn = fn
        self._context = contextvars.copy_context()
        self._device = _default_device()
        self._grad = torch.is_grad_enabled()
        self._cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._threads = torch.get_num_threads()

    def run(self) -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            with ExitStack() as stack:
                if self._device != _default_device():
                    stack.enter_context(self._device)
                if self._cuda is not None:
                    stack.enter_context(torch.cuda.device(self._cuda))
                if self._threads != torch.get_num_threads():  # OpenMP keeps this number for each thread
                    torch.set_num_threads(self._threads)
                stack.enter_context(torch.set_grad_enabled(self._grad))
                outcome = (self._context.run(self._fn), None)
        except BaseException as error:
            outcome = (None, error)
        tell(self.loop, self.future, *outcome)


def _default_device() -> torch.device:
    """What `torch.get_default_device` gives, which looks through torch's modes in Python: 5 us, twice a burst."""
    return torch.empty(0).device


def tell(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: Any, error: BaseException | None
) -> None:
    """Settle a future of that loop from another thread; nothing happens where nobody waits any more."""

    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration):  # a future refuses it
            future.set_exception(RuntimeError("a job raised StopIteration"))
        else:
            future.set_exception(error)

    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop was closed under us; nobody waits any more
        logger.debug("a job of a thread of ours ended after its event loop")


class TrainThread:
    """Use it by `async with train_thread() as thread:`."""

    _guard: ClassVar[threading.Lock] = threading.Lock()
    _shared: ClassVar[TrainThread | None] = None

    def __init__(self) -> None:
        self._users = 0
        self.since: float | None = None
        """When the job that runs now began, on `time.monotonic`'s clock."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # A daemon, so that a step which never returns cannot keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="streamtrain-train", daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[[], T]) -> asyncio.Future[T]:
        """Queue `fn`; the future, of the running loop, gets its result or error."""
        give_up_pool()  # the caller's, which would slow down ours
        job = _Job(fn)
        self._jobs.put(job)
        return job.future

    async def run(self, fn: Callable[[], T]) -> T:
        """`fn()` on the train thread; a cancelled caller stops waiting, the job does not stop."""
        return await self.submit(fn)

    def _work(self) -> None:
        keep_freed()
        while (job := self._jobs.get()) is not None:
            self.since = time.monotonic()
            job.run()
            self.since = None
            del job  # an idle thread keeps no batch alive

    @classmethod
    def acquire(cls) -> TrainThread:
        """Become a user of the process's thread."""
        with cls._guard:
            if cls._shared is None:
                cls._shared = cls()
            cls._shared._users += 1
            return cls._shared

    async def release(self, timeout: float = 5.0) -> None:
        """Stop being a user; the last one waits until the thread has ended, at most `timeout` seconds."""
        with self._guard:
            self._users -= 1
            if self._users:
                return
            TrainThread._shared = None
        await to_its_end(self._joined(timeout), "streamtrain-train-end")

    async def _joined(self, timeout: float) -> None:
        last = _Job(lambda: None)
        self._jobs.put(last)
        self._jobs.put(None)
        await asyncio.wait([last.future], timeout=timeout)
        if last.future.done():
            self._thread.join()
        else:
            logger.error("a step has not returned within %g s; the train thread is left behind", timeout)


@asynccontextmanager
async def train_thread(gone: asyncio.Future[None] | None = None) -> AsyncIterator[TrainThread]:
    """The process's train thread, kept alive while the block lasts; once `gone` is settled it is not waited for."""
    thread = TrainThread.acquire()
    try:
        yield thread
    finally:
        await thread.release(timeout=0.1 if gone is not None and gone.done() else 5.0)
