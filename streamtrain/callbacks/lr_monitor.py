"""Every group's learning rate and momentum in the log, each as it was in the very update of its line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamtrain.callbacks.base import Callback
from streamtrain.events import TrainBegin
from streamtrain.options import flag, one_of

if TYPE_CHECKING:
    from torch.optim import Optimizer


class LearningRateMonitor(Callback):
    """Adds `lr_<group>` and `momentum_<group>` to the lines of the log, for all loggers.

    `interval`: `"step"` for each line, `"epoch"` for the first of each epoch. A group goes by its `name`, or by its
    number where it has none; by both where several have that name, as those of several optimizers. Of Adam's kind the
    first beta is the momentum. The first group's rate is each line's `lr` without this callback.
    """

    def __init__(self, *, interval: str = "step", momentum: bool = True) -> None:
        self._interval = one_of(interval, ("step", "epoch"), "LearningRateMonitor: interval")
        self._momentum = flag(momentum, "LearningRateMonitor: momentum")
        self._epoch = -1

    def gauge(self, optimizer: Optimizer, epoch: int) -> dict[str, float]:
        """Read them, on the train thread."""
        if self._interval == "epoch" and epoch == self._epoch:
            return {}
        self._epoch = epoch
        values: dict[str, float] = {}
        names = [str(group.get("name", number)) for number, group in enumerate(optimizer.param_groups)]
        for number, (name, group) in enumerate(zip(names, optimizer.param_groups, strict=True)):
            if names.count(name) > 1:
                name = f"{name}_{number}"
            values[f"lr_{name}"] = float(group["lr"])
            momentum = group.get("momentum", next(iter(group.get("betas", ())), None))
            if self._momentum and momentum is not None:
                values[f"momentum_{name}"] = float(momentum)
        return values

    async def on_train_begin(self, event: TrainBegin) -> None:
        """Forget the epoch of another run."""
        if event.resumed_from is None and not event.step:
            self._epoch = -1

    def state_dict(self) -> dict[str, Any]:
        """The epoch that was read last."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._epoch = int(state.get("epoch", -1))
