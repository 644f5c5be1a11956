"""The area under the ROC curve against the definition, pair by pair, within the bound that the bins state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.errors import ConfigError, DataError
from streamtrain.metrics import AUROC

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def area(scores: Any, member: Any) -> float:
    """The share of pairs that are in order; equal ones count half."""
    yes, no = scores[member.astype(bool)], scores[~member.astype(bool)]
    if not len(yes) or not len(no):
        return math.nan
    return float(((yes[:, None] > no) + (yes[:, None] == no) / 2).mean())


def parts(sizes: list[int], *, seed: int = 0, scale: float = 1.0) -> Any:
    made = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(size, generator=made), torch.randint(0, 2, (size,), generator=made)) for size in sizes]


def fed(metric: Any, batches: Any) -> Any:
    for outputs, targets in batches:
        metric.update(outputs, targets)
    return metric


def whole(batches: Any) -> tuple[Any, Any]:
    return tuple(np.concatenate([part[i] for part in batches]) for i in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("bits", [10, 16])
@given(sizes=sizes, seed=st.integers(0, 99), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e9]))
def test_the_area_is_that_of_all_pairs_within_the_bound(bits: int, sizes: list[int], seed: int, scale: float) -> None:
    batches = parts(sizes, seed=seed, scale=scale)
    metric, expected = fed(AUROC(bits=bits), batches), area(*whole(batches))
    if math.isnan(expected):
        assert math.isnan(metric.compute())
        assert math.isnan(metric.bound())
    else:
        assert abs(metric.compute() - expected) <= metric.bound() + 1e-12


@given(st.lists(st.tuples(st.integers(-300, 300), st.booleans()), max_size=40))
def test_scores_that_the_bins_tell_apart_are_exact(pairs: list[tuple[int, bool]]) -> None:
    scores = np.array([np.sign(n) * 1.0078125 ** abs(n) for n, _ in pairs], dtype=np.float32)  # steps of 1/128
    member = np.array([yes for _, yes in pairs], dtype=bool)
    metric = AUROC(bits=18)
    metric.update(torch.from_numpy(scores), torch.from_numpy(member))
    assert metric.compute() == pytest.approx(area(scores, member), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("counts", [[108, 34, 649, 9], [3, 7, 11], [49, 98]])
def test_a_perfect_order_is_1_and_its_reverse_0(counts: list[int]) -> None:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    logits = torch.nn.functional.one_hot(targets).float() * torch.linspace(1, 3, len(targets))[:, None]
    metric, reverse = AUROC(), AUROC()
    metric.update(logits, targets)
    reverse.update(-logits, targets)
    assert metric.compute() == 1.0
    assert reverse.compute() == 0.0


def test_the_order_of_scores_is_all_that_counts() -> None:
    batches = parts([40, 60])
    logits = fed(AUROC(), batches).compute()
    chances = fed(AUROC(bits=24), [(torch.sigmoid(out), true) for out, true in batches]).compute()
    assert chances == pytest.approx(logits, abs=2e-3)
    assert fed(AUROC(), [(-out, true) for out, true in batches]).compute() == pytest.approx(1 - logits, abs=1e-12)


def test_zero_is_one_score_whatever_its_sign() -> None:
    assert fed(AUROC(), [(torch.tensor([0.0, -0.0]), torch.tensor([1, 0]))]).compute() == 0.5


@given(sizes=sizes, cut=st.integers(0, 6))
def test_merged_counts_are_exactly_the_whole(sizes: list[int], cut: int) -> None:
    batches = parts(sizes)
    one, other = (fed(AUROC(bits=10), part) for part in (batches[:cut], batches[cut:]))
    before = other.state_dict()
    one.merge(other)
    assert torch.equal(one.state_dict()["counts"], fed(AUROC(bits=10), batches).state_dict()["counts"])
    fed(one, batches[:1])
    assert before["counts"] is None or torch.equal(other.state_dict()["counts"], before["counts"])


def test_a_state_goes_on_where_it_was() -> None:
    batches, later = parts([4, 5, 6]), AUROC()
    later.load_state_dict(fed(AUROC(), batches[:2]).state_dict())
    assert fed(later, batches[2:]).compute() == fed(AUROC(), batches).compute()


def test_classes_are_averaged_by_their_chance_against_the_rest() -> None:
    made = torch.Generator().manual_seed(0)
    logits, true = 40 * torch.randn(200, 5, generator=made), torch.randint(0, 4, (200,), generator=made)
    chances = torch.log_softmax(logits.double(), 1)
    ranks = (chances - torch.log(-torch.expm1(chances))).numpy()
    expected = np.mean([area(ranks[:, c], true.numpy() == c) for c in range(4)])  # of class 4 there are no pairs
    metric = fed(AUROC(), [(logits[:90], true[:90]), (logits[90:], true[90:])])
    assert abs(metric.compute() - expected) <= metric.bound() + 1e-12
    assert metric.bound() < 0.01


def test_gaps_are_left_out_and_what_is_no_class_is_found() -> None:
    ((scores, true),) = parts([30])
    gappy = true.double()
    gappy[:7] = math.nan
    assert fed(AUROC(nan="ignore"), [(scores, gappy)]).compute() == fed(AUROC(), [(scores[7:], true[7:])]).compute()
    numbered = torch.where(torch.arange(30) < 7, -1, true)
    expected = fed(AUROC(), [(scores[7:], true[7:])]).compute()
    assert fed(AUROC(ignore_index=-1), [(scores, numbered)]).compute() == expected
    with pytest.raises(DataError, match="7 targets are no class from 0 to 1"):
        fed(AUROC(), [(scores, numbered)]).compute()


def test_a_score_that_is_nan_gives_nan() -> None:
    ((scores, true),) = parts([30])
    scores[3] = math.nan
    assert math.isnan(fed(AUROC(), [(scores, true)]).compute())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: AUROC(bits=9), "bits must be an integer from 10 to 24"),
        (lambda: AUROC().update(torch.zeros(3, 2), torch.zeros(4)), "AUROC: outputs of shape"),
        (lambda: AUROC().update(torch.zeros(3), None), "AUROC needs targets"),
        (lambda: AUROC().merge(fed(AUROC(bits=12), parts([2]))), "bins of 12 bits cannot be merged with those of 16"),
    ],
)
def test_what_cannot_be_ranked_is_refused(made: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made()


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_of_classes_rank_as_their_logits_do(dtype: torch.dtype, scale: float) -> None:
    made = torch.Generator().manual_seed(0)
    logits, true = scale * torch.randn(400, 5, generator=made), torch.randint(0, 5, (400,), generator=made)
    told = torch.softmax(logits.double(), 1).to(dtype)
    metric = fed(AUROC(bits=20), [(told, true)])
    expected = np.mean([area(told[:, c].double().numpy(), (true == c).numpy()) for c in range(5)])
    assert abs(metric.compute() - expected) <= metric.bound() + 1e-12
    by_logits = fed(AUROC(bits=20), [(logits, true)])
    assert by_logits.compute() == pytest.approx(expected, abs=2e-3 if dtype.itemsize > 2 and scale < 100 else 0.05)


def test_logits_of_two_classes_are_no_probabilities_where_some_add_up_to_one() -> None:
    made = torch.Generator().manual_seed(0)
    logits, true = torch.randn(4000, 2, generator=made).bfloat16(), torch.randint(0, 2, (4000,), generator=made)
    assert fed(AUROC(), [(logits, true)]).compute() == fed(AUROC(), [(logits.float(), true)]).compute()


def test_targets_of_classes_may_be_wide_and_without_a_sign() -> None:
    scores, true = torch.eye(3)[[0, 1, 2, 1]], torch.tensor([0, 1, 2, 0])
    assert fed(AUROC(), [(scores, true.to(torch.uint16))]).compute() == fed(AUROC(), [(scores, true)]).compute()
    assert fed(AUROC(), [(scores[:, 0], (true == 0).to(torch.uint32))]).compute() == 0.75
