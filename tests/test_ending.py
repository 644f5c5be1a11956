"""What is brought to its end: a cancellation waits for it, natively and by scopes, once and again."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from streamtrain.ending import to_its_end


class Work:
    """Is over once the gate is open."""

    def __init__(self) -> None:
        self.entered, self.gate, self.over = asyncio.Event(), asyncio.Event(), False

    async def __call__(self) -> int:
        self.entered.set()
        await self.gate.wait()
        self.over = True
        return 3


async def test_what_it_comes_to_is_given_back_and_what_it_raises_is_raised() -> None:
    work = Work()
    work.gate.set()
    assert await to_its_end(work(), "work") == 3

    async def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await to_its_end(fails(), "work")


async def test_whoever_is_cancelled_again_and_again_is_cancelled_once_it_is_over() -> None:
    work = Work()
    waiting = asyncio.create_task(to_its_end(work(), "work"))
    await work.entered.wait()
    for _ in range(3):
        waiting.cancel()
        await asyncio.sleep(0)
    assert not waiting.done()
    work.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.over


async def test_a_scope_that_is_cancelled_is_left_once_it_is_over() -> None:
    work = Work()
    with anyio.CancelScope() as scope:
        scope.cancel()
        asyncio.get_running_loop().call_later(0.01, work.gate.set)  # some turns of the loop
        await to_its_end(work(), "work")
    assert work.over
