"""What memory the container or service that this process runs in may use: cgroups, version 1 and 2, nested.

Its law: whatever of the system's files is absent, foreign or garbled limits nothing, and nothing here raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
V2 = ("memory.max", "memory.high")
"""Above the first a process is killed; above the second it is slowed down until it stands still."""
V1 = "memory.limit_in_bytes"
V1_STAT = "memory.stat"
"""Its hierarchical_memory_limit knows of groups above that a container can't see."""


def memory_limits(root: Path = ROOT, own: Path = OWN) -> Iterator[int]:
    """The limits in bytes of this process's groups and of all those above them, in no order.

    `root`: where cgroups are mounted: version 2 there or in `unified`, version 1's in `memory`. `own`: which groups the
    process is in, as the kernel tells it. Where the two do not fit (a container that sees its own group as the root),
    the mounted root is the group.
    """
    unified, memory = _groups(own)
    for mount in (root, root / "unified"):
        for folder in _upwards(mount, unified):
            yield from filter(None, (_number(_read(folder / name)) for name in V2))
    for folder in _upwards(root / "memory", memory):
        yield from filter(None, (_number(_read(folder / V1)), _hierarchical(_read(folder / V1_STAT))))


def _groups(own: Path) -> tuple[str, str]:
    """The process's group in version 2, and in version 1's hierarchy of memory; "/" where nothing tells."""
    unified = memory = "/"
    for line in _read(own).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            unified = path
        elif "memory" in controllers.split(","):
            memory = path
    return unified, memory


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    """The group's folder and those above it, up to the mounted root."""
    parts = [part for part in PurePosixPath(group).parts if part not in ("/", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    """A limit; None for none ("max")."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _hierarchical(text: str) -> int | None:
    found = [line.partition(" ")[2] for line in text.splitlines() if line.startswith("hierarchical_memory_limit ")]
    return _number(found[0]) if found else None
