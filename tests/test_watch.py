"""What a signal does: before training it ends the command, then it stops the trainer, and a second one ends at once."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamtrain.control import Control, Stop
from streamtrain.signals import SAVING, SHOWING, SIGNALS, Interrupted
from streamtrain.watch import Watch


def trainer(**more: Any) -> Any:
    """As much of a trainer as a watch knows."""
    return SimpleNamespace(control=Control(), **more)


_TOLD: list[str] = []


def told(capfd: pytest.CaptureFixture[str]) -> str:
    """All that stderr was given in this test."""
    _TOLD.append(capfd.readouterr().err)
    return "".join(_TOLD)


@pytest.fixture(autouse=True)
def _nothing_told() -> None:
    _TOLD.clear()


def wait_for(condition: Callable[[], bool]) -> None:
    """Until another thread has come so far."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_training_a_signal_ends_the_command(signum: signal.Signals) -> None:
    with pytest.raises(Interrupted) as caught, Watch(grace=60):
        signal.raise_signal(signum)
    assert caught.value.signum == signum


def cut_off() -> None:
    """As numpy, where its import is cut off and tried again."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except Interrupted:
        raise ImportError("cannot load module more than once per process") from None


def test_what_a_signal_before_training_was_made_into_ends_the_command_as_that_signal() -> None:
    with pytest.raises(Interrupted) as caught, Watch(grace=60):
        cut_off()
    assert caught.value.signum == signal.SIGTERM
    assert isinstance(caught.value.__cause__, ImportError)


def test_an_error_after_a_signal_in_training_is_that_error() -> None:
    def command() -> None:
        with Watch(grace=60) as watch:
            watch.begins(trainer())
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        command()


def test_what_is_being_loaded_is_loaded_to_its_end_before_a_signal_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import signal\nsignal.raise_signal(signal.SIGTERM)\nwhole = True\n"
    (tmp_path / "loaded_first.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    watch = Watch(grace=60)
    with pytest.raises(Interrupted), watch:
        watch.load("loaded_first", "loaded_never")
    assert sys.modules.pop("loaded_first").whole


def test_a_signal_that_something_kept_to_itself_ends_a_command_with_nothing_to_save() -> None:
    done: list[int] = []

    async def work() -> None:
        done.append(1)

    def command() -> None:
        with Watch(grace=60) as watch:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            asyncio.run(watch.cancelling(work()))

    with pytest.raises(Interrupted):
        command()
    assert not done


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_training_the_first_signal_stops_and_names_itself(signum: signal.Signals, code: int) -> None:
    one = trainer()
    with Watch(grace=60) as watch:
        watch.begins(one)
        signal.raise_signal(signum)
    assert one.control.stopping == Stop("signal", signum.name)
    assert watch.exit_code("signal") == code


def test_a_run_that_was_over_anyway_ends_with_0() -> None:
    with Watch(grace=60) as watch:
        watch.begins(trainer())
        signal.raise_signal(signal.SIGTERM)
    assert watch.exit_code("completed") == 0


def test_a_signal_that_the_trainer_missed_is_passed_on() -> None:
    one = trainer()
    with Watch(grace=60) as watch:
        watch.begins(trainer())
        signal.raise_signal(signal.SIGTERM)
        watch.begins(one)
    assert one.control.stopping == Stop("signal", "SIGTERM")


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_that_is_sent_twice_is_no_hurry(signum: signal.Signals) -> None:
    with Watch(grace=60) as watch:
        watch.begins(trainer())
        signal.raise_signal(signum)
        signal.raise_signal(signum)
    assert watch.exit_code("signal") == 128 + signum


def test_a_ctrl_c_that_comes_twice_at_once_leaves_time_to_save() -> None:
    with Watch(grace=60) as watch:
        watch.begins(trainer())
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert watch.exit_code("signal") == 130


def test_the_handlers_that_were_there_come_back() -> None:
    numbers = (*SIGNALS, *SAVING, *SHOWING)
    before = [signal.getsignal(number) for number in numbers]
    theirs = socket.socketpair()
    theirs[1].setblocking(False)
    signal.set_wakeup_fd(theirs[1].fileno())
    with Watch(grace=60):
        assert signal.getsignal(signal.SIGQUIT) is not before[-1]
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == theirs[1].fileno()
    for end in theirs:
        end.close()


def test_a_signal_that_saves_does_not_stop(capfd: pytest.CaptureFixture[str]) -> None:
    one = trainer()
    with Watch(grace=60) as watch:
        signal.raise_signal(signal.SIGUSR1)
        wait_for(lambda: "SIGUSR1: there is nothing to save" in told(capfd))
        watch.begins(one)
        signal.raise_signal(signal.SIGUSR2)
        wait_for(lambda: "SIGUSR2: saving, and going on" in told(capfd))
    assert (len(one.control.take().saves), one.control.stopping, watch.signum) == (1, None, 0)


def test_a_signal_that_saves_after_the_fits_end_saves_nothing_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    one = trainer()

    async def fit() -> None:
        one.control.bind()
        one.control.unbind()

    asyncio.run(fit())
    with Watch(grace=60) as watch:
        watch.begins(one)
        signal.raise_signal(signal.SIGUSR1)
        wait_for(lambda: "SIGUSR1: the fit has ended: nothing more is saved" in told(capfd))

    async def again() -> None:
        one.control.bind()
        assert one.control.take().saves == []

    asyncio.run(again())


def test_a_signal_that_asks_where_it_stands_is_answered_and_nothing_else(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with Watch(grace=60) as watch:
        signal.raise_signal(signal.SIGQUIT)
        wait_for(lambda: " in test_a_signal_that_asks" in told(capfd))
    assert watch.signum == 0
    assert "SIGQUIT: where it stands, and goes on\nthread MainThread:\n" in told(capfd)
    assert "thread MainThread:\n" in caplog.text


def test_a_command_with_nothing_to_save_is_cancelled_and_unwinds() -> None:
    unwound = []

    async def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            unwound.append(True)

    with pytest.raises(Interrupted) as caught, Watch(grace=60) as watch:
        asyncio.run(watch.cancelling(work()))
    assert (caught.value.signum, unwound) == (signal.SIGTERM, [True])


def test_a_command_that_is_done_gives_its_result() -> None:
    async def work() -> int:
        return 3

    with Watch(grace=60) as watch:
        assert asyncio.run(watch.cancelling(work())) == 3


def test_what_would_be_lost_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    one = trainer(checkpoint=Path("run/checkpoints/step-000000120"), state=SimpleNamespace(step=134))
    watch = Watch(grace=60)
    with watch:
        watch.begins(one)
        assert watch._stands() == "the last checkpoint stands: step-000000120, 14 steps after it are lost"


WAITS = """
import signal, threading
from pathlib import Path
from types import SimpleNamespace
from streamtrain.control import Control
from streamtrain.watch import Watch
with Watch(grace={grace}) as watch:
    watch.begins(SimpleNamespace(control=Control()))
    {signals}
    threading.Event().wait(60)
"""


@pytest.mark.parametrize(
    ("grace", "signals", "code", "said"),
    [
        (60, ["SIGINT", "SIGINT"], 130, "not saved within 1.5"),
        (60, ["SIGINT", "wait", "SIGINT"], 130, "SIGINT again: leaving at once"),
        (60, ["SIGTERM", "wait", "SIGINT"], 143, "again: leaving at once"),
        (0.01, ["SIGTERM"], 143, "not saved within 0.01 s: leaving"),
    ],
)
def test_a_second_signal_or_lost_patience_ends_the_process(
    grace: float, signals: list[str], code: int, said: str
) -> None:
    lines = {"wait": "threading.Event().wait(0.25)"}
    raised = "\n    ".join(lines.get(name, f"signal.raise_signal(signal.{name})") for name in signals)
    source = WAITS.format(grace=grace, signals=raised)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code
    assert said in done.stderr


def test_a_second_ctrl_c_ends_what_is_slow_to_unwind_before_training() -> None:
    source = """
import signal, threading
from streamtrain.watch import Watch
with Watch(grace=60):
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)
        threading.Event().wait(60)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 130
    assert re.fullmatch(r"\nnot ended within 1\.5\d? s: leaving, the last checkpoint stands\n", done.stderr)


STUCK = """
import ctypes, os, signal, threading
from types import SimpleNamespace
from streamtrain.control import Control
from streamtrain.watch import Watch
with Watch(grace={grace}) as watch:
    watch.begins(SimpleNamespace(control=Control()))
    threading.Thread(target=lambda: [(os.kill(os.getpid(), n), threading.Event().wait(0.5)) for n in {signals}]).start()
    ctypes.CDLL(None).sleep(60)  # the main thread runs no handler meanwhile
"""


@pytest.mark.parametrize(
    ("grace", "signals", "said"),
    [(0.05, "[15]", "not saved within 0.05 s: leaving"), (60, "[15, 2]", "SIGINT again: leaving at once")],
)
def test_a_main_thread_that_is_stuck_outside_of_python_ends_in_time_too(grace: float, signals: str, said: str) -> None:
    source = STUCK.format(grace=grace, signals=signals)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 143
    assert said in done.stderr
    assert (" in <module>" in done.stderr) == (grace < 1)  # where it was stuck; nobody who is in a hurry reads that


def test_a_wakeup_descriptor_that_somebody_else_took_leaves_us_the_signals() -> None:
    theirs = socket.socketpair()
    theirs[1].setblocking(False)
    one = trainer()
    with Watch(grace=60) as watch:
        watch.begins(one)
        ours = signal.set_wakeup_fd(theirs[1].fileno(), warn_on_full_buffer=False)
        signal.raise_signal(signal.SIGTERM)
        assert signal.set_wakeup_fd(ours) == theirs[1].fileno()
    assert theirs[0].recv(8) == bytes([signal.SIGTERM])
    assert one.control.stopping == Stop("signal", "SIGTERM")
    for end in theirs:
        end.close()
