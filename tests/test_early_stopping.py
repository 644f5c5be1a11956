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


def reference(
    rows: list[list[float]], *, patience: int, deltas: list[float], modes: list[str], baselines: Any, combine: Any
) -> list[tuple[bool, bool, bool]]:
    """The rule written plainly, from all rows again each time: (stop, the first is a new best, half way just now)."""
    said, was_half = [], False
    for number in range(1, len(rows) + 1):
        waits, new = [], False
        for monitor, (delta, mode, baseline) in enumerate(zip(deltas, modes, baselines, strict=True)):
            best, last, new_here = None, 0, False
            for place, row in enumerate(rows[:number], 1):
                value = row[monitor] if mode == "min" else -row[monitor]
                goal = baseline if mode == "min" or baseline is None else -baseline
                new_here = math.isfinite(value) and (best is None or best - value > delta)
                if new_here:
                    best = value
                    last = place if goal is None or goal - value > delta else last
            waits.append(number - last)
            new = new_here if monitor == 0 else new
        half = combine(wait >= max(1, patience // 2) for wait in waits)
        stop = combine(wait >= max(1, patience) for wait in waits)
        said.append((stop, new, half and not was_half and not stop))
        was_half = half
    return said


numbers = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(
    st.lists(st.tuples(numbers, numbers), max_size=25),
    st.integers(2, 5),
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 2.0])),
    st.tuples(st.sampled_from(["min", "max"]), st.sampled_from(["min", "max"])),
    st.tuples(st.sampled_from([None, 0.0, 2.0]), st.sampled_from([None, 1.0])),
    st.sampled_from(["all", "any"]),
)
def test_it_decides_as_the_plain_rule_does(
    rows: Any, patience: int, deltas: Any, modes: Any, baselines: Any, combine: str
) -> None:
    names = ("val_a", "val_b")
    rule = EarlyStopping(
        names,
        patience=patience,
        min_delta=dict(zip(names, deltas, strict=True)),
        mode=dict(zip(names, modes, strict=True)),
        baseline={name: value for name, value in zip(names, baselines, strict=True) if value is not None},
        combine=combine,
        reduce_lr=0.5,
    )
    expected = reference(
        [list(row) for row in rows],
        patience=patience,
        deltas=deltas,
        modes=modes,
        baselines=baselines,
        combine=all if combine == "all" else any,
    )
    verdicts = [rule.judge(dict(zip(names, row, strict=True))) for row in rows]
    found = [(v.stop, v.save == "best", v.lr_factor is not None) for v in verdicts if v is not None]
    assert found == expected
    assert rule.gives_up == (bool(expected) and expected[-1][0])


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


def test_the_rate_is_lowered_half_way_and_the_fit_ended_after() -> None:
    verdicts = judged(EarlyStopping(patience=4, reduce_lr=0.1), 1.0, 2.0, 2.0, 2.0, 2.0)
    assert [verdict.lr_factor for verdict in verdicts] == [None, None, 0.1, None, None]
    assert [verdict.stop for verdict in verdicts] == [False, False, False, False, True]


def test_that_the_rate_is_lowered_is_said_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    judged(EarlyStopping(patience=3, reduce_lr=0.1), 1.0, 2.0, 2.0)
    said = "the learning rate is multiplied by 0.1: val_loss has not improved on 1 for 1 validations"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_the_rate_is_lowered_once_in_each_wait() -> None:
    verdicts = judged(EarlyStopping(patience=3, reduce_lr=0.1), 1.0, 2.0, 2.0, 0.5, 2.0, 2.0, 2.0)
    assert [verdict.lr_factor for verdict in verdicts] == [None, 0.1, None, None, 0.1, None, None]
    assert [verdict.stop for verdict in verdicts].index(True) == 6


def test_the_rate_is_lowered_when_all_monitors_wait_or_any() -> None:
    rows = [(1, 1), (2, 0.5), (2, 0.5), (2, 0.5)]
    for combine, lowered in (("all", [2]), ("any", [1])):
        rule = EarlyStopping(["val_a", "val_b"], patience=3, reduce_lr=0.1, combine=combine)
        verdicts = [rule.judge({"val_a": a, "val_b": b}) for a, b in rows]
        assert [n for n, verdict in enumerate(verdicts) if verdict is not None and verdict.lr_factor] == lowered


def test_a_baseline_must_be_got_beyond_within_the_patience() -> None:
    verdicts = judged(EarlyStopping(patience=3, baseline=0.5), 3.0, 2.0, 1.0)
    assert [verdict.stop for verdict in verdicts] == [False, False, True]
    assert verdicts[-1].detail == "val_loss has reached 1, not the baseline 0.5, in 3 validations"
    assert [verdict.save for verdict in verdicts] == ["best"] * 3
    after = judged(EarlyStopping(patience=3, baseline=0.5), 3.0, 2.0, 0.4, 0.6, 0.6, 0.6)
    assert [verdict.stop for verdict in after].index(True) == 5
    assert after[-1].detail == "val_loss has not improved on 0.4 for 3 validations"


def test_a_baseline_is_reached_from_below_where_more_is_better() -> None:
    rule = EarlyStopping("val_accuracy", patience=2, baseline=0.9)
    assert [verdict.stop for verdict in judged(rule, 0.8, 0.95, 0.9, name="val_accuracy")] == [False] * 3


def test_nothing_that_is_not_finite_counts_as_better() -> None:
    for value in (math.nan, -math.inf):
        assert judged(EarlyStopping(patience=1), 1.0, value)[-1].stop
    last = judged(EarlyStopping(patience=2, baseline=1.0), math.nan, math.nan)[-1]
    assert last.detail == "val_loss has reached nothing, not the baseline 1, in 2 validations"


def test_options_may_be_given_by_monitor() -> None:
    rule = EarlyStopping(["val_a", "val_b"], mode={"val_b": "max"}, min_delta={"val_a": 0.5}, baseline={"val_a": 2})
    assert (rule.rules["val_a"].mode, rule.rules["val_b"].mode) == ("min", "max")
    assert (rule.rules["val_a"].min_delta, rule.rules["val_b"].min_delta) == (0.5, 0.0)
    assert (rule.rules["val_a"].baseline, rule.rules["val_b"].baseline) == (2.0, None)
    with pytest.raises(ConfigError, match="EarlyStopping: mode: nothing logs 'val_c'; logged: val_a, val_b"):
        EarlyStopping(["val_a", "val_b"], mode={"val_c": "max"})
    with pytest.raises(ConfigError, match=r"baseline=0\.5 for several monitors"):
        EarlyStopping(["val_a", "val_b"], baseline=0.5)


async def test_monitors_of_the_training_are_judged_at_the_ends_of_epochs() -> None:
    rule = EarlyStopping("loss", patience=1)
    assert await rule.on_validation_end(ValidationEnd(metrics={"loss": 1.0})) is None
    assert (await rule.on_epoch_end(EpochEnd(metrics={"loss": 1.0}))) is not None
    assert await EarlyStopping().on_epoch_end(EpochEnd(metrics={"loss": 1.0})) is None


async def test_the_sanity_check_counts_nothing_but_finds_wrong_names() -> None:
    rule = EarlyStopping()
    assert await rule.on_validation_end(ValidationEnd(metrics={"val_loss": 1.0}, sanity=True)) is None
    assert rule.rules["val_loss"].best is None
    event = ValidationEnd(metrics={"val_loss": 1.0}, sanity=True)
    assert await EarlyStopping(["val_loss", "loss_rain"]).on_validation_end(event) is None
    with pytest.raises(ConfigError, match="nothing logs 'val_los'; logged: loss, val_loss") as caught:
        await EarlyStopping("val_los").on_validation_end(ValidationEnd(metrics={"val_loss": 1.0}, sanity=True))
    assert "val_loss" in caught.value.hint


def test_more_patience_takes_back_that_it_gave_up() -> None:
    ended, same, patient = (EarlyStopping(patience=patience) for patience in (2, 2, 3))
    judged(ended, 1.0, 2.0, 2.0)
    for rule in (same, patient):
        rule.load_state_dict(ended.state_dict())
    assert (ended.gives_up, same.gives_up, patient.gives_up) == (True, True, False)


def test_a_condition_that_was_met_is_remembered_unless_it_is_gone() -> None:
    first, second = (EarlyStopping(condition=lambda metrics: True) for _ in range(2))
    without = EarlyStopping()
    judged(first, 1.0)
    for rule in (second, without):
        rule.load_state_dict(first.state_dict())
    assert (first.gives_up, second.gives_up, without.gives_up) == (True, True, False)


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
        {"reduce_lr": 0.5, "patience": 1},
        {"baseline": "x"},
        {"baseline": math.nan},
        {"baseline": True},
        {"min_delta": {"val_loss": -1.0}},
        {"mode": {"val_loss": "up"}},
        {"condition": "val_loss < 1"},
        {"combine": "some"},
        {"combine": ["all"]},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        EarlyStopping(**options)
