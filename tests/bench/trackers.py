"""The trackers themselves, wandb offline and mlflow in a folder and a database, killed with their run and resumed.

They get an environment of their own, made once (`.venv-trackers`), with the newest versions of what our extras name,
and with all that this one has beside it. A round is a run of some hundred steps, a line each, killed at three random
steps: for wandb once with all lines in its file, and once with those that it holds back lost. Each line of the log must
stand in theirs once, with the values of `metrics.jsonl`, as their own readers tell, and as `wandb sync` sends it.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import math
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import run as environments
from tests.bench.measure import Measure, Options
from tests.flows.test_trackers import fit, killed, logged, stored
from tests.flows.wandb_server import synced

TRACKERS = ("wandb-kept", "wandb-lost", "mlflow-folder", "mlflow-database")
STEPS, KILLS = 150, 3


def run(options: Options) -> Iterator[Measure]:
    """Lines that are missing, and such as stand there twice or otherwise."""
    project = tomllib.loads((environments.ROOT / "pyproject.toml").read_text())["project"]
    wanted = [package for extra in ("wandb", "mlflow") for package in project["optional-dependencies"][extra]]
    python = environments.environment(sys.executable, "trackers", wanted, needs="wandb, mlflow, alembic")
    (site,) = (python.parent.parent / "lib").glob("python*/site-packages")
    site.joinpath("beside.pth").write_text(sysconfig.get_path("purelib"))
    for which in TRACKERS:
        folders = str(which == "mlflow-folder").lower()
        environment = {**os.environ, "PYTHONPATH": str(environments.ROOT), "MLFLOW_ALLOW_FILE_STORE": folders}
        with options.room() as room:
            rounds = 1 if options.quick else options.rounds
            command = [str(python), "-m", "tests.bench.trackers", str(room), which, str(rounds)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            counts = json.loads(said.splitlines()[-1])
        version = f"{which}, {counts['version']}, {counts['kills']} kills"
        yield Measure(name=f"{version}: lines of {counts['lines']} missing", values=(counts["missing"],), at_most=0)
        yield Measure(name="  lines twice, or with other values", values=(counts["wrong"],), at_most=0)


def campaign(room: Path, which: str, rounds: int) -> dict[str, Any]:
    """What came of so many runs; in the environment that has the tracker."""
    package = "mlflow-skinny" if which.startswith("mlflow") else "wandb"
    counts = {"kills": 0, "lines": 0, "missing": 0, "wrong": 0}
    for number in range(rounds):
        folder = Path(tempfile.mkdtemp(dir=room)) / "run"
        for at in sorted(random.Random(number).sample(range(5, STEPS - 5), KILLS)):
            killed(folder, which, at, STEPS)
            counts["kills"] += 1
        asyncio.run(fit(folder, which, steps=STEPS))
        told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        ours = [(row["step"], row["loss"]) for row in told if "loss" in row]
        if which.startswith("mlflow"):
            theirs = stored(folder)
        else:
            theirs = [(row["step"], row["loss"]) for row in logged(folder) if "loss" in row]
            sent = synced(sorted((folder / "wandb").glob("offline-run-*")))
            counts["wrong"] += [(row["step"], row["loss"]) for row in sent if "loss" in row] != theirs
        steps = [step for step, _ in theirs]
        counts["lines"] += len(ours)
        counts["missing"] += len({step for step, _ in ours} - set(steps))
        counts["wrong"] += len(steps) - len(set(steps))
        counts["wrong"] += sum(not math.isclose(dict(ours)[step], value, rel_tol=1e-9) for step, value in theirs)
    return {"version": importlib.metadata.version(package), **counts}


if __name__ == "__main__":
    print(json.dumps(campaign(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
