"""`status.json` now and then, one write at a time, without anybody waiting for it."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import Any

from streamtrain.errors import StreamtrainError
from streamtrain.file_thread import Files
from streamtrain.run_folder import RunFolder

logger = logging.getLogger(__name__)


class StatusFile:
    """The status file of a run's folder; without a folder it does nothing."""

    def __init__(self, files: Files, folder: RunFolder | None) -> None:
        self._files, self._folder = files, folder
        self._task: asyncio.Task[None] | None = None
        self._last: dict[str, Any] | None = None
        self._refused = False
        """Whether the last one could not be written, which is said when it begins."""

    def write(self, status: dict[str, Any]) -> None:
        """Have this written soon; what still waits then is left out."""
        if self._folder is not None:
            self._last = {"pid": os.getpid(), **status}
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._write(), name="streamtrain-status")

    async def _write(self) -> None:
        folder = self._folder
        assert folder is not None
        while self._last is not None:
            write = partial(folder.write_status, self._last)
            self._last = None
            try:
                await self._files(write)
                self._refused = False
            except StreamtrainError as error:
                if not self._refused:
                    logger.warning("%s; it is old until it can be", error)
                self._refused = True

    async def written(self) -> None:
        """Wait for the last one."""
        if self._task is not None:
            await asyncio.wait([self._task])
