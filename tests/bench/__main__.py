"""`python -m tests.bench NAME ... [--rounds N] [--quick] [--json]`: measure what the README claims; `all` for all.

A line a measure: its median, the spread over the rounds, the bar, and `ok` or `SHORT`. The exit code is 1 if one falls
short, 5 if the machine does not let one be measured.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from streamtrain.errors import EnvironmentProblem
from tests.bench.measure import Measure, Options, Others

BENCHES = {
    "rates": "batches a second from raw and zstd chunks, against the least that must be done, and against zarr",
    "copying": "shuffled batches from raw, zstd and blosc chunks, against copying and decoding in two threads",
    "loader": "as_loader against async for over the same stream",
    "overhead": "time per step of fit over a bare loop",
    "heartbeat": "how late a task on the loop runs beside fit, against one beside a bare loop in a thread",
    "waiting": "time that steps wait for data",
    "equal": "weights after fit against a bare loop with the same batches",
    "memory": "memory over that of an open stream, for a pass over 4 GiB in 256 MiB",
    "fit_memory": "the most memory that fit takes over a bare loop with the same batches",
    "million": "a million steps with all loggers: memory, rotated files, lines",
    "slow": "a step beside a callback that takes a second an event, over one without",
    "passes": "200 passes in one process: descriptors, threads, tasks and memory",
    "fits": "200 fits in one loop, and two at a time: what is left, and whether each is what it is alone",
    "crash": "a power cut after each operation of a save: every image of the disk that it may leave, 0 bad",
    "saves": "for how long a save of 1 GiB stops training, over torch.save and fsync of the same",
    "kill": "kill -9 at random instants, resume, compare weights; the same for the command with SIGTERM",
    "pipeline": "10,000 seeds of delays, errors and cancellations in random order: samples, cursor, budget, deadlocks",
    "cancels": "1,000 fits cancelled at random wake-ups of the loop, natively and by scopes: torn, lost, left behind",
    "terms": "SIGTERM to the command at 100 random instants: saved, steps lost, weights after resuming",
    "flips": "500 flipped bits, files of other lengths or kinds in a checkpoint: all told, the one before taken",
    "mutations": "500 changed metadata, manifests, states and headers: our own error, or what is right, in bounds",
    "kills": "kill -9 at 200 instants, at least 60 within a save: weights and metrics of the undisturbed run",
    "trackers": "real wandb (offline) and mlflow, newest, in a .venv-trackers: each line once after kill -9",
    "packages": "real schedulefree, pytorch-optimizer, torchao, bitsandbytes, torchmetrics, newest: 0 other than bare",
    "syscalls": "SIGKILL before every system call by which a save changes the disk (needs strace)",
    "dial": "block shuffle of data sorted by class: entropy of batches and loss after training, against a full shuffle",
    "shuffle": "whether shuffling is real",
    "cloud": "batches from S3 on loopback, 20 ms a request, against obstore fetching the same ranges",
    "diskcache": "zstd batches out of the disk cache against raw ones, and what filling it costs",
    "shards": "inner chunks of 64 KiB, against zarr's pipeline and zarrs'",
    "crops": "random crops of large fields, against cutting them in a transform, and zarr's slices",
    "peers": "shuffled raw, zstd and blosc batches, against annbatch in an environment of its own",
    "cgroup": "data of 8 times a memory limit, cold, against the disk's own rate (needs a cgroup that can be made)",
    "windows": "windows of 8 and 24 steps, against xbatcher + DataLoader and insitubatch",
    "csr": "shuffled batches of sparse rows, dense, against annbatch on the same AnnData store",
    "chaos": "1 % damaged chunks and 5 % read errors: whether an epoch ends and every sample is accounted for",
    "huge": "a billion samples in a million chunks: time to the first batch, position, memory of the order",
    "resumes": "resume in the middle of a billion samples: time to the first update, beyond loading the weights",
    "fashion": "Fashion-MNIST streamed, a small CNN: test accuracy, beside a bare loop's",
    "gaps": "flights with gaps and a sea with land in it: error on held-out data, over a bare loop's",
    "startup": "--help against an empty cyclopts app",
}


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    names = "\n".join(f"  {name:<10} {text}" for name, text in BENCHES.items())
    made = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=f"Measure, in ratios of one run, interleaved.\n\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="+", choices=[*BENCHES, "all"], metavar="NAME")
    made.add_argument("--rounds", type=int, default=7, help="7 by default")
    made.add_argument("--quick", action="store_true", help="small data: to see that it works, not what it gives")
    made.add_argument("--json", action="store_true", help="one JSON object")
    made.add_argument("--folder", type=Path, help="where data is made, and removed")
    return made


def main() -> int:
    """Run the named benchmarks; 1 if one falls short, 5 if one can't be measured on this machine."""
    given = parser().parse_args()
    options = Options(rounds=given.rounds, quick=given.quick, folder=given.folder)
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    if not given.json:
        print(f"{machine['cores']} cores, Python {machine['python']}", flush=True)
    made: list[Measure] = []
    refused = 0
    for name in BENCHES if "all" in given.names else given.names:
        run: Callable[[Options], Iterable[Measure]] = importlib.import_module(f"tests.bench.{name}").run
        others = Others()
        try:
            for measure in itertools.chain(run(options), _taken_by(others, name)):
                made.append(measure)
                if not given.json:
                    print(measure, flush=True)
        except EnvironmentProblem as problem:
            print(f"{name} can't be measured here: {problem}", file=sys.stderr, flush=True)
            refused = problem.exit_code
    if given.json:
        print(json.dumps({**machine, "measures": [measure.as_dict() for measure in made]}, indent=1))
    return refused if all(measure.ok for measure in made) else 1


def _taken_by(others: Others, name: str) -> Iterator[Measure]:
    yield Measure(name=f"{name}: of the processors, others took", values=(100 * others.share(),), unit=" %")


if __name__ == "__main__":
    sys.exit(main())
