"""The states of all random generators that a step may draw from, to be put in place and taken away again.

Its law: outside its bursts a fit is invisible; whoever draws in the host's code gets the numbers that it would have got
without us. (torch, numpy and Python keep one generator a process: host code that draws on another thread *during* a
burst does disturb it.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from streamtrain import numpy_rng

RngState = dict[str, Any]
"""{"torch": tensor, "numpy": tuple, "python": tuple, "cuda": list of tensors}: a tree that a checkpoint can keep."""


def capture() -> RngState:
    """The states of torch's, numpy's and Python's generators, and of CUDA's where it is in use."""
    return _captured(np.random.get_state)


def _captured(numpys: Callable[[], Any]) -> RngState:
    """`numpys()` is last: it may move the generator, which nobody puts back where a device refuses to tell its own."""
    state: RngState = {"torch": torch.default_generator.get_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return {**state, "numpy": numpys()}


def restore(state: RngState) -> None:
    """Put the generators into these states."""
    np.random.set_state(state["numpy"])
    _restore_others(state)


def _restore_others(state: RngState) -> None:
    torch.default_generator.set_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def drawn_aside(before: RngState, after: RngState) -> bool:
    """Whether numpy's or Python's generator, which no step puts back by itself, was drawn from in between."""
    (_, words, gauss), (_, later, gauss_later) = before["python"], after["python"]
    if tuple(words) != tuple(later) or gauss != gauss_later:
        return True
    return not all(np.array_equal(one, other) for one, other in zip(before["numpy"], after["numpy"], strict=True))


def checked(state: RngState) -> RngState:
    """The same, once it is known that the generators take it. Raises whatever they raise where it is no such state."""
    before = capture()
    try:
        restore(state)
    finally:
        restore(before)
    return state


def seeded(seed: int) -> RngState:
    """The states after seeding each generator with `seed`, leaving the current ones as they are."""
    before = capture()
    try:
        # torch.manual_seed would seed devices whose states are not captured here, and CUDA for its first user.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return capture()
    finally:
        restore(before)


class Rng:
    """The random state of one fit."""

    def __init__(self, state: RngState) -> None:
        self.state = state
        """Between bursts: where the fit's generators stand."""

    @contextmanager
    def swapped_in(self, *, keep: bool = True) -> Iterator[None]:
        """Run the block with the fit's generators; with `keep=False` what it draws leaves no trace in the fit."""
        callers = _take()
        try:
            _put(self.state)
        except BaseException:
            restore(callers)
            raise
        try:
            yield
        finally:
            try:
                drawn = _take()
            except BaseException:
                restore(callers)
                raise
            else:
                if keep:
                    self.state = drawn
                _put(callers)


def _take() -> RngState:
    """What `capture` gives, faster; `_put` is to follow, and nobody else is to draw meanwhile."""
    return _captured(numpy_rng.take)


def _put(state: RngState) -> None:
    """What `restore` does, after `_take`."""
    numpy_rng.put(state["numpy"])
    _restore_others(state)
