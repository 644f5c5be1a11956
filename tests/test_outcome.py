"""What a batch comes to: of models that give their own loss, and how they are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain.data.batch import Batch
from streamtrain.data.iterable import from_iterable
from streamtrain.errors import ConfigError, UserCodeError
from streamtrain.outcome import own_loss, spread, supervised
from streamtrain.tasks import as_loss
from streamtrain.trainer import Trainer
from tests.engine import Samples, bare_loop, network, pairs, same, samples


@dataclass
class Output:
    """What a model of Hugging Face returns."""

    loss: Tensor | None
    logits: Tensor


class Named(nn.Module):
    """Takes its inputs by name, and labels where there are any."""

    def __init__(self, *, as_dict: bool = False) -> None:
        super().__init__()
        self.net, self.as_dict = network(), as_dict

    def forward(self, x: Tensor, scale: float = 1.0, labels: Tensor | None = None) -> Any:
        logits = self.net(x * scale)
        loss = None if labels is None else nn.functional.mse_loss(logits, labels)
        return {"loss": loss, "logits": logits} if self.as_dict else Output(loss, logits)


def items(where: str) -> list[Any]:
    given = list(Samples().batches(0))
    if where == "labels":  # beside the inputs, as a collator of Hugging Face lays them
        return [{"x": batch.inputs, "labels": batch.targets} for batch in given]
    return [({"x": batch.inputs} if where == "dict" else batch.inputs, batch.targets) for batch in given]


@pytest.mark.parametrize("as_dict", [True, False], ids=["dict", "object"])
@pytest.mark.parametrize("where", ["labels", "dict", "tensor"])
async def test_a_models_own_loss_makes_the_bare_loops_weights(where: str, as_dict: bool) -> None:
    model = Named(as_dict=as_dict)
    trainer = Trainer(model, seed=5, device="cpu", metrics={"mae": lambda outputs, targets: (outputs - targets).abs()})
    result = await trainer.fit(items(where), validation=items(where)[:3])
    assert same(model.net, bare_loop(network(), pairs(Samples(), 1), seed=5))
    assert {"loss", "val_loss", "val_mae"} <= result.metrics.keys()
    predicted = [output async for output in trainer.predict(items(where))]
    assert [tuple(output.shape) for output in predicted[:2]] == [(8, 1), (8, 1)]


@pytest.mark.parametrize("accumulate", [1, 4])
async def test_a_step_is_given_the_number_of_its_batch_in_the_epoch_a_resumed_one_too(
    tmp_path: Path, accumulate: int
) -> None:
    trained: list[int] = []
    evaluated: list[int] = []

    def made() -> Trainer:
        model = network()

        def step(batch: Batch, batch_idx: int) -> Tensor:
            (trained if torch.is_grad_enabled() else evaluated).append(batch_idx)
            return nn.functional.mse_loss(model(batch.inputs), batch.targets)

        return Trainer(model, step=step, run_dir=tmp_path, device="cpu", accumulate_grad_batches=accumulate)

    await made().fit(Samples(), Samples(40), max_steps=8 // accumulate)
    assert (trained, evaluated) == ([*range(8)], [0, 1])
    again = made()
    await again.fit(Samples(), Samples(40), max_epochs=2, resume="auto")
    assert trained == [*range(13)] * 2
    assert evaluated == [0, 1, *[*range(5)] * 2]
    await again.validate(Samples(40))
    assert evaluated[-5:] == [*range(5)]


class Going(Trainer):
    """Its steps go on with what the trainer would do."""

    def training_step(self, model: nn.Module, batch: Batch) -> Any:
        made = super().training_step(model, batch)
        return {**made, "loss": 1.0 * made["loss"], "spread": made["outputs"].std()}

    def validation_step(self, model: nn.Module, batch: Batch) -> Any:
        return {**super().validation_step(model, batch), "mine": 1.0}


@pytest.mark.parametrize("own", [False, True])
async def test_a_step_of_a_subclass_may_go_on_with_the_trainers(own: bool) -> None:
    """It met an error without a word."""
    mean = {"mae": lambda outputs, targets: (outputs - targets).abs()}
    model, loss = (Named(), None) if own else (network(), nn.MSELoss())
    trainer = Going(model, loss, seed=5, device="cpu", metrics=mean)
    result = await trainer.fit(items("dict" if own else "tensor"), validation=Samples(24))
    assert same(model.net if own else model, bare_loop(network(), pairs(Samples(), 1), seed=5))  # type: ignore[arg-type]
    assert {"loss", "spread", "val_loss", "val_mae", "val_spread", "val_mine"} <= result.metrics.keys()


class Plain(nn.Module):
    """Takes no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Any) -> Any:
        return self.net(x)


class Silent(Plain):
    """Takes labels, and makes nothing of them."""

    def forward(self, x: Any, labels: Any = None) -> Any:
        return self.net(x)


async def test_a_model_that_takes_no_labels_needs_a_loss_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no loss") as caught:
        await Trainer(Plain(), device="cpu", run_dir=tmp_path / "run").fit(Samples())
    assert "labels" in caught.value.hint
    assert not (tmp_path / "run").exists()
    halves = list(torch.split(samples(8)[0], 4))
    assert [len(output) async for output in Trainer(Plain(), device="cpu").predict(halves)] == [4, 4]


async def test_a_model_that_takes_labels_and_gives_no_loss_is_explained() -> None:
    with pytest.raises(ConfigError, match="there is no loss: Silent returned a Tensor without one"):
        await Trainer(Silent(), device="cpu").fit(Samples())
    assert set(await Trainer(Silent(), device="cpu", metrics={"mae": nn.L1Loss()}).evaluate(Samples(8))) == {"test_mae"}


def test_a_dict_whose_keys_forward_does_not_take_is_its_argument() -> None:
    class Whole(nn.Module):
        def forward(self, fields: dict[str, Tensor]) -> Any:
            return {"loss": fields["a"].sum()}

    class AnyName(nn.Module):
        def forward(self, **fields: Any) -> Any:
            return sorted(fields)

    batch = Batch({"a": torch.ones(3)}, None)
    assert own_loss(Whole())(batch).loss == 3
    assert spread(AnyName())({"b": 1, "a": 2}, torch.ones(1)) == ["a", "b", "labels"]
    assert spread(Whole())({"a": torch.ones(2)}, torch.ones(1))["loss"] == 2


async def test_a_model_that_takes_its_inputs_by_name_beside_a_loss_is_told_how_it_was_called(tmp_path: Path) -> None:
    class Two(nn.Linear):
        def forward(self, sst: Tensor, wind: Tensor) -> Tensor:  # type: ignore[override]
            return sst + wind

    class OfItsOwn(Named):
        def forward(self, x: Tensor, scale: float = 1.0, labels: Tensor | None = None) -> Any:
            return super().forward(x.size(0), scale, labels)  # type: ignore[arg-type]

    fields: dict[str, Any] = {"sst": torch.ones(2), "wind": torch.ones(2)}
    for loss in (nn.MSELoss(), as_loss({"a": nn.MSELoss()}, None)):
        with pytest.raises(UserCodeError, match=r"Two was called with one dict .*'sst', 'wind'.*missing 1") as caught:
            supervised(Two(1, 1), loss)(Batch(fields, torch.ones(2)))
        assert "model(**batch.inputs)" in caught.value.hint
        assert "leave loss= out" not in caught.value.hint
    with pytest.raises(UserCodeError, match=r"OfItsOwn was called with one dict .*no attribute 'size'") as caught:
        supervised(OfItsOwn(), nn.MSELoss())(Batch({"x": torch.ones(2)}, torch.ones(2)))
    assert "leave loss= out" in caught.value.hint
    with pytest.raises(UserCodeError, match="Two was called with one dict"):
        [outputs async for outputs in Trainer(Two(1, 1), "mse").predict(from_iterable([fields]))]
    with pytest.raises(TypeError, match="missing 1"):  # no dict, so that it is a fault of the model's own
        supervised(Two(1, 1), nn.MSELoss())(Batch(torch.ones(2), torch.ones(2)))


@pytest.mark.parametrize(
    ("outputs", "hint"), [({"a": 1.0, "b": 2.0}, "loss={'a': ..., 'b': ...}"), ((1.0, 2.0), "loss={0: ..., 1: ...}")]
)
def test_one_loss_for_several_outputs_is_told_how_to_have_one_for_each(outputs: Any, hint: str) -> None:
    class Several(nn.Module):
        def forward(self, inputs: Tensor) -> Any:
            return outputs

    batch = Batch(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(UserCodeError, match="2 outputs, and the loss raised AttributeError") as caught:
        supervised(Several(), nn.MSELoss())(batch)
    assert hint in caught.value.hint
    with pytest.raises(AttributeError, match="shape"):  # a fault of the loss' own
        supervised(nn.Identity(), lambda outputs, targets: None.shape)(batch)  # type: ignore[attr-defined]
