"""Offsets: where the rows of ragged and sparse arrays begin. Read once, whole, and checked before any is used.

Its law: an offset that can't be is an error that names array, row and chunk, not a wrong row.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from streamtrain.data.budget import format_bytes
from streamtrain.data.cache import ChunkCache
from streamtrain.data.coded_feed import CodesFeed, NullableFeed
from streamtrain.data.columns import whole
from streamtrain.data.cropping import feed_of
from streamtrain.data.feed import Feed, Site
from streamtrain.data.framing import Field
from streamtrain.data.layout import decoded_whole
from streamtrain.data.opening import OpenArray
from streamtrain.data.permutation import Ints
from streamtrain.data.ragged import Table
from streamtrain.data.ragged_feed import LengthsFeed, RaggedFeed
from streamtrain.data.ragged_site import LengthsSite, RaggedArray, RaggedSite
from streamtrain.data.reading import ChunkReader
from streamtrain.data.values import Change
from streamtrain.data.windows import ReachingSite
from streamtrain.errors import ConfigError, DataError

LENGTHS = ".lengths"
"""Ending of what the lengths of an array's rows are called."""
MENDED = "restore the file from its source, or convert the data again"


def sparse_rows(array: OpenArray, name: str, memory: int) -> RaggedArray:
    """What a sparse matrix is beside its values. Blocks: off the event loop. Raises DataError, ConfigError."""
    indices, offsets = array.beside
    assert array.encoding is not None
    rows, width = array.encoding.shape
    _check_numbers(indices, 1)
    if array.layout.ndim != 1 or indices.layout.shape != array.layout.shape:
        raise DataError(
            f"the sparse array {name!r} has values of shape {array.layout.shape} and columns of shape "
            f"{indices.layout.shape}: there must be one column for each value",
            hint=MENDED,
        )
    if offsets.layout.shape != (rows + 1,):
        raise DataError(
            f"array {offsets.layout.name!r} has shape {offsets.layout.shape}; for {rows} rows there must be {rows + 1}",
            hint=MENDED,
        )
    if not rows or not width:
        raise DataError(f"the sparse array {name!r} has shape {(rows, width)}: it holds nothing", hint="name another")
    return RaggedArray(Table(read_offsets(offsets, array.layout.shape[0], memory)), width, indices.layout)


def read_offsets(offsets: OpenArray, elements: int, memory: int) -> Ints:
    """The first element of each row, and the end of the last; `elements` is how many there are.

    Blocks: off the event loop. Raises DataError where they can't be, ConfigError where `memory` has no room for them.
    """
    layout = offsets.layout
    _check_numbers(offsets, 1)
    size = 8 * layout.shape[0]
    if size > memory:
        raise ConfigError(
            f"memory={format_bytes(memory)} is too small: the offsets in array {layout.name!r} alone take "
            f"{format_bytes(size)}",
            hint="raise memory=: 8 bytes a row stay in it",
        )
    found: Ints = whole(offsets).astype(np.int64)
    if not len(found):
        raise DataError(f"array {layout.name!r} holds no offsets: there must be one more than rows", hint=MENDED)
    falls = np.diff(found) < 0
    if falls.any():
        row = int(np.flatnonzero(falls)[0])
        _refuse(offsets, row + 1, f"row {row} would end at element {found[row + 1]}, before its first, {found[row]}")
    if found[0] < 0:
        _refuse(offsets, 0, f"row 0 would begin at element {found[0]}")
    if found[-1] > elements:
        row = int(np.flatnonzero(found > elements)[0])
        _refuse(offsets, row, f"row {max(0, row - 1)} would end at element {found[row]}, and there are {elements}")
    return found


def _check_numbers(array: OpenArray, ndim: int) -> None:
    layout = array.layout
    if layout.dtype.kind not in "iu" or layout.ndim != ndim:
        raise DataError(
            f"array {layout.name!r} must hold whole numbers along one axis; it is {layout.dtype} of shape "
            f"{layout.shape}",
            hint=MENDED,
        )


def _refuse(offsets: OpenArray, place: int, what: str) -> None:
    layout = offsets.layout
    raise DataError(f"array {layout.name!r}: chunk {place // layout.chunk_shape[0]}: {what}", hint=MENDED)


@dataclass(frozen=True)
class RaggedWish:
    """What the user says of rows of different lengths."""

    offsets: Mapping[str, str] = field(default_factory=dict)
    """The array of each values array's offsets."""
    max_length: int | None = None
    pad_value: float = 0
    kept_sparse: bool = False
    """Whether batches have sparse rows as they are."""

    def lengths_of(self, names: Iterable[str]) -> list[str]:
        """What the lengths of these arrays' rows are called among the inputs."""
        return [f"{name}{LENGTHS}" for name in names if name in self.offsets]


def ragged_arrays(arrays: Mapping[str, OpenArray], wish: RaggedWish, memory: int) -> dict[str, RaggedArray]:
    """Of the arrays whose rows have different lengths, and of their lengths: what they are made of, by name.

    Blocks: off the event loop. Raises DataError, ConfigError.
    """
    found: dict[str, RaggedArray] = {}
    for name, array in arrays.items():
        if array.encoding is not None and array.encoding.kind == "csr":
            found[name] = replace(sparse_rows(array, name, memory), kept_sparse=wish.kept_sparse)
        elif name in wish.offsets:
            found[name] = _padded_rows(array, arrays[wish.offsets[name]], wish, memory)
            found[f"{name}{LENGTHS}"] = replace(found[name], lengths=True)
    if wish.kept_sparse and all(rows.columns is None for rows in found.values()):
        raise ConfigError("sparse=True, and no array of the stream is sparse", hint="leave sparse= out")
    return found


def as_long_as_the_longest(stores: Sequence[Mapping[str, RaggedArray]]) -> list[dict[str, RaggedArray]]:
    """The same, with rows laid out alike in all stores. Raises DataError where no store has a row that is not empty."""
    padded = [{name: each.width for name, each in rows.items() if each.columns is None} for rows in stores]
    widest = {name: max(widths.get(name, 0) for widths in padded) for name in padded[0]}
    if empty := [name for name, width in widest.items() if not width]:
        raise DataError(f"array {empty[0]!r}: all of its rows are empty", hint="give max_length=")

    def widened(rows: RaggedArray, width: int) -> RaggedArray:
        return replace(rows, table=Table(rows.table.offsets, width), width=width)

    return [
        {
            name: widened(each, widest[name]) if each.columns is None and name in widest else each
            for name, each in rows.items()
        }
        for rows in stores
    ]


def _padded_rows(values: OpenArray, offsets: OpenArray, wish: RaggedWish, memory: int) -> RaggedArray:
    if not values.layout.ndim:
        raise DataError(f"array {values.layout.name!r} has no axis along which rows could lie", hint="name another")
    found = read_offsets(offsets, values.layout.shape[0], memory)
    if len(found) < 2:
        raise DataError(f"array {offsets.layout.name!r} has {len(found)} offsets: no rows", hint=MENDED)
    width = int(np.diff(found).max()) if wish.max_length is None else wish.max_length
    return RaggedArray(Table(found, width), width, fill=wish.pad_value)


def settled(part: Field, change: Change) -> Change:
    """What is done to one array, where it is no plain one. Raises ConfigError for what can't be done to it."""
    if part.ragged is None:
        plain = change.plain and change.dtype == part.layout.native
        return replace(change, dtype=part.dtype) if plain else change
    if part.ragged.lengths:
        return Change(None, None, np.dtype(np.int64), ())
    if part.ragged.columns is not None and not change.plain:
        raise ConfigError(
            f"normalize= and decode_cf= of the sparse array {part.name!r} would make a number of each of its zeros",
            hint="scale its batches in a transform",
        )
    _check_fill(part.name, part.ragged.fill, change.dtype)
    return change


def _check_fill(name: str, fill: float, dtype: np.dtype[Any]) -> None:
    with np.errstate(all="ignore"):
        kept = np.array(fill).astype(dtype)
    if dtype.kind not in "fc" and kept != fill:
        raise ConfigError(
            f"pad_value={fill!r} is no {dtype}, which {name!r} is", hint="give another, or a float dtype="
        )


def feed_for(
    array: OpenArray,
    site: Site,
    cache: ChunkCache | None,
    number: int,
    store: Hashable,
    change: Change | None,
    tolerant: Callable[[OpenArray], ChunkReader],
) -> Feed:
    """What reads this array of store `number`; `tolerant` gives the reader that is to be used, `store` is its part of
    what chunks are called in the cache."""
    reader = tolerant(array)
    if isinstance(site, LengthsSite):
        return LengthsFeed(site, reader, None, store)
    kept = cache if decoded_whole(site.layout) else None
    if isinstance(site, RaggedSite):
        ragged = RaggedFeed(site, reader, kept, store, change=change)
        ragged.beside = tuple(_beside(each, cache, store, tolerant) for each in array.beside[:1])
        return ragged
    if array.encoding is None:
        return feed_of(site, reader, kept, store, change, number=number)
    if isinstance(site, ReachingSite):
        raise ConfigError(f"array {site.layout.name!r} is no plain array, over which windows and crops could move")
    if array.encoding.kind == "categorical":
        codes = CodesFeed(site, reader, kept, store, change=change)
        codes.categories = len(array.categories or ())
        return codes
    nullable = NullableFeed(site, reader, kept, store, change=change)
    mask = array.beside[0]
    masks = replace(site, layout=mask.layout, dtype=mask.layout.native)
    nullable.beside = (Feed(masks, tolerant(mask), cache if decoded_whole(mask.layout) else None, store),)
    return nullable


def _beside(
    array: OpenArray, cache: ChunkCache | None, store: Hashable, tolerant: Callable[[OpenArray], ChunkReader]
) -> Feed:
    """What reads the columns of sparse rows, chunk by chunk."""
    site = Site(array.layout, (0,), (1,), array.layout.native)
    return Feed(site, tolerant(array), cache if decoded_whole(array.layout) else None, store)
