"""The state of numpy's global generator, taken and put in place by its memory.

numpy's own `get_state` and `set_state` go word by word through Python objects: four of them a burst were most of what a
burst cost beside its steps (150 us; 10 so).

Its law: what is taken is what `np.random.get_state` would give, and what is put in place is what `set_state` would.
Where the generator is another one than numpy starts with, or its memory is laid out otherwise, these two do the work.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.random.mtrand import get_bit_generator
from numpy.typing import NDArray

WORDS = 624

_normal = np.random.standard_normal


class _Memory(ctypes.Structure):
    """The state of a Mersenne Twister, as numpy's `mt19937_state` has it."""

    _fields_ = (("key", ctypes.c_uint32 * WORDS), ("pos", ctypes.c_int))


def take() -> Any:
    """The state; the generator is left anywhere, and without the second number of a pair of normal ones, which it keeps
    for its next call: `put` is to follow."""
    generator = get_bit_generator()
    memory = _of(generator)
    if memory is None:
        return np.random.get_state()
    with generator.lock:
        key, pos = _words(memory), memory.pos
    value = _normal()
    if memory.pos == pos:  # nothing was drawn for it: it was kept
        return ("MT19937", key, pos, 1, value)
    _normal()  # the second one of the pair that was drawn now
    return ("MT19937", key, pos, 0, 0.0)


def put(state: Any) -> None:
    """Put the generator into this state, after `take`. Raises what `np.random.set_state` does."""
    generator = get_bit_generator()
    memory = _of(generator)
    if memory is None or not _plain(state):
        np.random.set_state(state)
    else:
        with generator.lock:
            ctypes.memmove(memory.key, state[1].ctypes.data, 4 * WORDS)
            memory.pos = int(state[2])


def _plain(state: Any) -> bool:
    """Whether it is a state as `take` gives it, without a kept number."""
    if not isinstance(state, tuple | list) or len(state) != 5 or state[0] != "MT19937" or state[3]:
        return False
    key = state[1]
    return isinstance(key, np.ndarray) and key.dtype == np.uint32 and key.shape == (WORDS,) and key.flags.c_contiguous


def _of(generator: Any) -> _Memory | None:
    """Where its state lies, if that is known."""
    if type(generator) is not np.random.MT19937 or not _laid_out_so():
        return None
    return _Memory.from_address(generator.ctypes.state_address)


@functools.cache
def _laid_out_so() -> bool:
    """Whether this numpy lays its state out as `_Memory` says: tried on a generator of our own."""
    generator = np.random.MT19937(7)
    generator.random_raw(5)
    memory = _Memory.from_address(generator.ctypes.state_address)
    told: Any = generator.state["state"]
    return memory.pos == told["pos"] and np.array_equal(_words(memory), told["key"])


def _words(memory: _Memory) -> NDArray[np.uint32]:
    return np.frombuffer(bytes(memory.key), dtype=np.uint32).copy()
