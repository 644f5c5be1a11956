"""What `Once` promises: no line is handed over twice, whatever a killed life has handed over after its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamtrain.callbacks.once import Once
from streamtrain.events import Log


def line(step: int, split: str = "train") -> Log:
    return Log(step=step, split=split, values={"loss" if split == "train" else "val_loss": 0.5})


def life(path: Path, begin: int, steps: range, state: dict[str, object] | None = None, key: str = "a") -> list[int]:
    """The steps whose lines a life hands over."""
    once = Once()
    if state is not None:
        once.load_state_dict(state)
    once.begin(begin, path, key=key)
    handed = []
    for step in steps:
        if once.first(line(step)):
            handed.append(step)
            once.handed(line(step))
    return handed


def test_what_a_killed_life_handed_over_after_its_checkpoint_is_not_again(tmp_path: Path) -> None:
    assert life(tmp_path / "j", 0, range(1, 8)) == [1, 2, 3, 4, 5, 6, 7]
    assert life(tmp_path / "j", 4, range(5, 11)) == [8, 9, 10]
    assert life(tmp_path / "j", 4, range(5, 12)) == [11]


def test_kinds_of_lines_have_steps_of_their_own(tmp_path: Path) -> None:
    once = Once()
    once.begin(0, tmp_path / "j")
    once.handed(line(7))
    once.handed(line(4, "val"))
    later = Once()
    later.begin(2, tmp_path / "j")
    assert [later.first(line(step, "val")) for step in (4, 6)] == [False, True]
    assert [later.first(line(step)) for step in (7, 8)] == [False, True]


def test_a_fresh_start_and_another_run_hand_over_all(tmp_path: Path) -> None:
    life(tmp_path / "j", 0, range(1, 8))
    assert life(tmp_path / "j", 0, range(1, 4)) == [1, 2, 3]
    assert life(tmp_path / "j", 2, range(3, 5), key="b") == [3, 4]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"key": "a"}',
        '{"key": "a", "reached": {"x": null}}',
        '{"key": "a", "reached": {"x": 1e999}}',
        "[" * 9000,
        "\0",
    ],
    ids=range(8),
)
def test_a_journal_that_is_none_costs_no_more_than_lines_twice(tmp_path: Path, text: str) -> None:
    (tmp_path / "j").write_text(text)
    assert life(tmp_path / "j", 4, range(5, 7)) == [5, 6]
    assert life(tmp_path / "nowhere" / "j", 4, range(5, 7)) == [5, 6]
