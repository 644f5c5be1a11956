"""kill -9 at 200 instants, many of them within a save, several in one run: whether anything of it is ever seen.

Each life is a process of its own, forked from this one, which has imported everything and done nothing: so lives begin
at once. It is killed at a random time after its first update, or after a save has begun (its temp folder is there). A
kill was within a save if it leaves such a folder behind: that is the only trace of one. The run that was killed again
and again must end with the weights of the one that nobody disturbed, each step standing once in metrics.jsonl, and each
life after a commit must go on from a step of before.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from streamtrain import checkpoint
from tests.bench import life
from tests.bench.kill import GOES_ON
from tests.bench.measure import Measure, Options

ROWS, COLUMNS, EPOCHS, EVERY = 2000, 300, 6, 5
KILLS, IN_SAVES, LIVES = 200, 60, 5
TOGETHER = 2
"""Runs at a time."""


@dataclass
class Run:
    """One run, in several lives."""

    folder: Path
    rng: random.Random
    lives: int
    """At most, the last of which nobody ends."""
    kills: int = 0
    in_saves: int = 0
    late: int = 0
    """Kills after a commit."""
    astray: int = 0
    """Lives after a commit that trained, and did not say that they go on from a step above 0."""
    codes: list[int] = field(default_factory=list)
    digest: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        """Where they lie."""
        return self.folder / "run" / "checkpoints"

    def committed(self) -> bool:
        """Whether there is a checkpoint."""
        return any(self.checkpoints.glob("step-*"))

    def torn(self) -> set[str]:
        """Folders that a save has begun, or a removal."""
        return {path.name for path in self.checkpoints.glob(".*-step-*")} if self.checkpoints.is_dir() else set()

    def updates(self) -> int:
        """Bytes that all lives wrote down of their updates."""
        path = self.folder / "updates"
        return path.stat().st_size if path.exists() else 0

    def live(self, store: Path) -> None:
        """All its lives."""
        self.folder.mkdir(exist_ok=True)
        for number in range(self.lives):
            committed, updates = self.committed(), self.updates()
            process = born(store, self.folder)
            ended = number == self.lives - 1 or not self._end(process, updates)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            said = GOES_ON.search((self.folder / "err").read_text(errors="replace"))
            if committed and self.updates() > updates:
                self.astray += said is None or int(said[1]) == 0
            if ended or code == 0:
                self.codes.append(code)
                break
            self.kills += 1
            self.late += self.committed()
            self.in_saves += bool(self.torn())
        if self.codes == [0]:
            self.digest = (self.folder / "out").read_text().strip()
            rows = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
            self.lines = [json.dumps({key: value for key, value in row.items() if key != "time"}) for row in rows]

    def _end(self, process: int, updates: int) -> bool:
        """Kill this life; False if it is over before."""
        if not _until(process, lambda: self.updates() > updates):
            return False
        if self.rng.random() < 0.5:
            time.sleep(self.rng.random() * 0.5)
        else:
            time.sleep(self.rng.random() * 0.2)
            before = self.torn()
            if not _until(process, lambda: bool(self.torn() - before)):
                return False
            time.sleep(self.rng.random() ** 2 * 0.03)
        os.kill(process, signal.SIGKILL)
        return True


def _until(process: int, happens: object) -> bool:
    """Look again and again; False if the process is over before."""
    assert callable(happens)
    while not happens():
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.0005)
    return True


def born(store: Path, folder: Path) -> int:
    """The process of a life that trains in this folder, from wherever the last one got to."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        lived(store, folder)
        code = 0
    finally:
        os._exit(code)


def lived(store: Path, folder: Path) -> None:
    """Train in a process that is forked for this."""
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        torch.set_num_threads(1)  # lives side by side would wait for each other at barriers
        logging.basicConfig(level=logging.INFO, stream=open(2, "w", closefd=False), force=True)  # noqa: SIM115
        asyncio.run(life.main(str(store), folder, COLUMNS, EPOCHS, EVERY))
        newest = checkpoint.newest_valid(folder / "run" / "checkpoints")
        assert newest is not None
        told = life.digest(checkpoint.read(newest.path).model)
        assert told == (folder / "out").read_text().strip(), "the last checkpoint is not the model"
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        raise


def made(room: Path) -> Path:
    """The data, written by another process: it leaves threads behind, and forks take none along."""
    store, say = room / "store.zarr", "import sys; from data_tools.synth import synth; synth(sys.argv[1], "
    text = f"{say}rows={ROWS}, columns={COLUMNS}, chunk_rows=256, codec='zstd')"
    subprocess.run([sys.executable, "-c", text, str(store)], check=True)
    return store


def run(options: Options) -> Iterator[Measure]:
    """Runs until there are enough kills, two at a time."""
    needed, lives = (8, 3) if options.quick else (KILLS, LIVES)
    with options.room() as room:
        store = made(room)
        whole = Run(room / "whole", random.Random(0), 1)
        whole.live(store)
        runs: list[Run] = []
        while sum(each.kills for each in runs) < needed and len(runs) < needed:
            runs += _together(store, room, [len(runs) + number for number in range(TOGETHER)], lives)
    yield from report(whole, runs, needed)


def _together(store: Path, room: Path, numbers: list[int], lives: int) -> list[Run]:
    """Some runs at the same time, each watched by a process that tells what it saw."""
    watchers = []
    for number in numbers:
        reading, writing = os.pipe()
        if not (process := os.fork()):
            mine = Run(room / f"run-{number}", random.Random(number), lives)
            try:
                mine.live(store)
                told = [mine.kills, mine.in_saves, mine.late, mine.astray, mine.codes, mine.digest, mine.lines]
                os.write(writing, json.dumps(told).encode())
            finally:
                os._exit(0)
        os.close(writing)
        watchers.append((process, reading, number))
    runs = []
    for process, reading, number in watchers:
        with open(reading, "rb") as pipe:
            said = pipe.read()
        os.waitpid(process, 0)
        runs.append(Run(room / f"run-{number}", random.Random(number), lives, *json.loads(said)))
    return runs


def report(whole: Run, runs: list[Run], needed: int) -> Iterator[Measure]:
    """What came of them."""
    kills = sum(each.kills for each in runs)
    for each in runs:
        if each.codes != [0]:
            print(f"{each.folder.name}: exit {each.codes}", file=sys.stderr, flush=True)
    yield Measure(name="kills", values=(kills,), at_least=needed)
    yield Measure(name="in a save", values=(sum(e.in_saves for e in runs),), at_least=needed * IN_SAVES // KILLS)
    yield Measure(name="after the first commit", values=(sum(e.late for e in runs),), at_least=-(-kills // 3))
    yield Measure(name="later lives that begin anew, or do not say", values=(sum(e.astray for e in runs),), at_most=0)
    yield Measure(name="runs", values=(len(runs),))
    other = sum(each.digest != whole.digest or not whole.digest for each in runs)
    yield Measure(name="runs with other weights at the end", values=(other,), at_most=0)
    lines = sum(each.lines != whole.lines or not whole.lines for each in runs)
    yield Measure(name="runs with another metrics.jsonl", values=(lines,), at_most=0)
