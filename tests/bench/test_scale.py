"""That the benchmarks of size work, on small data; what depends on the machine's pace is not looked at here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest

from data_tools.synth import synth
from streamtrain.errors import EnvironmentProblem
from tests.bench import cgroup, dial, fits, groups, huge, passes, resumes, slow, window_peers, windows
from tests.bench.measure import Measure, Options

QUICK = Options(rounds=1, quick=True)


def by_name(measures: Iterable[Measure]) -> dict[str, Measure]:
    return {measure.name: measure for measure in measures}


def test_huge_tells_times_sizes_and_memory_of_both_shuffles() -> None:
    found = by_name(huge.run(QUICK))
    for shuffle in huge.SHUFFLES:
        assert found[f"{shuffle}: start to first batch"].median > 0
        assert found[f"{shuffle}: state_dict"].ok
        assert found[f"{shuffle}: most memory of the order"].ok


def test_an_order_of_a_billion_samples_takes_little_memory() -> None:
    for shuffle in huge.SHUFFLES:
        assert huge.memory_of_order(huge.SAMPLES, shuffle, 123_456_789) < 10 << 20


def test_the_dial_tells_entropy_and_loss_of_sorted_data() -> None:
    found = {measure.name.partition(": ")[2]: measure for measure in dial.run(QUICK)}
    assert found["read amplification"].ok
    assert 0 <= found["entropy"].median < found["entropy over a full shuffle's"].median <= 1.05
    assert found["loss over a full shuffle's"].median > 0


def test_passes_leave_no_descriptor_thread_or_task() -> None:
    measures = list(passes.run(QUICK))
    assert [measure.ok for measure in measures[:3]] == [True, True, True]
    assert "memory" in measures[3].name


def test_windows_of_ours_are_measured(tmp_path: Path) -> None:
    store = windows._store(tmp_path / "s.zarr", 128, 8)
    together = windows.chunks_together(store, 8, 8)
    assert together >= 1
    ask = window_peers.Ask(str(store), 8, 32, 4, together, "160MiB")
    assert asyncio.run(window_peers.measured_ours(ask, 0.05)) > 0


def test_windows_of_xbatcher_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("xbatcher")
    store = windows._store(tmp_path / "s.zarr", 64, 8)
    ask = window_peers.Ask(str(store), 8, 32, 4, 16, "160MiB")
    assert window_peers.measured("xbatcher", ask, 0.05) > 0


def test_a_group_with_a_limit_is_made_and_gone_or_refused_with_the_reason() -> None:
    """A process joins it in the benchmark only: here it would be this one."""
    refused: EnvironmentProblem | None = None
    try:
        with groups.limited(1 << 30) as group:
            assert int(group.limit.read_text()) == 1 << 30
            assert group.kills == 0
        assert not group.folder.exists()
    except EnvironmentProblem as problem:
        refused = problem
    if refused is not None:
        assert "no cgroup" in str(refused)
        assert refused.exit_code == 5


def test_files_are_read_in_order_and_can_be_dropped_from_the_cache(tmp_path: Path) -> None:
    store = synth(tmp_path / "s.zarr", rows=2200, columns=16, chunk_rows=200)
    assert [path.parent.name for path in cgroup.files_of(store)] == [str(number) for number in range(11)]
    cgroup.drop(store)
    assert cgroup.plain(store) == 2200 * 16 * 4


def test_fits_leave_nothing_and_each_is_what_it_is_alone() -> None:
    assert not [measure for measure in fits.run(QUICK) if not measure.ok and "memory" not in measure.name]


def test_a_slow_callback_is_told_of_every_step_and_said_once() -> None:
    found = by_name(slow.run(QUICK))
    assert found["  steps that it was not told of"].ok
    assert found["  times that this was said, a fit"].ok


def test_a_resume_within_a_billion_samples_tells_its_times() -> None:
    measures = list(resumes.run(QUICK))
    beyond = [f"{shuffle}: to the first update, beyond loading" for shuffle in huge.SHUFFLES]  # a difference of times
    assert [measure.name for measure in measures if measure.at_most is not None] == beyond
    assert all(measure.median > 0 for measure in measures if measure.at_most is None)
