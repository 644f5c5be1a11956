"""What the tools read from: the arrays of a store, any region of them, and stores that are made in their likeness.

Its law: chunks come through streamtrain's own readers, held against their manifest, so that damage is an error with its
place and never becomes data; memory is the region asked for and a chunk a thread.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from data_tools.convert import COMPLETE, Codec, create_array
from data_tools.others import OtherArray, dimension_names
from streamtrain.data.layout import ArrayLayout, Untrainable
from streamtrain.data.opening import OpenArray
from streamtrain.data.reading import Scratch
from streamtrain.data.vouching import in_threads, look
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import ConfigError, DataError

Region = tuple[tuple[int, int], ...]
"""Start and stop along each axis."""
TOGETHER = frozenset({"csr_matrix", "csr", "csc_matrix", "csc", "categorical", "dataframe", "awkward-array"})
"""Encodings, beside the nullable ones, of groups whose arrays mean something only together."""


class SourceArray:
    """One array: its layout, its attributes, its values by region."""

    def __init__(self, opened: OpenArray, node: zarr.Array[Any]) -> None:
        self._reader, self.layout, self.node = opened.reader, opened.layout, node
        self._reader.vouch("once")

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths."""
        return self.layout.shape

    @property
    def dims(self) -> tuple[str | None, ...]:
        """The axes' names; () where they have none."""
        return self.layout.dims

    @property
    def row_bytes(self) -> int:
        """Decoded bytes of one row along axis 0."""
        return math.prod(self.layout.shape[1:]) * self.layout.dtype.itemsize

    @property
    def chunk_memory(self) -> int:
        """Bytes that reading takes beside the region: encoded and decoded chunks of two threads."""
        return 4 * self.layout.chunk_bytes

    def whole(self) -> Region:
        """All of it."""
        return tuple((0, length) for length in self.layout.shape)

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows along axis 0, (stop - start, ...), in native byte order."""
        return self.region(((start, stop), *self.whole()[1:]))

    def region(self, region: Region) -> NDArray[Any]:
        """These values, in native byte order. Raises DataError for chunks that can't be used."""
        layout = self.layout
        out = np.empty(tuple(stop - start for start, stop in region), dtype=layout.native)
        chunks = itertools.product(
            *(range(start // c, -(-stop // c)) for (start, stop), c in zip(region, layout.chunk_shape, strict=True))
        )

        def fill(chunk: tuple[int, ...], scratch: Scratch) -> None:
            self._fill(out, region, chunk, scratch)

        for _ in in_threads(fill, chunks):
            pass
        return out

    def _fill(self, out: NDArray[Any], region: Region, chunk: tuple[int, ...], scratch: Scratch) -> None:
        box = self.layout.box(chunk)
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, box, strict=True)]
        inside = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
        target = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, region, strict=True))
        rows = (inside[0].start, inside[0].stop) if inside else (0, 1)
        data = self._reader.read(chunk, rows, scratch)
        out[target] = self.layout.fill_value if data is None else data[inside]

    def create(
        self,
        where: Path | zarr.Group,
        *,
        shape: tuple[int, ...] | None = None,
        chunks: tuple[int, ...] | None = None,
        shards: tuple[int, ...] | None = None,
        codec: Codec | None = None,
        stats: bool = True,
    ) -> zarr.Array[Any]:
        """A new array like this one, in Zarr 3, that writes every chunk: what is not given is kept.

        Without `stats`, statistics among the attributes are left out: they are of other data.
        """
        layout, node = self.layout, self.node
        shape = layout.shape if shape is None else shape
        shards = layout.shard_shape if chunks is None else shards
        chunks = layout.chunk_shape if chunks is None else chunks
        made = create_array(
            where,
            name=layout.name if isinstance(where, zarr.Group) else None,
            shape=shape,
            dtype=layout.native,
            chunks=tuple(min(c, max(1, s)) for c, s in zip(chunks, shape, strict=True)) if shards is None else chunks,
            shards=shards,
            codec=codec or _codec(layout),
            fill_value=layout.fill_value,
            dimension_names=dimension_names(node),
        )
        made.attrs.update(_attributes(node, stats=stats))
        return made


def _codec(layout: ArrayLayout) -> Codec:
    """Of the three that our writers know the one most like an array's own."""
    names = [codec.name for codec in layout.codecs]
    if layout.slow is None and layout.raw:
        return "raw"
    return "blosc" if "blosc" in names else "zstd"


def _first_dim(array: SourceArray | OtherArray) -> str | None:
    """The name of the dimension along axis 0, where it has one."""
    return array.dims[0] if array.dims else None


def _attributes(node: zarr.Array[Any] | zarr.Group, *, stats: bool) -> dict[str, Any]:
    """Its attributes, and what our writers say of every array that they make."""
    found = dict(node.attrs)
    own = found.get("streamtrain")
    kept = {key: value for key, value in own.items() if stats or key != "stats"} if isinstance(own, dict) else {}
    return {**found, "streamtrain": {**kept, **COMPLETE["streamtrain"]}}


class Source:
    """A store that is read from, by name of its arrays; `with Source(path) as source`."""

    def __init__(self, path: Path, *, only: Collection[str] | None = None) -> None:
        """`only`: the arrays that are asked for, where not all are.

        Raises DataError where the store or one of the arrays is missing or damaged, or none can be trained on.
        """
        self.path = path
        self._loop = ZarrLoop()
        try:
            node = None
            self.arrays: dict[str, SourceArray] = {}
            self.others: dict[str, OtherArray] = {}
            for name, opened in look(path, self._loop).items():
                if isinstance(opened, DataError) and not isinstance(opened, Untrainable):
                    if only is None or name in only:
                        raise opened
                    continue
                node = zarr.open(str(path), mode="r") if node is None else node
                member = zarr.open_array(str(path / name), mode="r")
                if isinstance(opened, Untrainable):
                    self.others[name] = OtherArray(name, member, opened)
                else:
                    self.arrays[name] = SourceArray(opened, member)
            if not self.arrays and self.others:
                raise next(iter(self.others.values())).why
        except BaseException:
            self._loop.close()
            raise
        self.group = node if isinstance(node, zarr.Group) else None
        """None where the store is one array."""

    @property
    def samples(self) -> int:
        """The length of axis 0 that most arrays share (of those that share as many, the larger). Raises DataError."""
        lengths = Counter(array.layout.shape[0] for array in self.arrays.values() if array.layout.ndim)
        if not lengths or not max(lengths):
            raise DataError(f"{self.path} has no rows", hint="an array with a first axis is needed")
        return max(lengths, key=lambda length: (lengths[length], length))

    def with_samples(self, named: Sequence[str] | None = None) -> dict[str, SourceArray | OtherArray]:
        """The arrays whose axis 0 numbers the samples, by name: the `named` ones, else those as long as most, among
        them texts and times.

        Raises DataError for groups whose arrays can't be moved each for itself, ConfigError where it is not clear which
        arrays have samples: one that no dimension's name tells apart may be part of a ragged array.
        """
        self._check_groups()
        if named is not None:
            return self._named(named)
        count = self.samples
        every = self._every()
        found = {name: array for name, array in every.items() if array.shape[:1] == (count,)}
        dims = {_first_dim(array) for array in found.values()} - {None}
        others = {name: array for name, array in every.items() if name not in found and array.shape}
        unclear = {name: each for name, each in others.items() if _first_dim(each) in {None, *dims}}
        if unclear or len(dims) > 1:
            lengths = ", ".join(f"{name!r} {array.shape[0]}" for name, array in {**found, **unclear}.items())
            raise ConfigError(
                f"{self.path}: which arrays have a row for each sample is not clear; rows: {lengths}",
                hint=f"name them: --arrays {','.join(found)} (the others are copied as they are); rows of different "
                "lengths, values beside offsets, can't be moved: a stream reads them shuffled as they are",
            )
        return found

    def _every(self) -> dict[str, SourceArray | OtherArray]:
        return {**self.arrays, **self.others}

    def _named(self, named: Sequence[str]) -> dict[str, SourceArray | OtherArray]:
        every = self._every()
        for name in named:
            if name not in every:
                raise ConfigError(
                    f"{self.path} has no array {name!r}", hint=f"there are: {', '.join(map(repr, every))}"
                )
        found = {name: every[name] for name in named}
        lengths = {array.shape[:1] for array in found.values()}
        if len(lengths) != 1 or lengths <= {(), (0,)}:
            shapes = ", ".join(f"{name!r} {array.shape}" for name, array in found.items())
            raise ConfigError(f"the named arrays do not have as many rows each: {shapes}", hint="name others")
        return found

    def _check_groups(self) -> None:
        """Raise DataError for a group that AnnData encodes."""
        if self.group is None:
            return
        for name in ["", *self._groups()]:
            said = (self.group[name] if name else self.group).attrs.get("encoding-type")
            if isinstance(said, str) and (said in TOGETHER or said.startswith("nullable-")):
                raise DataError(
                    f"{self.path}: the group {name or '/'!r} is a {said}: its arrays mean something only together, and "
                    "their rows can't be moved",
                    hint="a stream reads it shuffled as it is (shuffle='block'), and divides it by split=",
                )

    def _groups(self) -> list[str]:
        """Paths of the groups but for the root, the empty ones too."""
        assert self.group is not None
        there = {path for path, member in self.group.members(max_depth=None) if isinstance(member, zarr.Group)}
        around = {name.rsplit("/", up)[0] for name in self._every() for up in range(1, name.count("/") + 1)}
        return sorted(there | around)

    def create_groups(self, part: Path) -> Path | zarr.Group:
        """Make the groups of this store in `part`, with their attributes; what arrays are to be created in."""
        if self.group is None:
            return part
        made = zarr.create_group(part, attributes=dict(self.group.attrs))
        for name in self._groups():
            made.create_group(name, attributes=dict(self.group[name].attrs))
        return made

    def others_in(self, where: Path | zarr.Group) -> Iterator[tuple[OtherArray, zarr.Group]]:
        """The arrays that can't be trained on, each with the group that `create_groups` has made for them."""
        for array in self.others.values():
            assert isinstance(where, zarr.Group), "one array alone is none of the others"
            yield array, where

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.close()
