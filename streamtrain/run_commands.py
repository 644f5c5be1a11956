"""The commands on a checkpoint, `validate`, `evaluate` and `predict`: from a run to numbers, or to a store.

Their law: model, loss and metrics are the run's own; which samples, and how they are read, is what is said here, and
what is not said is as a validation has it: each sample once, in order, all of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streamtrain import assembly
from streamtrain.config import resolve
from streamtrain.config_tables import Config
from streamtrain.errors import ConfigError
from streamtrain.log_file import logged
from streamtrain.said import Said, read
from streamtrain.watch import HEAVY, Watch

logger = logging.getLogger(__name__)

Command = Literal["validate", "evaluate", "predict"]
CHOSEN = ("split", "indices", "groups")
"""Keys of `[data]` that say which samples are trained on: a prediction is of all, unless it is told otherwise."""


@dataclass(frozen=True)
class Run:
    """What a command was given."""

    said: Said
    """Its configuration."""
    folder: str | None
    """Where its checkpoints lie."""
    checkpoint: str
    """`auto`, `best`, or the path of one."""


def find(run: str, checkpoint: str | None) -> Run:
    """From a run's folder, a checkpoint in one, or a configuration that names one. Raises ConfigError."""
    path = Path(run)
    if path.is_dir() and (path / "manifest.json").is_file() and checkpoint is None:
        path, checkpoint = path.resolve().parent.parent, str(path)
    if not path.is_dir():
        said = read(run)
        folder = _folder_of(said)
    elif (path / "config.toml").is_file():
        said, folder = read(str(path / "config.toml")), str(path)
    else:
        raise ConfigError(
            f"{run} has no config.toml: the model can't be made from it",
            hint="Give the folder of a run of `streamtrain fit`, or the configuration and --checkpoint PATH.",
        )
    if folder is None and checkpoint in (None, "auto", "best"):
        raise ConfigError(
            f"{run} names no run folder, where its checkpoints would lie",
            hint="Give the run's folder, such as runs/demo, or --checkpoint PATH.",
        )
    return Run(said, folder, checkpoint or "auto")


def _folder_of(said: Said) -> str | None:
    trainer = said.tables.get("trainer")
    beside = os.path.dirname(said.file) or "."
    if os.path.isdir(os.path.join(beside, "checkpoints")):
        return beside
    folder = trainer.get("run_dir") if isinstance(trainer, dict) else None
    return folder if isinstance(folder, str) else None


def measuring(run: Run, command: Command, typed: Iterable[tuple[str, str, object]]) -> Config:
    """The configuration with the stream that is gone through as `[validation]`. Raises ConfigError."""
    said, tables = run.said, run.said.tables
    if command == "predict":
        tables["validation"] = {}
        if isinstance(tables.get("data"), dict):
            tables["data"] = {key: value for key, value in tables["data"].items() if key not in CHOSEN}
    elif "validation" not in tables:
        logger.info("the run has no [validation]: its training data is measured; --data, --split choose others")
        tables["validation"] = {}
    for origin, key, value in typed:
        said.assign(origin, key.replace("data.", "validation.", 1) if key.startswith("data.") else key, value)
    config = resolve(said)
    stream = config.validation
    if stream is not None and stream.normalize == "stats" and stream.store != config.data.store:
        logger.warning(
            "normalize = 'stats': %s is normalised by its own statistics, not by those of the training data; "
            "--normalize '{name = [mean, std]}' gives others",
            stream.store,
        )
    whole = {"fast_dev_run": False, "limit_batches": None, "overfit_batches": None, "run_dir": run.folder}
    return config.model_copy(update={"trainer": config.trainer.model_copy(update=whole)})


def measure(
    run: Run, command: Literal["validate", "evaluate"], typed: Iterable[tuple[str, str, object]], *, level: int
) -> dict[str, float]:
    """The means of `validate` or `evaluate`."""
    with logged(level):
        config = measuring(run, command, typed)
        with Watch(config.trainer.grace) as watch:
            watch.load(*HEAVY)
            job = assembly.build(config, run.said)
            work = _on(job, run, getattr(job.trainer, command))
            values: dict[str, float] = asyncio.run(watch.cancelling(work))
    return values


def predict(run: Run, out: str, typed: Iterable[tuple[str, str, object]], *, overwrite: bool, level: int) -> Path:
    """Write predictions to `out`."""
    with logged(level):
        config = measuring(run, "predict", typed)
        with Watch(config.trainer.grace) as watch:
            watch.load(*HEAVY)
            job = assembly.build(config, run.said)
            work = _on(job, run, lambda stream: job.trainer.predict(stream, out, overwrite=overwrite))
            written: Path = asyncio.run(watch.cancelling(work))
    return written


async def _on(job: assembly.Job, run: Run, go: Any) -> Any:
    try:
        await job.trainer.load_checkpoint(run.checkpoint)
        return await go(job.validation)
    finally:
        for stream in (job.train, job.validation):
            if stream is not None:
                await stream.aclose()


def in_words(values: dict[str, float], *, as_json: bool) -> list[str]:
    """A line for each number, or one JSON object; what is not finite is null there."""
    if not as_json:
        return [f"{name} {value:.6g}" for name, value in values.items()]
    finite = {name: value if abs(value) < float("inf") else None for name, value in values.items()}
    return [json.dumps(finite)]
