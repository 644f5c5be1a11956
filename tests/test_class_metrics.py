"""Counts of classes against numpy's: averages as scikit-learn defines them, gaps, and answers that are no class."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamtrain.errors import ConfigError, DataError
from streamtrain.metrics import F1, Accuracy, ConfusionMatrix, Precision, Recall, TopKAccuracy

RATIOS: list[Any] = [Precision, Recall, F1]
COUNTS: list[Any] = [*RATIOS, ConfusionMatrix]
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def parts(sizes: list[int], *, seed: int = 0, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, classes, generator=made), torch.randint(0, classes, (size,), generator=made))
        for size in sizes
    ]


def fed(metric: Any, batches: Any) -> Any:
    for outputs, targets in batches:
        metric.update(outputs, targets)
    return metric


def table(given: Any, true: Any, classes: int) -> Any:
    made = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(made, (true, given), 1)
    return made


def ratio(kind: Any, made: Any, average: str) -> float:
    """By the textbook, from a confusion matrix; what does not occur is left out, a ratio of nothing is 0."""
    right, given, true = np.diag(made).astype(float), made.sum(0).astype(float), made.sum(1).astype(float)
    if average == "micro":
        right, given, true = (np.array([x.sum()]) for x in (right, given, true))
    above, below = {Precision: (right, given), Recall: (right, true), F1: (2 * right, given + true)}[kind]
    each = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    if average == "binary":
        return float(each[1])
    occurs = given + true > 0
    return float(np.average(each[occurs], weights=true[occurs] if average == "weighted" else None))


def whole(batches: Any) -> tuple[Any, Any]:
    scores = np.concatenate([out for out, _ in batches])
    return scores.argmax(1), np.concatenate([true for _, true in batches])


@pytest.mark.parametrize("kind", [Accuracy, *COUNTS])
def test_probabilities_where_logits_are_meant_are_said_once(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    logits, yes = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([0, 1, 1])
    for metric, batches in [
        (kind(), [(logits, yes), (logits.sigmoid(), yes)]),
        (kind(threshold=0.5), [(logits.sigmoid(), yes)]),
        (kind(), [(logits > 0, yes)]),
        (kind(), [(torch.softmax(torch.ones(3, 2), 1), yes)]),
    ]:
        fed(metric, batches).compute()
    assert not caplog.records
    wrong = kind()
    for _ in range(2):
        wrong.reset()
        fed(wrong, [(torch.zeros(0), torch.zeros(0)), (logits.sigmoid()[:, None], yes)]).compute()
    assert [record.getMessage() for record in caplog.records] == [
        f"{kind.__name__}: all scores of a yes are from 0 to 1, and all above 0 count as yes, as of logits: if they "
        "are probabilities, give threshold=0.5"
    ]


@pytest.mark.parametrize("kind", [Accuracy, *COUNTS])
def test_logits_of_a_network_that_has_learned_nothing_are_not_called_probabilities(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    close, yes = torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0, 1, 1])
    learns, never = kind(), kind()
    for metric, scores in [(learns, close), (learns, 10 * close - 3), (learns, close), (never, close)]:
        metric.reset()
        fed(metric, [(scores, yes)]).compute()
    assert not caplog.records
    never.reset()
    fed(never, [(close, yes)]).compute()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("kind", RATIOS)
@given(sizes=sizes, seed=st.integers(0, 99))
def test_ratios_of_classes_are_averaged_as_their_name_says(
    kind: Any, average: str, sizes: list[int], seed: int
) -> None:
    batches = parts(sizes, seed=seed)
    expected = ratio(kind, table(*whole(batches), 4), average)
    assert fed(kind(average=average), batches).compute() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("kind", RATIOS)
@given(sizes=sizes, seed=st.integers(0, 99))
def test_of_a_yes_the_ratio_is_that_of_the_yes(kind: Any, threshold: float, sizes: list[int], seed: int) -> None:
    batches = [(out[:, :1], true % 2) for out, true in parts(sizes, seed=seed)]
    given = np.concatenate([out[:, 0].numpy() > threshold for out, _ in batches]).astype(int)
    made = table(given, np.concatenate([true for _, true in batches]), 2)
    assert fed(kind(threshold=threshold), batches).compute() == pytest.approx(ratio(kind, made, "binary"), abs=1e-15)
    macro = fed(kind(threshold=threshold, average="macro"), batches).compute()
    assert macro == pytest.approx(ratio(kind, made, "macro"), abs=1e-15)


@given(sizes=sizes, seed=st.integers(0, 99))
def test_the_confusion_matrix_has_a_row_for_each_true_class(sizes: list[int], seed: int) -> None:
    batches = parts(sizes, seed=seed)
    made = fed(ConfusionMatrix(), batches).compute()
    assert made.dtype is torch.int64
    assert np.array_equal(made, table(*whole(batches), 4))


@pytest.mark.parametrize("kind", [*COUNTS, TopKAccuracy, Accuracy])
@given(sizes=sizes, cut=st.integers(0, 6))
def test_merged_counts_are_exactly_the_whole(kind: Any, sizes: list[int], cut: int) -> None:
    options = {"k": 2} if kind is TopKAccuracy else {}
    batches = parts(sizes)
    one, other = (fed(kind(**options), part) for part in (batches[:cut], batches[cut:]))
    one.merge(other)
    assert one.state_dict() == fed(kind(**options), batches).state_dict()


@pytest.mark.parametrize("kind", COUNTS)
def test_a_state_is_json_and_goes_on_where_it_was(kind: Any) -> None:
    batches, later = parts([4, 5, 6]), kind()
    later.load_state_dict(json.loads(json.dumps(fed(kind(), batches[:2]).state_dict())))
    assert fed(later, batches[2:]).state_dict() == fed(kind(), batches).state_dict()


@pytest.mark.parametrize("k", [1, 2, 3])
@given(sizes=sizes, seed=st.integers(0, 99))
def test_the_k_highest_scores_are_looked_at(k: int, sizes: list[int], seed: int) -> None:
    batches = parts(sizes, seed=seed)
    scores, true = (np.concatenate([part[i] for part in batches]) for i in (0, 1))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    expected = (best == true[:, None]).any(1).mean()
    assert fed(TopKAccuracy(k), batches).compute() == pytest.approx(expected)
    if k == 1:
        assert fed(Accuracy(), batches).compute() == pytest.approx(expected)


def test_a_model_that_says_the_same_of_all_classes_gains_nothing() -> None:
    true = torch.arange(10)
    assert fed(TopKAccuracy(2), [(torch.zeros(10, 10), true)]).compute() == 0.2
    assert fed(TopKAccuracy(2), [(torch.full((10, 10), math.nan), true)]).compute() == 0.0


def test_each_position_of_an_image_is_counted() -> None:
    scores = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    true = torch.randint(0, 3, (4, 5, 6), generator=torch.Generator().manual_seed(1))
    flat = scores.movedim(1, -1).reshape(-1, 3), true.reshape(-1)
    for kind in COUNTS:
        assert fed(kind(), [(scores, true)]).state_dict() == fed(kind(), [flat]).state_dict()
    assert fed(TopKAccuracy(2), [(scores, true)]).compute() == fed(TopKAccuracy(2), [flat]).compute()


@pytest.mark.parametrize("kind", [*COUNTS, TopKAccuracy, Accuracy])
def test_targets_to_be_ignored_are_not_counted(kind: Any) -> None:
    options = {"k": 2} if kind is TopKAccuracy else {}
    ((scores, true),) = parts([40])
    kept = true != 3
    numbered, gappy = true.clone(), true.double()
    numbered[~kept], gappy[~kept] = -100, math.nan
    expected = fed(kind(**options), [(scores[kept], true[kept])]).state_dict()
    assert fed(kind(ignore_index=-100, **options), [(scores, numbered)]).state_dict() == expected
    assert fed(kind(nan="ignore", **options), [(scores, gappy)]).state_dict() == expected


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("wrong", [4.0, -1.0, 0.5, math.nan])
def test_a_target_that_is_no_class_is_found_when_the_value_is_asked_for(kind: Any, wrong: float) -> None:
    ((scores, true),) = parts([6])
    true = true.double()
    true[2] = wrong
    metric = fed(kind(), [(scores, true)])
    with pytest.raises(DataError, match="1 targets or answers are no class from 0 to 3"):
        metric.compute()


@pytest.mark.parametrize("kind", RATIOS)
def test_answers_as_integers_need_to_know_how_many_classes(kind: Any) -> None:
    given, true = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 2, 2, 1])
    with pytest.raises(ConfigError, match="nobody knows how many classes there are"):
        kind().update(given, true)
    expected = ratio(kind, table(given, true, 3), "macro")
    assert fed(kind(classes=3), [(given, true)]).compute() == pytest.approx(expected)


@pytest.mark.parametrize("kind", RATIOS)
def test_over_nothing_a_ratio_is_nan(kind: Any) -> None:
    metric = fed(kind(), parts([3]))
    metric.reset()
    assert math.isnan(metric.compute())
    assert ConfusionMatrix().compute().shape == (0, 0)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: F1(average="mean"), "F1: average must be 'auto', 'binary'"),
        (lambda: F1(classes=1), "F1: classes must be an integer of at least 2"),
        (lambda: F1(ignore_index="none"), "F1: ignore_index must be a class number"),  # type: ignore[arg-type]
        (lambda: TopKAccuracy(0), "TopKAccuracy: k must be"),
        (lambda: fed(F1(average="binary"), parts([3])).compute(), "average='binary' of 4 classes"),
        (lambda: fed(F1(classes=3), parts([3])), "F1: outputs of 4 classes, expected 3"),
        (lambda: fed(F1(), [*parts([3]), *parts([3], classes=5)]), "F1: 5 classes after 4"),
        (lambda: fed(TopKAccuracy(4), parts([3])), r"TopKAccuracy\(k=4\): outputs of shape"),
        (lambda: F1().update(torch.zeros(3, 2), torch.zeros(4)), "F1: outputs of shape .* and targets of shape"),
    ],
)
def test_what_cannot_be_counted_is_refused(made: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made()


def test_who_asks_for_each_class_alone_is_told_what_has_it() -> None:
    with pytest.raises(ConfigError, match=r"F1: average must be .*, not None") as caught:
        F1(average=None)  # type: ignore[arg-type]
    assert "ConfusionMatrix()" in caught.value.hint


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_answers_count_as_they_are_in_a_column_too(shape: tuple[int, ...]) -> None:
    given, true = torch.tensor([3, 1, 2, 2, 3]), torch.tensor([3, 1, 2, 0, 3])
    other = true.reshape(-1, 1) if shape == (5,) else true
    assert fed(Accuracy(), [(given.reshape(shape), other)]).compute() == 4 / 5
    counted = fed(ConfusionMatrix(classes=4), [(given.reshape(shape), other)]).compute()
    assert counted.tolist() == table(given.numpy(), true.numpy(), 4).tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.bool])
@pytest.mark.parametrize("kind", [Accuracy, *COUNTS])
def test_targets_count_in_any_dtype_that_a_store_has(kind: Any, dtype: torch.dtype) -> None:
    scores, yes = torch.tensor([-1.0, 2.0, 3.0, -4.0]), torch.tensor([0, 1, 0, 1])
    for outputs in scores, torch.stack([-scores, scores], 1):
        expected, value = (fed(kind(), [(outputs, true)]).compute() for true in (yes, yes.to(dtype)))
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected))
    if dtype is not torch.bool:
        answered = fed(kind() if kind is Accuracy else kind(classes=2), [(yes.to(dtype), yes.to(dtype))]).compute()
        assert answered.tolist() == [[2, 0], [0, 2]] if kind is ConfusionMatrix else answered == 1.0


@pytest.mark.parametrize("columns", [1, 3])
def test_scores_that_are_nan_are_no_right_answer(columns: int) -> None:
    scores, true = torch.full((4, columns), math.nan), torch.zeros(4, dtype=torch.int64)
    assert fed(Accuracy(), [(scores, true)]).compute() == 0.0
    some = scores.clone()
    some[1:] = 0.0
    some[0, 1:] = 0.0
    for kind in RATIOS:
        metric = fed(kind(), [(some, true)])
        assert math.isnan(metric.compute())
        again = kind()
        again.load_state_dict(json.loads(json.dumps(metric.state_dict())))
        other = fed(kind(), [(some[1:], true[1:])])
        other.merge(again)
        assert math.isnan(other.compute())
        assert not math.isnan(fed(kind(ignore_index=0), [(some, true), (some[1:], true[1:] + 1)]).compute())
    assert fed(ConfusionMatrix(), [(some, true)]).compute().sum() == 3
    if columns > 1:
        assert fed(TopKAccuracy(1), [(some, true)]).compute() == fed(Accuracy(), [(some, true)]).compute() == 3 / 4


@pytest.mark.parametrize("kind", [Accuracy, *COUNTS])
def test_complex_scores_are_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match=r"complex64 and targets"):
        kind().update(torch.zeros(3, dtype=torch.complex64), torch.zeros(3))
