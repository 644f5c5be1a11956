"""What the moving average promises: torch's own, to the bit; the model that trains never notices."""

from __future__ import annotations

import copy
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from streamtrain.averaging import Average
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.data.batch import Batch
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import ConfigError
from streamtrain.trainer import Trainer
from tests.engine import Samples, network, pairs, same

DECAY = 0.9


def trainer(**options: Any) -> Trainer:
    return Trainer(network(), nn.MSELoss(), **{"seed": 5, "device": "cpu", "ema": DECAY, **options})


def by_hand(epochs: int, steps: int | None = None) -> tuple[nn.Module, nn.Module]:
    """The loop that everybody writes, with torch's average beside it: the weights and their average."""
    model, loss = network(), nn.MSELoss()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    torch.manual_seed(5)
    for inputs, targets in [pair for epoch in pairs(Samples(), epochs) for pair in epoch][:steps]:
        loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    inner: nn.Module = averaged.module
    inner.load_state_dict(dict(model.named_buffers()), strict=False)
    return model, inner


def means(model: nn.Module, stream: Samples) -> float:
    """The loss over a stream, weighted by samples."""
    model.eval()
    with torch.no_grad():
        sums = [(nn.MSELoss()(model(b.inputs), b.targets).double() * len(b), len(b)) for b in stream.batches(0)]
    return float(sum(total for total, _ in sums) / sum(count for _, count in sums))


def averages(fitted: Trainer, expected: nn.Module) -> bool:
    mine = fitted.average
    assert mine is not None
    return all(torch.equal(mine[name], weight) for name, weight in expected.named_parameters())


async def test_the_average_is_torchs_and_the_weights_are_those_without_it() -> None:
    fitted = trainer()
    result = await fitted.fit(Samples(), validation=Samples(40), max_epochs=2)
    model, averaged = by_hand(2)
    assert same(fitted.model, model)
    assert averages(fitted, averaged)
    assert result.metrics["val_loss"] == means(averaged, Samples(40)) != means(model, Samples(40))


async def test_validation_and_prediction_use_the_average_and_give_the_weights_back() -> None:
    fitted = trainer()
    await fitted.fit(Samples())
    before, inputs = copy.deepcopy(fitted.model), Samples(40).inputs
    assert (await fitted.evaluate(Samples(40)))["test_loss"] == means(by_hand(1)[1], Samples(40))
    (predicted,) = [output async for output in fitted.predict([inputs])]
    averaged = by_hand(1)[1].eval()
    with torch.no_grad():
        assert torch.equal(predicted, averaged(inputs))
    assert same(fitted.model, before)
    assert averages(fitted, by_hand(1)[1])


@pytest.mark.parametrize("stop", [1, 7, 13, 20])
async def test_the_average_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path, stop: int) -> None:
    await trainer(run_dir=tmp_path).fit(Samples(), max_steps=stop)
    again = trainer(run_dir=tmp_path)
    await again.fit(Samples(), max_epochs=2, resume="auto")
    model, averaged = by_hand(2)
    assert same(again.model, model)
    assert averages(again, averaged)
    loaded = trainer()
    assert again._run.checkpoint is not None
    await loaded.load_checkpoint(again._run.checkpoint)
    assert averages(loaded, averaged)


@pytest.mark.parametrize("folder", [True, False], ids=["checkpoint", "memory"])
async def test_the_best_weights_are_the_average_that_was_validated(tmp_path: Path, folder: bool) -> None:
    options: dict[str, Any] = {"run_dir": tmp_path, "callbacks": [ModelCheckpoint(every="1epoch")]} if folder else {}
    stop = EarlyStopping("val_falls", mode="max", patience=5)  # what is largest after the first epoch
    options |= {"callbacks": [*options.get("callbacks", ()), stop], "metrics": {"falls": nn.MSELoss()}}
    fitted = trainer(**options)
    await fitted.fit(Samples(), validation=Samples(40), max_epochs=3)
    best = fitted.state.bests["val_falls"]
    assert best.step == 13
    assert same(fitted.model, by_hand(1)[1])
    assert averages(fitted, by_hand(1)[1])
    assert (await fitted.evaluate(Samples(40)))["test_loss"] == best.value


async def test_the_best_weights_of_the_last_step_are_the_average_too() -> None:
    fitted = trainer(callbacks=[EarlyStopping()])
    result = await fitted.fit(Samples(), validation=Samples(40), max_epochs=2)
    assert result.best is not None
    assert result.best.step == 26
    assert same(fitted.model, by_hand(2)[1])


async def test_an_update_that_is_skipped_is_no_part_of_the_average() -> None:
    stream = Samples(24)
    fitted = trainer(nonfinite="skip")
    stream.inputs[int(list(stream.batches(0))[1].index[0]), 0] = float("nan")
    await fitted.fit(stream)
    assert fitted._parts.average is not None
    assert fitted._parts.average.updates == 2


async def test_an_average_that_begins_or_ends_with_a_resume_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await trainer(run_dir=tmp_path, ema=None).fit(Samples(), max_steps=7)
    again = trainer(run_dir=tmp_path)
    await again.fit(Samples(), max_steps=8, resume="auto")
    assert "ema: None -> 0.9" in caplog.text
    assert "ema: a second copy of the weights is kept (516 B)" in caplog.text
    assert again.average is not None
    assert all(torch.equal(again.average[name], weight) for name, weight in again.model.named_parameters())
    await trainer(run_dir=tmp_path, ema=None).fit(Samples(), max_steps=9, resume="auto")
    assert "ema: 0.9 -> None" in caplog.text


async def test_weights_that_are_loaded_without_their_average_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await trainer(run_dir=tmp_path).fit(Samples(), max_steps=7)
    await trainer().load_checkpoint(tmp_path)
    assert not caplog.records
    await trainer(ema=None).load_checkpoint(tmp_path)
    assert "step-000000007 has a moving average of its weights" in caplog.text
    assert "Give ema=0.9" in caplog.text


def test_a_refused_update_leaves_the_average_by_a_flag_that_nobody_reads() -> None:
    model = network()
    average, plain = Average(model, DECAY), Average(model, DECAY)
    average.update(), plain.update()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    before = average.weights()
    average.update(torch.ones(()))
    assert all(torch.equal(weight, before[name]) for name, weight in average.weights().items())
    average.update(torch.zeros(())), plain.update()
    assert all(torch.equal(weight, plain.weights()[name]) for name, weight in average.weights().items())


@pytest.mark.parametrize("wrong", [0, 1, 1.0, -0.5, True, "0.9", float("nan")])
def test_a_decay_that_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="ema must be a number above 0 and below 1"):
        trainer(ema=wrong)


async def test_without_ema_a_step_of_the_users_sees_the_model_itself() -> None:
    seen: list[int] = []

    def step(model: nn.Module, batch: Batch) -> Any:
        seen.append(id(model))
        return nn.functional.mse_loss(model(batch.inputs), batch.targets)

    fitted = Trainer(network(), step=step, device="cpu")
    assert fitted.average is None
    await fitted.fit(Samples(24))
    assert set(seen) == {id(fitted.model)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_weights_of_16_bits_comes_to_where_they_stay(dtype: torch.dtype) -> None:
    """In bfloat16 itself it stands still half-way: its share is below what can be added there."""
    layer = nn.Linear(3, 2).to(dtype)
    own = layer.weight.data
    average, other = Average(layer, 0.999), Average(layer, 0.999)
    own.zero_()
    average.update()
    own.fill_(0.5)
    for _ in range(5000):
        average.update()
    assert average.weights()["weight"].numpy() == pytest.approx(0.5 * (1 - 0.999**5000), rel=1e-4)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.weights()["weight"], average.weights()["weight"])
    with average.swapped_in():
        assert torch.equal(layer.weight.data, average.weights()["weight"].to(dtype))
    assert layer.weight.data.data_ptr() == own.data_ptr()


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how many copies of tensors are there at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self._made = 0, list[weakref.ref[Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self._made.append(weakref.ref(made))
            self.most = max(self.most, sum(each() is not None for each in self._made))
        return made


@pytest.mark.parametrize("refused", [None, torch.tensor(0.0)])
def test_the_average_of_weights_of_16_bits_takes_no_copy_of_all_of_them(refused: Tensor | None) -> None:
    """Each update took as much memory again as the average itself."""
    average = Average(nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(6))).bfloat16(), 0.9)
    average.update()
    with Copies() as copies:
        average.update(refused)
    assert copies.most == 1
