"""What a kill costs: real processes are ended at random instants and started again, until the run is complete.

Held against an undisturbed run: the final weights bit by bit, the lines of metrics.jsonl, the updates that were made
twice. By kill -9 in the middle of `fit`, and by SIGTERM with the command line.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.synth import synth
from streamtrain import checkpoint
from tests import warm
from tests.bench import life
from tests.bench.measure import Measure, Options

ROWS = 6000
GOES_ON = re.compile(r"going on from \S+ at step (\d+)")

CONFIG = """
[data]
store = "{store}"
inputs = "x"
targets = "y"
batch_size = 33
shuffle = "block"
shuffle_blocks = 4
seed = 5
memory = "64MiB"

[model]
target = "tests.bench.life:network"
args = {{ columns = {columns} }}

[loss]
name = "mse"

[trainer]
run_dir = "{folder}/run"
accumulate_grad_batches = 3
seed = 5
log_every = 3

[fit]
max_epochs = {epochs}
resume = "auto"

[[callbacks]]
name = "ModelCheckpoint"
every = "{every}steps"
"""


@dataclass(frozen=True)
class Kill:
    """An instant."""

    late: bool
    """Counted from the first commit; else from the start of the process."""
    after: float
    """Seconds."""


@dataclass
class Trial:
    """One run, in several lives."""

    digest: str = ""
    """Of the final weights."""
    kills: int = 0
    late: int = 0
    """Kills after the first commit."""
    silent: int = 0
    """Lives after such a kill that did not log from which step they go on."""
    updates: int = 0
    """Made in all lives."""
    codes: list[int] = field(default_factory=list)
    """Exit codes."""
    lines: list[str] = field(default_factory=list)
    """Of metrics.jsonl, without times."""
    save: int = 0
    """The most updates made while one checkpoint was committed."""


@dataclass(frozen=True)
class Setup:
    """What is trained, how, and where."""

    store: Path
    columns: int
    epochs: int
    every: int = 20
    """Updates between two checkpoints."""
    command: bool = False
    """By the command line, ended by SIGTERM; else by `fit` in a process, ended by SIGKILL."""

    @classmethod
    def make(cls, room: Path, columns: int, epochs: int, *, every: int = 20, command: bool = False) -> Setup:
        """The data of one setting."""
        store = room / f"{columns}.zarr"
        if not store.exists():
            synth(store, rows=ROWS, columns=columns, chunk_rows=256, codec="zstd")
        return cls(store, columns, epochs, every, command)

    @property
    def needed(self) -> int:
        """Updates of the whole run."""
        batches = -(-ROWS // life.BATCH)
        return self.epochs * -(-batches // life.ACCUMULATE)

    def start(self, folder: Path) -> warm.Process:
        """A process that trains in this folder, from wherever the last one got to."""
        if self.command:
            config = folder / "config.toml"
            said = {"columns": self.columns, "epochs": self.epochs, "every": self.every}
            config.write_text(CONFIG.format(store=self.store, folder=folder, **said))
            arguments = ["-m", "streamtrain", "fit", str(config)]
        else:
            numbers = map(str, (self.columns, self.epochs, self.every))
            arguments = ["-m", "tests.bench.life", str(self.store), str(folder), *numbers]
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            return warm.start(arguments, stdout=out, stderr=err)


def run(options: Options) -> Iterator[Measure]:
    """Rows of 12 and of 2,000 bytes, ten kills each; and a few signals to the command."""
    trials, epochs = (2, 4) if options.quick else (10, 20)
    for columns, every in ((3, 20), (500, 5)):  # the second is shorter than a save takes
        with options.room() as room:
            setup = Setup.make(room, columns, epochs, every=every)
            name = f"kill -9, rows of {4 * columns} bytes:"
            yield from report(name, setup, *campaign(setup, room, trials, seed=columns))
    with options.room() as room:
        setup = Setup.make(room, 3, epochs, command=True)
        yield from report("SIGTERM, the command:", setup, *campaign(setup, room, 2 if options.quick else 5, seed=1))


def report(name: str, setup: Setup, whole: Trial, trials: list[Trial]) -> Iterator[Measure]:
    """How the disturbed runs compare with the whole one."""
    kills, late = sum(t.kills for t in trials), sum(t.late for t in trials)
    yield Measure(name=f"{name} kills", values=(kills,), at_least=len(trials))
    yield Measure(name=f"{name} after the first commit", values=(late,), at_least=0.4 * len(trials))
    yield Measure(name=f"{name} other weights at the end", values=(sum(differs(whole, t) for t in trials),), at_most=0)
    lines = sum(t.lines != whole.lines for t in trials)
    yield Measure(name=f"{name} metrics.jsonl that differ", values=(lines,), at_most=0)
    yield Measure(
        name=f"{name} lives that do not say where they go on", values=(sum(t.silent for t in trials),), at_most=0
    )
    if setup.command:
        wrong = [code for t in trials for code in t.codes if code not in (0, 128 + signal.SIGTERM)]
        which = f" ({', '.join(map(str, wrong))})" if wrong else ""
        yield Measure(name=f"{name} other exit codes than 0 and 143{which}", values=(len(wrong),), at_most=0)
        return
    yield Measure(
        name=f"{name} updates made twice, of those that may be",
        values=tuple((t.updates - setup.needed) / allowed(setup, whole, t) for t in trials),
        at_most=1,
    )
    yield Measure(name="  updates made twice", values=tuple(t.updates - setup.needed for t in trials))
    yield Measure(name="  updates during one save", values=tuple(t.save for t in trials))


def allowed(setup: Setup, whole: Trial, trial: Trial) -> int:
    """How many updates these kills may cost: for each the interval, and what is made while one checkpoint is saved."""
    return trial.kills * (setup.every + max(whole.save, trial.save))


def differs(whole: Trial, trial: Trial) -> bool:
    """Whether the final weights are others."""
    return trial.digest != whole.digest


def campaign(setup: Setup, room: Path, trials: int, *, seed: int) -> tuple[Trial, list[Trial]]:
    """An undisturbed run, and so many disturbed ones."""
    rng = random.Random(seed)
    began = time.monotonic()
    whole = lived(setup, room / "whole", [])
    seconds = time.monotonic() - began
    made = []
    for number in range(trials):
        # Every other one is ended after its first commit for sure, every fifth one twice.
        kills = [Kill(bool(number % 2), rng.random() * seconds) for _ in range(2 if number % 5 == 4 else 1)]
        trial = lived(setup, room / f"trial-{number}", kills)
        while not trial.kills:  # it was over before
            kills = [Kill(kill.late, kill.after / 2) for kill in kills]
            trial = lived(setup, Path(tempfile.mkdtemp(dir=room)) / "trial", kills)
        made.append(trial)
    return whole, made


def lived(setup: Setup, folder: Path, kills: list[Kill]) -> Trial:
    """One run: a life for each kill, and a last one; fewer if it is complete before."""
    folder.mkdir()
    run, trial, committed = folder / "run", Trial(), False
    for kill in [*kills, None]:
        process = setup.start(folder)
        if kill is not None:
            _end(process, run / "checkpoints", kill, signal.SIGTERM if setup.command else signal.SIGKILL)
        code = process.wait()
        # Before this life trains, and after the run is complete, nobody minds a signal: what a shell reads is the same.
        began = b"step" in (folder / "err").read_bytes()
        nothing_to_lose = not began or _complete(setup, run / "checkpoints")
        trial.codes.append(128 - code if code == -signal.SIGTERM and nothing_to_lose else code)
        if code == 0:
            said = GOES_ON.search((folder / "err").read_text())
            trial.silent += committed and not (said is not None and int(said[1]) > 0)
            break
        committed = _committed(run / "checkpoints")
        trial.kills += 1
        trial.late += committed
    assert trial.codes[-1] == 0, (folder / "err").read_text()[-2000:]
    _read(trial, setup, folder)
    return trial


def _end(process: warm.Process, checkpoints: Path, kill: Kill, number: signal.Signals) -> None:
    """End a life at an instant, if it lives so long."""
    while kill.late and not _committed(checkpoints) and process.poll() is None:
        time.sleep(0.002)
    try:
        process.wait(kill.after)
    except subprocess.TimeoutExpired:
        process.send_signal(number)


def _complete(setup: Setup, checkpoints: Path) -> bool:
    newest = checkpoint.newest_valid(checkpoints) if _committed(checkpoints) else None
    return newest is not None and newest.step == setup.needed


def _committed(checkpoints: Path) -> bool:
    return any(checkpoints.glob("step-*"))


def _read(trial: Trial, setup: Setup, folder: Path) -> None:
    newest = checkpoint.newest_valid(folder / "run" / "checkpoints")
    assert newest is not None
    trial.digest = life.digest(checkpoint.read(newest.path).model)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    trial.lines = [json.dumps({key: value for key, value in row.items() if key != "time"}) for row in rows]
    if not setup.command:
        assert trial.digest == (folder / "out").read_text().strip()
        trial.updates = len((folder / "updates").read_text().splitlines())
        trial.save = max(map(int, (folder / "saves").read_text().split()), default=0)
