"""Files of lines for loggers: a hook puts a line into a list, a thread of our own writes what has gathered.

Its law: a line costs the event loop microseconds, and is in the file about a tenth of a second later. What a kill -9
takes with it from that last tenth travels in checkpoints as the log's state, so that a resumed file has no gap; lines
of steps beyond the checkpoint are cut off before the first new one is written, and so is a line torn in the middle.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import aiofiles

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.rolling import older, part_bytes, roll
from streamtrain.data.daemons import DaemonExecutor
from streamtrain.errors import EnvironmentProblem, StreamtrainError
from streamtrain.events import Log, TrainBegin, TrainEnd

logger = logging.getLogger(__name__)

GATHER = 0.1
"""Seconds for which lines gather before they are written together: one round trip to the thread for all of them."""

RETRY = 1.0
"""Seconds between two tries on a disk that is full."""
MOST_WAITING = 10_000
"""Lines that wait in memory for room on it; with more, or at the end of the fit, it is an error."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors that a disk without room gives."""

Change = Callable[[Path], None]
"""Blocking work on the file between two lines, while it is not open."""


class _Raw(Protocol):
    async def write(self, data: bytes, /) -> int: ...

    async def close(self) -> None: ...


class LineFile:
    """An append-only file of lines; used from one event loop, from `open` to `close`.

    Once it has `most` bytes it becomes a part (streamtrain.callbacks.rolling) and a new one begins, `headed` with the
    same first line.
    """

    def __init__(self, path: Path, *, most: int | None = None, headed: bool = False) -> None:
        self.path = path
        self._most, self._headed, self._size = most, headed, 0
        self._executor = DaemonExecutor(1, f"streamtrain-{path.name}")
        self._raw: _Raw | None = None
        self._waiting: list[str | Change] = []
        self._taken: list[str | Change] = []
        self._hurry = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._failure: StreamtrainError | None = None

    async def open(self, prepare: Change) -> None:
        """Have `prepare(path)` run in the thread, then open the file. Raises EnvironmentProblem where the disk refuses.

        Whatever else goes wrong, here or later, is a StreamtrainError with the reason.
        """
        try:
            await self._run(prepare)
            await self._reopen()
        except Exception as error:
            self._executor.shutdown(wait=False)
            raise self._problem(error) from error

    def put(self, line: str) -> None:
        """Write this line, newline included, soon; once there is room, where the disk is full, which is said.

        Raises if an earlier one could not be written, and says why.
        """
        self._put(line)

    def change(self, change: Change) -> None:
        """Have `change(path)` run in the thread after the lines put so far and before those put later."""
        self._put(change)

    def _put(self, item: str | Change) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiting.append(item)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_out(), name=f"streamtrain-{self.path.name}")

    def unwritten(self) -> list[str]:
        """Lines that may not be in the file yet; from any thread."""
        waiting = list(self._waiting)  # first: what moves to `taken` meanwhile is then seen twice, never missed
        return list(dict.fromkeys(item for item in [*self._taken, *waiting] if isinstance(item, str)))

    async def close(self) -> None:
        """Write what waits, close the file and end the thread. Raises if a line is missing and nobody was told."""
        self._hurry.set()
        told, idle = self._failure is not None, False
        try:
            if self._writer is not None:
                await self._writer
            if self._raw is not None:
                await self._raw.close()
            idle = True
        except Exception as error:
            self._failure, idle = self._problem(error), True
        finally:
            # If we are cancelled the thread may be in the middle of something: then it ends by itself.
            self._executor.shutdown(wait=idle, cancel_futures=True)
        if self._failure is not None and not told:
            raise self._failure

    async def _write_out(self) -> None:
        try:
            while self._waiting:
                with suppress(TimeoutError):
                    async with asyncio.timeout(GATHER):
                        await self._hurry.wait()
                self._taken = self._waiting
                self._waiting = []
                await self._write(self._taken)
                self._taken = []
                if self._most is not None and self._size >= self._most and self._raw is not None:
                    await self._raw.close()
                    await self._run(lambda path: roll(path, headed=self._headed))
                    await self._reopen()
        except Exception as error:  # a line that is lost in silence would be missed by nobody
            self._failure = self._problem(error)

    async def _write(self, items: Iterable[str | Change]) -> None:
        assert self._raw is not None, "the file is open while lines are put"
        text = ""
        for item in items:
            if isinstance(item, str):
                text += item
                continue
            await self._write_all(self._raw, text)
            text = ""
            await self._raw.close()
            await self._run(item)
            await self._reopen()
        await self._write_all(self._raw, text)

    async def _write_all(self, raw: _Raw, text: str) -> None:
        data = text.encode()
        self._size += len(data)
        full = False
        while data:
            try:
                data = data[await raw.write(data) :]
            except OSError as error:
                if error.errno not in NO_ROOM or self._hurry.is_set() or len(self._waiting) > MOST_WAITING:
                    raise
                if not full:
                    full = True
                    logger.warning("%s can't be written: %s; its lines wait for room", self.path, error.strerror)
                with suppress(TimeoutError):
                    async with asyncio.timeout(RETRY):
                        await self._hurry.wait()

    async def _reopen(self) -> None:
        raw = await aiofiles.open(self.path, "ab", buffering=0, executor=self._executor)
        self._raw, self._size = raw, await raw.tell()

    async def _run(self, change: Change) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, change, self.path)

    def _problem(self, error: Exception) -> StreamtrainError:
        hint = "make room on the disk, or mend the permissions; checkpoints are untouched"
        if isinstance(error, OSError):
            problem: StreamtrainError = EnvironmentProblem(
                f"{self.path} can't be written: {error.strerror or error}", hint=hint
            )
        else:
            hint = "what it was given does not fit this log; --debug shows where. Checkpoints are untouched"
            problem = StreamtrainError(f"{self.path} can't be written: {type(error).__name__}: {error}", hint=hint)
        problem.__cause__ = error
        return problem


def rewrite(path: Path, edit: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
    """Replace a file by what `edit` makes of its lines; whoever reads meanwhile sees the old or the new one, whole.

    So does a machine whose power goes: some file systems know the new name before what stands under it.
    """
    temp = path.with_name(f".{path.name}.tmp")
    with open(path, "rb") as old, open(temp, "wb") as new:
        new.writelines(edit(old))
        new.flush()
        os.fsync(new.fileno())
    os.replace(temp, path)


def cut(path: Path, keep: Callable[[bytes], bool], missing: Iterable[str] = ()) -> None:
    """Drop the lines that `keep` refuses, and a torn one; then append those of `missing` that are not there."""
    absent = dict.fromkeys(line.encode() for line in missing)
    dropped = 0

    def edit(lines: Iterable[bytes]) -> Iterable[bytes]:
        nonlocal dropped
        for line in lines:
            if line.endswith(b"\n") and keep(line):
                absent.pop(line, None)
                yield line
            else:
                dropped += 1
        yield from absent

    rewrite(path, edit)
    if dropped:
        logger.info("%s: %d lines of steps that are made again were cut off", path, dropped)


class LineLog(Callback):
    """The base of the loggers: one LineFile, from the beginning to the end of a fit, if there is a run folder."""

    file_name: str
    headed = False
    """Whether the first line names the columns."""
    writes_lines = True

    def __init__(self, *, part: str | int = "64MiB") -> None:
        self._most = part_bytes(part, f"{type(self).__name__}: part")
        self._file: LineFile | None = None
        self._missing: list[str] = []

    @property
    def writes(self) -> str:
        """The file, which is no other callback's too."""
        return self.file_name

    def prepare(self, path: Path, step: int) -> None:
        """Bring the file of an earlier life to where `step` left it; runs in the thread."""
        raise NotImplementedError

    async def on_train_begin(self, event: TrainBegin) -> None:
        """Open the file."""
        self._file = None  # one whose end never came belonged to another loop, which is gone
        if event.run_dir is not None:
            file = LineFile(Path(event.run_dir, self.file_name), most=self._most, headed=self.headed)
            await file.open(lambda path: self._prepare(path, event.step))
            self._missing = []
            self._file = file

    def _prepare(self, path: Path, step: int) -> None:
        """Lines that another folder's file lacks do not belong into a new one."""
        if path.parent.is_dir() and older(path):
            path.touch()  # a kill may have come between the end of a part and the beginning of the next
        if path.is_file():
            self.prepare(path, step)

    async def on_train_end(self, event: TrainEnd) -> None:
        """Write the rest, close the file, end the thread."""
        file, self._file = self._file, None
        if file is not None:
            await file.close()

    def state_dict(self) -> dict[str, Any]:
        """The last lines, where they may not be in the file yet; mostly nothing."""
        lines = self._missing if self._file is None else self._file.unwritten()
        return {"unwritten": lines} if lines else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; those that the file lacks are appended at the beginning of the next fit."""
        self._missing = [str(line) for line in state.get("unwritten", ())]


APART = "resource"
"""The split of lines that are no result of the training: of several a step, and other ones in each life."""
FIXED = ("step", "epoch", "samples", "time", "split")
"""What each line of metrics begins with."""


class MetricsLog(LineLog):
    """The base of the loggers of metrics.

    A life that goes on at a step whose validation was still due repeats it; its line, which is there already, is not
    written again.
    """

    reserved: tuple[str, ...] = FIXED
    needs_folder = True

    def __init__(self, *, part: str | int = "64MiB") -> None:
        super().__init__(part=part)
        self._said: set[str] = set()
        self._start = 0
        self._there: set[tuple[str, frozenset[str]]] = set()
        """Split and names of the lines that the file has of the step at which this life began."""

    async def on_train_begin(self, event: TrainBegin) -> None:
        """Open the file."""
        self._start, self._there = event.step, set()
        await super().on_train_begin(event)

    async def append(self, run_dir: Path, event: Log) -> None:
        """One more line outside of a fit; all that the file has stays, but for a torn line. Raises EnvironmentProblem.

        Of the line's step nothing is known here: it may be one that the file is beyond.
        """
        await self.on_train_begin(TrainBegin(run_dir=str(run_dir), step=sys.maxsize))
        try:
            await self.on_log(event)
        finally:
            await self.on_train_end(TrainEnd())

    async def on_log(self, event: Log) -> None:
        """Write one line."""
        raise NotImplementedError

    def again(self, event: Log, values: Iterable[str]) -> bool:
        """Whether the file has this line from an earlier life, or is none for it."""
        if event.split == APART:
            return True
        return event.step == self._start and (event.split, frozenset(values)) in self._there

    def fixed(self, event: Log) -> list[Any]:
        """The values of FIXED."""
        return [event.step, event.epoch, event.samples, round(event.time, 6), event.split]

    def values(self, event: Log) -> Mapping[str, float]:
        """The metrics, but those whose names a line needs for itself; that is said once for each."""
        if event.values.keys().isdisjoint(self.reserved):
            return event.values
        for name in [name for name in self.reserved if name in event.values and name not in self._said]:
            self._said.add(name)
            logger.warning("the metric %r is left out of %s, whose lines have a field %r", name, self.file_name, name)
        return {name: value for name, value in event.values.items() if name not in self.reserved}
