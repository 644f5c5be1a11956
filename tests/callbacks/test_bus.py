"""What the bus promises: nobody delays another, news merges, nothing else is lost, failures have names."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.bus import Bus
from streamtrain.callbacks.mailbox import coalesce
from streamtrain.errors import ConfigError, UserCodeError
from streamtrain.events import (
    BatchBegin,
    BatchEnd,
    EpochEnd,
    Event,
    ExceptionRaised,
    Log,
    TrainBegin,
    TrainEnd,
    ValidationEnd,
    Verdict,
)


class Recorder:
    """An async observer that notes what it was told."""

    def __init__(self) -> None:
        self.seen: list[Event] = []

    async def on_batch_begin(self, event: BatchBegin) -> None:
        self.seen.append(event)

    async def on_batch_end(self, event: BatchEnd) -> None:
        self.seen.append(event)

    async def on_epoch_end(self, event: EpochEnd) -> None:
        self.seen.append(event)

    async def on_log(self, event: Log) -> None:
        self.seen.append(event)

    async def on_train_end(self, event: TrainEnd) -> None:
        self.seen.append(event)


class Gated(Recorder):
    """An async observer that reads on only while its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()

    async def on_log(self, event: Log) -> None:
        self.entered.set()
        await self.gate.wait()
        self.seen.append(event)


class BlockingRecorder:
    """A `def` observer that blocks its thread while its gate is closed."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self.threads: set[threading.Thread] = set()
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.handled = threading.Semaphore(0)

    def on_log(self, event: Log) -> None:
        self.threads.add(threading.current_thread())
        self.entered.set()
        self.gate.wait()
        self.seen.append(event)
        self.handled.release()


def batch_end(step: int, loss: float = 1.0) -> BatchEnd:
    return BatchEnd(step=step, first_step=step, loss_sum=loss, batch_samples=4, data_wait=0.25, lr=step / 100)


def callback_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("streamtrain-")]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 100), st.integers(0, 64)), min_size=1, max_size=20))
def test_merging_keeps_sums_and_ends(parts: list[tuple[int, int, int]]) -> None:
    step, events = 0, []
    for count, loss, samples in parts:
        first, step = step + 1, step + count
        events.append(
            BatchEnd(
                step=step, first_step=first, count=count, loss_sum=loss, batch_samples=samples, lr=step, data_wait=loss
            )
        )
    merged = events[0]
    for event in events[1:]:
        merged = coalesce(merged, event)  # type: ignore[assignment]
    assert (merged.first_step, merged.step, merged.lr) == (1, step, step)
    assert (merged.count, merged.loss_sum) == (sum(c for c, _, _ in parts), sum(x for _, x, _ in parts))
    assert (merged.batch_samples, merged.data_wait) == (sum(n for _, _, n in parts), sum(x for _, x, _ in parts))


@given(st.lists(st.sampled_from(["begin", "end", "log"]), max_size=60))
def test_a_lagging_callback_misses_no_batch_and_keeps_the_order(kinds: list[str]) -> None:
    async def scenario() -> None:
        callback = Gated()
        callback.gate.set()
        told: list[tuple[str, int]] = []
        async with Bus([callback]) as bus:
            for step, kind in enumerate(kinds, 1):
                told.append((kind, step))
                if kind == "begin":
                    bus.news("on_batch_begin", BatchBegin(step=step, first_step=step))
                elif kind == "end":
                    bus.news("on_batch_end", batch_end(step))
                else:
                    await bus.emit("on_log", Log(step=step))
        logs = [event.step for event in callback.seen if isinstance(event, Log)]
        assert logs == [step for kind, step in told if kind == "log"]
        assert sum(e.count for e in callback.seen if isinstance(e, BatchEnd)) == kinds.count("end")
        assert sum(e.count for e in callback.seen if isinstance(e, BatchBegin)) == kinds.count("begin")
        for before, after in zip(callback.seen, callback.seen[1:], strict=False):
            if isinstance(before, Log) or isinstance(after, Log):  # news never crosses what is no news
                first = after.first_step if isinstance(after, BatchBegin | BatchEnd) else after.step
                assert before.step < first

    asyncio.run(scenario())


async def test_news_of_a_lagging_callback_merges_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    callback = Gated()
    async with Bus([callback]) as bus:
        await bus.emit("on_log", Log(step=0))
        await callback.entered.wait()
        for step in range(1, 1001):
            bus.news("on_batch_end", batch_end(step))
        callback.gate.set()
    _, merged = callback.seen
    assert isinstance(merged, BatchEnd)
    assert (merged.first_step, merged.step, merged.count, merged.loss) == (1, 1000, 1000, 0.25)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "Gated" in caplog.text
    assert bus.statistics().mailboxes[0].coalesced == 999


async def test_a_callback_that_blocks_its_thread_delays_no_other() -> None:
    slow, quick = BlockingRecorder(), BlockingRecorder()
    quick.gate.set()
    async with Bus([slow, quick]) as bus:
        for step in range(3):
            await bus.emit("on_log", Log(step=step))
        for _ in range(3):
            await asyncio.to_thread(quick.handled.acquire)
        assert slow.seen == []
        slow.gate.set()
    assert len(slow.seen) == 3
    assert slow.threads.isdisjoint(quick.threads)
    assert len(slow.threads) == len(quick.threads) == 1


async def test_a_full_mailbox_makes_the_wheel_wait_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    callback = Gated()
    async with Bus([callback], mailbox=2) as bus:
        await bus.emit("on_log", Log(step=0))
        await callback.entered.wait()
        await bus.emit("on_log", Log(step=1))
        await bus.emit("on_log", Log(step=2))
        third = asyncio.create_task(bus.emit("on_log", Log(step=3)))
        await asyncio.sleep(0)
        assert not third.done()
        callback.gate.set()
        await third
        await bus.drain()
        assert [event.step for event in callback.seen] == [0, 1, 2, 3]
        assert bus.statistics().waited > 0
    assert caplog.text.count("training waits for it") == 1


async def test_events_for_which_there_is_room_are_told_without_a_wait() -> None:
    callback = Gated()
    async with Bus([callback, Recorder()], mailbox=3) as bus:
        for room in (3, 2, 1, 0):
            assert [bus.has_room(events) for events in (room, room + 1)] == [True, False]
            telling = bus.emit("on_log", Log(step=room, values={}))
            if room:
                with pytest.raises(StopIteration):
                    telling.send(None)
            else:
                telling.send(None)  # it waits
                telling.close()
        callback.gate.set()
        await bus.drain()
        assert bus.has_room(3)


async def test_a_cancelled_emit_has_still_told_everybody() -> None:
    callback = Gated()
    async with Bus([callback], mailbox=1) as bus:
        await bus.emit("on_log", Log(step=0))
        await callback.entered.wait()
        await bus.emit("on_log", Log(step=1))
        waiting = asyncio.create_task(bus.emit("on_log", Log(step=2)))
        await asyncio.sleep(0)
        waiting.cancel()
        callback.gate.set()
    assert [event.step for event in callback.seen] == [0, 1, 2]


class Decider(Callback):
    decides = True

    def __init__(self, verdict: Any) -> None:
        self.verdict = verdict

    def on_validation_end(self, event: ValidationEnd) -> Any:
        return self.verdict


class AsyncDecider(Decider):
    async def on_validation_end(self, event: ValidationEnd) -> Any:
        return self.verdict


async def test_verdicts_come_in_the_order_of_the_callbacks() -> None:
    first, third = Verdict(stop=True), Verdict(save="best")
    async with Bus([Decider(first), Recorder(), AsyncDecider(None), AsyncDecider(third)]) as bus:
        assert await bus.ask("on_validation_end", ValidationEnd()) == [first, third]


async def test_an_answer_that_is_no_verdict_is_an_error_with_names() -> None:
    with pytest.raises(UserCodeError, match="callback Decider: on_validation_end raised TypeError: returned str"):
        async with Bus([Decider("stop")]) as bus:
            await bus.ask("on_validation_end", ValidationEnd())


async def test_a_verdict_that_nobody_asked_for_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    decider = Decider(Verdict(stop=True))
    decider.decides = False
    async with Bus([decider]) as bus:
        assert await bus.ask("on_validation_end", ValidationEnd()) == []
    assert "decides = True" in caplog.text


class Faulty(Recorder):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.told: list[str] = []

    def on_train_begin(self, event: TrainBegin) -> None:
        raise self.error

    def on_exception(self, event: ExceptionRaised) -> None:
        self.told.append("on_exception")


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3), StopIteration()], ids=repr)
async def test_a_raising_hook_is_one_error_naming_callback_and_hook(error: BaseException) -> None:
    faulty, other = Faulty(error), Recorder()
    async with Bus([faulty, other]) as bus:
        await bus.emit("on_train_begin", TrainBegin())
        await bus.drain()
        with pytest.raises(UserCodeError, match="callback Faulty: on_train_begin raised ") as caught:
            bus.check()
        await bus.emit("on_log", Log())
        await bus.emit("on_exception", ExceptionRaised(error=caught.value))
        await bus.emit("on_train_end", TrainEnd())
    assert caught.value.__cause__ is not None
    assert faulty.told == ["on_exception"]
    assert [type(event) for event in faulty.seen] == [TrainEnd]
    assert [type(event) for event in other.seen] == [Log, TrainEnd]


async def test_our_own_errors_pass_unchanged() -> None:
    error = ConfigError("no such monitor")
    async with Bus([Faulty(error)]) as bus:
        await bus.emit("on_train_begin", TrainBegin())
        await bus.drain()
        with pytest.raises(ConfigError) as caught:
            bus.check()
    assert caught.value is error


async def test_a_hook_that_raises_cancelled_by_itself_fails_like_any_other() -> None:
    class Odd:
        async def on_log(self, event: Log) -> None:
            raise asyncio.CancelledError

    async with Bus([Odd()]) as bus:
        await bus.emit("on_log", Log())
        await bus.drain()
        with pytest.raises(UserCodeError, match="Odd: on_log"):
            bus.check()


async def test_def_hooks_see_the_callers_context() -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")
    seen: list[str] = []

    class Reader:
        def on_log(self, event: Log) -> None:
            seen.append(tenant.get())

        async def on_epoch_end(self, event: EpochEnd) -> None:
            seen.append(tenant.get())

    tenant.set("blue")
    async with Bus([Reader()]) as bus:
        await bus.emit("on_log", Log())
        await bus.emit("on_epoch_end", EpochEnd())
    assert seen == ["blue", "blue"]


async def test_threads_start_with_the_first_def_hook_and_are_joined_at_the_end() -> None:
    callback = BlockingRecorder()
    callback.gate.set()
    async with Bus([callback, Recorder()]) as bus:
        assert callback_threads() == []
        await bus.emit("on_log", Log())
        await bus.drain()
        assert len(callback_threads()) == 1
    assert callback_threads() == []


@pytest.mark.parametrize("leave", ["raise", "cancel"])
async def test_hooks_that_wait_for_ever_get_only_the_grace(leave: str) -> None:
    callback = Gated()

    async def body() -> None:
        async with Bus([callback], grace=0.01) as bus:
            await bus.emit("on_log", Log())
            await callback.entered.wait()
            if leave == "raise":
                raise RuntimeError("the wheel broke")
            asyncio.current_task().cancel()  # type: ignore[union-attr]

    with pytest.raises((RuntimeError, asyncio.CancelledError)):
        await asyncio.create_task(body())
    assert callback.seen == []
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("streamtrain-")]


async def test_a_thread_that_hangs_is_left_behind_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    callback = BlockingRecorder()

    async def body() -> None:
        async with Bus([callback], grace=0.01) as bus:
            await bus.emit("on_log", Log())
            await asyncio.to_thread(callback.entered.wait)
            raise RuntimeError("the wheel broke")

    with pytest.raises(RuntimeError, match="broke"):
        await body()
    assert "left behind" in caplog.text
    callback.gate.set()


async def test_so_is_one_whose_hook_was_cut_off_and_goes_on_in_it(caplog: pytest.LogCaptureFixture) -> None:
    """As where `asyncio.run` cancels every task at its end: nothing waits for the callback, and its thread hangs."""
    callback = BlockingRecorder()

    async def body() -> None:
        async with Bus([callback], grace=0.01) as bus:
            await bus.emit("on_log", Log())
            await asyncio.to_thread(callback.entered.wait)
            next(task for task in asyncio.all_tasks() if task.get_name().startswith("streamtrain-callback-")).cancel()
            raise RuntimeError("the wheel broke")

    with pytest.raises(RuntimeError, match="broke"):
        await body()
    assert "left behind" in caplog.text
    callback.gate.set()


async def test_leaving_well_delivers_all_that_was_told() -> None:
    callback = Recorder()
    async with Bus([callback]) as bus:
        for step in range(50):
            await bus.emit("on_log", Log(step=step))
    assert [event.step for event in callback.seen] == list(range(50))


async def test_two_callbacks_of_one_class_have_two_names() -> None:
    bus = Bus([Recorder(), Recorder(), Gated()])
    assert [box.name for box in bus.statistics().mailboxes] == ["Recorder[0]", "Recorder[1]", "Gated"]


def test_hooks_that_nobody_defines_are_not_wanted() -> None:
    assert Bus([BlockingRecorder(), Callback(), object()]).wants == {"on_log"}


async def test_any_callable_attribute_is_a_hook() -> None:
    class Lambda:
        on_log: Callable[[Log], Any]

    seen: list[Event] = []

    async def note(event: Log) -> None:
        seen.append(event)

    callback = Lambda()
    callback.on_log = lambda event: note(event)  # a def that hands back an awaitable
    async with Bus([callback]) as bus:
        await bus.emit("on_log", Log(step=7))
    assert [event.step for event in seen] == [7]


async def test_a_hook_that_is_cancelled_from_outside_is_said_to_be_cut_off_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Cut(Recorder):
        async def on_log(self, event: Log) -> None:
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(0)
            self.seen.append(event)

    cut = Cut()
    async with Bus([cut]) as bus:
        for _ in range(2):
            await bus.emit("on_log", Log())
        await bus.emit("on_epoch_end", EpochEnd())
    assert [type(event) for event in cut.seen] == [EpochEnd]
    assert caplog.messages == ["callback Cut: on_log was cancelled before it had ended"]


async def test_a_cancellation_that_is_meant_for_all_tasks_loses_nothing_that_is_told_later() -> None:
    """As by `asyncio.run` at its end, where a fit of another task saves what it has made, and tells it."""
    recorder, blocking = Recorder(), BlockingRecorder()
    blocking.gate.set()
    async with Bus([recorder, blocking]) as bus:
        await bus.emit("on_log", Log(step=1))
        await bus.drain()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        await bus.emit("on_log", Log(step=2))
    assert [event.step for event in recorder.seen] == [1, 2]
    assert [event.step for event in blocking.seen] == [1, 2]


async def test_what_a_mark_takes_stands_between_what_was_told_before_and_after() -> None:
    gated = Gated()

    async def taken(callback: object) -> list[int]:
        assert callback is gated
        return [event.step for event in gated.seen]

    async with Bus([gated, Recorder()]) as bus:
        await bus.emit("on_log", Log(step=1))
        await gated.entered.wait()
        bus.news("on_batch_end", batch_end(2))
        marks = bus.mark(lambda callback: callback is gated, taken)
        bus.news("on_batch_end", batch_end(3))
        gated.gate.set()
        assert await marks["Gated"] == [1, 2]
    assert [event.step for event in gated.seen] == [1, 2, 3]


async def test_a_callback_that_has_taken_in_all_that_it_was_told_gets_no_mark() -> None:
    async with Bus([Recorder()]) as bus:
        await bus.emit("on_log", Log(step=1))
        await bus.drain()
        assert not bus.mark(lambda callback: True, lambda callback: asyncio.sleep(0))


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_mark_outlives_a_hook_that_failed_and_is_empty_of_a_callback_that_is_left_behind(hurried: bool) -> None:
    class Failing(Gated):
        async def on_log(self, event: Log) -> None:
            await super().on_log(event)
            raise ValueError("no")

    async def taken(callback: object) -> str:
        return "taken"

    failing = Failing()
    async with Bus([failing]) as bus:
        await bus.emit("on_log", Log(step=1))
        await failing.entered.wait()
        mark = bus.mark(lambda callback: True, taken)["Failing"]
        if hurried:
            bus.hurry(0)
        else:
            failing.gate.set()
        assert await mark == (None if hurried else "taken")
