"""The files of one checkpoint folder: laid out, written, verified, and only then read.

Its law: nothing is parsed before its size and its SHA-256 were found to be what the manifest says, on the same open
file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from streamtrain import tensor_file
from streamtrain.disk import LOOK, NEW, Disk
from streamtrain.errors import UNREADABLE, EnvironmentProblem
from streamtrain.state import Json, Snapshot, encode

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)
"""What the manifest lists, in the order of writing."""
_PIECE, _READ = 4 << 20, 1 << 20
"""Bytes that go through the digest at a time."""
_MAX_MANIFEST = 1 << 20


class Damaged(Exception):
    """This file is not what was committed, for this reason."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}, {reason}")


class Contents:
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

    def write(self, folder: Path, disk: Disk) -> None:
        """Write and sync all files into an empty folder, the manifest last."""
        digests: dict[str, tuple[str, int]] = {}
        with _DigestedFile(folder / MODEL, disk) as file:
            tensor_file.write(file.write, *self._model)
            digests[MODEL] = file.finish()
        with _DigestedFile(folder / OPTIMIZER, disk) as file:
            tensor_file.write(file.write, *self._others)
            digests[OPTIMIZER] = file.finish()
        with _DigestedFile(folder / STATE, disk) as file:
            file.write(memoryview(self._state))
            digests[STATE] = file.finish()
        with _DigestedFile(folder / MANIFEST, disk) as file:
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

    def __init__(self, path: Path, disk: Disk) -> None:
        self._disk, self._path = disk, path
        self._fd = disk.open(path, NEW)
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> _DigestedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.close(self._fd)

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._digest.update(piece)
            self._size += len(piece)
            while piece:
                piece = piece[self._disk.write(self._fd, piece) :]

    def finish(self) -> tuple[str, int]:
        """Make it durable; its SHA-256 in hexadecimal and its size in bytes."""
        self._disk.fsync(self._fd)
        if self._disk.fstat(self._fd).st_size != self._size:
            raise OSError(errno.EIO, f"the file does not hold the {self._size} bytes written to it")
        return self._digest.hexdigest(), self._size


class Verified:
    """The files of a checkpoint folder, open and found to be what was committed; closed at the end of the block."""

    def __init__(self, path: Path, disk: Disk, *, deep: bool = True, cold: bool = False) -> None:
        """Open all files and verify them; without `deep` their sizes only. `cold`: as the medium has them, not memory.

        Raises Damaged; EnvironmentProblem if this process may open no more files.
        """
        self._disk, self._cold = disk, cold
        with ExitStack() as stack:
            self._verify(path, stack, deep=deep)
            self._open_files = stack.pop_all()

    def __enter__(self) -> Verified:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def _verify(self, path: Path, stack: ExitStack, *, deep: bool) -> None:
        if _is(stat.S_ISREG, path, self._disk):
            raise Damaged(
                path.name, "is a file, not a checkpoint folder (pickled checkpoints such as .pt are never loaded)"
            )
        manifest = self._open(path, MANIFEST, stack)
        listed, self.step = _parse_manifest(self._content(manifest, MANIFEST, most=_MAX_MANIFEST))
        self._files = {name: self._open(path, name, stack) for name in FILES}
        for name in FILES:
            size = self._size(name)
            if size != listed[name]["bytes"]:
                raise Damaged(name, f"it has {size:,} bytes in place of {listed[name]['bytes']:,}")
        for name in FILES if deep else ():
            if self._sha256(name) != listed[name]["sha256"]:
                raise Damaged(name, "its SHA-256 is not the one in the manifest")

    def _open(self, path: Path, name: str, stack: ExitStack) -> int:
        try:
            fd = self._disk.open(path / name, LOOK)
        except FileNotFoundError:
            missing = _is(stat.S_ISDIR, path, self._disk)
            raise Damaged(name, "it is missing" if missing else "there is no such folder") from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # tells nothing of the file: no reason to take an older one
                raise EnvironmentProblem(
                    f"{path / name} can't be opened: {error.strerror}",
                    hint="raise the limit of open files (ulimit -n), or open fewer stores",
                ) from error
            raise Damaged(name, f"it can't be opened: {error.strerror}") from error
        stack.callback(self._disk.close, fd)
        if not stat.S_ISREG(self._about(fd, name).st_mode):
            raise Damaged(name, "it is no regular file")
        return fd

    def _about(self, fd: int, name: str) -> os.stat_result:
        try:
            return self._disk.fstat(fd)
        except OSError as error:
            raise Damaged(name, f"it can't be looked at: {error.strerror}") from error

    def _size(self, name: str) -> int:
        return self._about(self._files[name], name).st_size

    def _sha256(self, name: str) -> str:
        digest, buffer, offset = hashlib.sha256(), bytearray(_READ), 0
        window = memoryview(buffer)
        if self._cold:
            with suppress(OSError):  # advice, which a file system may not take
                self._disk.forget(self._files[name])
        while count := self._read(self._files[name], name, window, offset):
            digest.update(window[:count])
            offset += count
        return digest.hexdigest()

    def _content(self, fd: int, name: str, *, most: int) -> bytes:
        content = bytearray(min(self._about(fd, name).st_size, most))
        window, offset = memoryview(content), 0
        while count := self._read(fd, name, window[offset:], offset):
            offset += count
        return bytes(window[:offset])

    def _read(self, fd: int, name: str, into: memoryview, offset: int) -> int:
        if not into:
            return 0
        try:
            return self._disk.read(fd, into, offset)
        except OSError as error:
            raise Damaged(name, f"it can't be read: {error.strerror}") from error

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of a file, in fresh memory. Raises Damaged."""
        fd = self._files[name]
        try:
            return tensor_file.read(lambda into, offset: self._read(fd, name, into, offset), self._size(name))
        except tensor_file.Malformed as error:
            raise Damaged(name, str(error)) from None

    def document(self) -> dict[str, Json]:
        """What `state.json` holds: `model`, `optimizer` and `state`. Raises Damaged."""
        try:
            document = json.loads(self._content(self._files[STATE], STATE, most=self._size(STATE)))
        except UNREADABLE as error:
            raise Damaged(STATE, f"it can't be read: {error!s:.120}") from error
        if not isinstance(document, dict) or not {"model", "optimizer", "state"} <= document.keys():
            raise Damaged(STATE, "it does not hold model, optimizer and state")
        if unknown := document.keys() - {"format", "model", "optimizer", "state"}:
            raise Damaged(STATE, f"nobody knows its {', '.join(sorted(unknown))}")
        return document


def bytes_in(path: Path, disk: Disk) -> int:
    """Size of a checkpoint's files as they lie there."""
    total = 0
    for name in (*FILES, MANIFEST):
        with suppress(OSError):
            total += disk.stat(path / name).st_size
    return total


def _is(kind: Callable[[int], bool], path: Path, disk: Disk) -> bool:
    try:
        return kind(disk.stat(path).st_mode)
    except OSError:
        return False


def _parse_manifest(text: bytes) -> tuple[dict[str, dict[str, Any]], int | None]:
    """What it lists, and the step that was committed, where the state told one."""
    try:
        document = json.loads(text)
        version, digest = document["format"], document.pop("sha256", None)
        own = hashlib.sha256(_canonical(document)).hexdigest()  # refuses numbers that no JSON has
    except UNREADABLE:
        raise Damaged(MANIFEST, "it is no manifest") from None
    if type(version) is int and version > FORMAT:
        raise Damaged(MANIFEST, f"format {version} is newer than this streamtrain reads ({FORMAT}): update streamtrain")
    if digest != own:
        raise Damaged(MANIFEST, "its own SHA-256 does not fit")
    if text != _canonical({**document, "sha256": digest}):
        raise Damaged(MANIFEST, "it was changed after it was written")
    files = document.get("files")
    listed = isinstance(files, dict) and set(files) == set(FILES)
    if version != FORMAT or not listed or not all(_is_listing(entry) for entry in files.values()):
        raise Damaged(MANIFEST, f"it is not of format {FORMAT}")
    step = document.get("step")
    return dict(files), step if type(step) is int else None


def _is_listing(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
