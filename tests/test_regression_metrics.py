"""Errors and explained variance against numpy's arithmetic: gaps, offsets, merged parts."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.errors import ConfigError
from streamtrain.means import FunctionMetric, Mean
from streamtrain.metrics import R2, MeanAbsoluteError, MeanSquaredError, RootMeanSquaredError

ERRORS: list[Any] = [MeanAbsoluteError, MeanSquaredError, RootMeanSquaredError, R2]
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def parts(sizes: list[int], *, seed: int = 0, columns: int = 3, offset: float = 0.0, gaps: float = 0.0) -> Any:
    rng = np.random.default_rng(seed)
    made = []
    for size in sizes:
        true = rng.standard_normal((size, columns)) + offset
        out = true + rng.standard_normal((size, columns))
        true[rng.random(true.shape) < gaps] = np.nan
        made.append((torch.from_numpy(out), torch.from_numpy(true)))
    return made


def fed(metric: Any, batches: Any) -> Any:
    for outputs, targets in batches:
        metric.update(outputs, targets)
    return metric


def whole(batches: Any) -> tuple[Any, Any]:
    return np.concatenate([out for out, _ in batches]), np.concatenate([true for _, true in batches])


def explained(out: Any, true: Any, *, weighted: bool = False) -> float:
    """scikit-learn's r2_score, written out; gaps are left out, and outputs with fewer than two targets."""
    squares, spreads = [], []
    for o, t in zip(out.T, true.T, strict=True):
        there = ~np.isnan(t)
        if there.sum() >= 2:
            squares.append(((o - t)[there] ** 2).sum())
            spreads.append(((t[there] - t[there].mean()) ** 2).sum())
    if not spreads:
        return math.nan
    each = [1 - s / v if v else float(s == 0) for s, v in zip(squares, spreads, strict=True)]
    return float(np.average(each, weights=spreads)) if weighted and any(spreads) else float(np.mean(each))


@given(sizes=sizes, seed=st.integers(0, 99))
def test_the_root_is_taken_of_all_batches_together(sizes: list[int], seed: int) -> None:
    batches = parts(sizes, seed=seed)
    out, true = whole(batches)
    assert fed(RootMeanSquaredError(), batches).compute() == pytest.approx(math.sqrt(((out - true) ** 2).mean()))


@pytest.mark.parametrize("average", ["uniform", "variance"])
@given(sizes=sizes, seed=st.integers(0, 99), gaps=st.sampled_from([0.0, 0.4]))
def test_explained_variance_is_averaged_over_outputs(average: str, sizes: list[int], seed: int, gaps: float) -> None:
    batches = parts(sizes, seed=seed, gaps=gaps)
    expected = explained(*whole(batches), weighted=average == "variance")
    assert fed(R2(average=average, nan="ignore"), batches).compute() == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_explained_variance_survives_targets_far_from_zero() -> None:
    batches = parts([7, 5, 50, 3], offset=1e9)
    assert fed(R2(), batches).compute() == pytest.approx(explained(*whole(batches)), rel=1e-6)


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_targets_that_do_not_vary_count_one_if_all_is_right_else_zero(error: float) -> None:
    true = torch.full((5,), 3.0)
    assert fed(R2(), [(true + error, true)]).compute() == (0.0 if error else 1.0)


def test_one_target_explains_nothing() -> None:
    assert math.isnan(fed(R2(), [(torch.ones(1), torch.ones(1))]).compute())
    assert math.isnan(R2().compute())


def test_a_column_and_a_row_are_one_output() -> None:
    out, true = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 3.0, 4.0])
    assert fed(R2(), [(out, true)]).compute() == fed(R2(), [(out[:, 0], true)]).compute()


@pytest.mark.parametrize("kind", ERRORS)
@given(sizes=sizes, cut=st.integers(0, 6), gaps=st.sampled_from([0.0, 0.5]))
def test_merged_parts_are_the_whole_with_gaps_too(kind: Any, sizes: list[int], cut: int, gaps: float) -> None:
    batches = parts(sizes, gaps=gaps)
    one, other = (fed(kind(nan="ignore"), part) for part in (batches[:cut], batches[cut:]))
    one.merge(other)
    assert one.compute() == pytest.approx(fed(kind(nan="ignore"), batches).compute(), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("kind", ERRORS)
def test_a_state_is_json_and_goes_on_where_it_was(kind: Any) -> None:
    batches = parts([4, 5, 6], gaps=0.3)
    later = kind(nan="ignore")
    later.load_state_dict(json.loads(json.dumps(fed(kind(nan="ignore"), batches[:2]).state_dict())))
    assert fed(later, batches[2:]).compute() == fed(kind(nan="ignore"), batches).compute()


@pytest.mark.parametrize("kind", [MeanAbsoluteError, MeanSquaredError])
@given(seed=st.integers(0, 99))
def test_gaps_in_targets_are_left_out(kind: Any, seed: int) -> None:
    batches = parts([6, 9], seed=seed, gaps=0.3)
    out, true = whole(batches)
    error = np.abs(out - true) if kind is MeanAbsoluteError else (out - true) ** 2
    assert fed(kind(nan="ignore"), batches).compute() == pytest.approx(np.nanmean(error))
    assert math.isnan(fed(kind(), batches).compute()) == bool(np.isnan(true).any())


@pytest.mark.parametrize("average", ["uniform", "variance"])
def test_a_model_that_diverged_where_targets_do_not_vary_explains_nothing(average: str) -> None:
    true = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    out = true.clone()
    out[0, 0] = math.nan
    assert math.isnan(fed(R2(average=average), [(out, true)]).compute())


@pytest.mark.parametrize("kind", ERRORS)
def test_a_model_that_diverged_does_not_look_good(kind: Any) -> None:
    ((out, true),) = parts([8])
    out[3, 1] = math.nan
    assert math.isnan(fed(kind(nan="ignore"), [(out, true)]).compute())
    true[3, 1] = math.nan
    assert not math.isnan(fed(kind(nan="ignore"), [(out, true)]).compute())


@pytest.mark.parametrize("kind", ERRORS)
def test_what_a_gap_is_must_be_said_in_these_words(kind: Any) -> None:
    with pytest.raises(ConfigError, match="nan must be 'propagate' or 'ignore', not 'skip'"):
        kind(nan="skip")


@pytest.mark.parametrize(("kind", "power"), [(MeanAbsoluteError, 1), (MeanSquaredError, 2)])
def test_errors_of_complex_numbers_are_their_absolute_values(kind: Any, power: int) -> None:
    """Their imaginary parts were left out."""
    generator = torch.Generator().manual_seed(0)
    out, true = (torch.randn(9, 2, dtype=torch.complex64, generator=generator) for _ in range(2))
    expected = float((out - true).abs().double().pow(power).mean())
    assert fed(kind(), [(out[:4], true[:4]), (out[4:], true[4:])]).compute() == pytest.approx(expected)
    true[0, 0] = torch.tensor(complex(0, math.nan))
    rest = float((out - true).abs().double().pow(power).flatten()[1:].mean())
    assert fed(kind(nan="ignore"), [(out, true)]).compute() == pytest.approx(rest)


@pytest.mark.parametrize(
    "metric", [R2(), Mean(), FunctionMetric(lambda outputs, targets: outputs - targets)], ids=["r2", "mean", "function"]
)
def test_complex_numbers_that_make_no_metric_are_refused(metric: Any) -> None:
    with pytest.raises(ConfigError, match="complex"):
        metric.update(torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64))


def test_samples_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match="R2: 2 outputs a sample after 3"):
        fed(R2(), [*parts([4]), *parts([4], columns=2)])
    with pytest.raises(ConfigError, match="R2: average must be"):
        R2(average="macro")


@pytest.mark.parametrize("kind", ERRORS)
def test_memory_does_not_grow_with_the_samples(kind: Any) -> None:
    few, many = fed(kind(), parts([4])), fed(kind(), parts([4] * 50))
    assert len(json.dumps(many.state_dict())) < 2 * len(json.dumps(few.state_dict()))


@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.3, 1e8 + 0.1])
@given(sizes=sizes)
def test_targets_that_do_not_vary_have_no_variance_to_explain(value: float, sizes: list[int]) -> None:
    gap = (torch.tensor([[0.0, 5.0]]), torch.tensor([[value, math.nan]], dtype=torch.float64))
    right, wrong = R2(nan="ignore"), R2(nan="ignore")
    for size in [2, *sizes]:
        true = torch.full((size, 2), value, dtype=torch.float64)
        right.update(true, true)
        wrong.update(true + 1, true)
    assert right.compute() == 1.0
    wrong.update(*gap)
    assert wrong.compute() == 0.0
