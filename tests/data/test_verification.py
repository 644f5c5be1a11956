"""What verifying promises: a line for each damage, `ok` only for what was looked at, and what can't be known, said."""

from __future__ import annotations

import os
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from data_tools.synth import synth
from streamtrain.data.manifest import PLACE
from streamtrain.data.verification import verify
from streamtrain.data.vouching import vouch
from streamtrain.errors import ConfigError, DataError, EnvironmentProblem
from tests.data.stores import CASES, Case, write
from tests.data.test_trust import LAYOUTS, cut, flip, grow, lose, replace, store, swap


def said(path: Path, *, deep: bool = False, write: bool = False) -> list[str]:
    """Its lines; the error at the end as the last of them."""
    lines: list[str] = []
    try:
        lines.extend(verify(path, deep=deep, write=write))
    except DataError as error:
        lines.append(f"error: {error}")
    return lines


def damages(lines: list[str]) -> list[str]:
    assert lines[-1].startswith("error: " if any(line.startswith("damaged") for line in lines) else "ok: ")
    return [line for line in lines if line.startswith("damaged: ")]


@pytest.mark.parametrize("dtype", ["str", "M8[ns]", "m8[s]"])
@pytest.mark.parametrize("options", [{}, {"deep": True}, {"write": True}], ids=str)
def test_texts_and_times_are_passed_over_by_name_and_are_no_damage(
    dtype: str, options: dict[str, bool], tmp_path: Path
) -> None:
    group = zarr.create_group(tmp_path)
    group.create_array("x", data=np.ones((10, 3), "f4"), chunks=(5, 3))
    group.create_array("name", shape=(10,), chunks=(5,), dtype=str if dtype == "str" else dtype)
    lines = said(tmp_path, **options)
    assert damages(lines) == []
    (line,) = [line for line in lines if line.startswith("name: not looked at")]
    assert "which can't be trained on" in line
    assert ("without a manifest" in line) == ("write" in options)
    assert lines[-1].endswith("; 1 array not looked at")
    assert (tmp_path / "x" / PLACE).exists() == ("write" in options)
    assert not (tmp_path / "name" / PLACE).exists()


def test_texts_that_zarr_3_does_not_specify_are_passed_over_without_a_warning(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path)
    group.create_array("x", data=np.ones((10, 3), "f4"), chunks=(5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group.create_array("name", shape=(10,), chunks=(5,), dtype="U3")
        zarr.consolidate_metadata(tmp_path)
    assert said(tmp_path)[-1].endswith("; 1 array not looked at")


def test_damage_beside_texts_is_found(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path)
    group.create_array("x", data=np.ones((10, 3), "f4"), chunks=(5, 3), compressors=None)
    group.create_array("name", shape=(10,), chunks=(5,), dtype=str)
    (tmp_path / "x/c/1/0").write_bytes(b"cut")
    assert len(damages(said(tmp_path))) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_sound_store_of_any_layout_is_ok(case: Case, with_manifest: bool, tmp_path: Path) -> None:
    write(case, tmp_path)
    if with_manifest:
        vouch(tmp_path)
    for deep in (False, True):
        lines = said(tmp_path, deep=deep)
        assert damages(lines) == []
        assert any("without a manifest nobody knows" in line for line in lines) != with_manifest


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("damage", "shallow", "deep"),
    [(cut, 1, 1), (grow, 1, 1), (lose, 1, 1), (flip, 0, 1), (replace, None, 1), (swap, None, 2)],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_each_damage_is_one_line(
    damage: Callable[[Path, Path], None], shallow: int | None, deep: int, layout: str, tmp_path: Path
) -> None:
    path = store(tmp_path, LAYOUTS[layout])
    damage(path / "c/2/0", path / "c/1/0")
    if shallow is not None:
        assert len(damages(said(path))) == shallow
    found = damages(said(path, deep=True))
    assert len(found) == deep
    assert "array 'array': chunk " in found[0]
    assert f"{path}/c/" in found[0]


def test_all_that_can_be_wrong_at_once_is_listed(tmp_path: Path) -> None:
    path = synth(tmp_path / "s", rows=64, columns=2, chunk_rows=8)
    flip(path / "x/c/1/0", path)
    lose(path / "x/c/3/0", path)
    (path / "x/c/4/0").unlink()
    os.mkfifo(path / "x/c/4/0")
    (path / "x/c/5/0").unlink()
    (path / "x/c/5/0").symlink_to("/etc/hostname")
    flip(path / "y" / PLACE, path)
    lines = said(path, deep=True)
    assert len(damages(lines)) == 5
    for text in ("x/c/1/0: its checksum", "3/0: it is missing", "not a regular file", "a link out", "the manifest"):
        assert any(text in line for line in lines), text
    assert lines[-1].startswith(f"error: {path}: 5 damaged")


def test_a_damaged_array_hides_no_other(tmp_path: Path) -> None:
    path = synth(tmp_path / "s", rows=64, columns=2, chunk_rows=8)
    (path / "x/zarr.json").write_text("{")
    lines = said(path)
    assert len(damages(lines)) == 1
    assert "y: ok, 8 files, 256 B (presence, sizes, indexes)" in lines


def test_a_manifest_that_is_gone_is_a_damage_where_the_writer_made_one(tmp_path: Path) -> None:
    path = store(tmp_path)
    lose(path / PLACE, path)
    assert damages(said(path)) == ["damaged: array: its manifest is gone"]
    assert damages(said(path, write=True)) == []
    assert damages(said(path, deep=True)) == []


def test_of_a_shard_that_is_not_its_manifests_all_rows_are_named(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path), name="x", data=np.arange(64), chunks=(8,), shards=(32,))
    assert damages(said(tmp_path, write=True)) == []
    shard = tmp_path / "x/c/1"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1  # of its last chunk, or its index
    shard.write_bytes(content)
    (line,) = damages(said(tmp_path, deep=True))
    assert "chunk 4 and the others of its shard (rows [32:64])" in line


def test_without_a_manifest_every_chunk_is_decoded(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path), name="x", data=np.arange(64), chunks=(8,), shards=(32,))
    shard = tmp_path / "x/c/1"
    content = bytearray(shard.read_bytes())
    content[5:9] = b"\0\0\0\0"
    shard.write_bytes(content)
    assert damages(said(tmp_path)) == []
    (line,) = damages(said(tmp_path, deep=True))
    assert "chunk 4 (rows [32:40])" in line
    assert damages(said(tmp_path, write=True))
    assert not (tmp_path / "x" / PLACE).exists()


def test_writing_a_manifest_vouches_for_a_foreign_store(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path), name="deep/x", shape=(64,), dtype="i4", chunks=(8,), compressors=None)
    array[8:] = 3
    lines = said(tmp_path, write=True)
    assert "deep/x: its manifest vouches for its files as they are" in lines
    assert lines[-1] == "ok: 7 files, 224 B, every byte"
    flip(tmp_path / "deep/x/c/3", tmp_path)
    assert len(damages(said(tmp_path, deep=True))) == 1


def test_what_is_no_store_of_this_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list(verify(tmp_path / "none"))
    with pytest.raises((ConfigError, EnvironmentProblem), match=r"not on this machine|obstore"):
        list(verify("s3://bucket/data", write=True))


def test_memory_holds_a_slice_a_thread(tmp_path: Path) -> None:
    path = synth(tmp_path / "s", rows=16_000, columns=500, chunk_rows=16_000)
    tracemalloc.start()
    try:
        assert damages(said(path, deep=True)) == []
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
