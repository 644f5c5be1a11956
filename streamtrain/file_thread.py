"""The thread for a fit's blocking file work: locks, scans, commits, reads; joined at the end of the block."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

from streamtrain.data.daemons import DaemonExecutor
from streamtrain.ending import to_its_end
from streamtrain.errors import EnvironmentProblem

T = TypeVar("T")
logger = logging.getLogger(__name__)

_MOMENT = 0.1
"""Seconds for a disk that nobody is to wait for."""


class Files(Protocol):
    """Runs a blocking function on the thread."""

    async def __call__(self, fn: Callable[[], T], /) -> T: ...


@asynccontextmanager
async def file_thread(*, patience: float = 5.0, gone: asyncio.Future[None] | None = None) -> AsyncIterator[Files]:
    """A thread of its own; a disk that hangs for more than `patience` seconds at the end is left behind, and said.

    Once `gone` is settled nobody waits for the disk any more: a call that it does not answer within a moment raises
    EnvironmentProblem.
    """
    executor = DaemonExecutor(1, "streamtrain-files")
    loop = asyncio.get_running_loop()

    async def files(fn: Callable[[], T], /) -> T:
        called = loop.run_in_executor(executor, fn)
        if gone is not None:
            either: set[asyncio.Future[Any]] = {called, gone}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not called.done():  # it may be well, and something else hang
                    await asyncio.wait([called], timeout=_MOMENT)
            except asyncio.CancelledError:
                called.cancel()
                raise
            if not called.done():
                called.cancel()
                raise EnvironmentProblem("a disk has not answered in time", hint="What waits for it is left behind.")
        return await called

    try:
        yield files
    finally:
        late = gone is not None and gone.done()
        await to_its_end(_ended(executor, _MOMENT if late else patience), "streamtrain-files-end")


async def _ended(executor: DaemonExecutor, patience: float) -> None:
    last = asyncio.get_running_loop().run_in_executor(executor, lambda: None)
    try:
        await asyncio.wait([last], timeout=patience)
        if not last.done():
            logger.error("a disk has not answered in time; the thread that waits for it is left behind")
    finally:
        _end(executor, wait=last.done())


def _end(executor: DaemonExecutor, *, wait: bool) -> None:
    executor.shutdown(wait=wait, cancel_futures=True)
