"""What the names of callbacks promise: no two are the same, and a state finds its own whatever their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.naming import alike, matched, named, unmatched
from streamtrain.early_stopping import EarlyStopping
from streamtrain.trainer import Trainer
from tests.engine import Samples, network

TOLD_APART = "nothing but their order tells them apart"


class Keyed(Callback):
    """Has a state, and perhaps a key."""

    def __init__(self, key: Any = "", held: int = 0) -> None:
        self.state_key, self.held = key, held

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = int(state["held"])


class Other(Keyed):
    """One of another class."""


def as_named(*callbacks: object) -> dict[str, object]:
    return dict(zip(named(callbacks), callbacks, strict=True))


MANY = st.lists(st.builds(lambda kind, key: kind(key), st.sampled_from([Keyed, Other]), st.text("ab01[]", max_size=2)))


@given(MANY)
def test_no_two_have_the_same_name(callbacks: list[Keyed]) -> None:
    assert len(set(named(callbacks))) == len(callbacks)


@given(MANY.flatmap(lambda callbacks: st.tuples(st.just(callbacks), st.permutations(callbacks))))
def test_in_any_order_each_that_is_not_like_another_gets_its_own_state(orders: tuple[list[Keyed], list[Keyed]]) -> None:
    before, now = as_named(*orders[0]), as_named(*orders[1])
    groups = [name for group in alike(now) for name in group]
    for name, saved in matched(before, now).items():
        assert name in groups or before[saved] is now[name]


def test_one_that_was_alone_is_found_beside_another_and_the_other_way_round() -> None:
    one, two = as_named(Keyed("a")), as_named(Keyed("b"), Keyed("a"))
    assert matched(one, two) == {"Keyed['a']": "Keyed['a']"}
    assert matched(two, one) == {"Keyed['a']": "Keyed['a']"}


def test_the_only_one_of_a_class_has_its_state_whatever_it_watches_now() -> None:
    assert matched(["Keyed['a']"], as_named(Keyed("b"))) == {"Keyed['b']": "Keyed['a']"}
    assert matched(["Keyed"], as_named(Keyed("b"))) == {"Keyed['b']": "Keyed"}


def test_what_is_nobodys_is_told_by_whether_its_class_is_there() -> None:
    states = {"Keyed[0]": {"held": 1}, "Keyed[1]": {}, "Other": {"held": 1}}
    assert unmatched(states, as_named(Keyed("a"), Keyed("b"))) == (["Other"], ["Keyed[0]"])


async def run(folder: Path, *callbacks: Any, epochs: int) -> None:
    trainer = Trainer(network(), nn.MSELoss(), run_dir=folder, seed=1, device="cpu", callbacks=callbacks)
    await trainer.fit(Samples(16), Samples(16), max_epochs=epochs, resume="auto")


async def test_two_rules_of_patience_in_another_order_go_on_with_their_own_states(tmp_path: Path) -> None:
    def rules() -> tuple[EarlyStopping, EarlyStopping]:
        return EarlyStopping("loss", patience=50), EarlyStopping("val_loss", patience=50, min_delta=1e9)

    loss, held_out = rules()
    await run(tmp_path, loss, held_out, epochs=3)
    left = loss.state_dict(), held_out.state_dict()
    loss, held_out = rules()
    await run(tmp_path, held_out, loss, epochs=3)
    assert (loss.state_dict(), held_out.state_dict()) == left
    assert held_out.rules["val_loss"].since == 2


async def test_that_only_their_order_tells_two_apart_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await run(tmp_path / "keyed", Keyed("a"), Keyed("b"), epochs=1)
    assert TOLD_APART not in caplog.text
    await run(tmp_path / "alike", Keyed(), Keyed(), Other(), epochs=1)
    assert caplog.text.count(f"Keyed[0], Keyed[1]: {TOLD_APART}") == 1


async def test_a_state_that_may_be_of_either_is_given_to_none_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await run(tmp_path, Keyed(held=1), Keyed(held=2), epochs=1)
    one, other = Keyed("a"), Keyed("b")
    await run(tmp_path, one, other, epochs=2)
    assert one.held == other.held == 0
    assert "which callback of now had them can't be known: Keyed[0], Keyed[1]" in caplog.text
