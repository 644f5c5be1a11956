"""The command `fit`: from a resolved configuration to a finished run and its exit code.

Its law: all that can be refused is refused before anything is written; and a signal never loses a finished step.
"""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from streamtrain import assembly
from streamtrain.callbacks.base import Callback
from streamtrain.config import differences, resolve
from streamtrain.config_tables import Config
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.events import TrainBegin
from streamtrain.log_file import LogFile, logged
from streamtrain.run_folder import RunFolder
from streamtrain.said import Said, read
from streamtrain.spelling import nearest, shown
from streamtrain.watch import HEAVY, Watch

if TYPE_CHECKING:
    from streamtrain.data.stream import ZarrStream
    from streamtrain.progress import FitResult
    from streamtrain.trainer import Trainer

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def log_level(name: str | None, *, quiet: bool, verbose: bool, option: str = "--log-level") -> int:
    """The level that `--log-level`, `-q` and `-v` ask for; the first wins."""
    if name is None:
        return LEVELS["warning" if quiet else "debug" if verbose else "info"]
    if name.lower() not in LEVELS:
        close = nearest(name, LEVELS)
        raise ConfigError(
            f"{option} must be {', '.join(LEVELS)}, got {shown(name)}",
            hint=f"Did you mean {close}?" if close else "info is the default.",
        )
    return LEVELS[name.lower()]


def run(
    config: Config, said: Said, *, level: int, quiet: bool, to_file: int = logging.INFO, profile: bool = False
) -> tuple[int, list[str], str]:
    """Train; the exit code, what to tell the user at the end, and what to tell where that can't be written.

    A SIGINT, SIGTERM or SIGHUP has the step finished and the run saved: the exit code is 128 + its number.
    """
    config = in_folder(config, said)
    if config.trainer.run_dir is not None:
        refuse_other_run(config, config.trainer.run_dir)
    with logged(level, to_file=to_file) as log, Watch(config.trainer.grace) as watch:
        watch.load(*HEAVY)
        begun = Begun(watch, config, log)
        job = assembly.build(config, said, callbacks=(begun, *_progress(config, quiet), *_profiler(config, profile)))
        begun.trainer = job.trainer
        if quiet:
            job.trainer.callbacks[:] = [each for each in job.trainer.callbacks if not isinstance(each, progress_bar())]
        weights = None if _goes_on(config) else config.model.weights
        result = asyncio.run(_train(job, watch, weights, partial=config.model.partial))
    return watch.exit_code(result.reason), report(result, config), unreported(result, config)


def rehearse(config: Config, said: Said, *, level: int) -> list[str]:
    """Build everything and open the data, but train and write nothing; what would be done."""
    with logged(level):
        job = assembly.build(config, said)
        asyncio.run(_opened(job))
        lines = [_model_line(job.trainer), f"train on {_stream_line(job.train)}"]
        if job.validation is not None:
            lines.append(f"validate on {_stream_line(job.validation)}")
    where = in_folder(config, said).trainer.run_dir or "no folder"
    limits = ", ".join(f"{key} {value}" for key, value in job.limits.items()) or "max_epochs 1"
    return [*lines, f"would train to {limits} in {where}", "nothing was written"]


def in_folder(config: Config, said: Said) -> Config:
    """The same with a run folder: the one that was asked for, or a new one; none for `fast_dev_run`.

    A config.toml that lies in a run's folder stands for that folder, wherever it was moved to.
    """
    folder = config.trainer.run_dir
    if ("trainer", "run_dir") not in said.origins and _lies_in_a_run(said.file):
        folder = os.path.dirname(said.file) or "."
    if folder is None and not config.trainer.fast_dev_run:
        folder = default_folder(config, said)
    if folder == config.trainer.run_dir:
        return config
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"run_dir": folder})})


def _lies_in_a_run(file: str) -> bool:
    folder, name = os.path.split(file)
    return name == "config.toml" and os.path.isdir(os.path.join(folder, "checkpoints"))


def default_folder(config: Config, said: Said) -> str:
    """`runs/<name>-<time>`, named after the configuration file or else the data; it does not exist yet."""
    store = config.data.store if isinstance(config.data.store, str) else config.data.store[0]
    name = Path(said.file or store.rstrip("/")).stem or "run"
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    folder = base = os.path.join("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    number = 1
    while os.path.lexists(folder):
        number += 1
        folder = f"{base}-{number}"
    return folder


def refuse_other_run(config: Config, folder: str) -> None:
    """Refuse a folder whose run was made with another configuration, and say what differs.

    Raises CheckpointError where there is something to resume, else ConfigError.
    """
    path = os.path.join(folder, "config.toml")
    if not os.path.lexists(path):
        return
    before = read(path)
    try:
        old = resolve(before).tables()
    except ConfigError:  # written by another version
        old = before.tables
    changed = differences(old, config.tables())
    if not changed:
        return
    what = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
    hint = f"Set these back as {path} has them, or choose another --run-dir."
    if config.fit.resume is not None and glob.glob(os.path.join(glob.escape(folder), "checkpoints", "step-*")):
        raise CheckpointError(f"the checkpoints in {folder} belong to another configuration: {what}", hint=hint)
    raise ConfigError(f"the run folder {folder} was made with another configuration: {what}", hint=hint)


def report(result: FitResult, config: Config) -> list[str]:
    """How it went and where everything lies."""
    why = result.reason if not result.detail else f"{result.reason} ({result.detail})"
    lines = [f"{why}: epoch {result.epoch}, step {result.step}, {result.samples} samples"]
    if result.metrics:
        lines.append("  " + ", ".join(f"{name} {value:.6g}" for name, value in result.metrics.items()))
    if result.best is not None:
        lines.append(f"  best {result.best.monitor} {result.best.value:.6g} at step {result.best.step}")
    folder = config.trainer.run_dir
    if folder is not None and result.checkpoint is not None:
        lines.append(f"  run folder {folder}, newest checkpoint {Path(result.checkpoint).name}")
    if folder is not None and result.reason in ("signal", "stopped", "max_time"):
        lines.append(f"  carry on: streamtrain fit {os.path.join(folder, 'config.toml')} --resume auto")
    return lines


def unreported(result: FitResult, config: Config) -> str:
    """The same in one sentence, for an error's hint."""
    where = f" and saved in {config.trainer.run_dir}" if result.checkpoint is not None else ""
    return f"The training itself is done ({result.reason}){where}; only its report is lost."


class Begun(Callback):
    """Once everything is checked and restored: keeps the configuration, opens log.txt, passes on an early signal."""

    def __init__(self, watch: Watch, config: Config, log: LogFile) -> None:
        self.watch, self.config, self.log = watch, config, log
        self.trainer: Trainer | None = None

    def on_train_begin(self, event: TrainBegin) -> None:
        if event.run_dir is not None:
            RunFolder(event.run_dir).write_config(self.config.dumps())
            self.log.open(Path(event.run_dir))
        if self.trainer is not None:
            self.watch.begins(self.trainer)


async def _train(job: assembly.Job, watch: Watch, begins_with: str | None, *, partial: bool) -> FitResult:
    async with _closing(job):
        watch.begins(job.trainer)
        if begins_with is not None:
            await job.trainer.load_weights(begins_with, partial=partial)
        return await job.trainer.fit(job.train, validation=job.validation, **job.limits)


def _goes_on(config: Config) -> bool:
    """Whether the run has checkpoints, whose weights it goes on with."""
    folder = config.trainer.run_dir
    if folder is None or not glob.glob(os.path.join(glob.escape(folder), "checkpoints", "step-*")):
        return config.fit.resume not in (None, "auto")
    return True


async def _opened(job: assembly.Job) -> None:
    async with _closing(job) as streams:
        for stream in streams:
            await stream.open()


@asynccontextmanager
async def _closing(job: assembly.Job) -> AsyncIterator[list[ZarrStream]]:
    streams = [stream for stream in (job.train, job.validation) if stream is not None]
    try:
        yield streams
    finally:
        for stream in streams:
            await stream.aclose()


def progress_bar() -> type[Callback]:
    """The class, whose import takes a moment."""
    from streamtrain.callbacks.progress_bar import ProgressBar

    return ProgressBar


def _progress(config: Config, quiet: bool) -> Sequence[Callback]:
    """The progress bar, unless nobody wants it or the configuration has its own."""
    named = [assembly.plain(callback.name) for callback in config.callbacks or ()]
    if quiet or "progressbar" in named:
        return ()
    return (progress_bar()(),)


def _profiler(config: Config, profile: bool) -> Sequence[Callback]:
    """The profiler, if it was asked for and the configuration has none of its own."""
    if not profile or "profiler" in [assembly.plain(callback.name) for callback in config.callbacks or ()]:
        return ()
    from streamtrain.callbacks.profiler import Profiler

    return (Profiler(),)


def _model_line(trainer: Trainer) -> str:
    from torch.nn.parameter import is_lazy

    parameters = list(trainer.model.parameters())
    lazy: list[bool] = [bool(is_lazy(parameter)) for parameter in parameters]
    known = sum(parameter.numel() for parameter, later in zip(parameters, lazy, strict=True) if not later)
    later = f" and {sum(lazy)} tensors whose size the first batch tells" if any(lazy) else ""
    return f"model {type(trainer.model).__name__}: {known} parameters{later}"


def _stream_line(stream: ZarrStream) -> str:
    return f"{stream.num_samples} samples in {len(stream)} batches of {stream.batch_size}"
