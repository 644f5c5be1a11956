"""Who transforms the batches of a pass: the threads that read, threads or tasks of its own, or processes.

Its law: who does it changes nothing in what comes out. Nothing here knows a pass, or it would keep it alive.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from streamtrain.data.batch import Batch
from streamtrain.data.budget import Share, format_bytes
from streamtrain.data.options import Crew
from streamtrain.data.reading import Scratch
from streamtrain.data.transform import Transform, apply, apply_async, is_async
from streamtrain.data.transform_processes import TransformProcess
from streamtrain.data.transforming import Ready, Runner, TaskRunner, ThreadRunner
from streamtrain.data.workers import Workers

logger = logging.getLogger(__name__)

TASKS = 16
"""Async transforms at a time, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What is to be done to each batch."""

    transform: Transform
    crew: Crew
    payload: bytes | None
    """The transform as it goes to processes; None: it runs here."""
    seed: int
    prefetch: int | None
    assembled: Callable[[Ready], Batch]
    """The raw batch: views of its block."""
    finish: Callable[[Batch], Batch]
    """The transformed batch as it is handed over."""


def runner(given: Assignment, workers: Workers, *, threads: int, share: Share, least: int, slot_bytes: int) -> Runner:
    """What runs the transforms; `workers` are the `threads` that read, `least` the bytes that these need."""
    count = given.crew.count
    if is_async(given.transform):
        return TaskRunner(_task(given), ahead=min(count or TASKS, given.prefetch or TASKS))
    if given.payload is not None:
        wanted = processes = count or threads
        while processes > 1 and least + processes * slot_bytes > share.total:
            processes -= 1
        if processes < wanted:
            logger.info("memory=%s: %d of %d processes", format_bytes(share.total), processes, wanted)
        return _processes(given, given.payload, processes, share, slot_bytes)
    if count is None:
        return ThreadRunner(_work(given), workers, ahead=threads + 1, own=False)
    return ThreadRunner(_work(given), Workers(count, "streamtrain-transform"), ahead=count + 1, own=True)


def _work(given: Assignment) -> Callable[[Ready], Batch]:
    return lambda ready: given.finish(apply(given.transform, given.assembled(ready), given.seed))


def _task(given: Assignment) -> Callable[[Ready], Coroutine[None, None, Batch]]:
    async def task(ready: Ready) -> Batch:
        return given.finish(await apply_async(given.transform, given.assembled(ready), given.seed))

    return task


def _processes(given: Assignment, payload: bytes, count: int, share: Share, slot_bytes: int) -> Runner:
    """Threads that have a process each, from the first batch that they get until their end."""
    living: dict[int, TransformProcess] = {}

    def leave(scratch: Scratch) -> None:
        process = living.pop(threading.get_ident(), None)
        if process is not None:
            process.close()

    workers = Workers(count, "streamtrain-transform", leave=leave)
    stopped = workers.stopped

    def work(ready: Ready) -> Batch:
        me = threading.get_ident()
        if me not in living:
            living[me] = TransformProcess(payload, given.seed, share, slot_bytes, stopped)
        return given.finish(living[me].transform(given.assembled(ready)))

    return ThreadRunner(work, workers, ahead=count + 1, own=True)
