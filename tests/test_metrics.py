"""Metrics against numpy's arithmetic: exact sums, whatever the batches; shapes that don't fit are refused."""

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

from streamtrain.errors import ConfigError
from streamtrain.metrics import (
    AUROC,
    F1,
    R2,
    SHORT,
    Accuracy,
    ConfusionMatrix,
    FunctionMetric,
    Mean,
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    TopKAccuracy,
    as_metric,
    direction,
    flattened,
    names_of,
    no_such_monitor,
)

KINDS: list[type[Mean]] = [Mean, Accuracy, MeanAbsoluteError, MeanSquaredError]
batches = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def data(sizes: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, generator=generator), torch.randint(0, 2, (size,), generator=generator).float())
        for size in sizes
    ]


def fed(metric: Any, parts: list[tuple[Tensor, Tensor]]) -> Any:
    for outputs, targets in parts:
        metric.update(outputs, targets)
    return metric


@pytest.mark.parametrize("kind", KINDS)
@given(sizes=batches, cut=st.integers(0, 6))
def test_merged_parts_are_the_whole(kind: type[Mean], sizes: list[int], cut: int) -> None:
    parts = data(sizes)
    one, other, whole = fed(kind(), parts[:cut]), fed(kind(), parts[cut:]), fed(kind(), parts)
    one.merge(other)
    assert one.compute() == pytest.approx(whole.compute(), rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
@given(sizes=batches, cut=st.integers(0, 6))
def test_a_state_goes_on_where_it_was(kind: type[Mean], sizes: list[int], cut: int) -> None:
    parts = data(sizes)
    later = kind()
    later.load_state_dict(json.loads(json.dumps(fed(kind(), parts[:cut]).state_dict())))
    assert fed(later, parts[cut:]).compute() == fed(kind(), parts).compute()


@given(batches)
def test_batches_weigh_by_their_samples(sizes: list[int]) -> None:
    parts = data(sizes)
    outputs, targets = (np.concatenate([part[i].numpy() for part in parts]).astype(np.float64) for i in (0, 1))
    assert fed(MeanAbsoluteError(), parts).compute() == pytest.approx(np.abs(outputs - targets).mean(), rel=1e-12)
    assert fed(MeanSquaredError(), parts).compute() == pytest.approx(((outputs - targets) ** 2).mean(), rel=1e-12)
    assert fed(Accuracy(), parts).compute() == ((outputs > 0) == targets).mean()
    assert fed(Mean(), parts).compute() == pytest.approx(outputs.mean(), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_over_nothing_a_metric_is_nan(kind: type[Mean]) -> None:
    metric = fed(kind(), data([3]))
    metric.reset()
    assert math.isnan(metric.compute())
    assert math.isnan(kind().compute())


def test_classes_are_compared_by_the_highest_score() -> None:
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(0, 7, (50,), generator=torch.Generator().manual_seed(1))
    expected = (scores.numpy().argmax(1) == classes.numpy()).mean()
    assert fed(Accuracy(), [(scores, classes)]).compute() == pytest.approx(expected)


def test_each_position_of_an_image_counts() -> None:
    scores = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(0, 3, (4, 5, 6), generator=torch.Generator().manual_seed(1))
    expected = (scores.numpy().argmax(1) == classes.numpy()).mean()
    assert fed(Accuracy(), [(scores, classes)]).compute() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_logits_of_a_yes_may_have_a_column_or_none(shape: tuple[int, ...]) -> None:
    logits = torch.tensor([-1.0, 2.0, 0.0, 3.0, -2.0, 1.0]).reshape(shape)
    answers = torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.uint8)
    assert fed(Accuracy(), [(logits, answers)]).compute() == pytest.approx(4 / 6)


def test_answers_are_compared_as_they_are() -> None:
    assert fed(Accuracy(), [(torch.tensor([3, 1, 2]), torch.tensor([3, 1, 1]))]).compute() == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", [Accuracy, MeanAbsoluteError, MeanSquaredError])
@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((4, 1), (3,)), ((4, 2), (2, 4)), ((4,), (1,)), ((4, 3), (4, 3, 1, 2))],
)
def test_shapes_that_do_not_fit_are_refused_not_broadcast(
    kind: type[Mean], outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"outputs of shape .* and targets of shape"):
        kind().update(torch.zeros(outputs), torch.zeros(targets))


@pytest.mark.parametrize("kind", [Accuracy, MeanAbsoluteError, MeanSquaredError])
def test_without_targets_it_says_so(kind: type[Mean]) -> None:
    with pytest.raises(ConfigError, match="needs targets"):
        kind().update(torch.zeros(3), None)


def test_a_column_and_a_row_of_targets_are_matched_not_broadcast() -> None:
    outputs, targets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 4.0, 4.0])
    assert fed(MeanAbsoluteError(), [(outputs, targets)]).compute() == pytest.approx(2 / 3)


def test_narrow_dtypes_neither_wrap_nor_round() -> None:
    small, large = torch.tensor([1], dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8)
    assert fed(MeanAbsoluteError(), [(small, large)]).compute() == 254
    half = torch.full((70_000,), 2.0, dtype=torch.float16)
    assert fed(Mean(), [(half, half)]).compute() == 2.0
    many = fed(Mean(), [(torch.full((1,), 16_777_216.0), half)] + [(torch.ones(1), half)] * 8)
    assert many.compute() * 9 == pytest.approx(16_777_224.0, rel=1e-15)


def test_updates_hold_no_graph() -> None:
    outputs = torch.ones(3, requires_grad=True)
    for kind in KINDS:
        metric = kind()
        metric.update(outputs, torch.ones(3))
        assert not torch.as_tensor(metric._total).requires_grad
    function = FunctionMetric(lambda outputs, targets: (outputs - targets).sum())
    function.update(outputs, torch.ones(3))
    assert not torch.as_tensor(function._total).requires_grad


@pytest.mark.parametrize(
    "function",
    [
        lambda outputs, targets: (outputs - targets).abs().mean(),
        lambda outputs, targets: float((outputs - targets).abs().mean()),
        lambda outputs, targets: (outputs - targets).abs(),
    ],
)
@given(sizes=batches)
def test_a_function_is_averaged_over_samples(function: Any, sizes: list[int]) -> None:
    parts = data(sizes)
    metric = fed(as_metric(function), parts)
    assert metric.compute() == pytest.approx(fed(MeanAbsoluteError(), parts).compute(), rel=1e-6)


def test_samples_are_counted_in_dicts_too() -> None:
    metric = as_metric(lambda outputs, targets: 1.0 if len(outputs["x"]) == 3 else 0.0)
    metric.update({"x": torch.zeros(3)}, None)
    metric.update({"x": torch.zeros(1)}, None)
    assert metric.compute() == 0.75


class Torchmetric:
    """The part of a torchmetrics object that we use."""

    def __init__(self) -> None:
        self.total, self.update_count, self._update_count, self.kept = 0.0, 0, 0, False

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += float((outputs - targets).abs().sum())
        self.update_count += 1

    def compute(self) -> Tensor:
        return torch.tensor(self.total)

    def reset(self) -> None:
        self.total, self.update_count = 0.0, 0

    def merge_state(self, other: Torchmetric) -> None:
        self.total += other.total

    def persistent(self, mode: bool) -> None:
        self.kept = mode

    def state_dict(self) -> dict[str, Any]:
        return {"total": torch.tensor(self.total)} if self.kept else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = float(state["total"])


def test_torchmetrics_take_our_shape() -> None:
    parts = data([3, 4])
    one, other, later = (as_metric(Torchmetric()) for _ in range(3))
    fed(one, parts[:1]).merge(fed(other, parts[1:]))
    later.load_state_dict(one.state_dict())
    assert later.compute() == pytest.approx(7 * fed(MeanAbsoluteError(), parts).compute(), rel=1e-6)


class Collection(dict[str, Any]):
    """The part of a torchmetrics MetricCollection that we use: it has no merge_state, and gives a dict."""

    def update(self, outputs: Any, targets: Any) -> None:  # type: ignore[override]
        for metric in self.values():
            metric.update(outputs, targets)

    def compute(self) -> dict[str, Tensor]:
        return {name: metric.compute() for name, metric in self.items()}

    def reset(self) -> None:
        for metric in self.values():
            metric.reset()

    def persistent(self, mode: bool) -> None:
        raise AssertionError("each member is asked, since members of a group share their states")

    def values(self, copy_state: bool = True) -> Any:
        return super().values()


def test_a_torchmetrics_collection_takes_our_shape() -> None:
    def made() -> Any:
        return as_metric(Collection(a=Torchmetric(), b=Torchmetric()))

    parts = data([3, 4])
    one, other, later = made(), made(), made()
    fed(one, parts[:1]).merge(fed(other, parts[1:]))
    later.load_state_dict(one.state_dict())
    total = 7 * fed(MeanAbsoluteError(), parts).compute()
    assert dict(flattened("t", later.compute())) == {"t_a": pytest.approx(total), "t_b": pytest.approx(total)}
    assert names_of("t", later) == ["t_a", "t_b"]
    later.reset()
    assert dict(flattened("t", later.compute())) == {"t_a": 0.0, "t_b": 0.0}


@pytest.mark.parametrize(
    ("value", "flat"),
    [
        (torch.tensor(0.5), {"m": 0.5}),
        (torch.tensor([3]), {"m": 3.0}),
        (np.float32(0.5), {"m": 0.5}),
        ({"a": 1, "b": {"c": torch.tensor(2)}}, {"m_a": 1.0, "m_b_c": 2.0}),
        (torch.tensor([[1, 2], [3, 4]]), {"m": [[1, 2], [3, 4]]}),
        (np.array([0.5, 1.0]), {"m": [0.5, 1.0]}),
        (torch.zeros(0, 0), {"m": []}),
    ],
)
def test_a_value_is_numbers_by_name_or_a_table(value: Any, flat: dict[str, Any]) -> None:
    assert dict(flattened("m", value)) == flat


def test_a_table_has_no_name_that_could_be_monitored() -> None:
    assert names_of("confusion", ConfusionMatrix()) == []
    assert names_of("mae", MeanAbsoluteError()) == ["mae"]


@pytest.mark.parametrize("name", sorted(SHORT))
def test_short_names_are_metrics(name: str) -> None:
    assert isinstance(as_metric(name), Metric)
    with pytest.raises(ConfigError, match=f"there is no metric '{name}x'") as caught:
        as_metric(f"{name}x")
    assert "did you mean" in caught.value.hint


@pytest.mark.parametrize(
    ("metric", "columns"),
    [
        (Mean(), 1),
        (Accuracy(ignore_index=1), 3),
        (TopKAccuracy(2, nan="ignore"), 3),
        (F1(ignore_index=1), 3),
        (ConfusionMatrix(), 3),
        (AUROC(), 3),
        (AUROC(nan="ignore"), 1),
        (MeanAbsoluteError(nan="ignore"), 1),
        (R2(nan="ignore"), 1),
    ],
    ids=lambda part: type(part).__name__,
)
def test_an_update_asks_nothing_of_the_device(metric: Any, columns: int) -> None:
    """Tensors on `meta` have no values: whatever would wait for one raises."""
    outputs = torch.zeros(8, columns, device="meta")
    for _ in range(2):
        metric.update(outputs, torch.zeros(8, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        metric.compute()


@pytest.mark.parametrize("kind", [MeanAbsoluteError, Accuracy, AUROC, R2, F1])
def test_several_outputs_are_pointed_to_the_metric_of_one(kind: Any) -> None:
    with pytest.raises(ConfigError, match="the model has several outputs") as caught:
        kind().update({"a": torch.zeros(3)}, {"a": torch.zeros(3)})
    assert 'metrics={"output"' in caught.value.hint


def test_what_is_brought_becomes_a_metric() -> None:
    mine = Mean()
    assert as_metric(mine) is mine
    assert isinstance(as_metric(MeanAbsoluteError), MeanAbsoluteError)
    assert isinstance(as_metric(torch.nn.functional.l1_loss), FunctionMetric)
    assert all(isinstance(kind(), Metric) for kind in KINDS)


class Half:
    def update(self, outputs: Any, targets: Any) -> None: ...


class Needy:
    def __init__(self, classes: int) -> None: ...


@pytest.mark.parametrize(
    ("brought", "said"), [(3, "none of the methods"), (Half(), "it has update"), (Needy, "classes")]
)
def test_what_is_no_metric_is_refused_with_what_it_has(brought: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        as_metric(brought)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("val_loss", "min"),
        ("val_accuracy", "max"),
        ("acc", "max"),
        ("val_other_f1", "max"),
        ("mae", "min"),
        ("accuracy_loss", "min"),
        ("recall_error", "min"),
        ("R2", "max"),
        ("val_mIoU", "max"),
        ("val_mAP", "max"),
        ("val_mAP50", "max"),
        ("val_mape", "min"),
        ("val_nse", "max"),
        ("val_explained_variance", "max"),
        ("MatthewsCorrCoef", "max"),
        ("val_brier_score", "min"),
        ("val_mapping_error", "min"),
        ("val_map_rmse", "min"),
        ("val_accra_mae", "min"),
        ("val_accra_accuracy", "max"),
        ("precision@5", "max"),
        ("workload", "min"),
        ("val_MulticlassAccuracy", "max"),
        ("val_t_BinaryF1Score", "max"),
        ("MeanAbsoluteError", "min"),
        ("val_auroc", "max"),
        ("val_top5", "max"),
        ("topk", "max"),
        ("topography", "min"),
        ("val_rain_rmse", "min"),
        ("val_loss_accurate", "min"),
    ],
)
def test_the_better_way_is_told_from_the_name(name: str, way: str) -> None:
    assert direction(name) == way
    assert direction(name, "max") == "max"


def test_a_name_that_tells_no_way_is_said_once_unless_the_mode_is_given(caplog: pytest.LogCaptureFixture) -> None:
    assert [direction("val_hail_score", "max"), direction("val_loss"), direction("val_hail_f1")] == [
        "max",
        "min",
        "max",
    ]
    assert caplog.text == ""
    assert [direction("val_hail_score") for _ in range(2)] == ["min", "min"]
    assert caplog.text.count("nothing in the name 'val_hail_score' tells which way is better: less is taken to be") == 1


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode='up'"):
        direction("x", "up")


def test_a_monitor_that_nothing_logs_is_answered_with_what_is_logged() -> None:
    error = no_such_monitor("EarlyStopping", "val_acuracy", {"val_loss": 1, "val_accuracy": 2})
    assert str(error) == "EarlyStopping: nothing logs 'val_acuracy'; logged: val_accuracy, val_loss"
    assert error.hint == "did you mean 'val_accuracy'?"
    assert "logged: nothing" in str(no_such_monitor("x", "y", {}))
