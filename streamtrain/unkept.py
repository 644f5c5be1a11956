"""What training changes and no checkpoint holds, or can give back; its law: it is looked at when one is made, never per
step.

The first is what a model keeps with `persistent=False` (`torch.nn.Module.register_buffer`), all that the modules of a
loss keep, which are no part of the model, and random generators of the modules' own; the second are buffers whose shape
or dtype becomes another, which the model that a next life makes does not take.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from streamtrain.outside_changes import digest_of

logger = logging.getLogger(__name__)

_OWN = (torch.default_generator, getattr(np.random.get_state, "__self__"), getattr(random.getstate, "__self__"))  # noqa: B009
"""Those that whoever asks for no generator of his own is given, as scikit-learn's `check_random_state` does."""


class Unkept:
    """The tensors that would be lost, as they stood when a fit began; on the train thread."""

    def __init__(self, model: nn.Module, losses: Mapping[str, nn.Module]) -> None:
        """`losses`: the modules of the loss by what they are called. Looks at their values, once."""
        self._model, self._losses = model, losses
        self._digests = self._look()
        self._drawn = self._generators()
        buffers = self._kept()
        self._shapes: dict[str, torch.Size] | None = {name: buffer.shape for name, buffer in buffers.items()}
        self._dtypes: dict[str, torch.dtype] | None = {name: buffer.dtype for name, buffer in buffers.items()}

    def tell(self) -> None:
        """Say once which of them have other values than at the beginning. One that has another shape is taken for a
        cache of what can be computed again, as is one that is new; of those that are kept that is said too."""
        self._tell_shapes()
        self._tell_dtypes()
        self._tell_drawn()
        if not self._digests:
            return
        now, before = self._look(), self._digests
        changed = [
            name for name in before if name in now and now[name] != before[name] and now[name][0] == before[name][0]
        ]
        if changed:
            self._digests = {}
            logger.warning(
                "%s changes in training and is in no checkpoint: a run that goes on from one has it as it is made. A "
                "model keeps buffers that are persistent, and a loss that is a part of it (model.criterion = loss)",
                ", ".join(changed),
            )

    def _tell_drawn(self) -> None:
        if not self._drawn:
            return
        now, before = self._generators(), self._drawn
        drawn = [name for name in before if now.get(name, before[name]) != before[name]]
        if drawn:
            self._drawn = {}
            logger.warning(
                "%s has drawn numbers and is in no checkpoint: a run that goes on from one has it as it is made. Draw "
                "from torch's own generator, or keep its state by get_extra_state and set_extra_state",
                ", ".join(drawn),
            )

    def _generators(self) -> dict[str, str]:
        """The states of those that modules keep as attributes, of modules that keep nothing by themselves."""
        found = {}
        for called, root in {"the model": self._model, **self._losses}.items():
            for path, module in root.named_modules():
                keeps = type(module).get_extra_state is not nn.Module.get_extra_state and root is self._model
                for name, value in {} if keeps else vars(module).items():
                    if (state := _state_of(value)) is not None:
                        found[f"{called}'s generator {path}.{name}".replace(" .", " ")] = state
        return found

    def _tell_shapes(self) -> None:
        if self._shapes is None:
            return
        now, before = self._kept(), self._shapes
        grown = [
            f"{name} ({list(before[name]) if name in before else 'not there'} -> {list(buffer.shape)})"
            for name, buffer in now.items()
            if before.get(name) != buffer.shape
        ]
        if grown:
            self._shapes = None
            logger.warning(
                "the model's buffer %s has another shape than at the beginning: no run can go on from a checkpoint "
                "with it. Make it in its full size, or with persistent=False if it can be filled again",
                ", ".join(grown),
            )

    def _tell_dtypes(self) -> None:
        if self._dtypes is None:
            return
        now, before = self._kept(), self._dtypes
        cast = [
            f"{name} ({before[name]} -> {buffer.dtype})".replace("torch.", "")
            for name, buffer in now.items()
            if before.get(name, buffer.dtype) != buffer.dtype
        ]
        if cast:
            self._dtypes = None
            logger.warning(
                "the model's buffer %s has another dtype than at the beginning: no run can go on from a checkpoint "
                "with it. Make it in that one, or keep its own: self.name = value.to(self.name.dtype)",
                ", ".join(cast),
            )

    def _kept(self) -> dict[str, Tensor]:
        """The buffers that checkpoints hold, by name."""
        buffers = {}
        for path, module in self._model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    buffers[f"{path}.{name}" if path else name] = buffer
        return buffers

    def _look(self) -> dict[str, tuple[object, ...]]:
        named = dict(self._named())
        return dict(zip(named, digest_of(named.values()), strict=True))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        known = set(map(id, [*self._model.parameters(), *self._model.buffers()]))
        for path, module in self._model.named_modules():
            for name in sorted(module._non_persistent_buffers_set):
                buffer = module._buffers.get(name)
                if buffer is not None:
                    yield f"the model's buffer {path}.{name}".replace(" .", " "), buffer
        for called, loss in self._losses.items():
            for kind, named in (("buffer", loss.named_buffers()), ("parameter", loss.named_parameters())):
                yield from ((f"{called}'s {kind} {name}", tensor) for name, tensor in named if id(tensor) not in known)


def _state_of(value: object) -> str | None:
    """The state of a random generator, but for the process's own, which checkpoints hold; None for all else."""
    if any(value is own for own in _OWN) or any(value is own for own in torch.cuda.default_generators):
        return None
    if isinstance(value, torch.Generator):
        return _digest(value.get_state().numpy().tobytes())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return _digest(repr(value.get_state()).encode())
    return _digest(repr(value.getstate()).encode()) if isinstance(value, random.Random) else None


def _digest(state: bytes) -> str:
    return hashlib.sha256(state).hexdigest()
