"""Other loaders over the same store, each in a process of its own, set up as its documentation recommends.

Its law: the others read the same arrays and mix as many runs of rows into a batch as our stream does, where they can
mix at all; what is not installed, or does not work here, is said in its place.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDS = {"zarr": ("zarr",), "dataloader": ("torch",), "xbatcher": ("xbatcher", "xarray"), "annbatch": ("annbatch",)}
"""The packages that each of them is made of, by the name that --compare takes."""
GRACE = 120.0
"""Seconds beyond its time that a process may take to import, start and end."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is read, and for how long."""

    store: str
    arrays: tuple[str, ...]
    """Inputs, then targets; one that is "" stands for the store itself."""
    batch_size: int
    shuffle: bool
    run_rows: int
    """Rows that lie together: of a chunk."""
    runs: int
    """So many runs are drawn at random and permuted together."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How another loader did."""

    name: str
    version: str = ""
    setup: str = ""
    """How it was set up."""
    samples_per_s: float = 0.0
    bytes_per_s: float = 0.0
    first_batch_s: float = 0.0
    peak_rss_bytes: int = 0
    """Of its process, and of the workers that it started."""
    problem: str | None = None
    """Why there are no figures."""

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.name}: {self.problem}"
        rate = f"{self.samples_per_s:,.0f} samples/s, {self.bytes_per_s / 2**20:,.1f} MiB/s"
        memory = f"peak memory {self.peak_rss_bytes / 2**20:,.0f} MiB"
        return f"{self.name} {self.version}: {rate}; {memory}; {self.setup}"


def compare(names: Sequence[str], task: Task, *, python: str = sys.executable) -> Iterator[Peer]:
    """Measure each of them in a process of its own, one after another."""
    for name in names:
        yield _apart(name, task, python)


def _apart(name: str, task: Task, python: str) -> Peer:
    command = [python, os.path.abspath(__file__), name, json.dumps(dataclasses.asdict(task))]
    limit = task.seconds + GRACE
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Peer(name=name, problem=f"it had not ended after {limit:g} s")
    try:
        return Peer(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return Peer(name=name, problem=f"it failed: {last:.300}")


# ---- in the process of the other


def measured(name: str, task: Task) -> Peer:
    """Take batches from it until the time is over. Runs in its process."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            return Peer(name=name, problem=f"not installed (pip install {package})")
    batches, setup = LOADERS[name](task)
    samples = size = 0
    first = 0.0
    began = time.perf_counter()
    for parts in batches:
        samples += len(parts[0])
        size += sum(part.nbytes for part in parts)
        first = first or time.perf_counter() - began
        if time.perf_counter() - began >= task.seconds:
            break
    took, peak = time.perf_counter() - began, _peak()
    return Peer(
        name=name,
        version=importlib.metadata.version(NEEDS[name][0]),
        setup=setup,
        samples_per_s=samples / took,
        bytes_per_s=size / took,
        first_batch_s=first,
        peak_rss_bytes=peak,
    )


def _peak() -> int:
    """Most resident bytes of this process and of those that it started and that still live."""
    try:
        children = Path("/proc/self/task").glob("*/children")
        return _most("self") + sum(_most(pid) for each in children for pid in each.read_text().split())
    except OSError:
        return _most("self")


def _most(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0


def opened(task: Task) -> list[Any]:
    """The arrays by zarr."""
    import zarr

    if task.arrays == ("",):
        return [zarr.open_array(task.store, mode="r")]
    group = zarr.open_group(task.store, mode="r")
    return [group[name] for name in task.arrays]


def mixed(arrays: list[Any], task: Task, first: int = 0, step: int = 1) -> Iterator[tuple[Any, ...]]:
    """Epochs of batches from runs of rows: each is read as a slice; `runs` of them, drawn at random, are permuted."""
    import numpy as np

    starts = np.arange(0, arrays[0].shape[0], task.run_rows)
    for epoch in itertools.count() if first * task.runs < len(starts) else ():
        rng = np.random.default_rng([epoch, first])
        order = np.random.default_rng(epoch).permutation(starts) if task.shuffle else starts
        for number in range(first * task.runs, len(order), step * task.runs):
            slices = [slice(start, start + task.run_rows) for start in order[number : number + task.runs]]
            block = [np.concatenate([np.asarray(array[part]) for part in slices]) for array in arrays]
            places = rng.permutation(len(block[0])) if task.shuffle else np.arange(len(block[0]))
            for at in range(0, len(places), task.batch_size):
                rows = places[at : at + task.batch_size]
                yield tuple(part[rows] for part in block)


Loading = tuple[Iterator[tuple[Any, ...]], str]
"""Its batches, and how it was set up."""


def by_zarr(task: Task) -> Loading:
    """zarr's own reading, a slice a run."""
    return mixed(opened(task), task), f"a slice a run, {task.runs} runs permuted in memory"


def by_dataloader(task: Task) -> Loading:
    """Torch's loader: iterable-style, as it says where random reads are expensive; a process a core."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Runs(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            info: Any = get_worker_info()
            for parts in mixed(opened(task), task, info.id, info.num_workers):
                yield tuple(torch.from_numpy(part) for part in parts)

    workers = len(os.sched_getaffinity(0))
    loader: Any = DataLoader(Runs(), batch_size=None, num_workers=workers)
    return iter(loader), f"an IterableDataset over zarr, {workers} workers, {task.runs} runs permuted in each"


def by_xbatcher(task: Task) -> Loading:
    """A BatchGenerator over a lazy Dataset: in order, since it has no other."""
    import dask.array
    import xarray
    import xbatcher

    wrap: Any = dask.array.from_zarr
    variables = {}
    for name, array in zip(task.arrays, opened(task), strict=True):
        dims = ("sample", *(f"{name}_{axis}" for axis in range(1, array.ndim)))
        variables[name or "array"] = (dims, wrap(array))
    dataset = xarray.Dataset(variables)

    def batches() -> Iterator[tuple[Any, ...]]:
        while True:
            for batch in xbatcher.BatchGenerator(dataset, input_dims={"sample": task.batch_size}):
                yield tuple(batch[name].values for name in variables)

    return batches(), "a BatchGenerator over dask arrays, in order: it does not shuffle"


def by_annbatch(task: Task) -> Loading:
    """Its Loader over the array, with the zarrs pipeline that it recommends; sparse batches are made dense, as ours."""
    import warnings

    import zarr
    from annbatch import Loader

    warnings.simplefilter("ignore")
    fast = importlib.util.find_spec("zarrs") is not None
    if fast:
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    [array, *others] = opened(task)
    sparse = isinstance(array, zarr.Group)
    if sparse:
        from anndata.io import sparse_dataset

        array = sparse_dataset(array)
    rows, slices = _whole_batches(task)
    options: dict[str, Any] = {"chunk_size": rows, "preload_nchunks": slices, "batch_size": task.batch_size}
    loader: Any = Loader(**options, shuffle=task.shuffle, preload_to_gpu=False, to=None).add_dataset(array)

    def batches() -> Iterator[tuple[Any, ...]]:
        while True:
            for batch in loader:
                yield (batch["X"].toarray() if sparse else batch["X"],)

    beside = "; the first array alone, since it reads one" if others else ""
    return batches(), f"{slices} slices of {rows} rows ahead, {'zarrs' if fast else 'no zarrs'}{beside}"


def _whole_batches(task: Task) -> tuple[int, int]:
    """Rows of a slice and slices at a time, as near to the task's as what annbatch asks for: whole batches."""
    step = task.batch_size // math.gcd(task.batch_size, task.run_rows)
    if step > 2 * task.runs:
        return max(1, task.run_rows // task.batch_size) * task.batch_size, task.runs
    return task.run_rows, -(-task.runs // step) * step


LOADERS: dict[str, Callable[[Task], Loading]] = {
    "zarr": by_zarr,
    "dataloader": by_dataloader,
    "xbatcher": by_xbatcher,
    "annbatch": by_annbatch,
}


def main(name: str, text: str) -> None:
    """Measure one and say so in one line of JSON."""
    given = json.loads(text)
    done = measured(name, Task(**{**given, "arrays": tuple(given["arrays"])}))
    sys.stdout.write(f"\n{json.dumps(dataclasses.asdict(done))}\n")


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    main(*sys.argv[1:])
