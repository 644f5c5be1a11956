"""What a pass takes: private and shared memory of a process, watched from outside, over that of an open stream.

A pass over 4 GiB with memory="256MiB" must stay within that and a tenth. File pages (RssFile) are the kernel's to take
back and do not count.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_tools.convert import Codec
from data_tools.synth import synth
from tests.bench.measure import Measure, Options

MIB = 1 << 20
EVERY = 0.005
"""Seconds between two looks."""
COUNTED = re.compile(rb"Rss(?:Anon|Shmem):\s+(\d+) kB")


@dataclass(frozen=True)
class Peak:
    """What a process took."""

    open: int
    """Bytes with torch imported and the store open."""
    most: int
    """The most during the pass, over that."""
    looks: int


def run(options: Options) -> Iterator[Measure]:
    """The peak over the budget, for raw and for compressed chunks."""
    size, memory = (512, 64) if options.quick else (4096, 256)
    chunk_rows, blocks = (1024, 8) if options.quick else (4096, None)
    codecs: tuple[Codec, ...] = ("raw", "zstd")
    for codec in codecs:
        with options.room() as room:
            store = room / "store.zarr"
            synth(store, rows=size * 512, chunk_rows=chunk_rows, codec=codec)
            rounds = 1 if options.quick else min(options.rounds, 3)
            peaks = [watched(store, f"{memory}MiB", blocks).most for _ in range(rounds)]
        yield Measure(
            name=f"{codec}: peak over memory={memory}MiB, {size} MiB of data",
            values=tuple(peak / MIB / memory for peak in peaks),
            at_most=1.1,
        )


def watched(store: Path, memory: str, blocks: int | None = None) -> Peak:
    """Have a process stream the store once, and look at its memory each 5 ms."""
    return watch(["tests.bench.reader", str(store), memory, *([str(blocks)] if blocks else [])])


def watch(module: Sequence[str]) -> Peak:
    """Run a module (and its arguments) that says `open`, waits for a line, and says how many samples it has seen."""
    command = [sys.executable, "-m", *module]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        time.sleep(0.2)
        before = statistics.median(resident(process.pid) for _ in range(5))
        process.stdin.write("go\n")
        process.stdin.flush()
        most, looks = 0, 0
        with suppress(ProcessLookupError, FileNotFoundError):
            while process.poll() is None:
                most, looks = max(most, resident(process.pid)), looks + 1
                time.sleep(EVERY)
        samples = process.stdout.read().strip()
    assert process.returncode == 0, process.returncode
    assert int(samples) > 0
    return Peak(int(before), int(most - before), looks)


def resident(pid: int) -> int:
    """RssAnon + RssShmem of a process, in bytes."""
    return sum(int(kib) << 10 for kib in COUNTED.findall(Path(f"/proc/{pid}/status").read_bytes()))
