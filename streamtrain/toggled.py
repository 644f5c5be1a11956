"""What somebody freezes, thaws or puts into another mode while a run trains: a callback, by `parameter.requires_grad_`
and `module.eval()`.

Its law: a next life has all that as it was in the checkpoint; of what nobody touched, and of what `freeze=` governs,
which is a function of the step, the model tells as it is made. What is changed between two fits of one process stays as
it was made then, whatever the checkpoint says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from streamtrain.freezing import Freezing

KEYS = ("requires_grad", "training")
"""Of its state: flags of parameters, and of modules, by their names."""


class Toggled:
    """Flags that are others now than when the first fit of this process began; on the train thread."""

    def __init__(self, model: nn.Module, freezing: Freezing | None) -> None:
        governed = set() if freezing is None else set(map(id, freezing.governed()))
        self._model = model
        self._parameters = {
            name: (parameter, parameter.requires_grad)
            for name, parameter in model.named_parameters()
            if id(parameter) not in governed
        }
        self._modules = {
            name: (module, module.training)
            for name, module in model.named_modules()
            if name and id(module) not in governed
        }
        self._modes: dict[str, bool] = {}
        self._left = self._flags()
        self._theirs: tuple[set[str], set[str]] = set(), set()
        """Parameters and modules that were changed since the last fit."""

    def leave(self) -> None:
        """A fit ends."""
        self._left = self._flags()

    def take_up(self) -> None:
        """The next one is to begin: what is other than the last one left it is its user's doing. Of modes that can't be
        told where the model was put into another as a whole."""
        pairs = zip(self._flags(), self._left, strict=True)
        parameters, modules = ({name for name in now if now[name] != left.get(name, now[name])} for now, left in pairs)
        self._theirs = parameters, modules

    def as_left(self) -> None:
        """Have the modes in which the last fit left the layers of a model that is put into training as a whole."""
        for name, mode in self._left[1].items():
            self._modules[name][0].training = mode

    def _flags(self) -> tuple[dict[str, bool], dict[str, bool]]:
        gradients = {name: one.requires_grad for name, (one, _) in self._parameters.items()}
        modules = self._modules if self._model.training else {}
        return gradients, {name: module.training for name, (module, _) in modules.items()}

    def state_dict(self) -> dict[str, dict[str, bool]]:
        """Those flags. Of a model that is not in training as a whole, which says nothing of its layers, the modes in
        which they were when it was."""
        gradients = {
            name: one.requires_grad for name, (one, made) in self._parameters.items() if one.requires_grad != made
        }
        if self._model.training:
            self._modes = {
                name: module.training for name, (module, made) in self._modules.items() if module.training != made
            }
        return {"requires_grad": gradients, "training": dict(self._modes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have those as they were, and all others as they were made, but for what was changed since the last fit.
        `state` may have other keys, or none of these."""
        gradients, self._modes = state.get("requires_grad", {}), dict(state.get("training", {}))
        parameters, modules = self._theirs
        for name, (parameter, made) in self._parameters.items():
            if name not in parameters:
                parameter.requires_grad_(gradients.get(name, made))
        for name, (module, made) in self._modules.items():
            if name not in modules:
                module.training = self._modes.get(name, made)


def check_toggled(state: Mapping[str, Any]) -> None:
    """Raise TypeError for what is no state of these."""
    for key in KEYS:
        flags = state.get(key, {})
        if not isinstance(flags, dict) or not all(type(flag) is bool for flag in flags.values()):
            raise TypeError(f"{key} is {flags!r:.80}")
