"""States that no run has left: their digests are right, and what they hold can't be taken up.

Its law: whatever goes wrong while a checkpoint is taken up is an error of the checkpoint, with its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from streamtrain.errors import CheckpointError, StreamtrainError

P = ParamSpec("P")
T = TypeVar("T")


def refusing(take_up: Callable[P, T]) -> Callable[P, T]:
    """Have a function that takes up the state of a checkpoint, whose path is among its arguments, raise
    CheckpointError for whatever is none of our own errors: of an edited state, or a callback's that was another."""

    @wraps(take_up)
    def refused(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return take_up(*arguments, **named)
        except (StreamtrainError, MemoryError):
            raise
        except Exception as error:
            path = next(each for each in (*arguments, *named.values()) if isinstance(each, Path))
            raise CheckpointError(
                f"checkpoint {path}: its state can't be taken up: {_why(error)}",
                hint="Was it edited, or written by another version? That version, or another checkpoint, goes on.",
            ) from error

    return refused


@contextmanager
def refusing_for(callback: str, path: Path) -> Iterator[None]:
    """Name the callback whose own code refuses the state that a checkpoint has of it."""
    try:
        yield
    except (StreamtrainError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path}: callback {callback} can't take up its state: load_state_dict raised {_why(error)}",
            hint="Was it another version of it? --debug shows the line; without the callback the run goes on.",
        ) from error


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())!s:.200}"
