"""The state of numpy's generator, taken by its memory, is promised to be what numpy's own functions give and put."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from streamtrain import numpy_rng
from streamtrain.numpy_rng import put, take

DRAWS: dict[str, Callable[[], Any]] = {
    "normal": np.random.standard_normal,  # keeps half a pair
    "normals": lambda: np.random.randn(3),
    "uniform": np.random.rand,
    "integers": lambda: np.random.randint(10, size=5),
    "gamma": lambda: np.random.gamma(2.0),
    "many": lambda: np.random.rand(700),  # more than the words of a state
}
draws = st.lists(st.sampled_from(sorted(DRAWS)), max_size=5)


@pytest.fixture(autouse=True)
def _own_generator() -> Iterator[None]:
    before = np.random.get_state()
    yield
    np.random.set_state(before)


def drawn(names: list[str]) -> list[Any]:
    return [np.asarray(DRAWS[name]()).tolist() for name in names]


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@given(st.integers(0, 2**32 - 1), draws)
def test_what_is_taken_is_what_numpy_gives(seed: int, before: list[str]) -> None:
    np.random.seed(seed)
    drawn(before)
    expected = np.random.get_state()
    taken = take()
    assert [type(part) for part in taken] == [type(part) for part in expected]
    assert same(taken, expected)
    put(taken)
    assert same(np.random.get_state(), expected)


@given(st.integers(0, 2**32 - 1), draws, draws, draws)
def test_two_who_take_turns_draw_what_each_draws_alone(
    seed: int, mine: list[str], theirs: list[str], again: list[str]
) -> None:
    np.random.seed(seed)
    alone = drawn(mine + again)
    np.random.seed((seed + 1) % 2**32)
    of_theirs = drawn(theirs + again)
    np.random.seed((seed + 1) % 2**32)
    other = take()
    np.random.seed(seed)
    got = drawn(mine)
    ours = take()
    put(other)
    other_got = drawn(theirs)
    other = take()
    put(ours)
    assert got + drawn(again) == alone
    take()
    put(other)
    assert other_got + drawn(again) == of_theirs


def test_a_taken_state_does_not_move_with_the_generator() -> None:
    taken = take()
    put(taken)
    first = drawn(["many"])
    take()
    put(taken)
    assert drawn(["many"]) == first


@pytest.mark.parametrize("change", ["list", "other words", "a view"])
def test_a_state_of_another_shape_is_put_as_numpy_does(change: str) -> None:
    np.random.seed(5)
    state: Any = np.random.get_state()
    name, key, pos, has, value = state
    first = drawn(["normal", "many"])
    words: Any = {"list": key.tolist(), "other words": key.astype(np.int64), "a view": np.repeat(key, 2)[::2]}[change]
    take()
    put([name, words, pos, has, value])
    assert drawn(["normal", "many"]) == first


@pytest.mark.parametrize("state", [("no",), ("PCG64", 1, 2, 0, 0.0), ("MT19937", np.zeros(3, np.uint32), 1, 0, 0.0)])
def test_what_is_no_state_is_refused_as_numpy_does(state: Any) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (whatever it is)
        np.random.set_state(state)
    with pytest.raises(theirs.type):
        put(state)


def test_where_the_memory_is_laid_out_otherwise_numpys_own_functions_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_rng, "_laid_out_so", lambda: False)
    np.random.seed(3)
    DRAWS["normal"]()
    expected = np.random.get_state()
    taken = take()
    assert same(taken, expected)
    np.random.seed(4)
    put(taken)
    assert same(np.random.get_state(), expected)


def test_numpys_memory_is_laid_out_as_is_known() -> None:
    """Else each burst takes 0.15 ms more: what changed is to be looked at."""
    assert numpy_rng._laid_out_so()


def test_a_generator_of_the_hosts_own_choice_is_left_to_numpy() -> None:
    """Another kind has a memory of its own shape."""
    before = get_bit_generator()
    set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.warns(RuntimeWarning, match="MT19937"):
            taken = take()
        first = drawn(["uniform", "many"])
        put(taken)
        assert drawn(["uniform", "many"]) == first
    finally:
        set_bit_generator(before)


def test_nothing_is_written_while_another_thread_draws_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws without the interpreter's lock, and with that of its generator."""
    generator, state = get_bit_generator(), take()
    others: list[bool] = []

    class Looked:
        """Whether another thread could draw just now."""

        def look(self) -> None:
            others.append(generator.lock.acquire(blocking=False))
            if others[-1]:
                generator.lock.release()

        def __getattr__(self, name: str) -> Any:
            thread = threading.Thread(target=self.look)
            thread.start()
            thread.join()
            return getattr(ctypes, name)

    monkeypatch.setattr(numpy_rng, "ctypes", Looked())
    put(state)
    assert others == [False]
