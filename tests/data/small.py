"""A small store, the streams over it, and what a transform may be: for the tests of transforms, caches, mixes, loaders.

Transforms stand here at the module's level, so that a spawned process can import them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from streamtrain.data.batch import Batch
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import StreamtrainError

ROWS = 1000
X: NDArray[np.float32] = np.arange(ROWS * 6, dtype=np.float32).reshape(ROWS, 6)
Y: NDArray[np.int64] = np.arange(ROWS, dtype=np.int64) * 7


def write(where: Any, *, rows: int = ROWS, compressed: bool = False) -> Any:
    """A group of `x`, raw or by zarr's default codec, and `y`, compressed."""
    group = zarr.create_group(where)
    compressors: Any = "auto" if compressed else None
    group.create_array("x", data=X[:rows], chunks=(64, 6), compressors=compressors, config={"write_empty_chunks": True})
    group.create_array("y", data=Y[:rows], chunks=(100,))
    return where


def stream(store: Path, **keywords: Any) -> ZarrStream:
    """Shuffled batches of 33, the last one of 10."""
    given: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 33, "shuffle": "block", "shuffle_blocks": 3}
    return ZarrStream(store, **{**given, "memory": "8MiB", **keywords})


async def until_failure(source: Any) -> tuple[list[int], Exception]:
    """Positions of the batches before the failure, and the failure."""
    positions: list[int] = []
    try:
        async for batch in source:
            positions.append(batch.cursor.position)  # noqa: PERF401 (what came before an error is to be kept)
    except StreamtrainError as error:
        return positions, error
    raise AssertionError("nothing failed")


def ours() -> list[str]:
    """Threads of ours that live."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamtrain-")]


def noisy(batch: Batch) -> tuple[Any, Any]:
    """Other numbers each epoch, by the batch's own generator."""
    assert batch.rng is not None
    return batch.inputs + batch.rng.standard_normal(batch.inputs.shape, dtype=np.float32), batch.targets


def in_place(batch: Batch) -> Batch:
    """Changes what it was given."""
    batch.inputs *= 2
    batch.targets[:] += 1
    return batch


def thinned(batch: Batch) -> Batch:
    """A filter: even samples alone."""
    keep = batch.index % 2 == 0
    return Batch(batch.inputs[keep], batch.targets[keep], batch.index[keep])


def grown(batch: Batch) -> tuple[Any, Any]:
    """Makes far more bytes than it was given."""
    return {"wide": np.repeat(batch.inputs, 50, axis=1), "name": "w"}, [batch.targets, batch.targets * 2]


def fails_at_99(batch: Batch) -> Batch:
    """Raises in the third batch of an unshuffled stream."""
    if batch.cursor.position == 99:
        raise ValueError("no")
    return batch


def killed_at_99(batch: Batch) -> Batch:
    """Takes its process along."""
    if batch.cursor.position == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def leaves_at_99(batch: Batch) -> Batch:
    """Ends its process."""
    if batch.cursor.position == 99:
        os._exit(3)
    return batch


def hangs_at_99(batch: Batch) -> Batch:
    """Never comes back."""
    if batch.cursor.position == 99:
        threading.Event().wait()
    return batch


def told_its_process(batch: Batch) -> tuple[Any, Any]:
    """The number of the process as targets."""
    return batch.inputs, np.full(len(batch), os.getpid())


async def awaited_in_place(batch: Batch) -> Batch:
    """`in_place`, after a turn of the loop."""
    await asyncio.sleep(0)
    return in_place(batch)


async def awaited_noisy(batch: Batch) -> tuple[Any, Any]:
    """`noisy`, after a turn of the loop."""
    await asyncio.sleep(0)
    return noisy(batch)


async def awaited_thinned(batch: Batch) -> Batch:
    """`thinned`, after a turn of the loop."""
    await asyncio.sleep(0)
    return thinned(batch)


async def awaited_grown(batch: Batch) -> tuple[Any, Any]:
    """`grown`, after a turn of the loop."""
    await asyncio.sleep(0)
    return grown(batch)
