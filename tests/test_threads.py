"""The train thread: one in the process, first in first out, jobs whole, callers' surroundings, nothing left behind."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch

from streamtrain.openmp import give_up_pool
from streamtrain.threads import TrainThread, train_thread


def alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "streamtrain-train"]


class Gate:
    """A job that runs until it is told to end."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.open = threading.Event()
        self.ended = False
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> str:
        self._loop.call_soon_threadsafe(self.entered.set)
        self.open.wait()
        self.ended = True
        return "through"


async def test_jobs_run_in_the_order_in_which_they_were_given() -> None:
    seen: list[int] = []

    def job(number: int) -> Callable[[], int]:
        def run() -> int:
            seen.append(number)
            return number

        return run

    async with train_thread() as thread:
        futures = [thread.submit(job(number)) for number in range(100)]
        assert await asyncio.gather(*futures) == list(range(100))
    assert seen == list(range(100))


async def test_all_users_share_one_thread_and_the_last_one_joins_it() -> None:
    assert alive() == []
    async with train_thread() as one:
        first = await one.run(threading.get_ident)
        async with train_thread() as other:
            assert other is one
            assert await other.run(threading.get_ident) == first
        assert len(alive()) == 1
        assert await one.run(threading.get_ident) == first
    assert alive() == []
    async with train_thread() as later:
        assert later is not one
    assert alive() == []


async def test_a_cancelled_caller_stops_no_job() -> None:
    async with train_thread() as thread:
        gate = Gate()
        caller = asyncio.create_task(thread.run(gate))
        await gate.entered.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert not gate.ended
        gate.open.set()
        assert await thread.run(lambda: gate.ended)


async def test_a_job_that_waits_runs_though_its_caller_was_cancelled() -> None:
    ran: list[int] = []
    async with train_thread() as thread:
        gate = Gate()
        first = thread.submit(gate)
        await gate.entered.wait()
        waiting = asyncio.create_task(thread.run(lambda: ran.append(1)))
        await asyncio.sleep(0)
        waiting.cancel()
        gate.open.set()
        assert await first == "through"
    assert ran == [1]


async def test_the_last_user_joins_the_thread_in_a_cancelled_scope_too() -> None:
    async with anyio.create_task_group() as group:

        async def use() -> None:
            async with train_thread() as thread:
                gate = Gate()
                thread.submit(gate)
                await gate.entered.wait()
                asyncio.get_running_loop().call_later(0.05, gate.open.set)  # after a run that would not wait
                group.cancel_scope.cancel()

        group.start_soon(use)
    assert alive() == []


async def test_errors_come_to_the_caller_and_the_thread_goes_on() -> None:
    def fail(error: BaseException) -> Callable[[], Any]:
        def job() -> Any:
            raise error

        return job

    async with train_thread() as thread:
        for error in (ValueError("bad"), SystemExit(3), KeyboardInterrupt()):
            with pytest.raises(type(error)):
                await thread.run(fail(error))
        with pytest.raises(RuntimeError, match="StopIteration"):
            await thread.run(fail(StopIteration()))
        assert await thread.run(lambda: 7) == 7


async def test_a_job_sees_its_callers_context() -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")

    async def caller(thread: TrainThread, name: str) -> str:
        tenant.set(name)
        assert await thread.run(tenant.get) == name
        return name

    async with train_thread() as thread:
        assert set(await asyncio.gather(caller(thread, "blue"), caller(thread, "red"))) == {"blue", "red"}
        assert await thread.run(tenant.get) == "nobody"


async def test_a_job_sees_its_callers_torch_settings_and_leaves_none_behind() -> None:
    def seen() -> tuple[bool, str, int]:
        return torch.is_grad_enabled(), str(torch.empty(0).device), torch.get_num_threads()

    threads = torch.get_num_threads()
    async with train_thread() as thread:
        try:
            with torch.no_grad(), torch.device("meta"):
                torch.set_num_threads(1)
                assert await thread.run(seen) == (False, "meta", 1)
        finally:
            torch.set_num_threads(threads)
        assert await thread.run(seen) == (True, "cpu", threads)


async def test_a_job_that_never_returns_is_left_behind_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    thread, gate = TrainThread.acquire(), Gate()
    job = thread.submit(gate)
    await gate.entered.wait()
    with caplog.at_level(logging.ERROR):
        await thread.release(timeout=0.01)
    assert "left behind" in caplog.text
    async with train_thread() as another:
        assert another is not thread
        assert await another.run(lambda: 7) == 7
    gate.open.set()
    assert await job == "through"


def test_a_job_may_outlive_its_event_loop() -> None:
    told: list[str] = []
    gate = threading.Event()
    entered = threading.Event()

    def job() -> None:
        entered.set()
        gate.wait()
        told.append("through")

    async def scenario() -> TrainThread:
        thread = TrainThread.acquire()
        thread.submit(job)
        return thread

    thread = asyncio.run(scenario())
    entered.wait()
    gate.set()
    asyncio.run(thread.release())
    assert told == ["through"]
    assert alive() == []


async def test_two_loops_share_the_thread() -> None:
    def other_loop() -> int:
        async def scenario() -> int:
            async with train_thread() as thread:
                return await thread.run(threading.get_ident)

        return asyncio.run(scenario())

    async with train_thread() as thread:
        mine = await thread.run(threading.get_ident)
        assert await asyncio.to_thread(other_loop) == mine
        assert len(alive()) == 1


async def test_an_idle_thread_keeps_nothing_alive() -> None:
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)
    async with train_thread() as thread:
        await thread.run(lambda held=held: None)  # type: ignore[misc]
        del held
        async with asyncio.timeout(10):
            while gone() is not None:  # noqa: ASYNC110 (the thread forgets its job right after it told the result)
                await asyncio.sleep(0)


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="its OpenMP library can't give a pool up")
@pytest.mark.skipif(torch.get_num_threads() < 2, reason="with one thread there are no pools")
async def test_who_hands_work_over_keeps_no_pool_of_openmp_threads() -> None:
    """Two pools on as many cores as one has threads make each small operator wait for sleepers."""
    big = torch.ones(1 << 20)
    give_up_pool()
    before = native_threads()
    big.sum()
    assert native_threads() > before
    async with train_thread() as thread:
        await thread.run(lambda: None)
        assert native_threads() == before + 1  # the train thread itself, which ran nothing parallel


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))
