"""The same values in other chunks, shards or codec: `rechunk`.

Law: memory holds one tile, as many whole chunks (or shards) of the target as fit; values, attributes and dimension
names stay what they are.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_tools.convert import Codec, Progress
from data_tools.others import carry
from data_tools.source import Region, Source, SourceArray
from streamtrain.data.budget import format_bytes, parse_bytes
from streamtrain.data.layout import ALONE, ArrayLayout
from streamtrain.data.whole import check_apart, whole_or_nothing
from streamtrain.errors import ConfigError

logger = logging.getLogger(__name__)

Sizes = Mapping[str, Sequence[int]]
"""Lengths along each axis by the array's name, "" for all others; -1 is the whole axis, and so is what is left out."""


def rechunk(
    source: str | Path,
    target: str | Path,
    *,
    chunks: Sizes | None = None,
    shards: Sizes | None = None,
    codec: Codec | None = None,
    memory: str | int = "1GiB",
    progress: Progress | None = None,
) -> Path:
    """Write `source` anew as `target`, laid out like this, and return its path.

    An array that `chunks` does not name keeps its chunks, and its shards unless `shards` names it. Texts, times and
    others that can't be trained on are copied in their own chunks and codecs. Raises DataError for
    damage in the source, ConfigError for sizes that do not fit or too little memory; what is left is nothing, or all.
    """
    target, limit = Path(target), parse_bytes(memory)
    check_apart(source, target)
    with Source(Path(source)) as opened, whole_or_nothing(target) as part:
        layouts = {
            name: (chosen(array.layout, name, chunks), chosen(array.layout, name, shards))
            for name, array in opened.arrays.items()
        }
        for given in (*(chunks or ()), *(shards or ())):
            if given in opened.others:
                raise ConfigError(f"{opened.others[given].why}; it is copied as it is", hint="give no sizes for it")
            if given and given not in opened.arrays:
                raise ConfigError(
                    f"{source} has no array {given!r}", hint=f"there are: {', '.join(map(repr, opened.arrays))}"
                )
        _check_axes(opened, chunks=chunks, shards=shards)
        where = opened.create_groups(part)
        for name, array in opened.arrays.items():
            new_chunks, new_shards = layouts[name]
            if new_chunks is None and new_shards is not None:
                new_chunks = array.layout.chunk_shape
            if new_shards and new_chunks and any(s % c for s, c in zip(new_shards, new_chunks, strict=True)):
                raise ConfigError(
                    f"shards={new_shards} are no multiple of chunks={new_chunks}", hint="a shard holds whole chunks"
                )
            made = array.create(where, chunks=new_chunks, shards=new_shards, codec=codec)
            unit = made.shards or made.chunks
            every = list(tiles(array, unit, limit))
            for done, tile in enumerate(every, 1):
                made[tuple(slice(*bounds) for bounds in tile)] = array.region(tile)
                if progress:
                    progress(done, len(every))
        for other, group in opened.others_in(where):
            carry(other, group, limit)
    return target


def _check_axes(source: Source, **given: Sizes | None) -> None:
    """Raise ConfigError for sizes of all arrays that are more than any array has axes."""
    most = max(array.layout.ndim for array in source.arrays.values())
    for option, sizes in given.items():
        every = tuple((sizes or {}).get("", ()))
        if len(every) > most:
            raise ConfigError(
                f"{option}={','.join(map(str, every))} has {len(every)} sizes, and no array of {source.path} has more "
                f"than {most} {'axis' if most == 1 else 'axes'}",
                hint=f"give at most {most}; what is left out is the whole axis",
            )


def chosen(layout: ArrayLayout, name: str, sizes: Sizes | None) -> tuple[int, ...] | None:
    """The lengths given for this array; None where there are none. Raises ConfigError where they do not fit it."""
    given = (sizes or {}).get(name, (sizes or {}).get(""))
    if given is None or not layout.ndim:
        return None
    if len(given) > layout.ndim:
        if name not in (sizes or {}):
            given = given[: layout.ndim]  # meant for arrays of more axes
        else:
            raise ConfigError(f"{tuple(given)} has more axes than array {name!r} of shape {layout.shape}")
    whole = [*given, *(-1 for _ in range(layout.ndim - len(given)))]
    if any(size < 1 and size != -1 for size in whole):
        raise ConfigError(f"sizes {tuple(given)} must be at least 1, or -1 for the whole axis")
    return tuple(max(1, length) if size == -1 else size for size, length in zip(whole, layout.shape, strict=True))


def tiles(array: SourceArray, unit: Sequence[int], memory: int) -> Iterator[Region]:
    """Regions of whole units, as large as the memory allows; says so where source chunks are read again and again."""
    layout = array.layout
    if not layout.ndim:
        yield ()
        return
    if 0 in layout.shape:
        return
    tile, size = [min(u, s) for u, s in zip(unit, layout.shape, strict=True)], layout.dtype.itemsize
    limit = (memory - array.chunk_memory) // 4
    if math.prod(tile) * size > limit:
        least = array.chunk_memory + 4 * math.prod(tile) * size
        raise ConfigError(
            f"memory={format_bytes(memory)} is too small for array {layout.name or ALONE!r}: the least that works is "
            f"{format_bytes(least)}",
            hint=f"memory={-(-least // 2**20)}MiB, or smaller chunks or shards",
        )
    for axis in range(layout.ndim - 1, -1, -1):
        times = max(1, limit // max(1, math.prod(tile) * size))
        tile[axis] = min(layout.shape[axis], tile[axis] * times)
        tile[axis] = tile[axis] if tile[axis] == layout.shape[axis] else tile[axis] // unit[axis] * unit[axis]
    again = math.prod(_touched(s, t, c) for s, t, c in zip(layout.shape, tile, layout.chunk_shape, strict=True))
    if again > 2:
        logger.warning("array %s: each chunk is read about %.0f times; more memory reads less", layout.name, again)
    spans = [range(0, length, step) for length, step in zip(layout.shape, tile, strict=True)]
    for first in itertools.product(*spans):
        yield tuple((a, min(a + step, length)) for a, step, length in zip(first, tile, layout.shape, strict=True))


def _touched(length: int, tile: int, chunk: int) -> float:
    """How often a chunk is read, along one axis."""
    touches = sum(-(-min(a + tile, length) // chunk) - a // chunk for a in range(0, length, tile))
    return touches / max(1, -(-length // chunk))
