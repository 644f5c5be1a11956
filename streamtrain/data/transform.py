"""The user's transform: from the numpy arrays of one batch to the batch that is handed over.

Its law: what it gives depends on the batch alone (its arrays, and a generator keyed by seed, epoch and position), so
that it is the same after a resume. It may drop rows, never add them.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.batch import Batch
from streamtrain.data.block import ALIGN
from streamtrain.data.options import Crew
from streamtrain.errors import ConfigError, StreamtrainError, UserCodeError, named

Transform = Callable[[Batch], Any]
"""`transform(batch) -> Batch | (inputs, targets)`, or an `async def` of that."""


def check_transform(transform: object, crew: Crew) -> None:
    """Raise ConfigError for what can't be a transform here, or by this crew."""
    if transform is None:
        if crew != Crew():
            raise ConfigError("transform_workers= without transform=", hint="leave it out, or give a transform")
        return
    if crew.kind == "process" and is_async(transform):
        raise ConfigError("an async transform runs on the loop, not in processes", hint="transform_workers=N tasks")
    if not callable(transform):
        raise ConfigError(f"transform must be a function of a batch, not {type(transform).__name__}")


def is_async(transform: object) -> bool:
    """Whether calling it gives a coroutine."""
    while isinstance(transform, partial):
        transform = transform.func
    return inspect.iscoroutinefunction(transform) or inspect.iscoroutinefunction(
        getattr(type(transform), "__call__", None)  # noqa: B004 (what it is, not whether)
    )


def apply(transform: Transform, batch: Batch, seed: int) -> Batch:
    """The transformed batch: arrays at multiples of 64 bytes. Raises UserCodeError naming the rows."""
    if not len(batch):
        return batch  # no row is left to be transformed
    given, rows = _given(batch, seed), rows_of(batch)
    try:
        made = transform(given)
    except StreamtrainError:
        raise
    except BaseException as error:  # SystemExit too: it must not end the host's loop
        raise _raised(error, rows) from error
    if inspect.iscoroutine(made):
        made.close()
        raise UserCodeError(
            f"transform returned a coroutine, on {rows}", hint="define it by `async def`: then it runs on the loop"
        )
    return _checked(made, given, batch, rows)


async def apply_async(transform: Transform, batch: Batch, seed: int) -> Batch:
    """The same of an `async def`; a cancellation goes through."""
    if not len(batch):
        return batch
    given, rows = _given(batch, seed), rows_of(batch)
    try:
        made = await transform(given)
    except (StreamtrainError, asyncio.CancelledError):
        raise
    except BaseException as error:  # SystemExit too: a task that raises it ends the host's loop
        raise _raised(error, rows) from error
    return _checked(made, given, batch, rows)


def _given(batch: Batch, seed: int) -> Batch:
    """What the transform is called with."""
    start = batch.cursor.position - len(batch.index)
    return replace(batch, rng=np.random.default_rng([seed, batch.epoch, start]))


def _raised(error: BaseException, rows: str) -> UserCodeError:
    return UserCodeError(
        f"transform raised {named(error)} ({_where(error)}) on {rows}",
        hint="the traceback (--debug) shows the line in the transform",
    )


def _checked(made: object, given: Batch, batch: Batch, where: str) -> Batch:
    """What a transform returned, as a batch. Raises UserCodeError where it is none."""
    rows = len(batch.index)
    try:
        result = _as_batch(made, given, batch)
        count = len(result)
    except (TypeError, IndexError, StopIteration) as error:
        raise UserCodeError(
            f"transform returned what is no batch of arrays ({error}), on {where}",
            hint="return arrays of numbers with a first axis, or dicts, lists and tuples of them",
        ) from error
    if isinstance(result.inputs, np.ndarray) and isinstance(result.targets, np.ndarray):
        of_targets = len(result.targets) if result.targets.ndim else 1
        if of_targets not in (count, 1):  # one stands for the batch
            raise UserCodeError(
                f"transform returned {count} rows of inputs and {of_targets} of targets, on {where}",
                hint="drop the same rows of both: batch.inputs[keep], batch.targets[keep]",
            )
    if count > rows:
        raise UserCodeError(
            f"transform made {count} rows out of {rows}, on {where}", hint="it may drop rows, not add them"
        )
    return result


def _as_batch(made: object, given: Batch, batch: Batch) -> Batch:
    if isinstance(made, Batch):
        index = made.index
        inputs, targets = made.inputs, made.targets
    elif isinstance(made, tuple) and len(made) == 2:
        inputs, targets = made
        index = given.index
    else:
        raise UserCodeError(
            f"transform returned {type(made).__name__}, not a Batch or (inputs, targets)",
            hint="return (batch.inputs, batch.targets), changed or not",
        )
    result = Batch(_aligned(inputs), _aligned(targets), None, batch.epoch, batch.cursor)
    if index is not None and len(index) == len(result):
        result.index = _aligned(index)
    return result


def rows_of(batch: Batch) -> str:
    """The rows by name; to be asked before a transform may have changed them."""
    index = batch.index
    if not len(index):
        return f"no samples (epoch {batch.epoch}, positions up to {batch.cursor.position})"
    return f"samples {index[0]}...{index[-1]} (epoch {batch.epoch}, positions up to {batch.cursor.position})"


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "no line"


def _aligned(tree: Any) -> Any:
    """Arrays that begin at a multiple of 64 bytes, copied where they do not."""
    if isinstance(tree, np.ndarray):
        if tree.dtype.kind not in "biufc" and tree.dtype.name != "bfloat16":
            raise TypeError(f"an array of dtype {tree.dtype}")
        return tree if tree.ctypes.data % ALIGN == 0 or not tree.size else aligned_copy(tree)
    if isinstance(tree, dict):
        return {key: _aligned(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return type(tree)(_aligned(value) for value in tree)
    return tree


def aligned_copy(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins at a multiple of 64 bytes."""
    memory = np.empty(array.nbytes + ALIGN, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGN
    copy: NDArray[Any] = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def batch_bytes(tree: Any) -> int:
    """Bytes of the arrays in nested dicts, lists and tuples."""
    if isinstance(tree, Batch):
        return batch_bytes([tree.inputs, tree.targets, tree.index])
    if isinstance(tree, dict):
        return sum(map(batch_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(batch_bytes, tree))
    return int(getattr(tree, "nbytes", 0))
