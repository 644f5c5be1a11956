"""Arrays in every layout that zarr itself writes, for the tests of what reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.codecs import numcodecs as v3

from streamtrain.data.layout import ArrayLayout, parse_array


@dataclass(frozen=True)
class Case:
    """How to make one array; `slow` where the fast lanes must leave it to zarr."""

    name: str
    options: dict[str, Any]
    shape: tuple[int, ...] = (23, 10)
    dtype: str = "int32"
    slow: str | None = None
    sharding: dict[str, Any] = field(default_factory=dict)


def _v3(name: str, **options: Any) -> Case:
    shape, dtype, slow = options.pop("shape", (23, 10)), options.pop("dtype", "int32"), options.pop("slow", None)
    return Case(name, {"chunks": (7, 4)[: len(shape)], **options}, shape, dtype, slow)


def _v2(name: str, **options: Any) -> Case:
    return _v3(f"v2-{name}", zarr_format=2, **options)


def _shards(name: str, slow: str | None = None, **sharding: Any) -> Case:
    return Case(f"shards-{name}", {"chunks": (14, 8)}, slow=slow, sharding={"chunk_shape": (7, 4), **sharding})


RAW: tuple[Any, ...] = (BytesCodec(),)
CASES = [
    _v3("raw", compressors=None),
    _v3("one-chunk", compressors=None, chunks=(23, 10)),
    _v3("larger-chunk", compressors=None, chunks=(40, 11)),
    _v3("zstd"),
    _v3("zstd-checksum", compressors=ZstdCodec(level=3, checksum=True)),
    _v3("gzip", compressors=GzipCodec(level=1)),
    _v3("blosc", compressors=BloscCodec(cname="lz4", shuffle="bitshuffle", typesize=4)),
    _v3("blosc-zstd", compressors=BloscCodec(cname="zstd", shuffle="shuffle", typesize=4)),
    _v3("crc32c", compressors=Crc32cCodec()),
    _v3("crc32c-twice", compressors=[Crc32cCodec(), Crc32cCodec()]),
    _v3("zstd-crc32c", compressors=[ZstdCodec(), Crc32cCodec()]),
    _v3("crc32c-zstd", compressors=[Crc32cCodec(), ZstdCodec()]),
    _v3("gzip-zstd", compressors=[GzipCodec(), ZstdCodec()], slow="'zstd' over a compressor"),
    _v3("shuffle-zlib", compressors=[v3.Shuffle(), v3.Zlib(level=1)]),
    _v3("zlib-shuffle", compressors=[v3.Zlib(level=1), v3.Shuffle(elementsize=1)], slow="'shuffle' over a compressor"),
    *[
        _v3(name, compressors=codec())
        for name, codec in {
            "lz4": v3.LZ4,
            "numcodecs-zstd": v3.Zstd,
            "numcodecs-blosc": v3.Blosc,
            "numcodecs-gzip": v3.GZip,
            "crc32": v3.CRC32,
            "numcodecs-crc32c": v3.CRC32C,
            "adler32": v3.Adler32,
            "fletcher32": v3.Fletcher32,
            "jenkins": v3.JenkinsLookup3,
        }.items()
    ],
    _v3("lz4-crc32", compressors=[v3.LZ4(), v3.CRC32()]),
    _v3("crc32c-in-front", compressors=v3.CRC32C(location="start")),
    _v3("bz2", compressors=v3.BZ2(), slow="codec 'bz2'"),
    _v3("lzma", compressors=v3.LZMA(), slow="codec 'lzma'"),
    _v3("delta", filters=v3.Delta(dtype="<i4")),
    _v3("delta-raw", filters=v3.Delta(dtype="<i4"), compressors=None),
    _v3("delta-narrow", filters=v3.Delta(dtype="<i4", astype="<i2")),
    _v3("delta-wide", filters=v3.Delta(dtype="<i4", astype="<i8"), slow="codec 'delta' that makes chunks larger"),
    _v3("delta-delta-shuffle", filters=[v3.Delta(dtype="<i4")] * 2, compressors=[v3.Shuffle(), ZstdCodec()]),
    _v3("fixed", dtype="float64", filters=v3.FixedScaleOffset(offset=1, scale=2, dtype="<f8", astype="<i4")),
    _v3("quantize", dtype="float32", filters=v3.Quantize(digits=1, dtype="<f4")),
    _v3("bitround", dtype="float32", filters=v3.BitRound(keepbits=20)),
    _v3("bitround-raw", dtype="float32", filters=v3.BitRound(keepbits=20), compressors=None),
    _v3("astype", dtype="float64", filters=v3.AsType(encode_dtype="<f4", decode_dtype="<f8")),
    _v3("packbits", dtype="bool", filters=v3.PackBits()),
    _v3("transposed", compressors=None, filters=TransposeCodec(order=(1, 0))),
    Case("cube", {"chunks": (4, 3, 2), "filters": [TransposeCodec(order=(1, 2, 0))]}, (9, 8, 5)),
    Case(
        "transposed-twice",
        {"chunks": (4, 3, 2), "filters": [TransposeCodec(order=(1, 2, 0)), TransposeCodec(order=(0, 2, 1))]},
        (9, 8, 5),
    ),
    _v3("big-endian", compressors=None, serializer=BytesCodec(endian="big")),
    _v3("big-endian-zstd", serializer=BytesCodec(endian="big"), dtype="float64"),
    _v3("bool", compressors=None, dtype="bool"),
    _v3("bytes", dtype="uint8"),
    _v3("half", compressors=None, dtype="float16"),
    _v3("complex", dtype="complex64"),
    _v3("dots", compressors=None, chunk_key_encoding={"name": "default", "separator": "."}),
    _v3("keys-of-v2", compressors=None, chunk_key_encoding={"name": "v2"}),
    _v3("keys-of-v2-slash", compressors=None, chunk_key_encoding={"name": "v2", "separator": "/"}),
    _v3("scalar", shape=(), compressors=None),
    _v3("scalar-keys-of-v2", shape=(), chunk_key_encoding={"name": "v2"}),
    _v3("row", shape=(50,), compressors=None),
    _shards("zstd", codecs=[BytesCodec(), ZstdCodec()]),
    _shards("raw", codecs=RAW),
    _shards("index-at-start", codecs=RAW, index_location="start"),
    _shards("blosc-index-at-start", codecs=[BytesCodec(), BloscCodec(typesize=4)], index_location="start"),
    _shards("crc32c", codecs=[BytesCodec(), Crc32cCodec()]),
    _shards("big-endian-transposed", codecs=[TransposeCodec(order=(1, 0)), BytesCodec(endian="big")]),
    _shards("plain-index", codecs=RAW, index_codecs=RAW, slow="a shard index with the codecs bytes"),
    _shards(
        "index-with-two-checksums",
        codecs=RAW,
        index_codecs=[BytesCodec(), Crc32cCodec(), Crc32cCodec()],
        slow="a shard index with the codecs bytes, crc32c, crc32c",
    ),
    _shards(
        "big-endian-index",
        codecs=RAW,
        index_codecs=[BytesCodec(endian="big"), Crc32cCodec()],
        slow="a big-endian shard index",
    ),
    _shards("delta-shuffle-lz4", codecs=[v3.Delta(dtype="<i4"), BytesCodec(), v3.Shuffle(elementsize=4), v3.LZ4()]),
    _shards("nested", codecs=[ShardingCodec(chunk_shape=(1, 2))], slow="codec 'sharding_indexed'"),
    _v2("raw", compressors=None),
    _v2("default"),
    _v2("fortran", order="F", compressors=None),
    _v2("fortran-blosc", order="F", compressors=numcodecs.Blosc()),
    _v2("big-endian", dtype=">i2", compressors=numcodecs.Zlib()),
    _v2("little-endian", dtype="<u4", compressors=numcodecs.LZ4()),
    _v2("gzip", compressors=numcodecs.GZip()),
    _v2("bz2", compressors=numcodecs.BZ2(), slow="codec 'bz2'"),
    _v2("delta", filters=[numcodecs.Delta(dtype="<i4")]),
    _v2("delta-fortran", filters=[numcodecs.Delta(dtype="<i4")], order="F"),
    _v2("delta-big-endian", filters=[numcodecs.Delta(dtype=">i2")], dtype=">i2"),
    _v2("delta-narrow-raw", filters=[numcodecs.Delta(dtype="<i4", astype="<i2")], compressors=None),
    _v2("shuffle-zlib", filters=[numcodecs.Shuffle(elementsize=4)], compressors=numcodecs.Zlib()),
    _v2(
        "fixed",
        dtype="float32",
        filters=[numcodecs.FixedScaleOffset(offset=1, scale=2, dtype="<f4", astype="<u2")],
    ),
    _v2("quantize", dtype="float32", filters=[numcodecs.Quantize(digits=1, dtype="<f4")]),
    _v2("astype", dtype="float64", filters=[numcodecs.AsType(encode_dtype="<f4", decode_dtype="<f8")]),
    _v2("packbits", dtype="bool", filters=[numcodecs.PackBits()]),
    _v2("crc32", filters=[numcodecs.CRC32()], compressors=None),
    _v2("categories", dtype="uint8", filters=[numcodecs.LZMA()], slow="codec 'lzma'"),
    _v2("slash", chunk_key_encoding={"name": "v2", "separator": "/"}, compressors=None),
    _v2("scalar", shape=(), compressors=None),
]
FAST = [case for case in CASES if case.slow is None]


def values(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Numbers that differ, none of them zero but where the dtype has no more."""
    return (np.arange(int(np.prod(shape))).reshape(shape) % 127 + 1).astype(dtype)


def write(case: Case, folder: Path, name: str = "x") -> NDArray[Any]:
    """Write the case's array as `folder/name` with zarr, and return what is in it."""
    data = values(case.shape, case.dtype)
    options: dict[str, Any] = {"shape": case.shape, "dtype": case.dtype, **case.options}
    if case.sharding:
        array = zarr.create(
            store=str(folder), path=name, zarr_format=3, codecs=[ShardingCodec(**case.sharding)], **options
        )
    else:
        array = zarr.create_array(str(folder), name=name, **options)
    array[...] = data
    return data


def layout_of(folder: Path, name: str = "x") -> ArrayLayout:
    """What the metadata on disk says."""
    array = zarr.open_array(str(folder), path=name, mode="r")
    return parse_array(name, array.metadata.to_dict(), array.dtype, array.fill_value)


def chunks_of(layout: ArrayLayout) -> list[tuple[int, ...]]:
    """The numbers of all chunks."""
    grid = tuple(-(-s // c) for s, c in zip(layout.shape, layout.chunk_shape, strict=True))
    return list(np.ndindex(*grid))


def within(layout: ArrayLayout, chunk: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of a decoded chunk that lies inside the array."""
    return tuple(slice(0, b - a) for a, b in layout.box(chunk))


def part(layout: ArrayLayout, chunk: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of the array that a chunk covers."""
    return tuple(slice(a, b) for a, b in layout.box(chunk))
