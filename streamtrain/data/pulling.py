"""A synchronous pass pulled in a thread of ours, for who must not block the loop.

Its law: an item that was asked for is never lost: a cancelled wait leaves it to the next one.
"""

from __future__ import annotations

import asyncio
import contextlib

from streamtrain.data.batch import Batch
from streamtrain.data.reading import Scratch
from streamtrain.data.source import Pass
from streamtrain.data.workers import Workers


class Puller:
    """One thread that asks passes for their next batch."""

    def __init__(self, name: str) -> None:
        self._workers = Workers(1, name)
        self._asked: tuple[Pass, asyncio.Future[Batch | BaseException]] | None = None

    async def pull(self, source: Pass) -> Batch:
        """The next batch. Raises StopAsyncIteration at the end, or what the source raises."""
        if self._asked is None or self._asked[0] is not source:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[Batch | BaseException] = loop.create_future()

            def job(scratch: Scratch) -> None:
                answer: Batch | BaseException
                try:
                    batch = source.next_nowait()
                    assert batch is not None
                    answer = batch
                except BaseException as error:
                    answer = error
                with contextlib.suppress(RuntimeError):  # the loop was closed under us
                    loop.call_soon_threadsafe(future.set_result, answer)

            self._asked = (source, future)
            self._workers.submit(job)
        answer = await asyncio.shield(self._asked[1])
        self._asked = None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def aclose(self) -> None:
        """End the thread, after the item that it is at."""
        self._workers.stop()
        await self._workers.joined(timeout=5.0)
