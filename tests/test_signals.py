"""Signals in real processes: the first asks, the second ends at once, and the handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamtrain import signals
from streamtrain.signals import SAVING, SHOWING, SIGNALS, capture, untouched

ROOT = Path(__file__).parents[1]
CHILD = textwrap.dedent("""
    import signal, sys, time
    from streamtrain.signals import capture

    if not {nohup}:  # whatever the tests themselves were started with
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def first(signum):
        print("asked", signum, flush=True)

    with capture(first) as captured:
        print("ready", flush=True)
        while {until}:
            time.sleep(0.01)
    print("left", captured.first, captured.count, flush=True)
    sys.exit(0 if captured.first is None else 128 + captured.first)
""")


@contextmanager
def child(until: str = "True", *prefix: str) -> Iterator[subprocess.Popen[str]]:
    command = [*prefix, sys.executable, "-c", CHILD.format(until=until, nohup=bool(prefix))]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_asks_and_the_process_ends_in_its_own_time(number: signal.Signals) -> None:
    with child("captured.first is None") as process:
        process.send_signal(number)
        out, _ = process.communicate(timeout=20)
    assert out.splitlines() == [f"asked {number}", f"left {number:d} 1"]
    assert process.returncode == 128 + number


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_the_second_signal_ends_the_process_within_two_seconds(first: str, second: str) -> None:
    with child() as process:
        assert process.stdout is not None
        process.send_signal(signal.Signals[first])
        assert process.stdout.readline().startswith("asked")
        began = time.monotonic()
        process.send_signal(signal.Signals[second])
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - began < 2
    assert process.returncode == 128 + signal.Signals[second]
    assert err == f"\n{second} again: leaving at once, the last checkpoint stands\n"


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    with child("captured.first is None", "nohup") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    assert out.splitlines()[-1] == f"left {signal.SIGTERM:d} 1"


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *SAVING, *SHOWING)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("end", ["well", "by an error"])
def test_the_handlers_come_back(end: str) -> None:
    mine: list[Any] = [lambda *_: None, signal.SIG_DFL, signal.SIG_IGN]
    for number, handler in zip(SIGNALS, mine, strict=True):
        signal.signal(number, handler)
    try:
        with capture(lambda number: None):
            assert signal.getsignal(signal.SIGINT) is not mine[0]
            if end != "well":
                raise OSError
    except OSError:
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == mine


@pytest.mark.usefixtures("_handlers")
def test_later_signals_are_counted_and_only_the_first_is_kept() -> None:
    seconds: list[int] = []
    firsts: list[int] = []
    with capture(firsts.append, second=seconds.append) as captured:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert (captured.first, captured.count) == (signal.SIGTERM, 3)
    assert (firsts, seconds) == ([signal.SIGTERM], [signal.SIGINT, signal.SIGINT])


def test_off_the_main_thread_nothing_is_changed() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with capture(lambda number: None):
                raise AssertionError("it was captured")
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(raised) == 1
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.usefixtures("_handlers")
def test_what_a_shell_script_starts_in_the_background_has_untouched_handlers() -> None:
    """It ignores SIGINT for that, which nobody has chosen: a SIGTERM would end it unsaved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert untouched()
    with capture(lambda number: None):
        assert not signals.untouched()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("_handlers")
def test_whether_handlers_are_untouched_is_told() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert untouched()
    with capture(lambda number: None):
        assert not signals.untouched()
    told: list[bool] = []
    thread = threading.Thread(target=lambda: told.append(untouched()))
    thread.start()
    thread.join()
    assert told == [False]


@pytest.mark.usefixtures("_handlers")
def test_signals_that_save_or_show_are_neither_first_nor_second() -> None:
    asked: list[tuple[str, int]] = []

    def note(what: str) -> Callable[[int], None]:
        return lambda signum: asked.append((what, signum))

    with capture(note("end"), second=note("second"), save=note("save"), show=note("show")) as captured:
        for number in (signal.SIGUSR1, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR2, signal.SIGQUIT):
            signal.raise_signal(number)
    assert [what for what, _ in asked] == ["save", "show", "end", "save", "show"]
    assert [number for _, number in asked] == [10, 3, 15, 12, 3]
    assert (captured.first, captured.count) == (signal.SIGTERM, 1)


@pytest.mark.usefixtures("_handlers")
def test_without_an_action_signals_that_save_or_show_are_left_alone() -> None:
    before = [signal.getsignal(number) for number in (*SAVING, *SHOWING)]
    with capture(lambda number: None):
        assert [signal.getsignal(number) for number in (*SAVING, *SHOWING)] == before


@pytest.mark.usefixtures("_handlers")
def test_a_handler_that_was_there_is_called_after_ours() -> None:
    called: list[str] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda signum, frame: called.append(f"theirs {signum}"))
    with capture(lambda number: called.append("end"), save=lambda number: called.append("save")):
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert called == ["save", "theirs 10", "end", "theirs 15", "theirs 15"]


@pytest.mark.usefixtures("_handlers")
def test_what_a_handler_that_was_there_raises_does_not_tear_apart_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    def leave(signum: int, frame: object) -> None:
        sys.exit(3)

    signal.signal(signal.SIGTERM, leave)
    with capture(lambda number: None) as captured:
        signal.raise_signal(signal.SIGTERM)
    assert captured.first == signal.SIGTERM
    assert "the handler of SIGTERM that was there before failed" in caplog.text


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGHUP, *SAVING], ids=lambda number: number.name)
def test_what_somebody_ignores_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    asked: list[int] = []
    with capture(asked.append, save=asked.append):
        signal.raise_signal(number)
    assert asked == []


@pytest.mark.usefixtures("_handlers")
def test_what_a_shell_ignores_for_the_background_is_heard() -> None:
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    asked: list[int] = []
    with capture(asked.append, show=asked.append):
        signal.raise_signal(signal.SIGQUIT)
        signal.raise_signal(signal.SIGINT)
    assert asked == [signal.SIGQUIT, signal.SIGINT]
