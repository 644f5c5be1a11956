"""Optimizers and metrics of other packages pass through: a run that was cut and resumed ends as a bare loop with them.

Where a package is not installed nothing real can pass: `python -m tests.bench packages` makes an environment that has
all of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain import EarlyStopping, ModelCheckpoint, Trainer
from streamtrain.dotted import found_at
from tests.engine import Samples, network, pairs, same, samples

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "schedulefree.AdamWScheduleFree": {},
    "schedulefree.RAdamScheduleFree": {},
    "schedulefree.SGDScheduleFree": {"momentum": 0.9},
    "pytorch_optimizer.AdaBelief": {},
    "pytorch_optimizer.Adan": {},
    "pytorch_optimizer.Lamb": {},
    "pytorch_optimizer.Lion": {},
    "pytorch_optimizer.Prodigy": {},
    "pytorch_optimizer.SOAP": {},
    "pytorch_optimizer.ScheduleFreeAdamW": {},
    "torchao.optim.AdamW4bit": {},
    "torchao.optim.AdamW8bit": {},
    "torchao.optim.AdamWFp8": {},
    "bitsandbytes.optim.AdamW8bit": {},
    "bitsandbytes.optim.AdamW32bit": {},
}
"""By path, with the keywords beside the rate."""
METRICS = ("MeanAbsoluteError", "R2Score", "PearsonCorrCoef", "SpearmanCorrCoef", "ConcordanceCorrCoef")
"""Of torchmetrics: sums, moments, and such as keep all samples."""
LR = 1e-3

pytestmark = pytest.mark.filterwarnings("default")  # theirs are no errors of ours


def bare(path: str, options: dict[str, Any], epochs: int) -> nn.Module:
    """The loop that everybody writes; with `train` and `eval` of the optimizer where it has them."""
    model, loss = network(), nn.MSELoss()
    made: Any = found_at(path, "optimizer")
    optimizer = made(model.parameters(), lr=LR, **options)
    for turn in ("train", "eval"):
        getattr(optimizer, turn, lambda: None)()
        if turn == "train":
            torch.manual_seed(5)
            for inputs, targets in [pair for epoch in pairs(Samples(), epochs) for pair in epoch]:
                loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model


async def through(path: str, options: dict[str, Any], folder: Path, epochs: int = 2) -> bool:
    """Whether a run that was cut within an epoch and resumed ends with the bare loop's weights, to the bit."""

    def trainer() -> Trainer:
        spec = {"name": path, **options}
        return Trainer(network(), nn.MSELoss(), optimizer=spec, lr=LR, seed=5, device="cpu", run_dir=folder)

    await trainer().fit(Samples(), max_steps=9)
    resumed = trainer()
    await resumed.fit(Samples(), max_epochs=epochs, resume="auto")
    return same(resumed.model, bare(path, options, epochs))


async def measured(folder: Path) -> dict[str, tuple[float, float]]:
    """By torchmetrics' names what an evaluation in batches says, and what they say themselves of all at once."""
    torchmetrics = importlib.import_module("torchmetrics")
    inputs, targets = samples(77)
    targets = targets[:, 0]
    valid = [(inputs[begin : begin + 10], targets[begin : begin + 10]) for begin in range(0, 77, 10)]
    model = nn.Sequential(network(), nn.Flatten(0))
    metrics = {name: getattr(torchmetrics, name)() for name in METRICS}
    metrics["all"] = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.ExplainedVariance()])
    watching = [EarlyStopping("val_R2Score"), ModelCheckpoint(monitor="val_R2Score")]
    train = [(inputs, targets[:, 0]) for epoch in pairs(Samples(), 1) for inputs, targets in epoch]
    options: dict[str, Any] = {"metrics": metrics, "callbacks": watching, "run_dir": folder, "seed": 5}
    fitted = Trainer(model, nn.MSELoss(), device="cpu", **options)
    await fitted.fit(train, valid, max_epochs=3)
    said = await fitted.evaluate(valid)
    with torch.no_grad():
        outputs: Tensor = model.eval()(inputs)
    whole: dict[str, Callable[..., Any]] = {name: getattr(torchmetrics, name)() for name in METRICS}
    own = {name: float(metric(outputs, targets)) for name, metric in whole.items()}
    for name in ("MeanSquaredError", "ExplainedVariance"):
        own[f"all_{name}"] = float(getattr(torchmetrics, name)()(outputs, targets))
    return {name: (said[f"test_{name}"], value) for name, value in own.items()}


@pytest.mark.parametrize("path", list(OPTIMIZERS))
async def test_an_optimizer_of_another_package_makes_the_bare_loops_weights_though_it_is_resumed(
    path: str, tmp_path: Path
) -> None:
    pytest.importorskip(path.partition(".")[0], reason="it is not installed: nothing real to pass through")
    assert await through(path, OPTIMIZERS[path], tmp_path)


async def test_torchmetrics_say_in_batches_what_they_say_of_all_at_once(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="it is not installed: nothing real to pass through")
    values = await measured(tmp_path)
    assert {name: said for name, (said, _) in values.items()} == pytest.approx(
        {name: own for name, (_, own) in values.items()}, rel=1e-4
    )
