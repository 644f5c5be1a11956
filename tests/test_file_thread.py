"""The thread for a fit's files: it ends with its block, however that is left."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest

from streamtrain.errors import EnvironmentProblem
from streamtrain.file_thread import file_thread


class Busy:
    """A block whose thread waits for the gate."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), asyncio.Event()

    async def work(self) -> None:
        async with file_thread() as files:
            self.entered.set()
            await files(lambda: self.gate.wait(60))


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("streamtrain-files")]


async def test_a_block_that_is_cancelled_again_and_again_ends_its_thread() -> None:
    busy = Busy()
    work = asyncio.create_task(busy.work())
    await busy.entered.wait()
    (thread,) = ours()
    for _ in range(3):
        work.cancel()
        await asyncio.sleep(0)
    busy.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    thread.join(timeout=20)
    assert not thread.is_alive()


async def test_a_block_in_a_cancelled_scope_has_ended_its_thread_when_it_is_left() -> None:
    busy = Busy()
    async with anyio.create_task_group() as group:
        group.start_soon(busy.work)
        await busy.entered.wait()
        assert len(ours()) == 1
        asyncio.get_running_loop().call_later(0.05, busy.gate.set)
        group.cancel_scope.cancel()
    assert ours() == []


async def test_a_disk_that_is_well_still_answers_once_nobody_waits_for_what_hangs() -> None:
    loop, gate = asyncio.get_running_loop(), threading.Event()
    gone: asyncio.Future[None] = loop.create_future()
    async with file_thread(gone=gone) as files:
        gone.set_result(None)
        loop.call_later(0.01, gate.set)  # some turns of the loop
        assert await files(lambda: gate.wait(60))


async def test_a_disk_that_hangs_is_not_waited_for_once_nobody_is_to(caplog: pytest.LogCaptureFixture) -> None:
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    gate = threading.Event()
    async with file_thread(gone=gone) as files:
        gone.set_result(None)
        with pytest.raises(EnvironmentProblem, match="not answered in time"):
            await files(lambda: gate.wait(60))
    gate.set()
    assert "is left behind" in caplog.text
