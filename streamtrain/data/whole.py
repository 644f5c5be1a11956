"""Stores that appear whole or not at all: written beside their place, vouched for, made durable, then given their name.

Its law: whatever interrupts a writer, nothing that looks whole is left in the target's place; what stood there before
stands until its successor is durable.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from streamtrain.data.budget import format_bytes
from streamtrain.data.manifest import PLACE, fsync
from streamtrain.data.vouching import vouch
from streamtrain.errors import ConfigError, EnvironmentProblem

logger = logging.getLogger(__name__)

STORE = ("zarr.json", ".zgroup", ".zarray")
"""A folder with one of these is a Zarr store, and may be replaced."""
FULL = (errno.ENOSPC, errno.EDQUOT)
_writing: set[Path] = set()
"""The parts that this process writes now."""
_guard = threading.Lock()


def check_apart(source: str | Path, *targets: str | Path) -> None:
    """Raise ConfigError where one of these lies within another, or a target is the source, wherever links lead.

    To be asked before anything is written.
    """
    try:
        places = [(Path(path), Path(os.path.realpath(path))) for path in (source, *targets)]
    except ValueError:  # no path at all: `whole_or_nothing` says so
        return
    for path, place in places[1:]:
        if place == places[0][1]:
            raise ConfigError(f"{path} is the source itself", hint="name a target beside it")
    for (outer, around), (inner, within) in itertools.permutations(places, 2):
        if around in within.parents:
            raise ConfigError(
                f"{inner} lies within {outer}: a store can't be written into another, nor around its source",
                hint="name a target beside it",
            )


@contextlib.contextmanager
def whole_or_nothing(target: Path, *, need: int = 0, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write arrays into that becomes `target` at the end, and vanishes on an error.

    At the end its files are read again for their manifests, then all is made durable, then it gets its name. With
    `overwrite` a store that stands there is replaced, then; without, and where it is no store, that is a ConfigError.
    Raises EnvironmentProblem where the disk refuses, and at once where fewer than `need` bytes are free.
    """
    if "\0" in str(target):
        raise ConfigError(f"{str(target)!r} is no path", hint="name a folder that is not there yet")
    part = _part_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        _check_free(target, overwrite=overwrite)
        if need > (free := shutil.disk_usage(target.parent).free):
            raise EnvironmentProblem(
                f"cannot write {target}: it takes {format_bytes(need)}, and {format_bytes(free)} are free there",
                hint="make room, write elsewhere, or compress it: codec zstd or blosc",
            )
        _claim(target, part)
    except OSError as error:
        raise _refused(target, error) from error
    try:
        yield part
        vouch(part)
        for folder, _, files in os.walk(part):
            for path in (*(os.path.join(folder, name) for name in files), folder):
                fsync(Path(path))
        _publish(part, target, overwrite=overwrite)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with _guard:
            _writing.discard(part)


def _claim(target: Path, part: Path) -> None:
    """Be the only writer of this target in this process. Raises ConfigError."""
    with _guard:
        if part in _writing:
            raise ConfigError(
                f"{target} is being written by this process", hint="wait for that, or name another target"
            )
        _writing.add(part)


def _check_free(target: Path, *, overwrite: bool) -> None:
    """Raise ConfigError where something else stands in the way."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        whole = " and is complete" if next(target.glob(f"**/{PLACE}"), None) else ""
        raise ConfigError(f"{target} exists already{whole}", hint="name another target, or remove this one")
    if target.is_symlink() or not any((target / name).is_file() for name in STORE):
        raise ConfigError(
            f"{target} is no folder of a Zarr store: it is not overwritten", hint="name another target, or remove it"
        )


def _publish(part: Path, target: Path, *, overwrite: bool) -> None:
    """Give what is written its name, durably; what had it before goes afterwards."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    replaced = overwrite and os.path.lexists(target)
    if replaced:
        target.rename(old)  # a death between these two is mended by the next writer's sweep
    try:
        part.rename(target)
    except OSError:
        if replaced and not os.path.lexists(target):
            old.rename(target)
        raise
    fsync(target.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)


def _refused(target: Path, error: OSError) -> EnvironmentProblem:
    """What to say where the disk refuses."""
    if error.errno not in FULL:
        return EnvironmentProblem(f"cannot write {target}: {error}", hint="is there room, and may you write?")
    free = ""
    with contextlib.suppress(OSError):
        free = f", {format_bytes(shutil.disk_usage(target.parent).free)} are free"
    return EnvironmentProblem(
        f"cannot write {target}: the disk is full{free} ({error.strerror or error})",
        hint="make room, or write to another disk; nothing of it was kept",
    )


def _part_of(target: Path) -> Path:
    """Where this process writes it."""
    return Path(os.path.abspath(target)).with_name(f".{target.name}.{os.getpid()}.part")


def _alive(pid: int, target: Path) -> bool:
    """Whether a process of this number writes the target. One of our own number that is not us is dead: containers
    start over with the same numbers."""
    return _part_of(target) in _writing if pid == os.getpid() else Path(f"/proc/{pid}").exists()


def _sweep(target: Path) -> None:
    """Remove what writers of this target that were killed have left; what one was replacing gets its name back."""
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.*.*")):
        pid, kind = left.name.split(".")[-2:]
        if kind not in ("part", "old") or not pid.isdigit() or _alive(int(pid), target):
            continue
        if kind == "old" and not os.path.lexists(target):
            logger.warning("%s was being replaced when its process died: the old one stands", target)
            left.rename(target)
            continue
        if kind == "part":
            logger.warning("%s is not there: its writing was cut short, and starts anew", target)
        shutil.rmtree(left, ignore_errors=True)
