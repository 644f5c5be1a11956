"""What a loss holds, and buffers that no checkpoint has: learned where the model holds it, else refused or said."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.events import EpochEnd
from streamtrain.trainer import Trainer
from streamtrain.unkept import Unkept
from tests.engine import Samples, network


class Uncertain(nn.Module):
    """A squared error over a variance that is learned (Kendall and Gal 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        error = nn.functional.mse_loss(outputs, targets)
        return error * torch.exp(-self.log_variance) + self.log_variance


class Counting(nn.Module):
    """A squared error that counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.mse_loss(outputs, targets)


class Passing(nn.Module):
    """A network that counts its calls in a buffer, and keeps a table that grows."""

    calls: Tensor

    def __init__(self, *, persistent: bool, counts: bool = True) -> None:
        super().__init__()
        self.network, self.counts = network(), counts
        self.register_buffer("calls", torch.zeros(()), persistent=persistent)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, inputs: Tensor) -> Any:
        if self.counts:
            self.calls += 1
        self.register_buffer("table", torch.ones(9), persistent=False)
        return self.network(inputs)


def trainer(model: nn.Module | None = None, loss: Any = None, **options: Any) -> Trainer:
    return Trainer(model or network(), loss or nn.MSELoss(), seed=5, device="cpu", **options)


@pytest.mark.parametrize("given", ["alone", "by output"])
async def test_a_loss_that_would_learn_and_is_no_part_of_the_model_is_refused(given: str) -> None:
    loss = Uncertain() if given == "alone" else {"0": Uncertain()}
    with pytest.raises(ConfigError, match="log_variance, which nothing would update"):
        await trainer(loss=loss).fit(Samples())
    with pytest.raises(ConfigError, match="log_variance"):
        await trainer(loss=loss).train_epoch(Samples())


async def test_a_loss_that_is_a_part_of_the_model_learns(tmp_path: Path) -> None:
    """As the error tells its reader to do."""
    model = network()
    model.criterion = Uncertain()
    model.forward = lambda inputs: nn.Sequential(*list(model)[:-1])(inputs)  # type: ignore[call-overload]
    await trainer(model, model.criterion, run_dir=tmp_path).fit(Samples(), max_steps=3)
    assert float(model.criterion.log_variance.detach()) != 0.0
    frozen = Uncertain().requires_grad_(False)
    assert (await trainer(loss=frozen).fit(Samples(), max_steps=3)).step == 3


async def test_a_loss_whose_parameters_are_in_the_users_optimizer_learns_and_is_said_to_be_in_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, loss = network(), Uncertain()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    await trainer(model, loss, optimizer=optimizer, run_dir=tmp_path).fit(Samples(), max_steps=3)
    assert float(loss.log_variance.detach()) != 0.0
    assert "the loss's parameter log_variance changes in training and is in no checkpoint" in caplog.text


async def test_weights_without_values_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = network()
    with pytest.raises(ConfigError, match=r"on the device meta, which have no values: 0\.weight, 0\.bias") as caught:
        trainer(model)
    assert "to_empty" in caught.value.hint


@pytest.mark.parametrize("clip", [{"gradient_clip_norm": 1.0}, {"gradient_clip_value": 1.0}, {}])
async def test_sparse_gradients_that_torch_can_t_clip_are_refused_before_training(clip: dict[str, float]) -> None:
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1))
    items = [(torch.arange(4), torch.zeros(4, 1))] * 3
    if not clip:
        assert (await trainer(model, optimizer="sgd").fit(items)).step == 3
        return
    with pytest.raises(ConfigError, match=r"^0 has sparse gradients \(sparse=True\), which torch can't clip"):
        trainer(model, optimizer="sgd", **clip)
    frozen = trainer(model, optimizer="sgd", freeze="^0", **clip)
    assert (await frozen.fit(items)).step == 3


async def test_a_loss_goes_to_the_device_with_the_model() -> None:
    """Weights of classes that stay behind are an error of torch's on a GPU; it is asked for by any other device."""
    moved = []

    class Watched(nn.MSELoss):
        def _apply(self, fn: Any, recurse: bool = True) -> nn.MSELoss:
            moved.append(self)
            return self

    first, later, task = Watched(), Watched(), Watched()
    fitted = trainer(loss=first)
    fitted.loss = later
    trainer(loss={"a": task})
    assert {*moved} == {first, later, task}


@pytest.mark.parametrize(
    ("model", "loss", "told"),
    [
        (lambda: Passing(persistent=False), nn.MSELoss, "the model's buffer calls"),
        (lambda: Passing(persistent=True), nn.MSELoss, None),
        (lambda: Passing(persistent=False, counts=False), nn.MSELoss, None),
        (network, Counting, "the loss's buffer calls"),
        (network, lambda: nn.MSELoss(), None),
    ],
)
async def test_buffers_that_change_and_are_in_no_checkpoint_are_said_once(
    model: Any, loss: Any, told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that is made anew with another shape is a cache, and is not meant."""
    fitted = trainer(model(), loss(), run_dir=tmp_path, callbacks=[ModelCheckpoint(every="3steps")])
    await fitted.fit(Samples(), max_steps=12)
    said = [record.getMessage() for record in caplog.records if "is in no checkpoint" in record.getMessage()]
    assert len(said) == (told is not None)
    assert all(message.startswith(f"{told} changes") for message in said)


class Growing(nn.Module):
    """A network that keeps all that it was ever given in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.register_buffer("seen", torch.zeros(0, 4))

    def forward(self, inputs: Tensor) -> Any:
        if self.training:
            self.seen = torch.cat([self.seen, inputs.detach()])
        return self.network(inputs)


async def test_a_buffer_that_grows_is_said_at_the_first_save_and_no_other_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = "the model's buffer seen ([0, 4] -> ["
    rule = ModelCheckpoint(every="2steps")
    await trainer(Growing(), run_dir=tmp_path / "grows", callbacks=[rule]).fit(Samples(), max_steps=6)
    assert caplog.text.count(told) == 1
    assert caplog.text.count("another shape than at the beginning: no run can go on") == 1
    with pytest.raises(CheckpointError, match=r"model\.seen: float32\[48, 4\] -> float32\[0, 4\]"):
        await trainer(Growing(), run_dir=tmp_path / "grows").fit(Samples(), max_steps=7, resume="auto")
    await trainer(run_dir=tmp_path / "not").fit(Samples(), max_steps=6)
    assert caplog.text.count("another shape than at the beginning") == 1


@pytest.mark.parametrize("folder", [True, False])
async def test_a_model_with_a_buffer_that_grows_gets_its_best_weights(tmp_path: Path, folder: bool) -> None:
    model, early = Growing(), EarlyStopping(patience=1, min_delta=1e9)
    place, rule = (tmp_path, [ModelCheckpoint(save_top_k=0)]) if folder else (None, [])
    result = await trainer(model, run_dir=place, callbacks=[early, *rule]).fit(Samples(), Samples(), max_epochs=5)
    assert (result.reason, result.step) == ("early_stopping", 26)
    assert len(model.seen) == 100


class Noisy(nn.Module):
    """Adds noise from a generator of its own."""

    def __init__(self, generator: Any, draw: Callable[[Any], Any]) -> None:
        super().__init__()
        self.network, self.generator, self.draw = network(), generator, draw

    def forward(self, inputs: Tensor) -> Any:
        return self.network(inputs + float(self.draw(self.generator)))


class Keeping(Noisy):
    """Keeps that generator in checkpoints."""

    def get_extra_state(self) -> Tensor:
        state: Tensor = self.generator.get_state()
        return state

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state)


def drawn(generator: torch.Generator) -> Tensor:
    return torch.rand((), generator=generator)


GENERATORS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (lambda: torch.Generator().manual_seed(1), drawn),
    (lambda: np.random.default_rng(1), lambda generator: generator.random()),
    (lambda: np.random.RandomState(1), lambda generator: generator.rand()),
    (lambda: random.Random(1), lambda generator: generator.random()),
]


@pytest.mark.parametrize(("make", "draw"), GENERATORS, ids=["torch", "numpy", "numpy's old", "Python's"])
async def test_a_generator_of_the_models_own_that_draws_is_said(
    tmp_path: Path, make: Callable[[], Any], draw: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A resumed run had its first numbers again, in silence."""
    model = nn.Sequential(Noisy(make(), draw))
    rule = ModelCheckpoint(every="2steps")
    await Trainer(model, nn.MSELoss(), seed=5, device="cpu", run_dir=tmp_path, callbacks=[rule]).fit(Samples())
    assert caplog.text.count("the model's generator 0.generator has drawn numbers and is in no checkpoint") == 1


@pytest.mark.parametrize(
    ("own", "draw"),
    [
        (torch.default_generator, lambda own: torch.rand(1)),
        (np.random.mtrand._rand, lambda own: own.rand()),
        (getattr(random.random, "__self__"), lambda own: own.random()),  # noqa: B009
    ],
    ids=["torch", "numpy", "Python"],
)
def test_the_generators_of_the_process_are_nobodys_own(
    own: Any, draw: Callable[[Any], object], caplog: pytest.LogCaptureFixture
) -> None:
    unkept = Unkept(Noisy(own, draw), {})
    draw(own)
    unkept.tell()
    assert not caplog.records


@pytest.mark.parametrize(
    "model",
    [
        lambda: Noisy(torch.Generator(), lambda generator: 0.5),
        lambda: Noisy(torch.default_generator, drawn),
        lambda: Noisy(np.random.mtrand._rand, lambda generator: generator.rand()),
        lambda: Noisy(getattr(random.random, "__self__"), lambda generator: generator.random()),  # noqa: B009
        lambda: Keeping(torch.Generator(), drawn),
    ],
    ids=["does not draw", "torch's own", "numpy's own", "Python's own", "kept"],
)
async def test_a_generator_that_costs_a_resume_nothing_is_not_said(
    tmp_path: Path, model: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    await Trainer(model(), nn.MSELoss(), seed=5, device="cpu", run_dir=tmp_path).fit(Samples())
    assert "has drawn" not in caplog.text


class Averaging(nn.Module):
    """Counts what it has seen, beginning with a whole number."""

    seen: Tensor

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.network, self.keeps = network(), keeps
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Any:
        seen = self.seen + inputs.detach().abs().sum()
        self.seen = seen.to(self.seen.dtype) if self.keeps else seen
        return self.network(inputs)


@pytest.mark.parametrize("keeps", [True, False])
async def test_a_buffer_whose_dtype_becomes_another_is_said_when_it_is_saved(
    tmp_path: Path, keeps: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checkpoints were made for a week, and refused at the resume."""

    def made() -> Trainer:
        rule = ModelCheckpoint(every="2steps")
        return Trainer(Averaging(keeps=keeps), nn.MSELoss(), seed=5, device="cpu", run_dir=tmp_path, callbacks=[rule])

    await made().fit(Samples(), max_steps=5)
    told = "the model's buffer seen (int64 -> float32) has another dtype than at the beginning"
    assert caplog.text.count(told) == (not keeps)
    if keeps:
        await made().fit(Samples(), max_steps=9, resume="auto")
    else:
        with pytest.raises(CheckpointError, match=r"model.seen: float32\[\] -> int64\[\]"):
            await made().fit(Samples(), max_steps=9, resume="auto")


class Adds(Callback):
    """Adds the front to the optimizer at the end of the first epoch."""

    decides = True

    async def on_epoch_end(self, event: EpochEnd) -> None:
        def add(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            optimizer.add_param_group({"params": list(model.get_submodule("0").parameters())})

        if event.epoch == 0:
            await event.on_train_thread(add)


async def test_groups_that_training_adds_to_the_optimizer_are_said_when_they_are_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints with them were made for a week, and refused at the resume."""

    def made() -> Trainer:
        model = network()
        head = torch.optim.SGD(model.get_submodule("4").parameters(), lr=1e-2)
        rule = ModelCheckpoint(every="2steps")
        return Trainer(model, nn.MSELoss(), optimizer=head, device="cpu", run_dir=tmp_path, callbacks=[rule, Adds()])

    await made().fit(Samples(), max_steps=12)
    assert "the optimizer has" not in caplog.text
    await made().fit(Samples(), max_steps=18, resume="auto")
    assert caplog.text.count("the optimizer has 2 groups, and had 1 when the run began") == 1
    with pytest.raises(CheckpointError, match="hold other parameters than those of the checkpoint"):
        await made().fit(Samples(), max_steps=20, resume="auto")
