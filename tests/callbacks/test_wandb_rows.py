"""What the notes of an online run of wandb promise: whatever has arrived, which lines they are is known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.callbacks.wandb_folder import Kind, kind_of
from streamtrain.callbacks.wandb_rows import Rows

TRAIN, VALID = kind_of(["loss"]), kind_of(["val_loss"])
KINDS: list[Kind | None] = [TRAIN, VALID, None]


@given(st.lists(st.tuples(st.lists(st.sampled_from(KINDS), max_size=9), st.integers(0, 9)), max_size=5))
def test_whatever_arrived_of_each_life_its_lines_are_known(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[list[Kind | None], int]]
) -> None:
    path = tmp_path_factory.mktemp("notes") / "rows"
    rows: list[tuple[int, Kind | None]] = []  # as the server has them
    step = 0
    for number, (kinds, arrives) in enumerate(lives):
        notes = Rows(path, "abc")
        assert notes.known == bool(number)
        there = notes.arrived(len(rows))
        assert there == {kind: max(n for n, each in rows if each == kind) for _, kind in rows if kind is not None}
        notes.begin(len(rows), there)
        made: list[tuple[int, Kind | None]] = []
        for kind in kinds:
            step += 1
            notes.note(step, kind)
            made.append((step, kind))
        rows += made[:arrives]


def test_notes_of_another_run_are_none(tmp_path: Path) -> None:
    Rows(tmp_path / "rows", "abc").begin(3, {TRAIN: 4})
    assert Rows(tmp_path / "rows", "abc").arrived(3) == {TRAIN: 4}
    assert not Rows(tmp_path / "rows", "other").known


@pytest.mark.parametrize("keep", range(1, 10))
def test_of_notes_that_are_torn_what_is_whole_counts(
    tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows"
    notes = Rows(path, "abc")
    notes.begin(0, {})
    notes.note(1, TRAIN)
    notes.note(2, TRAIN)
    os.truncate(path, path.stat().st_size - keep)
    assert Rows(path, "abc").arrived(2) == {TRAIN: 2 if keep == 1 else 1}  # which is without its line's end
    assert ("damaged" in caplog.text) == (2 <= keep <= 7)
    assert ("wandb has 1 rows of run abc that nobody noted" in caplog.text) == (keep > 1)


def test_what_is_no_notes_is_none_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows").write_text("something else")
    assert not Rows(tmp_path / "rows", "abc").known
    assert "damaged" in caplog.text


def test_a_disk_that_refuses_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes = Rows(tmp_path / "nowhere" / "rows", "abc")
    notes.begin(0, {})
    notes.note(1, TRAIN)
    notes.note(2, None)
    assert caplog.text.count("can't be written") == 1
