"""Where each thread and each task of a process stands: what one asks of a run that seems to hang.

Its law: looking changes nothing and waits for nobody, so that it may be done from any thread, or in a signal handler.
Tasks are drawn below the tasks that wait for them, as far as asyncio lets one see that.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

DEEPEST = 40
"""Frames of a thread that are shown, the innermost."""


def everything(loop: asyncio.AbstractEventLoop | None = None) -> str:
    """The stacks of all threads, and the tree of the tasks of `loop`, in lines."""
    lines = [line for thread in threading.enumerate() for line in of_thread(thread)]
    if loop is not None:
        lines += of_tasks(loop)
    return "\n".join(lines)


def of_thread(thread: threading.Thread) -> list[str]:
    """Its name, and a line for each call that it is in, the innermost last."""
    frame = sys._current_frames().get(thread.ident or 0)
    calls = [] if frame is None else [*traceback.walk_stack(frame)][DEEPEST - 1 :: -1]
    kind = "daemon thread" if thread.daemon else "thread"
    where = (f"  {call.f_code.co_filename}:{line} in {call.f_code.co_name}" for call, line in calls)
    return [f"{kind} {thread.name}:", *where]


def of_task(task: asyncio.Task[Any]) -> list[str]:
    """The same of a task: the calls in which it waits."""
    return [f"task {task.get_name()}:", *(f"  {call}" for call in _calls(task.get_coro()))]


def of_tasks(loop: asyncio.AbstractEventLoop) -> list[str]:
    """A loop's tasks with their names and the calls in which they wait, each below the task that waits for it."""
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    above = {task: _awaiting(task, tasks) for task in tasks}
    lines = [f"{len(tasks)} tasks:"]

    def draw(task: asyncio.Task[Any], depth: int) -> None:
        if task not in above:
            return  # drawn already: two that wait for each other are shown once
        del above[task]
        lines.extend("  " * depth + line for line in of_task(task))
        for other in tasks:
            if above.get(other) is task:
                draw(other, depth + 1)

    for task in [*(task for task in tasks if above[task] is None), *tasks]:
        draw(task, 0)
    return lines


def _calls(waiting: Any) -> Iterator[str]:
    """The calls from a coroutine to what it waits for; the line of each."""
    while waiting is not None:
        frame: FrameType | None = next(
            (found for name in ("cr_frame", "gi_frame", "ag_frame") if (found := getattr(waiting, name, None))), None
        )
        if frame is None:
            return
        yield f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        inner = (getattr(waiting, name, None) for name in ("cr_await", "gi_yieldfrom", "ag_await"))
        waiting = next((found for found in inner if found is not None), None)


def _awaiting(task: asyncio.Task[Any], tasks: Iterable[asyncio.Task[Any]]) -> asyncio.Task[Any] | None:
    """Which of `tasks` waits for this one, by itself or through `asyncio.wait`, `gather`, `shield`; None if none does.

    Only asyncio's own attributes tell: where a version lacks them, the tree is flat.
    """
    told = {id(task)} | {id(found) for callback in getattr(task, "_callbacks", None) or () for found in _held(callback)}
    return next((other for other in tasks if id(getattr(other, "_fut_waiter", None)) in told), None)


def _held(callback: Any) -> Iterator[object]:
    """The futures that a done-callback will settle: what its closure holds."""
    function = callback[0] if isinstance(callback, tuple) else callback
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
