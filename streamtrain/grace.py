"""Cancelling a fit: it runs in a task of its own, which is given time to save, however the cancellation comes.

Its law: only the time ends the grace. A native `task.cancel()` may come twice, and anyio's comes again and again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio

from streamtrain import stacks
from streamtrain.data.budget import format_bytes

T = TypeVar("T")
logger = logging.getLogger(__name__)

PROBE = 32 << 20
"""Bytes written to learn how fast a disk is, where no save has told; a state smaller than that is simply saved."""
_LAST = 5.0
"""Seconds to close files and threads after the grace was not enough."""


async def saving_on_cancel(
    fit: Coroutine[Any, Any, T],
    stop: Callable[[asyncio.Task[T]], object],
    grace: float,
    leave: Callable[[], object] = lambda: None,
) -> T:
    """Await `fit` in a task of its own; if we are cancelled, `stop` it, wait for up to `grace` seconds, and raise.

    One that has not ended then is cancelled, after `leave` was called: what it is stuck in is left behind.
    """
    task = asyncio.create_task(fit, name="streamtrain-fit")
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.done():
            raise
        stop(task)
        with anyio.CancelScope(shield=True):
            await _patiently(task, grace)
            if not task.done():
                logger.error("the cancelled fit has not ended within %g s: the last committed checkpoint stands", grace)
                logger.error("where it stands:\n%s", stacks.everything(asyncio.get_running_loop()))
                leave()
                task.cancel()
                await _patiently(task, _LAST)
        if task.done() and not task.cancelled() and task.exception() is not None:
            logger.error("the cancelled fit failed", exc_info=task.exception())
        raise


def lost(path: Path, step: int) -> str:
    """How many steps a run that stands at `step` loses if it goes on from this checkpoint; empty where it is none."""
    number = path.name.removeprefix("step-")
    steps = step - int(number) if number.isdecimal() else 0
    return f", {steps} {'step after it is' if steps == 1 else 'steps after it are'} lost" if steps > 0 else ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """How long a save would take, from what is known of its size and of the disk."""

    bytes: int
    rate: float
    """Bytes a second that were committed, or written by a probe."""

    @property
    def seconds(self) -> float:
        """How long that is."""
        return self.bytes / self.rate

    def __str__(self) -> str:
        return f"about {self.seconds:.3g} s ({format_bytes(self.bytes)} at {format_bytes(int(self.rate))}/s)"


def disk_rate(folder: Path, size: int = PROBE) -> float:
    """Bytes a second that a file of this size is written and synced with in `folder`; blocks. Raises OSError."""
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        piece = bytes(1 << 20)
        for _ in range(0, size, len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - began)


async def _patiently(task: asyncio.Task[Any], timeout: float) -> None:
    """Wait for a task, however often we are cancelled."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while not task.done() and loop.time() < deadline:
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task], timeout=deadline - loop.time())
