"""The shared file of the loggers: lines in order, changes between them, an end without leftovers."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.callbacks import lines
from streamtrain.callbacks.csv_logger import CSVLogger
from streamtrain.callbacks.defaults import with_defaults
from streamtrain.callbacks.json_logger import JSONLogger
from streamtrain.callbacks.lines import LineFile, cut, rewrite
from streamtrain.callbacks.remote_logger import RemoteLogger
from streamtrain.callbacks.tensorboard import TensorBoard
from streamtrain.errors import ConfigError, EnvironmentProblem, StreamtrainError


def nothing(path: Path) -> None:
    pass


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamtrain-")]


async def opened(path: Path) -> LineFile:
    file = LineFile(path)
    await file.open(nothing)
    return file


async def test_lines_and_changes_happen_in_their_order(tmp_path: Path) -> None:
    def shout(path: Path) -> None:
        rewrite(path, lambda lines: [line.upper() for line in lines])

    file = await opened(tmp_path / "x")
    for line in ("a\n", "b\n"):
        file.put(line)
    file.change(shout)
    file.put("c\n")
    await file.close()
    assert (tmp_path / "x").read_text() == "A\nB\nc\n"


async def test_an_earlier_life_is_appended_to(tmp_path: Path) -> None:
    for line in ("a\n", "größe\n"):
        file = await opened(tmp_path / "x")
        file.put(line)
        await file.close()
    assert (tmp_path / "x").read_text(encoding="utf-8") == "a\ngröße\n"


async def test_what_is_not_written_yet_is_known(tmp_path: Path) -> None:
    file = await opened(tmp_path / "x")
    file.put("a\n")
    file.change(nothing)
    file.put("b\n")
    assert file.unwritten() == ["a\n", "b\n"]
    await file.close()
    assert file.unwritten() == []


async def test_the_thread_ends_with_the_file(tmp_path: Path) -> None:
    file = await opened(tmp_path / "x")
    assert threads() == ["streamtrain-x-0"]
    await file.close()
    assert threads() == []


async def test_after_a_failure_each_line_says_so_until_the_end(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    file = await opened(tmp_path / "x")
    file.change(fail)
    with pytest.raises(EnvironmentProblem, match=r"/x can't be written: Input/output error"):
        await file.close()
    with pytest.raises(EnvironmentProblem):
        file.put("a\n")
    assert threads() == []


class Full:
    """A file whose disk is full after so many bytes, until it is `freed`."""

    def __init__(self, file: LineFile, room: int) -> None:
        assert file._raw is not None
        self.raw, self.room, self.refused, self.freed = file._raw, room, asyncio.Event(), False
        file._raw = self

    async def write(self, data: bytes, /) -> int:
        if not self.freed and not self.room:
            self.refused.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        written = await self.raw.write(data if self.freed else data[: self.room])
        self.room -= written
        return written

    async def close(self) -> None:
        await self.raw.close()


async def test_lines_wait_while_a_disk_is_full_and_none_is_torn_or_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "RETRY", 0.01)
    file = await opened(tmp_path / "x")
    full = Full(file, 3)
    file.put("first\n")
    await full.refused.wait()
    file.put("second\n")
    assert file.unwritten() == ["first\n", "second\n"]
    full.refused.clear()
    await full.refused.wait()
    full.freed = True
    await file.close()
    assert (tmp_path / "x").read_text() == "first\nsecond\n"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{tmp_path / 'x'} can't be written: No space left on device; its lines wait for room"]


async def test_lines_do_not_wait_for_room_beyond_the_end(tmp_path: Path) -> None:
    file = await opened(tmp_path / "x")
    full = Full(file, 0)
    file.put("first\n")
    await full.refused.wait()
    with pytest.raises(EnvironmentProblem, match=r"/x can't be written: No space left"):
        await file.close()
    assert threads() == []


async def test_no_more_lines_wait_for_room_than_memory_should_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "RETRY", 0.01)
    monkeypatch.setattr(lines, "MOST_WAITING", 10)
    file = await opened(tmp_path / "x")
    full = Full(file, 0)
    file.put("first\n")
    await full.refused.wait()
    for _ in range(11):
        file.put("more\n")
    assert file._writer is not None
    await asyncio.wait([file._writer])
    with pytest.raises(EnvironmentProblem, match=r"/x can't be written: No space left"):
        file.put("one too many\n")
    await file.close()
    assert threads() == []


async def test_any_other_failure_ends_the_log_and_is_told_too(tmp_path: Path) -> None:
    file = await opened(tmp_path / "x")
    file.put("a\n")
    file.put("\ud800\n")  # half a character: no encoding has it
    assert file._writer is not None
    await asyncio.wait([file._writer])
    with pytest.raises(StreamtrainError, match="/x can't be written: UnicodeEncodeError: ") as caught:
        file.put("b\n")
    assert isinstance(caught.value.__cause__, UnicodeEncodeError)
    await file.close()
    assert threads() == []


async def test_an_end_tells_of_a_failure_that_nobody_heard_of(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise ValueError("no such column")

    file = await opened(tmp_path / "x")
    file.change(fail)
    with pytest.raises(StreamtrainError, match="/x can't be written: ValueError: no such column"):
        await file.close()
    assert threads() == []


async def test_a_beginning_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise ValueError("no step in line 3")

    with pytest.raises(StreamtrainError, match="/x can't be written: ValueError: no step in line 3"):
        await LineFile(tmp_path / "x").open(fail)


async def test_an_end_that_is_cancelled_leaves_no_thread(tmp_path: Path) -> None:
    entered, gate = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait(path: Path) -> None:
        loop.call_soon_threadsafe(entered.set)
        gate.wait()

    file = await opened(tmp_path / "x")
    file.change(wait)
    closing = asyncio.create_task(file.close())
    await entered.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    gate.set()  # the thread then ends by itself, as the fixture checks


@given(st.lists(st.integers(0, 9)), st.sets(st.integers(0, 9)), st.lists(st.integers(0, 12), unique=True))
def test_cutting_keeps_what_is_wanted_and_adds_what_is_missing(
    tmp_path_factory: pytest.TempPathFactory, there: list[int], wanted: set[int], missing: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut"
    path.write_text("".join(f"{number}\n" for number in there) + "7")
    cut(path, lambda line: int(line) in wanted, [f"{number}\n" for number in missing])
    kept = [number for number in there if number in wanted]
    assert [int(line) for line in path.read_text().split()] == kept + [n for n in missing if n not in kept]


def test_a_replaced_file_is_on_the_medium_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "x", list[str]()
    path.write_text("a\nb\n")
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(f"{os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}, {os.fstat(descriptor).st_size}")
        sync(descriptor)

    def replaced(old: Path, new: Path) -> None:
        done.append(f"{old.name} -> {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    cut(path, lambda line: line == b"a\n")
    assert done == [".x.tmp, 2", ".x.tmp -> x"]


def test_a_rewriting_that_fails_leaves_the_file(tmp_path: Path) -> None:
    def half(lines: Iterable[bytes]) -> Iterable[bytes]:
        yield next(iter(lines))
        raise OSError("no more")

    (tmp_path / "x").write_text("a\nb\n")
    with pytest.raises(OSError, match="no more"):
        rewrite(tmp_path / "x", half)
    assert (tmp_path / "x").read_text() == "a\nb\n"


@pytest.mark.parametrize(
    ("pair", "place"),
    [
        ([CSVLogger(), CSVLogger(part="4KiB")], "metrics.csv"),
        ([JSONLogger(), JSONLogger()], "metrics.jsonl"),
        ([TensorBoard(), TensorBoard(graph=True)], "tensorboard/"),
        ([RemoteLogger("http://host/a"), RemoteLogger("http://host/a", batch=3)], "remote-.*jsonl"),
    ],
    ids=["csv", "jsonl", "tensorboard", "remote"],
)
def test_two_that_write_one_file_are_refused(pair: list[object], place: str, tmp_path: Path) -> None:
    """Each line stood there twice, and after a resume each cut off the other's."""
    with pytest.raises(ConfigError, match=f"two callbacks write {place}: {type(pair[0]).__name__} and"):
        with_defaults(pair, tmp_path, dev=False)


def test_two_that_write_two_files_are_not(tmp_path: Path) -> None:
    pair = [TensorBoard(), TensorBoard(log_dir=tmp_path), RemoteLogger("http://host/a"), RemoteLogger("http://host/b")]
    assert with_defaults(pair, tmp_path, dev=False)[:4] == pair
