"""What decoding promises: what zarr and numcodecs encode comes back; what lies or is cut is refused with its cause."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data.codecs import Codec
from streamtrain.data.decode import Decoder, zstd_content_size
from streamtrain.data.filters import Bytes
from streamtrain.data.layout import ArrayLayout
from tests.data.stores import FAST, Case, chunks_of, layout_of, part, within, write

CODECS: dict[str, Any] = {
    "zstd": numcodecs.Zstd(level=1),
    "blosc": numcodecs.Blosc(cname="lz4", shuffle=2),
    "lz4": numcodecs.LZ4(),
    "gzip": numcodecs.GZip(level=1),
    "zlib": numcodecs.Zlib(level=1),
}
names = pytest.mark.parametrize("name", CODECS)
codec_names = st.sampled_from(sorted(CODECS))


def decoder(size: int, *codecs: str, dtype: str = "uint8") -> Decoder:
    """For chunks of so many elements with these codecs, in the order of encoding."""
    chain = tuple(Codec(name) for name in codecs)
    return Decoder(ArrayLayout("x", (size,), np.dtype(dtype), (size,), None, chain, (0,), "/", "c", fill_value=0))


def encoded(name: str, data: bytes) -> bytes:
    return bytes(CODECS[name].encode(np.frombuffer(data, dtype=np.uint8)))


def array(data: bytes) -> Bytes:
    return np.frombuffer(data, dtype=np.uint8)


def checked(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def zstd_frame(*blocks: tuple[bytes, int], header: bytes = b"\x00\x58") -> bytes:
    """A frame of run-length blocks (byte, count), after RFC 8878; this header states no size."""
    frame = b"\x28\xb5\x2f\xfd" + header
    for number, (byte, count) in enumerate(blocks, 1):
        frame += struct.pack("<I", count << 3 | 2 | (number == len(blocks)))[:3] + byte
    return frame


# What others encode


@given(st.binary(min_size=1, max_size=5000), codec_names, st.booleans())
def test_what_numcodecs_encodes_comes_back(data: bytes, name: str, checksum: bool) -> None:
    sealed = checked(encoded(name, data)) if checksum else encoded(name, data)
    out = np.full(len(data), 0xA5, dtype=np.uint8)
    decoded = decoder(len(data), name, *(["crc32c"] if checksum else [])).decode(array(sealed), out)
    assert decoded is out
    assert out.tobytes() == data


@pytest.mark.parametrize("case", [case for case in FAST if not case.sharding], ids=lambda case: case.name)
def test_chunks_that_zarr_wrote_decode_to_what_it_was_given(case: Case, tmp_path: Path) -> None:
    data = write(case, tmp_path)
    layout = layout_of(tmp_path)
    decode = Decoder(layout)
    for chunk in chunks_of(layout):
        out = np.empty(layout.chunk_bytes, dtype=np.uint8)
        raw = np.fromfile(tmp_path / layout.key(chunk), dtype=np.uint8)
        view = decode.view(decode.decode(raw, out))
        assert view.shape == layout.chunk_shape
        assert view.dtype == layout.dtype
        assert np.array_equal(view[within(layout, chunk)], data[part(layout, chunk)])


def test_without_compression_nothing_is_copied() -> None:
    data = array(checked(b"abcdefgh"))
    decoded = decoder(8, "crc32c").decode(data, np.empty(0, dtype=np.uint8))
    assert np.shares_memory(decoded, data)
    assert decoded.tobytes() == b"abcdefgh"


def test_a_view_copies_nothing_and_may_start_anywhere() -> None:
    shifted = np.arange(33, dtype=np.uint8)[1:]
    view = decoder(4, dtype="float64").view(shifted)
    assert np.shares_memory(view, shifted)
    assert view.tobytes() == shifted.tobytes()


def test_checksums_around_and_under_each_other_are_all_verified() -> None:
    data = array(checked(checked(b"abcd")))
    assert decoder(4, "crc32c", "crc32c").decode(data, np.empty(0, dtype=np.uint8)).tobytes() == b"abcd"
    with pytest.raises(ValueError, match="checksum"):
        decoder(4, "crc32c", "crc32c").decode(array(checked(b"abcd1234")), np.empty(0, dtype=np.uint8))


# Chains of filters


CHAINS: list[list[Codec]] = [
    [Codec("delta", {"dtype": "<i4"}), Codec("shuffle", {"elementsize": 4}), Codec("zstd")],
    [Codec("delta", {"dtype": "<i4", "astype": "<i2"}), Codec("zlib")],
    [Codec("delta", {"dtype": "<i4"})] * 3,
    [Codec("shuffle", {"elementsize": 2}), Codec("crc32c"), Codec("lz4"), Codec("adler32")],
    [Codec("astype", {"decode_dtype": "<i4", "encode_dtype": "<i2"}), Codec("fletcher32"), Codec("blosc")],
    [Codec("fixedscaleoffset", {"dtype": "<i4", "astype": "<u1", "scale": 1, "offset": 5}), Codec("gzip")],
    [Codec("bitround", {"keepbits": 3}), Codec("jenkins_lookup3")],
]


def sealed(chain: list[Codec], data: bytes) -> Bytes:
    """Data that these codecs have encoded, one after another."""
    for codec in chain:
        if codec.name == "crc32c":
            data = checked(data)
        elif codec.name != "bitround":
            data = bytes(np.asarray(numcodecs.get_codec({"id": codec.name, **codec.config}).encode(array(data))).data)
    return array(data)


def chained(chain: list[Codec], elements: int) -> Decoder:
    return Decoder(
        ArrayLayout("x", (elements,), np.dtype("<i4"), (elements,), None, tuple(chain), (0,), "/", "c", fill_value=0)
    )


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(codec.name for codec in chain))
@given(values=st.lists(st.integers(5, 250), min_size=1, max_size=300))
def test_what_a_chain_of_codecs_encodes_comes_back_within_its_room(chain: list[Codec], values: list[int]) -> None:
    data = np.array(values, dtype="<i4")
    decode = chained(chain, len(data))
    guarded = np.full(decode.room + 64, 0xA5, dtype=np.uint8)
    decoded = decode.decode(sealed(chain, data.tobytes()), guarded[: decode.room])
    assert decoded.tobytes() == data.tobytes()
    assert (guarded[decode.room :] == 0xA5).all()
    assert not decode.room or np.shares_memory(decoded, guarded)
    assert decode.decode(sealed(chain, data.tobytes()), guarded[: data.nbytes]).tobytes() == data.tobytes()


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(codec.name for codec in chain))
@given(data=st.binary(max_size=300), elements=st.integers(1, 40))
def test_any_bytes_are_decoded_by_a_chain_to_the_size_or_refused(
    chain: list[Codec], data: bytes, elements: int
) -> None:
    decode = chained(chain, elements)
    guarded = np.full(decode.room + 64, 0xA5, dtype=np.uint8)
    with contextlib.suppress(ValueError):
        assert len(decode.decode(array(data), guarded[: decode.room])) == 4 * elements
    assert (guarded[decode.room :] == 0xA5).all()


@pytest.mark.parametrize("name", ["crc32", "adler32", "fletcher32", "jenkins_lookup3", "crc32c"])
def test_every_kind_of_checksum_notices_a_flipped_bit(name: str) -> None:
    chain, data = [Codec(name)], np.arange(10, dtype="<i4")
    whole = sealed(chain, data.tobytes()).copy()
    assert chained(chain, 10).decode(whole, np.empty(0, dtype=np.uint8)).tobytes() == data.tobytes()
    for place in range(0, len(whole), 5):
        whole[place] ^= 4
        with pytest.raises(ValueError, match=rf"its checksum \({name}\) does not match"):
            chained(chain, 10).decode(whole, np.empty(0, dtype=np.uint8))
        whole[place] ^= 4


# Sizes


@given(st.binary(min_size=1, max_size=300), st.integers(1, 400), codec_names)
def test_a_chunk_of_another_size_is_refused(data: bytes, size: int, name: str) -> None:
    if size == len(data):
        return
    with pytest.raises(ValueError, match=f"decodes to .*(expected|more than) {size}"):
        decoder(size, name).decode(array(encoded(name, data)), np.empty(size, dtype=np.uint8))


@names
def test_a_chunk_that_decodes_to_gigabytes_is_refused_before_memory_is_taken(name: str) -> None:
    bomb = encoded(name, bytes(64 << 20))
    assert len(bomb) < 1 << 20
    out = np.empty(1000, dtype=np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"(expected|more than) 1000"):
            decoder(1000, name).decode(array(bomb), out)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_that_lies_about_its_size_does_not_write_beyond_the_buffer() -> None:
    """A header that states 1000 bytes, over blocks of a MiB."""
    frame = zstd_frame(*[(b"x", 1 << 17)] * 8, header=b"\x60" + struct.pack("<H", 1000 - 256))
    guarded = np.full(1064, 0xA5, dtype=np.uint8)
    assert zstd_content_size(array(frame)) == 1000
    with pytest.raises(ValueError, match="zstd can't decode it"):
        decoder(1000, "zstd").decode(array(frame), guarded[:1000])
    assert (guarded[1000:] == 0xA5).all()


def test_a_frame_that_states_no_size_is_decoded_within_the_buffer() -> None:
    out = np.empty(1000, dtype=np.uint8)
    frame = zstd_frame((b"x", 600), (b"y", 400))
    assert zstd_content_size(array(frame)) is None
    assert decoder(1000, "zstd").decode(array(frame), out).tobytes() == b"x" * 600 + b"y" * 400
    for count in (399, 401, 1 << 17):
        with pytest.raises(ValueError, match="zstd can't decode it"):
            decoder(1000, "zstd").decode(array(zstd_frame((b"x", 600), (b"y", count))), out)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65791, 65792, 65793, 1 << 20])
@pytest.mark.parametrize("checksum", [False, True])
def test_the_stated_size_of_a_frame_is_the_size(size: int, checksum: bool) -> None:
    frame = numcodecs.Zstd(level=1, checksum=checksum).encode(np.zeros(size, dtype=np.uint8))
    assert zstd_content_size(array(bytes(frame))) == size


@pytest.mark.parametrize("flags", range(256))
def test_every_form_of_a_frame_header_is_read(flags: int) -> None:
    """RFC 8878, 3.1.1.1: window descriptor unless single segment, dictionary of 0, 1, 2, 4 bytes, then the size."""
    single, code = bool(flags & 0x20), flags >> 6
    width = (int(single), 2, 4, 8)[code]
    skipped = (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    stated = bytes(range(1, 1 + width))
    head = b"\x28\xb5\x2f\xfd" + bytes([flags]) + b"\xff" * skipped + stated
    expected = int.from_bytes(stated, "little") + (256 if width == 2 else 0) if width else None
    assert zstd_content_size(array(head + b"\xee" * 20)) == expected
    if width and len(head) > 6:
        with pytest.raises(ValueError, match="header is cut"):
            zstd_content_size(array(head[:-1]))


def test_gzip_of_several_members_is_one_chunk() -> None:
    """As `cat a.gz b.gz` and bgzip make it, and numcodecs reads it."""
    data = encoded("gzip", b"abc") + encoded("gzip", b"defg")
    assert bytes(CODECS["gzip"].decode(data)) == b"abcdefg"
    out = np.empty(7, dtype=np.uint8)
    assert decoder(7, "gzip").decode(array(data), out).tobytes() == b"abcdefg"
    with pytest.raises(ValueError, match="decodes to more than 6 bytes"):
        decoder(6, "gzip").decode(array(data), out[:6])
    with pytest.raises(ValueError, match="decodes to 7 bytes, expected 8"):
        decoder(8, "gzip").decode(array(data), np.empty(8, dtype=np.uint8))


@pytest.mark.parametrize("name", ["gzip", "zlib"])
def test_bytes_after_the_end_of_a_deflated_chunk_are_damage(name: str) -> None:
    with pytest.raises(ValueError, match=r"follow the end|can't decode"):
        decoder(3, name).decode(array(encoded(name, b"abc") + b"junk"), np.empty(3, dtype=np.uint8))


# Damage


@given(st.binary(max_size=200), st.lists(codec_names | st.just("crc32c"), min_size=1, max_size=2))
def test_any_bytes_are_decoded_to_the_size_or_refused(data: bytes, codecs: list[str]) -> None:
    """Compressors stand first in a chain that the fast lanes take."""
    chain = sorted(codecs, key=lambda name: name == "crc32c")
    if sum(name != "crc32c" for name in chain) > 1:
        chain = chain[:1]
    guarded = np.full(128, 0xA5, dtype=np.uint8)
    with contextlib.suppress(ValueError):
        assert len(decoder(64, *chain).decode(array(data), guarded[:64])) == 64
    assert (guarded[64:] == 0xA5).all()


@given(st.binary(min_size=1, max_size=400), codec_names, st.data())
def test_a_cut_chunk_is_refused(data: bytes, name: str, cut: st.DataObject) -> None:
    whole = encoded(name, data)
    shorter = whole[: cut.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(ValueError, match=r"\w"):
        decoder(len(data), name).decode(array(shorter), np.empty(len(data), dtype=np.uint8))


@given(st.binary(min_size=30, max_size=400), codec_names, st.data())
def test_flipped_bits_never_write_beyond_the_buffer(data: bytes, name: str, where: st.DataObject) -> None:
    damaged = bytearray(encoded(name, data))
    damaged[where.draw(st.integers(0, min(20, len(damaged) - 1)))] ^= 1 << where.draw(st.integers(0, 7))
    guarded = np.full(len(data) + 64, 0xA5, dtype=np.uint8)
    with contextlib.suppress(ValueError):
        decoder(len(data), name).decode(array(bytes(damaged)), guarded[: len(data)])
    assert (guarded[len(data) :] == 0xA5).all()


@given(st.binary(min_size=1, max_size=400), codec_names, st.data())
def test_under_a_checksum_no_flipped_bit_passes(data: bytes, name: str, where: st.DataObject) -> None:
    damaged = bytearray(checked(encoded(name, data)))
    damaged[where.draw(st.integers(0, len(damaged) - 1))] ^= 1 << where.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match="checksum"):
        decoder(len(data), name, "crc32c").decode(array(bytes(damaged)), np.empty(len(data), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("zstd", b"", "no Zstandard frame"),
        ("zstd", b"\x28\xb5\x2f\xfd", "no Zstandard frame"),
        ("zstd", b"not a frame", "no Zstandard frame"),
        ("zstd", b"\x28\xb5\x2f\xfd\xc0\x00\x01", "header is cut"),
        ("blosc", b"123", "has 3 bytes, fewer than a Blosc header"),
        ("blosc", struct.pack("<4BIII", 2, 1, 0, 1, 8, 8, 99), "has 16 bytes, its Blosc header says 99"),
        ("blosc", struct.pack("<4BIII", 2, 1, 0, 1, 1 << 31, 8, 16), "decodes to 2147483648 bytes, expected 8"),
        ("lz4", b"1", "fewer than an LZ4 header"),
        ("lz4", struct.pack("<I", 8), "lz4 can't decode it"),
        ("gzip", b"not gzip", "gzip can't decode it"),
        ("zlib", zlib.compress(b"12345678")[:-1], "its zlib stream is cut short"),
        ("zlib", zlib.compress(b"12345678")[:-1] + b"!", "zlib can't decode it"),
        ("crc32c", b"12", "has 2 bytes, fewer than a checksum"),
        ("crc32c", checked(b"1234567"), "has 7 bytes, expected 8"),
    ],
)
def test_the_cause_is_said(name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(8, name).decode(array(data), np.empty(8, dtype=np.uint8))


def test_a_decoder_keeps_no_state() -> None:
    decode, good = decoder(4, "zstd"), encoded("zstd", b"abcd")
    outs: list[NDArray[Any]] = [np.empty(4, dtype=np.uint8) for _ in range(2)]
    with pytest.raises(ValueError, match="zstd can't decode"):
        decode.decode(array(good[:-1]), outs[0])
    assert [decode.decode(array(good), out).tobytes() for out in outs] == [b"abcd", b"abcd"]
