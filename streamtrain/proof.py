"""`demo --prove`: the demo is killed again and again, and what comes out is held against an undisturbed run.

Its law: nothing of the run itself is asked whether it went well. The weights are those on the disk, and which samples
were trained stands in a diary that each life writes as it trains, a batch before its update, by a call that a kill
takes nothing back from.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamtrain import checkpoint, demo
from streamtrain.callbacks.base import Callback
from streamtrain.data.batch import Batch
from streamtrain.errors import StreamtrainError
from streamtrain.events import TrainBegin
from streamtrain.watch import Watch

WHOLE = demo.Recipe(
    every=24,
    lines_together=128,
    validation=(0.9, 1.0),
    validate_on=16,
    batch_size=4096,
    features=64,
    hidden=64,
    steps=712,  # two epochs
    validate_every=240,
    save_every="60steps",
)
QUICK = demo.Recipe(
    every=60,
    lines_together=32,
    validation=(0.9, 1.0),
    validate_on=16,
    batch_size=2048,
    features=16,
    hidden=16,
    steps=228,  # two epochs
    validate_every=75,
    save_every="20steps",
)
KILLS, QUICK_KILLS = 3, 1
HEAD = 4
"""Numbers before a batch's samples in a diary: update, epoch, nanoseconds since 1970, count."""


class Entry(NamedTuple):
    """A batch that a life has taken to train on."""

    step: int
    """The update that it was for."""
    epoch: int
    at: float
    """When, in seconds since 1970."""
    samples: NDArray[np.int64]
    """Its samples' numbers."""

    @property
    def bytes(self) -> int:
        """That it takes in a diary."""
        return 8 * (HEAD + len(self.samples))


@dataclass(frozen=True)
class Life:
    """What one process has left."""

    born: float
    """When it was started, in seconds since 1970."""
    entries: list[Entry]
    killed: bool

    @property
    def begin(self) -> int:
        """The finished updates that it went on from."""
        return self.entries[0].step - 1

    @property
    def last(self) -> int:
        """The last update that it began to make."""
        return self.entries[-1].step

    @property
    def first_batch(self) -> float:
        """Seconds from the start of the process to the first batch that it trained."""
        return self.entries[0].at - self.born


@dataclass
class Run:
    """One training, in so many lives as it took."""

    folder: Path
    lives: list[Life] = field(default_factory=list)

    def lineage(self) -> Iterator[Entry]:
        """What has made the final weights: of each life the updates that the next one went on from."""
        for life, following in zip(self.lives, [*self.lives[1:], None], strict=True):
            end = life.last if following is None else following.begin
            yield from (entry for entry in life.entries if entry.step <= end)

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, without times."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if name != "time"} for row in rows]

    def digest(self) -> str:
        """Of the final weights, as they lie on the disk."""
        newest = checkpoint.newest_valid(self.folder / "checkpoints")
        assert newest is not None
        return digest(checkpoint.read(newest.path).model)


def prove(*, out: Path, quick: bool = False, seed: int | None = None) -> int:
    """Train undisturbed, then in lives that are killed; say how they compare. 0 where all is equal, else 1.

    `out`: holds the world, and the folders `undisturbed` and `killed`, made anew each time. `seed`: of the instants.
    Raises EnvironmentProblem where the packages of the extra `demo` are missing.
    """
    recipe, kills = (QUICK, QUICK_KILLS) if quick else (WHOLE, KILLS)
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    world = demo.prepare(demo.find_mask(), out / ("world-quick.zarr" if quick else "world.zarr"), recipe)
    runs = [Run(out / "undisturbed"), Run(out / "killed")]
    for run in runs:
        shutil.rmtree(run.folder, ignore_errors=True)
    print(f"training {recipe.steps} steps undisturbed", flush=True)
    lived(runs[0], world, quick=quick)
    print(f"the same, killed {kills} times by SIGKILL at random (seed {seed})", flush=True)
    for step, wait in instants(recipe, kills, random.Random(seed)):
        print(_cost(runs[1], lived(runs[1], world, quick=quick, kill_at=step, wait=wait)), flush=True)
    print(_cost(runs[1], lived(runs[1], world, quick=quick)), flush=True)
    said, equal = compared(*runs, samples=samples_of(world, recipe))
    print("\n".join(said), flush=True)
    return 0 if equal else 1


def instants(recipe: demo.Recipe, kills: int, rng: random.Random) -> list[tuple[int, float]]:
    """When to kill: the update after which, and seconds more; one in each part of the run, the first after a save."""
    first = int(recipe.save_every.removesuffix("steps")) + 5
    part = (recipe.steps - 10 - first) // kills
    starts = [first + number * part for number in range(kills)]
    return [(rng.randrange(start + part // 3, start + part), 0.1 * rng.random()) for start in starts]


def samples_of(world: Path, recipe: demo.Recipe) -> int:
    """Samples of an epoch."""
    lines, held_out = demo.streams(world, recipe)
    count = lines.num_samples
    for stream in (lines, held_out):
        asyncio.run(stream.aclose())
    return count


def _cost(run: Run, life: Life) -> str:
    number, before = len(run.lives), run.lives[-2] if len(run.lives) > 1 else None
    end = f"killed at step {life.last}" if life.killed else f"ended at step {life.last}"
    if before is None:
        return f"  life 1: first batch after {life.first_batch:.1f} s; {end}"
    repeated = before.last - life.begin
    cost = f"first batch after {life.first_batch:.1f} s, {repeated} steps repeated"
    return f"  life {number}: goes on from step {life.begin}; {cost}; {end}"


def compared(whole: Run, killed: Run, *, samples: int) -> tuple[list[str], bool]:
    """What to say of two runs, and whether they are equal in all that counts."""
    digests = [whole.digest(), killed.digest()]
    accounts = [account(run.lineage(), samples) for run in (whole, killed)]
    lines = [whole.lines(), killed.lines()]
    resumed = [life.begin for life in killed.lives[1:]]
    said = [
        f"weights, undisturbed: {digests[0]}",
        f"weights, killed:      {digests[1]}",
        f"samples, undisturbed: {accounts[0]}",
        f"samples, killed:      {accounts[1]}",
        f"lines of metrics.jsonl: {len(lines[0])} and {len(lines[1])}, {_same(lines[0] == lines[1])}",
    ]
    first = whole.lives[0].first_batch
    costs = [life.first_batch - first for life in killed.lives[1:]]
    more = max(0.0, *costs) if costs else 0.0
    said += [f"until its first batch a resume takes {more:.1f} s more than a fresh start, at most"]
    good = digests[0] == digests[1] and lines[0] == lines[1] and all(resumed) and len(set(accounts)) == 1
    good = good and all(each.once for each in accounts)
    return [*said, "all is equal" if good else "NOT EQUAL"], good


def _same(equal: bool) -> str:
    return "equal" if equal else "NOT EQUAL"


class Account(NamedTuple):
    """How often each sample was trained."""

    epochs: int
    """That were begun."""
    batches: int
    twice: int
    """Samples that were trained more than once in one epoch."""
    missing: int
    """Samples of finished epochs that were not trained."""

    @property
    def once(self) -> bool:
        """Whether each sample was trained once in each epoch."""
        return not self.twice and not self.missing

    def __str__(self) -> str:
        if self.once:
            return f"each trained once in each of {self.epochs} epochs, {self.batches} batches"
        return f"{self.twice} TRAINED TWICE, {self.missing} MISSING in {self.epochs} epochs, {self.batches} batches"


def account(entries: Iterator[Entry], samples: int) -> Account:
    """Count the samples of a lineage; all epochs must be whole."""
    by_epoch: dict[int, list[NDArray[np.int64]]] = {}
    batches = 0
    for entry in entries:
        by_epoch.setdefault(entry.epoch, []).append(entry.samples)
        batches += 1
    twice = missing = 0
    for parts in by_epoch.values():
        trained = np.concatenate(parts)
        different = len(np.unique(trained))
        twice += len(trained) - different
        missing += samples - different
    return Account(len(by_epoch), batches, twice, missing)


# --- processes ---


def lived(run: Run, world: Path, *, quick: bool, kill_at: int | None = None, wait: float = 0.0) -> Life:
    """One process: to the end, or until it is killed `wait` seconds after it began to make the update `kill_at`."""
    run.folder.mkdir(parents=True, exist_ok=True)
    name = f"life-{len(run.lives) + 1}"
    diary, born = run.folder / f"{name}.diary", time.time()
    command = [sys.executable, "-m", "streamtrain.proof", str(world), str(run.folder), str(diary), str(int(quick))]
    with open(run.folder / f"{name}.txt", "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    killed = False
    try:
        if kill_at is not None:
            killed = _reached(diary, kill_at, process) and not _ended(process, wait)
            process.kill()
        process.wait()
    finally:
        process.kill()
        process.wait()
    if process.returncode not in (0, -signal.SIGKILL if killed else 0):
        text = (run.folder / f"{name}.txt").read_text(errors="replace")
        raise StreamtrainError(
            f"{name} ended with {process.returncode}: {text.strip()[-400:]}", hint=f"{run.folder}/{name}.txt has more."
        )
    life = Life(born, [entry for entry, _ in entries(diary)], process.returncode != 0)
    run.lives.append(life)
    return life


def _reached(diary: Path, step: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the life begins to make this update, and has something to go on from; False where it ended before."""
    checkpoints, at = diary.parent / "checkpoints", 0
    while process.poll() is None:
        begun = 0
        for entry, end in entries(diary, at):
            begun, at = entry.step, end - entry.bytes  # the last one is read again
        if begun >= step and any(checkpoints.glob("step-*")):
            return True
        time.sleep(0.01)
    return False


def _ended(process: subprocess.Popen[bytes], within: float) -> bool:
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        return False
    return True


def entries(diary: Path, offset: int = 0) -> Iterator[tuple[Entry, int]]:
    """The entries of a life from a byte on, each with the byte where it ends; a last one that was cut short is none."""
    numbers = np.fromfile(diary, np.int64, offset=offset) if diary.exists() else np.empty(0, np.int64)
    at = 0
    while at + HEAD <= len(numbers) and at + HEAD + numbers[at + 3] <= len(numbers):
        step, epoch, nanoseconds, count = numbers[at : at + HEAD].tolist()
        at += HEAD + count
        yield Entry(step, epoch, nanoseconds / 1e9, numbers[at - count : at]), offset + 8 * at


class Diary(Callback):
    """Writes down each batch before its update, with the samples that it holds."""

    def __init__(self, path: Path) -> None:
        self.step = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def on_train_begin(self, event: TrainBegin) -> None:
        """Where this life goes on from."""
        self.step = event.step

    def write(self, batch: Batch) -> None:
        """A batch is trained now; each is an update of its own."""
        self.step += 1
        index = torch.as_tensor(batch.index).numpy()
        head = np.array([self.step, batch.epoch, time.time_ns(), len(index)], np.int64)
        os.write(self._file, head.tobytes() + index.astype(np.int64).tobytes())

    def step_function(self, loss: nn.Module) -> Callable[[nn.Module, Batch], Mapping[str, Any]]:
        """What the trainer does by itself, and a line in the diary for what is trained."""

        def step(model: nn.Module, batch: Batch) -> Mapping[str, Any]:
            if torch.is_grad_enabled():
                self.write(batch)
            outputs = model(batch.inputs)
            return {"loss": loss(outputs, batch.targets), "outputs": outputs, "targets": batch.targets}

        return step


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all bits of a model, with names, dtypes and shapes."""
    made = hashlib.sha256()
    for name, value in sorted(weights.items()):
        made.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        made.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def main(arguments: Sequence[str]) -> None:
    """One life: train to the end, from wherever the last one got to."""
    world, folder, path, quick = arguments
    recipe, diary = QUICK if int(quick) else WHOLE, Diary(Path(path))
    with Watch(grace=25) as watch:
        trainer = demo.build(Path(folder), Path(world), recipe, step=diary.step_function)
        trainer.callbacks.append(diary)
        asyncio.run(demo.train(trainer, Path(world), recipe, None, watch))


if __name__ == "__main__":
    main(sys.argv[1:])
