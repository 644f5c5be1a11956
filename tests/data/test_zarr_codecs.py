"""What zarr's codecs within bounds promise: zarr's own numbers, and never a byte beyond what the array says."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import gzip
import lzma
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
import zarr.codecs.numcodecs as more
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.api import asynchronous as zarr_api
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.storage import MemoryStore

from streamtrain.data.codecs import Codec
from streamtrain.data.filters import Bytes
from streamtrain.data.stream import ZarrStream
from streamtrain.data.zarr_codecs import BOUNDED, Room, WithinBounds, decode_within, within_bounds, zstd_bound
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import DataError

X: NDArray[np.int32] = np.random.default_rng(0).integers(-(2**31), 2**31, (16, 8), dtype=np.int32)
SHAPE, CHUNK = X.shape, (4, 8)
INDEX = 16 * 2 + 4
"""Bytes of the index of a shard of two chunks."""


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    CHAINS: dict[str, dict[str, Any]] = {
        "blosc": {"compressors": [BloscCodec()]},
        "numcodecs.blosc": {"compressors": [more.Blosc(cname="lz4", clevel=5, shuffle=1)]},
        "blosc, crc32c": {"compressors": [BloscCodec(), Crc32cCodec()]},
        "crc32c, blosc": {"compressors": [Crc32cCodec(), BloscCodec()]},
        "zstd, blosc": {"compressors": [ZstdCodec(), BloscCodec()]},
        "shuffle, blosc": {"compressors": [more.Shuffle(elementsize=4), BloscCodec()]},
        "transpose, delta, blosc": {
            "filters": [TransposeCodec(order=(1, 0)), more.Delta(dtype="<i4")],
            "compressors": [BloscCodec()],
        },
        "delta to i8, blosc": {"filters": [more.Delta(dtype="<i4", astype="<i8")], "compressors": [BloscCodec()]},
        "blosc in shards": {"serializer": ShardingCodec(chunk_shape=(2, 8), codecs=[BytesCodec(), BloscCodec()])},
        "blosc in nested shards": {
            "serializer": ShardingCodec(
                chunk_shape=(2, 8),
                codecs=[ShardingCodec(chunk_shape=(1, 8), codecs=[BytesCodec(), BloscCodec()])],
            )
        },
        "blosc of 2": {"zarr_format": 2, "compressors": numcodecs.Blosc()},
        "delta, blosc of 2": {"zarr_format": 2, "filters": [numcodecs.Delta("<i4")], "compressors": numcodecs.Blosc()},
        "blosc as a filter of 2": {"zarr_format": 2, "filters": [numcodecs.Blosc()], "compressors": numcodecs.CRC32()},
    }
    """Chains that end with Blosc, but for checksums, in which a cut chunk was decoded out of the memory behind it."""
    OTHERS: dict[str, dict[str, Any]] = {
        "zstd over a shard": {
            "serializer": ShardingCodec(chunk_shape=(1, 1), codecs=[BytesCodec(), ZstdCodec()]),
            "compressors": [ZstdCodec()],
        },
        "gzip, zstd": {"compressors": [GzipCodec(), ZstdCodec()]},
        "zstd, gzip": {"compressors": [ZstdCodec(), GzipCodec()]},
        **{
            f"zlib, {name}": {"compressors": [more.Zlib(), codec()]}
            for name, codec in vars(more).items()
            if name in ("BZ2", "LZMA", "LZ4", "Zlib", "GZip", "Zstd")
        },
        "lzma, raw": {"compressors": [more.LZMA(format=3, filters=[{"id": lzma.FILTER_LZMA2, "preset": 1}])]},
        "checksums": {"compressors": [more.CRC32(), more.LZ4(), more.Adler32()]},
        "big-endian": {"serializer": BytesCodec(endian="big"), "compressors": [GzipCodec()]},
        **{
            f"{each.codec_id} of 2": {"zarr_format": 2, "compressors": each, "order": "F"}
            for each in (
                numcodecs.LZ4(),
                numcodecs.Zstd(),
                numcodecs.GZip(),
                numcodecs.Zlib(),
                numcodecs.BZ2(),
                numcodecs.LZMA(),
            )
        },
        "zlib over lz4 of 2": {"zarr_format": 2, "filters": [numcodecs.LZ4()], "compressors": numcodecs.Zlib()},
        "a scale of 2": {
            "zarr_format": 2,
            "filters": [numcodecs.FixedScaleOffset(offset=0, scale=1, dtype="<i4", astype="<i8")],
            "compressors": numcodecs.LZMA(),
        },
    }


def write(store: Any, chain: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.create_group(store, zarr_format=chain.get("zarr_format", 3))
        array: Any = zarr.create_array(
            store, name="x", shape=SHAPE, dtype="<i4", **{"chunks": CHUNK, "compressors": None, **chain}
        )
        array[...] = X
    return store


@pytest.fixture
def loop() -> Iterator[ZarrLoop]:
    private = ZarrLoop()
    yield private
    private.close()


def opened(store: Any, loop: ZarrLoop) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loop.run(zarr_api.open_array(store=store, path="x", mode="r"), 30)


def read(array: Any, loop: ZarrLoop) -> Any:
    return loop.run(array.getitem(Ellipsis), 30)


def summed(data: bytes) -> bytes:
    """With its crc32c behind it."""
    return data + struct.pack("<I", google_crc32c.value(data))


def chunks_in(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "x").rglob("*") if path.is_file() and path.name[0] not in ".z")


@pytest.mark.parametrize("name", [*CHAINS, *OTHERS])
def test_chunks_are_what_zarr_reads(name: str, loop: ZarrLoop, tmp_path: Path) -> None:
    array = opened(str(write(tmp_path, (CHAINS | OTHERS)[name])), loop)
    expected = read(array, loop)
    assert np.array_equal(expected, X) or "transpose" in name  # which zarr itself gives back otherwise
    assert np.array_equal(read(within_bounds(array), loop), expected)


@pytest.mark.parametrize("name", [name for name in CHAINS if "crc32c" not in name and "filter of" not in name])
def test_a_cut_blosc_chunk_is_damage(name: str, loop: ZarrLoop, tmp_path: Path) -> None:
    array = within_bounds(opened(str(write(tmp_path, CHAINS[name])), loop))
    path = chunks_in(tmp_path)[1]
    if "shards" in name:
        _cut_within(path, nested="nested" in name)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"it has \d+ bytes, its Blosc header says \d+"):
        read(array, loop)


def _cut_within(path: Path, *, nested: bool) -> None:
    """Have the index of a shard (or of the first shard in it) say that its first chunk is half as long."""
    raw = bytearray(path.read_bytes())
    start, size = struct.unpack_from("<QQ", raw, len(raw) - INDEX)
    end = start + size if nested else len(raw)
    first, length = struct.unpack_from("<QQ", raw, end - INDEX)
    struct.pack_into("<QQ", raw, end - INDEX, first, length // 2)
    raw[end - INDEX : end] = summed(bytes(raw[end - INDEX : end - 4]))
    path.write_bytes(raw)


def test_a_cut_blosc_chunk_under_a_checksum_of_its_own_is_damage(loop: ZarrLoop, tmp_path: Path) -> None:
    array = within_bounds(opened(str(write(tmp_path, CHAINS["blosc, crc32c"])), loop))
    path = chunks_in(tmp_path)[1]
    path.write_bytes(summed(path.read_bytes()[:40]))
    with pytest.raises(ValueError, match="it has 40 bytes, its Blosc header says"):
        read(array, loop)


@pytest.mark.parametrize("io", ["auto", "store"])
@pytest.mark.parametrize("name", ["blosc", "transpose, delta, blosc", "blosc of 2"])
async def test_a_stream_names_the_cut_chunk_by_every_lane(name: str, io: Any, tmp_path: Path) -> None:
    await asyncio.to_thread(write, tmp_path, CHAINS[name])
    path = chunks_in(tmp_path)[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    async with ZarrStream(tmp_path, inputs="x", batch_size=4, io=io, output="numpy") as source:
        with pytest.raises(DataError, match=r"array 'x': chunk 1\.0 \(rows \[4:8, 0:8\]\) .*its Blosc header says"):
            async for _ in source:
                pass


async def test_a_cut_chunk_of_a_store_elsewhere_is_damage() -> None:
    store = await asyncio.to_thread(write, MemoryStore(), CHAINS["blosc"])
    inner = store._store_dict
    key = "x/c/1/0"
    inner[key] = type(inner[key]).from_bytes(inner[key].to_bytes()[:50])
    async with ZarrStream(store, inputs="x", batch_size=4, io="store", output="numpy") as source:
        with pytest.raises(DataError, match=r"chunk 1\.0 .*it has 50 bytes, its Blosc header says"):
            async for _ in source:
                pass


async def test_cut_labels_are_damage(tmp_path: Path) -> None:
    def make() -> None:
        group = zarr.create_group(tmp_path, zarr_format=2)
        group.create_array("x", data=X, chunks=CHUNK)
        texts: Any = group.create_array("text", shape=(16,), dtype=str, chunks=(16,), compressors=numcodecs.Blosc())
        texts[:] = np.array([f"patient {n}" for n in range(16)], dtype=object)
        path = tmp_path / "text/0"
        path.write_bytes(path.read_bytes()[:-30])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        await asyncio.to_thread(make)
    with pytest.raises(DataError, match=r"array 'text' can't be read: .*its Blosc header says"):
        async with ZarrStream(tmp_path, inputs="x", groups="text", batch_size=4, output="numpy"):
            pass


# Sizes

MUCH = 1 << 26


def unstated(*blocks: bytes) -> bytes:
    """A Zstandard frame that does not say what it decodes to."""
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(blocks)


def block(kind: int, size: int, content: bytes, *, last: bool = False) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + content


BOMBS: dict[str, bytes] = {
    "blosc": struct.pack("<4BIII", 2, 1, 0, 1, 1 << 31, 8, 16),
    "lz4": struct.pack("<I", (1 << 31) - 1) + b"abc",
    "zstd": numcodecs.Zstd().encode(bytes(MUCH)),
    "zstd that states nothing": unstated(*[block(1, 1 << 17, b"a")] * 500, block(1, 1, b"a", last=True)),
    "gzip": gzip.compress(bytes(MUCH)),
    "zlib": zlib.compress(bytes(MUCH)),
    "bz2": bz2.compress(bytes(MUCH)),
    "lzma": lzma.compress(bytes(MUCH), preset=0),
}


@pytest.mark.parametrize("room", [Room(128, 128), Room(None, 1000)], ids=["exact", "at most"])
@pytest.mark.parametrize("name", BOMBS)
def test_what_decodes_to_more_than_its_room_is_refused(name: str, room: Room) -> None:
    data = np.frombuffer(BOMBS[name], dtype=np.uint8)
    with pytest.raises(ValueError, match=r"decodes to|can't decode it: .*too small"):
        decode_within(Codec(name.split()[0]), data, room)


@pytest.mark.parametrize("name", ["bz2", "lz4", "blosc as a filter", "zstd over zlib"])
def test_a_chunk_that_would_take_all_memory_is_refused(name: str, loop: ZarrLoop, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain: dict[str, Any] = {
            "bz2": {"compressors": [more.BZ2()]},
            "lz4": {"zarr_format": 2, "compressors": numcodecs.LZ4()},
            "blosc as a filter": {"zarr_format": 2, "filters": [numcodecs.Blosc()], "compressors": numcodecs.Zlib()},
            "zstd over zlib": {"compressors": [more.Zlib(), ZstdCodec()]},
        }[name]
    array = within_bounds(opened(str(write(tmp_path, chain)), loop))
    bomb = BOMBS[name.split()[0]]
    chunks_in(tmp_path)[1].write_bytes(zlib.compress(bomb) if "filter" in name else bomb)
    with pytest.raises(ValueError, match="decodes to"):
        read(array, loop)


def test_zstd_frames_are_bounded_by_their_blocks() -> None:
    plain, skipped = block(0, 5, b"hello", last=True), b"\x52\x2a\x4d\x18" + struct.pack("<I", 3) + b"abc"
    for data, most in (
        (unstated(plain), 5),
        (unstated(block(1, 70, b"a"), plain), 75),
        (unstated(plain) + skipped + unstated(plain), 10),
        (numcodecs.Zstd(checksum=True).encode(b"abc" * 100), 1 << 17),
    ):
        frame = np.frombuffer(data, dtype=np.uint8)
        assert zstd_bound(frame) == most
        assert len(decode_within(Codec("zstd"), frame, Room(None, 1000))) <= most
    for damaged in (b"no frame", unstated(block(1, 70, b"a")), b"\x28\xb5\x2f\xfd"):
        with pytest.raises(ValueError, match="Zstandard frame"):
            zstd_bound(np.frombuffer(damaged, dtype=np.uint8))


names = st.sampled_from(sorted(BOUNDED))


def encoded(name: str, data: bytes) -> Bytes:
    return np.frombuffer(bytes(numcodecs.get_codec({"id": name}).encode(data)), dtype=np.uint8)


@given(st.binary(min_size=1, max_size=300), names, st.booleans())
def test_what_was_encoded_comes_back_exact_or_within_its_room(data: bytes, name: str, exact: bool) -> None:
    room = Room(len(data), len(data)) if exact else Room(None, 300)
    assert decode_within(Codec(name), encoded(name, data), room).tobytes() == data


@given(st.binary(min_size=1, max_size=300), names, st.integers(0, 10**6), st.booleans())
def test_what_was_cut_is_damage(data: bytes, name: str, at: int, exact: bool) -> None:
    whole = encoded(name, data)
    room = Room(len(data), len(data)) if exact else Room(None, 300)
    with pytest.raises(ValueError, match=r"."):
        decode_within(Codec(name), whole[: at % len(whole)], room)


@given(st.binary(max_size=100), names)
def test_any_bytes_give_as_many_as_there_is_room_for_or_a_cause(data: bytes, name: str) -> None:
    with contextlib.suppress(ValueError):
        assert len(decode_within(Codec(name), np.frombuffer(data, dtype=np.uint8), Room(None, 64))) <= 64


# Manners


def test_the_array_itself_and_zarrs_configuration_stay_as_they_are(loop: ZarrLoop, tmp_path: Path) -> None:
    array = opened(str(write(tmp_path, CHAINS["blosc"])), loop)
    before, configured = array.codec_pipeline, zarr.config.get("codec_pipeline")
    assert within_bounds(array) is not array
    assert array.codec_pipeline is before
    assert zarr.config.get("codec_pipeline") == configured


def test_a_pipeline_that_is_not_zarrs_own_is_left_alone(loop: ZarrLoop, tmp_path: Path) -> None:
    array = opened(str(write(tmp_path, CHAINS["blosc"])), loop)

    class Chosen(type(array.codec_pipeline)):  # type: ignore[misc]
        pass

    object.__setattr__(array, "codec_pipeline", Chosen(**vars(array.codec_pipeline)))
    assert within_bounds(array) is array


def test_a_shard_has_room_for_what_each_of_its_chunks_takes_beside_its_elements(loop: ZarrLoop, tmp_path: Path) -> None:
    array = within_bounds(opened(str(write(tmp_path, OTHERS["zstd over a shard"])), loop))
    [over] = array.codec_pipeline.bytes_bytes_codecs
    assert isinstance(over, WithinBounds)
    spec: Any = SimpleNamespace(shape=(1000, 100), dtype=array.metadata.dtype)
    frame = numcodecs.Zstd().encode(bytes(4))
    assert over.room(spec).exact is None
    assert 100_000 * (len(frame) + 16) < over.room(spec).most < 1 << 30
