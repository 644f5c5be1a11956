"""Models with several outputs: each loss and metric gets what its name says, and the sum is the bare loop's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor, nn

from streamtrain import EarlyStopping, Trainer, ZarrStream
from streamtrain.data.batch import Batch
from streamtrain.errors import ConfigError
from streamtrain.metrics import ConfusionMatrix, MeanAbsoluteError
from streamtrain.tasks import TaskLosses, picked
from tests.engine import COLUMNS, Recorder, Samples, lines, same

SHARED = MeanAbsoluteError()


class Two(nn.Module):
    """A number (B, 1) and three classes (B, 3)."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(COLUMNS, 16), nn.ReLU())
        self.rain, self.kind, self.form = nn.Linear(16, 1), nn.Linear(16, 3), form

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.trunk(inputs)
        rain, kind = self.rain(hidden), self.kind(hidden)
        return {"rain": rain, "kind": kind} if self.form == "dict" else [rain, kind]


class Tasks(Samples):
    """The targets of `Samples`, and which third of them each is in."""

    def __init__(self, count: int = 100, *, form: str = "dict", **options: Any) -> None:
        super().__init__(count, **options)
        self.form = form

    def batches(self, epoch: int, position: int = 0) -> Iterator[Batch]:
        for batch in super().batches(epoch, position):
            rain = batch.targets
            kind = torch.bucketize(rain[:, 0], torch.tensor([-1.0, 1.0]))
            yield replace(batch, targets={"rain": rain, "kind": kind} if self.form == "dict" else [rain, kind])


LOSSES: dict[str, Any] = {"rain": nn.MSELoss(), "kind": "cross_entropy"}


def trainer(model: nn.Module | None = None, loss: Any = None, **options: Any) -> Trainer:
    options = {"seed": 7, "device": "cpu", "log_every": 5, **options}
    return Trainer(model or Two(), loss or LOSSES, **options)


def bare(model: nn.Module, epochs: int, kind_weight: float) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    torch.manual_seed(7)
    for epoch in range(epochs):
        for batch in Tasks().batches(epoch):
            outputs = model(batch.inputs)
            rain = nn.functional.mse_loss(outputs["rain"], batch.targets["rain"])
            kind = nn.functional.cross_entropy(outputs["kind"], batch.targets["kind"])
            (rain + kind_weight * kind).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("weights", [None, {"kind": 0.3}])
async def test_the_weighted_sum_trains_as_a_bare_loop_does(weights: dict[str, float] | None) -> None:
    fitted = trainer(loss_weights=weights)
    await fitted.fit(Tasks(), max_epochs=2)
    assert same(fitted.model, bare(Two(), 2, (weights or {"kind": 1.0})["kind"]))


async def test_outputs_and_targets_in_lists_go_by_number() -> None:
    by_name, by_number = (
        trainer(loss_weights={"kind": 0.3}),
        trainer(Two("list"), [nn.MSELoss(), "cross_entropy"], loss_weights={1: 0.3}, metrics={"0": {"mae": "mae"}}),
    )
    await by_name.fit(Tasks(), max_epochs=1)
    await by_number.fit(Tasks(form="list"), max_epochs=1)
    assert same(by_name.model, by_number.model)
    assert set(await by_number.validate(Tasks(30, form="list"))) == {
        "val_loss",
        "val_loss_0",
        "val_loss_1",
        "val_0_mae",
    }


async def test_each_loss_and_metric_is_logged_by_its_output(tmp_path: Path) -> None:
    metrics = {"rain": {"mae": MeanAbsoluteError()}, "kind": {"acc": "accuracy"}, "both": lambda out, true: len(out)}
    fitted = trainer(metrics=metrics, loss_weights={"kind": 0.5}, run_dir=tmp_path)
    validation = {"north": Tasks(30, seed=3), "south": Tasks(40, seed=4)}
    await fitted.fit(Tasks(), validation=validation, max_epochs=1)
    train, val = lines(tmp_path)[0], next(row for row in lines(tmp_path) if row["split"] == "val")
    assert {"loss", "loss_rain", "loss_kind"} < set(train)
    assert train["loss"] == pytest.approx(train["loss_rain"] + 0.5 * train["loss_kind"])
    names = {"loss", "loss_rain", "loss_kind", "rain_mae", "kind_acc", "both"}
    logged = {f"val_{stream}_{name}" for stream in validation for name in names}
    assert {name for name in val if name.startswith("val_")} == logged
    model = fitted.model.eval()
    for stream, source in (("north", Tasks(30, seed=3)), ("south", Tasks(40, seed=4))):
        (batch,) = Tasks(source.num_samples, seed=source.seed, batch_size=99).batches(0)
        with torch.no_grad():
            outputs = model(batch.inputs)
        mae = (outputs["rain"] - batch.targets["rain"]).abs().mean()
        acc = (outputs["kind"].argmax(1) == batch.targets["kind"]).double().mean()
        assert val[f"val_{stream}_rain_mae"] == pytest.approx(float(mae), rel=1e-5)
        assert val[f"val_{stream}_kind_acc"] == pytest.approx(float(acc))
        assert val[f"val_{stream}_both"] == 2


async def test_a_loss_of_weight_zero_is_logged_and_not_learned_from() -> None:
    fitted = trainer(loss_weights={"kind": 0})
    before = fitted.model.kind.weight.clone()  # type: ignore[union-attr, operator]
    means = await fitted.train_epoch(Tasks())
    assert means["loss"] == means["loss_rain"]
    assert means["loss_kind"] > 0
    assert torch.equal(fitted.model.kind.weight, before)  # type: ignore[union-attr, arg-type]


async def test_a_run_that_goes_on_has_the_same_losses_of_each_output(tmp_path: Path) -> None:
    async def fit(folder: str, resume: str | None = None, **limits: Any) -> tuple[nn.Module, Recorder]:
        recorder = Recorder()
        fitted = trainer(loss_weights={"kind": 0.3}, run_dir=tmp_path / folder, callbacks=[recorder])
        await fitted.fit(Tasks(), resume=resume, **limits)
        return fitted.model, recorder

    whole, told = await fit("whole", max_epochs=2)
    await fit("cut", max_steps=9)
    again, told_again = await fit("cut", "auto", max_epochs=2)
    assert same(again, whole)
    means = [[event.metrics for event in each.events("on_epoch_end")] for each in (told, told_again)]
    assert means[0] == means[1]
    assert means[0][0].keys() == {"loss", "loss_rain", "loss_kind"}


async def test_losses_of_outputs_can_be_monitored_and_their_names_are_checked() -> None:
    rules = [EarlyStopping(["val_rain_mae", "val_loss_kind", "loss_kind"]), EarlyStopping("loss_rain")]
    fitted = trainer(metrics={"rain": {"mae": "mae"}}, callbacks=rules)
    assert (await fitted.fit(Tasks(), validation=Tasks(30, seed=3), max_epochs=2)).reason == "completed"
    wrong = trainer(callbacks=[EarlyStopping("val_loss_kin")])
    with pytest.raises(ConfigError, match=r"nothing logs 'val_loss_kin'; logged: .*val_loss_kind") as caught:
        await wrong.fit(Tasks(), validation=Tasks(30, seed=3), max_epochs=1)
    assert caught.value.hint == "did you mean 'val_loss_kind'?"
    with pytest.raises(ConfigError, match="nothing logs 'loss_sun'"):
        await trainer(callbacks=[EarlyStopping("loss_sun")]).fit(Tasks(), max_epochs=1)


async def test_a_stream_of_several_targets_is_what_losses_by_name_expect(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "d.zarr")
    rng = np.random.default_rng(0)
    group.create_array("x", data=rng.standard_normal((60, COLUMNS), dtype=np.float32), chunks=(20, COLUMNS))
    group.create_array("rain", data=rng.random((60, 1), dtype=np.float32), chunks=(20, 1))
    group.create_array("kind", data=rng.integers(0, 3, 60), chunks=(20,))
    stream = ZarrStream(tmp_path / "d.zarr", inputs="x", targets=["rain", "kind"], batch_size=16)
    async with stream:
        result = await trainer(metrics={"kind": {"f1": "f1"}}).fit(stream, max_epochs=2)
        assert set(result.metrics) >= {"loss", "loss_rain", "loss_kind"}


class Named(NamedTuple):
    rain: int
    kind: int


@pytest.mark.parametrize(
    ("tree", "task", "found"),
    [({"a": 1, "b": 2}, "b", 2), ([1, 2], "1", 2), ((1, 2), "0", 1), (Named(1, 2), "kind", 2), (Named(1, 2), "0", 1)],
)
def test_a_name_finds_its_part(tree: Any, task: str, found: int) -> None:
    assert picked("outputs", tree, task) == found


@pytest.mark.parametrize(
    ("tree", "message", "hint"),
    [
        ({"rain": 1, "kind": 2}, "there is no 'rian' among the outputs 'rain', 'kind'", "Did you mean 'rain'?"),
        (Named(1, 2), "there is no 'rian' among the outputs 'rain', 'kind'", "Did you mean 'rain'?"),
        ([1, 2], "there is no 'rian' among the outputs '0', '1'", "Name them as the outputs are named."),
        (torch.zeros(3, 1), "the outputs are one tensor of shape (3, 1), of which none is 'rian'", "Have the model"),
        (None, "the outputs are a NoneType, of which none is 'rian'", "Have the model return a dict"),
    ],
)
def test_a_name_that_fits_nothing_is_refused_with_the_nearest(tree: Any, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        picked("outputs", tree, "rian")
    assert str(caught.value) == message
    assert caught.value.hint.startswith(hint)


def test_numbers_where_the_targets_have_names_are_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match="there is no '0' among the targets 'rain', 'kind'") as caught:
        TaskLosses({"0": nn.MSELoss(), "1": nn.MSELoss()}).parts(
            [torch.zeros(1), torch.zeros(1)], {"rain": torch.zeros(1), "kind": torch.zeros(1)}
        )
    assert caught.value.hint.endswith("have the model return a dict, and name both.")


async def test_wrong_names_end_the_fit_before_its_first_update() -> None:
    for loss, said in (({"rian": "mse"}, "no 'rian' among the outputs"), ({"rain": "mse", "0": "mse"}, "no '0' among")):
        fitted = trainer(loss=loss)
        with pytest.raises(ConfigError, match=said):
            await fitted.fit(Tasks(), max_epochs=1)
        assert fitted.state.step == 0
    with pytest.raises(ConfigError, match="the targets are one tensor of shape") as caught:
        await trainer().fit(Samples(), max_epochs=1)
    assert caught.value.hint.startswith("Give the stream targets=")
    with pytest.raises(ConfigError, match="there is no 'snow' among the outputs"):
        await trainer(metrics={"snow": {"mae": "mae"}}).validate(Tasks(30))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_weights": {"kin": 1}}, "loss_weights: there is no loss 'kin'"),
        ({"loss_weights": {"kind": "x"}}, "loss_weights: 'kind' must be a finite number, not 'x'"),
        ({"loss_weights": {"kind": True}}, "loss_weights: 'kind' must be a finite number"),
        ({"loss_weights": {"kind": float("nan")}}, "loss_weights: 'kind' must be a finite number"),
        ({"loss_weights": {"kind": 0, "rain": 0}}, "loss_weights are all 0"),
        ({"loss_weights": [1, 2]}, "loss_weights: there is no loss '0'"),
        ({"loss_weights": 2.0}, "loss_weights must be a dict by the losses' names, not 2.0"),
        ({"loss": nn.MSELoss(), "loss_weights": {"kind": 1}}, "loss_weights are for losses by name"),
        ({"loss": {"rain": "mes"}}, "the loss of the output 'rain': loss must be a function of .*, not 'mes'"),
        ({"loss": {"rain": None}}, "loss names no loss"),
        ({"metrics": {"loss_rain": "mae"}}, "a metric can't be named 'loss_rain'"),
        ({"metrics": {"a": {"b_c": "mae"}, "a_b": {"c": "mae"}}}, "two metrics would be logged as 'a_b_c'"),
        ({"metrics": {"a": {"b": "mea"}}}, "there is no metric 'mea'"),
        ({"metrics": {"rain": {"a": SHARED}, "kind": {"a": SHARED}}}, "'rain_a' and 'kind_a' are one object"),
        ({"metrics": {"a": SHARED, "b": SHARED}}, "the metrics 'a' and 'b' are one object"),
        ({"metrics": ["mae"]}, r"metrics must be a dict by name, not \['mae'\]"),
    ],
)
def test_what_cannot_work_is_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer(**options)


def test_weights_and_names_of_losses_can_be_read() -> None:
    fitted = trainer(loss_weights={"kind": 0.1})
    assert isinstance(fitted.loss, TaskLosses)
    assert fitted.loss.weights == {"rain": 1.0, "kind": 0.1}
    assert fitted.loss.names == ["loss_rain", "loss_kind"]


async def test_a_table_is_told_and_returned_but_no_line_has_it(tmp_path: Path) -> None:
    recorder = Recorder()
    fitted = trainer(metrics={"kind": {"table": ConfusionMatrix()}}, run_dir=tmp_path, callbacks=[recorder])
    await fitted.fit(Tasks(), validation={"north": Tasks(30, seed=3)}, max_epochs=1)
    sanity, end = recorder.events("on_validation_end")
    assert np.sum(sanity.tables["val_north_kind_table"]) == 16
    assert np.shape(end.tables["val_north_kind_table"]) == (3, 3)
    assert np.sum(end.tables["val_north_kind_table"]) == 30
    values = await fitted.evaluate(Tasks(30, seed=3))
    assert values["test_kind_table"] == end.tables["val_north_kind_table"]
    assert "table" not in (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path)[-1]["split"] == "test"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    told = [event["tables"] for event in events if event["event"] == "validation_end"]
    assert told[-1] == end.tables
