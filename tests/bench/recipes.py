"""Each optimizer and each schedule as it is asked for here, and as a bare torch loop has it; and that loop.

The law: nothing of streamtrain runs in the bare loop. What torch has no class for is torch's LambdaLR of the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

LR = 0.01
Plain = Callable[[list[nn.Parameter]], list[Optimizer]]
Stepped = Callable[[Optimizer, int], Any]


def _one(kind: Callable[..., Optimizer], **keywords: Any) -> Plain:
    return lambda parameters: [kind(parameters, lr=LR, **keywords)]


def _muon(parameters: list[nn.Parameter]) -> list[Optimizer]:
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    others = [parameter for parameter in parameters if parameter.ndim != 2]
    return [torch.optim.Muon(matrices, lr=LR), torch.optim.AdamW(others, lr=LR, fused=True)]


OPTIMIZERS: dict[str, Plain] = {
    "sgd": _one(torch.optim.SGD, fused=True),
    "momentum": _one(torch.optim.SGD, momentum=0.9, fused=True),
    "nesterov": _one(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
    "adagrad": _one(torch.optim.Adagrad, fused=True),
    "rmsprop": _one(torch.optim.RMSprop),
    "adam": _one(torch.optim.Adam, fused=True),
    "adamw": _one(torch.optim.AdamW, fused=True),
    "nadam": _one(torch.optim.NAdam),
    "radam": _one(torch.optim.RAdam),
    "adadelta": _one(torch.optim.Adadelta),
    "adamax": _one(torch.optim.Adamax),
    "adafactor": _one(torch.optim.Adafactor),
    "asgd": _one(torch.optim.ASGD),
    "rprop": _one(torch.optim.Rprop),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = _muon


@dataclass(frozen=True)
class Recipe:
    """A schedule: what is asked for, and torch's own, given the updates (or epochs) of the run."""

    spec: Any
    plain: Stepped | None
    by: str = "step"


def _wsd(t: int, total: int) -> float:
    return 1.0 - min(1.0, max(0.0, (t - (total - 4)) / 4))


def _warmed(optimizer: Optimizer, total: int) -> Any:
    up = lr_scheduler.LinearLR(optimizer, 1 / 3, 1.0, 2)
    return lr_scheduler.SequentialLR(optimizer, [up, lr_scheduler.CosineAnnealingLR(optimizer, total - 3)], [3])


def _step(optimizer: Optimizer, total: int = 0) -> Any:
    return lr_scheduler.StepLR(optimizer, 3, 0.5)


PLATEAU = {"patience": 0, "factor": 0.5, "threshold": 10.0, "threshold_mode": "abs"}
SCHEDULERS: dict[str, Recipe] = {
    "none": Recipe(None, None),
    "constant": Recipe("constant", lambda of, total: lr_scheduler.ConstantLR(of, 1.0)),
    "step": Recipe({"name": "step", "step_size": 3, "gamma": 0.5}, _step),
    "step by epoch": Recipe(
        {"name": "step", "gamma": 0.5, "interval": "epoch"}, lambda of, total: lr_scheduler.StepLR(of, 1, 0.5), "epoch"
    ),
    "multistep": Recipe(
        {"name": "multistep", "milestones": [2, 5], "gamma": 0.3},
        lambda of, total: lr_scheduler.MultiStepLR(of, [2, 5], 0.3),
    ),
    "exponential": Recipe({"name": "exponential", "gamma": 0.9}, lambda of, total: lr_scheduler.ExponentialLR(of, 0.9)),
    "cosine": Recipe(
        {"name": "cosine", "min_lr": 1e-4}, lambda of, total: lr_scheduler.CosineAnnealingLR(of, total, 1e-4)
    ),
    "warm-up and cosine": Recipe({"name": "cosine", "warmup": 3}, _warmed),
    "cosine_restarts": Recipe(
        {"name": "cosine_restarts", "period": 3, "period_factor": 2},
        lambda of, total: lr_scheduler.CosineAnnealingWarmRestarts(of, 3, 2),
    ),
    "cyclic": Recipe(
        {"name": "cyclic", "step_size_up": 3, "mode": "triangular2", "min_lr": 1e-3},
        lambda of, total: lr_scheduler.CyclicLR(of, 1e-3, LR, 3, mode="triangular2", cycle_momentum=False),
    ),
    "onecycle": Recipe("onecycle", lambda of, total: lr_scheduler.OneCycleLR(of, LR, total, cycle_momentum=False)),
    "linear": Recipe("linear", lambda of, total: lr_scheduler.LinearLR(of, 1.0, 0.0, total)),
    "polynomial": Recipe(
        {"name": "polynomial", "power": 2}, lambda of, total: lr_scheduler.PolynomialLR(of, total, 2.0)
    ),
    "inverse_sqrt": Recipe(
        {"name": "inverse_sqrt", "timescale": 4},
        lambda of, total: lr_scheduler.LambdaLR(of, lambda t: math.sqrt(4 / (t + 4))),
    ),
    "wsd": Recipe({"name": "wsd", "decay": 4}, lambda of, total: lr_scheduler.LambdaLR(of, lambda t: _wsd(t, total))),
    "plateau": Recipe(
        {"name": "plateau", "monitor": "loss", "mode": "min", **PLATEAU},
        lambda of, total: lr_scheduler.ReduceLROnPlateau(of, "min", **PLATEAU),  # type: ignore[arg-type]
        "loss",
    ),
    "function": Recipe(lambda t: 0.9**t, lambda of, total: lr_scheduler.LambdaLR(of, lambda t: 0.9**t)),
    "torch's": Recipe(_step, _step),
}
CLIPPING: dict[str, dict[str, float]] = {
    "none": {},
    "norm": {"gradient_clip_norm": 0.05},
    "value": {"gradient_clip_value": 0.01},
    "both": {"gradient_clip_norm": 0.05, "gradient_clip_value": 0.01},
}
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


def bare(
    model: nn.Module,
    epochs: Sequence[Sequence[tuple[Tensor, Tensor]]],
    case: Mapping[str, str],
    *,
    seed: int,
    device: torch.device,
) -> list[int]:
    """Train as `case` says, in the loop that everybody writes; the updates that the scaler of fp16 left out."""
    accumulate, clip, precision = int(case["accumulate"]), CLIPPING[case["clip"]], case["precision"]
    recipe = SCHEDULERS[case["scheduler"]]
    optimizers = OPTIMIZERS[case["optimizer"]](list(model.parameters()))
    updates = len(epochs) * -(-len(epochs[0]) // accumulate)
    total = len(epochs) if recipe.by == "epoch" else updates
    schedules = [recipe.plain(optimizer, total) for optimizer in optimizers] if recipe.plain else []
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "16")
    loss_of, left_out, step = nn.MSELoss(), [], 0
    torch.manual_seed(seed)
    for batches in epochs:
        total_loss, samples = 0.0, 0
        for begin in range(0, len(batches), accumulate):
            group = batches[begin : begin + accumulate]
            for inputs, targets in group:
                inputs, targets = inputs.to(device), targets.to(device)
                with torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext():
                    loss = loss_of(model(inputs), targets)
                scaler.scale(loss if len(group) == 1 else loss / len(group)).backward()
                total_loss, samples = total_loss + loss.item() * len(inputs), samples + len(inputs)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            if "gradient_clip_value" in clip:
                nn.utils.clip_grad_value_(model.parameters(), clip["gradient_clip_value"])
            if "gradient_clip_norm" in clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip["gradient_clip_norm"])
            scale = scaler.get_scale()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < scale:
                left_out.append(step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            if recipe.by == "step":
                for schedule in schedules:
                    schedule.step()
            step += 1
        for schedule in schedules if recipe.by != "step" else ():
            schedule.step(*((total_loss / samples,) if recipe.by == "loss" else ()))
    return left_out
