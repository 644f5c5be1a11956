"""What the queue promises: order, bounds in items and bytes, and an end or a failure that nobody misses."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.data.queue import ReadyQueue


def queue(max_items: int | None = None, max_bytes: int = 100) -> ReadyQueue[str]:
    return ReadyQueue(max_items=max_items, max_bytes=max_bytes)


@given(st.lists(st.none() | st.integers(0, 50), max_size=50))
def test_items_leave_in_the_order_they_came_and_sizes_add_up(steps: list[int | None]) -> None:
    ready, model, put = ReadyQueue[int](max_items=None, max_bytes=10**6), list[tuple[int, int]](), 0
    for number, size in enumerate(steps):
        if size is None:
            assert ready.get_nowait() == (model.pop(0)[0] if model else None)
        else:
            ready.put(number, size)
            model.append((number, size))
            put += 1
        now = ready.statistics()
        assert (now.items, now.bytes, now.put) == (len(model), sum(s for _, s in model), put)
        assert len(ready) == len(model)


def test_room_ends_with_items_or_with_bytes() -> None:
    ready = queue(max_items=2)
    ready.put("a", 60)
    assert ready.has_room(1, 40)
    assert not ready.has_room(1, 41)
    assert not ready.has_room(2, 1)
    ready.put("b", 1)
    assert not ready.has_room()
    assert ready.get_nowait() == "a"
    assert ready.has_room(1, 99)


def test_an_empty_queue_takes_an_item_of_any_size() -> None:
    assert queue(max_items=1).has_room(1, 10**9)
    assert queue().has_room(5, 10**9)
    assert not queue(max_items=1).has_room(2, 0)


def test_no_bound_of_items_leaves_that_of_bytes() -> None:
    ready = queue()
    for _ in range(100):
        assert ready.has_room(1, 1)
        ready.put("x", 1)
    assert not ready.has_room(1, 1)


def test_the_end_comes_after_the_items_and_stays() -> None:
    ready = queue()
    ready.put("a", 1)
    ready.end()
    assert ready.get_nowait() == "a"
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            ready.get_nowait()


def test_a_failure_comes_after_the_items_before_the_end_and_the_first_one_counts() -> None:
    ready = queue()
    ready.put("a", 1)
    ready.fail(KeyError("first"))
    ready.fail(ValueError("second"))
    ready.end()
    assert ready.get_nowait() == "a"
    for _ in range(2):
        with pytest.raises(KeyError, match="first"):
            ready.get_nowait()


async def test_a_waiting_consumer_wakes_with_each_change() -> None:
    ready = queue()
    changes = [lambda: ready.put("a", 1), ready.wake, lambda: ready.fail(KeyError()), ready.end]
    for change in changes:
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        change()
        assert await waiting
    assert ready.statistics().empty_waits == len(changes)
    assert ready.statistics().wait_seconds > 0


async def test_a_wait_ends_with_its_timeout_and_can_be_repeated() -> None:
    ready = queue()
    for _ in range(2):
        assert not await ready.wait(0.001)
    assert ready.statistics().wait_seconds >= 0.002


async def test_a_cancelled_wait_leaves_the_queue_as_it_was() -> None:
    ready = queue()
    waiting = asyncio.ensure_future(ready.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    ready.put("a", 1)
    assert ready.get_nowait() == "a"
    assert not await ready.wait(0.001)


async def test_producer_and_consumer_meet_within_the_bounds() -> None:
    ready, room, seen, most = queue(max_items=3), asyncio.Event(), list[str](), 0

    async def produce() -> None:
        nonlocal most
        for number in range(100):
            while not ready.has_room(1, 10):
                room.clear()
                await room.wait()
            ready.put(str(number), 10)
            most = max(most, len(ready))
        ready.end()

    producer = asyncio.ensure_future(produce())
    while True:
        try:
            item = ready.get_nowait()
        except StopAsyncIteration:
            break
        room.set()
        if item is None:
            await ready.wait()
        else:
            seen.append(item)
    await producer
    assert seen == [str(number) for number in range(100)]
    assert most <= 3


async def test_a_wait_that_is_cancelled_as_something_comes_in_is_cancelled() -> None:
    ready = queue()
    waiting = asyncio.create_task(ready.wait(timeout=60))
    await asyncio.sleep(0)
    ready.put("a", 1)
    await asyncio.sleep(0)  # the waiter is done, its task not yet awake
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
