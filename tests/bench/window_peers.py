"""One loader of windows for some seconds: `window_peers.py NAME STORE WINDOW BATCH CELLS CHUNKS MEMORY SECONDS`.

It says how it did in a line of JSON. Batches of (BATCH, WINDOW, ...) float32, in shuffled order, from the array `x` of
a store. CELLS of ours, or CHUNKS, are mixed together, where the loader does not shuffle all. It imports nothing of ours
but for ours, since one of them lives in an environment of its own; each is told what its documentation says.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple


class Ask(NamedTuple):
    """What is to be read."""

    store: str
    window: int
    batch: int
    cells: int
    chunks: int
    memory: str


def by_xbatcher(ask: Ask, workers: int) -> Iterator[Any]:
    """Its BatchGenerator by the map-style dataset that it has for torch, under a DataLoader that shuffles."""
    import torch
    import xarray
    import xbatcher
    from torch.utils.data import DataLoader, Dataset

    dataset = xarray.open_zarr(ask.store, chunks=None, consolidated=False)
    dims = {"time": ask.window, "y": dataset.sizes["y"], "z": dataset.sizes["z"]}
    windows = xbatcher.BatchGenerator(dataset, dims, input_overlap={"time": ask.window - 1}, preload_batch=False)

    class Windows(Dataset[Any]):
        def __len__(self) -> int:
            return len(windows)

        def __getitem__(self, number: int) -> Any:
            return torch.from_numpy(windows[number]["x"].values)

    while True:
        loader: Any = DataLoader(Windows(), batch_size=ask.batch, shuffle=True, num_workers=workers)
        yield from loader


def by_insitubatch(ask: Ask) -> Iterator[Any]:
    """A view of the array for each step of the window, stacked."""
    from insitubatch import InSituDataset, obstore_store, open_geometries, split_by_chunk  # type: ignore[import-not-found]

    store: Any = obstore_store(f"file://{ask.store}")
    x = open_geometries(store, variables=["x"])["x"]
    steps = {f"x{step}": x.shift(step) for step in range(ask.window)}
    data: Any = InSituDataset(
        store,
        split_by_chunk(x, fractions=(1.0, 0.0, 0.0)),
        steps,
        batch_size=ask.batch,
        block_chunks=ask.chunks,
    )
    epoch = 0
    while True:
        data.set_epoch(epoch)
        for batch in data.train:
            yield batch.stack(list(steps))
        epoch += 1


async def by_ours(ask: Ask) -> AsyncIterator[Any]:
    """A stream."""
    from streamtrain import ZarrStream

    stream = ZarrStream(
        ask.store,
        inputs="x",
        window={"time": ask.window},
        batch_size=ask.batch,
        shuffle="block",
        shuffle_blocks=ask.cells,
        memory=ask.memory,
        cache="0",
        output="numpy",
    )
    async with stream:
        while True:
            async for batch in stream:
                yield batch.inputs


LOADERS: dict[str, Callable[[Ask], Iterator[Any]]] = {
    "xbatcher": lambda ask: by_xbatcher(ask, 0),
    "xbatcher, 2 workers": lambda ask: by_xbatcher(ask, 2),
    "insitubatch": by_insitubatch,
}


def _size(batch: Any, ask: Ask) -> int:
    """Bytes of a batch, of which every page is there."""
    assert batch.shape[1] == ask.window, batch.shape
    return int(batch.nbytes)


def measured(name: str, ask: Ask, seconds: float) -> float:
    """Bytes a second, the start-up of the first batch left out."""
    batches = LOADERS[name](ask)
    next(batches)
    began, size = time.perf_counter(), 0
    for batch in batches:
        size += _size(batch, ask)
        if time.perf_counter() - began >= seconds:
            break
    return size / (time.perf_counter() - began)


async def measured_ours(ask: Ask, seconds: float) -> float:
    """The same of ours."""
    batches = by_ours(ask)
    began, size, first = 0.0, 0, True
    async for batch in batches:
        if first:
            began, first = time.perf_counter(), False
            continue
        size += _size(batch, ask)
        if time.perf_counter() - began >= seconds:
            break
    took = time.perf_counter() - began
    await batches.aclose()  # type: ignore[attr-defined]
    return size / took


def main(name: str, store: str, *given: str) -> None:
    """Measure one, and say how it did."""
    window, batch, cells, chunks = map(int, given[:4])
    ask, seconds = Ask(store, window, batch, cells, chunks, given[4]), float(given[5])
    rate = asyncio.run(measured_ours(ask, seconds)) if name == "ours" else measured(name, ask, seconds)
    package = "streamtrain" if name == "ours" else name.partition(",")[0]
    print(json.dumps({"rate": rate, "version": importlib.metadata.version(package)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
