"""zarr's own API as a reader: on a private loop thread, whose executor is ours, any codec, layout or store it knows."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.daemons import DaemonExecutor
from streamtrain.data.files import StoreFiles
from streamtrain.data.layout import ArrayLayout
from streamtrain.data.manifest import unaddressable
from streamtrain.data.readers import describe_part
from streamtrain.data.reading import ChunkName, Scratch, Version, chunk_error
from streamtrain.data.trust import Trust, Verify, trust_in
from streamtrain.errors import EnvironmentProblem

T = TypeVar("T")
logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long it waits for all that it does."""
FAR_LARGER = 64
"""A file that has so many times the bytes that its part of the array decodes to is refused unread."""


class ZarrLoop:
    """A private event loop in a thread of its own, with an executor of its own, for zarr's asynchronous API.

    Started on first use, joined by `close`: the caller's loop, its default executor and zarr's own threads are not
    touched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        """Settled by the thread as the last thing it does."""

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None) -> T:
        """Run a coroutine there and wait for its result, from any other thread.

        Raises TimeoutError, or concurrent.futures.CancelledError where `close` came first.
        """
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have a plain function called there; it is dropped where `close` comes first."""
        self._running().call_soon_threadsafe(function, *arguments)

    def tell(self, fn: Callable[[], Any]) -> None:
        """Have a plain function run there soon. Raises RuntimeError where the loop has ended."""
        loop = self._loop
        if loop is None:
            raise RuntimeError("the loop has ended")
        loop.call_soon_threadsafe(fn)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop, self._ended = asyncio.new_event_loop(), concurrent.futures.Future()
                self._ended.set_running_or_notify_cancel()  # nobody who waits for it can cancel it from now on
                serve = (self._loop, self._ended)
                self._thread = threading.Thread(target=self._serve, args=serve, name="streamtrain-zarr", daemon=True)
                self._thread.start()
            return self._loop

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop, ended: concurrent.futures.Future[None]) -> None:
        asyncio.set_event_loop(loop)
        executor = DaemonExecutor(4, "streamtrain-zarr-io")
        loop.set_default_executor(executor)
        try:
            loop.run_forever()
        finally:
            waiting = asyncio.all_tasks(loop)
            for task in waiting:
                task.cancel()
            if waiting:
                loop.run_until_complete(asyncio.wait(waiting))
            loop.run_until_complete(loop.shutdown_asyncgens())
            executor.shutdown(wait=True)
            loop.close()
            ended.set_result(None)

    async def aclose(self) -> None:
        """The same from another loop, which is not blocked meanwhile; a cancellation is raised at the end."""
        thread, ended = self._stop()
        cancelled: asyncio.CancelledError | None = None
        if thread is not None:
            here = asyncio.get_running_loop()
            over, deadline = asyncio.wrap_future(ended), here.time() + CLOSE_SECONDS
            while not over.done() and here.time() < deadline:
                try:
                    await asyncio.wait([over], timeout=deadline - here.time())
                except asyncio.CancelledError as error:
                    cancelled = error
            self._join(thread, 0.0 if not over.done() else CLOSE_SECONDS)
        if cancelled is not None:
            raise cancelled

    def __del__(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)

    def close(self) -> None:
        """End the thread and its executor, and wait for both (but not for a read that hangs)."""
        thread, _ = self._stop()
        if thread is not None:
            self._join(thread, CLOSE_SECONDS)

    def _stop(self) -> tuple[threading.Thread | None, concurrent.futures.Future[None]]:
        """Have the thread end; it, if there was one, and what tells that it has."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
        return thread, self._ended

    @staticmethod
    def _join(thread: threading.Thread, timeout: float) -> None:
        thread.join(timeout)
        if thread.is_alive():
            logger.error("storage has not answered within %g s; the thread that waits is left behind", CLOSE_SECONDS)


SERIALS = itertools.count()
"""Tell readers apart whose chunks tell no version."""


class ZarrReader:
    """Chunks of one array by zarr's own API: any codec, layout or store that zarr knows.

    `files`: the store's, where it is a folder of this machine: zarr would take a folder for fill, follow a link to
    anywhere and wait for a pipe, so each file is looked at first.
    """

    lane = "zarr"

    def __init__(
        self, layout: ArrayLayout, array: Any, loop: ZarrLoop, *, timeout: float, files: StoreFiles | None = None
    ) -> None:
        self.layout, self._array, self._loop, self._timeout, self._files = layout, array, loop, timeout, files
        self._serial = next(SERIALS)
        self._most = FAR_LARGER * math.prod(layout.file_shape) * layout.dtype.itemsize + (1 << 20)
        self._trust: Trust | None = None
        if files is not None:
            files.describe(layout.name)

    def vouch(self, verify: Verify) -> str | None:
        if self._files is not None:
            self._trust = trust_in(self._files.root, self.layout, verify, whole_files=True)
        return None if self._trust is None else self._trust.manifest.contents

    def version(self, chunk: Sequence[int]) -> Version | None:
        """Of the file that holds it; what is not one file's, or no file's, is never the same as anybody else's."""
        if self._files is None or unaddressable(self.layout) is not None:
            return Version(("reader", self._serial), False)
        return self._files.version(self._key(chunk))

    def look(self, chunk: Sequence[int], scratch: Scratch) -> None:
        """Its version is known at once."""

    def read(
        self, chunk: Sequence[int], rows: tuple[int, int], scratch: Scratch, *, few: bool = False
    ) -> NDArray[Any] | None:
        layout = self.layout
        box = layout.box(chunk)
        if self._files is not None:
            self._check_file(self._files, chunk)
        if self._trust is not None and self._trust.due(chunk):
            self._check(self._trust, chunk, scratch)
        try:
            data = self._loop.run(self._get(chunk, tuple(slice(a, b) for a, b in box)), self._timeout)
        except TimeoutError:
            raise EnvironmentProblem(
                f"{ChunkName(layout.name, tuple(chunk))} was not read within {self._timeout:g} s",
                hint="check the storage, or raise read_timeout",
            ) from None
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise chunk_error(layout, chunk, getattr(self._array, "store_path", layout.name), cause) from error
        if self._files is not None:  # what zarr itself has opened, nobody tells: what vanished meanwhile came as fill
            self._check_file(self._files, chunk)
        result: NDArray[Any] = np.asarray(data)
        return result

    def _check(self, trust: Trust, chunk: Sequence[int], scratch: Scratch) -> None:
        """Hold the file of this chunk against the manifest: what is in it, zarr alone knows."""
        assert self._files is not None
        layout, key = self.layout, self.layout.key(chunk)
        try:
            fd, status = self._files.open(key)
            try:
                size = status.st_size
                trust.check_record(chunk, size, lambda: describe_part(fd, 0, size, scratch, both=trust.both))
                trust.found_good(chunk)
                scratch.checked += 1
            finally:
                os.close(fd)
        except FileNotFoundError:
            try:
                trust.check_absent(chunk)
            except ValueError as error:
                raise chunk_error(layout, chunk, self._files.root / key, error) from error
        except (ValueError, OSError) as error:
            cause = getattr(error, "strerror", None) or error
            raise chunk_error(layout, chunk, self._files.root / key, cause) from error

    def _check_file(self, files: StoreFiles, chunk: Sequence[int]) -> None:
        """Raise DataError unless it is a regular file of the store, as it was when first seen, or rightly absent."""
        key = self._key(chunk)
        try:
            try:
                fd, status = files.open(key)
            except FileNotFoundError:
                files.check_absent(key)
                files.check_described(self.layout.name)
                if self.layout.complete:
                    raise ValueError("it is missing, and its writer left no chunk out") from None
                return
            os.close(fd)
            files.check_unchanged(key, status)
            if status.st_size > self._most:
                raise ValueError(f"it has {status.st_size} bytes, far more than its part of the array decodes to")
        except ValueError as error:
            raise chunk_error(self.layout, chunk, files.root / key, error) from error
        except OSError as error:
            raise chunk_error(self.layout, chunk, files.root / key, error.strerror or error) from error

    def _key(self, chunk: Sequence[int]) -> str:
        """Key of its file as zarr itself spells it, for it may know encodings that layouts don't."""
        name = self._array.metadata.encode_chunk_key(self.layout.file(chunk))
        return f"{self.layout.name}/{name}" if self.layout.name else str(name)

    async def _get(self, chunk: Sequence[int], selection: tuple[slice, ...]) -> Any:
        """What zarr reads; it takes a missing file for fill, which it is not where the writer left no chunk out."""
        if self.layout.complete and not await self._array.store_path.store.exists(self.layout.key(chunk)):
            raise FileNotFoundError("it is missing, and its writer left no chunk out")
        return await self._array.getitem(selection)
