"""What is done with a model while no fit needs it: it is evaluated, predicts, and is saved.

Its law: nothing here changes what a fit would go on with.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from streamtrain import checkpoint
from streamtrain.callbacks.lines import MetricsLog
from streamtrain.data.source import Stream
from streamtrain.disk import LOCAL, Disk
from streamtrain.ending import to_its_end
from streamtrain.errors import ConfigError, EnvironmentProblem
from streamtrain.events import Log
from streamtrain.file_thread import Files, file_thread
from streamtrain.life import Life
from streamtrain.outcome import Compute
from streamtrain.parts import Parts
from streamtrain.prediction import Prediction
from streamtrain.progress import Progress
from streamtrain.run_folder import RunFolder
from streamtrain.saving import folder_name
from streamtrain.streams import Streams, length, named_streams
from streamtrain.threads import train_thread

logger = logging.getLogger(__name__)


async def evaluate(parts: Parts, streams: Streams, prefix: str) -> dict[str, Any]:
    """The means over a stream, or over each of a dict, by their names behind `prefix`; tables are nested lists."""
    values: dict[str, Any] = {}
    evaluator = parts.evaluator
    if not (named := named_streams(streams)):
        raise ConfigError("there is no stream to evaluate on", hint="Give one, or a dict of them by name.")
    async with train_thread() as thread:
        rng = parts.drawing()
        for name, stream in named.items():
            await stream.open()
            stream.set_epoch(0)
            await thread.run(parts.to_device)
            limit = parts.options.batches(length(stream))
            means = await evaluator.run(stream, thread, rng, limit=limit)
            before = f"{prefix}{name}_" if name else prefix
            values |= {before + metric: value for metric, value in (means | evaluator.tables).items()}
    return values


async def log(folder: RunFolder, callbacks: Sequence[object], state: Progress, values: dict[str, float]) -> None:
    """A line of the log of a run that nobody trains just now; where it can't be written, that is said."""
    epoch = state.epoch if state.batch or not state.epoch else state.epoch - 1
    place: dict[str, Any] = {"epoch": epoch, "step": state.step, "samples": state.samples, "time": state.time}
    line = Log(split="test", values=values, **place)
    async with file_thread() as files:
        try:
            async with _held(folder, files):
                for callback in callbacks:
                    if isinstance(callback, MetricsLog):
                        await callback.append(folder.path, line)
        except EnvironmentProblem as error:
            logger.warning("the evaluation is not in the log: %s", error)


async def predict(
    parts: Parts, stream: Stream, compute: Compute, out: Path | None, *, overwrite: bool, give: bool
) -> AsyncGenerator[Any, None]:
    """What the model makes of each batch, given, or written to a store at `out`."""
    async with train_thread() as thread:
        await stream.open()
        await thread.run(parts.to_device)
        prediction = Prediction(parts.evaluator, thread, parts.drawing(), compute)
        if out is None:
            made = prediction.given(stream)
        else:
            made = prediction.written(stream, out, overwrite=overwrite, give=give)
        async with aclosing(made) as outputs:
            async for output in outputs:
                yield output
                del output  # it may hold a batch of the stream


async def save(
    parts: Parts, life: Life, position: Any, target: Path | None, run_dir: Path | None, *, disk: Disk = LOCAL
) -> Path:
    """Commit a checkpoint of where the run stands, at `target` or in the run's folder; `position`: of the training
    stream, if it is not where that stands now. Raises CheckpointError."""
    life.check_whole()
    async with file_thread() as files, train_thread() as thread:
        await thread.run(parts.take_up)
        state = life.state()
        if position is not None:
            state["stream"] = position
        snapshot = await thread.run(lambda: life.snapshot(state))
        if target is not None:
            return (await files(lambda: checkpoint.commit(target, snapshot, disk=disk))).path
        assert run_dir is not None
        folder = RunFolder(run_dir, disk=disk)
        async with _held(folder, files):
            path = folder.checkpoints / folder_name(life.progress.step)
            return (await files(lambda: checkpoint.commit(path, snapshot, replace=True, disk=disk))).path


@asynccontextmanager
async def _held(folder: RunFolder, files: Files) -> AsyncIterator[None]:
    """Hold a run's folder; it is given free behind whatever the thread does, however often we are cancelled."""
    try:
        await files(folder.lock)
        yield
    finally:
        await to_its_end(files(folder.release), "streamtrain-release")
