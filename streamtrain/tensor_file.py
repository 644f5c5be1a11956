"""The safetensors format in one stream: each byte goes between memory and file once, and no second copy is held.

What the safetensors package writes is read here, and the other way round; on top of it come tensors of dtypes that the
format has no name for (complex128, ...), kept as bytes, with their dtype in the file's metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from streamtrain.errors import UNREADABLE

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
}
"""The format's names of dtypes; all of them are in every torch since 2.6."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FOREIGN = "streamtrain.dtypes"
"""Metadata key: a JSON object of tensor names to torch dtypes, for tensors stored as bytes (last axis: bytes)."""
MAX_HEADER = 100_000_000
"""The format's own bound on its header, in bytes."""


class Malformed(Exception):
    """The file is not what the format says; the text says what is wrong."""


def plan(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Tensor]]:
    """The file's head, and the tensors in the order in which their bytes follow.

    Larger items come first, so that each tensor is aligned to its item size. Tensors may have any stride and device.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    foreign = {name: str(tensors[name].dtype) for name in order if tensors[name].dtype not in _NAMES}
    notes = {"format": "pt", **metadata}
    if foreign:
        notes[_FOREIGN] = json.dumps(foreign, sort_keys=True)
    header: dict[str, object] = {"__metadata__": notes}
    offset = 0
    for name in order:
        tensor = tensors[name]
        shape = [*tensor.shape, tensor.itemsize] if name in foreign else list(tensor.shape)
        end = offset + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES.get(tensor.dtype, "U8"), "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensors[name] for name in order]


def size(head: bytes, tensors: list[Tensor]) -> int:
    """Bytes of the whole file."""
    return len(head) + sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def write(sink: Callable[[memoryview], object], head: bytes, tensors: list[Tensor]) -> None:
    """Give the file's bytes to `sink`, piece by piece; only a tensor that is not contiguous or on CPU is copied."""
    sink(memoryview(head))
    for tensor in tensors:
        if tensor.numel():
            sink(memory_of(tensor.to("cpu").contiguous()))


def read(source: Callable[[memoryview, int], int], total: int) -> dict[str, Tensor]:
    """Read all tensors of a file of `total` bytes into fresh memory, in the file's order.

    `source(into, offset)` fills memory with the file's bytes from `offset` on and tells how many came. The header is
    not believed: what it claims is checked against the file's size before memory is taken. Raises Malformed, or what
    `source` raises.
    """
    start, header, notes = _header(source, total)
    foreign = _foreign_dtypes(notes)
    tensors: dict[str, Tensor] = {}
    expected = 0
    for name, dtype, shape, first, last in sorted(header, key=lambda entry: entry[3]):
        if first != expected or last - first != math.prod(shape) * dtype.itemsize or start + last > total:
            raise Malformed(f"tensor {name!r:.80} of {dtype} {shape} claims bytes {first} to {last}")
        if name in foreign:
            if dtype is not torch.uint8 or shape[-1:] != [foreign[name].itemsize]:
                raise Malformed(f"tensor {name!r:.80} does not hold bytes of {foreign[name]}")
            dtype, shape = foreign[name], shape[:-1]
        try:
            tensor = torch.empty(shape, dtype=dtype)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise Malformed(f"tensor {name!r:.80} of {dtype} {shape} can't be made: {error!s:.120}") from error
        if last > first:
            _fill(source, memory_of(tensor), start + first)
        tensors[name] = tensor
        expected = last
    if start + expected != total:
        raise Malformed(f"{total - start - expected} bytes belong to no tensor")
    return tensors


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor; writing to them writes to it."""
    count, first = tensor.numel() * tensor.itemsize, tensor.storage_offset() * tensor.itemsize
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), first, (count,), (1,))
    return raw.numpy().data


def _header(
    source: Callable[[memoryview, int], int], total: int
) -> tuple[int, list[tuple[str, torch.dtype, list[int], int, int]], dict[str, Any]]:
    if total < 8:
        raise Malformed(f"it has {total} bytes, which hold no header")
    length = int.from_bytes(_bytes(source, 8, 0), "little")
    if length > min(total - 8, MAX_HEADER):
        raise Malformed(f"its header claims {length} bytes of {total}")
    text = _bytes(source, length, 8)
    try:
        document = json.loads(text)
        notes = document.pop("__metadata__", {})
        return 8 + length, list(_entries(document)), notes
    except UNREADABLE as error:
        raise Malformed(f"its header can't be read: {error!r:.120}") from error


def _entries(document: dict[str, Any]) -> Iterator[tuple[str, torch.dtype, list[int], int, int]]:
    for name, entry in document.items():
        first, last = entry["data_offsets"]
        numbers = [*entry["shape"], first, last]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"tensor {name!r:.80} has a size that is no natural number")
        yield name, DTYPES[entry["dtype"]], list(entry["shape"]), first, last


def _foreign_dtypes(notes: dict[str, Any]) -> dict[str, torch.dtype]:
    try:
        named = json.loads(notes.get(_FOREIGN, "{}"))
        dtypes = {name: getattr(torch, text.removeprefix("torch.")) for name, text in named.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise Malformed(f"its metadata can't be read: {error!r:.120}") from error
    if not all(isinstance(dtype, torch.dtype) for dtype in dtypes.values()):
        raise Malformed("its metadata names a dtype that torch does not have")
    return dtypes


def _bytes(source: Callable[[memoryview, int], int], count: int, offset: int) -> bytes:
    content = bytearray(count)
    _fill(source, memoryview(content), offset)
    return bytes(content)


def _fill(source: Callable[[memoryview, int], int], memory: memoryview, offset: int) -> None:
    while memory:
        count = source(memory[: 1 << 30], offset)
        if not count:
            raise Malformed("it ends early")
        memory, offset = memory[count:], offset + count
