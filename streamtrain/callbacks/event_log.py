"""`events.jsonl`: the run's diary; a line for each thing that happened but batches and metrics, in all of its lives.

Nothing is ever cut off but a torn line: what a life did before it was killed remains to be read, and `train_begin` says
from which step the next one went on.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamtrain.callbacks.json_logger import finite, json_line, parsed
from streamtrain.callbacks.lines import LineLog, cut
from streamtrain.errors import StreamtrainError
from streamtrain.events import (
    CheckpointCommitted,
    CheckpointFailed,
    EpochBegin,
    EpochEnd,
    Event,
    ExceptionRaised,
    Interrupt,
    TrainBegin,
    TrainEnd,
    ValidationBegin,
    ValidationEnd,
)

MOST_NUMBERS = 4096
"""Of a table that is written; a confusion matrix of 64 classes."""


class EventLog(LineLog):
    """Writes `events.jsonl` in the run's folder: `event, at` (UTC), `step, epoch, samples, time`, and what is known."""

    file_name = "events.jsonl"

    def prepare(self, path: Path, step: int) -> None:
        """Cut off a torn line."""
        cut(path, lambda line: parsed(line) is not None, self._missing)

    def _write(self, name: str, event: Event, facts: Mapping[str, Any] | None = None) -> None:
        if self._file is not None:
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            place = {"step": event.step, "epoch": event.epoch, "samples": event.samples, "time": round(event.time, 6)}
            self._file.put(json_line({"event": name, "at": at, **place, **(facts or {})}))

    async def on_train_begin(self, event: TrainBegin) -> None:
        """A life of the run begins."""
        await super().on_train_begin(event)
        facts = {"pid": os.getpid(), "resumed_from": event.resumed_from}
        limits = {
            "max_epochs": event.max_epochs,
            "max_steps": event.max_steps,
            "steps_per_epoch": event.steps_per_epoch,
        }
        config = {"config": _plain(event.config)} if event.config else {}
        self._write("train_begin", event, facts | limits | config)

    async def on_train_end(self, event: TrainEnd) -> None:
        """It ends in an orderly way."""
        facts = {"reason": event.reason, "detail": event.detail, "metrics": finite(event.metrics), "used": _used()}
        try:
            self._write("train_end", event, facts)
        finally:
            await super().on_train_end(event)

    async def on_epoch_begin(self, event: EpochBegin) -> None:
        """An epoch begins, or goes on."""
        self._write("epoch_begin", event)

    async def on_epoch_end(self, event: EpochEnd) -> None:
        """Its last update was made."""
        self._write("epoch_end", event, {"metrics": finite(event.metrics), "used": _used()})

    async def on_validation_begin(self, event: ValidationBegin) -> None:
        """A validation begins."""
        self._write("validation_begin", event, {"batches": event.batches})

    async def on_validation_end(self, event: ValidationEnd) -> None:
        """It ends."""
        facts = {"sanity": event.sanity, "metrics": finite(event.metrics)}
        tables = {name: _shown_table(table) for name, table in event.tables.items()}
        self._write("validation_end", event, {**facts, "tables": tables} if tables else facts)

    async def on_checkpoint(self, event: CheckpointCommitted) -> None:
        """A checkpoint is durable."""
        facts = {"path": event.path, "kind": event.kind, "bytes": event.bytes, "seconds": round(event.seconds, 6)}
        facts["buffers"] = event.buffers
        self._write("checkpoint", event, facts)

    async def on_checkpoint_failed(self, event: CheckpointFailed) -> None:
        """A save failed."""
        facts = {"path": event.path, "kind": event.kind, "message": str(event.error), "failures": event.failures}
        self._write("checkpoint_failed", event, facts)

    async def on_exception(self, event: ExceptionRaised) -> None:
        """The fit is about to raise."""
        error = event.error
        hint = error.hint if isinstance(error, StreamtrainError) else ""
        self._write("exception", event, {"error": type(error).__name__, "message": str(error), "hint": hint})

    async def on_interrupt(self, event: Interrupt) -> None:
        """A stop was asked for."""
        self._write("interrupt", event, {"reason": event.reason, "detail": event.detail})


def _shown_table(table: list[Any]) -> Any:
    """A table as it is written; of a large one that it was left out."""
    numbers = _count(table)
    return _finite_table(table) if numbers <= MOST_NUMBERS else f"left out: {numbers} numbers"


def _count(table: Any) -> int:
    return sum(map(_count, table)) if isinstance(table, list) else 1


def _finite_table(table: Any) -> Any:
    """Nested lists of numbers as JSON can hold them: null for what is not finite."""
    if isinstance(table, list):
        return [_finite_table(part) for part in table]
    return None if isinstance(table, float) and not math.isfinite(table) else table


def _used() -> dict[str, float]:
    """What this process has used so far: seconds of CPU, and the most bytes that were resident."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu": round(used.ru_utime + used.ru_stime, 3), "peak_rss": used.ru_maxrss * 1024}


def _plain(value: Any) -> Any:
    """As JSON can hold it: what it has no form for as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
