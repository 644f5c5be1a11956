"""When to give up, and what is asked for then."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.early_stopping import EarlyStopping, Patience
from streamtrain.errors import ConfigError
from streamtrain.events import EpochEnd, ValidationEnd, Verdict


def judged(rule: EarlyStopping, *values: float, name: str = "val_loss") -> list[Verdict]:
    verdicts = [rule.judge({name: value}) for value in values]
    return [verdict for verdict in verdicts if verdict is not None]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30), st.integers(1, 4))
def test_it_stops_after_so_many_values_without_a_better_one(values: list[float], patience: int) -> None:
    rule = Patience(patience)
    for number, value in enumerate(values):
        rule.offer(value)
        past = [(v if math.isfinite(v) else math.inf) for v in values[: number + 1]]
        best = past.index(min(past)) if min(past) < math.inf else -1
        assert rule.exhausted == (number - best >= patience)


def test_the_first_verdicts_save_and_the_last_stops() -> None:
    verdicts = judged(EarlyStopping(patience=2), 3.0, 2.0, 2.5, 2.1)
    assert [verdict.save for verdict in verdicts] == ["best", "best", "", ""]
    assert [verdict.stop for verdict in verdicts] == [False, False, False, True]
    assert verdicts[-1].detail == "val_loss has not improved on 2 for 2 validations"
    assert all(verdict.restore and verdict.monitor == "val_loss" for verdict in verdicts)


def test_an_improvement_must_exceed_min_delta() -> None:
    assert judged(EarlyStopping(patience=1, min_delta=0.5), 3.0, 2.6)[-1].stop


def test_more_is_better_for_an_accuracy() -> None:
    assert not judged(EarlyStopping("val_accuracy", patience=1), 0.1, 0.2, 0.3, name="val_accuracy")[-1].stop
    assert judged(EarlyStopping("val_accuracy", patience=1, mode="min"), 0.1, 0.2, name="val_accuracy")[-1].stop


@pytest.mark.parametrize(("combine", "stops"), [("all", [False, False, True]), ("any", [False, True, True])])
def test_several_monitors_are_combined(combine: str, stops: list[bool]) -> None:
    rule = EarlyStopping(["val_a", "val_b"], patience=1, combine=combine)
    verdicts = [rule.judge({"val_a": a, "val_b": b}) for a, b in ((1, 1), (1, 0.5), (1, 0.5))]
    assert [verdict is not None and verdict.stop for verdict in verdicts] == stops


def test_a_condition_stops_at_once() -> None:
    rule = EarlyStopping(condition=lambda metrics: metrics["val_loss"] < 1)
    assert [verdict.stop for verdict in judged(rule, 2.0, 0.5)] == [False, True]


def test_the_rate_is_lowered_half_way() -> None:
    verdicts = judged(EarlyStopping(patience=4, reduce_lr=0.1), 1.0, 2.0, 2.0, 2.0, 2.0)
    assert [verdict.lr_factor for verdict in verdicts] == [None, None, 0.1, None, None]


async def test_monitors_of_the_training_are_judged_at_the_ends_of_epochs() -> None:
    rule = EarlyStopping("loss", patience=1)
    assert await rule.on_validation_end(ValidationEnd(metrics={"loss": 1.0})) is None
    assert (await rule.on_epoch_end(EpochEnd(metrics={"loss": 1.0}))) is not None
    assert await EarlyStopping().on_epoch_end(EpochEnd(metrics={"loss": 1.0})) is None


async def test_the_sanity_check_counts_nothing_but_finds_wrong_names() -> None:
    rule = EarlyStopping()
    assert await rule.on_validation_end(ValidationEnd(metrics={"val_loss": 1.0}, sanity=True)) is None
    assert rule.rules["val_loss"].best is None
    with pytest.raises(ConfigError, match="nothing logs 'val_los'; logged: loss, val_loss") as caught:
        await EarlyStopping("val_los").on_validation_end(ValidationEnd(metrics={"val_loss": 1.0}, sanity=True))
    assert "val_loss" in caught.value.hint


def test_its_state_is_taken_back() -> None:
    first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
    judged(first, 1.0, 2.0, 2.0)
    second.load_state_dict(first.state_dict())
    assert judged(second, 2.0)[-1].stop


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": 5},
        {"monitor": ""},
        {"monitor": ["val_loss", 5]},
        {"patience": -1},
        {"patience": 1.5},
        {"patience": True},
        {"min_delta": -1.0},
        {"min_delta": "x"},
        {"mode": "up"},
        {"mode": 5},
        {"restore_best": "no"},
        {"reduce_lr": 2.0},
        {"reduce_lr": "x"},
        {"condition": "val_loss < 1"},
        {"combine": "some"},
        {"combine": ["all"]},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        EarlyStopping(**options)
