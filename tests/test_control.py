"""The one door: knocking never blocks, from anywhere; the first stop wins, the last rate wins, nothing is lost."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from streamtrain.control import Control, Save, Stop


async def test_what_was_asked_for_is_taken_once() -> None:
    control = Control()
    control.bind()
    assert not control.pending
    saves = [Save(), Save(Path("x"))]
    for save in saves:
        control.save(save)
    control.set_lr(1)
    control.set_lr(0.5)
    assert control.pending
    taken = control.take()
    assert (taken.saves, taken.lr, taken.stop) == (saves, 0.5, None)
    assert not control.pending
    again = control.take()
    assert (again.saves, again.lr) == ([], None)


async def test_the_first_stop_wins_and_stays() -> None:
    control = Control()
    control.bind()
    control.stop("signal", "SIGTERM")
    control.stop("stopped")
    assert control.take().stop == control.take().stop == control.stopping == Stop("signal", "SIGTERM")


async def test_requests_from_before_the_first_fit_are_its_own() -> None:
    control = Control()
    control.stop()
    control.save()
    control.pause()
    control.bind()
    assert control.pending
    assert control.paused
    taken = control.take()
    assert taken.stop == control.stopping == Stop("stopped")
    assert taken.saves == [Save()]


async def test_a_stop_between_two_fits_is_the_next_ones_once_that_is_called_for() -> None:
    control = Control()
    control.bind()
    control.stop("stopped", "in time")
    control.unbind()
    control.stop("stopped", "too late")
    control.pause()
    control.bind()
    assert (control.pending, control.paused) == (False, False)
    assert control.take().stop is None
    control.unbind()
    control.expect()
    control.stop("stopped", "early")
    control.bind()
    assert control.take().stop == Stop("stopped", "early")


async def test_a_save_that_comes_too_late_is_no_other_fits_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    control = Control()
    control.bind()
    control.save()
    control.unbind()
    assert "asked for as the fit ended, too late to be made: 1" in caplog.text
    assert control.late
    control.save()
    control.save(Save(Path("x")))
    control.expect()
    control.expect()
    assert caplog.text.count("asked for after a fit had ended, and are not made: 2") == 1
    control.bind()
    assert not control.pending
    assert control.take().saves == []


async def test_pausing_and_resuming_are_seen_at_once() -> None:
    control = Control()
    control.bind()
    control.pause()
    assert control.paused
    assert control.pending
    await control.knocked()
    control.take()
    control.resume()
    assert not control.paused
    await control.knocked()


async def test_a_knock_from_another_thread_wakes_the_wheel() -> None:
    control = Control()
    control.bind()
    waiting = asyncio.create_task(control.knocked())
    await asyncio.sleep(0)
    assert not waiting.done()
    await asyncio.to_thread(control.stop, "signal")
    await waiting
    assert control.take().stop == Stop("signal")
    again = asyncio.create_task(control.knocked())
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()


async def test_a_knock_before_the_waiting_is_not_lost() -> None:
    control = Control()
    control.bind()
    control.save()
    await control.knocked()
    assert control.take().saves == [Save()]


async def test_no_request_is_lost_between_many_threads() -> None:
    control = Control()
    control.bind()
    taken: list[Save] = []

    def knock(number: int) -> None:
        for i in range(200):
            control.save(Save(Path(f"{number}-{i}")))

    threads = [threading.Thread(target=knock, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while len(taken) < 800:
        await control.knocked()
        taken += control.take().saves
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert len({save.path for save in taken}) == 800
    assert not control.pending


def test_knocking_after_the_loop_has_gone_is_no_error() -> None:
    control = Control()

    async def bind() -> None:
        control.bind()

    asyncio.run(bind())
    control.stop()
    control.save()
    assert control.pending
