"""kill -9 costs no more than the interval between two checkpoints, and changes nothing; at length in tests/bench."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.kill import Kill, Setup, allowed, lived


@pytest.mark.parametrize("columns", [3, 500], ids=["rows-of-12-bytes", "rows-of-2000-bytes"])
def test_a_killed_run_goes_on_to_the_very_same_weights(tmp_path: Path, columns: int) -> None:
    setup = Setup.make(tmp_path, columns, epochs=3)
    whole = lived(setup, tmp_path / "whole", [])
    trial = lived(setup, tmp_path / "killed", [Kill(late=True, after=0.02)])
    assert trial.digest == whole.digest
    assert trial.lines == whole.lines
    if trial.kills:  # else it was over before
        assert (trial.late, trial.silent) == (1, 0)
        assert trial.updates - setup.needed <= allowed(setup, whole, trial)


def test_a_command_that_is_asked_to_end_saves_and_goes_on_later(tmp_path: Path) -> None:
    setup = Setup.make(tmp_path, 3, epochs=3, command=True)
    whole = lived(setup, tmp_path / "whole", [])
    trial = lived(setup, tmp_path / "ended", [Kill(late=True, after=0.02)])
    assert trial.digest == whole.digest
    assert trial.lines == whole.lines
    assert trial.codes in ([143, 0], [0])
    assert trial.silent == 0
