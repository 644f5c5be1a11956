"""What `demo --prove` promises: it kills, counts and compares; and what is not equal does not pass for it."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamtrain import proof
from streamtrain.checkpoint import commit
from streamtrain.cli import main
from streamtrain.proof import Account, Entry, Life, Run, account, compared, entries, instants
from streamtrain.state import Snapshot

SAMPLES, BATCH = 12, 4


def life(begin: int, last: int, *, killed: bool = True) -> Life:
    """A process that took the updates after `begin`, up to `last`, of batches of 4 in epochs of 3."""
    made = []
    for step in range(begin + 1, last + 1):
        epoch, batch = divmod(step - 1, SAMPLES // BATCH)
        made.append(Entry(step, epoch, 100.0 + step, np.arange(BATCH * batch, BATCH * (batch + 1))))
    return Life(100.0, made, killed)


def run(folder: Path, *lives: Life, weight: float = 1.0, loss: float = 0.5) -> Run:
    """A finished run with these weights, and this loss in its log."""
    commit(folder / "checkpoints" / "step-000000006", Snapshot({"w": torch.tensor(weight)}, {}, {"step": 6}))
    (folder / "metrics.jsonl").write_text(f'{{"step": 6, "time": {random.random()}, "loss": {loss}}}\n')
    return Run(folder, list(lives))


@pytest.mark.timeout(400)
def test_the_quick_form_kills_resumes_and_finds_all_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--prove", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    killed = re.search(r"life 1: first batch after [\d.]+ s; killed at step (\d+)", said)
    resumed = re.search(r"life 2: goes on from step (\d+); first batch after [\d.]+ s, (\d+) steps repeated", said)
    assert killed is not None
    assert resumed is not None
    assert 0 < int(resumed[1]) == int(killed[1]) - int(resumed[2])
    digests = re.findall(r"weights, .*: +([0-9a-f]{64})$", said, re.MULTILINE)
    assert len(digests) == 2
    assert len(set(digests)) == 1
    assert said.count("each trained once in each of 2 epochs, 228 batches") == 2
    assert said.splitlines()[-1] == "all is equal"


def test_only_what_the_next_life_went_on_from_counts_as_trained(tmp_path: Path) -> None:
    killed = Run(tmp_path, [life(0, 4), life(2, 5), life(5, 6, killed=False)])
    assert [entry.step for entry in killed.lineage()] == [1, 2, 3, 4, 5, 6]
    assert account(killed.lineage(), SAMPLES) == Account(epochs=2, batches=6, twice=0, missing=0)


def test_a_sample_too_many_or_too_few_is_counted(tmp_path: Path) -> None:
    lost = Run(tmp_path, [life(0, 2), life(3, 6, killed=False)])
    assert account(lost.lineage(), SAMPLES) == Account(epochs=2, batches=5, twice=0, missing=4)
    again = life(0, 6, killed=False)
    again.entries[1] = again.entries[1]._replace(samples=again.entries[0].samples)
    assert account(Run(tmp_path, [again]).lineage(), SAMPLES) == Account(epochs=2, batches=6, twice=4, missing=4)


@pytest.mark.parametrize(
    ("change", "lives"),
    [
        ({}, [life(0, 4), life(2, 6, killed=False)]),
        ({"weight": 1.0000001}, [life(0, 4), life(2, 6, killed=False)]),
        ({"loss": 0.25}, [life(0, 4), life(2, 6, killed=False)]),
        ({}, [life(0, 4), life(0, 6, killed=False)]),  # it started over
        ({}, [life(0, 2), life(3, 6, killed=False)]),
    ],
    ids=["equal", "weights", "lines", "started-over", "samples"],
)
def test_whatever_differs_is_not_equal(tmp_path: Path, change: dict[str, Any], lives: list[Life]) -> None:
    whole = run(tmp_path / "whole", life(0, 6, killed=False))
    said, equal = compared(whole, run(tmp_path / "killed", *lives, **change), samples=SAMPLES)
    good = not change and lives[1].begin == 2
    assert (equal, said[-1]) == ((True, "all is equal") if good else (False, "NOT EQUAL"))


def test_a_diary_is_read_back_but_for_an_entry_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "diary"
    numbers = [[step, 0, 10**9 * step, 2, 7, step] for step in (1, 2, 3)]
    path.write_bytes(np.array(numbers, np.int64).tobytes()[:-3])
    read = list(entries(path))
    assert [(entry.step, entry.at, entry.samples.tolist(), end) for entry, end in read] == [
        (1, 1.0, [7, 1], 48),
        (2, 2.0, [7, 2], 96),
    ]
    assert [entry.step for entry, _ in entries(path, 48)] == [2]


@pytest.mark.parametrize("recipe", [proof.WHOLE, proof.QUICK], ids=["whole", "quick"])
def test_kills_are_spread_over_the_run_each_after_a_save_of_its_life(recipe: Any) -> None:
    every = int(recipe.save_every.removesuffix("steps"))
    for seed in range(200):
        steps = [step for step, _ in instants(recipe, 3, random.Random(seed))]
        assert every < steps[0]
        assert steps[-1] < recipe.steps
        assert all(after - before > 0 for before, after in itertools.pairwise(steps))


def test_epochs_can_t_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--prove", "--max-epochs", "1", "--out", str(tmp_path)]) == 2
    assert "--prove trains whole epochs" in capsys.readouterr().err
