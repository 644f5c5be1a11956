"""Saves, one at a time: commits snapshots on a thread of ours while training goes on, and removes what need not stay.

Its law: a save that fails costs nothing that was saved before, and is not the end of a run until it has failed again
and again. What was not verified, when it was committed or since, pushes out nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from streamtrain import checkpoint
from streamtrain.buffers import Buffers
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.checkpoint import Committed
from streamtrain.disk import LOCAL, Disk
from streamtrain.ending import going_on
from streamtrain.errors import CheckpointError, EnvironmentProblem, StreamtrainError
from streamtrain.file_thread import Files
from streamtrain.grace import PROBE, Forecast, disk_rate
from streamtrain.state import Snapshot

logger = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Saves in a row that may fail: at the last of them training ends."""

Told = Callable[[Committed], Awaitable[None]]
Failed = Callable[[Exception, int], Awaitable[None]]
"""Given the error, and how many saves in a row have failed."""
Done = Callable[[Path | None, BaseException | None], None]


def folder_name(step: int) -> str:
    """The name of the checkpoint of this step."""
    return f"step-{step:09d}"


class Saver:
    """The saves of one fit."""

    def __init__(
        self,
        checkpoints: Path,
        rule: ModelCheckpoint,
        files: Files,
        *,
        before: Path | None = None,
        held: Callable[[], object] = tuple,
        logged: Callable[[], object] = tuple,
        disk: Disk = LOCAL,
    ) -> None:
        """`before`: the checkpoint that the run goes on from. `held`: raises where the run's folder is no longer the
        run's, before anything is written there. `logged`: has the lines of the log last as checkpoints do."""
        self.checkpoints, self.rule, self.files, self._disk = checkpoints, rule, files, disk
        self._held, self._logged = held, logged
        self.last = before
        """The last committed checkpoint."""
        self.committed: Committed | None = None
        """The last one of this fit, with its size and how long it took."""
        self._verified = set[str]() if before is None else {before.name}
        """Names of the checkpoints that were found whole in this life."""
        self.buffers = Buffers()
        """Where snapshots are copied to."""
        self._reserving: asyncio.Task[None] | None = None
        self.pins: Callable[[], Collection[str]] = tuple
        """Names of checkpoints that must stay."""
        self.step, self.since = 0, 0.0
        """Of the save that is under way: its step, and when it began on `time.monotonic`'s clock."""
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._fatal: StreamtrainError | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._task is not None and not self._task.done()

    @property
    def behind(self) -> bool:
        """Whether the last save has failed: what it was to keep is kept nowhere yet."""
        return self._failures > 0

    @property
    def failing(self) -> bool:
        """Whether saves have failed so often that another one is not worth trying."""
        return self._fatal is not None

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step lies."""
        return self.checkpoints / folder_name(step)

    def begin(
        self,
        snapshot: Snapshot,
        step: int,
        *,
        kind: str,
        told: Told,
        failed: Failed,
        path: Path | None = None,
        done: Done | None = None,
        complete: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Commit in the background, then await `told`, or else `failed`; the save before must be over.

        `complete` is awaited before: it brings what the snapshot still lacks. With `path` it goes there, and a failure
        concerns only `done`, which is told how it went.
        """
        assert not self.busy
        self.step, self.since = step, time.monotonic()
        self._start(lambda: self._commit(snapshot, step, kind, told, failed, path, done, complete))

    def _start(self, commit: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """A task that was cancelled before its first step has not run at all, and is made anew."""
        begun = False

        async def work() -> None:
            nonlocal begun
            begun = True
            await commit()

        self._task = task = asyncio.create_task(work(), name="streamtrain-save")
        task.add_done_callback(lambda task: None if begun else self._start(commit))

    async def forecast(self, size: Callable[[], Awaitable[int]]) -> Forecast | None:
        """How long a save would take: as the last one of this fit did, or what `size` tells, as fast as a probe is.

        None where it is too little to matter, or where the disk refuses even that: the save itself will say why.
        """
        if self.committed is not None:
            return Forecast(self.committed.bytes, self.committed.bytes / max(self.committed.seconds, 1e-9))
        needed = await size()
        if needed < PROBE:
            return None
        try:
            return Forecast(needed, await self.files(lambda: disk_rate(self.checkpoints.parent)))
        except OSError:
            return None

    def reserve(self, content: Callable[[], Awaitable[Sequence[Tensor]]]) -> None:
        """Once a fit: have memory for snapshots before the first is taken, while training goes on."""
        if self._reserving is None:
            self._reserving = asyncio.create_task(self._reserve(content), name="streamtrain-buffers")

    async def _reserve(self, content: Callable[[], Awaitable[Sequence[Tensor]]]) -> None:
        try:
            tensors = await content()
            await self.files(lambda: self.buffers.reserve_for(tensors))
        except EnvironmentProblem as problem:
            logger.warning("%s; the first snapshot tries again", problem)
        except StreamtrainError as error:
            self._fatal = error
        except Exception as error:
            logger.warning("no memory is held for snapshots yet: %s: %s", type(error).__name__, error)

    async def wait(self) -> None:
        """Wait for the save that is under way; whoever stops waiting does not stop it."""
        while under_way := [task for task in (self._task, self._reserving) if task is not None]:
            await asyncio.wait(under_way)  # of one that is done, too: then a save that has not run is under way again
            if not self.busy:
                break

    async def end(self) -> None:
        """The same, without waiting for memory that no snapshot needs any more: a step that hangs would keep it."""
        if self._reserving is not None:
            self._reserving.cancel()
        await self.wait()

    def check(self) -> None:
        """Raise the error of saves that failed too often."""
        if self._fatal is not None:
            raise self._fatal

    async def lack_of_room(self, step: int) -> EnvironmentProblem | None:
        """Why there is no room for a save like the last one; None if there is."""
        needed = 0 if self.committed is None else self.committed.bytes
        try:
            await self.files(lambda: checkpoint.check_space(self.path(step), needed, disk=self._disk))
        except EnvironmentProblem as problem:
            return problem
        return None

    def give_up(self, problem: EnvironmentProblem, *, kind: str, failed: Failed, done: Done | None) -> None:
        """A save that was not begun has failed because of `problem`."""
        assert not self.busy
        self._task = asyncio.create_task(self._failed(problem, kind, failed), name="streamtrain-save")
        if done is not None:
            done(None, problem)

    async def _commit(
        self,
        snapshot: Snapshot,
        step: int,
        kind: str,
        told: Told,
        failed: Failed,
        path: Path | None,
        done: Done | None,
        complete: Callable[[], Awaitable[None]] | None,
    ) -> None:
        target, made = path or self.path(step), list[Committed]()

        def written() -> Committed:
            if not made:  # else the call before has, whose waiter was cancelled
                made.append(self._written(target, snapshot, replace=path is None))
            return made[0]

        try:
            if complete is not None:
                await going_on(complete)
            committed = await going_on(lambda: self.files(written))
            if path is None:
                self._failures, self.last, self.committed = 0, committed.path, committed
                self._verified.add(committed.path.name)
            await told(committed)
            if path is None:
                await going_on(self._prune)
        except BaseException as error:
            if done is not None:
                done(None, error)
            if not isinstance(error, Exception):
                raise
            if path is None:
                await self._failed(error, kind, failed)
        else:
            if done is not None:
                done(committed.path, None)

    def _written(self, target: Path, snapshot: Snapshot, *, replace: bool) -> Committed:
        self.buffers.landed()
        if replace:
            self._held()
            self._logged()
        return checkpoint.commit(target, snapshot, replace=replace, disk=self._disk)

    async def _failed(self, error: Exception, kind: str, failed: Failed) -> None:
        self._failures += 1
        if kind != "end" and isinstance(error, EnvironmentProblem) and self._failures < MOST_FAILURES:
            message = "%s; training goes on (failed saves in a row: %d of %d)"
            logger.warning(message, error, self._failures, MOST_FAILURES)
        elif isinstance(error, EnvironmentProblem):
            last = "there is none yet" if self.last is None else f"the last good one is {self.last}"
            row = f" (failed saves in a row: {self._failures})" if self._failures > 1 else ""
            self._fatal = EnvironmentProblem(f"{error}{row}; {last}", hint=error.hint)
            self._fatal.__cause__ = error
        elif isinstance(error, StreamtrainError):
            self._fatal = error
        else:
            self._fatal = CheckpointError(f"a checkpoint could not be saved: {type(error).__name__}: {error}")
            self._fatal.__cause__ = error
        try:
            await failed(error, self._failures)
        except Exception as of_callback:
            logger.exception("telling the callbacks of a failed save failed")
            self._fatal = self._fatal or (of_callback if isinstance(of_callback, StreamtrainError) else None)

    async def _prune(self) -> None:
        try:
            entries = await self.files(
                lambda: checkpoint.scan(self.checkpoints, verified=self._verified, disk=self._disk)
            )
            self._verified = {entry.name for entry in entries if entry.problem is None}
            stay = self.rule.retain(entries, pins=self.pins())
            if self.last is not None:
                stay.add(self.last.name)
            await self.files(lambda: checkpoint.prune(self.checkpoints, stay, disk=self._disk))
        except StreamtrainError as error:
            logger.warning("%s", error)
