"""What a callback is: an observer with hooks that it may define, each given one frozen event.

A hook is `def` (run in a callback thread) or `async def` (run on the loop). Hooks that a class does not define cost
nothing: which ones exist is resolved once, before training.
"""

from __future__ import annotations

from typing import Any

HOOKS: tuple[str, ...] = (
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_batch_begin",
    "on_batch_end",
    "on_validation_begin",
    "on_validation_end",
    "on_checkpoint",
    "on_checkpoint_failed",
    "on_exception",
    "on_interrupt",
    "on_log",
    "on_media",
)
NEWS: frozenset[str] = frozenset({"on_batch_begin", "on_batch_end"})
"""Hooks whose events coalesce for a callback that lags."""


class Callback:
    """Base class, for `decides` and state; any object with one of the HOOKS is a callback as well.

    With `decides = True` the wheel waits, after validations and epochs, for what `on_validation_end` and
    `on_epoch_end` return: a Verdict or None. With a method `gauge(optimizer, epoch) -> {name: number}` it adds numbers
    to each line of the log: it is called on the train thread right after the line's update, so keep it short.
    """

    decides: bool = False
    writes_lines: bool = False
    """Whether its state tells which lines are written somewhere: it is kept as it is now, also where an error has the
    next life tell a validation again, line and all, for which others get their states of before."""
    state_key: str = ""
    """What tells this one from others of its class, whatever their order, in checkpoints and messages: what it watches,
    or where it writes. Of several with a state a class should have one, which stays the same from life to life."""

    def state_dict(self) -> dict[str, Any]:
        """State to keep in checkpoints: JSON values, tensors, and dicts and lists of them.

        It is copied on the train thread, perhaps while a slow hook still runs: give a copy of what hooks change.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def hooks_of(callback: object) -> frozenset[str]:
    """The names of the hooks that this callback defines."""
    return frozenset(name for name in HOOKS if callable(getattr(callback, name, None)))
