"""What has to be ended is ended, however often whoever ends it is cancelled meanwhile.

Its law: a cancellation is raised, but later. A native `task.cancel()` may come twice, and anyio's again at each wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


async def to_its_end(work: Coroutine[Any, Any, T], name: str) -> T:
    """`await work`, in a task of its own with this name; a cancellation that came meanwhile is raised afterwards."""
    task = asyncio.create_task(work, name=name)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


async def going_on(work: Callable[[], Awaitable[T]]) -> T:
    """`await work()`, begun again whenever this task is cancelled meanwhile: for tasks of ours that nobody is to end
    but their own work, which `asyncio.run` cancels with all others at its end, while a fit still needs them."""
    while True:
        try:
            return await work()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                raise  # something that it awaits was
            as_if_not_cancelled(task)


def as_if_not_cancelled(task: asyncio.Task[Any] | None) -> None:
    """Take back all cancellations of a task that goes on."""
    while task is not None and task.cancelling():
        task.uncancel()
