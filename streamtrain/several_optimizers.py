"""Several optimizers of one model, by name, in the shape of one.

Its law: each parameter that is trained belongs to exactly one of them. To whoever keeps states, sets rates or counts
parameters they are one optimizer with all their groups, in the order of their names as given; only an update is made by
each for itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer

from streamtrain.errors import ConfigError
from streamtrain.optimizers import OptimizerSpec, build_optimizer


def is_several(spec: OptimizerSpec) -> bool:
    """Whether `optimizer=` describes several: a table of specs by name, without a "name" of its own."""
    if not isinstance(spec, Mapping) or not spec or "name" in spec:
        return False
    return all(isinstance(each, str | Mapping | Optimizer) or callable(each) for each in spec.values())


class Optimizers(Optimizer):
    """Optimizers by name."""

    def __init__(self, members: Mapping[str, Optimizer]) -> None:
        # torch's own __init__ would make groups of its own: these are the members', also after they load a state.
        self.members = dict(members)
        own = [member.defaults for member in self.members.values()]
        self.defaults = {key: own[0][key] for key in own[0] if all(key in defaults for defaults in own)}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all, live."""
        return list(chain.from_iterable(member.param_groups for member in self.members.values()))

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The states of all, by parameter."""
        return {key: value for member in self.members.values() for key, value in member.state.items()}

    def state_dict(self) -> dict[str, Any]:
        """As torch's, of all groups: parameters are numbered through."""
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for member in self.members.values():
            begin = sum(len(group["params"]) for group in groups)
            saved = member.state_dict()
            states |= {begin + number: state for number, state in saved["state"].items()}
            groups += [{**group, "params": [begin + n for n in group["params"]]} for group in saved["param_groups"]]
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        groups, begin = list(state_dict["param_groups"]), 0
        for member in self.members.values():
            own, groups = groups[: len(member.param_groups)], groups[len(member.param_groups) :]
            end = begin + sum(len(group["params"]) for group in own)
            states = {n - begin: state for n, state in state_dict["state"].items() if begin <= n < end}
            own = [{**group, "params": [n - begin for n in group["params"]]} for group in own]
            member.load_state_dict({"state": states, "param_groups": own})
            begin = end

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a group belongs to one of the members."""
        raise ConfigError(
            "add_param_group: nobody knows which of several optimizers the group is for",
            hint=f"optimizer.members[name].add_param_group(...), with one of {', '.join(map(repr, self.members))}.",
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all."""
        for member in self.members.values():
            member.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Refused: each is stepped by `manual_update(loss, name)`."""
        raise ConfigError("several optimizers are not stepped together", hint="manual_update(loss, name) steps one.")

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {member!r}" for name, member in self.members.items())


def build_optimizers(model: nn.Module, specs: Mapping[str, OptimizerSpec], lr: float) -> Optimizers:
    """The optimizers of a table.

    Each name is that of the submodule whose parameters it updates (`"gen"`: those of `model.gen`), or its spec has
    `"params"`, a regex of their names. The rest of a spec is as for one optimizer. Raises ConfigError.
    """
    homes: dict[int, str] = {}
    members: dict[str, Optimizer] = {}
    for key, spec in specs.items():
        table: Any = dict(spec) if isinstance(spec, Mapping) else spec
        regex = table.pop("params", None) if isinstance(table, dict) else None
        try:
            pattern = re.compile(rf"^{re.escape(str(key))}\." if regex is None else regex)
        except (re.error, TypeError) as error:
            raise ConfigError(f"optimizer.{key}.params: {regex!r} is no regular expression: {error}") from error
        part = _Part(model, {name: p for name, p in model.named_parameters() if pattern.search(name)})
        for name, parameter in part.named:
            if homes.setdefault(id(parameter), key) != key:
                raise ConfigError(f"optimizer: {name} belongs to both {homes[id(parameter)]!r} and {key!r}")
        if not any(parameter.requires_grad for _, parameter in part.named):
            names = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(
                f"optimizer.{key}: nothing to train is named {pattern.pattern!r}",
                hint=f"Name a submodule ({names}), or give {{'name': ..., 'params': regex}}.",
            )
        try:
            made = members[str(key)] = build_optimizer(part, table, lr)
        except ConfigError as error:
            raise ConfigError(f"optimizer.{key}: {error}", hint=error.hint) from error
        if callable(getattr(made, "train", None)) and callable(getattr(made, "eval", None)):
            raise ConfigError(
                f"optimizer.{key}: {type(made).__name__} learns with other weights than those to be judged by, "
                "which only one optimizer alone can do",
                hint="Take another one here, or train with it alone.",
            )
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    for key, made in members.items():
        for parameter in (each for group in made.param_groups for each in group["params"]):
            if homes.get(id(parameter), key) != key:
                raise ConfigError(
                    f"optimizer.{key} holds {named[id(parameter)]}, which is for {homes[id(parameter)]!r} to update",
                    hint=f"Make it of the parameters of {key!r} alone.",
                )
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in homes]
    if left:
        more = ", ..." if len(left) > 8 else ""
        raise ConfigError(
            f"optimizer: none of {', '.join(map(repr, members))} updates {', '.join(left[:8])}{more}",
            hint="Freeze it (freeze=), or name it in a 'params' regex.",
        )
    return Optimizers(members)


class _Part(nn.Module):
    """Some parameters of a model under their own names, for `build_optimizer`."""

    def __init__(self, model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.named, self._of = list(named.items()), [model]  # in a list: it is no module of ours

    def named_modules(self, *_: Any, **__: Any) -> Any:
        """All of the model's."""
        return self._of[0].named_modules()

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        """Those that were given."""
        return iter(self.named)

    def parameters(self, *_: Any, **__: Any) -> Any:
        """The same without their names."""
        return (parameter for _, parameter in self.named)
