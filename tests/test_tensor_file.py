"""Our safetensors files: the safetensors package reads what we write and we what it writes; no header is believed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamtrain import tensor_file
from streamtrain.tensor_file import DTYPES, Malformed


def bits(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def facts(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, tuple(tensor.shape), bits(tensor)) for name, tensor in tensors.items()}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    head, ordered = tensor_file.plan(tensors, metadata or {})
    with open(path, "wb") as file:
        tensor_file.write(file.write, head, ordered)
        assert file.tell() == tensor_file.size(head, ordered)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def read(path: Path) -> dict[str, Tensor]:
    with opened(path) as fd:
        return tensor_file.read(lambda into, offset: os.preadv(fd, [into], offset), os.fstat(fd).st_size)


def _tensor(dtype: torch.dtype, shape: list[int], turned: bool) -> Tensor:
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    raw = (torch.arange(count) % (2 if dtype is torch.bool else 256)).to(torch.uint8)
    tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    return tensor.transpose(0, -1) if turned and shape else tensor


def some(dtypes: list[torch.dtype]) -> st.SearchStrategy[dict[str, Tensor]]:
    tensor = st.builds(_tensor, st.sampled_from(dtypes), st.lists(st.integers(0, 4), max_size=3), st.booleans())
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    return st.dictionaries(names, tensor, max_size=5)


@settings(max_examples=60)
@given(some(list(DTYPES.values())))
def test_the_package_reads_what_we_write(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> None:
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    write(path, tensors)
    assert facts(load_file(path)) == facts(tensors)


@settings(max_examples=60)
@given(some(list(DTYPES.values())))
def test_we_read_what_the_package_writes(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> None:
    path = tmp_path_factory.getbasetemp() / "theirs.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    assert facts(read(path)) == facts(tensors)


@settings(max_examples=60)
@given(some([torch.complex128, torch.float32, torch.uint8, torch.bool]))
def test_dtypes_without_a_name_in_the_format_come_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path_factory.getbasetemp() / "foreign.safetensors"
    write(path, tensors)
    assert facts(read(path)) == facts(tensors)
    assert load_file(path).keys() == tensors.keys()


def test_metadata_is_there_for_others(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.zeros(2)}, {"b": "a"})
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "b": "a"}


def test_each_tensor_is_aligned_to_its_items(tmp_path: Path) -> None:
    tensors = {str(item): torch.zeros(3, dtype=dtype) for item, dtype in enumerate(DTYPES.values())}
    head, _ = tensor_file.plan(tensors, {})
    header = json.loads(head[8:])
    assert len(head) % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0


def file_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOREIGN = "streamtrain.dtypes"
MALFORMED: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("seven bytes", b"\0" * 7),
    ("header past the end", file_of({}, length=3)),
    ("header of 2^63 bytes", file_of({}, length=2**63)),
    ("not JSON", file_of(b"\x80\x04K\x01.")),
    ("not UTF-8", file_of(b'{"\xff": 1}')),
    ("a list", file_of([1])),
    ("deep", file_of(b"[" * 100_000)),
    ("no dtype", file_of({"x": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8)),
    ("unknown dtype", file_of({"x": entry("F31")}, b"\0" * 8)),
    ("dtype is a list", file_of({"x": {**entry(), "dtype": []}}, b"\0" * 8)),
    ("negative shape", file_of({"x": entry(shape=[-2])}, b"\0" * 8)),
    ("fractional shape", file_of({"x": entry(shape=[2.0])}, b"\0" * 8)),
    ("boolean shape", file_of({"x": entry(shape=[True, 2])}, b"\0" * 8)),
    ("shape is a number", file_of({"x": entry(shape=2)}, b"\0" * 8)),
    ("three offsets", file_of({"x": entry(offsets=[0, 8, 9])}, b"\0" * 8)),
    ("offsets turned", file_of({"x": entry(offsets=[8, 0])}, b"\0" * 8)),
    ("too few bytes for the shape", file_of({"x": entry(shape=[3])}, b"\0" * 8)),
    ("bytes past the end", file_of({"x": entry()}, b"\0" * 7)),
    ("a petabyte", file_of({"x": entry(shape=[2**48], offsets=[0, 2**50])}, b"\0" * 8)),
    ("a product that wraps", file_of({"x": entry(shape=[2**32, 2**32, 0, 1], offsets=[0, 8])}, b"\0" * 8)),
    ("an empty tensor of endless shape", file_of({"x": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])})),
    ("overlap", file_of({"x": entry(), "y": entry(offsets=[4, 12])}, b"\0" * 12)),
    ("gap", file_of({"x": entry(), "y": entry(offsets=[9, 17])}, b"\0" * 17)),
    ("left over", file_of({"x": entry()}, b"\0" * 9)),
    ("metadata is a list", file_of({"__metadata__": [], "x": entry()}, b"\0" * 8)),
    ("foreign dtype is no dtype", file_of({"__metadata__": {FOREIGN: '{"x": "torch.load"}'}, "x": entry()}, b"\0" * 8)),
    ("foreign dtype is absent", file_of({"__metadata__": {FOREIGN: '{"x": "torch.no"}'}, "x": entry()}, b"\0" * 8)),
    ("foreign dtypes are no JSON", file_of({"__metadata__": {FOREIGN: "{"}, "x": entry()}, b"\0" * 8)),
    ("foreign dtypes are a number", file_of({"__metadata__": {FOREIGN: "1"}, "x": entry()}, b"\0" * 8)),
    ("foreign dtypes are an object", file_of({"__metadata__": {FOREIGN: {}}, "x": entry()}, b"\0" * 8)),
    ("foreign over floats", file_of({"__metadata__": {FOREIGN: '{"x": "torch.complex128"}'}, "x": entry()}, b"\0" * 8)),
    (
        "foreign of another size",
        file_of({"__metadata__": {FOREIGN: '{"x": "torch.complex128"}'}, "x": entry("U8", [8])}, b"\0" * 8),
    ),
]


@pytest.mark.parametrize(("name", "content"), MALFORMED, ids=[name for name, _ in MALFORMED])
def test_a_malformed_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(Malformed):
        read(tmp_path / "x")


def test_no_single_byte_does_more_than_raise(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"a": torch.arange(3.0), "b": torch.zeros(1, dtype=torch.complex128), "c": torch.zeros(0)})
    whole = path.read_bytes()
    for position in range(len(whole)):
        for byte in (0x00, 0xFF, 0x22, 0x2D, whole[position] ^ 1):
            path.write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
            with suppress(Malformed):
                read(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(Malformed):
            read(path)
