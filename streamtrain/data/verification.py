"""`verify`: is everything there, is it what was written, and what can nobody know?

Its law: one line for each damage, with its place and cause; and what can't be known of an array is said, not passed
over. Memory: a slice of 1 MiB (or a chunk, where it must be decoded) for each thread.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from streamtrain.data.afar import Objects
from streamtrain.data.budget import format_bytes
from streamtrain.data.fetch import Fetcher
from streamtrain.data.files import StoreFiles
from streamtrain.data.layout import ABSENT, ArrayLayout, Untrainable
from streamtrain.data.manifest import PLACE, Manifest, Pages, Record, doubly, file_grid, first_chunk, unaddressable
from streamtrain.data.opening import Located, OpenArray, locate
from streamtrain.data.readers import describe_part, shard_index
from streamtrain.data.reading import Scratch, file_damage
from streamtrain.data.remote_manifest import open_manifest
from streamtrain.data.trust import check_same
from streamtrain.data.vouching import OPEN_TIMEOUT, Progress, in_threads, look, write_manifest
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import ConfigError, DataError

RETRIES = 3
"""How often a request that failed in passing is made again."""


@dataclass
class Count:
    """What was looked at."""

    files: int = 0
    bytes: int = 0
    damaged: int = 0
    passed_over: int = 0
    """Arrays that nothing was looked at of."""

    def add(self, other: Count) -> None:
        """Count these too."""
        self.files, self.bytes = self.files + other.files, self.bytes + other.bytes
        self.damaged, self.passed_over = self.damaged + other.damaged, self.passed_over + other.passed_over


def verify(
    store: str | os.PathLike[str],
    *,
    deep: bool = False,
    write: bool = False,
    progress: Progress | None = None,
) -> Iterator[str]:
    """Look at every array of a store: lines to print, one for each damage; raises DataError at the end if any.

    Metadata, presence, sizes, shard indexes and the manifests' own checksums; with `deep` every byte, against its
    manifest or, where there is none, by decoding every chunk. Of a store elsewhere (a URL) objects are looked at with
    `deep` alone. `write`: arrays without a damage get a new manifest, which vouches for their files as they are; that
    takes a deep look before. What can't be trained on, such as texts and times, is said and passed over.
    Raises ConfigError for manifests that would be written elsewhere, EnvironmentProblem for what can't be reached.
    """
    where = locate(os.fspath(store))
    if where.root is None and write:
        raise ConfigError(
            f"{where.name} is not on this machine, where manifests are written", hint="write them before it is uploaded"
        )
    every, deep, loop = Count(), deep or write, ZarrLoop()
    try:
        for name, opened in look(where, loop).items():
            count = Count()
            if isinstance(opened, Untrainable):
                yield f"{name or 'array'}: not looked at{', and without a manifest' if write else ''}: {opened}"
                count.passed_over += 1
            elif isinstance(opened, DataError):
                yield f"damaged: {opened}{f' ({opened.hint})' if opened.hint else ''}"
                count.damaged += 1
            else:
                if where.root is None:
                    yield from _afar(where, opened, count, loop, deep=deep, progress=progress)
                else:
                    yield from _array(where.root, opened, count, deep=deep, write=write, progress=progress)
                yield f"{name or 'array'}: {_summary(count, deep=deep, far=where.root is None)}"
            every.add(count)
    finally:
        loop.close()
        where.close()
    if every.damaged:
        raise DataError(
            f"{where.name}: {every.damaged} damaged, {every.files} files looked at",
            hint="restore them from their source, or convert the data again; on_bad_chunk='skip' trains without them",
        )
    arrays = f"{every.passed_over} array{'' if every.passed_over == 1 else 's'}"
    over = f"; {arrays} not looked at" if every.passed_over else ""
    yield f"ok: {_size(every)}{', every byte' if deep else ''}{over}"


def _array(
    root: Path, opened: OpenArray, count: Count, *, deep: bool, write: bool, progress: Progress | None
) -> Iterator[str]:
    """Look at the files of one array; lines for damages and for what can't be known."""
    layout = opened.layout
    title = layout.name or "array"
    why = unaddressable(layout)
    manifest = None
    if why is None and os.path.lexists(root / layout.name / PLACE) and not write:
        try:
            manifest = Manifest(root / layout.name / PLACE)
            manifest.check()
            manifest.check_fits(layout, root / layout.name)
        except DataError as error:
            yield f"damaged: {error}"
            count.damaged += 1
            manifest = None
    if manifest is None and layout.manifest and not write and not count.damaged:
        yield f"damaged: {title}: its manifest is gone"
        count.damaged += 1
    if why is not None:
        yield f"{title}: unknown: its files can't be told ({why})"
        return
    check: Check = partial(_look_at, StoreFiles(root), opened, manifest, deep)
    yield from _each(check, range(math.prod(file_grid(layout))), count, progress)
    if write and not count.damaged:
        write_manifest(root, layout, progress=progress)
        yield f"{title}: its manifest vouches for its files as they are"
    elif manifest is None:
        yield f"{title}: without a manifest nobody knows {', '.join(_unknown(layout, deep))}"


def _afar(
    where: Located, opened: OpenArray, count: Count, loop: ZarrLoop, *, deep: bool, progress: Progress | None
) -> Iterator[str]:
    """The same of an array that is elsewhere."""
    layout, source = opened.layout, where.source
    assert source is not None
    title, why = layout.name or "array", unaddressable(layout)
    if why is not None:
        yield f"{title}: unknown: its objects can't be told ({why})"
        return
    fetcher = Fetcher(source, retries=RETRIES, timeout=OPEN_TIMEOUT)
    manifest = None
    try:
        manifest = open_manifest(layout, fetcher, loop)
        if manifest is not None:
            manifest.check()
        elif layout.manifest:
            yield f"damaged: {title}: its manifest is gone"
            count.damaged += 1
    except DataError as error:
        yield f"damaged: {error}"
        count.damaged += 1
        manifest = None
    if deep:
        check: Check = partial(_look_afar, Objects(layout, fetcher, loop), opened, manifest)
        yield from _each(check, range(math.prod(file_grid(layout))), count, progress)
    else:
        yield f"{title}: its objects were not looked at (--deep does)"
    if manifest is None:
        yield f"{title}: without a manifest nobody knows {', '.join(_unknown(layout, deep))}"


def _look_afar(objects: Objects, opened: OpenArray, manifest: Pages | None, number: int, scratch: Scratch) -> Found:
    """One object: there, and what its manifest says, or what decodes."""
    if manifest is None:
        return Found(1, 0, list(_undecodable(opened, first_chunk(opened.layout, number), scratch)))
    size, damages = objects.damages(manifest, number)
    return Found(int(size >= 0), max(0, size), damages)


@dataclass
class Found:
    """What a look at one file has found."""

    files: int = 0
    bytes: int = 0
    damages: list[str] = field(default_factory=list)


Check = Callable[[int, Scratch], Found]


def _each(check: Check, numbers: range, count: Count, progress: Progress | None) -> Iterator[str]:
    for done, found in enumerate(in_threads(check, numbers), 1):
        count.add(Count(found.files, found.bytes, len(found.damages)))
        yield from (f"damaged: {damage}" for damage in found.damages)
        if progress:
            progress(done, len(numbers))


def _look_at(
    files: StoreFiles, opened: OpenArray, manifest: Manifest | None, deep: bool, number: int, scratch: Scratch
) -> Found:
    """One file: present, regular, of its size; its shard index; with `deep` its bytes, or what they decode to."""
    layout = opened.layout
    chunk = first_chunk(layout, number)
    key = layout.key(chunk)
    try:
        record = manifest.file(number) if manifest is not None else None
        try:
            fd, status = files.open(key)
        except FileNotFoundError:
            files.check_absent(key)
            _check_absent(layout, record)
            return Found()
        try:
            _check_file(layout, manifest, number, record, fd, status.st_size)
            if deep and record is not None:
                both = doubly(layout, files=True)
                check_same(record, status.st_size, lambda: describe_part(fd, 0, status.st_size, scratch, both=both))
        finally:
            os.close(fd)
    except (ValueError, OSError) as error:
        cause = getattr(error, "strerror", None) or error
        return Found(1, 0, [file_damage(layout, chunk, files.root / key, cause)])
    return Found(1, status.st_size, list(_undecodable(opened, chunk, scratch)) if deep and record is None else [])


def _undecodable(opened: OpenArray, first: Sequence[int], scratch: Scratch) -> Iterator[str]:
    """The damages of the chunks in the file that begins with this one."""
    layout = opened.layout
    grid = [-(-s // c) for s, c in zip(layout.shape, layout.chunk_shape, strict=True)]
    rows = (0, layout.chunk_shape[0] if layout.ndim else 1)
    spans = [range(f, min(f + per, along)) for f, per, along in zip(first, layout.inner, grid, strict=True)]
    for chunk in itertools.product(*spans):
        try:
            opened.reader.read(chunk, rows, scratch)
        except DataError as error:
            yield str(error)


def _check_absent(layout: ArrayLayout, record: Record | None) -> None:
    if layout.complete:
        raise ValueError("it is missing, and its writer left no chunk out")
    if record is not None and record.size != ABSENT:
        raise ValueError(f"it is missing; its manifest says {record.size} bytes")


def _check_file(
    layout: ArrayLayout, manifest: Manifest | None, number: int, record: Record | None, fd: int, size: int
) -> None:
    """Raise ValueError if the file is not of its size, or its shard index not as it should be."""
    if record is not None and size != record.size:
        says = "that it was never written" if record.size == ABSENT else f"{record.size}"
        raise ValueError(f"it has {size} bytes, its manifest says {says}")
    if layout.shard_shape is None:
        exact = layout.chunk_bytes + 4 * len(layout.codecs)
        if layout.slow is None and layout.raw and size != exact:
            raise ValueError(f"it has {size} bytes, expected {exact}")
        if size == 0:
            raise ValueError("it is empty")
    elif layout.slow is None:
        for slot, (start, length) in enumerate(shard_index(layout, fd, size).tolist()):
            if manifest is not None and length != manifest.slot(number, slot).size:
                raise ValueError(f"its index gives {length} bytes to chunk {slot}, its manifest does not")
            if length != ABSENT and start + length > size:
                raise ValueError(f"it ends at byte {size}, its chunk {slot} at {start + length}")


def _unknown(layout: ArrayLayout, deep: bool) -> Iterator[str]:
    """What can't be known without a manifest."""
    checked = any(codec.name == "crc32c" or codec.config.get("checksum") is True for codec in layout.codecs)
    if not deep and not layout.raw:
        yield "whether every chunk decodes (--deep tries)"
    if not checked:
        yield "whether bits were flipped"
    yield "whether chunks took each other's place"
    if not layout.complete:
        yield "whether absent files were left out or lost"


def _summary(count: Count, *, deep: bool, far: bool) -> str:
    state = f"{count.damaged} damaged" if count.damaged else "ok"
    looked = "every byte" if deep else "metadata, manifest" if far else "presence, sizes, indexes"
    return f"{state}, {_size(count)} ({looked})"


def _size(count: Count) -> str:
    return f"{count.files} file{'' if count.files == 1 else 's'}, {format_bytes(count.bytes)}"
