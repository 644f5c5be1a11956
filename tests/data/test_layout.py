"""What the layout promises: it finds every byte of what zarr writes, and refuses claims that nobody can keep."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.data.layout import ABSENT, MAX_CHUNK_BYTES, ArrayLayout, parse_array, parse_shard_index
from streamtrain.errors import DataError
from tests.data.stores import CASES, Case, chunks_of, layout_of, write

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def v3(**changes: Any) -> dict[str, Any]:
    """Metadata of a small array of format 3, as zarr's `metadata.to_dict()` gives it, with changes."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": (10, 4),
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": (3, 4)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": ({"name": "bytes", "configuration": {"endian": "little"}},),
        "attributes": {},
        "storage_transformers": (),
    } | changes


def v2(**changes: Any) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": (10, 4),
        "chunks": (3, 4),
        "dtype": "<f4",
        "order": "C",
        "filters": None,
        "compressor": None,
        "dimension_separator": ".",
    } | changes


def grid(*chunk_shape: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}


def sharded(shard: tuple[int, ...], chunk: tuple[int, ...]) -> dict[str, Any]:
    config = {
        "chunk_shape": chunk,
        "codecs": v3()["codecs"],
        "index_codecs": ({"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}),
        "index_location": "end",
    }
    codec = {"name": "sharding_indexed", "configuration": config}
    return v3(chunk_grid=grid(*shard), codecs=(codec,))


def parse(metadata: dict[str, Any], dtype: str = "float32") -> ArrayLayout:
    return parse_array("x", metadata, np.dtype(dtype), 0)


# What zarr writes


@cases
def test_every_file_that_zarr_writes_has_its_key_and_there_is_no_other(case: Case, tmp_path: Path) -> None:
    write(case, tmp_path)
    layout = layout_of(tmp_path)
    keys = {layout.key(chunk) for chunk in chunks_of(layout)}
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {file for file in files if not file.endswith((".json", ".zarray", ".zattrs", ".zgroup"))} == keys
    assert len(keys) == layout.num_files


@cases
def test_the_lane_is_chosen_by_what_the_codecs_are(case: Case, tmp_path: Path) -> None:
    data = write(case, tmp_path)
    layout = layout_of(tmp_path)
    assert layout.slow == case.slow
    assert (layout.shape, layout.ndim) == (data.shape, data.ndim)
    assert layout.native == data.dtype.newbyteorder("=")
    if case.sharding:
        assert (layout.shard_shape, layout.chunk_shape) == ((14, 8), (7, 4))
        assert layout.inner == (2, 2)


def test_slots_of_a_shard_count_in_c_order(tmp_path: Path) -> None:
    layout = parse(sharded((6, 4), (2, 1)))
    assert [layout.slot(chunk) for chunk in [(0, 0), (0, 3), (1, 0), (2, 3), (3, 0), (5, 7)]] == [0, 3, 4, 11, 0, 11]
    assert layout.key((3, 0)) == "x/c/1/0"


def test_an_array_at_the_root_of_its_store_has_bare_keys(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path), shape=(4,), chunks=(2,), dtype="int8")[:] = 1
    assert layout_of(tmp_path, "").key((1,)) == "c/1"


def test_the_part_that_a_chunk_covers_ends_with_the_array() -> None:
    assert parse(v3()).box((3, 0)) == ((9, 10), (0, 4))


def test_a_writer_may_vouch_that_no_chunk_is_left_out() -> None:
    assert parse(v3(attributes={"streamtrain": {"complete": True}})).complete
    assert parse(v2(attributes={"streamtrain": {"complete": True}})).complete
    others: list[dict[str, Any]] = [{}, {"streamtrain": {}}, {"streamtrain": 7}, {"streamtrain": {"complete": "yes"}}]
    for own in [*others, None, 7, "yes", [1]]:
        assert not parse(v3(attributes=own)).complete


def test_fill_that_is_left_open_is_zero_as_in_zarr(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path), name="x", shape=(4,), dtype="int8", zarr_format=2, fill_value=None)
    assert layout_of(tmp_path).fill_value == zarr.open_array(str(tmp_path), path="x")[0] == 0
    assert parse(v2()).fill_value == 0
    assert parse_array("x", v2(), np.dtype("f4"), None).fill_value == 0


# Byte order and axes


@pytest.mark.parametrize(("endian", "order"), [("little", "<"), ("big", ">")])
def test_byte_order_is_that_of_the_codec(endian: str, order: str) -> None:
    codec = {"name": "bytes", "configuration": {"endian": endian}}
    layout = parse(v3(codecs=(codec,)))
    assert layout.dtype == np.dtype("f4").newbyteorder(order)  # type: ignore[arg-type]
    assert layout.native == np.dtype("f4")


def test_byte_order_of_format_2_is_that_of_its_dtype() -> None:
    assert parse(v2(dtype=">f4")).dtype == np.dtype(">f4")


def test_transpositions_compose() -> None:
    orders = [(1, 2, 0), (0, 2, 1), (2, 1, 0)]
    codecs = [{"name": "transpose", "configuration": {"order": order}} for order in orders]
    layout = parse(v3(shape=(2, 3, 4), chunk_grid=grid(2, 3, 4), codecs=(*codecs, *v3()["codecs"])))
    stored = np.empty((2, 3, 4))
    for order in orders:
        stored = stored.transpose(order)
    assert tuple(layout.shape[axis] for axis in layout.axes) == stored.shape


# What only zarr's lane knows


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"chunk_grid": {"name": "rectangular", "configuration": {}}}, "rectangular chunk grid"),
        ({"chunk_key_encoding": {"name": "fancy"}}, "chunk key encoding 'fancy'"),
        ({"storage_transformers": ({"name": "t"},)}, "storage transformers"),
        ({"codecs": ({"name": "fancy"}, *v3()["codecs"])}, "codec 'fancy'"),
        ({"codecs": (*v3()["codecs"], {"name": "fancy"})}, "codec 'fancy'"),
        ({"codecs": ({"name": "transpose", "configuration": {"order": "F"}}, *v3()["codecs"])}, "codec 'transpose'"),
        ({"codecs": ({"name": "zstd"}, *v3()["codecs"])}, "codec 'zstd'"),
        ({"codecs": ({"name": "packed"},)}, "codec 'packed'"),
        ({"codecs": ()}, "no bytes codec"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_fast_lanes_do_not_know_is_said(changes: dict[str, Any], why: str) -> None:
    assert parse(v3(**changes)).slow == why


def test_the_key_encoding_may_be_left_out() -> None:
    metadata = v3()
    del metadata["chunk_key_encoding"]
    assert parse(metadata).key((1, 0)) == "x/c/1/0"
    assert parse(v3(chunk_key_encoding={"name": "default"})).key((1, 0)) == "x/c/1/0"
    assert parse(v3(chunk_key_encoding={"name": "v2"})).key((1, 0)) == "x/1.0"


# Claims that nobody can keep


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (v3(shape=(10**15, 4)), r"array 'x' claims the shape \(10{15}, 4\)"),
        (v3(shape=(10**200, 10**200)), "claims the shape"),
        (v3(shape=(-1, 4)), r"claims the shape \(-1, 4\): no length is negative"),
        (v3(chunk_grid=grid(0, 4)), r"chunks of shape \(0, 4\): each length must be at least 1"),
        (v3(chunk_grid=grid(3, -4)), r"chunks of shape \(3, -4\)"),
        (v3(chunk_grid=grid(1 << 39, 1)), "claims chunks of 2.0 TiB; at most 64.0 GiB is read"),
        (v3(chunk_grid=grid(10**300, 10**300)), "claims chunks of .* TiB; at most"),
        (v2(chunks=(0, 4)), "each length must be at least 1"),
        (v2(chunks=(1 << 39, 1)), "claims chunks of 2.0 TiB"),
        (v2(shape=(10**15, 4)), "claims the shape"),
        (sharded((6, 4), (4, 4)), r"shards of \(6, 4\) don't hold whole chunks of \(4, 4\)"),
        (sharded((6, 4), (0, 4)), "each length must be at least 1"),
        (sharded((0, 4), (3, 4)), "each length must be at least 1"),
        (sharded((1 << 40, 4), (1 << 39, 4)), "claims chunks of 8.0 TiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_nobody_has_are_refused_with_what_they_claim(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(metadata)


def test_the_largest_chunk_that_is_read_is_read() -> None:
    assert parse(v3(chunk_grid=grid(MAX_CHUNK_BYTES // 4, 1))).chunk_bytes == MAX_CHUNK_BYTES


@pytest.mark.parametrize("dtype", ["O", "U4", "S4", "M8[s]", "m8[s]", "V8", "i4,f8", "V0", "g"])
def test_dtypes_that_cannot_be_trained_on_are_refused_by_name(dtype: str) -> None:
    with pytest.raises(DataError, match=r"array 'x' has dtype .*, which can't be trained on") as caught:
        parse(v3(), dtype)
    assert "float16 to float64" in caught.value.hint


# The index of a shard


def index_bytes(entries: list[tuple[int, int]]) -> bytes:
    body = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    return body + struct.pack("<I", google_crc32c.value(body))


offsets = st.integers(0, 2**64 - 1)


@given(st.lists(st.tuples(offsets, offsets), max_size=20))
def test_an_index_reads_back_as_written(entries: list[tuple[int, int]]) -> None:
    read = parse_shard_index(index_bytes(entries), len(entries))
    assert [tuple(entry) for entry in read.tolist()] == entries


@given(st.lists(st.tuples(offsets, offsets), min_size=1, max_size=5), st.data())
def test_a_flipped_bit_in_an_index_is_noticed(entries: list[tuple[int, int]], data: st.DataObject) -> None:
    damaged = bytearray(index_bytes(entries))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match="checksum"):
        parse_shard_index(bytes(damaged), len(entries))


@pytest.mark.parametrize("data", [b"", b"1234", index_bytes([(0, 1)])[:-1], index_bytes([(0, 1)]) + b"0"])
def test_an_index_of_another_length_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"index has \d+ of 20 bytes"):
        parse_shard_index(data, 1)


def test_an_absent_chunk_is_marked_in_the_index_as_zarr_marks_it(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path), name="x", shape=(4,), chunks=(2,), shards=(4,), dtype="int8")
    array[:2] = 1
    layout = layout_of(tmp_path)
    index = parse_shard_index((tmp_path / layout.key((0,))).read_bytes()[-36:], 2)
    assert index[1].tolist() == [ABSENT, ABSENT]
    assert index[0, 0] == 0
