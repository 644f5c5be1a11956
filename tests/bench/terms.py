"""What a SIGTERM costs: the command is asked to end at random instants after its first batch, again and again.

Each time it must end with 143, have saved the very last step that it trained (the last line of metrics.jsonl, and what
status.json says), and go on from there when it is started again; at its end the weights are those of an undisturbed
run, to the bit, and metrics.jsonl has each step once. Validations and saves run all the time, so that many of the
signals fall into them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.synth import synth
from streamtrain import checkpoint
from tests.bench import kill, life
from tests.bench.measure import Measure, Options

COLUMNS, ROWS, EPOCHS, LONGEST = 3, 6000, 20, 0.4
TERMS_A_RUN = 10
OFTEN = (
    "data.split=[0.0, 0.8]",
    "validation.split=[0.8, 1.0]",
    "trainer.log_every=1",
    'trainer.validate_every="30steps"',
    "trainer.grace=100",
)
"""What this run has otherwise than those that are killed: validations too, and a line for each step."""
EVERY = 20
"""Steps between two saves."""


@dataclass
class Counts:
    """What came of all the signals."""

    sent: int = 0
    """Signals to a life that had trained a batch and had not come to its end."""
    saved: int = 0
    """Of those, such as ended with 143 and a valid checkpoint of the last step trained."""
    lost: int = 0
    """Steps that were trained and were not saved."""
    codes: list[int] = field(default_factory=list)
    """Exit codes other than 143."""
    strays: int = 0
    """Half-made folders that were left."""
    runs: int = 0
    unequal: int = 0
    """Runs that ended with other weights."""
    lines: int = 0
    """Runs whose metrics.jsonl is another."""


class Campaign:
    """One store, one undisturbed run, and disturbed ones."""

    def __init__(self, room: Path, *, epochs: int = EPOCHS, longest: float = LONGEST) -> None:
        self.room, self.epochs, self.longest, self.counts = room, epochs, longest, Counts()
        self.store = synth(room / "x.zarr", rows=ROWS, columns=COLUMNS, chunk_rows=256, codec="zstd")

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """The command, on a run in this folder."""
        folder.mkdir(exist_ok=True)
        config = folder / "config.toml"
        said = {"store": self.store, "folder": folder, "columns": COLUMNS, "epochs": self.epochs, "every": EVERY}
        config.write_text(kill.CONFIG.format(**said))
        with open(folder / "err", "wb") as err:
            command = [sys.executable, "-m", "streamtrain", "fit", str(config), "-q"]
            command += [part for key in OFTEN for part in ("--set", key)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two wait for each other where others compute too
            return subprocess.Popen(command, stdout=err, stderr=err, env=environment)

    def run(self, terms: int, *, seed: int = 0, a_run: int = TERMS_A_RUN) -> Counts:
        """So many signals, `a_run` to each run."""
        rng, counts = random.Random(seed), self.counts
        assert self.start(self.room / "whole").wait() == 0, (self.room / "whole" / "err").read_text()
        whole = self._ended(self.room / "whole")
        while counts.sent < terms:
            folder = self.room / f"run-{counts.runs}"
            for _ in range(min(a_run, terms - counts.sent)):
                if not self._disturbed(folder, rng.random() * self.longest):
                    break  # the run was complete before
            code = self.start(folder).wait()
            assert code == 0, (folder / "err").read_text()
            counts.runs += 1
            weights, lines = self._ended(folder)
            counts.unequal += weights != whole[0]
            counts.lines += lines != whole[1]
        return counts

    def _disturbed(self, folder: Path, after: float) -> bool:
        """One life, ended so many seconds after its first batch; whether it was not over before."""
        log = folder / "run" / "metrics.jsonl"
        before = log.stat().st_size if log.exists() else 0
        process = self.start(folder)
        while process.poll() is None and (not log.exists() or log.stat().st_size <= before):
            time.sleep(0.001)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        status = json.loads((folder / "run" / "status.json").read_text())
        if code in (0, -signal.SIGTERM) and status["state"] == "completed":
            return False  # it came to the end of the run, or to the end of the process, before the signal
        counts, newest = self.counts, checkpoint.newest_valid(folder / "run" / "checkpoints")
        kept = -1 if newest is None else newest.step
        trained = max(json.loads(line)["step"] for line in log.read_text().splitlines())
        counts.sent += 1
        counts.codes += [code] if code != 128 + signal.SIGTERM else []
        counts.lost += max(trained, status["step"]) - kept
        counts.saved += code == 128 + signal.SIGTERM and trained == status["step"] == kept
        counts.strays += sum(name.startswith(".") for name in os.listdir(folder / "run" / "checkpoints"))
        return True

    @staticmethod
    def _ended(folder: Path) -> tuple[str, list[str]]:
        """The digest of a run's last weights, and its log without times."""
        newest = checkpoint.newest_valid(folder / "run" / "checkpoints")
        assert newest is not None
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        lines = [json.dumps({key: value for key, value in row.items() if key != "time"}) for row in rows]
        return life.digest(checkpoint.read(newest.path).model), lines


def run(options: Options) -> Iterator[Measure]:
    """100 signals."""
    terms = 10 if options.quick else 100
    with options.room() as room:
        counts = Campaign(room).run(terms)
    yield Measure(name="SIGTERM at random instants after the first batch", values=(counts.sent,), at_least=terms)
    yield Measure(name="  saved, exit code 143", values=(counts.saved,), at_least=counts.sent)
    yield Measure(name="  steps lost", values=(counts.lost,), at_most=0)
    if counts.codes:
        yield Measure(name=f"  other exit codes: {', '.join(map(str, counts.codes))}", values=(len(counts.codes),))
    yield Measure(name="  half-made folders left", values=(counts.strays,), at_most=0)
    yield Measure(name="runs resumed to the end", values=(counts.runs,))
    yield Measure(name="  with other weights", values=(counts.unequal,), at_most=0)
    yield Measure(name="  with another metrics.jsonl", values=(counts.lines,), at_most=0)
