"""How long `--help` takes, against an app of cyclopts with nothing in it: in processes of their own, in turn."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.measure import Measure, Options, ratios

EMPTY = """\
import cyclopts

app = cyclopts.App()


@app.default
def main():
    pass


app()
"""
HEAVY = """\
import sys
from streamtrain.cli import main

main(["--help"])
print(*sorted({"torch", "numpy", "zarr"} & set(sys.modules)), file=sys.stderr)
"""


def run(options: Options) -> Iterator[Measure]:
    """The ratio, and what is loaded that should not be."""
    ours: list[float] = []
    empty: list[float] = []
    with options.room() as room:
        app = room / "app.py"
        app.write_text(EMPTY)
        turns = [(ours, ["-m", "streamtrain", "--help"]), (empty, [str(app), "--help"])]
        for number in range(1 + (3 if options.quick else 3 * options.rounds)):
            for times, arguments in turns if number % 2 else reversed(turns):
                seconds = _seconds(arguments)
                if number:  # the first has files read from disk and modules compiled
                    times.append(seconds)
    yield Measure(name="--help over an empty app", values=ratios(ours, empty), at_most=2)
    yield Measure(name="  --help", values=tuple(ours), unit=" s")
    yield Measure(name="torch, numpy, zarr loaded by --help", values=(len(loaded_by_help()),), at_most=0)


def loaded_by_help() -> list[str]:
    """Which of torch, numpy and zarr are imported for `--help`."""
    made = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=True)
    return made.stderr.split()


def _seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=Path.cwd())
    return time.perf_counter() - began
