"""A run's folder belongs to one living process, and its small files are replaced whole."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from streamtrain import checkpoint
from streamtrain.disk import LOCAL, LocalDisk
from streamtrain.errors import DataError, EnvironmentProblem
from streamtrain.file_thread import file_thread
from streamtrain.run_folder import LOCK, RunFolder
from streamtrain.state import Snapshot
from streamtrain.status_file import StatusFile
from tests.disks import MemoryDisk, RefusingDisk

ROOT = Path(__file__).parents[1]
HOLDER = textwrap.dedent("""
    import sys
    from streamtrain.run_folder import RunFolder
    folder = RunFolder(sys.argv[1])
    folder.lock()
    print("held", flush=True)
    sys.stdin.read()
    {at_the_end}
""")


@contextmanager
def held(path: Path, at_the_end: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process holds the folder while the block lasts."""
    command = [sys.executable, "-c", HOLDER.format(at_the_end=at_the_end), str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_folder_that_a_living_process_holds_is_refused_with_its_pid_and_since_when(tmp_path: Path) -> None:
    with held(tmp_path / "run") as holder, pytest.raises(EnvironmentProblem) as caught:
        RunFolder(tmp_path / "run").lock()
    said = f"the run folder {tmp_path}/run is in use by process {holder.pid} since "
    assert str(caught.value).startswith(said)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", str(caught.value).removeprefix(said))
    assert caught.value.hint


def test_kill_9_frees_the_folder(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        holder.kill()
        holder.wait()
        with RunFolder(tmp_path) as folder:
            assert json.loads((folder.path / LOCK).read_text())["pid"] == os.getpid()


def test_a_release_frees_the_folder_for_others_while_a_fork_lives(tmp_path: Path) -> None:
    fork = "import os, signal; child = os.fork(); child or signal.pause(); folder.release(); print(child, flush=True)"
    with held(tmp_path, fork + "; sys.stdin.close(); signal.pause()") as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.close()
        child = int(holder.stdout.readline())
        try:
            RunFolder(tmp_path).lock()
        finally:
            os.kill(child, 9)


def test_the_same_process_does_not_get_it_twice(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(EnvironmentProblem, match=rf"this very process \({os.getpid()}\)"):
        RunFolder(tmp_path).lock()
    with RunFolder(tmp_path):
        pass


def test_locking_and_releasing_twice_does_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.lock()
    folder.lock()
    folder.release()
    folder.release()
    assert (tmp_path / LOCK).read_text() == ""


def test_a_lock_that_somebody_removes_lets_nobody_in(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        (tmp_path / LOCK).unlink()
        with pytest.raises(EnvironmentProblem, match=r"in use by another process, whose \.lock somebody has removed"):
            RunFolder(tmp_path).lock()
        holder.kill()
        holder.wait()
        with RunFolder(tmp_path):
            pass


def test_a_folder_that_is_moved_removed_or_replaced_is_noticed_and_a_lock_file_that_is_removed_is_no_matter(
    tmp_path: Path,
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with RunFolder(run) as folder:
        folder.check()
        (run / LOCK).unlink()
        folder.check()
        run.rename(elsewhere)
        with pytest.raises(EnvironmentProblem, match=f"the run folder {run} was moved or removed"):
            folder.check()
        with RunFolder(run), pytest.raises(EnvironmentProblem, match="was moved or removed"):
            folder.check()
    with RunFolder(elsewhere):
        pass


def test_a_folder_that_was_put_in_its_place_is_not_written_to(tmp_path: Path) -> None:
    """Its status was that of the run that had been moved away, and so was the error in which that ended."""
    run = tmp_path / "run"
    with RunFolder(run) as folder:
        run.rename(tmp_path / "elsewhere")
        with RunFolder(run) as other:
            other.write_status({"step": 1})
            with pytest.raises(EnvironmentProblem, match="was moved or removed"):
                folder.write_status({"step": 2})
            with pytest.raises(EnvironmentProblem, match="was moved or removed"):
                folder.write_error(ValueError("mine"))
    assert json.loads((run / "status.json").read_text()) == {"step": 1}
    assert sorted(path.name for path in run.iterdir()) == [LOCK, "status.json"]


def test_the_error_of_a_life_before_is_removed_or_it_is_said_why_not(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_error(ValueError("once"))
        folder.forget_error()
        folder.forget_error()
        assert not (tmp_path / "error.json").exists()
        (tmp_path / "error.json").mkdir()
        with pytest.raises(EnvironmentProblem, match=rf"{tmp_path}/error\.json can't be removed: Is a directory"):
            folder.forget_error()


def test_where_folders_can_t_be_locked_the_file_in_it_is(tmp_path: Path) -> None:
    class Nfs(LocalDisk):
        def lock(self, fd: int) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            super().lock(fd)

    with RunFolder(tmp_path, disk=Nfs()) as folder:
        folder.check()
        with pytest.raises(EnvironmentProblem, match="is in use by this very process"):
            RunFolder(tmp_path, disk=Nfs()).lock()
        (tmp_path / LOCK).write_text("of another run")
        with pytest.raises(EnvironmentProblem, match="was moved or removed"):
            folder.check()


def test_what_a_life_left_that_ended_in_a_replacement_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in (".error.json.tmp", ".metrics.csv.tmp", "mine.tmp", ".hidden"):
        (tmp_path / name).write_text("{")
    with RunFolder(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".hidden", LOCK, "mine.tmp"]


def test_a_file_that_finds_no_room_leaves_nothing_beside_it(tmp_path: Path) -> None:
    class Full(LocalDisk):
        def write(self, fd: int, data: memoryview) -> int:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    with RunFolder(tmp_path):
        with pytest.raises(EnvironmentProblem, match=r"error\.json can't be written: File too large"):
            RunFolder(tmp_path, disk=Full()).write_error(ValueError("no"))
        assert os.listdir(tmp_path) == [LOCK]


async def test_a_status_that_can_t_be_written_is_said_when_that_begins_and_not_each_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Disk(LocalDisk):
        broken = True

        def open(self, path: Path, flags: int) -> int:
            if self.broken:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return super().open(path, flags)

    disk = Disk()
    async with file_thread() as files:
        status = StatusFile(files, RunFolder(tmp_path, disk=disk))
        for disk.broken, said in ((True, 1), (True, 1), (False, 1), (True, 2)):
            status.write({"step": 1})
            await status.written()
            assert caplog.text.count("status.json can't be written") == said
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 1


def test_nothing_is_made_before_the_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    with folder:
        assert os.listdir(tmp_path / "a" / "b") == [LOCK]
    assert folder.checkpoints == tmp_path / "a" / "b" / "checkpoints"


def test_a_damaged_lock_file_still_locks(tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        for text in ("", "{", "[]", '{"pid": "x"}', '{"pid": 1}', '{"pid": 1e999}', "[" * 4096):
            (tmp_path / LOCK).write_text(text)
            with pytest.raises(EnvironmentProblem, match="in use by another process"):
                RunFolder(tmp_path).lock()


def test_a_number_that_no_process_has_is_of_none(tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        holder = {"pid": 10**30, "since": "today", "host": socket.gethostname()}
        (tmp_path / LOCK).write_text(json.dumps(holder))
        with pytest.raises(EnvironmentProblem, match=r"a child of process 10{30}, which itself has ended"):
            RunFolder(tmp_path).lock()


def test_a_holder_on_another_host_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path):
        (tmp_path / LOCK).write_text('{"pid": 7, "since": "today", "host": "elsewhere"}')
        with pytest.raises(EnvironmentProblem, match="process 7 on elsewhere since today"):
            RunFolder(tmp_path).lock()


@pytest.mark.parametrize("name", ["file", "file/run", "dangling", "/proc/streamtrain", "/sys/streamtrain/run"])
def test_a_folder_that_cannot_be_made_is_refused_with_the_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    path = tmp_path / name
    with pytest.raises(EnvironmentProblem, match=f"the run folder {path} can't be written: "):
        RunFolder(path).lock()


@pytest.mark.parametrize("at", range(5))
def test_whatever_the_disk_refuses_is_said_with_path_and_cause_and_leaves_nothing_open(tmp_path: Path, at: int) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    folder = RunFolder(tmp_path / "run", disk=RefusingDisk(LOCAL, at))
    with pytest.raises(EnvironmentProblem, match=f"the run folder {tmp_path}/run can't be written: Input/output error"):
        folder.lock()
    assert len(os.listdir("/proc/self/fd")) == open_before
    with RunFolder(tmp_path / "run"):
        pass


def test_a_power_cut_leaves_a_committed_checkpoint_and_all_folders_above_it() -> None:
    disk = MemoryDisk()
    folder = RunFolder("/runs/mine/one", disk=disk)
    folder.lock()
    snapshot = Snapshot(model={"weight": torch.ones(2)}, optimizer={}, state={"step": 1})
    checkpoint.commit(folder.checkpoints / "step-000000001", snapshot, disk=disk)
    images = list(disk.images())
    found = [checkpoint.newest_valid(folder.checkpoints, disk=MemoryDisk(image)) for image in images]
    assert images
    assert [entry and entry.step for entry in found] == [1] * len(images)


def test_a_folder_beside_which_nothing_may_be_listed_is_taken_and_what_that_costs_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in one of mode 1733; root may list those too."""

    class Closed(LocalDisk):
        def open(self, path: Path, flags: int) -> int:
            if path == tmp_path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return super().open(path, flags)

    with RunFolder(tmp_path / "run", disk=Closed()) as folder:
        folder.write_config("seed = 1")
    assert f"{tmp_path} can't be read (Permission denied): a power cut soon may take the new folder run" in caplog.text


def test_a_power_cut_leaves_the_error_and_the_configuration() -> None:
    disk = MemoryDisk()
    folder = RunFolder("/one", disk=disk)
    folder.lock()
    folder.write_config("seed = 1")
    folder.write_error(DataError("gone"))
    images = list(disk.images())
    assert images
    for image in images:
        assert {"config.toml", "error.json"} <= set(MemoryDisk(image).names(folder.path))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_apart_from_permissions(tmp_path: Path, code: int) -> None:
    with pytest.raises(EnvironmentProblem, match="can't be written: ") as told:
        RunFolder(tmp_path / "run", disk=RefusingDisk(LOCAL, 0, code)).lock()
    assert told.value.hint == "make room, or choose another run_dir"


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        path = tmp_path / "status.json"
        folder.write_status({"step": 0})
        done = threading.Event()
        seen: set[int] = set()

        def watch() -> None:
            while not done.is_set():
                seen.add(json.loads(path.read_text())["step"])

        watcher = threading.Thread(target=watch)
        watcher.start()
        for step in range(500):
            folder.write_status({"step": step, "filler": "x" * (step * 37 % 5000)})
        done.set()
        watcher.join()
    assert seen <= set(range(500))
    assert json.loads(path.read_text())["step"] == 499
    assert sorted(os.listdir(tmp_path)) == [LOCK, "status.json"]


def test_a_status_is_json_whatever_it_holds(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_status({"loss": float("nan"), "lr": [1.0, float("-inf")], "path": tmp_path, "pair": (1, 2)})
    text = (tmp_path / "status.json").read_text()
    assert json.loads(text) == {"loss": None, "lr": [1.0, None], "path": str(tmp_path), "pair": [1, 2]}


def test_an_error_is_kept_with_hint_and_traceback(tmp_path: Path) -> None:
    try:
        raise DataError("chunk 3 is cut", hint="fetch it again") from OSError("cause")
    except DataError as error:
        with RunFolder(tmp_path) as folder:
            folder.write_error(error)
    kept = json.loads((tmp_path / "error.json").read_text())
    assert (kept["type"], kept["message"], kept["hint"], kept["exit_code"]) == (
        "DataError",
        "chunk 3 is cut",
        "fetch it again",
        3,
    )
    assert "OSError: cause" in kept["traceback"]


def test_any_error_can_be_kept(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_error(KeyboardInterrupt())
    assert json.loads((tmp_path / "error.json").read_text())["exit_code"] == 1


def test_a_configuration_is_kept_as_it_is(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_config('name = "größe"\n')
    assert (tmp_path / "config.toml").read_text(encoding="utf-8") == 'name = "größe"\n'


def test_a_file_that_cannot_be_written_is_an_error_with_its_path(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        (tmp_path / "status.json").mkdir()
        with pytest.raises(EnvironmentProblem, match=r"status\.json can't be written: Is a directory"):
            folder.write_status({})
