"""A full shuffle of a store's samples in one out-of-core pass: `reshuffle`.

Law: the new order is a function of the seed and the number of samples alone, the same for every array; memory holds one
bucket of rows. After it `shuffle="block"`, which reads each chunk once, draws from as good as a full shuffle.

External bucketing (Sanders 1998, "Random permutations on distributed, external and hierarchical memory"): rows are read
in order and appended to the bucket of their new place, in a file beside the target; then each bucket, which memory
holds, is put in order and written. Everything is read and written in long runs, twice.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from data_tools.convert import Codec, Progress
from data_tools.others import carry, carry_in_order
from data_tools.source import Source, SourceArray
from streamtrain.data.budget import format_bytes, parse_bytes
from streamtrain.data.files import read_into
from streamtrain.data.layout import ALONE
from streamtrain.data.permutation import Ints, Permutation, derive_key
from streamtrain.data.whole import check_apart, whole_or_nothing
from streamtrain.errors import ConfigError, EnvironmentProblem

SLICE = 1 << 16
"""Places are worked out for so many rows at once."""
PLACE_BYTES = 32
"""A row's number, its place and their sorting."""


def reshuffle(
    source: str | Path,
    target: str | Path,
    *,
    arrays: Sequence[str] | None = None,
    seed: int = 0,
    memory: str | int = "1GiB",
    codec: Codec | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `source` anew as `target` with its samples permuted, and return its path.

    `arrays` with a row for each sample are permuted, alike; by default those with as many rows as most have, where
    dimensions' names tell the others apart. The others are copied. Texts and times go with their samples, too, read
    whole. Layout, codec (unless given), attributes and
    dimension names are kept. On the disk of the target there must be room for the largest array, decoded, beside the
    target itself. Raises DataError for damage in the source, and for sparse matrices, categoricals and the like, whose
    rows can't be moved; ConfigError where it is not clear which arrays have samples, the memory is too small or the
    target exists, EnvironmentProblem where the disk is; what is left is nothing, or all.
    """
    target, limit = Path(target), parse_bytes(memory)
    if seed < 0:
        raise ConfigError(f"seed={seed} must be at least 0", hint="any number from 0 on will do")
    check_apart(source, target)
    with Source(Path(source)) as opened, whole_or_nothing(target) as part:
        sampled = opened.with_samples(arrays)
        permuted = {name for name, array in sampled.items() if isinstance(array, SourceArray) and array.row_bytes}
        count = next(iter(sampled.values())).shape[0]
        sizes = {name: buckets(array, limit) for name, array in opened.arrays.items() if name in permuted}
        _check_room(target.parent, max((opened.arrays[name].row_bytes * count for name in permuted), default=0))
        permutation = Permutation(count, derive_key(seed, "reshuffle"))
        where, work = opened.create_groups(part), _Progress(progress, count * len(permuted))
        for name, array in opened.arrays.items():
            made = array.create(where, codec=codec)
            if name in permuted:
                _permute(array, made, permutation, sizes[name], part / ".rows", work)
            else:
                copy(array, made, limit)
        for other, group in opened.others_in(where):
            if other.name in sampled:
                carry_in_order(other, group, limit, _places(permutation.forward, 0, count))
            else:
                carry(other, group, limit)
    return target


class _Progress:
    """Rows that are written, over all arrays."""

    def __init__(self, tell: Progress | None, rows: int) -> None:
        self._tell, self._rows, self._done = tell, rows, 0

    def __call__(self, rows: int) -> None:
        self._done += rows
        if self._tell is not None:
            self._tell(self._done, self._rows)


def buckets(array: SourceArray, memory: int) -> tuple[int, int]:
    """Rows of a bucket, and rows that are read together. Raises ConfigError where the least does not fit."""
    unit = array.layout.file_shape[0]
    row = array.row_bytes
    rest = memory - array.chunk_memory
    # Of a bucket: as it came and in order; of a unit: what the writer makes of it.
    bucket = (rest - 3 * unit * row) // (2 * row + PLACE_BYTES) // unit * unit
    least = array.chunk_memory + unit * (5 * row + PLACE_BYTES)
    if bucket < unit:
        raise ConfigError(
            f"memory={format_bytes(memory)} is too small for array {array.layout.name or ALONE!r}: the least that "
            f"works is {format_bytes(least)}",
            hint=f"memory={-(-least // 2**20)}MiB, or rechunk it to smaller chunks first",
        )
    chunk = array.layout.chunk_shape[0]
    band = rest // (2 * row + PLACE_BYTES)
    return bucket, max(1, band // chunk * chunk or min(band, chunk))


def _check_room(folder: Path, need: int) -> None:
    """Raise EnvironmentProblem where the disk has no room for so many bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise EnvironmentProblem(
            f"{folder} has {format_bytes(free)} free; the rows on their way take {format_bytes(need)}",
            hint="choose a target on a larger disk",
        )


def _permute(
    array: SourceArray,
    made: zarr.Array[Any],
    permutation: Permutation,
    sizes: tuple[int, int],
    rows: Path,
    progress: _Progress,
) -> None:
    """Through the file `rows`, where a bucket's rows lie in the order of the source."""
    bucket, band = sizes
    fd = os.open(rows, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _scatter(array, permutation, bucket, band, fd)
        for start in range(0, array.layout.shape[0], bucket):
            _put_in_order(array, made, permutation, (start, min(start + bucket, array.layout.shape[0])), fd)
            progress(min(bucket, array.layout.shape[0] - start))
    finally:
        os.close(fd)
        rows.unlink()


def _scatter(array: SourceArray, permutation: Permutation, bucket: int, band: int, fd: int) -> None:
    """Append each row to its bucket, which begins where its first row will lie."""
    count, row = array.layout.shape[0], array.row_bytes
    filled = np.zeros(-(-count // bucket), dtype=np.int64)
    for start in range(0, count, band):
        stop = min(start + band, count)
        numbers = _places(permutation.inverse, start, stop) // bucket
        order = np.argsort(numbers, kind="stable")
        values = _as_rows(array.rows(start, stop), row)[order]
        cuts = np.searchsorted(numbers[order], np.arange(len(filled) + 1)).tolist()
        for number, (a, b) in enumerate(itertools.pairwise(cuts)):
            if b > a:
                _write(fd, values[a:b], (number * bucket + int(filled[number])) * row)
                filled[number] += b - a
        del values, numbers, order  # before the next band is there


def _write(fd: int, values: NDArray[Any], offset: int) -> None:
    view, done = np.ascontiguousarray(values).view(np.uint8).reshape(-1).data, 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _put_in_order(
    array: SourceArray, made: zarr.Array[Any], permutation: Permutation, bounds: tuple[int, int], fd: int
) -> None:
    """Read one bucket, whose rows came in the order of their numbers in the source, and write it."""
    (start, stop), row, unit = bounds, array.row_bytes, array.layout.file_shape[0]
    came = np.empty((stop - start) * row, dtype=np.uint8)
    if read_into(fd, came, start * row) != len(came):
        raise EnvironmentProblem("rows on their way were lost", hint="check the disk of the target")
    order = np.argsort(_places(permutation.forward, start, stop), kind="stable")
    flat = np.empty_like(came)
    _as_rows(flat, row)[order] = _as_rows(came, row)
    del came, order
    values = flat.view(array.layout.native).reshape(-1, *array.layout.shape[1:])
    for at in range(start, stop, unit):
        made[at : min(at + unit, stop)] = values[at - start : at - start + unit]


def _places(function: Any, start: int, stop: int) -> Ints:
    found = np.empty(stop - start, dtype=np.int64)
    for at in range(start, stop, SLICE):
        some = np.arange(at, min(at + SLICE, stop), dtype=np.int64)
        found[at - start : at - start + len(some)] = function(some)
    return found


def _as_rows(values: NDArray[Any], row: int) -> NDArray[Any]:
    """One element a row, whose copies are plain moves of bytes."""
    return values.reshape(-1).view(np.uint8).view(np.dtype((np.void, row)))


def copy(array: SourceArray, made: zarr.Array[Any], memory: int, start: int = 0, stop: int | None = None) -> None:
    """Copy an array's rows `start` to `stop` in bands of whole chunks, or shards, of what is made."""
    if not array.layout.ndim:
        made[...] = array.region(())
        return
    stop = array.layout.shape[0] if stop is None else stop
    unit = made.shards[0] if made.shards else made.chunks[0]
    band = max(1, (memory - array.chunk_memory) // (4 * max(1, array.row_bytes)) // unit) * unit
    for at in range(start, stop, band):
        some = min(at + band, stop)
        made[at - start : some - start] = array.rows(at, some)
