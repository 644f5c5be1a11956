"""Encoded bytes to decoded chunks, by numcodecs, into buffers of ours; a size is checked before memory is touched.

`Decoder` knows one array's codecs. Damage raises ValueError with its cause; who knows the chunk adds where it lies.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numcodecs
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from streamtrain.data.codecs import CHECKSUMS, FILTERS, Codec, encoded_sizes
from streamtrain.data.filters import Bytes, Checksum, Filter
from streamtrain.data.layout import ArrayLayout

blosc.use_threads = False  # concurrency is ours; its own pool would fight with it (and is not safe to share)


def zstd_content_size(data: Bytes) -> int | None:
    """Decoded size that a Zstandard frame's header states (RFC 8878, 3.1.1.1); None if it states none."""
    head = data[:18].tobytes()
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("it is no Zstandard frame")
    flags = head[4]
    single, code = bool(flags & 0x20), flags >> 6
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    width = (1 if single else 0, 2, 4, 8)[code]
    if not width:
        return None
    if len(head) < at + width:
        raise ValueError("its Zstandard header is cut")
    size = int.from_bytes(head[at : at + width], "little")
    return size + 256 if width == 2 else size


def _decode_zstd(data: Bytes, out: Bytes, codec: Any) -> None:
    stated = zstd_content_size(data)
    if stated is not None and stated != len(out):  # a frame that states none is decoded no further than `out`
        raise ValueError(f"it decodes to {stated} bytes, expected {len(out)}")
    codec.decode(data, out=out)


def blosc_content_size(data: Bytes) -> int:
    """Decoded size that a Blosc header states, of a chunk that is as long as it says: nobody else looks at that, and
    what is cut would be decoded out of the memory behind it."""
    if len(data) < 16:
        raise ValueError(f"it has {len(data)} bytes, fewer than a Blosc header")
    stated, _, compressed = struct.unpack("<III", data[4:16].tobytes())
    if compressed != len(data):
        raise ValueError(f"it has {len(data)} bytes, its Blosc header says {compressed}")
    return int(stated)


def _decode_blosc(data: Bytes, out: Bytes, codec: Any) -> None:
    stated = blosc_content_size(data)
    if stated != len(out):
        raise ValueError(f"it decodes to {stated} bytes, expected {len(out)}")
    codec.decode(data, out=out)


def lz4_content_size(data: Bytes) -> int:
    """Decoded size that numcodecs' LZ4 writes before the data."""
    if len(data) < 4:
        raise ValueError(f"it has {len(data)} bytes, fewer than an LZ4 header")
    return int.from_bytes(data[:4].tobytes(), "little")


def _decode_lz4(data: Bytes, out: Bytes, codec: Any) -> None:
    stated = lz4_content_size(data)
    if stated != len(out):
        raise ValueError(f"it decodes to {stated} bytes, expected {len(out)}")
    codec.decode(data, out=out)


def _decode_deflate(data: Bytes, out: Bytes, codec: Any) -> None:
    """One zlib stream, or gzip members one after another (as bgzip writes them)."""
    gzip, rest, done = codec.codec_id == "gzip", data.tobytes(), 0
    while True:
        inflate = zlib.decompressobj(31 if gzip else 15)
        part = inflate.decompress(rest, len(out) - done + 1)
        if done + len(part) > len(out):
            raise ValueError(f"it decodes to more than {len(out)} bytes")
        out[done : done + len(part)] = np.frombuffer(part, dtype=np.uint8)
        done += len(part)
        if not inflate.eof:
            raise ValueError(f"its {codec.codec_id} stream is cut short")
        rest = inflate.unused_data.lstrip(b"\0")
        if not rest:
            break
        if not gzip:
            raise ValueError(f"{len(rest)} bytes follow the end of its {codec.codec_id} stream")
    if done != len(out):
        raise ValueError(f"it decodes to {done} bytes, expected {len(out)}")


_DECODERS: dict[str, Callable[[Bytes, Bytes, Any], None]] = {
    "zstd": _decode_zstd,
    "blosc": _decode_blosc,
    "lz4": _decode_lz4,
    "gzip": _decode_deflate,
    "zlib": _decode_deflate,
}


def decoding(codec: Codec) -> Callable[[Bytes, Bytes], None]:
    """What fills a buffer of the decoded size with what this codec made of it.

    It raises ValueError, RuntimeError or zlib.error where the data is damaged, or of another size.
    """
    if codec.name in FILTERS:
        return Filter(codec).decode
    decode, implementation = _DECODERS[codec.name], numcodecs.get_codec({"id": codec.name})
    return lambda data, out: decode(data, out, implementation)


@dataclass(frozen=True)
class _Writer:
    """A step that writes what it decodes."""

    name: str
    decode: Callable[[Bytes, Bytes], None]
    takes: int | None
    """Bytes that it must be given; None where only the data tells."""
    start: int
    """Where it writes, in the room of its chunk, and how much."""
    size: int

    def run(self, data: Bytes, room: Bytes) -> Bytes:
        if self.takes is not None and len(data) != self.takes:
            raise ValueError(f"it has {len(data)} bytes before {self.name} is undone, expected {self.takes}")
        out = room if len(room) == self.size else room[self.start : self.start + self.size]
        try:
            self.decode(data, out)
        except (RuntimeError, zlib.error) as error:
            raise ValueError(f"{self.name} can't decode it: {error}") from error
        return out


class Decoder:
    """Decodes the chunks of one array. Thread-safe: it keeps no state between calls."""

    def __init__(self, layout: ArrayLayout) -> None:
        self.layout = layout
        self._stored = tuple(layout.chunk_shape[a] for a in layout.axes)
        self._axes = tuple(int(a) for a in np.argsort(layout.axes))
        self._steps: list[Checksum | _Writer] = []
        start, other = 0, layout.decode_room // 2
        sizes: list[int | None] = [layout.chunk_bytes, *encoded_sizes(layout.codecs, layout.chunk_bytes)]
        for number, codec in enumerate(layout.codecs):  # from the last step back: it writes to the beginning
            size = sizes[number]
            if codec.name in CHECKSUMS:
                self._steps.append(Checksum(codec))
            elif not codec.identity:
                assert size is not None
                self._steps.append(_Writer(codec.name, decoding(codec), sizes[number + 1], start, size))
                start, other = other, start
        self._steps.reverse()
        self.compressed = any(isinstance(step, _Writer) for step in self._steps)
        """Whether decoding writes into `out`."""
        self.room = layout.decode_room
        """Bytes that `out` should have; what it lacks is taken from the heap."""

    def decode(self, data: Bytes, out: Bytes, *, sound: bool = False) -> Bytes:
        """The decoded bytes of one chunk: the beginning of `out`, or (where nothing is written) a part of `data`.

        `sound`: a manifest vouches for these bytes, and they were decoded before: then their own crc32c is not worked
        out again, which takes an eighth of the time that blosc takes.
        Raises ValueError with the cause if the data is damaged.
        """
        if len(out) < self.room:
            out = np.empty(self.room, dtype=np.uint8)
        for step in self._steps:
            data = step.verify(data, sound=sound) if isinstance(step, Checksum) else step.run(data, out)
        if len(data) != self.layout.chunk_bytes:
            raise ValueError(f"it has {len(data)} bytes, expected {self.layout.chunk_bytes}")
        return data

    def view(self, data: Bytes) -> NDArray[Any]:
        """Decoded bytes as an array of the chunk's shape: no copy."""
        return data.view(self.layout.dtype).reshape(self._stored).transpose(self._axes)
