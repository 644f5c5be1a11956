"""What lies between a pass and the train thread: a burst's worth ahead, never more, and nothing lost at its end."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.budget import BudgetHeld
from streamtrain.data.iterable import from_iterable
from streamtrain.errors import DataError, UserCodeError
from streamtrain.supply import Pulled, Pumped, Supply, supply
from tests.engine import Samples


async def here(fn: Callable[[], Batch | None]) -> Batch | None:
    """In the place of the train thread."""
    return fn()


async def everything(batches: Supply) -> list[int]:
    """The positions of all batches."""
    taken: list[int] = []
    while await batches.wait():
        while (batch := batches.take()) is not None:
            taken.append(batch.cursor.position)
    return taken


async def idle() -> None:
    """Let every task run that can."""
    for _ in range(50):
        await asyncio.sleep(0)


def sources() -> list[Any]:
    return [Samples(40), from_iterable([(torch.zeros(8, 4), torch.zeros(8, 1))] * 5)]


@pytest.mark.parametrize("number", [0, 1], ids=["pumped", "pulled"])
async def test_all_batches_come_in_order_and_then_it_has_ended(number: int) -> None:
    batches = supply(sources()[number], limit=None, runner=here)
    assert not batches.finished_nowait()
    assert len(await everything(batches)) == 5
    assert batches.ended
    assert batches.finished_nowait()
    assert await batches.finished()
    await batches.aclose()


@pytest.mark.parametrize("number", [0, 1], ids=["pumped", "pulled"])
@pytest.mark.parametrize("limit", [0, 3, 9])
async def test_a_limit_ends_the_pass_early(number: int, limit: int) -> None:
    batches = supply(sources()[number], limit=limit, runner=here)
    assert len(await everything(batches)) == min(limit, 5)
    await batches.aclose()


@pytest.mark.parametrize("number", [0, 1], ids=["pumped", "pulled"])
async def test_to_look_whether_it_has_ended_takes_nothing(number: int) -> None:
    batches = supply(sources()[number], limit=None, runner=here)
    for _ in range(5):
        assert not await batches.finished()
        assert batches.take() is not None
    assert await batches.finished()
    await batches.aclose()


async def test_it_gathers_one_less_than_two_bursts_take_and_no_more() -> None:
    stream = Samples(800)
    batches = supply(stream, limit=None, runner=here)
    assert isinstance(batches, Pumped)
    await idle()
    assert len(batches._ready) == 1
    batches.burst(10)
    await idle()
    assert len(batches._ready) == 19
    for _ in range(10):
        batches.take()
    batches.burst(10)
    await idle()
    assert len(batches._ready) == 19
    for _ in range(19):
        batches.take()
    await idle()
    assert len(batches._ready) == 19
    await batches.aclose()


async def test_a_failure_comes_after_the_batches_before_it() -> None:
    stream = Samples(80)
    stream.failures[24] = DataError("chunk 3 is damaged")
    batches = supply(stream, limit=None, runner=here)
    for position in (8, 16, 24):
        await idle()
        assert [batch.cursor.position for batch in iter(batches.take, None)] == [position]
    await idle()
    assert not batches.finished_nowait()
    with pytest.raises(DataError, match="chunk 3"):
        await batches.wait()
    await batches.aclose()


class Tight:
    """A pass that has memory for `room` batches, and asks for it back."""

    def __init__(self, room: int, count: int = 6) -> None:
        self.room, self.left, self.refused = room, count, 0
        self.given: list[weakref.ref[Batch]] = []

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    def next_nowait(self) -> Batch | None:
        return None

    async def __anext__(self) -> Batch:
        if not self.left:
            raise StopAsyncIteration
        alive = sum(ref() is not None for ref in self.given)
        if alive >= self.room:
            self.refused += 1
            raise BudgetHeld(f"{alive} batches are alive")
        self.left -= 1
        batch = _Held(torch.zeros(8, 1), cursor=Cursor(0, self.left))
        self.given.append(weakref.ref(batch))
        return batch

    async def aclose(self) -> None:
        pass


class _Held(Batch):
    """One that can be watched."""


async def test_a_pass_that_failed_has_not_ended() -> None:
    """Else what was taken of a group would make an update of its own, which the next life would not make."""
    stream = Samples(40)
    stream.failures[16] = DataError("no")
    batches = supply(stream, limit=None, runner=here)
    for _ in range(2):
        await idle()
        assert batches.take() is not None
    await idle()
    assert batches.take() is None
    assert (batches.ready, batches.ended) == (True, False)
    with pytest.raises(DataError):
        await batches.wait()
    await batches.aclose()


async def test_memory_that_its_own_batches_hold_is_waited_for() -> None:
    source = Tight(room=2)
    batches = Pumped(source, None)
    batches.burst(8)
    count = 0
    while await batches.wait():
        while (batch := batches.take()) is not None:
            count += 1
            del batch
        batches.burst(None)
    assert count == 6
    assert source.refused > 0
    await batches.aclose()


async def test_memory_that_others_hold_is_an_error() -> None:
    source = Tight(room=1)
    batches = Pumped(source, None)
    await batches.wait()
    kept = batches.take()
    batches.burst(None)
    with pytest.raises(BudgetHeld):
        await batches.wait()
    await batches.aclose()
    assert kept is not None


async def test_closing_ends_a_pass_that_hangs() -> None:
    stream = Samples(40)
    stream.gates[8] = asyncio.Event()
    batches = supply(stream, limit=None, runner=here)
    await batches.wait()
    await batches.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_time_in_a_synchronous_source_counts_as_waiting() -> None:
    batches = supply(sources()[1], limit=None, runner=here)
    assert isinstance(batches, Pulled)
    await everything(batches)
    assert batches.waited > 0
    await batches.aclose()


async def test_a_close_that_is_cancelled_again_and_again_closes_all_the_same() -> None:
    """The threads of a pass would be left behind: found by one of a thousand cancellations."""
    gate, closed = asyncio.Event(), asyncio.Event()
    stream = Samples(40)

    async def close(self: object) -> None:
        await gate.wait()
        closed.set()

    batches = supply(stream, limit=None, runner=here)
    batches._pass.aclose = close.__get__(batches)  # type: ignore[attr-defined]
    closing = asyncio.create_task(batches.aclose())
    for _ in range(4):
        await asyncio.sleep(0)
        closing.cancel()
    await idle()
    assert not closing.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert closed.is_set()


class Interrupted:
    """A source that awaits something which is cancelled."""

    async def __aiter__(self) -> AsyncIterator[tuple[torch.Tensor, torch.Tensor]]:
        yield torch.zeros(8, 4), torch.zeros(8, 1)
        inner = asyncio.ensure_future(asyncio.Event().wait())
        inner.cancel()
        await inner
        raise AssertionError("it was cancelled")


async def test_a_source_that_is_cancelled_from_within_has_failed_and_not_ended() -> None:
    batches = supply(from_iterable(Interrupted()), limit=None, runner=here)
    assert await batches.wait()
    assert batches.take() is not None
    with pytest.raises(UserCodeError, match="cancelled from within"):
        await batches.wait()
    assert not batches.ended
    await batches.aclose()


async def test_a_pass_that_is_cancelled_from_outside_has_not_ended() -> None:
    """As by `asyncio.run`, which cancels every task at its end: a group cut short by it is no last group."""
    stream = Samples(40)
    stream.gates[16] = asyncio.Event()
    batches = supply(stream, limit=None, runner=here)
    batches.burst(2)
    await idle()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await idle()
    assert (batches.take() is not None, batches.take() is not None, batches.take()) == (True, True, None)
    assert not batches.ended
    with pytest.raises(asyncio.CancelledError):
        await batches.wait()
    await batches.aclose()
