"""What a writer of a store promises: all of it, durable, or nothing; what it replaces stands until then."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from streamtrain.data.whole import whole_or_nothing
from streamtrain.errors import ConfigError, EnvironmentProblem


def write(target: Path, values: list[int], *, overwrite: bool = False) -> None:
    with whole_or_nothing(target, overwrite=overwrite) as part:
        zarr.create_group(part).create_array("x", data=np.array(values), chunks=(2,))


def read(target: Path) -> list[int]:
    found: list[int] = np.asarray(zarr.open_array(target / "x", mode="r")[:]).tolist()
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_store_is_replaced_only_where_that_was_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "t", [1, 2])
    with pytest.raises(ConfigError, match="exists already and is complete"):
        write(tmp_path / "t", [3])
    assert read(tmp_path / "t") == [1, 2]
    write(tmp_path / "t", [3], overwrite=True)
    assert read(tmp_path / "t") == [3]
    assert names(tmp_path) == ["t"]


def test_what_is_to_be_replaced_stands_where_its_successor_fails(tmp_path: Path) -> None:
    write(tmp_path / "t", [1, 2])
    with pytest.raises(RuntimeError, match="stop"), whole_or_nothing(tmp_path / "t", overwrite=True):
        raise RuntimeError("stop")
    assert read(tmp_path / "t") == [1, 2]
    assert names(tmp_path) == ["t"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_store_is_never_replaced(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "s", [1])
    target = tmp_path / "t"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.tex").touch()
    elif kind == "file":
        target.touch()
    else:
        target.symlink_to(tmp_path / "s")
    with pytest.raises(ConfigError, match="is no folder of a Zarr store: it is not overwritten"):
        write(target, [3], overwrite=True)
    assert os.path.lexists(target)
    assert read(tmp_path / "s") == [1]


def test_a_store_that_was_being_replaced_by_a_process_that_died_gets_its_name_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    write(tmp_path / "t", [1, 2])
    (tmp_path / "t").rename(tmp_path / f".t.{dead()}.old")
    with pytest.raises(ConfigError, match="exists already"):
        write(tmp_path / "t", [3])
    assert read(tmp_path / "t") == [1, 2]
    assert "was being replaced when its process died: the old one stands" in caplog.text


def test_what_a_process_of_the_same_number_left_is_no_obstacle(tmp_path: Path) -> None:
    """In a container that starts over."""
    zarr.create_group(tmp_path / f".t.{os.getpid()}.part")
    write(tmp_path / "t", [1])
    (tmp_path / "t").rename(tmp_path / f".t.{os.getpid()}.old")
    write(tmp_path / "t", [2], overwrite=True)
    assert read(tmp_path / "t") == [2]
    assert names(tmp_path) == ["t"]


def test_two_writers_of_one_process_do_not_write_the_same_store(tmp_path: Path) -> None:
    with whole_or_nothing(tmp_path / "t") as part:
        for _ in range(2):
            with pytest.raises(ConfigError, match="is being written by this process"):
                write(tmp_path / "t", [2])
        zarr.create_group(part).create_array("x", data=np.array([1]))
    assert read(tmp_path / "t") == [1]
    write(tmp_path / "t", [2], overwrite=True)
    assert read(tmp_path / "t") == [2]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"the disk is full, .* are free"), whole_or_nothing(tmp_path / "t"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_what_stood_there_comes_back_where_its_successor_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "t", Path.rename
    write(target, [1])

    def failing(self: Path, other: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "the disk is ill")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(EnvironmentProblem, match="the disk is ill"):
        write(target, [2], overwrite=True)
    assert read(target) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
