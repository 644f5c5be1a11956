"""What damage costs: 1 % of the chunks are damaged, in every way, and 5 % of a store's reads fail; the epoch must end.

Every sample is given with its own values, or counted as skipped; what is damaged, and nothing else, is what is missing;
and a second stream gives the same. The store with read errors is read by zarr's own API, without retries: a chunk that
fails is a bad chunk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, WrapperStore

from data_tools.synth import synth
from streamtrain import ZarrStream
from tests.bench.measure import Measure, Options

ROWS, COLUMNS, BATCH = 16, 8, 100
DAMAGED, FAILING = 0.01, 0.05


class Failing(WrapperStore[LocalStore]):
    """A store whose disk can't read some of its files."""

    def __init__(self, store: LocalStore, keys: frozenset[str] = frozenset()) -> None:
        super().__init__(store)
        self.keys = keys

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        """What is there, or an error."""
        if key in self.keys:
            raise OSError(5, "Input/output error")
        return await super().get(key, *arguments, **options)


def run(options: Options) -> Iterator[Measure]:
    """Local files on each lane, then the store with read errors."""
    logger = logging.getLogger("streamtrain.data.skipping")
    logger.setLevel(logging.ERROR)  # each chunk is said once: not here
    try:
        yield from measured(options)
    finally:
        logger.setLevel(logging.NOTSET)


def measured(options: Options) -> Iterator[Measure]:
    """All of it."""
    chunks = 400 if options.quick else 4000
    rng = np.random.default_rng(0)
    with options.room() as room:
        for codec in ("raw", "zstd"):
            store = synth(room / f"{codec}.zarr", rows=chunks * ROWS, columns=COLUMNS, chunk_rows=ROWS, codec=codec)
            expected = np.asarray(zarr.open_array(str(store / "x"), mode="r")[...])
            bad = rng.choice(chunks, int(DAMAGED * chunks), replace=False)
            for number, chunk in enumerate(bad.tolist()):
                damage(store / f"x/c/{chunk}/0", number, store / f"x/c/{(chunk + 1) % chunks}/0")
            for io in ("auto", "pread"):
                yield from held(f"{codec}, {io}", store, expected, {*bad.tolist()}, io=io)
        plain = synth(room / "plain.zarr", rows=chunks // 4 * ROWS, columns=COLUMNS, chunk_rows=ROWS)
        expected = np.asarray(zarr.open_array(str(plain / "x"), mode="r")[...])
        failing = rng.choice(chunks // 4, int((DAMAGED + FAILING) * chunks / 4), replace=False).tolist()
        cut = failing[: int(DAMAGED * chunks / 4)]
        for chunk in cut:
            (plain / f"x/c/{chunk}/0").write_bytes(b"cut")
        keys = frozenset(f"x/c/{chunk}/0" for chunk in failing[len(cut) :])
        store_of = Failing(LocalStore(plain, read_only=True), keys)
        yield from held("store with read errors", store_of, expected, {*failing}, max_skipped=0.1)


def damage(path: Path, kind: int, other: Path) -> None:
    """Flip a bit, cut, lose, replace by its neighbour, or put a folder there."""
    content = bytearray(path.read_bytes())
    if kind % 5 == 0:
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    elif kind % 5 == 1:
        path.write_bytes(content[:-1])
    elif kind % 5 == 2:
        path.unlink()
    elif kind % 5 == 3 and other.is_file():
        shutil.copy(other, path)
    else:
        path.unlink()
        os.mkdir(path)


def held(name: str, store: Any, expected: NDArray[Any], bad: set[int], **options: Any) -> Iterator[Measure]:
    """Two runs of an epoch against what must be left."""
    first, skipped = asyncio.run(epoch(store, expected, **options))
    again, _ = asyncio.run(epoch(store, expected, **options))
    left = {row for row in range(len(expected)) if row // ROWS not in bad}
    yield Measure(name=f"{name}: chunks skipped", values=(len(bad),))
    yield Measure(name=f"{name}: samples lost count of", values=(len(expected) - len(first) - skipped,), at_most=0)
    yield Measure(name=f"{name}: given or left out wrongly", values=(len(left ^ {*first}),), at_most=0)
    yield Measure(name=f"{name}: given otherwise the second time", values=(float(first != again),), at_most=0)


async def epoch(store: Any, expected: NDArray[Any], **options: Any) -> tuple[list[int], int]:
    """The samples of one epoch whose values are right, and how many were skipped."""
    given = {"batch_size": BATCH, "shuffle": "block", "output": "numpy", "on_bad_chunk": "skip", **options}
    found: list[int] = []
    async with ZarrStream(store, inputs="x", **given) as stream:
        async for batch in stream:
            right = (batch.inputs == expected[batch.index]).all(axis=1)
            found += batch.index[right].tolist()
        return found, stream.statistics().rows_skipped
