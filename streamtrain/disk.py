"""What a run does to its disk so that it lasts, a method a system call.

Its law: nothing here decides anything. Whoever commits, prunes, sweeps, verifies or replaces files is given a `Disk`,
so that a test can put another one in its place, which records, refuses, or loses what was not synced.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import Protocol

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
"""Flags that make a file, which must not be there yet."""
OVER = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
"""Flags that make a file, or empty the one that is there."""
FOLDER = os.O_RDONLY | os.O_DIRECTORY
"""Flags that open a folder: to sync what names it holds, or to lock it."""
LOOK = os.O_RDONLY | os.O_NONBLOCK
"""Flags that open whatever is there to read from it; a FIFO does not hang."""


class Disk(Protocol):
    """A file system, by what it is asked to do; every method raises OSError where it refuses.

    What is written survives a power cut once its file was synced, a name once its folder was.
    """

    def mkdir(self, path: Path) -> None:
        """Make one folder."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor that children do not inherit; a new file may be read and written as the umask says."""

    def close(self, fd: int) -> None:
        """Let go of a descriptor, and of the lock that it holds."""

    def write(self, fd: int, data: memoryview) -> int:
        """Write at the descriptor's position; how many bytes of `data` went in."""

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        """Fill `into` with the file's bytes from `offset` on; how many came, 0 at the end."""

    def fsync(self, fd: int) -> None:
        """Wait until the file's bytes, or the names in the folder, are on the medium."""

    def forget(self, fd: int) -> None:
        """Drop what memory holds of a synced file, so that the next read is the medium's, where the kernel can."""

    def truncate(self, fd: int, size: int) -> None:
        """Give the file a size in bytes."""

    def fstat(self, fd: int) -> os.stat_result:
        """About an open file."""

    def stat(self, path: Path, *, follow: bool = True) -> os.stat_result:
        """About whatever has this name; `follow`: where it is a link, about what it leads to."""

    def names(self, path: Path) -> list[str]:
        """What lies in a folder, in no order."""

    def rename(self, old: Path, new: Path) -> None:
        """Give another name, in one step; a file that has it is replaced, and a folder if it is empty."""

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two names in one step; False if the kernel or the file system can't, and nothing was done."""

    def unlink(self, path: Path) -> None:
        """Remove a file or a link."""

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""

    def lock(self, fd: int) -> None:
        """Take the file or folder for this process alone. Raises BlockingIOError if another one has it."""

    def unlock(self, fd: int) -> None:
        """Give it free, for the forks that hold the same descriptor too."""

    def free(self, path: Path) -> int:
        """Bytes that the file system leaves to us."""


class LocalDisk:
    """The file system of this machine."""

    def mkdir(self, path: Path) -> None:
        """See Disk."""
        os.mkdir(path)

    def open(self, path: Path, flags: int) -> int:
        """See Disk."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def close(self, fd: int) -> None:
        """See Disk."""
        os.close(fd)

    def write(self, fd: int, data: memoryview) -> int:
        """See Disk."""
        return os.write(fd, data)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        """See Disk."""
        return os.preadv(fd, [into], offset)

    def fsync(self, fd: int) -> None:
        """See Disk."""
        os.fsync(fd)

    def forget(self, fd: int) -> None:
        """See Disk; posix_fadvise's DONTNEED, which tmpfs and some network file systems don't heed."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def truncate(self, fd: int, size: int) -> None:
        """See Disk."""
        os.ftruncate(fd, size)

    def fstat(self, fd: int) -> os.stat_result:
        """See Disk."""
        return os.fstat(fd)

    def stat(self, path: Path, *, follow: bool = True) -> os.stat_result:
        """See Disk."""
        return os.stat(path, follow_symlinks=follow)

    def names(self, path: Path) -> list[str]:
        """See Disk."""
        return os.listdir(path)

    def rename(self, old: Path, new: Path) -> None:
        """See Disk."""
        os.rename(old, new)

    def exchange(self, one: Path, other: Path) -> bool:
        """See Disk; Linux's renameat2, which glibc has since 2.28."""
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

    def unlink(self, path: Path) -> None:
        """See Disk."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """See Disk."""
        os.rmdir(path)

    def lock(self, fd: int) -> None:
        """See Disk; flock, which ends with the process."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(self, fd: int) -> None:
        """See Disk."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def free(self, path: Path) -> int:
        """See Disk."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


LOCAL: Disk = LocalDisk()
"""The one disk that is not a test's."""


def sync_folder(folder: Path, disk: Disk) -> None:
    """Have the names in a folder last. Raises OSError."""
    _sync(folder, FOLDER, disk)


def sync_file(path: Path, disk: Disk) -> None:
    """Have what others have written to a file last. Raises OSError."""
    _sync(path, LOOK, disk)


def _sync(path: Path, flags: int, disk: Disk) -> None:
    descriptor = disk.open(path, flags)
    try:
        disk.fsync(descriptor)
    finally:
        disk.close(descriptor)
