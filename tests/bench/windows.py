"""Windows of 8 and 24 steps in shuffled batches of 32, from chunks of 1, 8 and 32 steps, warm: against the others.

xbatcher with torch's DataLoader (the quicker of no worker and two), and insitubatch 0.2 in an environment of its own
(`.venv-3.12-insitubatch`; it needs Python 3.12). Stores are four times the memory that ours may use, nothing decoded is
kept; insitubatch mixes as many chunks as we do. Each is a process of its own, in turn, without the start of the first
batch (which is worse for them).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr

import run as environments
from streamtrain import ZarrStream
from tests.bench import window_peers
from tests.bench.measure import Measure, Options, ratios

STEPS, SHAPE, BATCH, CELLS = 20480, (64, 128), 32, 4
"""640 MiB of float32; CELLS: of windows, that are mixed together."""
MEMORY = "160MiB"
WINDOWS, CHUNKS = (8, 24), (1, 8, 32)
WANTED = ["insitubatch>=0.2,<0.3"]
SOURCE = Path(window_peers.__file__)


def run(options: Options) -> Iterator[Measure]:
    """Ratios for each window and chunk, and over all of them."""
    steps, seconds = (512, 0.2) if options.quick else (STEPS, 2.0)
    windows, chunks = ((8,), (8,)) if options.quick else (WINDOWS, CHUNKS)
    python = None if options.quick else _insitubatch()
    over: dict[str, list[tuple[float, ...]]] = {}
    for chunk in chunks:
        with options.room() as room:
            store = _store(room / "s.zarr", steps, chunk)
            for window in windows:
                rates = _rates(store, window, chunk, seconds, 1 if options.quick else options.rounds, python)
                name = f"windows of {window}, chunks of {chunk}"
                for peer, theirs in rates.items():
                    if peer != "ours":
                        each = ratios(rates["ours"], theirs)
                        over.setdefault(peer, []).append(each)
                        bar = 1.5 if peer == "insitubatch" else 1
                        yield Measure(name=f"{name}: over {peer}", values=each, at_least=bar)
                yield Measure(name="  ours", values=tuple(rate / 1e9 for rate in rates["ours"]), unit=" GB/s")
    for peer, values in over.items():
        medians = tuple(statistics.median(each) for each in values)
        bar = 1.5 if peer == "insitubatch" else 5
        yield Measure(name=f"all windows and chunks: over {peer}", values=medians, at_least=bar)


def _insitubatch() -> str | None:
    """The Python of its environment."""
    found = environments.interpreter("3.12")
    if found is None:
        print("  no Python 3.12 is found: insitubatch 0.2 needs it, and is not measured", flush=True)
        return None
    return str(environments.environment(found, "3.12-insitubatch", WANTED))


def _store(path: Path, steps: int, chunk: int) -> Path:
    group, rng = zarr.create_group(path), np.random.default_rng(0)
    array = group.create_array(
        "x",
        shape=(steps, *SHAPE),
        chunks=(chunk, *SHAPE),
        dtype="float32",
        compressors=None,
        dimension_names=("time", "y", "z"),
    )
    for start in range(0, steps, 512):
        array[start : start + 512] = rng.standard_normal((min(512, steps - start), *SHAPE), dtype=np.float32)
    return path


def chunks_together(store: Path, window: int, chunk: int) -> int:
    """Chunks that insitubatch is told to mix: those of as many samples as we do, and at least as many runs."""
    plan = ZarrStream(
        store,
        inputs="x",
        window={"time": window},
        batch_size=BATCH,
        shuffle="block",
        shuffle_blocks=CELLS,
        memory=MEMORY,
        output="numpy",
    ).plan()
    return max(CELLS, round(plan.samples / plan.cells * plan.cells_per_block / chunk))


def _rates(
    store: Path, window: int, chunk: int, seconds: float, rounds: int, python: str | None
) -> dict[str, list[float]]:
    """Bytes a second of each, round by round."""
    together = chunks_together(store, window, chunk)
    ask = [str(store), *map(str, (window, BATCH, CELLS, together)), MEMORY, str(seconds)]
    names = ["xbatcher", "xbatcher, 2 workers"]
    best = max(names, key=lambda name: _rate(name, ask, None))
    names = ["ours", best, *(["insitubatch"] if python else [])]
    rates: dict[str, list[float]] = {name.partition(",")[0]: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            rates[name.partition(",")[0]].append(_rate(name, ask, python if name == "insitubatch" else None))
    return rates


def _rate(name: str, ask: list[str], python: str | None) -> float:
    start = [python, str(SOURCE)] if python else [sys.executable, "-m", "tests.bench.window_peers"]
    done = subprocess.run([*start, name, *ask], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-500:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["rate"])
