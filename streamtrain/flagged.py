"""Updates that the device itself leaves out where a flag says so, and what a burst finds when it reads the flags.

Its law: nothing is read before the burst's end; and what is left then is what is left where each number is looked at
at once: no later update is made after a bad one that the run does not pass over, and rates, scale and random numbers
are those from before it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from streamtrain.data.batch import Cursor
from streamtrain.rollback import SCHEDULED
from streamtrain.schedulers import LearningRate

LOWEST = 2.0**-14
"""A scale of fp16's loss at which gradients that overflow are not to be saved: they are above 1e9 themselves."""


class Flag(NamedTuple):
    """One update."""

    bad: Tensor
    """0-d, not 0: it was not made, since a number is not finite that should be."""
    left_out: Tensor
    """0-d, not 0: it was not made, for that or because fp16's scaled gradients overflowed."""
    place: int
    """Of its first batch since the last report."""
    cursor: Cursor | None
    """After it."""
    indices: list[Any]
    """The sample numbers of each of its batches."""
    generators: list[Tensor]
    """How torch's generators stood before it."""


class Flags:
    """The flags of the updates of one burst."""

    def __init__(self, device: torch.device, *, lasting: bool) -> None:
        """`lasting`: after a bad update no later one is made, until somebody calls `lower`."""
        self._lasting = lasting
        self._one = torch.ones((), dtype=torch.float32, device=device)  # torch's check takes no other
        self._found = torch.zeros((), dtype=torch.float32, device=device)
        self._flags: list[Flag] = []

    def __len__(self) -> int:
        return len(self._flags)

    @property
    def last(self) -> Flag | None:
        """That of the update under way."""
        return self._flags[-1] if self._flags else None

    def raised(self, values: list[Tensor]) -> Tensor:
        """A flag (0-d, on the device) that is not 0 where one of these is not finite."""
        found = self._found if self._lasting else torch.zeros_like(self._found)
        torch._amp_foreach_non_finite_check_and_unscale_(values, found, self._one)
        return found.clone() if self._lasting else found

    def add(self, flag: Flag) -> None:
        """One more update."""
        self._flags.append(flag)

    def lower(self) -> None:
        """Updates may be made again."""
        self._found.zero_()

    def take(self) -> tuple[list[Flag], list[bool], list[bool]]:
        """The updates since this was last asked; which were bad, and which were left out. Waits for the device."""
        flags, self._flags = self._flags, []
        if all(flag.bad is flag.left_out for flag in flags):
            bad = torch.stack([flag.bad for flag in flags]).bool().tolist()
            return flags, bad, bad
        read = torch.stack([*(flag.bad for flag in flags), *(flag.left_out for flag in flags)]).bool().tolist()
        return flags, read[: len(flags)], read[len(flags) :]


class Rates:
    """How the rates stood when a burst began, to count again from there."""

    def __init__(self, lr: LearningRate, optimizer: Optimizer) -> None:
        self._lr, self._optimizer = lr, optimizer
        self._state = copy.deepcopy(lr.state_dict())
        self._groups = [
            {key: copy.deepcopy(group[key]) for key in SCHEDULED if key in group} for group in optimizer.param_groups
        ]

    def count(self, first: int, updates: int, epoch: int, samples: int, seconds: float) -> None:
        """Go to where they stand before the update that follows so many from number `first` (from 0) on; until then
        `samples` were trained. Those by time are of the burst's beginning, after `seconds`: nobody knows that one's."""
        self._lr.load_state_dict(self._state)
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=False):
            for key, value in before.items():
                if isinstance(value, Tensor):  # a rate that schedules, and compiled kernels, write and read in place
                    group[key].copy_(value)
                else:
                    group[key] = value
        for step in range(first, first + updates):
            self._lr.before_update(step, epoch, samples, seconds)
            self._lr.after_update()
        self._lr.before_update(first + updates, epoch, samples, seconds)


def scaled_after(state: Mapping[str, Any], left_out: list[bool]) -> dict[str, Any]:
    """The state of a GradScaler after these updates, as `torch._amp_update_scale_` has it: a smaller scale after one
    that was left out, a larger one after many that were made."""
    scale, made = float(state["scale"]), int(state["_growth_tracker"])
    for out in left_out:
        made = 0 if out else made + 1
        if out:
            scale *= state["backoff_factor"]
        elif made == state["growth_interval"]:
            scale, made = scale * state["growth_factor"], 0
    return {**state, "scale": scale, "_growth_tracker": made}
