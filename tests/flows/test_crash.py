"""A power cut at any instant of a save leaves the old checkpoint or the new one whole; at length in tests/bench."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from streamtrain import checkpoint
from streamtrain.disk import FOLDER, LOCAL, NEW, Disk
from tests.bench.crash import SCENARIOS, Found, Scenario, cut, quiet, refused
from tests.disks import MemoryDisk

by_name = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name.replace(" ", "-"))


@by_name
def test_every_image_that_a_power_cut_may_leave_holds_the_old_or_the_new_checkpoint(scenario: Scenario) -> None:
    found = Found()
    with quiet():
        cut(scenario, found, again=True)
    assert not found.bad
    assert found.instants
    assert found.images


@by_name
def test_so_does_every_image_after_an_operation_that_failed(scenario: Scenario) -> None:
    found = Found()
    with quiet():
        refused(scenario, found, errno.EIO, lasting=False, every=5)
    assert not found.bad
    assert found.images


@pytest.mark.parametrize(("scenario", "sync"), [*((1, sync) for sync in range(6)), (5, 0)])
def test_each_sync_of_a_save_and_of_a_prune_is_needed(
    monkeypatch: pytest.MonkeyPatch, scenario: int, sync: int
) -> None:
    found = Found()
    monkeypatch.setattr(MemoryDisk, "forgets", sync)
    with quiet():
        cut(SCENARIOS[scenario], found)
    assert found.bad


def test_the_sync_of_a_sweep_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    found, sweep = Found(), checkpoint.sweep

    def careless(checkpoints: Path, *, disk: MemoryDisk) -> None:
        disk.forgets = 0
        sweep(checkpoints, disk=disk)

    monkeypatch.setattr(checkpoint, "sweep", careless)
    with quiet():
        cut(SCENARIOS[2], found, again=True)
    assert found.bad


def test_the_memorys_disk_refuses_what_a_real_one_refuses(tmp_path: Path) -> None:
    def told(disk: Disk, root: Path) -> list[object]:
        made: list[object] = []
        operations: list[Callable[[], object]] = [
            lambda: disk.mkdir(root / "a"),
            lambda: disk.mkdir(root / "a"),
            lambda: disk.mkdir(root / "no" / "a"),
            lambda: disk.close(disk.open(root / "a" / "f", NEW)),
            lambda: disk.open(root / "a" / "f", NEW),
            lambda: disk.open(root / "a" / "g", os.O_RDONLY),
            lambda: disk.open(root / "a" / "f", FOLDER),
            lambda: disk.open(root / "a", os.O_WRONLY),
            lambda: disk.stat(root / "a" / "f" / "g"),
            lambda: disk.names(root / "a" / "f"),
            lambda: disk.names(root / "a"),
            lambda: disk.mkdir(root / "b"),
            lambda: disk.rename(root / "b", root / "a"),
            lambda: disk.rename(root / "a", root / "b"),
            lambda: disk.rename(root / "a", root / "b"),
            lambda: disk.exchange(root / "a", root / "b"),
            lambda: disk.rmdir(root / "b"),
            lambda: disk.unlink(root / "b"),
            lambda: disk.unlink(root / "b" / "f"),
            lambda: disk.unlink(root / "b" / "f"),
            lambda: disk.rmdir(root / "b"),
            lambda: disk.names(root),
        ]
        for operation in operations:
            try:
                made.append(operation())
            except OSError as error:
                made.append(error.errno)
        return made

    assert told(MemoryDisk((("root", ()),)), Path("/root")) == told(LOCAL, tmp_path)
