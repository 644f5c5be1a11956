"""SIGKILL before every system call by which a save changes the disk, by strace: what is left must be gone on from.

A process forked from this one waits; strace takes hold of it (`-p PID -e inject=SYSCALL:signal=KILL:when=N`), and it
goes on: it sweeps, commits a checkpoint, prunes and commits the same step anew. First it is left alone, to list its
calls; then it dies before each of them, one process a call. Each time the newest checkpoint must be the last one of
which it was told that it is committed, or the one after, to the bit; and the next life must do the same work to its
end. Then whole fits die so, and must end with the weights of the one that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from streamtrain import checkpoint, resume
from streamtrain.errors import EnvironmentProblem, StreamtrainError
from streamtrain.state import Snapshot
from tests.bench import kills
from tests.bench.measure import Measure, Options

CALLS: tuple[str, ...] = ("mkdir", "mkdirat", "openat", "write", "writev", "pwrite64", "fsync", "fdatasync", "rename")
CALLS += ("renameat", "renameat2", "unlink", "unlinkat", "rmdir", "ftruncate", "flock")
"""What changes a disk, or who may; of openat only where it makes or empties a file."""
LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)")
FITS = 24
DEATHS = (("fsync", 40), ("rename", 10), ("mkdir", 8), ("unlinkat", 30), ("write", 60), ("rmdir", 6))
"""Before which calls fits die, the first of a thread to the so manyth."""
SLOW = 30.0
"""Seconds until strace must have taken hold."""


def run(options: Options) -> Iterator[Measure]:
    """Every call of the small program, some of whole fits. Raises EnvironmentProblem where nothing can be traced."""
    with options.room() as room:
        _check(room)
        yield from small(room, every=5 if options.quick else 1)
        if not options.quick:
            yield from whole(room)


def _check(room: Path) -> None:
    """Raise EnvironmentProblem without strace, or where it may not trace."""
    if shutil.which("strace") is None:
        raise EnvironmentProblem("there is no strace", hint="apt-get install strace")
    code, _ = traced(room / "check", lambda: None, "trace=flock")
    if code != 0:
        raise EnvironmentProblem("strace may not trace here", hint="ptrace must be allowed (CAP_SYS_PTRACE)")


def traced(log: Path, work: Callable[[], object], *expressions: str) -> tuple[int, list[str]]:
    """Do this in a process under strace: its exit code (-9: it was killed), and what it was seen to do."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        code = 70
        try:
            os.close(writing)
            os.read(reading, 1)
            work()
            code = 0
        finally:
            os._exit(code)
    os.close(reading)
    wanted = [part for each in expressions for part in ("-e", each)]
    command = ["strace", "-f", "-qq", "-s", "0", "-o", str(log), "-p", str(process), *wanted]
    watcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while "TracerPid:\t0" in Path(f"/proc/{process}/status").read_text() and time.monotonic() - began < SLOW:
        if watcher.poll() is not None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            os.close(writing)
            return 70, []
        time.sleep(0.001)
    os.write(writing, b"!")
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    watcher.wait()
    return code, log.read_text().splitlines() if log.exists() else []


# ---- the small program


def snapshot(step: int) -> Snapshot:
    """A state that is another at each step."""
    weight = torch.full((1000,), float(step))
    return Snapshot({"a": weight, "tied": weight}, {"m": torch.full((500,), float(step))}, {"step": min(step, 3)})


def prepared(checkpoints: Path) -> None:
    """Two checkpoints, and what a save that died has left."""
    for step in (1, 2):
        checkpoint.commit(checkpoints / f"step-{step:09d}", snapshot(step))
    left = checkpoints / ".tmp-step-000000003-0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")


def work(checkpoints: Path) -> None:
    """What a fit does to its checkpoints: sweep, commit, prune, and a step that is saved twice."""
    checkpoint.sweep(checkpoints)
    path = checkpoints / "step-000000003"
    checkpoint.commit(path, snapshot(3), replace=True)
    _told(checkpoints, 3)
    checkpoint.prune(checkpoints, {"step-000000002", path.name})
    checkpoint.commit(path, snapshot(4), replace=True)
    _told(checkpoints, 4)


def _told(checkpoints: Path, step: int) -> None:
    """Say that this one is committed, by a call that nobody looks for."""
    with contextlib.suppress(FileExistsError):
        os.mknod(checkpoints.parent / f"{checkpoints.name}-told-{step}")


def _may_be(checkpoints: Path) -> set[int]:
    """What the newest may be: the last of which it was told that it is committed, or the one after."""
    told = [int(path.name[-1]) for path in checkpoints.parent.glob(f"{checkpoints.name}-told-*")]
    last = max(told, default=2)
    return {last, min(last + 1, 4)}


def changing(lines: list[str]) -> Iterator[tuple[str, int]]:
    """The calls that change something, each with how many of its name there were by then."""
    seen = Counter[str]()
    for line in lines:
        match = LINE.match(line)
        if match is not None:
            seen[match[1]] += 1
            if match[1] != "openat" or "O_CREAT" in match[2] or "O_TRUNC" in match[2]:
                yield match[1], seen[match[1]]


def small(room: Path, *, every: int) -> Iterator[Measure]:
    """Die before each call in turn."""
    prepared(room / "base")
    shutil.copytree(room / "base", room / "left")
    trace = f"trace={','.join(CALLS)}"
    code, lines = traced(room / "log", lambda: work(room / "left"), trace)
    assert code == 0, lines
    calls = list(changing(lines))
    killed, bad = Counter[str](), 0
    for name, number in calls[::every]:
        folder = room / "dies"
        shutil.copytree(room / "base", folder)
        code, seen = traced(room / "log", partial(work, folder), trace, f"inject={name}:signal=KILL:when={number}")
        problem = f"exit {code}" if code != -signal.SIGKILL else judged(folder)
        killed[name] += 1
        if problem:
            bad += 1
            print(f"{name} {number}: {problem}; {seen[-3:]}", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
        for path in room.glob("dies-told-*"):
            path.unlink()
    yield Measure(name="calls by which one save changes the disk", values=(len(calls),), at_least=20)
    for name, count in killed.items():
        yield Measure(name=f"  SIGKILL before {name}", values=(count,))
    yield Measure(name="of these, not resumed", values=(bad,), at_most=0)


def judged(checkpoints: Path) -> str:
    """What is wrong with what a death left; nothing is."""
    try:
        found = resume.find(checkpoints, "auto")
        if found is None:
            return "nothing is left"
        path, read = found
        may_be = _may_be(checkpoints)
        if not any(_same(read, snapshot(step)) for step in may_be):
            return f"{path.name} is none of {may_be}"
        work(checkpoints)
        if any(entry.problem for entry in checkpoint.scan(checkpoints)):
            return "a damaged one stays"
    except StreamtrainError as error:
        return str(error)
    names = sorted(os.listdir(checkpoints))
    if names != ["step-000000002", "step-000000003"] or not _same(checkpoint.read(checkpoints / names[1]), snapshot(4)):
        return f"the next life leaves {names}"
    return ""


def _same(one: Snapshot, other: Snapshot) -> bool:
    tensors = torch.equal(one.model["a"], other.model["a"]) and torch.equal(one.optimizer["m"], other.optimizer["m"])
    return tensors and one.state == other.state


# ---- whole fits


def whole(room: Path) -> Iterator[Measure]:
    """Die before some calls of each kind, at random, in a fit; then train to the end."""
    store, rng = kills.made(room), random.Random(1)
    undisturbed = kills.Run(room / "whole", rng, 1)
    undisturbed.live(store)
    killed, late, other = 0, 0, 0
    for number in range(FITS):
        (name, most), folder = DEATHS[number % len(DEATHS)], room / f"fit-{number}"
        folder.mkdir()
        kill = f"inject={name}:signal=KILL:when={rng.randint(1, most)}"
        code, _ = traced(room / "log", partial(kills.lived, store, folder), f"trace={name}", kill)
        killed += code == -signal.SIGKILL
        late += code == -signal.SIGKILL and any((folder / "run" / "checkpoints").glob("step-*"))
        rest = kills.Run(folder, rng, 1)
        rest.live(store)
        same = rest.codes == [0] and rest.digest == undisturbed.digest and rest.lines == undisturbed.lines
        other += not same or not undisturbed.digest
    yield Measure(name="fits killed before a call", values=(killed,), at_least=0.75 * FITS)
    yield Measure(name="after the first commit", values=(late,), at_least=killed / 3)
    yield Measure(name="with other weights or metrics at the end", values=(other,), at_most=0)
