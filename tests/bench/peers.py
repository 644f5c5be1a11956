"""Shuffled batches from raw, zstd and blosc chunks, warm, against annbatch 0.3 with the zarrs pipeline.

annbatch needs Python 3.12: it gets an environment of its own, made once (`.venv-3.12-annbatch`). Both read stores of
several times our budget, in 128 and in 4,096 files, and mix as many runs of rows into a batch; a round is both of them
for some seconds each, in turn, start-up of the first batch included, each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import run as environments
from data_tools.convert import Codec
from data_tools.synth import synth
from streamtrain import ZarrStream
from streamtrain.peers import Peer, Task, compare
from tests.bench.measure import Measure, Options, ratios

COLUMNS, BATCH = 512, 256
BUDGET = "256MiB"
ROWS = 1 << 19
"""1 GiB of float32, four budgets."""
FILES = (128, 4096)
BARS: dict[Codec, float] = {"raw": 2.5, "zstd": 1.5, "blosc": 2.5}
WANTED = ["annbatch>=0.3,<0.4", "zarrs>=0.2.2"]


def run(options: Options) -> Iterator[Measure]:
    """The ratios, and the rates behind them."""
    found = environments.interpreter("3.12")
    if found is None:
        print("  no Python 3.12 is found: annbatch 0.3 needs it, and is not measured", flush=True)
        return
    python = environments.environment(found, "3.12-annbatch", WANTED)
    rows, seconds = (ROWS // 16, 0.5) if options.quick else (ROWS, 4.0)
    for codec, bar in BARS.items():
        for files in FILES:
            with options.room() as room:
                store = synth(room / "s.zarr", rows=rows, columns=COLUMNS, chunk_rows=rows // files, codec=codec)
                name = f"{codec}, {files} files"
                yield from measured(store, "x", str(python), name, bar, seconds, options.rounds)


def measured(
    store: Path, array: str, python: str, name: str, bar: float, seconds: float, rounds: int
) -> Iterator[Measure]:
    """Both over the same array, in turn."""
    task = _task(store, array, seconds)
    rates: dict[str, list[float]] = {"ours": [], "annbatch": []}
    setup = ""
    for number in range(rounds + 1):
        for each in ("ours", "annbatch") if number % 2 else ("annbatch", "ours"):
            if each == "ours":
                rate = _ours(store, array, seconds)
            else:
                [peer] = compare(["annbatch"], task, python=python)
                rate, setup = _rate(peer), peer.setup
            if number:  # before that files are read into memory
                rates[each].append(rate / 1e9)
    yield Measure(name=f"{name}: over annbatch", values=ratios(rates["ours"], rates["annbatch"]), at_least=bar)
    yield Measure(name="  ours", values=tuple(rates["ours"]), unit=" GB/s")
    yield Measure(name=f"  annbatch, {setup}", values=tuple(rates["annbatch"]), unit=" GB/s")


def _task(store: Path, array: str, seconds: float) -> Task:
    plan = ZarrStream(store, inputs=array, batch_size=BATCH, shuffle="block", memory=BUDGET, output="numpy").plan()
    return Task(
        store=str(store),
        arrays=(array,),
        batch_size=BATCH,
        shuffle=True,
        run_rows=plan.samples // plan.cells,
        runs=plan.cells_per_block,
        seconds=seconds,
    )


def _rate(peer: Peer) -> float:
    if peer.problem is not None:
        raise RuntimeError(f"annbatch: {peer.problem}")
    return peer.bytes_per_s


def _ours(store: Path, array: str, seconds: float) -> float:
    """Bytes a second, by the command that measures the loader alone."""
    command = [sys.executable, "-m", "streamtrain", "bench", str(store), "--inputs", array, "--shuffle", "--json"]
    command += ["--batch-size", str(BATCH), "--memory", BUDGET, "--cache", "0", "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["bytes_per_s"])
