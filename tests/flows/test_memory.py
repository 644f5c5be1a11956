"""A pass takes what `memory=` grants, and a tenth at most, seen from outside; at length in tests/bench."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.convert import Codec
from data_tools.synth import synth
from tests.bench.memory import MIB, watched


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_pass_over_many_times_its_memory_stays_within_it(tmp_path: Path, codec: Codec) -> None:
    store = synth(tmp_path / "store.zarr", rows=256 * 512, columns=512, chunk_rows=512, codec=codec)
    peak = watched(store, "32MiB", 8)
    assert peak.looks > 10
    assert peak.most <= 1.1 * 32 * MIB
