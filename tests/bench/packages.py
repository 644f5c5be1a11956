"""Real optimizers and metrics of other packages: schedulefree, pytorch-optimizer, torchao, bitsandbytes, torchmetrics.

They get an environment of their own, made once (`.venv-packages`), in their newest versions, with all that this one has
beside it (torch too, which theirs would bring anew). Of each optimizer a run that is cut and resumed must end with the
weights of a bare loop; of torchmetrics' objects an evaluation in batches must say what they say of all samples at once.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import run as environments
from tests.bench.measure import Measure, Options
from tests.flows.test_packages import OPTIMIZERS, measured, through

WANTED = ["schedulefree", "pytorch_optimizer", "torchao", "bitsandbytes", "torchmetrics", "lightning-utilities"]
"""What they need beside torch, numpy and packaging is the last one's."""


def run(options: Options) -> Iterator[Measure]:
    """Optimizers whose weights, and metrics whose values, are others."""
    python = environments.environment(sys.executable, "packages", ["--no-deps", *WANTED], needs="schedulefree")
    (site,) = (python.parent.parent / "lib").glob("python*/site-packages")
    site.joinpath("beside.pth").write_text(sysconfig.get_path("purelib"))
    environment = {**os.environ, "PYTHONPATH": str(environments.ROOT)}
    with options.room() as room:
        command = [str(python), "-m", "tests.bench.packages", str(room)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found = json.loads(said.splitlines()[-1])
    for package, (other, of) in found.items():
        yield Measure(name=f"{package}: other than the bare loop's, of {of}", values=(other,), at_most=0)


async def campaign(room: Path) -> dict[str, Any]:
    """How many of each package's are others, and of how many; in the environment that has them."""
    found: dict[str, tuple[int, int]] = {}

    def count(package: str, other: bool) -> None:
        name = f"{package} {importlib.metadata.version(package)}"
        others, of = found.get(name, (0, 0))
        found[name] = others + other, of + 1

    for path, options in OPTIMIZERS.items():
        count(path.partition(".")[0], not await through(path, options, Path(tempfile.mkdtemp(dir=room)) / "run"))
    for said, own in (await measured(room / "metrics")).values():
        count("torchmetrics", not math.isclose(said, own, rel_tol=1e-4))
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(campaign(Path(sys.argv[1])))))
