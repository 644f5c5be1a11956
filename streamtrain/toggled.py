"""Parameters that somebody freezes or thaws while a run trains: a callback, by `parameter.requires_grad_(...)`.

Its law: a next life has them as they were in the checkpoint; of what nobody touched, and of what `freeze=` governs,
which is a function of the step, the model tells as it is made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn


class Toggled:
    """Which require a gradient now, and did not when the run's first fit of this process began, or the other way."""

    def __init__(self, model: nn.Module, governed: Collection[nn.Parameter]) -> None:
        """`governed`: those whose turn somebody else keeps."""
        theirs = set(map(id, governed))
        named = [(name, one) for name, one in model.named_parameters() if id(one) not in theirs]
        self._made = {name: (parameter, parameter.requires_grad) for name, parameter in named}

    def state_dict(self) -> dict[str, bool]:
        """Whether each of them requires a gradient, by name."""
        return {name: one.requires_grad for name, (one, made) in self._made.items() if one.requires_grad != made}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        """Have those as they were, and all others as they were made."""
        for name, (parameter, made) in self._made.items():
            parameter.requires_grad_(state.get(name, made))


def check_toggled(state: Any) -> None:
    """Raise TypeError for what is no state of these."""
    if not isinstance(state, dict) or not all(type(flag) is bool for flag in state.values()):
        raise TypeError(f"requires_grad is {state!r:.80}")
