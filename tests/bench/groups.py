"""A cgroup with a memory limit, below the one that this process is in; version 2 or 1, whichever can be made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamtrain.data.container import OWN, ROOT
from streamtrain.errors import EnvironmentProblem


@dataclass(frozen=True)
class Group:
    """A cgroup of ours."""

    folder: Path
    limit: Path
    """The file with the limit in bytes."""

    def join(self) -> None:
        """Move this process into it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def kills(self) -> int:
        """Processes that the kernel has ended there for memory."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                lines = (self.folder / name).read_text().splitlines()
                return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        return 0


@contextmanager
def limited(size: int) -> Iterator[Group]:
    """A group of at most `size` bytes, gone afterwards. Raises EnvironmentProblem where none can be made."""
    reasons: list[str] = []
    for parent, name in _parents():
        folder = parent / f"streamtrain-bench-{os.getpid()}"
        group = Group(folder, folder / name)
        try:
            folder.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        try:
            try:
                if not group.limit.exists():
                    raise OSError(0, f"no {name} in it")
                group.limit.write_text(str(size))
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            yield group
            return
        finally:
            folder.rmdir()
    raise EnvironmentProblem(
        f"no cgroup with a memory limit can be made here ({'; '.join(reasons) or f'there are none in {ROOT}'})",
        hint="run it as root, or in a delegated cgroup (systemd-run --user --scope -p Delegate=yes)",
    )


def _parents() -> Iterator[tuple[Path, str]]:
    """Where a group may be made below this process's own, and what its limit is called there."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount = ROOT / "unified" if (ROOT / "unified").is_dir() else ROOT
            yield mount / path.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            yield ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
