"""The moving average of the weights, after each update: what is validated, predicted with and kept as the best.

Its law: the model that trains never notices. The average lies in memory of its own, and changes places with the weights
for as long as something is computed with it, on the train thread.

    first update    average = weights
    later           average += (1 - decay) * (weights - average)

which is what `torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))` does (Polyak and
Juditsky 1992; Tarvainen and Valpola 2017), in one fused call. Buffers (running statistics) are the model's own, as
there. Other than there the average of weights of 16 bits is kept in float32: a share of 0.001 of a difference is below
what bfloat16 can add to a weight, and an average in it stands still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NARROW = (torch.float16, torch.bfloat16)


class Average:
    """The average of a model's floating-point parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`model`: whose parameters have their sizes and their device."""
        self.decay = decay
        self.updates = 0
        """Over which it was taken; until the first one the model's own weights stand for it, and it takes no memory."""
        named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()]
        self._names = [name for name, _ in named]
        self._weights: list[Tensor] = [parameter for _, parameter in named]
        self._dtypes = [torch.float32 if weight.dtype in NARROW else weight.dtype for weight in self._weights]
        """Of the averages."""
        self._narrow = any(weight.dtype in NARROW for weight in self._weights)
        self._average: list[Tensor] = []
        self._begun: Tensor | None = None
        """0-d, bool, on the device: whether an update that it was taken over was made; None: one was, or there is no
        average yet."""

    @property
    def bytes(self) -> int:
        """What it takes, in memory beside the model."""
        return sum(one.numel() * dtype.itemsize for one, dtype in zip(self._weights, self._dtypes, strict=True))

    @torch.no_grad()
    def update(self, refused: Tensor | None = None) -> None:
        """Take in the weights of the update that was just made; where `refused` (0-d, on the device) is not 0 there was
        none, and the average stays as it is: `leave_out` is told, once that is known."""
        self.updates += 1
        made = None if refused is None else refused == 0
        if not self._average:
            self._average, self._begun = self._copies(), made
        elif made is None:
            self._move([1 - self.decay] * len(self._dtypes))
        else:
            share = (1 - self.decay) * made
            if self._begun is not None:  # the first that is made gives all
                share, self._begun = torch.where(self._begun, share, made.to(share.dtype)), self._begun | made
            self._move([share.to(dtype) for dtype in self._dtypes])

    def _move(self, shares: list[Any]) -> None:
        """Move each average by its share to the weights, which are copied one by one where it is a wider one: copies of
        all would take as much as the average."""
        if not self._narrow:
            share: Any = shares if isinstance(shares[0], Tensor) else shares[0]
            torch._foreach_lerp_(self._average, self._weights, share)
            return
        for average, weight, own in zip(self._average, self._weights, shares, strict=True):
            average.lerp_(weight.to(average.dtype), own)

    def _copies(self) -> list[Tensor]:
        """The same, in memory of their own."""
        pairs = zip(self._weights, self._dtypes, strict=True)
        return [weight.detach().to(dtype, copy=True) for weight, dtype in pairs]

    def leave_out(self, updates: int) -> None:
        """So many of those that it was taken over were not made; where none was, there is no average yet."""
        self.updates -= updates
        self._begun = None
        if not self.updates:
            self._average = []

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Have the model compute with the average; on the train thread."""
        own = [weight.data for weight in self._weights[: len(self._average)]]
        for weight, average in zip(self._weights, self._average, strict=False):
            weight.data = average.to(weight.dtype)  # the average itself, but where it is a wider one
        try:
            yield
        finally:
            for weight, data in zip(self._weights, own, strict=False):
                weight.data = data

    @torch.no_grad()
    def restart(self) -> None:
        """The average is what the model has now."""
        if self._average:
            torch._foreach_copy_(self._average, self._weights)

    @torch.no_grad()
    def into_model(self) -> None:
        """The model has the average from now on."""
        if self._average:
            torch._foreach_copy_(self._weights, self._average)

    def weights(self) -> dict[str, Tensor]:
        """The averaged parameters by name, in memory of their own."""
        return dict(zip(self._names, [one.clone() for one in self._average] or self._copies(), strict=True))

    def differences(self, saved: Mapping[str, Any]) -> Iterator[str]:
        """In what a state is of other weights than these."""
        int(saved["updates"])
        if names := saved["weights"].keys():
            for name in sorted(names ^ set(self._names)):
                yield f"ema.{name}: {'there -> not there' if name in names else 'not there -> there'}"
            for name, weight in zip(self._names, self._weights, strict=True):
                if name in names and saved["weights"][name].shape != weight.shape:
                    yield f"ema.{name}: {list(saved['weights'][name].shape)} -> {list(weight.shape)}"

    def state_dict(self) -> dict[str, Any]:
        """`{"updates", "weights": {name: tensor}}`; the tensors are the live ones."""
        return {"updates": self.updates, "weights": dict(zip(self._names, self._average, strict=False))}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take back what `state_dict` gave; None: begin with the next update."""
        saved: Mapping[str, Tensor] = {} if state is None else state["weights"]
        self.updates, self._begun = 0 if state is None else int(state["updates"]), None
        kept = zip(self._names, self._weights, self._dtypes, strict=True)
        self._average = [torch.empty_like(one, dtype=dtype).copy_(saved[name]) for name, one, dtype in kept if saved]
