"""The other side of `transform_processes`: a spawned process that transforms batch after batch, and what is said there.

Its law: arrays go through the shared memory, never through the pipe, unless the budget grants no room for them; and
what a transform gets and gives are arrays of its own, so that it may keep and change them as it could in a thread.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import select
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.batch import Batch, Cursor
from streamtrain.data.block import ALIGN
from streamtrain.data.transform import apply
from streamtrain.errors import StreamtrainError

Tree = Any
"""Nested dicts, lists and tuples with arrays (or slots in their place) and other leaves."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an array lies in the shared memory."""

    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """A batch to be transformed: inputs, targets and index as slots, in an area of `size` bytes."""

    tree: Tree
    epoch: int
    cursor: Cursor
    size: int


@dataclass(frozen=True, slots=True)
class Room:
    """Asks for `size` bytes of shared memory; the answer is what there is now."""

    size: int


@dataclass(frozen=True, slots=True)
class Result:
    """The transformed batch: slots, or arrays where there was no room."""

    tree: Tree


@dataclass(frozen=True, slots=True)
class Failure:
    """What the transform, or the loading of it, raised."""

    error: StreamtrainError | None
    """None where it could not be unpickled here."""
    cause: str
    """The traceback."""


def leaves(tree: Tree, fn: Callable[[Any], Any]) -> Tree:
    """The same nest with `fn` of each leaf."""
    if isinstance(tree, dict):
        return {key: leaves(value, fn) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(leaves(value, fn) for value in tree)
    return fn(tree)


def laid_out(tree: Tree) -> tuple[Tree, list[tuple[Slot, NDArray[Any]]], int]:
    """The nest with slots for its arrays, which array goes where, and how many bytes that takes."""
    places: list[tuple[Slot, NDArray[Any]]] = []
    size = 0

    def slot(leaf: Any) -> Any:
        nonlocal size
        if not isinstance(leaf, np.ndarray):
            return leaf
        places.append((Slot(size, leaf.dtype, leaf.shape), leaf))
        size += -(-leaf.nbytes // ALIGN) * ALIGN
        return places[-1][0]

    return leaves(tree, slot), places, size


def view(area: mmap.mmap, slot: Slot) -> NDArray[Any]:
    """The array in its slot."""
    return np.ndarray(slot.shape, slot.dtype, buffer=area, offset=slot.start)


def copied(area: mmap.mmap, tree: Tree) -> Tree:
    """The nest with arrays of its own in place of slots, each at a multiple of 64 bytes."""

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Slot):
            return leaf
        there = view(area, leaf)
        memory = np.empty(there.nbytes + ALIGN, dtype=np.uint8)
        start = -memory.ctypes.data % ALIGN
        copy: NDArray[Any] = memory[start : start + there.nbytes].view(there.dtype).reshape(there.shape)
        copy[...] = there
        return copy

    return leaves(tree, own)


def main(connection: Connection, preparation: dict[str, Any], area_fd: int) -> None:
    """Serve until the other side closes; called in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to decide on
    threading.Thread(target=_end_with_parent, args=(connection.fileno(),), daemon=True).start()
    serving.append(True)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            if preparation.pop("needs_main"):
                spawn.prepare(preparation)  # type: ignore[attr-defined,unused-ignore]
            transform = pickle.loads(connection.recv_bytes())
        except EOFError:
            raise
        except BaseException:
            connection.send(Failure(None, traceback.format_exc()))
            return
        connection.send(Result(None))
        _serve(connection, transform, preparation["seed"], area_fd)


serving: list[bool] = []
"""Not empty in processes that transform: there none is spawned, or an unguarded script would spawn without end."""


def _end_with_parent(fd: int) -> None:
    """End at once when the other side is closed, in the middle of a transform too."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def _serve(connection: Connection, transform: Callable[[Batch], Any], seed: int, area_fd: int) -> None:
    area: mmap.mmap | None = None
    while True:
        order = connection.recv()
        if order.size and (area is None or len(area) != order.size):
            area = mmap.mmap(area_fd, order.size)
        inputs, targets, index = order.tree if area is None else copied(area, order.tree)
        try:
            made = apply(transform, Batch(inputs, targets, index, order.epoch, order.cursor), seed)
        except StreamtrainError as error:
            connection.send(_failure(error))
            continue
        tree, places, size = laid_out([made.inputs, made.targets, made.index])
        if area is None or len(area) < size:
            connection.send(Room(size))
            granted = connection.recv().size
            if granted < size:
                connection.send(Result([made.inputs, made.targets, made.index]))
                continue
            area = mmap.mmap(area_fd, granted)
        for slot, array in places:
            view(area, slot)[...] = array
        connection.send(Result(tree))


def _failure(error: StreamtrainError) -> Failure:
    text = "".join(traceback.format_exception(error.__cause__ or error))
    plain = type(error)(str(error), hint=error.hint)
    try:
        pickle.loads(pickle.dumps(plain))
    except Exception:
        return Failure(None, text)
    return Failure(plain, text)
