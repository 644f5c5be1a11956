"""Data of eight times a cgroup's memory limit, cold: our rate over the disk's own, and what memory that takes.

Both run as processes within the limit, in turn, on the same files, each dropped from the page cache before: `plain`
reads them one after another, a large piece at a time, and does nothing with them; ours gives shuffled batches, held
against the manifest as in a first epoch. `python -m tests.bench.cgroup GROUP STORE MEMORY|plain` is one of them.
Memory is private and shared memory over that of an open stream: file pages are the kernel's to take back.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_tools.synth import synth
from tests.bench.groups import Group, limited
from tests.bench.measure import Measure, Options, ratios
from tests.bench.memory import resident

MIB = 1 << 20
TIMES = 8
"""So many times the limit is there to read."""
EVERY = 0.02
"""Seconds between two looks at the memory of ours."""


@dataclass(frozen=True)
class Life:
    """What one process came to."""

    rate: float
    """Bytes a second, from the first request to the last batch."""
    peak: int
    """Most bytes over an open stream."""
    code: int


def run(options: Options) -> Iterator[Measure]:
    """The share of the disk's rate, memory over the budget, and processes that were killed."""
    limit, memory, chunk_rows = (256, 96, 512) if options.quick else (512, 256, 4096)
    with limited(limit * MIB) as group, options.room() as room:
        store = synth(room / "s.zarr", rows=(TIMES * limit * 512) // (4 if options.quick else 1), chunk_rows=chunk_rows)
        lives: dict[str, list[Life]] = {"plain": [], "ours": []}
        for number in range(1 if options.quick else options.rounds):
            for name in ("plain", "ours") if number % 2 else ("ours", "plain"):
                drop(store)
                lives[name].append(_life(group, store, f"{memory}MiB" if name == "ours" else name))
        kills = group.kills + sum(life.code != 0 for each in lives.values() for life in each)
    rates = {name: [life.rate / 1e9 for life in each] for name, each in lives.items()}
    what = f"{TIMES if not options.quick else TIMES // 4} times the limit of {limit} MiB"
    yield Measure(name=f"{what}, cold: of the disk's rate", values=ratios(rates["ours"], rates["plain"]), at_least=0.9)
    peaks = tuple(life.peak / MIB / memory for life in lives["ours"])
    yield Measure(name=f"  peak over memory={memory}MiB", values=peaks, at_most=1.05)
    yield Measure(name="  processes killed or failed", values=(float(kills),), at_most=0)
    for name, values in rates.items():
        yield Measure(name=f"  {name}", values=tuple(values), unit=" GB/s")


def files_of(store: Path) -> list[Path]:
    """The chunks of `x`, in order."""
    return sorted((path for path in (store / "x" / "c").rglob("*") if path.is_file()), key=lambda p: int(p.parent.name))


def drop(store: Path) -> None:
    """Have the kernel forget these files' pages."""
    for path in files_of(store):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)  # pages that are not written yet stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _life(group: Group, store: Path, what: str) -> Life:
    command = [sys.executable, "-m", "tests.bench.cgroup", str(group.folder), str(store), what]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "open\n":
            return Life(0.0, 0, process.wait() or -1)
        before = statistics.median(resident(process.pid) for _ in range(5))
        process.stdin.write("go\n")
        process.stdin.flush()
        most = 0
        with suppress(ProcessLookupError, FileNotFoundError):
            while process.poll() is None:
                most = max(most, resident(process.pid))
                time.sleep(EVERY)
        text = process.stdout.read().strip()
    return Life(float(text or 0), int(most - before), process.returncode)


# ---- in a process of its own, within the limit


def plain(store: Path) -> int:
    """Read all files in order; how many bytes."""
    buffer, size = bytearray(8 * MIB), 0
    for path in files_of(store):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        at = 0
        while count := os.preadv(fd, [buffer], at):
            at += count
        os.close(fd)
        size += at
    return size


async def ours(store: Path, memory: str) -> None:
    """Shuffled batches of all rows."""
    from streamtrain import ZarrStream

    stream = ZarrStream(store, inputs="x", batch_size=256, shuffle="block", memory=memory, output="numpy")
    async with stream:
        stream.__len__()
        began = _told()
        size = 0
        async for batch in stream:
            size += batch.inputs.nbytes
        print(size / (time.perf_counter() - began), flush=True)


def _told() -> float:
    """Say that all is open, and wait for the word to go."""
    print("open", flush=True)
    sys.stdin.readline()
    return time.perf_counter()


def main(group: Path, store: Path, what: str) -> None:
    """Join the group and do one or the other."""
    Group(group, group).join()
    if what == "plain":
        began = _told()
        size = plain(store)
        print(size / (time.perf_counter() - began), flush=True)
    else:
        asyncio.run(ours(store, what))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
