"""What the chunk cache promises: one load a key at a time, kept within its bytes, the least used given up first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data.budget import Budget
from streamtrain.data.cache import ChunkCache

Chunk = NDArray[np.uint8]


class Loads:
    """Makes arrays of ten bytes and notes for whom."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, key: int) -> Callable[[], Chunk]:
        def load() -> Chunk:
            self.made.append(key)
            return np.full(10, key, dtype=np.uint8)

        return load


def cache_of(capacity: int, budget: Budget | None = None) -> ChunkCache:
    return ChunkCache(capacity, (budget or Budget("1GiB")).join())


def value(chunk: Chunk | None) -> int:
    assert chunk is not None
    assert len({*chunk.tolist()}) == 1
    return int(chunk[0])


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(0, 75))
def test_it_holds_what_fits_least_recently_used_out_first(keys: list[int], capacity: int) -> None:
    cache, loads, model, expected = cache_of(capacity), Loads(), list[int](), list[int]()
    for key in keys:
        assert value(cache.get(key, loads(key))) == key
        if key in model:
            model.remove(key)
        else:
            expected.append(key)
        model = [*model, key][-(capacity // 10) :] if capacity >= 10 else []
        assert list(cache._shared.kept) == model
        assert cache.statistics().bytes == 10 * len(model) <= capacity
    assert loads.made == expected
    now = cache.statistics()
    assert (now.hits, now.misses, now.capacity) == (len(keys) - len(expected), len(expected), capacity)
    assert now.evictions == (len(expected) - len(model) if capacity >= 10 else 0)


def test_what_is_larger_than_the_cache_is_handed_over_and_not_kept() -> None:
    cache, large = cache_of(5), np.zeros(6, dtype=np.uint8)
    assert cache.get("k", lambda: large) is large
    assert cache.statistics().bytes == 0


def test_an_absent_chunk_is_not_kept() -> None:
    cache, loads = cache_of(100), Loads()
    assert cache.get(1, lambda: None) is None
    assert value(cache.get(1, loads(1))) == 1


def test_the_kept_chunk_is_no_view_of_the_loaders_buffer() -> None:
    cache, scratch = cache_of(100), np.full(10, 7, dtype=np.uint8)
    cache.get(1, lambda: scratch)
    scratch[:] = 9
    assert value(cache.get(1, Loads()(1))) == 7


def test_threads_that_want_one_chunk_load_it_once() -> None:
    cache, loads, gate = cache_of(100), Loads(), threading.Event()

    def slow() -> Chunk:
        gate.wait(30)
        return loads(1)()

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(cache.get, 1, slow) for _ in range(8)]
        gate.set()
        assert [value(job.result(30)) for job in waiting] == [1] * 8
    assert loads.made == [1]
    assert (cache.statistics().misses, cache.statistics().hits) == (1, 7)


def test_different_chunks_load_side_by_side() -> None:
    cache, together = cache_of(100), threading.Barrier(4)

    def load() -> Chunk:
        together.wait(30)  # breaks unless all four are in `load` at once
        return np.zeros(10, dtype=np.uint8)

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(cache.get, key, load) for key in range(4)]:
            job.result(30)


def test_when_a_load_fails_the_next_caller_tries_itself() -> None:
    cache, loads, entered, gate = cache_of(100), Loads(), threading.Event(), threading.Event()

    def fail() -> Chunk:
        entered.set()
        gate.wait(30)
        raise OSError("gone")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, 1, fail)
        entered.wait(30)
        second = pool.submit(cache.get, 1, loads(1))
        gate.set()
        assert value(second.result(30)) == 1
        with pytest.raises(OSError, match="gone"):
            first.result(30)
    assert loads.made == [1]


def test_many_threads_and_evictions_give_the_right_chunks() -> None:
    cache, loads = cache_of(35), Loads()

    def work(seed: int) -> None:
        for key in np.random.default_rng(seed).integers(0, 8, 300).tolist():
            assert value(cache.get(key, loads(key))) == key
            assert cache.statistics().bytes <= 35

    with ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(work, seed) for seed in range(8)]:
            job.result(60)
    now = cache.statistics()
    assert now.hits + now.misses == 2400
    assert now.misses == len(loads.made) == now.evictions + len(cache._shared.kept)


def test_each_byte_kept_is_granted_before_and_given_back_with_the_cache() -> None:
    budget = Budget(25)
    cache, loads = cache_of(100, budget), Loads()
    for key in range(5):
        cache.get(key, loads(key))
    assert list(cache._shared.kept) == [3, 4]
    assert budget.statistics().used == 20
    del cache
    assert budget.statistics().used == 0
