"""An epoch over damaged chunks and failing reads ends, and every sample is accounted for."""

from __future__ import annotations

from pathlib import Path

from tests.bench import chaos
from tests.bench.measure import Options


def test_every_sample_is_given_with_its_own_values_or_counted_as_skipped(tmp_path: Path) -> None:
    measures = list(chaos.run(Options(quick=True, folder=tmp_path)))
    assert len(measures) == 20
    assert [str(measure) for measure in measures if not measure.ok] == []
    assert all(measure.median > 0 for measure in measures if measure.at_most is None), "something was damaged"
