"""From .npy and .npz files to Zarr: `convert`.

Law: memory holds one band of rows at a time, and a store appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from streamtrain.data.budget import format_bytes
from streamtrain.data.layout import MAX_CHUNK_BYTES, MAX_SAMPLES, TRAINABLE, trainable
from streamtrain.data.whole import whole_or_nothing
from streamtrain.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Codec = Literal["raw", "zstd", "blosc"]
Progress = Callable[[int, int], None]
"""Called with the rows that are written and all rows."""

COMPLETE = {"streamtrain": {"complete": True, "manifest": True}}
"""Attribute of arrays whose writer leaves no chunk out, and has a manifest beside them."""
STREAMABLE = {
    "Python objects": "make numbers of them, such as array.astype('float32'), and save those",
    "a single number": "save it with an axis of samples: array[None]",
    "Fortran order": "save it in C order: numpy.ascontiguousarray(array)",
}
"""What to do with arrays that can't be read row by row."""
BAND_BYTES = 16 << 20
"""Aim for the bytes of a chunk where the caller names none."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an array is laid out on disk."""

    chunks: tuple[int, ...] | None = None
    """Samples of a chunk along each axis; None: whole rows, 16 MiB of them."""
    shards: tuple[int, ...] | None = None
    """Several chunks in one file; a multiple of `chunks` along each axis. None: a file for each chunk."""
    codec: Codec = "zstd"
    """`zstd` at level 1 or `blosc` (lz4, bitshuffle), both with a checksum, so that a flipped bit is noticed; or `raw`
    bytes, which can be mapped into memory and have none."""

    def resolve(self, shape: Sequence[int], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Chunks and shards for an array of this shape; raises ConfigError where they do not fit it."""
        row = max(1, int(np.prod(shape[1:], dtype=np.int64)) * itemsize)
        chunks = self.chunks or (max(1, min(shape[0], BAND_BYTES // row)), *shape[1:])
        for name, sizes in (("chunks", chunks), ("shards", self.shards or chunks)):
            if len(sizes) != len(shape) or min(sizes) < 1:
                raise ConfigError(
                    f"{name}={tuple(sizes)} does not fit an array of shape {tuple(shape)}",
                    hint=f"give {len(shape)} positive sizes",
                )
        if self.shards and any(s % c for s, c in zip(self.shards, chunks, strict=True)):
            raise ConfigError(
                f"shards={self.shards} is no multiple of chunks={chunks}", hint="a shard holds whole chunks"
            )
        return tuple(chunks), self.shards


def convert(
    source: str | Path,
    target: str | Path,
    *,
    member: str | None = None,
    every: int = 1,
    layout: Layout | None = None,
    attributes: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one array of a .npy or .npz file as the Zarr array `target`, and return its path.

    A target within a folder that is called `*.zarr` becomes an array of that store, which is made where there is none:
    `convert("x.npy", "data.zarr/x")`. `member` names the array in an .npz; it may be left out where there is but one.
    With `every=n` each n-th element along each axis is kept. Memory: one band of rows (those of a shard or chunk),
    whatever the size of the array. Raises DataError where the source is missing, cut short, damaged, empty or of a kind
    that cannot be streamed (Fortran order, Python objects, text), ConfigError where the layout does not fit,
    EnvironmentProblem where the disk refuses, and leaves no half-written store.
    """
    source, target, layout = Path(source), Path(target), layout or Layout()
    if every < 1:
        raise ConfigError(f"every={every} must be at least 1", hint="every=1 keeps all")
    groups = _groups_of(target)
    with _open_npy(source, member) as (stream, size):
        shape, dtype = _read_header(stream, source)
        _check_size(size - stream.tell(), shape, dtype, source)
        kept = tuple(-(-size // every) for size in shape)
        chunks, shards = layout.resolve(kept, dtype.itemsize)
        need = check_size(kept, dtype.itemsize, chunks, layout.codec)
        with whole_or_nothing(target, need=need) as part:
            array = create_array(part, shape=kept, dtype=dtype, chunks=chunks, shards=shards, codec=layout.codec)
            array.attrs.update({**(attributes or {}), **COMPLETE})
            for start, band in _bands(stream, source, shape, dtype, rows=(shards or chunks)[0], every=every):
                array[start : start + len(band)] = band
                if progress:
                    progress(start + len(band), kept[0])
            _check_end(stream, source)
            for group in groups:
                if not (group / "zarr.json").exists():
                    zarr.create_group(group)
    return target


def _groups_of(target: Path) -> list[Path]:
    """The folders from the store's own, which is called `*.zarr`, down to the array: they are to be groups.

    Raises ConfigError where one of them is something else.
    """
    store = next((folder for folder in target.parents if folder.suffix == ".zarr"), None)
    if store is None:
        return []
    groups = [store, *reversed(target.parents[: target.parents.index(store)])]
    for group in groups:
        if any((group / name).exists() for name in (".zgroup", ".zarray")):
            raise ConfigError(f"{group} is Zarr 2, where no array of Zarr 3 is seen", hint="name a store of its own")
        if (group / "zarr.json").is_file() and _consolidated(group / "zarr.json"):
            logger.warning("%s has consolidated metadata, in which the new array is not: consolidate them anew", group)
    return groups


def _consolidated(metadata: Path) -> bool:
    """Whether a group lists its arrays itself; what it lacks is then not seen."""
    try:
        found = json.loads(metadata.read_bytes())
    except ValueError:
        return False  # who opens it says so
    return isinstance(found, dict) and bool(found.get("consolidated_metadata"))


def create_array(
    where: Path | zarr.Group,
    *,
    name: str | None = None,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None = None,
    codec: Codec = "zstd",
    fill_value: Any = 0,
    dimension_names: Sequence[str | None] | None = None,
) -> zarr.Array[Any]:
    """A new Zarr 3 array that writes chunks of zeros too and says so, so that a missing file always means damage.

    Raises ConfigError for an unknown codec.
    """
    if codec not in get_args(Codec):
        raise ConfigError(f"codec={codec!r} is unknown", hint=f"one of {', '.join(get_args(Codec))}")
    compressors: Any = {
        "raw": None,
        "zstd": ZstdCodec(level=1, checksum=True),
        "blosc": (
            BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=dtype.itemsize),
            Crc32cCodec(),
        ),
    }[codec]
    layout: dict[str, Any] = {"shape": shape, "dtype": dtype, "chunks": chunks, "shards": shards}
    layout |= {
        "compressors": compressors,
        "config": {"write_empty_chunks": True},
        "attributes": copy.deepcopy(COMPLETE),
    }
    layout |= {"fill_value": fill_value, "dimension_names": dimension_names}
    if isinstance(where, zarr.Group):
        assert name is not None
        return where.create_array(name, **layout)
    return zarr.create_array(where, name=name, **layout)


def check_size(shape: tuple[int, ...], itemsize: int, chunks: tuple[int, ...], codec: Codec) -> int:
    """The bytes that an array takes for certain: those of raw chunks, 0 of compressed ones.

    Raises ConfigError for one that could not be read again.
    """
    chunk = math.prod(chunks) * itemsize
    if math.prod(shape) > MAX_SAMPLES or chunk > MAX_CHUNK_BYTES:
        raise ConfigError(
            f"an array of shape {shape} in chunks of {format_bytes(chunk)} is too large",
            hint=f"2^48 elements and chunks of {format_bytes(MAX_CHUNK_BYTES)} are the most that streams read",
        )
    return (
        math.prod(-(-size // step) for size, step in zip(shape, chunks, strict=True)) * chunk if codec == "raw" else 0
    )


@contextlib.contextmanager
def _open_npy(source: Path, member: str | None) -> Iterator[tuple[IO[bytes], int]]:
    """The bytes of the .npy file, or of that member of the .npz, as a stream, and how many they are."""
    try:
        if not source.exists():
            raise DataError(f"{source} does not exist", hint="check the path")
        if not source.is_file():
            raise DataError(f"{source} is no regular file", hint="only .npy and .npz are read")
        if source.suffix == ".npy":
            with source.open("rb") as stream:
                yield stream, os.fstat(stream.fileno()).st_size
            return
        with zipfile.ZipFile(source) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            chosen = member if member is not None else names[0] if len(names) == 1 else ""
            if chosen not in names:
                raise ConfigError(
                    f"{source}: no array {member!r}" if member else f"{source} holds {len(names) or 'no'} arrays",
                    hint=f"choose one of: {', '.join(names)}" if names else "only .npy and .npz are read",
                )
            with archive.open(f"{chosen}.npy") as stream:
                yield stream, archive.getinfo(f"{chosen}.npy").file_size
    except OSError as error:
        raise DataError(f"{source} can't be read: {error.strerror or error}", hint="check the file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{source} is damaged or no .npy or .npz file: {error}", hint="fetch it again") from error


def _read_header(stream: IO[bytes], source: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
        raise
    except Exception as error:  # the header is a Python literal: what its parser raises is anybody's guess
        raise DataError(f"{source}: no array in numpy's format: {error}", hint="only .npy and .npz are read") from error
    if fortran or dtype.hasobject or not shape:
        kind = "Python objects" if dtype.hasobject else "a single number" if not shape else "Fortran order"
        raise DataError(f"{source} holds {kind}, which cannot be streamed", hint=STREAMABLE[kind])
    if not trainable(dtype):
        raise DataError(f"{source} holds {dtype}, which can't be trained on", hint=f"supported: {TRAINABLE}")
    return tuple(int(size) for size in shape), dtype


def _check_size(have: int, shape: tuple[int, ...], dtype: np.dtype[Any], source: Path) -> None:
    """Believe a header only as far as there are bytes behind it."""
    if min(shape) < 1:
        raise DataError(f"{source} holds an array of shape {shape}, without a sample", hint="choose an array with rows")
    need = math.prod(shape) * dtype.itemsize
    if have < need:
        raise DataError(f"{source} is cut short: {have} of {need} bytes after its header", hint="fetch it again")
    if have > need:
        raise DataError(f"{source} goes on after its array", hint="it is no plain .npy file; save it again")


def _bands(
    stream: IO[bytes], source: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, rows: int, every: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Bands of up to `rows` kept rows, each with its first row's number among the kept."""
    row = np.empty(shape[1:], dtype=dtype)
    inner = (slice(None, None, every),) * (len(shape) - 1)
    kept = -(-shape[0] // every)
    band = np.empty((min(rows, kept), *row[inner].shape), dtype=dtype)
    if row.ndim == 0:  # a one-dimensional source: one element is no row worth a read
        yield from _flat_bands(stream, source, shape[0], dtype, rows=rows, every=every)
        return
    view = row.reshape(-1).view(np.uint8).data
    for number in range(shape[0]):
        _fill(stream, view, source, number)
        if number % every:
            continue
        place = number // every
        band[place % rows] = row[inner]
        if (place + 1) % rows == 0 or place + 1 == kept:
            yield place - place % rows, band[: place % rows + 1]


def _flat_bands(
    stream: IO[bytes], source: Path, size: int, dtype: np.dtype[Any], *, rows: int, every: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    kept = -(-size // every)
    band = np.empty(min(rows, kept), dtype=dtype)
    some = np.empty(min(size, max(1, BAND_BYTES // dtype.itemsize)), dtype=dtype)
    filled = first = 0
    for start in range(0, size, len(some)):
        part = some[: size - start]
        _fill(stream, part.view(np.uint8).data, source, start)
        chosen = part[-start % every :: every]
        while len(chosen):
            taken = chosen[: rows - filled]
            band[filled : filled + len(taken)] = taken
            filled, chosen = filled + len(taken), chosen[len(taken) :]
            if filled == rows or first + filled == kept:
                yield first, band[:filled]
                filled, first = 0, first + filled


def _fill(stream: IO[bytes], view: memoryview, source: Path, row: int) -> None:
    done = 0
    while done < len(view):
        try:
            got: int = stream.readinto(view[done:])  # type: ignore[attr-defined]
        except OSError as error:
            raise DataError(f"{source} can't be read in row {row}: {error}", hint="fetch it again") from error
        if not got:
            raise DataError(f"{source} is cut short in row {row}", hint="fetch it again")
        done += got


def _check_end(stream: IO[bytes], source: Path) -> None:
    """Read the end, where zip keeps the checksum that a damaged member fails."""
    if stream.read(1):
        raise DataError(f"{source} goes on after its array", hint="it is no plain .npy file; save it again")
