"""torch's profiler over some steps of a run: a trace for chrome://tracing or ui.perfetto.dev, and a table.

Its law: outside of these steps nothing is there. The profiler begins and ends on the train thread, in a hook of the
optimizer that counts updates, so that exactly the steps asked for are in it. A process has one profiler at a time:
torch's ends the process where a second one begins beside it.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from streamtrain.callbacks.base import Callback
from streamtrain.errors import ConfigError, EnvironmentProblem
from streamtrain.events import Log, TrainBegin, TrainEnd
from streamtrain.options import count, flag

logger = logging.getLogger(__name__)

ROWS = 50
_TURN = threading.Lock()
"""Held by the one that profiles."""


class Profiler(Callback):
    """Profiles the steps `first` to `last` and writes `profile/steps-<first>-<last>.json` and `.txt`.

    `shapes`: tell operators of other shapes apart; `memory`: what they allocate; `stack`: the lines of Python that
    called them. Each of these costs. A run that ends earlier writes what it has; one that goes on behind `first`, or
    comes there while another profiler is running in the process, has no profile, and says so. The first steps of a run
    are slow for reasons of their own.
    """

    needs_folder = True

    def __init__(
        self, *, first: int = 10, last: int = 30, shapes: bool = False, memory: bool = False, stack: bool = False
    ) -> None:
        self._first, self._last = count(first, "Profiler: first"), count(last, "Profiler: last")
        if last < first:
            raise ConfigError(f"Profiler: last={last} comes before first={first}")
        self._options: dict[str, Any] = {
            "record_shapes": flag(shapes, "Profiler: shapes"),
            "profile_memory": flag(memory, "Profiler: memory"),
            "with_stack": flag(stack, "Profiler: stack"),
        }
        self._folder: Path | None = None
        self._profile: Any = None
        self._handle: Any = None
        self._over = False
        """The last step was made, or there is nothing to wait for."""
        self._made = self._ended = 0

    async def on_train_begin(self, event: TrainBegin) -> None:
        """Have updates counted."""
        self._folder, self._profile, self._made, self._ended = None, None, event.step, 0
        if event.run_dir is None:
            return
        if event.step >= self._first:
            logger.warning("Profiler: the run goes on at step %d, behind step %d: no profile", event.step, self._first)
            return
        self._folder = Path(event.run_dir, "profile")
        await event.on_train_thread(lambda model, optimizer: self._begin(optimizer))

    def on_log(self, event: Log) -> None:
        """Write the profile once it is whole; training goes on meanwhile."""
        if self._ended:
            self._write()

    async def on_train_end(self, event: TrainEnd) -> None:
        """End a profile that is not whole, and write it."""
        if self._handle is not None:
            await event.on_train_thread(lambda model, optimizer: self._finish())

    def _begin(self, optimizer: Optimizer) -> None:
        self._handle, self._over = optimizer.register_step_post_hook(self._updated), False
        if self._made == self._first - 1:
            self._start()

    def _updated(self, *_: Any) -> None:
        """After each update, on the train thread. It stays until the end: torch goes through its hooks just now."""
        if self._over:
            return
        self._made += 1
        if self._profile is not None:
            self._profile.step()
        if self._made == self._first - 1:
            self._start()
        elif self._made == self._last:
            self._end()

    def _start(self) -> None:
        if torch.autograd.profiler._is_profiler_enabled or not _TURN.acquire(blocking=False):
            self._over = True
            logger.warning(
                "Profiler: another profiler is running in this process: no profile of steps %d to %d",
                self._first,
                self._last,
            )
            return
        try:
            self._profile = _started(self._options)
        except Exception as error:
            self._over = True
            _TURN.release()
            self._warn_of(error)

    def _end(self) -> None:
        self._over = True
        if self._profile is not None:
            try:
                self._profile.stop()
                self._ended = self._made
            except Exception as error:
                self._profile = None
                self._warn_of(error)
            finally:
                _TURN.release()

    def _warn_of(self, error: Exception) -> None:
        """No run ends because it can't be looked at."""
        message = "Profiler: torch's failed: no profile of steps %d to %d: %s: %s"
        logger.warning(message, self._first, self._last, type(error).__name__, error)

    def _finish(self) -> None:
        self._handle.remove()
        self._handle = None
        if not self._over:
            self._end()
            if not self._ended:
                logger.warning(
                    "Profiler: the run ended at step %d, before step %d: no profile", self._made, self._first
                )
        if self._ended:
            self._write()

    def _write(self) -> None:
        assert self._folder is not None
        ended, self._ended = self._ended, 0
        profiled, self._profile = self._profile, None
        if ended < self._last:
            logger.warning("Profiler: the run ended at step %d: the profile stops there", ended)
        path = self._folder / f"steps-{self._first:09d}-{ended:09d}.json"
        try:
            self._folder.mkdir(exist_ok=True)
            temp = path.with_name(f".{path.name}.tmp")
            profiled.export_chrome_trace(str(temp))
            temp.replace(path)
            table = profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=ROWS)
            path.with_suffix(".txt").write_text(table)
        except OSError as error:
            raise EnvironmentProblem(f"{path} can't be written: {error.strerror or error}") from error
        logger.info("the profile of steps %d to %d is in %s", self._first, ended, path)


def _started(options: dict[str, Any]) -> Any:
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        kinds.append(ProfilerActivity.CUDA)
    profiler = profile(activities=kinds, **options)
    profiler.start()
    return profiler
