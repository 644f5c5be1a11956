"""Optimizers by name, rules, object or callable; its law: the fastest exact kernel that torch has is asked for.

`fused=True` is 3 to 5 times faster on the CPU too, and torch never picks it by itself.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch._dynamo  # torch imports it (1 s) when the first optimizer is made: on the event loop, were it not for this
from torch import nn
from torch.optim import Optimizer

from streamtrain.errors import ConfigError

NAMES = {
    name.lower(): getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
}
FUSED = frozenset({"sgd", "adam", "adamw", "adagrad"})
"""Those whose fused kernel runs on CPU and CUDA."""

OptimizerSpec = Any
"""A name, a dict with a name, an Optimizer, or a callable that makes one."""


def check_lr(lr: object, where: str = "lr") -> float:
    """`lr` as a float; ConfigError unless it is a finite number of at least 0."""
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not math.isfinite(lr) or lr < 0:
        raise ConfigError(f"{where} must be a finite number, at least 0, not {lr!r}")
    return float(lr)


def build_optimizer(model: nn.Module, spec: OptimizerSpec = "adamw", lr: float = 1e-3) -> Optimizer:
    """Make the optimizer of a model's parameters that require gradients.

    `spec`: a name ("sgd", "adam", "adamw", ...); {"name": ..., "lr": ..., "rules": [(regex, {"lr": ...}), ...], ...}
    with torch's keywords, where a parameter follows the first rule whose regex is found in its name; an Optimizer; a
    class of optimizers (given `lr` too); or a callable, given the model if its parameter is named `model` or `module`,
    else the list of parameters.

    Raises ConfigError.
    """
    if isinstance(spec, Optimizer):
        return _of_this_model(spec, model)
    check_lr(lr)
    if not isinstance(spec, str | Mapping) and callable(spec):
        return _of_this_model(_call(spec, model, lr), model)
    table: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = str(table.pop("name", "")).lower()
    if name not in NAMES:
        found = difflib.get_close_matches(name, NAMES, 1)
        known = f"Known: {', '.join(NAMES)}; or give an object or a callable."
        hint = f"Did you mean {found[0]!r}?" if found else known
        raise ConfigError(f"optimizer: unknown name {name or spec!r}", hint=hint)
    rules = table.pop("rules", ())
    options = {"lr": lr, **_options(NAMES[name], table, "optimizer")}
    check_lr(options["lr"], "optimizer.lr")
    groups = _groups(model, rules, NAMES[name])
    if options.get("fused") is None and name in FUSED and "foreach" not in options and _fusable(model, groups):
        options["fused"] = True
    try:
        return NAMES[name](groups, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer {name!r}: {error}") from error


def signature(optimizer: Optimizer) -> dict[str, Any]:
    """What must not change between two lives of a run: class, and each group's size and hyperparameters."""
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"} | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "groups": groups}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ConfigError(f"the model {type(model).__name__} has no parameter that requires a gradient")
    return named


def _call(spec: Any, model: nn.Module, lr: float) -> Optimizer:
    parameters = [parameter for _, parameter in _trainable(model)]
    made: object
    if inspect.isclass(spec) and issubclass(spec, Optimizer):
        made = spec(parameters, lr=lr)  # type: ignore[call-arg]
    elif not isinstance(spec, functools.partial) and {"model", "module"} & set(inspect.signature(spec).parameters):
        made = spec(model)
    else:
        made = spec(parameters)
    if not isinstance(made, Optimizer):
        raise ConfigError(f"the optimizer callable gave a {type(made).__name__}, not a torch Optimizer")
    return made


def _of_this_model(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError("the optimizer holds no parameter of this model", hint="Was the model copied or rebuilt?")
    return optimizer


def _options(kind: type[Optimizer], table: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = [name for name in inspect.signature(kind).parameters if name not in ("self", "params")]
    for key in table:
        if key not in known:
            found = difflib.get_close_matches(str(key), known, 1)
            hint = f"Did you mean {found[0]!r}?" if found else f"Known: {', '.join(known)}."
            raise ConfigError(f"{where}: unknown key {key!r}", hint=hint)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    for key, value in given.items():
        if key == "lr":
            continue  # seen to elsewhere
        _check_like(value, inspect.signature(kind).parameters[key].default, f"{where}.{key}")
    return given


def _check_like(value: object, default: object, where: str) -> None:
    """Refuse what is not of the kind of torch's default: its own checks fail on it in words about Python."""

    def number(one: object) -> bool:
        plain = isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
        return plain or isinstance(one, torch.Tensor)

    if isinstance(default, tuple):
        if not isinstance(value, tuple) or len(value) != len(default) or not all(map(number, value)):
            like = list(default)
            raise ConfigError(f"{where} must be {len(like)} numbers, got {value!r}", hint=f"For instance {like}.")
    elif default is None or isinstance(default, bool):
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, got {value!r}", hint=f"torch's default is {default}.")
    elif isinstance(default, int | float) and not number(value):
        raise ConfigError(f"{where} must be a number, got {value!r}", hint=f"torch's default is {default}.")


def _groups(model: nn.Module, rules: Sequence[Any], kind: type[Optimizer]) -> list[dict[str, Any]]:
    """One group for all that no rule names, then one a rule, in the rules' order."""
    plans: list[tuple[re.Pattern[str], dict[str, Any], list[nn.Parameter]]] = []
    for number, rule in enumerate(rules):
        where = f"optimizer.rules[{number}]"
        pair = isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2
        if not pair or not isinstance(rule[1], Mapping):
            raise ConfigError(f"{where} must be (regex, {{option: value}}), not {rule!r}")
        try:
            pattern = re.compile(rule[0])
        except (re.error, TypeError) as error:
            raise ConfigError(f"{where}: {rule[0]!r} is no regular expression: {error}") from error
        plans.append((pattern, _options(kind, rule[1], where), []))
    rest: list[nn.Parameter] = []
    for name, parameter in _trainable(model):
        home = next((members for pattern, _, members in plans if pattern.search(name)), rest)
        home.append(parameter)
    for number, (pattern, _, members) in enumerate(plans):
        if not members:
            names = ", ".join(name for name, _ in _trainable(model)[:8])
            raise ConfigError(
                f"optimizer.rules[{number}]: {pattern.pattern!r} names no parameter", hint=f"names: {names}"
            )
    first = [{"params": rest}] if rest else []
    return first + [{"params": members, **options} for _, options, members in plans]


def _fusable(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the fused kernels take all gradients; sparse ones they do not."""
    return not any(getattr(module, "sparse", False) for module in model.modules()) and all(
        parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
        for group in groups
        for parameter in group["params"]
    )
