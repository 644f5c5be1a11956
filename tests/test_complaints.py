"""How errors are said: two lines whatever was raised, nothing that a terminal would obey, the right exit code."""

from __future__ import annotations

import errno

import pytest

from streamtrain.complaints import complain, say
from streamtrain.errors import CheckpointError, DataError, StreamtrainError

Capture = pytest.CaptureFixture[str]


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("array x: gone", hint="look"), 3, "array x: gone"),
        (ExceptionGroup("two", [ValueError("a"), CheckpointError("b")]), 4, "b"),
        (ExceptionGroup("one", [ExceptionGroup("in one", [ValueError("a")])]), 1, "internal error: ValueError: a"),
        (OSError(errno.ENOSPC, "No space left on device", "d/x"), 5, "d/x: No space left on device"),
        (MemoryError("12 GiB"), 5, "out of memory: 12 GiB"),
        (OutOfMemoryError("CUDA"), 5, "out of memory: CUDA"),
        (TimeoutError(), 5, "TimeoutError"),
        (RuntimeError("can't start new thread"), 5, "the machine refuses: can't start new thread"),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            5,
            "the machine refuses: libtorch_cpu.so: failed to map segment from shared object",
        ),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_was_raised_is_two_lines_and_a_code(error: Exception, code: int, line: str, capsys: Capture) -> None:
    assert say(error, debug=False) == code
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: {line}"
    assert second.startswith("hint: ")
    assert len(second) > len("hint: ")


@pytest.mark.parametrize(("error", "command"), [(DataError("a"), "inspect"), (CheckpointError("a"), "checkpoints")])
def test_no_command_sends_to_itself(error: StreamtrainError, command: str, capsys: Capture) -> None:
    say(error, debug=False, command="fit")
    say(error, debug=False, command=command)
    others, own = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: ")]
    assert f"`streamtrain {command} " in others
    assert f"`streamtrain {command} " not in own


@pytest.mark.parametrize("kind", StreamtrainError.__subclasses__())
def test_every_kind_of_error_has_a_hint_where_it_gives_none(kind: type[StreamtrainError], capsys: Capture) -> None:
    assert say(kind("x"), debug=False) == kind.exit_code
    assert len(capsys.readouterr().err.splitlines()[1]) > len("hint: ")


def test_a_message_of_many_lines_is_said_on_one_and_tells_a_terminal_nothing(capsys: Capture) -> None:
    complain("one\n  two\r\n\x1b[31mred\x00", "\n")
    assert capsys.readouterr().err == "error: one two \\x1b[31mred\\x00\nhint: \n"


def test_a_traceback_comes_first_where_it_was_asked_for(capsys: Capture) -> None:
    assert say(DataError("x", hint="y"), debug=True) == 3
    assert capsys.readouterr().err == "streamtrain.errors.DataError: x\nerror: x\nhint: y\n"
