"""Checkpoints on disk: a folder is committed whole and durable or not at all, and read only after it was verified.

    step-000001234/
      model.safetensors       parameters and buffers under their own names
      optimizer.safetensors   all other tensors: the optimizer's, the callbacks', random states
      state.json              the tree that holds them together
      manifest.json           canonical JSON: format, size and SHA-256 of each file, and its own SHA-256; written last

All functions here block and are meant for a thread; those that change a folder of checkpoints are meant for the one
process that holds the run's lock.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from streamtrain.checkpoint_files import MANIFEST, MODEL, OPTIMIZER, STATE, Contents, Damaged, Verified, bytes_in
from streamtrain.disk import FOLDER, LOCAL, LOOK, Disk, sync_folder
from streamtrain.errors import CheckpointError, EnvironmentProblem
from streamtrain.state import Snapshot, decode

T = TypeVar("T")
logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)")
_STALE = re.compile(r"\.(tmp|old)-(.+)-[0-9a-f]{8}")
"""Half-made or discarded folders: `tmp` may always go; `old` was the target until its successor took the name."""
_CAUSES = {
    errno.ENOSPC: ("the disk is full", "make room, or move the run folder to another disk"),
    errno.EDQUOT: ("the quota is used up", "make room, have the quota raised, or move the run folder to another disk"),
    errno.EFBIG: (
        "a file would be larger than is allowed",
        "raise the limit of this process (ulimit -f), or move the run folder to a disk that takes larger files",
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        ("nothing may be written there", "mend the permissions, or move the run folder to where it may be written"),
    ),
    errno.EMFILE: ("too many files are open", "raise the limit of this process (ulimit -n), or open fewer stores"),
    errno.ENFILE: ("too many files are open on this machine", "close some, or raise fs.file-max"),
}
"""What to say of a refusal, and what to do, where that is not the disk's fault alone."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that is durable: it survives the death of the process, and of the machine's power."""

    path: Path
    bytes: int
    """Size of all its files."""
    seconds: float
    """From the call to the last fsync."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint in a folder of checkpoints."""

    path: Path
    name: str
    step: int
    """From its name."""
    bytes: int
    """Size of its files as they lie there."""
    problem: str | None
    """None if it is valid; else the file, a comma, and the reason."""


def commit(folder: Path, snapshot: Snapshot, *, replace: bool = False, disk: Disk = LOCAL) -> Committed:
    """Write `snapshot` as the checkpoint folder `folder`; it is durable and verified when this returns, else not there.

    It gets its name only once all files were read back from the disk and have the digests of what was written: a disk
    that lies, and memory that flips a bit on the way, are noticed while the checkpoint before is still there. That
    costs one more reading and digesting (about 1 s a GiB), on this thread, while training goes on.
    With `replace` a folder that stands there stays whole until the new one takes its name in one step. Memory: one
    tensor's copy at most, for tensors that are not contiguous. Raises CheckpointError if the snapshot holds what can't
    be kept or the folder exists, EnvironmentProblem if the disk refuses; in both cases what was there is untouched.
    """
    started = time.perf_counter()
    folder = Path(os.path.abspath(folder))
    contents = Contents(snapshot)
    try:
        if not replace and _there(folder, disk):
            raise CheckpointError(f"{folder} exists already", hint="choose another name, or ask for it to be replaced")
        _make_folder(folder.parent, disk)
        _check_space(folder.parent, contents.bytes, disk)
        with _staging(folder, disk) as staging:
            contents.write(staging.path, disk)
            disk.fsync(staging.descriptor)
            _verify(staging.path, disk)
            _publish(staging, folder, replace=replace, disk=disk)
    except OSError as error:
        _refuse(error, folder, contents.bytes, disk)
    return Committed(folder, contents.bytes, time.perf_counter() - started)


def check_space(folder: Path, needed: int, *, disk: Disk = LOCAL) -> None:
    """Raise EnvironmentProblem if there is no room for `needed` bytes where `folder` is to be committed."""
    try:
        _check_space(_existing(folder.parent, disk), needed, disk)
    except OSError as error:
        _refuse(error, folder, needed, disk)


def read(path: Path, *, disk: Disk = LOCAL) -> Snapshot:
    """Read the checkpoint folder `path`, each tensor into fresh memory.

    Sizes and digests of all files are verified before anything is parsed, on the same open files. Raises
    CheckpointError with the file and the reason.
    """
    try:
        with Verified(path, disk) as files:
            return _snapshot(path, files)
    except Damaged as damage:
        raise _damaged(path, damage) from None


def _snapshot(path: Path, files: Verified) -> Snapshot:
    try:
        model = files.tensors(MODEL)
        others = files.tensors(OPTIMIZER)
        document = files.document()
        weights = decode(document["model"], model, where="model")
        if not isinstance(weights, dict):
            raise Damaged(STATE, "its model is no table of names")
        return Snapshot(
            model=weights,
            optimizer=decode(document["optimizer"], others, where="optimizer"),
            state=decode(document["state"], others, where="state"),
        )
    except Damaged as damage:
        raise _damaged(path, damage) from None
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {STATE}, {error}", hint=error.hint) from error


def _damaged(path: Path, damage: Damaged) -> CheckpointError:
    return CheckpointError(f"checkpoint {path}: {damage}", hint="`streamtrain checkpoints RUN` lists the good ones")


def scan(checkpoints: Path, *, deep: bool = True, verified: Collection[str] = (), disk: Disk = LOCAL) -> list[Entry]:
    """All folders `step-<number>` in `checkpoints`, oldest first, each verified.

    Without `deep`, and for those named in `verified`, digests are left out: only what the manifest and the sizes tell.
    One whose name tells another step than its manifest is not valid: it would be taken for newer, or older, than it is.
    A missing folder has none.
    """
    named = _named(checkpoints, disk)
    return [_examine(path, step, disk, deep=deep and path.name not in verified) for step, path in named]


def newest_valid(checkpoints: Path, *, disk: Disk = LOCAL) -> Entry | None:
    """The newest checkpoint that passes all tests, or None if there is none at all.

    Damaged newer ones are warned of in the log. Raises CheckpointError with each one's reason if there are some and
    none is valid: to start over silently would throw the run away. Call `sweep` before.
    """
    return _newest(checkpoints, disk, lambda entry, files: entry)


def read_newest(checkpoints: Path, *, disk: Disk = LOCAL) -> tuple[Path, Snapshot] | None:
    """The path and the content of what `newest_valid` finds, read once, from the very files that were verified.

    Raises CheckpointError as that does, and as `read` does.
    """
    return _newest(checkpoints, disk, lambda entry, files: (entry.path, _snapshot(entry.path, files)))


def _newest(checkpoints: Path, disk: Disk, take: Callable[[Entry, Verified], T]) -> T | None:
    """What `take` makes of the newest valid one, whose files are open."""
    damaged: list[Entry] = []
    for step, path in reversed(_named(checkpoints, disk)):
        try:
            with _whole(path, step, disk) as files:
                entry = Entry(path, path.name, step, bytes_in(path, disk), None)
                for other in damaged:
                    message = "checkpoint %s is damaged (%s): going back to %s repeats %d steps"
                    logger.warning(message, other.path, other.problem, entry.name, other.step - entry.step)
                return take(entry, files)
        except Damaged as damage:
            damaged.append(Entry(path, path.name, step, bytes_in(path, disk), str(damage)))
    if not damaged:
        return None
    reasons = "; ".join(f"{entry.name}: {entry.problem}" for entry in damaged)
    raise CheckpointError(
        f"no checkpoint in {checkpoints} is valid: {reasons}",
        hint="put an intact copy there, or start over in another run folder",
    )


def holds_any(folder: Path, *, disk: Disk = LOCAL) -> bool:
    """Whether this is a folder of checkpoints, valid or not."""
    return _is_folder(folder, disk) and bool(_named(folder, disk))


def set_aside(checkpoints: Path, step: int, *, disk: Disk = LOCAL) -> list[tuple[str, str]]:
    """Give those newer than `step` a name under which nobody looks for one, durably; names before and since, oldest
    first. Raises EnvironmentProblem if the disk refuses."""
    moved: list[tuple[str, str]] = []
    try:
        for path in [path for number, path in _named(checkpoints, disk) if number > step]:
            aside = _free_name(checkpoints, f"abandoned-{path.name}", disk)
            disk.rename(path, aside)
            moved.append((path.name, aside.name))
        if moved:
            sync_folder(checkpoints, disk)
    except OSError as error:
        raise EnvironmentProblem(f"can't set newer checkpoints in {checkpoints} aside: {error}") from error
    return moved


def _free_name(folder: Path, name: str, disk: Disk) -> Path:
    number, path = 1, folder / name
    while _there(path, disk):
        number += 1
        path = folder / f"{name}-{number}"
    return path


def prune(checkpoints: Path, keep: Collection[str], *, disk: Disk = LOCAL) -> list[str]:
    """Remove all `step-<number>` folders but those named in `keep`; the names removed, oldest first.

    Folders lose their names, durably, before they lose their files: a death or a power cut in between leaves none
    half-removed. If none of `keep` is there, nothing is removed. Raises EnvironmentProblem if the disk refuses.
    """
    named = _named(checkpoints, disk)
    if not any(path.name in keep for _, path in named):
        return []
    removed = [path for _, path in named if path.name not in keep]
    try:
        discarded = [_beside(path, "tmp") for path in removed]
        for path, aside in zip(removed, discarded, strict=True):
            disk.rename(path, aside)
        if removed:
            sync_folder(checkpoints, disk)
        for aside in discarded:
            _remove(aside, disk)
    except OSError as error:
        raise EnvironmentProblem(f"can't remove old checkpoints in {checkpoints}: {error}") from error
    return [path.name for path in removed]


def sweep(checkpoints: Path, *, of: str | None = None, disk: Disk = LOCAL) -> list[str]:
    """Remove what commits and prunes that died left behind, or those alone of the checkpoint named `of`; the names
    removed.

    A folder that was being replaced gets its name back if its successor did not arrive. A commit under way in another
    process or thread is left alone. Never raises: what can't be removed is said in the log.
    """
    try:
        names = [
            name
            for name in sorted(disk.names(checkpoints))
            if (stale := _STALE.fullmatch(name)) and of in (None, stale[2])
        ]
        left = [checkpoints / name for name in names if not _in_use(checkpoints / name, disk)]
        left = [path for path in left if not _given_back(path, disk)]
        if names:
            sync_folder(checkpoints, disk)  # the names as they are may not be durable, and what has none goes
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        logger.warning("can't clear up in %s: %s", checkpoints, error)
        return []
    return [path.name for path in left if _removed(path, disk)]


def _given_back(path: Path, disk: Disk) -> bool:
    """Whether this folder was being replaced, and has its name again."""
    match = _STALE.fullmatch(path.name)
    assert match is not None
    original = path.parent / match[2]
    if match[1] != "old" or _there(original, disk):
        return False
    disk.rename(path, original)
    logger.warning("checkpoint %s was being replaced when its process died: the old one stands", original)
    return True


def _removed(path: Path, disk: Disk) -> bool:
    try:
        _remove(path, disk)
    except OSError as error:
        logger.warning("can't remove %s: %s", path, error)
        return False
    return True


def _make_folder(folder: Path, disk: Disk) -> None:
    """Make a folder and its missing parents, each durable in its own parent."""
    if _is_folder(folder, disk):
        return
    _make_folder(folder.parent, disk)
    with suppress(FileExistsError):
        disk.mkdir(folder)
    sync_folder(folder.parent, disk)


def _check_space(folder: Path, needed: int, disk: Disk) -> None:
    if disk.free(folder) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _there(path: Path, disk: Disk) -> bool:
    """Whether something has this name, be it a link to nowhere."""
    try:
        disk.stat(path, follow=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_folder(path: Path, disk: Disk, *, follow: bool = True) -> bool:
    try:
        return stat.S_ISDIR(disk.stat(path, follow=follow).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _beside(folder: Path, kind: str) -> Path:
    return folder.parent / f".{kind}-{folder.name}-{secrets.token_hex(4)}"


@dataclass
class _Staging:
    path: Path
    descriptor: int
    moved: bool = False
    """Whether names were moved: what lies under this one may be what the medium knows under another."""


@contextmanager
def _staging(folder: Path, disk: Disk) -> Iterator[_Staging]:
    """A temp folder beside `folder`, locked while we live so that no sweep takes it; gone at the end if still there."""
    path = _beside(folder, "tmp")
    disk.mkdir(path)
    moved = False
    try:
        descriptor = disk.open(path, FOLDER)
        staging = _Staging(path, descriptor)
        try:
            with suppress(OSError):  # file systems without locks
                disk.lock(descriptor)
            yield staging
        finally:
            moved = staging.moved
            disk.close(descriptor)
    finally:
        with suppress(OSError):  # the next sweep takes what is left
            if _there(path, disk):
                if moved:
                    sync_folder(folder.parent, disk)
                _remove(path, disk)


def _in_use(path: Path, disk: Disk) -> bool:
    """Whether a living commit holds this temp folder."""
    try:
        descriptor = disk.open(path, LOOK)
    except OSError:
        return False
    try:
        disk.lock(descriptor)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        disk.close(descriptor)
    return False


def _verify(path: Path, disk: Disk) -> None:
    """Raise OSError if the disk does not give back what was written."""
    try:
        with Verified(path, disk, cold=True):
            pass
    except Damaged as damage:
        raise OSError(errno.EIO, f"it does not read back as it was written: {damage}") from damage


def _publish(staging: _Staging, folder: Path, *, replace: bool, disk: Disk) -> None:
    """Give the finished folder its name, durably, else none; whatever had it before is discarded afterwards."""
    path = staging.path
    back: Callable[[Path, Path], object] = disk.rename
    staging.moved = True
    if not (replace and _there(folder, disk)):
        disk.rename(path, folder)
    elif disk.exchange(path, folder):
        back = disk.exchange
    else:
        return _replace(path, folder, disk)
    try:
        return sync_folder(folder.parent, disk)
    except OSError:
        with suppress(OSError):  # else both stay, each whole, for the next sweep
            back(folder, path)
        raise


def _replace(path: Path, folder: Path, disk: Disk) -> None:
    """The same in two steps, where the file system can't swap names; a death between them is mended by sweep."""
    old = _beside(folder, "old")
    disk.rename(folder, old)
    try:
        disk.rename(path, folder)
    except OSError:
        with suppress(OSError):
            disk.rename(old, folder)
        raise
    try:
        sync_folder(folder.parent, disk)
    except OSError:
        with suppress(OSError):
            sync_folder(folder.parent, disk)  # names that the medium may not know are not moved on: both would go
            disk.rename(folder, path)
            disk.rename(old, folder)
        raise
    _removed(old, disk)


def _remove(path: Path, disk: Disk) -> None:
    """Remove a file or link, or a folder with all that is in it."""
    if not _is_folder(path, disk, follow=False):
        return disk.unlink(path)
    for name in disk.names(path):
        _remove(path / name, disk)
    return disk.rmdir(path)


def _refuse(error: OSError, folder: Path, needed: int, disk: Disk) -> NoReturn:
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        raise CheckpointError(f"{folder} exists already") from error
    try:
        free = f"{disk.free(_existing(folder.parent, disk)):,} bytes are free"
    except OSError:
        free = "how many are free can't be told"
    known = ("the disk refuses", "make room, or move the run folder to another disk")
    cause, hint = _CAUSES.get(error.errno or 0, known)
    raise EnvironmentProblem(
        f"{cause}: checkpoint {folder} needs {needed:,} bytes, {free} ({error.strerror or error}); "
        "the checkpoints before it are untouched",
        hint=hint,
    ) from error


def _existing(folder: Path, disk: Disk) -> Path:
    while not _is_folder(folder, disk) and folder != folder.parent:
        folder = folder.parent
    return folder


def _named(checkpoints: Path, disk: Disk) -> list[tuple[int, Path]]:
    """Step and path of all `step-<number>`, oldest first."""
    try:
        found = [match for name in disk.names(checkpoints) if (match := _NAME.fullmatch(name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"can't list the checkpoints in {checkpoints}: {error.strerror}") from error
    return sorted((int(match[1]), checkpoints / match[0]) for match in found)


@contextmanager
def _whole(path: Path, step: int, disk: Disk, *, deep: bool = True) -> Iterator[Verified]:
    """The files of one that is valid, and named after its own step. Raises Damaged."""
    with Verified(path, disk, deep=deep) as files:
        if files.step not in (step, None):
            raise Damaged(MANIFEST, f"it is of step {files.step:,}: the folder was renamed, or copied from there")
        yield files


def _examine(path: Path, step: int, disk: Disk, *, deep: bool) -> Entry:
    problem = None
    try:
        with _whole(path, step, disk, deep=deep):
            pass
    except Damaged as damage:
        problem = str(damage)
    return Entry(path, path.name, step, bytes_in(path, disk), problem)
