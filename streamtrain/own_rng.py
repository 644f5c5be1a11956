"""The random generators that a foreign source keeps for itself: those of a DataLoader, its samplers and its dataset.

Its law: they are found, not asked for; what is not found can't be put back, and where that may matter it is said.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TypeGuard

import numpy as np
import torch

from streamtrain.data.iterable import IterableStream
from streamtrain.data.mix import Mix
from streamtrain.data.source import Stream

logger = logging.getLogger(__name__)

_DEEP = 3
"""Attributes of attributes: loader.batch_sampler.sampler.generator."""
_MANY = 64
"""Attributes of one object that are looked at."""


def capture(stream: Stream) -> dict[str, Any]:
    """The states of the generators of a source, by where they were found; a tree that a checkpoint can keep."""
    return {path: _state(generator) for path, generator in _generators(stream)}


def restore(stream: Stream, states: dict[str, Any]) -> None:
    """Put them back, and say once what of this source is not as it was."""
    put_back(stream, states)
    message = "%s: if it draws random numbers, resuming is not exact: %s"
    if reason := _inexact(stream, states):
        logger.warning(message, _name(stream), reason)
    if mixed := _stateless(stream):
        reason = "within a mix its numbers are not put back. Give it a state_dict, or an order of its own"
        logger.warning(message, ", ".join(mixed), reason)


def put_back(stream: Stream, states: dict[str, Any]) -> None:
    """Put them into these states."""
    for path, generator in _generators(stream):
        if path in states:
            _set(generator, states[path])


def hire(stream: Stream) -> None:
    """Start the persistent workers of a DataLoader that had them when this epoch began; on the train thread.

    Starting draws a number more than going on: without this the order of the epoch would be another one.
    """
    if _persistent(stream) and stream.epoch and getattr(stream.source, "_iterator", "") is None:
        iter(stream.source)


def _inexact(stream: Stream, states: dict[str, Any]) -> str:
    if not isinstance(stream, IterableStream) or hasattr(stream.source, "load_state_dict"):
        return ""
    if not stream.pulls_inside and not states:
        return "an asynchronous source draws beside the fit's random state. Give it a generator of its own"
    if _persistent(stream) and stream.epoch:
        return "persistent workers carry their random states on from epoch to epoch, in processes of their own"
    return ""


def _stateless(stream: Stream) -> list[str]:
    """The kinds of a mix's sources that only produce again what they gave; a list gives the same again."""
    mixed = stream.sources if isinstance(stream, Mix) else []
    foreign = [source.source for source in mixed if isinstance(source, IterableStream)]
    drawing = [one for one in foreign if not isinstance(one, list | tuple) and not hasattr(one, "load_state_dict")]
    return sorted({type(one).__name__ for one in drawing})


def _persistent(stream: Stream) -> TypeGuard[IterableStream]:
    return isinstance(stream, IterableStream) and bool(getattr(stream.source, "persistent_workers", False))


def _name(stream: Stream) -> str:
    return type(getattr(stream, "source", stream)).__name__


def _generators(stream: Stream) -> Iterator[tuple[str, Any]]:
    """Each generator once, with the path to it; only sources that are no streams themselves are searched."""
    if not isinstance(stream, IterableStream):
        return
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", stream.source, 0)]
    while waiting:
        path, thing, depth = waiting.pop(0)
        if id(thing) in seen or thing is torch.default_generator or isinstance(thing, ModuleType | type):
            continue  # what belongs to the whole process is the fit's own random state
        seen.add(id(thing))
        if isinstance(thing, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            yield path, thing
        elif depth <= _DEEP and isinstance(getattr(thing, "__dict__", None), dict):
            own = [(name, value) for name, value in vars(thing).items() if name != "_iterator"]
            waiting += [(f"{path}.{name}".lstrip("."), value, depth + 1) for name, value in own[:_MANY]]


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
