"""Muon for matrices and AdamW for all else, as one optimizer; its law: groups and state are one, each step is torch's.

Muon orthogonalises the momentum of a matrix (Jordan et al. 2024); torch's own takes nothing but matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from streamtrain.errors import ConfigError

FIRST_TORCH = "2.9"
"""The first torch with a Muon."""


class MuonWithAdamW(Optimizer):
    """Groups with `muon=True` are updated by torch's Muon, the others by torch's AdamW.

    `adamw`: keywords of AdamW alone; its learning rate is Muon's unless they say otherwise. Raises ConfigError where
    torch has no Muon.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        made = getattr(torch.optim, "Muon", None)
        if made is None:
            raise ConfigError(
                f"optimizer 'muon' needs torch {FIRST_TORCH} or later, and this is {torch.__version__}",
                hint="Update torch, or give another Muon by its path: package.module.Class.",
            )
        own = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        groups = [{**group, "muon": bool(group.get("muon"))} for group in params]
        matrices, others = ([group for group in groups if group["muon"] is muon] for muon in (True, False))
        self._parts: dict[bool, Optimizer] = {}
        if matrices:
            self._parts[True] = made(matrices, **own)
        if others:
            self._parts[False] = AdamW(others, **{"lr": lr, **(adamw or {})})
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Have both work on this one's groups and state."""
        for muon, part in self._parts.items():
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["muon"] is muon]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group; of matrices if it says `muon`. Raises ConfigError if there was none of its kind before."""
        muon = param_group.setdefault("muon", False)
        if muon not in self._parts:
            raise ConfigError(f"the optimizer was made without parameters for {'Muon' if muon else 'AdamW'}")
        for key, value in self._parts[muon].defaults.items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            part.step()
        return loss


def is_matrix(model: nn.Module) -> Callable[[nn.Parameter, Mapping[str, Any]], bool]:
    """Whether Muon takes a parameter: of two dimensions, of real numbers and no table of embeddings, unless its options
    say `muon`."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}

    def matrix(parameter: nn.Parameter, options: Mapping[str, Any]) -> bool:
        possible = parameter.ndim == 2 and not parameter.is_complex()
        return possible and bool(options.get("muon", parameter not in tables))

    return matrix
