"""The trackers themselves, wandb offline and online and mlflow in a folder and a database, killed with their run and
resumed.

They get an environment of their own, made once (`.venv-trackers`), with the newest versions of what our extras name,
and with all that this one has beside it. A round is a run of some hundred steps, a line each, killed at three random
steps: for wandb once with all lines in its file, and once with those that it holds back lost; online, where the server
is one on loopback that keeps what it gets, with all there, with none, and with two of each life. Each line of the log
must stand in theirs once, with the values of `metrics.jsonl`, as their own readers tell, and as `wandb sync` sends it.
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
from tests.flows.test_trackers import fit, killed, logged, online, stored
from tests.flows.wandb_server import synced

ONLINE = ("online-arrived", "online-lost", "online-cut")
TRACKERS = ("wandb-kept", "wandb-lost", *ONLINE, "mlflow-folder", "mlflow-database")
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
        kills = sorted(random.Random(number).sample(range(5, STEPS - 5), KILLS))
        counts["kills"] += KILLS
        rows: list[dict[str, Any]] = []
        if which in ONLINE:
            rows = online(folder, which, kills, STEPS)
        else:
            for at in kills:
                killed(folder, which, at, STEPS)
            asyncio.run(fit(folder, which, steps=STEPS))
        told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        ours = [(row["step"], row["loss"]) for row in told if "loss" in row]
        if which.startswith("wandb"):
            rows = logged(folder)
            sent = synced(sorted((folder / "wandb").glob("offline-run-*")))
            counts["wrong"] += _losses(sent) != _losses(rows)
        theirs = stored(folder) if which.startswith("mlflow") else _losses(rows)
        steps = [step for step, _ in theirs]
        counts["lines"] += len(ours)
        counts["missing"] += len({step for step, _ in ours} - set(steps))
        counts["wrong"] += len(steps) - len(set(steps))
        counts["wrong"] += sum(not math.isclose(dict(ours)[step], value, rel_tol=1e-9) for step, value in theirs)
    return {"version": importlib.metadata.version(package), **counts}


def _losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


if __name__ == "__main__":
    print(json.dumps(campaign(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
