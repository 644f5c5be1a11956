"""What manifests promise: one record a file, found without loading the rest, and never believed when damaged."""

from __future__ import annotations

import json
import os
import tracemalloc
import zlib
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.data.layout import ABSENT, parse_shard_index
from streamtrain.data.manifest import PLACE, Draft, Manifest, Record, crc32c, describe, doubly, file_grid, first_chunk
from streamtrain.data.vouching import vouch, write_manifest
from streamtrain.errors import DataError
from tests.data.stores import CASES, Case, layout_of, write

NAMED = {case.name: case for case in CASES}


def made(folder: Path, case: str = "zstd") -> Manifest:
    write(NAMED[case], folder)
    return Manifest(write_manifest(folder, layout_of(folder)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_file_has_its_size_and_checksum(case: Case, tmp_path: Path) -> None:
    write(case, tmp_path)
    layout = layout_of(tmp_path)
    manifest = Manifest(write_manifest(tmp_path, layout))
    manifest.check()
    manifest.check_fits(layout, tmp_path / "x")
    for number in range(int(np.prod(file_grid(layout), dtype=np.int64))):
        data = (tmp_path / layout.key(first_chunk(layout, number))).read_bytes()
        assert manifest.file(number) == describe(np.frombuffer(data, dtype=np.uint8), both=doubly(layout, files=True))


@pytest.mark.parametrize("case", ["shards-raw", "shards-index-at-start", "shards-crc32c", "shards-zstd"])
def test_chunks_of_shards_have_records_of_their_own(case: str, tmp_path: Path) -> None:
    manifest = made(tmp_path, case)
    layout = layout_of(tmp_path)
    for number in range(manifest.files):
        data = (tmp_path / layout.key(first_chunk(layout, number))).read_bytes()
        length = 16 * manifest.slots + 4
        index = parse_shard_index(data[:length] if layout.index_at_start else data[-length:], manifest.slots)
        for slot, (start, size) in enumerate(index.tolist()):
            part = np.frombuffer(data, dtype=np.uint8)[start : start + size] if size != ABSENT else None
            expected = (ABSENT, 0, 0) if part is None else describe(part, both=doubly(layout, files=False))
            assert manifest.slot(number, slot) == expected


def test_bytes_that_hold_their_own_crc32c_are_told_apart_by_another_checksum() -> None:
    """Their crc32c is a constant, whatever they are."""
    first, second = (
        np.concatenate([body, np.array([crc32c(body)], dtype="<u4").view(np.uint8)])
        for body in np.random.default_rng(0).integers(0, 256, (2, 100), dtype=np.uint8)
    )
    assert crc32c(first) == crc32c(second)
    assert describe(first, both=True) != describe(second, both=True)


def test_slices_add_up_to_the_whole() -> None:
    data = np.random.default_rng(0).integers(0, 256, 3_000_001, dtype=np.uint8)
    assert (crc32c(data), crc32c(data[7:], crc32c(data[:7]))) == (google_crc32c.value(data),) * 2
    whole = describe(data, both=True)
    assert describe(data[5:], both=True, before=describe(data[:5], both=True)) == whole == (
        len(data), google_crc32c.value(data), zlib.crc32(data.data),
    )  # fmt: skip


def test_what_was_left_out_is_recorded_as_left_out(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path), name="x", shape=(8,), chunks=(2,), dtype="int32")
    array[2:6] = 7
    manifest = Manifest(write_manifest(tmp_path, layout_of(tmp_path)))
    assert [manifest.file(number).size != ABSENT for number in range(4)] == [False, True, True, False]


def test_the_same_files_give_the_same_manifest(tmp_path: Path) -> None:
    first = made(tmp_path).path.read_bytes()
    (tmp_path / PLACE).parent.mkdir(exist_ok=True)
    assert write_manifest(tmp_path, layout_of(tmp_path)).read_bytes() == first


def test_zarr_sees_nothing_of_it(tmp_path: Path) -> None:
    """A warning would be an error here."""
    for name in ("a", "deep/b"):
        write(NAMED["raw"], tmp_path, name)
        write_manifest(tmp_path, layout_of(tmp_path, name))
    group = zarr.open_group(str(tmp_path), mode="r")
    assert sorted(name for name, _ in group.members(max_depth=None)) == ["a", "deep", "deep/b"]
    array = zarr.open_array(str(tmp_path), path="a", mode="r")
    assert (array.nchunks_initialized, array.nchunks) == (12, 12)


@given(data=st.data())
def test_any_flipped_bit_of_it_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("m")
    path = made(folder, data.draw(st.sampled_from(["raw", "shards-raw"]))).path
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"the manifest .* is damaged"):
        Manifest(path).check()


@pytest.mark.parametrize("size", [0, 7, 16, 511, 600, -1])
def test_one_that_is_cut_is_no_manifest(size: int, tmp_path: Path) -> None:
    path = made(tmp_path).path
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match="is damaged"):
        Manifest(path)


def test_it_holds_for_the_metadata_that_it_was_written_for(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    metadata = json.loads((tmp_path / "x/zarr.json").read_text())
    (tmp_path / "x/zarr.json").write_text(json.dumps(metadata | {"attributes": {"units": "K"}}, indent=7))
    manifest.check_fits(layout_of(tmp_path), tmp_path / "x")
    for change in ({"fill_value": 3}, {"shape": [24, 10]}, {"shape": [23, 40]}):
        (tmp_path / "x/zarr.json").write_text(json.dumps(metadata | change))
        with pytest.raises(DataError, match="was written for other metadata than those of 'x'"):
            manifest.check_fits(layout_of(tmp_path), tmp_path / "x")


def test_a_draft_that_is_not_committed_leaves_what_was_there(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    before = manifest.path.read_bytes()
    with Draft(tmp_path / "x", layout_of(tmp_path)) as draft:
        draft.put(0, Record(1, 2))
    assert manifest.path.read_bytes() == before
    assert os.listdir(manifest.path.parent) == ["manifest"]


def test_damage_that_can_be_told_is_not_vouched_for(tmp_path: Path) -> None:
    write(NAMED["shards-raw"], tmp_path)
    shard = tmp_path / "x/c/1/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"array 'x': chunk 2\.0 .*/x/c/1/0: .*index"):
        vouch(tmp_path)
    assert not (tmp_path / "x" / PLACE).exists()


def test_a_million_files_take_the_memory_of_the_pages_that_are_touched(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path), name="x", shape=(10**6,), chunks=(1,), dtype="int8")
    layout = layout_of(tmp_path)
    with Draft(tmp_path / "x", layout) as draft:
        draft.put(123_456, Record(5, 6))
        path = draft.commit()
    assert 16_000_000 < path.stat().st_size < 16_002_000
    tracemalloc.start()
    try:
        manifest = Manifest(path)
        assert (manifest.file(123_456), manifest.file(999_999)) == ((5, 6, 0), (ABSENT, 0, 0))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bit", range(8))
def test_a_header_that_says_another_length_is_damaged(bit: int, tmp_path: Path) -> None:
    path = made(tmp_path).path
    content = bytearray(path.read_bytes())
    content[8] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"the manifest .* is damaged"):
        Manifest(path).check()
