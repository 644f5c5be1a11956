"""The thread for a fit's blocking file work: locks, scans, commits, reads; joined at the end of the block."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

from streamtrain.data.daemons import DaemonExecutor

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Files(Protocol):
    """Runs a blocking function on the thread."""

    async def __call__(self, fn: Callable[[], T], /) -> T: ...


@asynccontextmanager
async def file_thread(*, patience: float = 5.0) -> AsyncIterator[Files]:
    """A thread of its own; a disk that hangs for more than `patience` seconds at the end is left behind, and said."""
    executor = DaemonExecutor(1, "streamtrain-files")
    loop = asyncio.get_running_loop()

    async def files(fn: Callable[[], T], /) -> T:
        return await loop.run_in_executor(executor, fn)

    try:
        yield files
    finally:
        last = loop.run_in_executor(executor, lambda: None)
        await asyncio.wait([last], timeout=patience)
        if not last.done():
            logger.error("a disk has not answered within %g s; the thread that waits for it is left behind", patience)
        _end(executor, wait=last.done())


def _end(executor: DaemonExecutor, *, wait: bool) -> None:
    executor.shutdown(wait=wait, cancel_futures=True)
