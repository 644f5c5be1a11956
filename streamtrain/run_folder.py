"""A run's folder: one living process at a time holds it, and each of its small files is replaced whole, never edited.

`config.toml`, `status.json` and `error.json` are written here; `checkpoints/` by the checkpoint commit, metrics and
events by their loggers.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import socket
import stat
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from streamtrain.disk import FOLDER, LOCAL, OVER, Disk, sync_file, sync_folder
from streamtrain.errors import UNREADABLE, EnvironmentProblem, StreamtrainError

logger = logging.getLogger(__name__)

LOCK = ".lock"
_PART = re.compile(r"-\d{6}\.\w+$")
_HALF = re.compile(r"\..+\.tmp")
"""A file that was to take another's name."""


class RunFolder:
    """The folder `path` of one run. It is made by `lock`; nothing is touched before."""

    def __init__(self, path: str | os.PathLike[str], *, disk: Disk = LOCAL) -> None:
        self.path = Path(os.path.abspath(path))
        self._disk = disk
        self._lock: int | None = None
        self._itself: int | None = None
        """The folder, locked as well: a `.lock` that somebody removes lets nobody in."""
        self._holder = ""
        self._unsynced = False
        """It was said that lines of the log may be lost."""

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoint folders lie; made by the first commit."""
        return self.path / "checkpoints"

    def lock(self) -> None:
        """Make the folder if need be and hold it until `release` or the end of the process.

        Raises EnvironmentProblem if it can't be made or written, or if a living process holds it (its pid, since when).
        """
        if self._lock is not None:
            return
        try:
            self._make(self.path)
            descriptor = self._disk.open(self.path / LOCK, os.O_RDWR | os.O_CREAT)
            try:
                self._take(descriptor)
            except BaseException:
                self._disk.close(descriptor)
                raise
            self._clear()
        except OSError as error:
            raise EnvironmentProblem(
                f"the run folder {self.path} can't be written: {error.strerror}",
                hint="make room, or choose another run_dir"
                if error.errno in (errno.ENOSPC, errno.EDQUOT)
                else "choose another run_dir, or mend its permissions",
            ) from error
        self._lock = descriptor

    def release(self) -> None:
        """Let others have the folder; does nothing if it is not held."""
        if self._lock is not None:
            descriptor, self._lock = self._lock, None
            if self._itself is not None:
                self._let_go(self._itself)
                self._itself = None
            try:
                self._disk.truncate(descriptor, 0)
                # A forked child may hold the same lock: closing alone would leave it locked.
                self._disk.unlock(descriptor)
            except OSError as error:
                logger.warning("%s could not be given free: %s", self.path / LOCK, error.strerror)
            finally:
                self._disk.close(descriptor)

    def check(self) -> None:
        """Raise EnvironmentProblem if what lies at this path is no longer the folder that was locked.

        Somebody has moved or removed it, perhaps put another one there: what is written now would lie apart from the
        rest of the run. A `.lock` that was removed alone is no matter.
        """
        if self._lock is None:
            return
        try:
            if self._itself is None:
                same = self._noted(self.path / LOCK) == self._holder
            else:
                same = os.path.samestat(self._disk.fstat(self._itself), self._disk.stat(self.path))
            if same:
                return
        except FileNotFoundError:
            pass
        except OSError:  # what is to be written will tell
            return
        raise EnvironmentProblem(
            f"the run folder {self.path} was moved or removed while the run was writing to it",
            hint="move it back, or carry on from where it lies now by --run-dir and --resume auto",
        )

    def __enter__(self) -> RunFolder:
        self.lock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace `status.json`; non-finite numbers become null. Readers see the old or the new one, never half."""
        self._replace("status.json", _json(status), durable=False)

    def write_error(self, error: BaseException, standing: Mapping[str, Any] | None = None) -> None:
        """Replace `error.json`: the error's type, message, hint, traceback and time (UTC), and how the fit stood."""
        document = {
            "type": type(error).__qualname__,
            "message": str(error),
            "hint": error.hint if isinstance(error, StreamtrainError) else "",
            "exit_code": error.exit_code if isinstance(error, StreamtrainError) else 1,
            "time": _now(),
            "traceback": "".join(traceback.format_exception(error)),
            **(standing or {}),
        }
        self._replace("error.json", _json(document), durable=True)

    def forget_error(self) -> None:
        """Remove `error.json`, which tells of a life before. Raises EnvironmentProblem."""
        try:
            self._disk.unlink(self.path / "error.json")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.path / 'error.json'} can't be removed: {error.strerror}",
                hint="choose another run_dir, or mend its permissions",
            ) from error

    def write_config(self, text: str) -> None:
        """Replace `config.toml`."""
        self._replace("config.toml", text, durable=True)

    def _take(self, descriptor: int) -> None:
        try:
            self._disk.lock(descriptor)
        except BlockingIOError:
            raise EnvironmentProblem(
                f"the run folder {self.path} is in use by {_holder(descriptor, self._disk)}",
                hint="wait for it, stop it, or choose another run_dir",
            ) from None
        except OSError as error:
            logger.warning("%s can't be locked (%s): nothing keeps a second process out", self.path, error.strerror)
        itself = self._locked_itself()
        try:
            self._holder = _json({"pid": os.getpid(), "since": _now(), "host": socket.gethostname()})
            self._disk.truncate(descriptor, 0)
            self._write(descriptor, self._holder)
        except BaseException:
            if itself is not None:
                self._let_go(itself)
            raise
        self._itself = itself

    def _locked_itself(self) -> int | None:
        """The folder, locked; None where a file system locks no folders: then the `.lock` in it has to do."""
        descriptor = self._disk.open(self.path, FOLDER)
        try:
            self._disk.lock(descriptor)
        except BlockingIOError:
            self._disk.close(descriptor)
            raise EnvironmentProblem(
                f"the run folder {self.path} is in use by another process, whose {LOCK} somebody has removed",
                hint="wait for it, stop it, or choose another run_dir",
            ) from None
        except OSError:
            self._disk.close(descriptor)
            return None
        return descriptor

    def _let_go(self, itself: int) -> None:
        with suppress(OSError):
            self._disk.unlock(itself)
        self._disk.close(itself)

    def _noted(self, path: Path) -> str:
        """What a `.lock` says."""
        text = bytearray(4096)
        descriptor = self._disk.open(path, os.O_RDONLY)
        try:
            return text[: self._disk.read(descriptor, memoryview(text), 0)].decode(errors="replace")
        finally:
            self._disk.close(descriptor)

    def _clear(self) -> None:
        """Remove what a life left that ended while it replaced a file; nobody else writes here now."""
        with suppress(OSError):
            for name in self._disk.names(self.path):
                if _HALF.fullmatch(name):
                    self._disk.unlink(self.path / name)

    def _make(self, folder: Path) -> None:
        """Make a folder and its missing parents, each durable in its own parent, as all that is committed below."""
        try:
            self._disk.mkdir(folder)
        except FileNotFoundError:
            self._make(folder.parent)
            self._disk.mkdir(folder)
        except OSError:  # what refuses a folder that is there differs from one file system to the other
            if not self._is_folder(folder):
                raise
            return
        try:
            sync_folder(folder.parent, self._disk)
        except PermissionError as error:  # one may make folders there, and not list them
            logger.warning(
                "%s can't be read (%s): a power cut soon may take the new folder %s with all that is in it",
                *(folder.parent, error.strerror, folder.name),
            )

    def _is_folder(self, path: Path) -> bool:
        try:
            return stat.S_ISDIR(self._disk.stat(path).st_mode)
        except OSError:
            return False

    def _write(self, descriptor: int, text: str) -> None:
        left = memoryview(text.encode())
        while left:
            left = left[self._disk.write(descriptor, left) :]

    def sync_lines(self) -> None:
        """Have the lines that the logs hold survive a power cut: before a checkpoint does, which counts them as told.

        What can't be is no matter for the checkpoint, and said once. Full parts see to themselves.
        """
        try:
            for name in self._disk.names(self.path):
                if name.endswith((".jsonl", ".csv")) and not (name.startswith(".") or _PART.search(name)):
                    sync_file(self.path / name, self._disk)
            sync_folder(self.path, self._disk)
        except OSError as error:
            if not self._unsynced:
                self._unsynced = True
                why = error.strerror or error
                logger.warning("a power cut may cost lines of the log in %s that checkpoints count: %s", self.path, why)

    def _replace(self, name: str, text: str, *, durable: bool) -> None:
        """Write beside the target, then rename; `durable` also survives a power cut. Raises EnvironmentProblem, also
        where another folder lies there by now, which may be another run's."""
        self.check()
        temp = self.path / f".{name}.tmp"
        try:
            descriptor = self._disk.open(temp, OVER)
            try:
                self._write(descriptor, text)
                if durable:
                    self._disk.fsync(descriptor)
            finally:
                self._disk.close(descriptor)
            self._disk.rename(temp, self.path / name)
            if durable:
                sync_folder(self.path, self._disk)
        except OSError as error:
            with suppress(OSError):
                self._disk.unlink(temp)
            raise EnvironmentProblem(f"{self.path / name} can't be written: {error.strerror}") from error


def _holder(descriptor: int, disk: Disk) -> str:
    text = bytearray(4096)
    try:
        holder = json.loads(text[: disk.read(descriptor, memoryview(text), 0)])
        pid, since, host = int(holder["pid"]), str(holder["since"]), str(holder["host"])
    except (OSError, *UNREADABLE):
        return "another process"
    if host != socket.gethostname():
        return f"process {pid} on {host} since {since}"
    if pid == os.getpid():
        return f"this very process ({pid}) since {since}"
    if not _alive(pid):
        return f"a child of process {pid}, which itself has ended, since {since}"
    return f"process {pid} since {since}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has such a number
        return False
    except PermissionError:
        return True
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json(document: dict[str, Any]) -> str:
    return json.dumps(_finite(document), indent=1, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
