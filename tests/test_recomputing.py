"""What gradient checkpointing promises: less kept, and the same weights to the bit."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain.errors import ConfigError
from streamtrain.recomputing import Recomputed, recompute
from streamtrain.trainer import Trainer
from tests.engine import COLUMNS, Samples, same


class Block(nn.Module):
    """Draws random numbers, and keeps running means."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.25))
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        self.calls += 1
        return x + scale * self.layers(x)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(COLUMNS, 16), nn.ReLU())
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.last = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.last(x)

    @property
    def calls(self) -> list[int]:
        return [block.calls for block in self.blocks]  # type: ignore[misc]


def trainer(model: nn.Module, **options: Any) -> Trainer:
    return Trainer(model, nn.MSELoss(), **{"seed": 5, "device": "cpu", **options})


@pytest.mark.parametrize("which", [True, r"^blocks\.\d+$", r"^blocks\.1", "layers$"])
@pytest.mark.parametrize("accumulate", [1, 3])
async def test_the_weights_are_those_without_it(which: Any, accumulate: int) -> None:
    plain, frugal = trainer(Deep()), trainer(Deep(), gradient_checkpointing=which, accumulate_grad_batches=accumulate)
    if accumulate > 1:
        plain = trainer(Deep(), accumulate_grad_batches=accumulate)
    await plain.fit(Samples(), validation=Samples(24), max_epochs=2)
    await frugal.fit(Samples(), validation=Samples(24), max_epochs=2)
    assert same(plain.model, frugal.model)


@pytest.mark.parametrize("precision", ["bf16"])
async def test_autocast_is_the_same_when_it_is_computed_again(precision: str) -> None:
    plain = trainer(Deep(), precision=precision)
    frugal = trainer(Deep(), precision=precision, gradient_checkpointing=True)
    await plain.fit(Samples())
    await frugal.fit(Samples())
    assert same(plain.model, frugal.model)


async def test_blocks_are_computed_twice_in_training_and_once_without_gradients() -> None:
    model = Deep()
    fitted = trainer(model, gradient_checkpointing=True)
    await fitted.fit(Samples())  # 13 batches
    assert model.calls == [26, 26, 26]
    await fitted.evaluate(Samples(24))  # 3 batches
    assert model.calls == [29, 29, 29]


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"ema": 0.9, "gradient_clip_norm": 1.0}])
async def test_nothing_of_a_step_is_alive_in_the_next(options: dict[str, Any]) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def step(model: nn.Module, batch: Any) -> Any:
        alive.append(sum(ref() is not None for ref in seen))
        outputs = model(batch.inputs)
        loss = nn.functional.mse_loss(outputs, batch.targets)
        seen.extend(weakref.ref(tensor) for tensor in (outputs, loss))
        return {"loss": loss, "outputs": outputs, "largest": outputs.max()}

    gc.disable()
    try:
        await Trainer(Deep(), step=step, device="cpu", **options).fit(Samples())
    finally:
        gc.enable()
    assert alive == [0] * 13


def test_what_is_kept_is_less() -> None:
    def kept(model: nn.Module) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(64, COLUMNS))
        return sum(sizes)

    model = Deep()
    before = kept(model)
    assert recompute(model, True) == ["blocks.0", "blocks.1", "blocks.2"]
    assert kept(model) < before / 2


async def test_a_checkpoint_and_a_copy_have_the_models_own_names(tmp_path: Path) -> None:
    whole, cut = trainer(Deep()), trainer(Deep(), run_dir=tmp_path, gradient_checkpointing=True)
    await whole.fit(Samples(), max_epochs=2)
    await cut.fit(Samples(), max_steps=7)
    assert cut.model.state_dict().keys() == Deep().state_dict().keys()
    again = trainer(Deep(), run_dir=tmp_path)
    await again.fit(Samples(), max_epochs=2, resume="auto")
    assert same(whole.model, again.model)
    for other in (copy.deepcopy(cut.model), pickle.loads(pickle.dumps(cut.model))):
        assert same(other, cut.model)
        other(torch.randn(8, COLUMNS)).sum().backward()
        assert cut.model.last.weight.grad is None  # type: ignore[union-attr]
        assert other.calls != cut.model.calls


def test_the_container_with_most_blocks_is_taken_and_what_is_named_twice_once() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), nn.Linear(4, 1))
    assert recompute(model, True) == ["1.0", "1.1", "1.2"]
    assert recompute(copy.deepcopy(model), r"^1") == ["1"]
    assert isinstance(model[1][0].forward, Recomputed)  # type: ignore[index]


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("layer9", "'layer9' names no module"),
        ("(", "no regular expression"),
        ("^blocks$", "blocks is never called itself"),
        (3, "gradient_checkpointing must be true, false or a regex"),
    ],
)
def test_what_cannot_be_computed_again_is_refused(which: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        trainer(Deep(), gradient_checkpointing=which)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no nn.Sequential or ModuleList of blocks"):
        trainer(nn.Linear(4, 1), gradient_checkpointing=True)
