"""Committed means durable and verified: whole or not there, whatever dies, fills up or flips in between."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streamtrain import checkpoint
from streamtrain.checkpoint_files import FILES, MANIFEST, MODEL, OPTIMIZER, STATE
from streamtrain.disk import LocalDisk
from streamtrain.errors import CheckpointError, EnvironmentProblem
from streamtrain.state import Snapshot
from tests import warm

ROOT = Path(__file__).parents[1]


def snapshot(step: int = 1, *, size: int = 4, **state: Any) -> Snapshot:
    weight = torch.full((size,), float(step))
    return Snapshot(
        model={"embed": weight, "head": weight, "mean": torch.arange(3)},
        optimizer={"state": {0: {"exp_avg": torch.ones(size), "step": 3}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        state={"step": step, "rng": torch.arange(5, dtype=torch.uint8), **state},
    )


def put(checkpoints: Path, *steps: int) -> list[Path]:
    return [checkpoint.commit(checkpoints / f"step-{step:09}", snapshot(step)).path for step in steps]


def problems(checkpoints: Path, *, deep: bool = True) -> dict[str, str | None]:
    return {entry.name: entry.problem for entry in checkpoint.scan(checkpoints, deep=deep)}


def test_what_is_committed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "step-000000007"
    committed = checkpoint.commit(path, snapshot(7))
    read = checkpoint.read(path)
    assert torch.equal(read.model["embed"], torch.full((4,), 7.0))
    assert read.model["embed"].data_ptr() == read.model["head"].data_ptr()
    assert read.optimizer["param_groups"] == [{"betas": (0.9, 0.999)}]
    assert torch.equal(read.optimizer["state"][0]["exp_avg"], torch.ones(4))
    assert read.state["step"] == 7
    assert sorted(os.listdir(path)) == sorted([*FILES, MANIFEST])
    assert committed.bytes == sum(file.stat().st_size for file in path.iterdir())
    assert os.listdir(path.parent) == [path.name]


def test_the_model_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    (path,) = put(tmp_path, 3)
    assert {name: list(tensor) for name, tensor in load_file(path / MODEL).items()} == {
        "embed": [3.0] * 4,
        "mean": [0, 1, 2],
    }


def test_a_model_may_keep_more_than_tensors(tmp_path: Path) -> None:
    model: dict[str, Any] = {"weight": torch.ones(2), "_extra_state": 7, "$odd": torch.ones(1), "nested": {"a": [1.5]}}
    checkpoint.commit(tmp_path / "step-1", Snapshot(model, {}, {}))
    read: dict[str, Any] = checkpoint.read(tmp_path / "step-1").model
    assert (list(read), read["_extra_state"], read["nested"]) == (list(model), 7, {"a": [1.5]})


def test_equal_snapshots_are_equal_files(tmp_path: Path) -> None:
    one, other = (checkpoint.commit(tmp_path / name, snapshot(3)).path for name in ("a", "b"))
    assert [(one / name).read_bytes() == (other / name).read_bytes() for name in (*FILES, MANIFEST)] == [True] * 4


def test_a_taken_name_is_refused_and_what_stands_there_stays(tmp_path: Path) -> None:
    (path,) = put(tmp_path, 1)
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.commit(path, snapshot(2))
    assert checkpoint.read(path).state["step"] == 1
    assert os.listdir(tmp_path) == [path.name]


def test_a_replaced_checkpoint_is_the_new_one(tmp_path: Path) -> None:
    (path,) = put(tmp_path, 1)
    (path / "notes.txt").write_text("of the old one")
    checkpoint.commit(path, snapshot(2), replace=True)
    assert checkpoint.read(path).state["step"] == 2
    assert os.listdir(tmp_path) == [path.name]
    assert not (path / "notes.txt").exists()


def test_two_commits_of_one_name_leave_one_whole(tmp_path: Path) -> None:
    errors: list[CheckpointError] = []

    def commit(step: int) -> None:
        try:
            checkpoint.commit(tmp_path / "step-1", snapshot(1, life=step))
        except CheckpointError as error:
            errors.append(error)

    threads = [threading.Thread(target=commit, args=(step,)) for step in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert problems(tmp_path) == {"step-1": None}


def test_what_cannot_be_kept_is_refused_by_its_path_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^state\.callbacks\[0\]: a set can't be kept"):
        checkpoint.commit(tmp_path / "run" / "step-1", snapshot(callbacks=[{1}]))
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    (path,) = put(tmp_path, 1)
    for name in (*FILES, MANIFEST):
        whole = (path / name).read_bytes()
        with open(path / name, "r+b", buffering=0) as file:
            for position, byte in enumerate(whole):
                os.pwrite(file.fileno(), bytes([byte ^ (1 << position % 8)]), position)
                problem = problems(tmp_path)[path.name]
                assert problem is not None, (name, position)
                assert problem.startswith(name)
                os.pwrite(file.fileno(), bytes([byte]), position)
    assert problems(tmp_path) == {path.name: None}


def test_every_other_length_is_noticed(tmp_path: Path) -> None:
    (path,) = put(tmp_path, 1)
    for name in (*FILES, MANIFEST):
        whole = (path / name).read_bytes()
        for content in [*(whole[:length] for length in range(len(whole))), whole + b"\n", whole + b"\0"]:
            (path / name).write_bytes(content)
            problem = problems(tmp_path, deep=False)[path.name]
            assert problem is not None, (name, len(content))
            assert problem.startswith(name)
        (path / name).write_bytes(whole)
    assert problems(tmp_path) == {path.name: None}


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_file_that_is_no_file_is_noticed(tmp_path: Path, name: str) -> None:
    (path,) = put(tmp_path, 1)
    (path / name).unlink()
    assert problems(tmp_path) == {path.name: f"{name}, it is missing"}
    os.mkfifo(path / name)
    assert problems(tmp_path) == {path.name: f"{name}, it is no regular file"}
    (path / name).unlink()
    (path / name).mkdir()
    assert problems(tmp_path) == {path.name: f"{name}, it is no regular file"}
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read(path)


def forge(path: Path, contents: dict[str, bytes], **more: Any) -> None:
    """A folder whose manifest fits whatever its files hold."""
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in contents.items()}
    document = {"format": 1, "files": listed, **more}
    digest = hashlib.sha256(_canonical(document)).hexdigest()
    (path / MANIFEST).write_bytes(_canonical({**document, "sha256": digest}))


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, ("/tmp/streamtrain-was-fooled",)


def genuine(tmp_path: Path) -> dict[str, bytes]:
    path = checkpoint.commit(tmp_path / "genuine", snapshot(1)).path
    return {name: (path / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_a_checkpoints_clothes_is_refused_unread(tmp_path: Path, name: str) -> None:
    path = tmp_path / "step-000000009"
    forge(path, {**genuine(tmp_path), name: pickle.dumps(Malicious())})
    with pytest.raises(CheckpointError, match=f"{name}, "):
        checkpoint.read(path)
    assert not os.path.exists("/tmp/streamtrain-was-fooled")


def test_a_pickled_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "step-000000009"
    torch.save({"model": Malicious()}, path)
    with pytest.raises(CheckpointError, match=r"step-000000009, is a file, not .*never loaded"):
        checkpoint.read(path)
    assert "never loaded" in str(problems(tmp_path)["step-000000009"])
    assert not os.path.exists("/tmp/streamtrain-was-fooled")


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"model": {}, "optimizer": {}}',
        b"{'model': 1}",
        b'{"model": [], "optimizer": {}, "state": {}}',
        b'{"model": 1, "optimizer": {}, "state": {}}',
    ],
    ids=range(9),
)
def test_a_state_that_fits_its_digest_but_nothing_else_is_refused(tmp_path: Path, state: bytes) -> None:
    forge(tmp_path / "step-1", {**genuine(tmp_path), STATE: state})
    with pytest.raises(CheckpointError, match=r"step-1: state\.json, "):
        checkpoint.read(tmp_path / "step-1")


def test_a_reference_to_nothing_is_refused_by_its_path(tmp_path: Path) -> None:
    state = json.dumps({"model": {}, "optimizer": {"a": [{"$tensor": "x"}]}, "state": {}}).encode()
    forge(tmp_path / "step-1", {**genuine(tmp_path), STATE: state})
    with pytest.raises(CheckpointError, match=r"state\.json, optimizer\.a\[0\]: .*'x', which is not there"):
        checkpoint.read(tmp_path / "step-1")


def test_a_newer_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    forge(tmp_path / "step-1", {"weights.bin": b""}, format=2)
    assert "format 2 is newer than this streamtrain reads (1): update" in str(problems(tmp_path)["step-1"])


@pytest.mark.parametrize(
    "more",
    [
        {"files": {}},
        {"files": []},
        {"files": None},
        {"files": {name: {} for name in FILES}},
        {"files": {name: {"sha256": "", "bytes": "1"} for name in FILES}},
        {"files": dict.fromkeys(FILES, 3)},
        {"format": 0},
        {"format": None},
        {"format": "1"},
    ],
    ids=repr,
)
def test_a_manifest_that_fits_only_itself_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    forge(tmp_path / "step-1", genuine(tmp_path), **more)
    with pytest.raises(CheckpointError, match=r"manifest\.json, it is not of format 1"):
        checkpoint.read(tmp_path / "step-1")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"3",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"format": []}',
        b"\xff",
        b'{"format": NaN}',
        b'{"format": 1, "step": 1e999}',
    ],
    ids=range(10),
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    (path,) = put(tmp_path, 1)
    (path / MANIFEST).write_bytes(text)
    assert str(problems(tmp_path)[path.name]).startswith("manifest.json, it")


def test_a_state_with_more_than_it_should_hold_is_refused(tmp_path: Path) -> None:
    (path,) = put(tmp_path, 1)
    contents = {name: (path / name).read_bytes() for name in FILES}
    contents[STATE] = json.dumps({**json.loads(contents[STATE]), "hook": 1}).encode()
    forge(tmp_path / "forged", contents)
    with pytest.raises(CheckpointError, match=r"forged: state.json, nobody knows its hook"):
        checkpoint.read(tmp_path / "forged")


@pytest.mark.parametrize("path", ["absent", "file"])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"checkpoint .*/{path}: ") as caught:
        checkpoint.read(tmp_path / path)
    assert caught.value.hint


def test_scanning_lists_by_step_and_only_what_has_the_name(tmp_path: Path) -> None:
    put(tmp_path, 10, 9, 1_000_000_000)
    for other in ("step-x", ".tmp-step-000000001-0123abcd", "best", "step-5.bak"):
        (tmp_path / other).mkdir()
    entries = checkpoint.scan(tmp_path)
    assert [entry.step for entry in entries] == [9, 10, 1_000_000_000]
    assert all(entry.problem is None and entry.bytes > 0 for entry in entries)
    assert checkpoint.scan(tmp_path / "absent") == []


def test_the_newest_valid_one_is_found_and_the_damaged_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoint.newest_valid(tmp_path) is None
    put(tmp_path, 1, 2, 5)
    (tmp_path / "step-000000005" / OPTIMIZER).unlink()
    found = checkpoint.newest_valid(tmp_path)
    assert found is not None
    assert found.step == 2
    assert "optimizer.safetensors, it is missing" in caplog.text
    assert "repeats 3 steps" in caplog.text


@pytest.mark.parametrize("verified", [(), ("step-000000099",)], ids=["deep", "by sizes"])
def test_an_older_one_under_a_newer_name_is_not_taken_for_it(tmp_path: Path, verified: tuple[str, ...]) -> None:
    put(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step-000000001", tmp_path / "step-000000099")
    told = [entry.problem for entry in checkpoint.scan(tmp_path, verified=verified)]
    assert told[:2] == [None, None]
    assert "it is of step 1" in str(told[2])
    found = checkpoint.newest_valid(tmp_path)
    assert found is not None
    assert found.step == 2


def test_if_none_is_valid_each_reason_is_told(tmp_path: Path) -> None:
    one, other = put(tmp_path, 1, 2)
    (one / MANIFEST).write_bytes(b"{}")
    shutil.rmtree(other)
    other.mkdir()
    reasons = "step-000000002: manifest.json, it is missing; step-000000001: manifest.json, it is no manifest"
    with pytest.raises(CheckpointError, match=reasons):
        checkpoint.newest_valid(tmp_path)


def test_pruning_keeps_what_is_named_and_never_everything_away(tmp_path: Path) -> None:
    paths = put(tmp_path, 1, 2, 3)
    (tmp_path / "other").mkdir()
    assert checkpoint.prune(tmp_path, {"absent"}) == []
    assert checkpoint.prune(tmp_path, {paths[1].name}) == [paths[0].name, paths[2].name]
    assert sorted(os.listdir(tmp_path)) == ["other", paths[1].name]


def test_sweeping_takes_leftovers_but_no_living_commit(tmp_path: Path) -> None:
    put(tmp_path, 1)
    living, dead = tmp_path / ".tmp-step-000000002-0123abcd", tmp_path / ".tmp-step-000000003-0123abcd"
    living.mkdir()
    dead.mkdir()
    (dead / MODEL).write_bytes(b"half")
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert checkpoint.sweep(tmp_path) == [dead.name]
    os.close(descriptor)
    assert checkpoint.sweep(tmp_path) == [living.name]
    assert os.listdir(tmp_path) == ["step-000000001"]
    assert checkpoint.sweep(tmp_path / "absent") == []


def test_sweeping_after_one_checkpoint_leaves_those_of_others(tmp_path: Path) -> None:
    mine, other = tmp_path / ".tmp-mine-0123abcd", tmp_path / ".tmp-mine2-0123abcd"
    for left in (mine, other):
        left.mkdir()
        (left / MODEL).write_bytes(b"half")
    assert checkpoint.sweep(tmp_path, of="mine") == [mine.name]
    assert os.listdir(tmp_path) == [other.name]


def test_a_process_that_may_open_no_more_files_takes_no_checkpoint_for_damaged(tmp_path: Path) -> None:
    class Spent(LocalDisk):
        def open(self, path: Path, flags: int) -> int:
            if path.parent.name == "step-000000002" and path.name != MANIFEST:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().open(path, flags)

    put(tmp_path, 1, 2)
    with pytest.raises(EnvironmentProblem, match="can't be opened: Too many open files") as caught:
        checkpoint.read_newest(tmp_path, disk=Spent())
    assert "ulimit -n" in caught.value.hint


@pytest.mark.parametrize(
    ("code", "cause", "hint"),
    [
        (errno.ENOSPC, "the disk is full", "make room"),
        (errno.EDQUOT, "the quota is used up", "quota"),
        (errno.EFBIG, "a file would be larger than is allowed", "ulimit -f"),
        (errno.EMFILE, "too many files are open", "ulimit -n"),
        (errno.EROFS, "nothing may be written there", "permissions"),
        (errno.EIO, "the disk refuses", "another disk"),
    ],
)
def test_what_refuses_a_checkpoint_is_told_from_a_full_disk(tmp_path: Path, code: int, cause: str, hint: str) -> None:
    class Refusing(LocalDisk):
        def write(self, fd: int, data: memoryview) -> int:
            raise OSError(code, os.strerror(code))

    with pytest.raises(EnvironmentProblem, match=f"^{cause}: checkpoint ") as caught:
        checkpoint.commit(tmp_path / "step-000000001", snapshot(1), disk=Refusing())
    assert hint in caught.value.hint


def test_a_checkpoint_whose_successor_did_not_arrive_gets_its_name_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = put(tmp_path, 1)
    path.rename(tmp_path / f".old-{path.name}-0123abcd")
    assert checkpoint.sweep(tmp_path) == []
    assert problems(tmp_path) == {path.name: None}
    assert "the old one stands" in caplog.text


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1, 100, 5000, 9000])
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path, limit: int) -> None:
    (path,) = put(tmp_path, 1)
    with files_of_at_most(limit), pytest.raises(EnvironmentProblem, match=r"needs [\d,]+ bytes, [\d,]+ bytes are free"):
        checkpoint.commit(path, snapshot(2, size=2500), replace=True)
    assert checkpoint.read(path).state["step"] == 1
    assert os.listdir(tmp_path) == [path.name]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        put(tmp_path, 1)
        with pytest.raises(EnvironmentProblem, match=r"the disk is full: .* the checkpoints before it are untouched"):
            checkpoint.commit(tmp_path / "step-2", snapshot(2, size=20_000))
        assert problems(tmp_path) == {"step-000000001": None}
        assert os.listdir(tmp_path) == ["step-000000001"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


CHILD = textwrap.dedent("""
    # Dies by kill -9 before every other system call that a commit or a prune makes, one life a call.
    import os, signal, sys
    from pathlib import Path
    from streamtrain import checkpoint
    from streamtrain.disk import LocalDisk
    from tests.test_checkpoint import snapshot

    class NoSwap(LocalDisk):  # a file system that can't swap names
        def exchange(self, one, other):
            return False

    def act(what, folder):
        if what.startswith("replace"):
            disk = NoSwap() if what == "replace by two renames" else LocalDisk()
            checkpoint.commit(folder / "step-000000001", snapshot(1, life=2), replace=True, disk=disk)
        elif what == "add":
            checkpoint.commit(folder / "step-000000002", snapshot(2))
        else:
            checkpoint.prune(folder, {"step-000000001"})

    seen = 0
    def profile(frame, event, function):
        global seen
        if event == "c_call" and function.__module__ in ("posix", "fcntl"):
            seen += 1
            if seen == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    for what in sys.argv[2:]:
        for fatal in range(1, 200, 2):
            folder = Path(sys.argv[1]) / what / f"{fatal:03}"
            checkpoint.commit(folder / "step-000000001", snapshot(1))
            if what == "prune":
                checkpoint.commit(folder / "step-000000002", snapshot(2))
            child = os.fork()
            if child == 0:
                sys.setprofile(profile)
                act(what, folder)
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:  # it lived through all calls
                break
""")


ACTS = ["replace", "replace by two renames", "add", "prune"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of ACTS, with one for each instant at which it was killed."""
    root = tmp_path_factory.mktemp("killed")
    warm.run(["-c", CHILD, str(root), *ACTS], cwd=ROOT).check_returncode()
    return root


@pytest.mark.parametrize("what", ACTS)
def test_kill_9_at_any_instant_leaves_old_or_new_whole(killed: Path, what: str) -> None:
    outcomes = []
    for folder in sorted((killed / what).iterdir()):
        assert set(problems(folder).values()) <= {None}, "what has a checkpoint's name is whole"
        checkpoint.sweep(folder)
        assert all(name.startswith("step-") for name in os.listdir(folder)), "nothing half-made stays after a sweep"
        newest = checkpoint.newest_valid(folder)
        assert newest is not None
        state = checkpoint.read(newest.path).state
        outcomes.append((newest.step, state.get("life", state["step"])))
    assert len(outcomes) >= 10
    old, new = {"add": [(1, 1), (2, 2)], "prune": [(2, 2), (1, 1)]}.get(what, [(1, 1), (1, 2)])
    assert set(outcomes) == {old, new}
    assert outcomes[-1] == new


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from streamtrain import checkpoint
    from tests.test_checkpoint import snapshot

    print("ready", flush=True)
    for step in range(1, 1_000_000):
        checkpoint.commit(Path(sys.argv[1]) / "step-000000001", snapshot(step, size=300_000), replace=True)
        print(step, flush=True)
""")


def test_kill_9_in_the_middle_of_writing_leaves_what_was_said_to_stand(tmp_path: Path) -> None:
    for lines in (2, 3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(lines)]
        writer.kill()
        said += writer.stdout.readlines()
        writer.wait()
        writer.stdout.close()
        committed = int(said[-1])
        assert checkpoint.read(tmp_path / "step-000000001").state["step"] in (committed, committed + 1)
        checkpoint.sweep(tmp_path)
        assert os.listdir(tmp_path) == ["step-000000001"]
