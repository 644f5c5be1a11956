"""Filters and checksums of chunks, undone as numcodecs does it, from one buffer into another of known size.

Its law: no more memory than the two buffers and a tile; damage raises ValueError with its cause.
"""

from __future__ import annotations

import struct
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

from streamtrain.data.codecs import CHECKSUM_BYTES, Codec

Bytes = NDArray[np.uint8]

TILE = 1 << 15
"""Elements that are undone together where numcodecs makes intermediate arrays."""
_KEYS = (
    *("dtype", "astype", "elementsize", "scale", "offset", "digits", "encode_dtype", "decode_dtype"),
    *("location", "initval", "prefix"),
)
"""What the codecs are configured by; anything else that metadata say is not theirs."""


class Filter:
    """Undoes one filter. Thread-safe: it keeps no state between calls."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        known = {name: codec.config[name] for name in _KEYS if name in codec.config}
        self._implementation: Any = numcodecs.get_codec({"id": codec.name, **known})

    def decode(self, data: Bytes, out: Bytes) -> None:
        """Fill `out` with what was encoded to `data`; the sizes of both are as the codec says."""
        if self._codec.name == "shuffle":
            self._implementation.decode(data, out=out)
            return
        before, after = self._codec.dtypes
        encoded, decoded = data.view(after), out.view(before)
        if self._codec.name == "delta":
            np.cumsum(encoded, out=decoded)
            return
        if self._codec.name == "packbits":
            self._implementation.decode(encoded, out=decoded)
            return
        for start in range(0, len(encoded), TILE):
            self._implementation.decode(encoded[start : start + TILE], out=decoded[start : start + TILE])


class Checksum:
    """Verifies one checksum."""

    def __init__(self, codec: Codec) -> None:
        self._name = codec.name
        known = {name: codec.config[name] for name in _KEYS if codec.config.get(name) is not None}
        plain = codec.name == "crc32c" and known.get("location", "end") == "end"
        self._implementation: Any = None if plain else numcodecs.get_codec({"id": codec.name, **known})

    def verify(self, data: Bytes, *, sound: bool = False) -> Bytes:
        """The bytes that it covers, a part of `data`. Raises ValueError where they are not what was written.

        `sound`: that is known, and only asked of checksums that can't be cut off unread.
        """
        if len(data) < CHECKSUM_BYTES:
            raise ValueError(f"it has {len(data)} bytes, fewer than a checksum")
        if self._implementation is None:
            covered = data[:-CHECKSUM_BYTES]
            (expected,) = struct.unpack("<I", data[-CHECKSUM_BYTES:].tobytes())
            if not sound and google_crc32c.value(covered) != expected:
                raise ValueError(f"its checksum ({self._name}) does not match")
            return covered
        try:
            found = self._implementation.decode(data)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"its checksum ({self._name}) does not match") from error
        return np.frombuffer(found, dtype=np.uint8)
