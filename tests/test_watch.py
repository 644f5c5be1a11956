"""What a signal does: before training it ends the command, then it stops the trainer, and a second one ends at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from streamtrain.control import Control, Stop
from streamtrain.signals import Interrupted
from streamtrain.watch import Watch


def trainer() -> Any:
    """As much of a trainer as a watch knows."""
    return SimpleNamespace(control=Control())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_training_a_signal_ends_the_command(signum: signal.Signals) -> None:
    with pytest.raises(Interrupted) as caught, Watch(grace=60):
        signal.raise_signal(signum)
    assert caught.value.signum == signum


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
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with Watch(grace=60):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


WAITS = """
import signal, threading
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
        (60, ["SIGINT", "SIGINT"], 130, "not saved within 1.5 s: leaving"),
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
    assert done.stderr == "\nnot ended within 1.5 s: leaving, the last checkpoint stands\n"
