"""Cancelling a fit: it runs in a task of its own, which is given time to save, however the cancellation comes.

Its law: only the time ends the grace. A native `task.cancel()` may come twice, and anyio's comes again and again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import anyio

T = TypeVar("T")
logger = logging.getLogger(__name__)

_LAST = 5.0
"""Seconds to close files and threads after the grace was not enough."""


async def saving_on_cancel(fit: Coroutine[Any, Any, T], stop: Callable[[asyncio.Task[T]], object], grace: float) -> T:
    """Await `fit` in a task of its own; if we are cancelled, `stop` it, wait for up to `grace` seconds, and raise."""
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
                task.cancel()
                await _patiently(task, _LAST)
        if task.done() and not task.cancelled() and task.exception() is not None:
            logger.error("the cancelled fit failed", exc_info=task.exception())
        raise


def lost(path: Path, step: int) -> str:
    """How many steps a run that stands at `step` loses if it goes on from this checkpoint; empty where it is none."""
    number = path.name.removeprefix("step-")
    steps = step - int(number) if number.isdecimal() else 0
    return f", {steps} steps after it are lost" if steps > 0 else ""


async def _patiently(task: asyncio.Task[Any], timeout: float) -> None:
    """Wait for a task, however often we are cancelled."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while not task.done() and loop.time() < deadline:
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task], timeout=deadline - loop.time())
