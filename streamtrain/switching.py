"""Optimizers with `train()` and `eval()`: the model holds the weights to learn with, or those to be judged by.

Schedule-free optimizers (Defazio et al. 2024, arXiv:2405.15682; the package `schedulefree`) take gradients at one point
and give another as the result. Its law: to be judged costs nothing of what is learned. The way there and back rounds,
so the weights to learn with are kept meanwhile, and in checkpoints beside the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamtrain.errors import CheckpointError


class Switch:
    """Switches one optimizer, on the train thread."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._optimizer: Any = optimizer
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.learning = False
        """Whether the model holds the weights to learn with; such optimizers begin without."""
        self._kept: list[Tensor] = []
        """The weights to learn with, while the model holds the others; empty where only the optimizer knows them."""

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def learn(self) -> None:
        """Put the weights to learn with into the model."""
        if self.learning:
            return
        self._optimizer.train()
        if self._kept:
            for parameter, kept in zip(self._parameters(), self._kept, strict=True):
                parameter.copy_(kept)
        self.learning, self._kept = True, []

    @torch.no_grad()
    def judge(self) -> None:
        """Put the weights to be judged by into the model."""
        if not self.learning:
            return
        self._kept = [parameter.detach().clone() for parameter in self._parameters()]
        self._optimizer.eval()
        self.learning = False

    def forget(self) -> None:
        """Other weights were put into the model, to be judged by: those to learn with follow from them."""
        self._kept = []

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that are kept, by name; to be asked while the model is being judged."""
        assert not self.learning
        parameters = self._parameters() if self._kept else []
        names = [self._names.get(id(parameter), f"#{at}") for at, parameter in enumerate(parameters)]
        return dict(zip(names, self._kept, strict=True))

    def check(self, kept: dict[str, Tensor]) -> list[str]:
        """The names of the weights that a state has to keep, in the order of the parameters; nothing is touched. Raises
        CheckpointError where it keeps others."""
        parameters = self._parameters() if kept else []
        names = [self._names.get(id(parameter), f"#{at}") for at, parameter in enumerate(parameters)]
        if sorted(names) != sorted(kept):
            raise CheckpointError("the weights to learn with are of other parameters than those of the checkpoint")
        for name, parameter in zip(names, parameters, strict=True):
            if kept[name].shape != parameter.shape:
                raise CheckpointError(f"the weights to learn with are of another shape in the checkpoint: {name}")
        return names

    def load_state_dict(self, kept: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave, once model and optimizer are as they were then. Raises CheckpointError."""
        pairs = zip(self.check(kept), self._parameters(), strict=False)
        self._kept = [kept[name].to(parameter.device) for name, parameter in pairs]
        self.learning = False


def switch_of(model: nn.Module, optimizer: Optimizer) -> Switch | None:
    """The switch of an optimizer that has one; None for all others."""
    both = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    return Switch(model, optimizer) if both else None
