"""What is known of arrays' metadata promises: another array in one's place is noticed, for next to nothing a chunk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from streamtrain.data import described
from streamtrain.data.described import LOOK_BYTES, Described, said_by


def make(root: Path, dtype: str = "i4", version: Any = 3) -> Any:
    """An array `g/x` of 40 values."""
    group = zarr.open_group(root, mode="a", zarr_format=version)
    return group.create_array("g/x", data=np.arange(40, dtype=dtype), chunks=(10,), overwrite=True)


def known(root: Path) -> Described:
    found = Described(root)
    found.describe("g/x")
    return found


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_that_say_the_same_have_not_changed_whatever_the_attributes(tmp_path: Path, version: Any) -> None:
    array, told = make(tmp_path, version=version), known(tmp_path)
    assert told.changed("g/x") is None
    array.attrs["mean"] = 3
    assert told.changed("g/x") is None
    make(tmp_path, version=version)
    assert told.changed("g/x") is None


@pytest.mark.parametrize("version", [2, 3])
def test_another_array_in_its_place_is_told_each_time(tmp_path: Path, version: Any) -> None:
    make(tmp_path, version=version)
    told = known(tmp_path)
    make(tmp_path, dtype="f4", version=version)
    for _ in range(2):
        assert str(told.changed("g/x")).startswith("the metadata of array 'g/x' have changed: the store was moved")


def test_an_array_of_the_other_zarr_in_its_place_is_another(tmp_path: Path) -> None:
    make(tmp_path)
    told = known(tmp_path)
    shutil.rmtree(tmp_path)
    make(tmp_path, version=2)
    assert "have changed" in str(told.changed("g/x"))


def test_metadata_that_are_gone_are_told(tmp_path: Path) -> None:
    make(tmp_path)
    told = known(tmp_path)
    shutil.rmtree(tmp_path / "g")
    assert "are gone" in str(told.changed("g/x"))


def test_of_an_array_that_others_tell_of_nothing_is_known(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "g/x/zarr.json").unlink()
    told = known(tmp_path)
    assert told.changed("g/x") is None
    assert told.changed("another") is None


def test_a_file_belongs_to_the_array_above_it(tmp_path: Path) -> None:
    told = known(tmp_path)
    told.describe("g/xy")
    assert [told.array_of(key) for key in ("g/x/c/0", "g/x/0.0", "g/xy/c/1", "g/c/0", "c/0")] == [
        *("g/x", "g/x", "g/xy", None, None)
    ]
    told.describe("")
    assert told.array_of("c/0") == ""


def test_new_files_of_so_many_bytes_an_array_are_worth_one_look_at_all(tmp_path: Path) -> None:
    make(tmp_path)
    zarr.open_group(tmp_path).create_array("g/y", data=np.arange(4))
    told = known(tmp_path)
    told.describe("g/y")
    told.unlooked += 2 * LOOK_BYTES - 1
    assert not told.due
    told.unlooked += 1
    assert told.due
    assert told.any_changed() is None
    assert not told.due
    shutil.rmtree(tmp_path / "g/y")
    assert str(told.any_changed()).startswith("the metadata of array 'g/y' are gone")


def test_a_look_at_what_is_as_it_was_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, read = make(tmp_path), []
    told = known(tmp_path)

    def count(metadata: bytes) -> object:
        read.append(metadata)
        return said_by(metadata)

    monkeypatch.setattr(described, "said_by", count)
    assert told.changed("g/x") is None
    assert not read
    array.attrs["mean"] = 3
    assert (told.changed("g/x"), told.changed("g/x"), len(read)) == (None, None, 1)
