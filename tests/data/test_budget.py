"""What the budget promises: never more than its total, from any thread, and sizes as people write them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.data.budget import Budget, BudgetHeld, available_memory, format_bytes, format_enough, parse_bytes
from streamtrain.errors import ConfigError, UserCodeError


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (7, 7),
        ("7", 7),
        ("1GiB", 1 << 30),
        ("256MiB", 256 << 20),
        (" 1.5 gb ", 1_500_000_000),
        ("2k", 2048),
        ("2KB", 2000),
        ("1TiB", 1 << 40),
        ("0.5kib", 512),
        ("3b", 3),
        ((1 << 53) + 1, (1 << 53) + 1),
        ("9" * 40, 10**40 - 1),
    ],
)
def test_sizes_are_read_as_people_write_them(size: Any, expected: int) -> None:
    assert parse_bytes(size) == expected


@pytest.mark.parametrize(
    "size", [-1, "-1", "", "GiB", "1 parsec", "1e3", "0x10", "nan", "1,5GB", "9" * 5000, 1.5, None, True, []]
)
def test_what_is_no_size_is_refused_with_its_name_and_value(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"cache.*") as caught:
        parse_bytes(size, "cache")
    assert repr(size) in str(caught.value)
    if isinstance(size, str):
        assert "KiB, MiB, GiB and TiB" in caught.value.hint or size.startswith("-")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (200 << 20, "200 MiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_sizes_are_written_as_people_read_them(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(0, 1 << 60))
def test_a_written_size_reads_back_nearly_the_same(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= size * 0.06


@given(st.integers(0, 1 << 52) | st.sampled_from([1 << power for power in range(50)]), st.integers(-1, 1))
def test_what_is_enough_is_no_less_when_it_is_read_back(size: int, more: int) -> None:
    size = max(0, size + more)
    assert size <= parse_bytes(format_enough(size)) <= max(size + 1, size * 1.11)


@given(st.lists(st.integers(-60, 60), max_size=50))
def test_grants_never_exceed_the_total_and_returns_make_room(steps: list[int]) -> None:
    budget, held, most = Budget(100), list[int](), 0
    for step in steps:
        if step >= 0:
            granted = budget.try_acquire(step)
            assert granted == (sum(held) + step <= 100)
            held += [step] if granted else []
        elif held:
            size = held.pop()
            (budget.release if step % 2 else budget.release_from_finalizer)(size)
        most = max(most, sum(held))
        now = budget.statistics()
        assert (now.total, now.used, now.peak) == (100, sum(held), most)
        assert budget.free == 100 - sum(held)


def test_a_refusal_changes_nothing() -> None:
    budget = Budget("1KiB")
    assert budget.try_acquire(1000)
    assert not budget.try_acquire(25)
    assert budget.try_acquire(24)
    assert budget.statistics().peak == 1024


def test_threads_that_share_a_budget_stay_within_it() -> None:
    budget, barrier = Budget(10), threading.Barrier(8)

    def work() -> int:
        barrier.wait()
        got = 0
        for _ in range(2000):
            if budget.try_acquire(3):
                got += 1
                budget.release(3)
        return got

    with ThreadPoolExecutor(8) as pool:
        assert sum(job.result() for job in [pool.submit(work) for _ in range(8)]) > 0
    now = budget.statistics()
    assert now.used == 0
    assert now.peak <= 9


def test_a_finalizer_that_runs_while_the_lock_is_held_gives_its_bytes_back() -> None:
    budget = Budget(10)
    assert budget.try_acquire(10)
    with budget._lock:
        budget.release_from_finalizer(10)
    assert budget.try_acquire(10)


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_containers_limit_counts_where_it_is_lower(file: str, tmp_path: Path) -> None:
    host = psutil.virtual_memory().total
    assert available_memory(tmp_path) == host
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    for text, expected in [("1000000\n", 1_000_000), ("max\n", host), (f"{1 << 63}\n", host), ("", host)]:
        path.write_text(text)
        assert available_memory(tmp_path) == expected


def test_held_batches_are_the_callers_affair() -> None:
    assert issubclass(BudgetHeld, UserCodeError)


def test_what_is_promised_to_a_stream_that_stands_still_stays_its_own() -> None:
    budget = Budget(100)
    busy, still, unknown = budget.join(), budget.join(), budget.join()
    busy.least, still.least = 20, 10
    assert busy.free == 57  # 100 less 10, and less a third for whom nobody knows yet
    assert not busy.try_acquire(58)
    assert busy.try_acquire(57)
    assert still.try_acquire(10)
    assert unknown.try_acquire(33)
    assert not still.try_acquire(1)
    unknown.active = False
    unknown.release(33)
    assert still.try_acquire(33)
    assert not busy.try_acquire(1)
