"""What limits a container's memory: the tightest limit on the way up, whichever kernel and whatever is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.data.budget import available_memory
from streamtrain.data.container import memory_limits

V2, V1 = "memory.max", "memory.limit_in_bytes"


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def own(folder: Path, *lines: str) -> Path:
    (folder / "own").write_text("".join(f"{line}\n" for line in lines))
    return folder / "own"


@pytest.mark.parametrize("mount", [".", "unified"])
@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_the_limit_of_its_own_group_counts_in_version_2(tmp_path: Path, mount: str, name: str) -> None:
    write(tmp_path / mount / "a.slice/b.service" / name, 5_000_000)
    write(tmp_path / mount / "a.slice" / name, "max")
    write(tmp_path / mount / "other.slice" / name, 7)
    assert available_memory(tmp_path, own(tmp_path, "0::/a.slice/b.service")) == 5_000_000


def test_a_group_above_may_be_the_tighter_one(tmp_path: Path) -> None:
    write(tmp_path / "pod/box" / V2, 9_000_000)
    write(tmp_path / "pod" / V2, 3_000_000)
    write(tmp_path / "pod/memory.high", 4_000_000)
    assert available_memory(tmp_path, own(tmp_path, "0::/pod/box")) == 3_000_000
    assert sorted(memory_limits(tmp_path, own(tmp_path, "0::/pod/box"))) == [3_000_000, 4_000_000, 9_000_000]


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_the_limit_of_its_own_group_counts_in_version_1(tmp_path: Path, controllers: str) -> None:
    lines = ["9:name=systemd:/x", f"4:{controllers}:/docker/abc", "3:memory_other:/y", "0::/z"]
    write(tmp_path / "memory" / V1, 1 << 62)
    write(tmp_path / "memory/docker" / V1, 6_000_000)
    write(tmp_path / "memory/docker/abc" / V1, 8_000_000)
    write(tmp_path / "memory/y" / V1, 7)
    assert available_memory(tmp_path, own(tmp_path, *lines)) == 6_000_000


def test_version_1_tells_of_limits_that_a_container_cannot_see(tmp_path: Path) -> None:
    write(tmp_path / "memory" / V1, 1 << 62)
    write(tmp_path / "memory/memory.stat", "cache 1\nhierarchical_memory_limit 2000000\nhierarchical_memsw_limit 3")
    assert available_memory(tmp_path, own(tmp_path, "4:memory:/docker/abc")) == 2_000_000


@pytest.mark.parametrize("group", ["/docker/of/the/host", "/../../other", "/"])
def test_a_container_that_sees_its_own_group_as_the_root_is_limited_by_that(tmp_path: Path, group: str) -> None:
    write(tmp_path / V2, 4_000_000)
    assert available_memory(tmp_path, own(tmp_path, f"0::{group}")) == 4_000_000


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    host = available_memory(tmp_path, tmp_path / "none")
    assert host > 0
    write(tmp_path / "a" / V2, "max")
    write(tmp_path / "memory/a" / V1, 9223372036854771712)
    assert available_memory(tmp_path, own(tmp_path, "0::/a", "4:memory:/a")) == host


@settings(max_examples=40)
@given(st.text(max_size=60), st.binary(max_size=30))
def test_garbled_files_limit_nothing_and_raise_nothing(
    tmp_path_factory: pytest.TempPathFactory, line: str, limit: bytes
) -> None:
    root = tmp_path_factory.mktemp("groups")
    (root / "own").write_text(line, encoding="utf-8", errors="surrogateescape")
    (root / V2).write_bytes(limit)
    (root / "memory").mkdir()
    (root / "memory" / "memory.stat").write_bytes(b"hierarchical_memory_limit " + limit)
    assert all(isinstance(found, int) for found in memory_limits(root, root / "own"))
