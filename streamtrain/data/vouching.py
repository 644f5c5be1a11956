"""Writing manifests: every file of an array is read, and what it is now is what its manifest vouches for.

Its law: a manifest appears when it is complete and durable, and damage that can be told without one is not vouched for.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from streamtrain.data.files import StoreFiles
from streamtrain.data.layout import ABSENT, ArrayLayout, Untrainable
from streamtrain.data.manifest import Draft, Record, doubly, first_chunk
from streamtrain.data.opening import IO, Located, OpenArray, list_arrays, locate, open_arrays
from streamtrain.data.readers import describe_part, shard_index
from streamtrain.data.reading import Scratch, chunk_error
from streamtrain.data.workers import default_threads
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Called with the files that are done and all files."""
OPEN_TIMEOUT = 60.0
"""Seconds until reading metadata counts as hung."""
AHEAD = 4
"""Files in hand for each thread."""


def write_manifest(root: Path, layout: ArrayLayout, *, progress: Progress | None = None) -> Path:
    """Vouch for the files of the array `layout.name` of the store at `root` as they are; the manifest's path.

    Memory: a slice of 1 MiB for each thread, and 16 bytes a file, which are mapped.
    Raises DataError for files that can't be trusted (no regular file, a damaged shard index, missing though the
    writer left none out) or told, OSError where the manifest can't be written.
    """
    files = StoreFiles(root)
    with Draft(root / layout.name, layout) as draft:

        def record(number: int, scratch: Scratch) -> tuple[Record, list[Record]]:
            return _record(files, layout, number, scratch, draft.slots)

        for number, found in enumerate(in_threads(record, range(draft.files))):
            draft.put(number, *found)
            if progress:
                progress(number + 1, draft.files)
        return draft.commit()


def vouch(root: Path) -> None:
    """Give every array of the store at `root` that can be trained on a manifest. Raises as `write_manifest` does."""
    loop = ZarrLoop()
    try:
        for opened in look(root, loop).values():
            if isinstance(opened, Untrainable):
                continue
            if isinstance(opened, DataError):
                raise opened
            write_manifest(root, opened.layout)
    finally:
        loop.close()


def look(root: Path | Located, loop: ZarrLoop) -> dict[str, OpenArray | DataError]:
    """Every array of a store by its name, opened for `pread`, or why it can't be (Untrainable: without damage).

    Raises DataError for none.

    `loop` serves arrays that only zarr's own API can read, and is the caller's to close.
    """
    where, reading = root if isinstance(root, Located) else locate(root), ZarrLoop()
    io: IO = "auto" if where.root is None else "pread"

    async def open_all() -> dict[str, OpenArray | DataError]:
        found: dict[str, OpenArray | DataError] = {}
        for name in await list_arrays(where):
            try:
                some = [name] if name else None
                opened = await open_arrays(where, some, io=io, loop=loop, timeout=OPEN_TIMEOUT)
                found[name] = next(iter(opened.values()))
            except DataError as error:
                found[name] = error
        return found

    try:
        found = reading.run(open_all(), OPEN_TIMEOUT)
    finally:
        reading.close()
    if not found:
        raise DataError(f"{where.name} holds no array", hint="`python -m data_tools convert` makes one")
    return found


def _record(
    files: StoreFiles, layout: ArrayLayout, number: int, scratch: Scratch, slots: int
) -> tuple[Record, list[Record]]:
    """What the file of this number is now, and the chunks in it."""
    chunk = first_chunk(layout, number)
    key = layout.key(chunk)
    try:
        try:
            fd, status = files.open(key)
        except FileNotFoundError:
            files.check_absent(key)
            if layout.complete:
                raise ValueError("it is missing, and its writer left no chunk out") from None
            return Record(ABSENT, 0), []
        try:
            size = status.st_size
            inner = _slots(layout, fd, size, scratch) if slots else []
            return describe_part(fd, 0, size, scratch, both=doubly(layout, files=True)), inner
        finally:
            os.close(fd)
    except (ValueError, OSError) as error:
        raise chunk_error(layout, chunk, files.root / key, getattr(error, "strerror", None) or error) from error


def _slots(layout: ArrayLayout, fd: int, size: int, scratch: Scratch) -> list[Record]:
    found, both = [], doubly(layout, files=False)
    for start, length in shard_index(layout, fd, size).tolist():
        if start == length == ABSENT:
            found.append(Record(ABSENT, 0))
        elif start + length > size:
            raise ValueError(f"its shard ends at byte {size}, a chunk of it at {start + length}")
        else:
            found.append(describe_part(fd, start, length, scratch, both=both))
    return found


def in_threads(work: Callable[[T, Scratch], R], items: Iterable[T], *, threads: int | None = None) -> Iterator[R]:
    """`work(item, scratch)` of each item, in order, by as many threads as there are cores; few items ahead."""
    count = threads or default_threads()
    local = threading.local()

    def call(item: T) -> R:
        if not hasattr(local, "scratch"):
            local.scratch = Scratch()
        return work(item, local.scratch)

    rest = iter(items)
    with concurrent.futures.ThreadPoolExecutor(count, "streamtrain-files") as pool:
        waiting = deque(pool.submit(call, item) for item in itertools.islice(rest, AHEAD * count))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(call, item) for item in itertools.islice(rest, 1))
        finally:
            for future in waiting:
                future.cancel()
