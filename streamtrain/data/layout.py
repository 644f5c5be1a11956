"""Where an array's bytes lie: chunk grid, shards, keys and codecs, read from its metadata. Pure, no I/O.

What the fast lanes don't know is not refused here: `ArrayLayout.slow` says why zarr's own API must read the array.
What can't be trained on, or claims sizes that nobody has, is refused by name before any read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from streamtrain.data.budget import format_bytes
from streamtrain.data.codecs import ALIGN, CHECKSUMS, Codec, chain_of, decode_room, endian_of, slow_codec
from streamtrain.errors import DataError

MAX_SAMPLES = 1 << 48
TOGETHER_BYTES = 1 << 20
"""Chunks of so many bytes in all are decoded side by side: what is put to its places is then in the cache still."""
MAX_CHUNK_BYTES = 1 << 36
ABSENT = (1 << 64) - 1
ALONE = "array"
"""What the array of a store that is one array is called: in messages, in `statistics()`, by every command."""
TRAINABLE = "bool, int8 to int64, uint8 to uint64, float16 to float64, complex64 and complex128"
BFLOAT16 = "bfloat16"
"""A dtype of the package ml_dtypes, which numpy takes for bytes; trained on where zarr has been taught it."""

Region = tuple[tuple[int, int], ...]
"""For each axis the bounds of a box within a chunk."""


@dataclass(frozen=True)
class ArrayLayout:
    """How one array is stored."""

    name: str
    """Path of the array in its store."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """As stored: may be of foreign byte order."""
    chunk_shape: tuple[int, ...]
    """The unit that is decoded: the inner chunk where there are shards."""
    shard_shape: tuple[int, ...] | None
    codecs: tuple[Codec, ...]
    """Filters, compressors and checksums in the order of encoding, as steps on bytes."""
    axes: tuple[int, ...]
    """Order of the axes in the stored bytes: axes[k] is the array axis that lies k-th."""
    separator: str
    prefix: str
    """What chunk keys begin with: "c" in Zarr 3, empty in Zarr 2."""
    fill_value: Any
    index_at_start: bool = False
    slow: str | None = None
    """Why the fast lanes can't read it; None if they can."""
    dims: tuple[str | None, ...] = ()
    """Names of the axes; empty where nobody named them."""
    complete: bool = False
    """Whether its writer vouches that no chunk is left out: then an absent chunk is damage, not fill."""
    manifest: bool = False
    """Whether its writer says that it has a manifest: then its loss is worth a word."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """The array's own; `_FillValue` among them where xarray keeps it in Zarr 2: as the fill value of the chunks."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def native(self) -> np.dtype[Any]:
        """The dtype in this machine's byte order."""
        return self.dtype.newbyteorder("=")

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @cached_property
    def raw(self) -> bool:
        """Whether chunks lie uncompressed in their files, so that a memory map serves."""
        return all(codec.name == "crc32c" for codec in self.codecs)

    @cached_property
    def decode_room(self) -> int:
        """Bytes in which one chunk is decoded; 0 where it is used as it is read."""
        return decode_room(self.codecs, self.chunk_bytes) if self.slow is None else 0

    @property
    def spill(self) -> int:
        """Bytes of that room behind the decoded chunk."""
        return max(0, self.decode_room - self.chunk_bytes)

    @cached_property
    def together(self) -> int:
        """How many encoded chunks are decoded side by side: small ones that end at aligned bytes."""
        first = next((codec for codec in self.codecs if not codec.identity), None)
        if first is not None and first.name in CHECKSUMS:
            return 1  # it may stand before the data, which then begin behind it
        if not self.decode_room or self.chunk_bytes % ALIGN:
            return 1
        return max(1, min(TOGETHER_BYTES // self.chunk_bytes, self.num_files * math.prod(self.inner)))

    @cached_property
    def file_shape(self) -> tuple[int, ...]:
        """The part of the array that one file holds."""
        return self.shard_shape or self.chunk_shape

    @cached_property
    def num_files(self) -> int:
        return math.prod(-(-s // c) for s, c in zip(self.shape, self.file_shape, strict=True))

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """Chunks in a shard along each axis."""
        return tuple(s // c for s, c in zip(self.file_shape, self.chunk_shape, strict=True))

    def file(self, chunk: Sequence[int]) -> tuple[int, ...]:
        """Number of the file (shard or chunk) that holds this chunk."""
        return tuple(c // per for c, per in zip(chunk, self.inner, strict=True))

    def key(self, chunk: Sequence[int]) -> str:
        """Key of that file."""
        return self._key(chunk if self.shard_shape is None else self.file(chunk))

    def file_key(self, number: int) -> str:
        """Key of the file of this number, in C order."""
        grid = tuple(-(-s // c) for s, c in zip(self.shape, self.file_shape, strict=True))
        return self._key(np.unravel_index(number, grid) if grid else ())

    def _key(self, numbers: Sequence[Any]) -> str:
        return self._stem + (self.separator.join(map(str, numbers)) if numbers else self._alone)

    @cached_property
    def _stem(self) -> str:
        """What the keys of all its files begin with."""
        name = f"{self.name}/" if self.name else ""
        return f"{name}{self.prefix}{self.separator}" if self.prefix and self.ndim else name

    @cached_property
    def _alone(self) -> str:
        """The rest of the key of a file that no number tells from others."""
        return self.prefix or "0"

    def slot(self, chunk: Sequence[int]) -> int:
        """Which entry of its shard's index belongs to this chunk."""
        slot = 0
        for c, per in zip(chunk, self.inner, strict=True):
            slot = slot * per + c % per
        return slot

    @cached_property
    def index_bytes(self) -> int:
        """Of a shard's index, its checksum included."""
        return 16 * math.prod(self.inner) + 4

    def box(self, chunk: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The part of the array that a chunk covers, for messages."""
        pairs = zip(chunk, self.chunk_shape, self.shape, strict=True)
        return tuple((c * size, min((c + 1) * size, length)) for c, size, length in pairs)


def essence(layout: ArrayLayout) -> tuple[object, ...]:
    """What of an array's metadata makes the bytes of its decoded chunks."""
    grid = (layout.name, layout.shape, layout.chunk_shape, layout.shard_shape, layout.axes, layout.index_at_start)
    return *grid, layout.separator, layout.prefix, layout.dtype.str, layout.dtype.name, layout.codecs, layout.slow


def decoded_whole(layout: ArrayLayout) -> bool:
    """Whether its chunks can only be had whole."""
    return layout.slow is not None or not layout.raw


class Untrainable(DataError):
    """What is there may be in good order, and is no numbers that a tensor could hold; no damage."""


def trainable(dtype: np.dtype[Any]) -> bool:
    """Whether it is one of the dtypes that tensors have (of either byte order)."""
    if dtype.name == BFLOAT16:
        return True
    return dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8)


def check_trainable(name: str, dtype: np.dtype[Any]) -> None:
    """Raise Untrainable for an array of any other dtype."""
    if not trainable(dtype):
        raise Untrainable(f"array {name or ALONE!r} has dtype {dtype}, which can't be trained on", hint=_refusal(dtype))


def _refusal(dtype: np.dtype[Any]) -> str:
    """What to do with an array that can't be trained on."""
    if dtype.kind in "Mm":
        return f"times are no numbers: store them as integers of a unit, as CF does; supported: {TRAINABLE}"
    if dtype.kind in "SUTO":
        return f"encode texts as integers, such as numbers of categories; supported: {TRAINABLE}"
    return f"supported: {TRAINABLE}"


def parse_array(name: str, metadata: Mapping[str, Any], dtype: np.dtype[Any], fill_value: Any) -> ArrayLayout:
    """The layout that an array's metadata (zarr's `metadata.to_dict()`) describes.

    Raises Untrainable if no tensor could hold it, DataError if it claims what can't be.
    """
    shape = tuple(int(s) for s in metadata["shape"])
    check_trainable(name, dtype)
    if fill_value is None:  # Zarr 2 leaves it open; zarr reads zero
        fill_value = dtype.type(0)
    parse = _parse_v2 if metadata["zarr_format"] == 2 else _parse_v3
    layout = replace(parse(name, shape, metadata, dtype, fill_value), dims=_dims(metadata, len(shape)))
    if any(s < 0 for s in shape) or math.prod(shape) > MAX_SAMPLES:
        raise DataError(
            f"array {name or ALONE!r} claims the shape {shape}: no length is negative, and 2^48 elements are most"
        )
    if any(c <= 0 for c in layout.chunk_shape + layout.file_shape):
        raise DataError(
            f"array {name or ALONE!r} claims chunks of shape {layout.file_shape}: each length must be at least 1"
        )
    if layout.chunk_bytes > MAX_CHUNK_BYTES:
        size = format_bytes(min(layout.chunk_bytes, 1 << 100))
        raise DataError(
            f"array {name or ALONE!r} claims chunks of {size}; at most {format_bytes(MAX_CHUNK_BYTES)} is read"
        )
    return layout


def _dims(metadata: Mapping[str, Any], ndim: int) -> tuple[str | None, ...]:
    """The axes' names: Zarr 3's own, or those that xarray writes into the attributes of Zarr 2."""
    attributes = metadata.get("attributes")
    names = metadata.get("dimension_names")
    if names is None and isinstance(attributes, Mapping):
        names = attributes.get("_ARRAY_DIMENSIONS")
    if not isinstance(names, list | tuple) or len(names) != ndim:
        return ()
    return tuple(name if isinstance(name, str) else None for name in names)


def _says(metadata: Mapping[str, Any], what: str) -> bool:
    """Whether its writer has said so in the attributes."""
    attributes = metadata.get("attributes")
    own = attributes.get("streamtrain") if isinstance(attributes, Mapping) else None
    return isinstance(own, Mapping) and own.get(what) is True


def _attributes(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    found = metadata.get("attributes")
    attributes: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    fill = metadata.get("fill_value")
    if metadata["zarr_format"] == 2 and "_ARRAY_DIMENSIONS" in attributes and fill is not None:
        return {"_FillValue": fill, **attributes}
    return attributes


def _parse_v3(
    name: str, shape: tuple[int, ...], metadata: Mapping[str, Any], dtype: np.dtype[Any], fill_value: Any
) -> ArrayLayout:
    grid = metadata["chunk_grid"]
    encoding = metadata.get("chunk_key_encoding") or {"name": "default"}
    separator = (encoding.get("configuration") or {}).get("separator", "/" if encoding["name"] == "default" else ".")
    prefix = "c" if encoding["name"] == "default" else ""
    slow = None if encoding["name"] in ("default", "v2") else f"chunk key encoding {encoding['name']!r}"
    if metadata.get("storage_transformers"):
        slow = "storage transformers"
    if grid["name"] != "regular":
        uneven = ArrayLayout(
            name, shape, dtype, _boxes(shape, grid), None, (), tuple(range(len(shape))), separator, prefix, fill_value
        )
        return replace(uneven, slow=f"{grid['name']} chunk grid", attributes=_attributes(metadata))
    chunk_shape = tuple(int(c) for c in grid["configuration"]["chunk_shape"])
    shard_shape: tuple[int, ...] | None = None
    codecs: Sequence[Mapping[str, Any]] = metadata["codecs"]
    at_start = False
    if len(codecs) == 1 and codecs[0]["name"] == "sharding_indexed":
        config = codecs[0]["configuration"]
        shard_shape, chunk_shape = chunk_shape, tuple(int(c) for c in config["chunk_shape"])
        codecs = config["codecs"]
        at_start = config.get("index_location", "end") == "start"
        if (index := [str(c["name"]) for c in config["index_codecs"]]) != ["bytes", "crc32c"]:
            slow = f"a shard index with the codecs {', '.join(index)}"
        elif endian_of(config["index_codecs"][0]) != "little":
            slow = "a big-endian shard index"
        if any(s % c for s, c in zip(shard_shape, chunk_shape, strict=True) if c):
            raise DataError(
                f"array {name or ALONE!r}: shards of {shard_shape} don't hold whole chunks of {chunk_shape}"
            )
    chain = chain_of(codecs, dtype, len(shape))
    slow = slow or chain.slow or slow_codec(chain.codecs, math.prod(chunk_shape) * dtype.itemsize)
    return ArrayLayout(
        name=name,
        shape=shape,
        dtype=chain.dtype,
        chunk_shape=chunk_shape,
        shard_shape=shard_shape,
        codecs=chain.codecs,
        axes=chain.axes,
        separator=separator,
        prefix=prefix,
        fill_value=fill_value,
        index_at_start=at_start,
        slow=slow,
        complete=_says(metadata, "complete"),
        manifest=_says(metadata, "manifest"),
        attributes=_attributes(metadata),
    )


def _boxes(shape: tuple[int, ...], grid: Mapping[str, Any]) -> tuple[int, ...]:
    """In what boxes zarr is asked for an array of uneven chunks: as large as the largest of them."""
    edges = (grid.get("configuration") or {}).get("chunk_shapes")
    if not isinstance(edges, list | tuple) or len(edges) != len(shape):
        return tuple(max(1, s) for s in shape)
    return tuple(max(1, min(s, _largest(e))) for s, e in zip(shape, edges, strict=True))


def _largest(edges: Any) -> int:
    """Of chunk edges: one number for all, or a list of numbers and of (number, count) pairs."""
    if isinstance(edges, int):
        return edges
    return max((int(e[0] if isinstance(e, list | tuple) else e) for e in edges), default=1)


def _parse_v2(
    name: str, shape: tuple[int, ...], metadata: Mapping[str, Any], dtype: np.dtype[Any], fill_value: Any
) -> ArrayLayout:
    compressor = metadata.get("compressor")
    given = [*(metadata.get("filters") or ()), *([compressor] if compressor else [])]
    codecs = tuple(Codec(step["id"], {key: value for key, value in step.items() if key != "id"}) for step in given)
    stored = np.dtype(metadata["dtype"]) if isinstance(metadata["dtype"], str) else dtype
    axes = tuple(range(len(shape)))
    chunk_shape = tuple(int(c) for c in metadata["chunks"])
    return ArrayLayout(
        name=name,
        shape=shape,
        dtype=stored,
        chunk_shape=chunk_shape,
        shard_shape=None,
        codecs=codecs,
        axes=axes[::-1] if metadata.get("order") == "F" else axes,
        separator=metadata.get("dimension_separator", "."),
        prefix="",
        fill_value=fill_value,
        slow=slow_codec(codecs, math.prod(chunk_shape) * stored.itemsize),
        complete=_says(metadata, "complete"),
        manifest=_says(metadata, "manifest"),
        attributes=_attributes(metadata),
    )


def parse_shard_index(data: bytes, chunks: int) -> NDArray[np.uint64]:
    """A shard's index, verified: offset and length of each inner chunk, shape (chunks, 2).

    Raises ValueError with the reason if it is damaged.
    """
    expected = 16 * chunks + 4
    if len(data) != expected:
        raise ValueError(f"its index has {len(data)} of {expected} bytes")
    (checksum,) = struct.unpack("<I", data[-4:])
    if google_crc32c.value(data[:-4]) != checksum:
        raise ValueError("the checksum (crc32c) of its index does not match")
    return np.frombuffer(data[:-4], dtype="<u8").astype(np.uint64).reshape(chunks, 2)
