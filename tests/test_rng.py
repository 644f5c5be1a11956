"""Random states: a fit draws its own numbers, and whoever is around draws as if it were not there."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from streamtrain import rng
from streamtrain.rng import Rng
from streamtrain.state import clone, decode, encode


def draw() -> tuple[Any, ...]:
    """Numbers from all generators, normal ones too, of which some keep half a pair."""
    return (torch.randn(3).tolist(), np.random.randn(), np.random.rand(), random.gauss(0, 1), random.random())


@pytest.fixture(autouse=True)
def _own_generators() -> Any:
    before = rng.capture()
    yield
    rng.restore(before)


def test_restored_states_give_the_same_numbers() -> None:
    draw()
    state = rng.capture()
    assert draw() != (first := draw())
    rng.restore(state)
    draw()
    assert draw() == first


def test_states_go_through_a_checkpoint() -> None:
    draw()
    state = rng.capture()
    document, tensors = encode(state)
    read = decode(document, {name: tensor.clone() for name, tensor in tensors.items()})
    first = draw()
    for kept in (read, clone(state)):
        rng.restore(kept)
        assert draw() == first


def test_a_captured_state_does_not_move_with_the_generator() -> None:
    state = rng.capture()
    first = draw()
    rng.restore(state)
    draw()
    rng.restore(state)
    assert draw() == first


def test_seeding_leaves_the_generators_as_they_are() -> None:
    state = rng.capture()
    first = draw()
    rng.restore(state)
    rng.seeded(7)
    assert draw() == first


def test_seeding_is_not_seen_by_whoever_is_the_first_to_use_a_gpu() -> None:
    """torch keeps the seed of a CUDA that nobody has used yet until somebody does: the host's own stays."""
    torch.manual_seed(1)
    before = torch.cuda._lazy_seed_tracker.get_calls()
    rng.seeded(7)
    assert torch.cuda._lazy_seed_tracker.get_calls() == before


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_a_seed_is_a_state(seed: int) -> None:
    one, other = Rng(rng.seeded(seed)), Rng(rng.seeded(seed))
    draw()
    with one.swapped_in():
        mine = draw()
    draw()
    with other.swapped_in():
        assert draw() == mine
    with Rng(rng.seeded(seed + 1)).swapped_in():
        assert draw() != mine
    torch.manual_seed(seed)
    assert torch.randn(3).tolist() == mine[0]


@pytest.mark.parametrize("end", ["well", "by an error"])
def test_outside_its_bursts_a_fit_is_invisible(end: str) -> None:
    state = rng.capture()
    first = draw()
    rng.restore(state)
    fit = Rng(rng.seeded(7))
    try:
        with fit.swapped_in():
            draw()
            if end != "well":
                raise OSError
    except OSError:
        pass
    assert draw() == first


def test_bursts_go_on_where_the_last_one_ended() -> None:
    whole, parts = Rng(rng.seeded(7)), Rng(rng.seeded(7))
    with whole.swapped_in():
        expected = [draw(), draw()]
    drawn = []
    for _ in range(2):
        with parts.swapped_in():
            drawn.append(draw())
        draw()
    assert drawn == expected


def test_a_glance_leaves_no_trace_in_the_fit() -> None:
    one = Rng(rng.seeded(7))
    with one.swapped_in(keep=False):
        expected = draw()
    with one.swapped_in():
        assert draw() == expected


@pytest.mark.parametrize(
    "change", [{"torch": torch.zeros(3)}, {"python": (3, (1, 2), None)}, {"numpy": ("no",)}], ids=str
)
def test_what_the_generators_do_not_take_is_refused_and_leaves_them_alone(change: dict[str, Any]) -> None:
    before = rng.capture()
    with pytest.raises(Exception):  # noqa: B017, PT011 (each of the three has errors of its own)
        rng.checked({**rng.seeded(1), **change})
    after = rng.capture()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert (before["numpy"][1] == after["numpy"][1]).all()
    assert rng.checked(before) is before


@pytest.mark.parametrize("fails", [1, 2])
def test_a_device_that_does_not_tell_its_state_leaves_the_hosts_numbers_alone(
    monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """Before a burst, or at its end."""
    asked: list[object] = []

    def states() -> list[Any]:
        asked.append(None)
        if len(asked) == fails:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return []

    fit = Rng(rng.seeded(3))
    host = rng.capture()
    undisturbed = draw()
    rng.restore(host)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: None)
    with pytest.raises(RuntimeError, match="device-side"), fit.swapped_in():
        draw()
    monkeypatch.undo()
    assert draw() == undisturbed
