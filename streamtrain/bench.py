"""The loader alone: how many samples and bytes a second a store gives, with no model behind it and no torch loaded.

Its law: what is measured is what `fit` would be handed, batch by batch, on an event loop; nothing is warmed up first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamtrain import assembly, peers
from streamtrain.config import resolve_data
from streamtrain.config_tables import DataTable
from streamtrain.data.budget import format_bytes
from streamtrain.errors import ConfigError
from streamtrain.inspection import with_inputs
from streamtrain.said import Said

if TYPE_CHECKING:
    from streamtrain.data.stream import ZarrStream


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured."""

    samples_per_s: float
    """Over all batches, the first with its start-up included."""
    bytes_per_s: float
    """Bytes of inputs and targets handed over, not bytes read."""
    first_batch_s: float
    """From asking for the first pass to its first batch; metadata were read before."""
    open_s: float
    """Reading metadata."""
    peak_rss_bytes: int
    """Most resident memory that this process ever had, mapped files included."""
    cpu_s: float
    """Processor time of all threads while reading."""
    seconds: float
    samples: int
    batches: int
    passes: int
    """Epochs begun."""
    stages: dict[str, Any]
    """The stream's own statistics, each told in `StreamStatistics`: sums over all passes, the rest of the last one."""
    compare: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Other loaders over the same store by name, each told in `Peer`; empty where none was asked for."""

    def dumps(self) -> str:
        """As one line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


GLOBAL_RUNS = 64
"""Runs of rows that the others mix where our stream shuffles all."""
SUMS = ("chunks", "bytes_read", "read_seconds", "decode_seconds", "gather_seconds", "transform_seconds")


def bench(said: Said, *, seconds: float, compare: Sequence[str] = ()) -> Measured:
    """Read the store for so long (one batch at least), in as many passes as that takes; then let others do it.

    Raises ConfigError for what the others can't be asked.
    """
    table = with_inputs(resolve_data(said))
    stream = assembly.stream(table, said, "data", output="numpy")
    if compare:
        _check_comparable(table)
    ours = asyncio.run(measure(stream, seconds))
    if not compare:
        return ours
    found = peers.compare(compare, _task(table, stream, seconds))
    return dataclasses.replace(ours, compare={peer.name: dataclasses.asdict(peer) for peer in found})


def _check_comparable(table: DataTable) -> None:
    if table.sample_axes != [0] or table.split is not None or table.ragged or not isinstance(table.store, str):
        raise ConfigError(
            "--compare reads one whole store, with samples along the first axis",
            hint="leave --split, --sample-axes and --ragged out",
        )


def _task(table: DataTable, stream: ZarrStream, seconds: float) -> peers.Task:
    """What the others read: the same arrays, mixed alike."""
    assert isinstance(table.store, str)
    plan = stream.plan()
    names = [table.inputs, table.targets]
    arrays = tuple(name for each in names for name in ([each] if isinstance(each, str) else each or []))
    mixing = GLOBAL_RUNS if table.shuffle == "global" else plan.cells_per_block
    return peers.Task(
        store=table.store,
        arrays=arrays or ("",),
        batch_size=table.batch_size,
        shuffle=bool(table.shuffle),
        run_rows=-(-plan.samples // plan.cells),
        runs=min(plan.cells, mixing),
        seconds=seconds,
    )


async def measure(stream: ZarrStream, seconds: float) -> Measured:
    """Take batches from `stream`, and drop them, until `seconds` are over."""
    opening = time.perf_counter()
    samples = batches = passes = size = 0
    first = 0.0
    sums: dict[str, float] = dict.fromkeys(SUMS, 0)
    told: dict[str, Any] = {}
    async with stream:
        began, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            passes += 1
            async for batch in stream:
                if not batches:
                    first = time.perf_counter() - began
                batches += 1
                samples += len(batch)
                size += _bytes(batch.inputs) + _bytes(batch.targets)
                if time.perf_counter() - began >= seconds:
                    break
            told = dataclasses.asdict(stream.statistics())
            sums = {name: sums[name] + told[name] for name in SUMS}
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        stages = {**told, **sums}
    return Measured(
        samples_per_s=samples / took,
        bytes_per_s=size / took,
        first_batch_s=first,
        open_s=began - opening,
        peak_rss_bytes=peak_rss(),
        cpu_s=cpu,
        seconds=took,
        samples=samples,
        batches=batches,
        passes=passes,
        stages=stages,
    )


def in_words(measured: Measured) -> Iterator[str]:
    """The same for people."""
    yield f"{measured.samples_per_s:,.0f} samples/s, {format_bytes(measured.bytes_per_s)}/s"
    yield f"  {measured.samples:,} samples in {measured.batches:,} batches, {measured.seconds:.2f} s"
    yield f"  first batch after {measured.first_batch_s * 1000:.1f} ms; metadata took {measured.open_s * 1000:.1f} ms"
    cores = measured.cpu_s / measured.seconds
    yield f"  processor {measured.cpu_s:.2f} s ({cores:.2f} cores); peak memory {format_bytes(measured.peak_rss_bytes)}"
    stages = measured.stages
    for name, lane in stages["lanes"].items():
        yield f"  {name} by {lane}"
    times = {name.removesuffix("_seconds"): stages[name] for name in stages if name.endswith("_seconds")}
    yield "  time of the threads: " + ", ".join(f"{name} {value:.2f} s" for name, value in times.items())
    for other in measured.compare.values():
        yield f"  {peers.Peer(**other)}"


def peak_rss() -> int:
    """Most resident bytes of this process; getrusage would count those of the process that started it."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if os.uname().sysname == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _bytes(part: Any) -> int:
    if isinstance(part, dict):
        return sum(map(_bytes, part.values()))
    if isinstance(part, tuple):  # sparse rows
        return sum(int(getattr(each, "nbytes", 0)) for each in part)
    return 0 if part is None else int(part.nbytes)
