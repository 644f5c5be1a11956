"""zarr's codecs within bounds: a compressor decodes into a buffer of the size that its array says.

Its law: what a chunk's bytes say of themselves is held against the array before any of it is believed. zarr's own
codecs ask the bytes: cut Blosc chunks are decoded out of the memory behind them, into wrong numbers or a crash, and a
few bytes may take all memory there is. Only a private copy of an array is changed, never `zarr.config`, nor a pipeline
that the user has chosen in place of zarr's own: that one decodes by its own rules.
"""

from __future__ import annotations

import asyncio
import bz2
import copy
import lzma
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numcodecs
import numpy as np
from numcodecs.compat import ensure_contiguous_ndarray
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec, BytesBytesCodec
from zarr.abc.codec import Codec as ZarrCodec
from zarr.codecs import BytesCodec, ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.codec_pipeline import BatchedCodecPipeline

from streamtrain.data.codecs import CHECKSUM_BYTES, CHECKSUMS, COMPRESSORS, FILTERS, Codec
from streamtrain.data.decode import blosc_content_size, decoding, lz4_content_size, zstd_content_size
from streamtrain.data.filters import Bytes

A = TypeVar("A")

BOUNDED = COMPRESSORS | {"bz2", "lzma"}
"""Codecs that are undone here, in place of zarr's; all others decode to what follows from the size that they get, or
are libraries with bounds of their own."""
MOST = 1 << 32
"""Bytes that one step may decode to where its array tells nothing: of texts, and under codecs that nobody knows."""
SLACK = 1 << 16
"""What was compressed once may be larger than that was, by 1/8 and this much."""
INNER_SLACK = 1 << 10
"""The same of each chunk in a shard, with its place in the index."""
ZSTD_BLOCK = 1 << 17
"""Most bytes that a block of a Zstandard frame decodes to (RFC 8878, 3.1.1.2.4)."""


class Room(NamedTuple):
    """What a step may decode to, in bytes."""

    exact: int | None
    """Where the array tells: that, and nothing else."""
    most: int


def decode_within(codec: Codec, data: Bytes, room: Room) -> Bytes:
    """What one of the codecs BOUNDED made of `data` decodes to, 1-D.

    Raises ValueError with the cause, before memory is taken, where that is of another size or larger than its room.
    """
    size = room.exact if room.exact is not None else _stated(codec.name, data)
    try:
        if size is None or codec.name not in COMPRESSORS:
            return _inflated(codec, data, room)
        if size > room.most:
            raise ValueError(f"it decodes to {size} bytes, at most {room.most} can be right")
        out = np.empty(size, dtype=np.uint8)
        decoding(codec)(data, out)
    except (RuntimeError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{codec.name} can't decode it: {error}") from error
    return out


def _stated(name: str, data: Bytes) -> int | None:
    """What the data say that they decode to; None where they don't."""
    if name == "blosc":
        return blosc_content_size(data)
    if name == "lz4":
        return lz4_content_size(data)
    return zstd_content_size(data) if name == "zstd" else None


class _Inflate(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _inflated(codec: Codec, data: Bytes, room: Room) -> Bytes:
    """One stream after another, with an eye on what they come to."""
    most = room.most if room.exact is None else room.exact
    if codec.name == "zstd":
        if (claim := zstd_bound(data)) > most + ZSTD_BLOCK:
            raise ValueError(f"it decodes to up to {claim} bytes, at most {most} can be right")
        return _flat(numcodecs.get_codec({"id": codec.name}).decode(data))
    begin, parts, done, rest = _beginning(codec), list[bytes](), 0, data.tobytes()
    while rest or not parts:
        stream = begin()
        try:
            part = stream.decompress(rest, most - done + 1)
        except (OSError, lzma.LZMAError, zlib.error):
            if not parts:
                raise
            break  # what follows the end is no stream of this kind, and passed over, as Python's own modules do
        parts.append(part)
        done += len(part)
        if done > most:
            raise ValueError(f"it decodes to more than {most} bytes")
        if not stream.eof:
            raise ValueError(f"its {codec.name} stream is cut short")
        rest = stream.unused_data
    if room.exact is not None and done != room.exact:
        raise ValueError(f"it decodes to {done} bytes, expected {room.exact}")
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def _beginning(codec: Codec) -> Callable[[], _Inflate]:
    """What begins to decode a stream of this kind."""
    if codec.name == "bz2":
        return bz2.BZ2Decompressor
    if codec.name == "lzma":
        form, filters = codec.config.get("format", lzma.FORMAT_XZ), codec.config.get("filters")
        return lambda: lzma.LZMADecompressor(format=form, filters=filters)
    return lambda: zlib.decompressobj(31 if codec.name == "gzip" else 15)


def zstd_bound(data: Bytes) -> int:
    """Most bytes that Zstandard frames decode to, by the sizes of their blocks (RFC 8878, 3.1.1). Raises ValueError."""
    raw, at, most = data.tobytes(), 0, 0
    while at < len(raw):
        if raw[at + 1 : at + 4] == b"\x2a\x4d\x18" and raw[at] >> 4 == 5:  # a frame that is to be passed over
            at += 8 + int.from_bytes(raw[at + 4 : at + 8], "little")
            continue
        if raw[at : at + 4] != b"\x28\xb5\x2f\xfd" or at + 5 > len(raw):
            raise ValueError("it is no Zstandard frame")
        flags = raw[at + 4]
        single = bool(flags & 0x20)
        at += 5 + (not single) + (0, 1, 2, 4)[flags & 3] + (1 if single else 0, 2, 4, 8)[flags >> 6]
        last = False
        while not last:
            if at + 3 > len(raw):
                raise ValueError("its Zstandard frame is cut short")
            head = int.from_bytes(raw[at : at + 3], "little")
            last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
            most += ZSTD_BLOCK if kind == 2 else size
            at += 3 + (1 if kind == 1 else size)
        at += 4 if flags & 4 else 0
    return most


def _flat(data: Any) -> Bytes:
    return np.asarray(ensure_contiguous_ndarray(data)).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class WithinBounds(BytesBytesCodec):
    """A compressor of Zarr 3, that only decodes."""

    inner: BytesBytesCodec
    codec: Codec
    beneath: tuple[str, ...] | None
    """Names of the codecs on bytes that come before it when a chunk is encoded, if each keeps to a size; else None."""
    serializer: ArrayBytesCodec
    """What made bytes of the chunk."""

    is_fixed_size = False

    def to_dict(self) -> dict[str, Any]:
        """As the codec that it stands for."""
        return self.inner.to_dict()

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """As the codec that it stands for."""
        return self.inner.compute_encoded_size(input_byte_length, chunk_spec)

    def room(self, spec: ArraySpec) -> Room:
        """Of the chunk that a serializer is given."""
        if not isinstance(self.serializer, BytesCodec | ShardingCodec):
            return Room(None, MOST)
        item = spec.dtype.to_native_dtype().itemsize
        size = math.prod(spec.shape) * item
        if isinstance(self.serializer, ShardingCodec):
            inner = math.prod(self.serializer.chunk_shape)
            return Room(None, _at_most(size) + math.prod(spec.shape) // max(1, inner) * INNER_SLACK)
        if self.beneath is None:
            return Room(None, _at_most(size))
        exact = size + CHECKSUM_BYTES * sum(name in CHECKSUMS for name in self.beneath)
        return Room(exact, exact)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        data = _flat(chunk_bytes.as_numpy_array())
        decoded = await asyncio.to_thread(decode_within, self.codec, data, self.room(chunk_spec))
        return chunk_spec.prototype.buffer.from_bytes(decoded.data)


def _at_most(size: int) -> int:
    return size + size // 8 + SLACK


class WithinBoundsV2:
    """A compressor of Zarr 2, that only decodes; what zarr knows of numcodecs' codecs."""

    def __init__(self, codec: Codec, room: Room) -> None:
        self.codec, self.room, self.codec_id = codec, room, codec.name

    def get_config(self) -> dict[str, Any]:
        """As the codec that it stands for."""
        return {"id": self.codec_id, **self.codec.config}

    def encode(self, buf: object) -> Any:
        """Nothing is written through it."""
        raise NotImplementedError

    def decode(self, buf: Any, out: object = None) -> Bytes:
        """The decoded bytes. Raises as `decode_within` does."""
        return decode_within(self.codec, _flat(buf), self.room)


def within_bounds(array: A) -> A:
    """A copy of an array (zarr.AsyncArray) whose compressors decode within bounds; itself, if a pipeline that is not
    zarr's own reads it."""
    pipeline = getattr(array, "codec_pipeline", None)
    if pipeline is None or not type(pipeline).__module__.startswith("zarr."):
        return array
    metadata: Any = getattr(array, "metadata", None)
    codecs = list(pipeline)
    twin = copy.copy(array)
    arrays, [serializer], others = _sorted(codecs)
    if metadata.zarr_format == 2:
        serializer = _of_v2(serializer, metadata)
    bounded = BatchedCodecPipeline(
        array_array_codecs=arrays,
        array_bytes_codec=_sharded(serializer),
        bytes_bytes_codecs=_bounded(serializer, others),
        batch_size=1,
    )
    object.__setattr__(twin, "codec_pipeline", bounded)  # a frozen dataclass
    return twin


def _sorted(
    codecs: Sequence[ZarrCodec],
) -> tuple[tuple[ArrayArrayCodec, ...], tuple[ArrayBytesCodec, ...], tuple[BytesBytesCodec, ...]]:
    return (
        tuple(codec for codec in codecs if isinstance(codec, ArrayArrayCodec)),
        tuple(codec for codec in codecs if isinstance(codec, ArrayBytesCodec)),
        tuple(codec for codec in codecs if isinstance(codec, BytesBytesCodec)),
    )


def _sharded(serializer: ArrayBytesCodec) -> ArrayBytesCodec:
    """The same with bounds for the chunks in a shard, if there are any."""
    if not isinstance(serializer, ShardingCodec):
        return serializer
    arrays, [inner], others = _sorted(serializer.codecs)
    return replace(serializer, codecs=(*arrays, _sharded(inner), *_bounded(inner, others)))


def _bounded(serializer: ArrayBytesCodec, codecs: Sequence[BytesBytesCodec]) -> tuple[BytesBytesCodec, ...]:
    beneath: tuple[str, ...] | None = ()
    found: list[BytesBytesCodec] = []
    for each in codecs:
        said = each.to_dict()
        name, config = str(said.get("name")).removeprefix("numcodecs."), said.get("configuration")
        if name in BOUNDED:
            codec = Codec(name, dict(config) if isinstance(config, Mapping) else {})
            found.append(WithinBounds(each, codec, beneath, serializer))
        else:
            found.append(each)
        fixed = name in CHECKSUMS or name == "shuffle"
        beneath = (*beneath, name) if fixed and beneath is not None else None
    return tuple(found)


def _of_v2(serializer: Any, metadata: Any) -> ArrayBytesCodec:
    """Filters and compressor of Zarr 2, which zarr has as one codec."""
    given = [*(serializer.filters or ()), *([serializer.compressor] if serializer.compressor else [])]
    dtype = metadata.dtype.to_native_dtype()
    start = size = None if dtype.hasobject else math.prod(metadata.chunks) * dtype.itemsize
    steps: list[Any] = []
    for each in given:
        config = dict(each.get_config())
        codec = Codec(str(config.pop("id")), config)
        if codec.name in BOUNDED:
            steps.append(WithinBoundsV2(codec, _room(size, start)))
        else:
            steps.append(each)
        size = _after(codec, size)
    filters = steps[:-1] if serializer.compressor else steps
    compressor = steps[-1] if serializer.compressor else None
    made: ArrayBytesCodec = replace(serializer, filters=tuple(filters) or None, compressor=compressor)
    return made


def _room(size: int | None, start: int | None) -> Room:
    if size is not None:
        return Room(size, size)
    return Room(None, MOST if start is None else _at_most(start))


def _after(codec: Codec, size: int | None) -> int | None:
    """Bytes that a codec of Zarr 2 makes of so many; None where that is not known."""
    if size is None or codec.name not in CHECKSUMS | FILTERS:
        return None
    try:
        return codec.encoded_size(size)
    except (ValueError, TypeError):
        return None
