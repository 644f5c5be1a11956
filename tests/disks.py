"""Disks that are no disks: one in memory that tells what a power cut may leave of it, and one that refuses.

What the memory's disk promises is what POSIX promises and no more: bytes of a file last once the file was synced, and
names once their folder was; a rename and an exchange of names are made whole or not at all; and of what was not synced
any part may be there, in any order.
"""

from __future__ import annotations

import copy
import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from streamtrain.disk import Disk

Names: TypeAlias = dict[str, int]
"""What a folder holds: inodes by name."""
Image: TypeAlias = tuple[tuple[str, "Image | bytes"], ...]
"""A folder as it lies on the medium: names, in order, with what they lead to."""
ROOT = 1
MOST_NAMES = 14
"""Changes of names that may be on their way at once: 2 to the power of this are looked at."""


@dataclass(frozen=True)
class _Link:
    folder: int
    name: str
    inode: int

    def on(self, folders: dict[int, Names]) -> bool:
        if self.name in folders[self.folder]:
            return False
        folders[self.folder][self.name] = self.inode
        return True


@dataclass(frozen=True)
class _Unlink:
    folder: int
    name: str

    def on(self, folders: dict[int, Names]) -> bool:
        return folders[self.folder].pop(self.name, None) is not None


@dataclass(frozen=True)
class _Rename:
    folder: int
    old: str
    new: str

    def on(self, folders: dict[int, Names]) -> bool:
        names = folders[self.folder]
        if self.old not in names or folders.get(names.get(self.new, 0)):
            return False  # no such name, or a folder in the way that is not empty
        names[self.new] = names.pop(self.old)
        return True


@dataclass(frozen=True)
class _Exchange:
    folder: int
    one: str
    other: str

    def on(self, folders: dict[int, Names]) -> bool:
        names = folders[self.folder]
        if not {self.one, self.other} <= names.keys():
            return False
        names[self.one], names[self.other] = names[self.other], names[self.one]
        return True


_Change: TypeAlias = _Link | _Unlink | _Rename | _Exchange


@dataclass
class _File:
    durable: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    """Offset and bytes of what was written since the last sync."""

    def left(self) -> list[bytes]:
        """What a power cut may leave: any of the writes, the last one in part, zeros or old blocks for the rest."""
        found = {self.durable, bytes(self.now)}
        if self.writes:
            end = max(len(self.durable), *(offset + len(data) for offset, data in self.writes))
            for blank in (b"\0", b"\xa5"):
                found.add((self.durable + blank * end)[:end])
            for taken in itertools.product((False, True), repeat=min(len(self.writes), 6)):
                found.add(_written(self.durable, itertools.compress(self.writes, taken)))
            offset, data = self.writes[-1]
            for cut in {1, len(data) // 2, len(data) - 1}:
                found.add(_written(self.durable, [*self.writes[:-1], (offset, data[:cut])]))
        return sorted(found)


def _written(content: bytes, writes: Iterator[tuple[int, bytes]] | list[tuple[int, bytes]]) -> bytes:
    made = bytearray(content)
    for offset, data in writes:
        made.extend(bytes(max(0, offset - len(made))))
        made[offset : offset + len(data)] = data
    return bytes(made)


class MemoryDisk:
    """A file system in memory, which knows what of it is on the medium; made of an image, or empty."""

    swaps = True
    """Whether it can exchange two names."""
    forgets = -1
    """Number of the sync, from 0, that it says is done and is not."""

    def __init__(self, image: Image = ()) -> None:
        self._files: dict[int, _File] = {}
        self._now: dict[int, Names] = {}
        self._durable: dict[int, Names] = {}
        self._changes: list[_Change] = []
        """Of names, since their folders were synced."""
        self._inodes = itertools.count(ROOT)
        self._fds = itertools.count(3)
        self._open: dict[int, list[int]] = {}
        """Inode and position, by descriptor."""
        self._locks: dict[int, int] = {}
        self._syncs = itertools.count()
        self.changed: Callable[[], None] = lambda: None
        """Called after each change."""
        self._lay(image)

    def _lay(self, image: Image) -> int:
        inode = next(self._inodes)
        self._now[inode] = {}
        for name, content in image:
            if isinstance(content, tuple):
                self._now[inode][name] = self._lay(content)
            else:
                self._now[inode][name] = file = next(self._inodes)
                self._files[file] = _File(content, bytearray(content))
        self._durable[inode] = dict(self._now[inode])
        return inode

    # --- what a power cut leaves ---

    def image(self) -> Image:
        """All as it is now."""
        return _image(ROOT, self._now, {inode: bytes(file.now) for inode, file in self._files.items()})

    def images(self) -> Iterator[Image]:
        """All that a power cut at this instant may leave, some of it more than once."""
        assert len(self._changes) <= MOST_NAMES, f"{len(self._changes)} changes of names: too many to try all"
        known: set[Image] = set()
        for taken in itertools.product((False, True), repeat=len(self._changes)):
            folders = {inode: dict(names) for inode, names in self._durable.items()}
            if not all(change.on(folders) for change in itertools.compress(self._changes, taken)):
                continue  # it can't be without one that is not there
            bare = _image(ROOT, folders, {inode: b"%d" % inode for inode in self._files})
            if bare in known:
                continue
            known.add(bare)
            reached = sorted(_reached(ROOT, folders) & self._files.keys())
            for contents in itertools.product(*(self._files[inode].left() for inode in reached)):
                yield _image(ROOT, folders, dict(zip(reached, contents, strict=True)))

    def after_kill(self) -> MemoryDisk:
        """The same disk once the process has died: nothing is lost yet, and nothing is open."""
        made = MemoryDisk()
        made._files, made._now, made._durable = copy.deepcopy((self._files, self._now, self._durable))
        made._changes, made._inodes = list(self._changes), itertools.count(max(*self._files, *self._now) + 1)
        made.swaps = self.swaps
        return made

    # --- Disk ---

    def _folder(self, path: Path) -> int:
        inode = self._find(path)
        if inode not in self._now:
            raise _error(errno.ENOTDIR, path)
        return inode

    def _find(self, path: Path) -> int:
        inode = ROOT
        for part in path.parts[1:]:
            if inode not in self._now:
                raise _error(errno.ENOTDIR, path)
            if part not in self._now[inode]:
                raise _error(errno.ENOENT, path)
            inode = self._now[inode][part]
        return inode

    def _change(self, change: _Change) -> None:
        assert change.on(self._now)
        self._changes.append(change)
        self.changed()

    def mkdir(self, path: Path) -> None:
        """See Disk."""
        folder = self._folder(path.parent)
        if path.name in self._now[folder]:
            raise _error(errno.EEXIST, path)
        inode = next(self._inodes)
        self._now[inode], self._durable[inode] = {}, {}
        self._change(_Link(folder, path.name, inode))

    def open(self, path: Path, flags: int) -> int:
        """See Disk."""
        folder = self._folder(path.parent)
        inode = self._now[folder].get(path.name) if path.name else folder
        if inode is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            inode = next(self._inodes)
            self._files[inode] = _File()
            self._change(_Link(folder, path.name, inode))
        elif flags & os.O_EXCL:
            raise _error(errno.EEXIST, path)
        elif flags & os.O_DIRECTORY and inode not in self._now:
            raise _error(errno.ENOTDIR, path)
        elif flags & (os.O_WRONLY | os.O_RDWR) and inode in self._now:
            raise _error(errno.EISDIR, path)
        fd = next(self._fds)
        self._open[fd] = [inode, 0]
        if flags & os.O_TRUNC:
            self.truncate(fd, 0)
        return fd

    def close(self, fd: int) -> None:
        """See Disk."""
        inode, _ = self._open.pop(fd)
        if self._locks.get(inode) == fd:
            del self._locks[inode]

    def write(self, fd: int, data: memoryview) -> int:
        """See Disk."""
        inode, position = self._open[fd]
        file, content = self._files[inode], bytes(data)
        file.writes.append((position, content))
        file.now[:] = _written(bytes(file.now), [(position, content)])
        self._open[fd][1] += len(content)
        self.changed()
        return len(content)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        """See Disk."""
        inode, _ = self._open[fd]
        if inode in self._now:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        found = self._files[inode].now[offset : offset + len(into)]
        into[: len(found)] = found
        return len(found)

    def fsync(self, fd: int) -> None:
        """See Disk."""
        inode, _ = self._open[fd]
        if next(self._syncs) == self.forgets:
            return
        if inode in self._files:
            file = self._files[inode]
            file.durable, file.writes = bytes(file.now), []
        else:
            for change in self._changes:
                if change.folder == inode:
                    assert change.on(self._durable)
            self._changes = [change for change in self._changes if change.folder != inode]
        self.changed()

    def forget(self, fd: int) -> None:
        """See Disk."""

    def truncate(self, fd: int, size: int) -> None:
        """See Disk; a file that was not empty may be either after a power cut."""
        file = self._files[self._open[fd][0]]
        if size != len(file.now):
            assert (size, file.writes) == (0, []), "only emptying a file that was synced is modelled"
            file.writes = [(0, b"")]
            file.now.clear()
            self.changed()

    def _about(self, inode: int) -> os.stat_result:
        kind, size = (stat.S_IFDIR, 0) if inode in self._now else (stat.S_IFREG, len(self._files[inode].now))
        return os.stat_result((kind | 0o755, inode, 0, 1, 0, 0, size, 0, 0, 0))

    def fstat(self, fd: int) -> os.stat_result:
        """See Disk."""
        return self._about(self._open[fd][0])

    def stat(self, path: Path, *, follow: bool = True) -> os.stat_result:
        """See Disk; there are no links."""
        return self._about(self._find(path))

    def names(self, path: Path) -> list[str]:
        """See Disk."""
        return list(self._now[self._folder(path)])

    def rename(self, old: Path, new: Path) -> None:
        """See Disk; within one folder."""
        assert old.parent == new.parent
        folder, inode = self._folder(old.parent), self._find(old)
        there = self._now[folder].get(new.name)
        if there is not None and self._now.get(there):
            raise _error(errno.ENOTEMPTY, new)
        if there is not None and (inode in self._now) != (there in self._now):
            raise _error(errno.EISDIR if there in self._now else errno.ENOTDIR, new)
        self._change(_Rename(folder, old.name, new.name))

    def exchange(self, one: Path, other: Path) -> bool:
        """See Disk; within one folder."""
        assert one.parent == other.parent
        self._find(one), self._find(other)
        if self.swaps:
            self._change(_Exchange(self._folder(one.parent), one.name, other.name))
        return self.swaps

    def unlink(self, path: Path) -> None:
        """See Disk."""
        if self._find(path) in self._now:
            raise _error(errno.EISDIR, path)
        self._change(_Unlink(self._folder(path.parent), path.name))

    def rmdir(self, path: Path) -> None:
        """See Disk."""
        if self._now[self._folder(path)]:
            raise _error(errno.ENOTEMPTY, path)
        self._change(_Unlink(self._folder(path.parent), path.name))

    def lock(self, fd: int) -> None:
        """See Disk."""
        inode, _ = self._open[fd]
        if self._locks.setdefault(inode, fd) != fd:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def unlock(self, fd: int) -> None:
        """See Disk."""
        self._locks.pop(self._open[fd][0], None)

    def free(self, path: Path) -> int:
        """See Disk."""
        self._folder(path)
        return 1 << 40


def _error(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))


def _image(inode: int, folders: dict[int, Names], contents: dict[int, bytes]) -> Image:
    made = []
    for name, number in sorted(folders[inode].items()):
        made.append((name, _image(number, folders, contents) if number in folders else contents[number]))
    return tuple(made)


def _reached(inode: int, folders: dict[int, Names]) -> set[int]:
    return {inode}.union(*(_reached(number, folders) for number in folders.get(inode, {}).values()))


@dataclass
class RefusingDisk:
    """Another disk, of which one operation fails, or all from then on; and which says what it was asked for."""

    disk: Disk
    at: int = -1
    """Number of the operation that fails, from 0; -1 for none."""
    code: int = errno.EIO
    lasting: bool = False
    """Whether all after it fail as well."""
    kinds: frozenset[str] = frozenset({"mkdir", "open", "write", "fsync", "truncate", "rename", "exchange"})
    """The operations that are counted; others go through."""
    asked: list[str] = field(default_factory=list)
    """The operations counted so far."""
    failed: list[str] = field(default_factory=list)
    """Those of them that were refused, each with its path."""

    def _gate(self, kind: str, path: object) -> None:
        if kind not in self.kinds:
            return
        number = len(self.asked)
        self.asked.append(kind)
        if number == self.at or (self.lasting and 0 <= self.at < number):
            self.failed.append(f"{kind} {path}")
            raise OSError(self.code, os.strerror(self.code))

    def mkdir(self, path: Path) -> None:
        """See Disk."""
        self._gate("mkdir", path)
        self.disk.mkdir(path)

    def open(self, path: Path, flags: int) -> int:
        """See Disk."""
        self._gate("open", path)
        return self.disk.open(path, flags)

    def close(self, fd: int) -> None:
        """See Disk."""
        self.disk.close(fd)

    def write(self, fd: int, data: memoryview) -> int:
        """See Disk; what fails goes in by half, and a write before the disk is full may go in by half as well."""
        try:
            self._gate("write", fd)
        except OSError:
            if len(data) > 1:
                self.disk.write(fd, data[: len(data) // 2])
            raise
        return self.disk.write(fd, data)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        """See Disk."""
        self._gate("read", fd)
        return self.disk.read(fd, into, offset)

    def fsync(self, fd: int) -> None:
        """See Disk."""
        self._gate("fsync", fd)
        self.disk.fsync(fd)

    def forget(self, fd: int) -> None:
        """See Disk."""
        self.disk.forget(fd)

    def truncate(self, fd: int, size: int) -> None:
        """See Disk."""
        self._gate("truncate", fd)
        self.disk.truncate(fd, size)

    def fstat(self, fd: int) -> os.stat_result:
        """See Disk."""
        self._gate("fstat", fd)
        return self.disk.fstat(fd)

    def stat(self, path: Path, *, follow: bool = True) -> os.stat_result:
        """See Disk."""
        self._gate("stat", path)
        return self.disk.stat(path, follow=follow)

    def names(self, path: Path) -> list[str]:
        """See Disk."""
        self._gate("names", path)
        return self.disk.names(path)

    def rename(self, old: Path, new: Path) -> None:
        """See Disk."""
        self._gate("rename", old)
        self.disk.rename(old, new)

    def exchange(self, one: Path, other: Path) -> bool:
        """See Disk."""
        self._gate("exchange", one)
        return self.disk.exchange(one, other)

    def unlink(self, path: Path) -> None:
        """See Disk."""
        self._gate("unlink", path)
        self.disk.unlink(path)

    def rmdir(self, path: Path) -> None:
        """See Disk."""
        self._gate("rmdir", path)
        self.disk.rmdir(path)

    def lock(self, fd: int) -> None:
        """See Disk."""
        self._gate("lock", fd)
        self.disk.lock(fd)

    def unlock(self, fd: int) -> None:
        """See Disk."""
        self.disk.unlock(fd)

    def free(self, path: Path) -> int:
        """See Disk."""
        self._gate("free", path)
        return self.disk.free(path)
