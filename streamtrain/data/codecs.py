"""What each codec makes of a chunk's size, and so which chains the fast lanes can undo. Pure, no I/O.

Its law: a step is undone into a buffer whose size is known before a byte is decoded; a chain in which it is not goes
through zarr's own API, and `slow_codec` says which codec is the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

COMPRESSORS = frozenset({"zstd", "blosc", "gzip", "zlib", "lz4"})
"""Codecs that numcodecs decodes into a buffer of ours, and that state or keep to its size."""
CHECKSUMS = frozenset({"crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3"})
CHECKSUM_BYTES = 4
FILTERS = frozenset({"delta", "shuffle", "fixedscaleoffset", "quantize", "astype", "bitround", "packbits"})
"""Codecs whose sizes follow from each other; numcodecs undoes them from one buffer into another."""
DEFAULT_DTYPES = {"fixedscaleoffset": "dtype", "quantize": "dtype", "astype": "decode_dtype"}
"""What stands for the array's own dtype where Zarr 3 leaves it out."""
ALIGN = 64
_DTYPES = {"astype": ("decode_dtype", "encode_dtype")}
_NEEDED = {"fixedscaleoffset": ("scale", "offset"), "quantize": ("digits",)}


@dataclass(frozen=True)
class Codec:
    """A codec on bytes by its numcodecs id, with its configuration."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtypes(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Of a filter: what it takes and what it gives when it encodes. Raises ValueError or TypeError."""
        if self.name in ("shuffle", "bitround"):
            return np.dtype(np.uint8), np.dtype(np.uint8)
        if self.name == "packbits":
            return np.dtype(bool), np.dtype(np.uint8)
        if missing := [
            name for name in _NEEDED.get(self.name, ()) if not isinstance(self.config.get(name), int | float)
        ]:
            raise ValueError(f"{self.name} without {missing[0]}")
        before, after = _DTYPES.get(self.name, ("dtype", "astype"))
        given = self.config.get(before)
        if not isinstance(given, str):
            raise ValueError(f"{self.name} without {before}")
        dtypes = np.dtype(given), np.dtype(self.config.get(after) or given)
        if any(dtype.kind not in "biufc" for dtype in dtypes):
            raise ValueError(f"{self.name} of {dtypes[0]}")
        return dtypes

    @property
    def identity(self) -> bool:
        """Whether decoding changes no byte."""
        if self.name == "bitround":
            return True
        return self.name in ("quantize", "astype") and self.dtypes[0] == self.dtypes[1]

    def encoded_size(self, size: int) -> int | None:
        """Bytes that it makes of so many; None where only the data tells. Raises ValueError where it takes none."""
        if self.name in CHECKSUMS:
            return size + CHECKSUM_BYTES
        if self.name in COMPRESSORS:
            return None
        if self.name == "packbits":
            return 1 + -(-size // 8)  # after a byte that says how many bits of the last one are none
        before, after = self.dtypes
        if size % before.itemsize or (self.name == "shuffle" and size % int(self.config.get("elementsize", 4))):
            raise ValueError(f"{self.name} of elements that do not fit its chunks")
        return size // before.itemsize * after.itemsize


def encoded_sizes(codecs: Sequence[Codec], size: int) -> list[int | None]:
    """Bytes after each of these codecs, in the order of encoding; None after a compressor."""
    sizes: list[int | None] = []
    known: int | None = size
    for codec in codecs:
        known = None if known is None else codec.encoded_size(known)
        sizes.append(known)
    return sizes


def slow_codec(codecs: Sequence[Codec], size: int) -> str | None:
    """Why the fast lanes can't undo this chain on chunks of `size` bytes; None if they can."""
    known: int | None = size
    for codec in codecs:
        if codec.name not in COMPRESSORS | CHECKSUMS | FILTERS:
            return f"codec {codec.name!r}"
        if known is None and codec.name not in CHECKSUMS:
            return f"{codec.name!r} over a compressor"  # what it decodes to is of no known size
        if known is not None:
            try:
                after = codec.encoded_size(known)
            except (ValueError, TypeError) as error:
                return f"codec {codec.name!r} ({error})"
            if codec.name in FILTERS and after is not None and after > known:
                return f"codec {codec.name!r} that makes chunks larger"
            known = after
    return None


def decode_room(codecs: Sequence[Codec], size: int) -> int:
    """Bytes in which a chunk of `size` bytes is decoded: one buffer for the last step, or two that take turns."""
    sizes = [size, *encoded_sizes(codecs, size)]
    written = [
        before or 0
        for codec, before in zip(codecs, sizes, strict=False)
        if codec.name not in CHECKSUMS and not codec.identity
    ]
    if len(written) < 2:
        return sum(written)
    return 2 * -(-max(written) // ALIGN) * ALIGN


class Chain(NamedTuple):
    """Codecs of Zarr 3 as steps on bytes."""

    codecs: tuple[Codec, ...]
    dtype: np.dtype[Any]
    """Of the decoded bytes: its byte order is that of the bytes codec, or of the filters."""
    axes: tuple[int, ...]
    slow: str | None


def chain_of(codecs: Sequence[Mapping[str, Any]], dtype: np.dtype[Any], ndim: int) -> Chain:
    """The codecs of an array of Zarr 3 (or of a shard's inner chunks) as steps on bytes."""
    axes, slow = tuple(range(ndim)), None
    steps: list[Codec] = []
    stored: np.dtype[Any] | None = None
    for codec in codecs:
        kind, config = str(codec["name"]).removeprefix("numcodecs."), dict(codec.get("configuration") or {})
        if kind == "transpose" and stored is None and isinstance(config.get("order"), list | tuple):
            axes = tuple(axes[int(a)] for a in config["order"])
        elif kind == "bytes" and stored is None:
            stored = dtype.newbyteorder("<" if endian_of(codec) == "little" else ">")
            slow = slow or _mixed(steps, dtype, stored, axes)
        elif stored is None and kind in FILTERS - {"shuffle"}:
            own = {DEFAULT_DTYPES[kind]: dtype.str} if kind in DEFAULT_DTYPES else {}
            steps.append(Codec(kind, {**own, **_set(config)}))
        elif stored is not None and kind not in FILTERS - {"shuffle"}:
            sizes = {"elementsize": _last_dtype(steps, stored).itemsize} if kind == "shuffle" else {}
            steps.append(Codec(kind, {**sizes, **_set(config)}))
        else:
            slow = slow or f"codec {codec['name']!r}"
    if stored is None:
        slow = slow or "no bytes codec"
    filtered = any(step.name in FILTERS - {"shuffle"} for step in steps)
    return Chain(tuple(steps), dtype.newbyteorder("<") if filtered else stored or dtype, axes, slow)


def _set(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _last_dtype(filters: Sequence[Codec], stored: np.dtype[Any]) -> np.dtype[Any]:
    """What the bytes codec is given."""
    typed = [codec for codec in filters if codec.name not in ("bitround", "shuffle")]
    try:
        return typed[-1].dtypes[1] if typed else stored
    except (ValueError, TypeError):
        return stored


def _mixed(filters: Sequence[Codec], dtype: np.dtype[Any], stored: np.dtype[Any], axes: tuple[int, ...]) -> str | None:
    """Why these filters on arrays of this dtype can't be undone on the stored bytes."""
    if not filters:
        return None
    if axes != tuple(range(len(axes))):
        return f"codec {filters[-1].name!r} beside a transposition"
    try:
        given = [codec.dtypes for codec in filters if codec.name != "bitround"]
    except (ValueError, TypeError):
        return None  # whoever asks for the sizes says which
    expected = dtype.newbyteorder("<")
    fitting = stored.byteorder != ">"
    for before, after in given:
        fitting, expected = fitting and before == expected, after
    if not fitting:
        return f"codec {filters[-1].name!r} of another dtype or byte order"
    return None


def endian_of(codec: Mapping[str, Any]) -> str:
    """`little` or `big`, of a bytes codec."""
    endian = (codec.get("configuration") or {}).get("endian", "little")
    return str(getattr(endian, "value", endian) or "little")
