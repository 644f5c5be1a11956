"""What stands where: every thread with its calls, and every task below the task that waits for it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from streamtrain import stacks


def test_a_thread_is_shown_with_the_calls_that_it_is_in() -> None:
    begun, end = threading.Event(), threading.Event()

    def hang_here() -> None:
        begun.set()
        end.wait(30)

    thread = threading.Thread(target=hang_here, name="streamtrain-hangs")
    thread.start()
    begun.wait(30)
    shown = stacks.everything()
    end.set()
    thread.join()
    assert "\nthread streamtrain-hangs:\n" in shown
    assert f"{__file__}:" in shown.split("thread streamtrain-hangs:")[1]
    assert " in hang_here" in shown
    assert shown.splitlines()[0] == "thread MainThread:"
    assert stacks.of_thread(thread) == ["thread streamtrain-hangs:"]  # it has ended: no call is left


async def test_tasks_are_drawn_below_those_that_wait_for_them() -> None:
    gate = asyncio.Event()

    async def wait_at_gate() -> None:
        await gate.wait()

    async def parent() -> None:
        awaited = asyncio.create_task(wait_at_gate(), name="awaited")
        shielded = asyncio.create_task(wait_at_gate(), name="shielded")
        gathered = asyncio.create_task(wait_at_gate(), name="gathered")
        shield = asyncio.create_task(through(asyncio.shield(shielded)), name="shield")
        both = asyncio.create_task(through(asyncio.gather(gathered)), name="gather")
        await asyncio.wait([awaited, shield, both])

    async def through(future: asyncio.Future[Any]) -> None:
        await future

    task = asyncio.create_task(parent(), name="parent")
    for _ in range(5):  # each begins to wait in a turn of its own
        await asyncio.sleep(0)
    lines = stacks.of_tasks(asyncio.get_running_loop())
    gate.set()
    await task
    names = [line[: -len(line.lstrip())] + line.split()[1] for line in lines if line.lstrip().startswith("task ")]
    assert lines[0] == "7 tasks:"
    assert {*names} >= {"parent:", "  awaited:", "  gather:", "    gathered:", "  shield:", "    shielded:"}
    assert any(line.startswith("    ") and line.endswith(" in wait_at_gate") for line in lines)


async def test_two_tasks_that_wait_for_each_other_are_shown_once() -> None:
    tasks: list[asyncio.Task[None]] = []

    async def wait_for_other(mine: int) -> None:
        await asyncio.wait([tasks[1 - mine]])

    tasks += [asyncio.create_task(wait_for_other(n), name=f"knot-{n}") for n in range(2)]
    await asyncio.sleep(0)
    shown = "\n".join(stacks.of_tasks(asyncio.get_running_loop()))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [shown.count(f"task knot-{n}:") for n in range(2)] == [1, 1]
