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

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from streamtrain import tensor_file
from streamtrain.errors import CheckpointError, EnvironmentProblem
from streamtrain.state import Json, Snapshot, decode, encode

logger = logging.getLogger(__name__)

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)
"""What the manifest lists, in the order of writing."""
_NAME = re.compile(r"step-(\d+)")
_STALE = re.compile(r"\.(tmp|old)-(.+)-[0-9a-f]{8}")
"""Half-made or discarded folders: `tmp` may always go; `old` was the target until its successor took the name."""
_PIECE = 4 << 20
_MAX_MANIFEST = 1 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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


class _Damaged(Exception):
    """This file is not what was committed, for this reason."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}, {reason}")


def commit(folder: Path, snapshot: Snapshot, *, replace: bool = False) -> Committed:
    """Write `snapshot` as the checkpoint folder `folder`; it is durable when this returns, else there is none.

    With `replace` a folder that stands there stays whole until the new one takes its name in one step. Memory: one
    tensor's copy at most, for tensors that are not contiguous. Raises CheckpointError if the snapshot holds what can't
    be kept or the folder exists, EnvironmentProblem if the disk refuses; in both cases what was there is untouched.
    """
    started = time.perf_counter()
    folder = Path(os.path.abspath(folder))
    contents = _Contents(snapshot)
    if not replace and os.path.lexists(folder):
        raise CheckpointError(f"{folder} exists already", hint="choose another name, or ask for it to be replaced")
    try:
        _make_folder(folder.parent)
        _check_space(folder.parent, contents.bytes)
        with _staging(folder) as (staging, descriptor):
            contents.write(staging)
            os.fsync(descriptor)
            _publish(staging, folder, replace=replace)
    except OSError as error:
        _refuse(error, folder, contents.bytes)
    return Committed(folder, contents.bytes, time.perf_counter() - started)


def read(path: Path) -> Snapshot:
    """Read the checkpoint folder `path`, each tensor into fresh memory.

    Sizes and digests of all files are verified before anything is parsed, on the same open files. Raises
    CheckpointError with the file and the reason.
    """
    try:
        with ExitStack() as stack:
            files = _open_verified(path, stack)
            model = _read_tensors(files, MODEL)
            others = _read_tensors(files, OPTIMIZER)
            document = _read_json(files)
            weights = decode(document["model"], model, where="model")
            if not isinstance(weights, dict):
                raise _Damaged(STATE, "its model is no table of names")
            return Snapshot(
                model=weights,
                optimizer=decode(document["optimizer"], others, where="optimizer"),
                state=decode(document["state"], others, where="state"),
            )
    except _Damaged as damage:
        raise CheckpointError(
            f"checkpoint {path}: {damage}", hint="`streamtrain checkpoints RUN` lists the good ones"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {STATE}, {error}", hint=error.hint) from error


def scan(checkpoints: Path, *, deep: bool = True) -> list[Entry]:
    """All folders `step-<number>` in `checkpoints`, oldest first, each verified.

    Without `deep` digests are left out: only what the manifest and the sizes tell. A missing folder has none.
    """
    return [_examine(path, step, deep=deep) for step, path in _named(checkpoints)]


def newest_valid(checkpoints: Path) -> Entry | None:
    """The newest checkpoint that passes all tests, or None if there is none at all.

    Damaged newer ones are warned of in the log. Raises CheckpointError with each one's reason if there are some and
    none is valid: to start over silently would throw the run away. Call `sweep` before.
    """
    damaged: list[Entry] = []
    for step, path in reversed(_named(checkpoints)):
        entry = _examine(path, step, deep=True)
        if entry.problem is None:
            for other in damaged:
                message = "checkpoint %s is damaged (%s): going back to %s repeats %d steps"
                logger.warning(message, other.path, other.problem, entry.name, other.step - entry.step)
            return entry
        damaged.append(entry)
    if not damaged:
        return None
    reasons = "; ".join(f"{entry.name}: {entry.problem}" for entry in damaged)
    raise CheckpointError(
        f"no checkpoint in {checkpoints} is valid: {reasons}",
        hint="put an intact copy there, or start over in another run folder",
    )


def prune(checkpoints: Path, keep: Collection[str]) -> list[str]:
    """Remove all `step-<number>` folders but those named in `keep`; the names removed, oldest first.

    A folder loses its name before it loses its files, so a death in between leaves none half-removed. If none of
    `keep` is there, nothing is removed. Raises EnvironmentProblem if the disk refuses.
    """
    named = _named(checkpoints)
    if not any(path.name in keep for _, path in named):
        return []
    removed = [path for _, path in named if path.name not in keep]
    try:
        for path in removed:
            discarded = _beside(path, "tmp")
            os.rename(path, discarded)
            _remove(discarded)
        if removed:
            _sync_folder(checkpoints)
    except OSError as error:
        raise EnvironmentProblem(f"can't remove old checkpoints in {checkpoints}: {error}") from error
    return [path.name for path in removed]


def sweep(checkpoints: Path) -> list[str]:
    """Remove what commits and prunes that died left behind; the names removed.

    A folder that was being replaced gets its name back if its successor did not arrive. A commit under way in another
    process or thread is left alone. Never raises for a folder that can't be removed: it is said in the log.
    """
    swept: list[str] = []
    if not checkpoints.is_dir():
        return swept
    for path in sorted(checkpoints.iterdir()):
        match = _STALE.fullmatch(path.name)
        if match is None or _in_use(path):
            continue
        try:
            original = checkpoints / match[2]
            if match[1] == "old" and not os.path.lexists(original):
                os.rename(path, original)
                _sync_folder(checkpoints)
                logger.warning("checkpoint %s was being replaced when its process died: the old one stands", original)
                continue
            _remove(path)
            swept.append(path.name)
        except OSError as error:
            logger.warning("can't remove %s: %s", path, error)
    return swept


class _Contents:
    """A snapshot laid out as files, nothing of it written or copied yet."""

    def __init__(self, snapshot: Snapshot) -> None:
        model_json, model = encode(snapshot.model, where="model", views=False)
        rest = {"optimizer": snapshot.optimizer, "state": snapshot.state}
        rest_json, others = encode(rest)
        document = {"format": FORMAT, "model": model_json, **rest_json}
        aliases = {
            name: reference["$tensor"]
            for name, reference in model_json.items()
            if isinstance(reference, dict) and reference.get("$tensor", name) != name and name != "format"
        }
        self._state = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
        self._model = tensor_file.plan(model, aliases)
        self._others = tensor_file.plan(others, {})
        self._step = snapshot.state.get("step") if isinstance(snapshot.state, dict) else None
        sizes = tensor_file.size(*self._model), tensor_file.size(*self._others), len(self._state)
        self._manifest_bytes = len(
            self._manifest({name: ("0" * 64, size) for name, size in zip(FILES, sizes, strict=True)})
        )
        self.bytes = sum(sizes) + self._manifest_bytes

    def write(self, folder: Path) -> None:
        """Write and sync all files into an empty folder, the manifest last."""
        digests: dict[str, tuple[str, int]] = {}
        with _DigestedFile(folder / MODEL) as file:
            tensor_file.write(file.write, *self._model)
            digests[MODEL] = file.finish()
        with _DigestedFile(folder / OPTIMIZER) as file:
            tensor_file.write(file.write, *self._others)
            digests[OPTIMIZER] = file.finish()
        with _DigestedFile(folder / STATE) as file:
            file.write(memoryview(self._state))
            digests[STATE] = file.finish()
        with _DigestedFile(folder / MANIFEST) as file:
            file.write(memoryview(self._manifest(digests)))
            file.finish()

    def _manifest(self, digests: dict[str, tuple[str, int]]) -> bytes:
        files = {name: {"sha256": digest, "bytes": size} for name, (digest, size) in digests.items()}
        document: dict[str, Json] = {"format": FORMAT, "files": files}
        if type(self._step) is int:
            document["step"] = self._step
        return _canonical({**document, "sha256": hashlib.sha256(_canonical(document)).hexdigest()})


def _canonical(document: dict[str, Json]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


class _DigestedFile:
    """A new file that is digested while it is written."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> _DigestedFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._digest.update(piece)
            self._size += len(piece)
            while piece:
                piece = piece[os.write(self._fd, piece) :]

    def finish(self) -> tuple[str, int]:
        """Make it durable; its SHA-256 in hexadecimal and its size in bytes."""
        os.fsync(self._fd)
        if os.fstat(self._fd).st_size != self._size:
            raise OSError(errno.EIO, f"the file does not hold the {self._size} bytes written to it")
        return self._digest.hexdigest(), self._size


def _make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, each durable in its own parent."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(folder: Path, needed: int) -> None:
    if _free(folder) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _free(folder: Path) -> int:
    """Bytes that the file system leaves to us."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _beside(folder: Path, kind: str) -> Path:
    return folder.parent / f".{kind}-{folder.name}-{secrets.token_hex(4)}"


@contextmanager
def _staging(folder: Path) -> Iterator[tuple[Path, int]]:
    """A temp folder beside `folder`, locked while we live so that no sweep takes it; gone at the end if still there."""
    path = _beside(folder, "tmp")
    os.mkdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path, descriptor
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _in_use(path: Path) -> bool:
    """Whether a living commit holds this temp folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _publish(staging: Path, folder: Path, *, replace: bool) -> None:
    """Give the finished folder its name, durably; whatever had it before is discarded afterwards."""
    if not (replace and os.path.lexists(folder)):
        os.rename(staging, folder)
    elif not _exchange(staging, folder):
        old = _beside(folder, "old")
        os.rename(folder, old)  # a death between these two is mended by sweep
        os.rename(staging, folder)
        _sync_folder(folder.parent)
        _remove(old)
    _sync_folder(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the kernel and the file system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _refuse(error: OSError, folder: Path, needed: int) -> NoReturn:
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        raise CheckpointError(f"{folder} exists already") from error
    try:
        free = f"{_free(_existing(folder.parent)):,} bytes are free"
    except OSError:
        free = "how many are free can't be told"
    cause = "the disk is full" if error.errno in _NO_SPACE else "the disk refuses"
    raise EnvironmentProblem(
        f"{cause}: checkpoint {folder} needs {needed:,} bytes, {free} ({error.strerror or error}); "
        "the checkpoints before it are untouched",
        hint="make room, or move the run folder to another disk",
    ) from error


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _named(checkpoints: Path) -> list[tuple[int, Path]]:
    """Step and path of all `step-<number>`, oldest first."""
    try:
        found = [(match, path) for path in checkpoints.iterdir() if (match := _NAME.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"can't list the checkpoints in {checkpoints}: {error.strerror}") from error
    return sorted((int(match[1]), path) for match, path in found)


def _examine(path: Path, step: int, *, deep: bool) -> Entry:
    problem = None
    try:
        with ExitStack() as stack:
            _open_verified(path, stack, deep=deep)
    except _Damaged as damage:
        problem = str(damage)
    return Entry(path, path.name, step, _bytes_in(path), problem)


def _bytes_in(path: Path) -> int:
    total = 0
    for name in (*FILES, MANIFEST):
        with suppress(OSError):
            total += os.stat(path / name).st_size
    return total


def _open_verified(path: Path, stack: ExitStack, *, deep: bool = True) -> dict[str, int]:
    """Open all files of a checkpoint and verify them; their descriptors by name. Raises _Damaged."""
    if path.is_file():
        raise _Damaged(
            path.name, "is a file, not a checkpoint folder (pickled checkpoints such as .pt are never loaded)"
        )
    manifest = _open(path, MANIFEST, stack)
    listed = _parse_manifest(_whole(manifest))
    files = {name: _open(path, name, stack) for name in FILES}
    for name, fd in files.items():
        size = os.fstat(fd).st_size
        if size != listed[name]["bytes"]:
            raise _Damaged(name, f"it has {size:,} bytes in place of {listed[name]['bytes']:,}")
    for name, fd in files.items() if deep else ():
        if _sha256(fd, name) != listed[name]["sha256"]:
            raise _Damaged(name, "its SHA-256 is not the one in the manifest")
    return files


def _open(path: Path, name: str, stack: ExitStack) -> int:
    try:
        fd = os.open(path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise _Damaged(name, "it is missing" if path.is_dir() else "there is no such folder") from None
    except OSError as error:
        raise _Damaged(name, f"it can't be opened: {error.strerror}") from error
    stack.callback(os.close, fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise _Damaged(name, "it is no regular file")
    return fd


def _whole(fd: int) -> bytes:
    try:
        return os.pread(fd, _MAX_MANIFEST, 0)
    except OSError as error:
        raise _Damaged(MANIFEST, f"it can't be read: {error.strerror}") from error


def _parse_manifest(text: bytes) -> dict[str, dict[str, Any]]:
    try:
        document = json.loads(text)
        version, digest = document["format"], document.pop("sha256", None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _Damaged(MANIFEST, "it is no manifest") from None
    if type(version) is int and version > FORMAT:
        raise _Damaged(
            MANIFEST, f"format {version} is newer than this streamtrain reads ({FORMAT}): update streamtrain"
        )
    if digest != hashlib.sha256(_canonical(document)).hexdigest():
        raise _Damaged(MANIFEST, "its own SHA-256 does not fit")
    if text != _canonical({**document, "sha256": digest}):
        raise _Damaged(MANIFEST, "it was changed after it was written")
    files = document.get("files")
    listed = isinstance(files, dict) and set(files) == set(FILES)
    if version != FORMAT or not listed or not all(_is_listing(entry) for entry in files.values()):
        raise _Damaged(MANIFEST, f"it is not of format {FORMAT}")
    return dict(files)


def _is_listing(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int


def _sha256(fd: int, name: str) -> str:
    digest, buffer, offset = hashlib.sha256(), bytearray(1 << 20), 0
    window = memoryview(buffer)
    try:
        while count := os.preadv(fd, [buffer], offset):
            digest.update(window[:count])
            offset += count
    except OSError as error:
        raise _Damaged(name, f"it can't be read: {error.strerror}") from error
    return digest.hexdigest()


def _read_tensors(files: dict[str, int], name: str) -> dict[str, Tensor]:
    try:
        return tensor_file.read(files[name])
    except tensor_file.Malformed as error:
        raise _Damaged(name, str(error)) from None
    except OSError as error:
        raise _Damaged(name, f"it can't be read: {error.strerror}") from error


def _read_json(files: dict[str, int]) -> dict[str, Json]:
    try:
        with os.fdopen(os.dup(files[STATE]), "rb") as file:
            document = json.loads(file.read())
    except (OSError, ValueError, RecursionError) as error:
        raise _Damaged(STATE, f"it can't be read: {error!s:.120}") from error
    if not isinstance(document, dict) or not {"model", "optimizer", "state"} <= document.keys():
        raise _Damaged(STATE, "it does not hold model, optimizer and state")
    if unknown := document.keys() - {"format", "model", "optimizer", "state"}:
        raise _Damaged(STATE, f"nobody knows its {', '.join(sorted(unknown))}")
    return document
