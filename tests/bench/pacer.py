"""One way to make steps, in a process of its own: `python -m tests.bench.pacer WAY BATCH COLUMNS WIDTH LAYERS FOLDER`.

For each number of steps that comes in a line, it makes so many and then twice as many, and answers in a line of JSON:
seconds and seconds of its thread's processor time that a step more takes, and the lines that metrics.jsonl lacks.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import streamtrain
from tests.bench.loops import Pace, Size, bare, fitted, missing

LOCAL = ("TensorBoard", "LearningRateMonitor", "ResourceMonitor", "Plots")
"""The callbacks that we ship and that need nobody else, beside the default ones; a Profiler is for a few steps."""
WAYS = ("fit", "fused", "default", "all")


def main() -> None:
    """Serve until nothing comes in any more."""
    way, *shape = sys.argv[1:6]
    size, folder = Size(*map(int, shape)), Path(sys.argv[6])
    bare(size, size.batches(100), fused=True)  # warm
    print(flush=True)
    for number, line in enumerate(sys.stdin):
        paces = [Pace(size.batches(steps)) for steps in (int(line), 2 * int(line))]
        seconds, gaps = [], 0
        for pace in paces:
            if way in ("fit", "all"):
                run_dir = folder / f"{way}-{number}-{len(pace)}"
                seconds.append(asyncio.run(fitted(size, pace, run_dir, local_callbacks if way == "all" else list)))
                gaps += missing(run_dir, len(pace))
            else:
                seconds.append(bare(size, pace, **({"fused": True} if way == "fused" else {})))
        more = len(paces[1]) - len(paces[0])
        print(json.dumps([(seconds[1] - seconds[0]) / more, (paces[1].cpu - paces[0].cpu) / more, gaps]), flush=True)


def local_callbacks() -> Sequence[object]:
    """One of each that is shipped and works without a service."""
    return [getattr(streamtrain, name)() for name in LOCAL]


if __name__ == "__main__":
    main()
