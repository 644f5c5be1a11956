"""A command that is asked to end saves its very last step, whenever that comes; at length in tests/bench."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.terms import Campaign


@pytest.mark.timeout(300)
def test_a_command_that_is_asked_to_end_loses_no_step_whenever_that_is(tmp_path: Path) -> None:
    counts = Campaign(tmp_path, epochs=12, longest=0.3).run(5, a_run=5)
    assert counts.sent >= 1  # a run may be over before all five
    assert (counts.saved, counts.lost, counts.codes) == (counts.sent, 0, [])
    assert (counts.strays, counts.unequal, counts.lines) == (0, 0, 0)
