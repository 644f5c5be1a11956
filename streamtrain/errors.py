"""The errors that a user can meet, in one tree; a message says what, where and why, its hint what to do.

StreamtrainError
  ConfigError          an argument, option or configuration that cannot work            exit 2
  DataError            the data is missing, damaged, changed or does not fit together   exit 3
  CheckpointError      a checkpoint is damaged, foreign, or cannot be written           exit 4
  EnvironmentProblem   disk, memory, port, device, a read that hangs                    exit 5
  NonFiniteError       a loss or gradient is not finite; the update was not made        exit 6
  UserCodeError        a callback, transform, model or consumer misbehaved              exit 7
"""

from __future__ import annotations

NO_THREAD = "can't start new thread"
"""What Python's RuntimeError says where a process may have no more threads, or no memory for their stacks."""

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a text as JSON raises, and the numbers and names in it, where it is damaged or was never ours."""


class StreamtrainError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one line: what, where, why."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        """What the user can do about it; may be empty."""


class ConfigError(StreamtrainError):
    """An argument, option or configuration value that cannot work; raised before anything is written."""

    exit_code = 2


class DataError(StreamtrainError):
    """The data is missing, damaged, changed or does not fit together."""

    exit_code = 3


class CheckpointError(StreamtrainError):
    """A checkpoint is damaged, belongs to something else, or could not be committed."""

    exit_code = 4


class EnvironmentProblem(StreamtrainError):
    """The machine refuses: disk, memory, port, device, lock, or a read that hangs."""

    exit_code = 5


class NonFiniteError(StreamtrainError):
    """A loss or gradient is not finite; the weights are those before the step."""

    exit_code = 6


class UserCodeError(StreamtrainError):
    """Code handed in by the user raised or misbehaved; the original error is its `__cause__`."""

    exit_code = 7


def words(error: BaseException) -> str:
    """`str(error)`; empty for an error of the user's own that can't even tell that, for it must not hide behind another
    one that comes up while it is told."""
    try:
        return str(error)
    except Exception:
        return ""


def named(error: BaseException) -> str:
    """An error's type and the first line of what it says, where it says anything."""
    text = words(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
