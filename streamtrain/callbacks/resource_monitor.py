"""What the run uses: CPU, memory, disk and GPUs, each so many seconds, as lines of a split of their own.

Its law: looking on costs the training nothing. A thread of our own asks the machine. The lines go to all loggers with
split "resource", and into `resources.jsonl`; `metrics.jsonl` and `metrics.csv`, whose steps stand there once and are
the same in every life, leave them out.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from streamtrain.callbacks.json_logger import finite, json_line, parsed
from streamtrain.callbacks.lines import APART, LineLog, cut
from streamtrain.events import Log, TrainBegin, TrainEnd
from streamtrain.options import at_least

logger = logging.getLogger(__name__)


class ResourceMonitor(LineLog):
    """Logs `cpu, rss, memory, memory_available, disk_free` and, where CUDA is in use, `gpu<n>_*` each `every` seconds.

    `cpu`: of this process and its children, 1.0 is one core busy. `rss`: bytes resident, children too. `memory`: share
    of the machine's memory in use; `memory_available`, `disk_free` (where the run's folder lies), `gpu<n>_allocated`
    (by tensors), `gpu<n>_reserved` (by torch) and `gpu<n>_used` (by all): bytes; `gpu<n>_busy`: share of the time,
    where the driver's Python package (nvidia-ml-py) is installed. Nothing is cut off `resources.jsonl` but a torn line.
    """

    file_name = "resources.jsonl"

    def __init__(self, *, every: float = 10.0) -> None:
        super().__init__()
        self._every = at_least(every, 0.1, "ResourceMonitor: every")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def prepare(self, path: Path, step: int) -> None:
        """Cut off a torn line."""
        cut(path, lambda line: parsed(line) is not None, self._missing)

    async def on_train_begin(self, event: TrainBegin) -> None:
        """Open the file, start to look."""
        await super().on_train_begin(event)
        self._stop = threading.Event()
        # A daemon, so that a driver which never answers cannot keep the process from ending.
        self._thread = threading.Thread(
            target=self._watch, args=(event, self._stop), name="streamtrain-resources", daemon=True
        )
        self._thread.start()

    async def on_log(self, event: Log) -> None:
        """Write a line of our own split."""
        if self._file is not None and event.split == APART:
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            place = {"at": at, "step": event.step, "epoch": event.epoch, "time": round(event.time, 6)}
            self._file.put(json_line({**place, **finite(event.values)}))

    def on_train_end(self, event: TrainEnd) -> Coroutine[Any, Any, None]:
        """Stop looking and join the thread, in the callback's own; then write the rest."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(timeout=1.0)
            if thread.is_alive():
                logger.error("the machine has not told its use of resources; the thread that asks is left behind")
        return super().on_train_end(event)

    def _watch(self, event: TrainBegin, stop: threading.Event) -> None:
        look = Look(event.run_dir or ".")
        look()  # the CPU's share is that since the look before
        while not stop.wait(self._every):
            try:
                event.log_metrics(look(), split=APART)
            except Exception as error:
                logger.warning("the use of resources is not logged any more: %s: %s", type(error).__name__, error)
                return


class Look:
    """Asks the machine; each call is a look."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self._children: dict[int, psutil.Process] = {}
        self._busy = hasattr(torch.cuda, "utilization")

    def __call__(self) -> dict[str, float]:
        """The figures by name."""
        cpu, rss = 0.0, 0.0
        for process in self._family():
            try:
                cpu += process.cpu_percent() / 100
                rss += process.memory_info().rss
            except psutil.Error:  # it has ended
                self._children.pop(process.pid, None)
        memory = psutil.virtual_memory()
        values = {"cpu": cpu, "rss": rss, "memory": memory.percent / 100, "memory_available": float(memory.available)}
        try:
            disk = os.statvfs(self._folder)
            values["disk_free"] = float(disk.f_bavail * disk.f_frsize)
        except OSError:  # a folder that is gone fails where it is written to
            pass
        return values | self._gpus()

    def _family(self) -> list[psutil.Process]:
        now = {child.pid: child for child in self._process.children(recursive=True)}
        # A process that was there before goes on with its own count of CPU time.
        self._children = {pid: self._children.get(pid, child) for pid, child in now.items()}
        return [self._process, *self._children.values()]

    def _gpus(self) -> dict[str, float]:
        """Of the GPUs on which torch works already: to ask others would make a context there."""
        values: dict[str, float] = {}
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return values
        for number in range(torch.cuda.device_count()):
            if not torch.cuda.memory_reserved(number):
                continue
            free, total = torch.cuda.mem_get_info(number)
            figures: dict[str, float] = {
                "allocated": torch.cuda.memory_allocated(number),
                "reserved": torch.cuda.memory_reserved(number),
                "used": total - free,
            }
            if self._busy:
                figures["busy"] = self._utilization(number)
            values |= {f"gpu{number}_{name}": float(value) for name, value in figures.items()}
        return values

    def _utilization(self, number: int) -> float:
        try:
            return torch.cuda.utilization(number) / 100
        except Exception as error:  # each driver and package has its own
            self._busy = False
            logger.info("how busy the GPUs are is not logged: %s", str(error).partition("\n")[0])
            return float("nan")
