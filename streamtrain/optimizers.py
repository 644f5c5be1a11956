"""Optimizers by name, path, rules, object or callable; its law: the fastest exact kernel that torch has is asked for.

`fused=True` is 3 to 5 times faster on the CPU too, and torch never picks it by itself.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._dynamo  # torch imports it (1 s) when the first optimizer is made: on the event loop, were it not for this
from torch import nn
from torch.optim import AdamW, Optimizer

from streamtrain.dense import is_dense
from streamtrain.dotted import found_at, is_path
from streamtrain.errors import ConfigError, StreamtrainError
from streamtrain.muon import MuonWithAdamW, is_matrix
from streamtrain.parameter_groups import Group, Wanted, grouped, trainable

NAMES: dict[str, type[Optimizer]] = {
    name.lower(): getattr(torch.optim, name)
    for name in (
        *("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"),
        "Adafactor",
    )
} | {"momentum": torch.optim.SGD, "nesterov": torch.optim.SGD, "muon": MuonWithAdamW}
MEANT: dict[str, dict[str, Any]] = {"momentum": {"momentum": 0.9}, "nesterov": {"momentum": 0.9, "nesterov": True}}
"""Keywords that a name stands for."""
FUSED = frozenset({"sgd", "momentum", "nesterov", "adam", "adamw", "adagrad"})
"""Those whose fused kernel runs on CPU and CUDA."""
GROUPING = ("rules", "no_decay", "layer_decay")
"""Keys that say how the parameters are grouped."""

OptimizerSpec = Any
"""A name, a path, a dict with a name, an Optimizer, or a callable that makes one."""


def check_lr(lr: object, where: str = "lr") -> float:
    """`lr` as a float; ConfigError unless it is a finite number of at least 0."""
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not math.isfinite(lr) or lr < 0:
        raise ConfigError(f"{where} must be a finite number, at least 0, not {lr!r}")
    return float(lr)


def build_optimizer(model: nn.Module, spec: OptimizerSpec = "adamw", lr: float = 1e-3) -> Optimizer:
    """Make the optimizer of a model's parameters that require gradients.

    `spec`: a name (sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw, nadam, radam, adadelta, adamax, adafactor,
    muon, asgd, rprop); a path ("package.module.Class"); a dict {"name": ..., "lr": ..., ...} of a name, a path, a class
    or a callable, with its keywords; an Optimizer; a class of optimizers (given `lr` too); or a callable. A class or
    callable is given the model if its first parameter is named `model` or `module`, else the list of parameters.

    The dict's other keys: `rules` [(regex, {"lr": ..., ...}), ...], where a parameter follows the first rule whose
    regex is found in its name; `no_decay` (True: no weight decay for biases and norms; or a list of regexes; a rule's
    own weight_decay wins); `layer_decay` (0.75, say: each layer's learning rate over that of the one behind
    it, as in BEiT, Bao et al. 2022; layers are told apart as `parameter_groups.layers` says).

    "muon" updates matrices by torch's Muon, and all else, embeddings too, by AdamW with the keywords of `adamw={...}`;
    a rule's {"muon": False} takes further ones to AdamW, such as a head.

    Raises ConfigError.
    """
    if isinstance(spec, Optimizer):
        return _of_this_model(spec, model)
    check_lr(lr)
    table: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = table.pop("name", "")
    if isinstance(name, str) and is_path(name):
        name = found_at(name, "optimizer")
    if isinstance(name, Optimizer):
        return _of_this_model(name, model)
    if callable(name):
        return _of_this_model(_called(name, model, table, lr, alone=not isinstance(spec, Mapping)), model)
    if isinstance(spec, Mapping) and "name" not in spec:
        raise ConfigError(f"optimizer has no name: {spec!r:.80}", hint="Give {'name': 'adamw', ...}.")
    known = str(name or "").lower()
    if known not in NAMES:
        found = difflib.get_close_matches(known, NAMES, 1)
        all_known = f"Known: {', '.join(NAMES)}; or give an object, a callable or a path."
        shown = spec if not isinstance(name, str) or not name else name
        raise ConfigError(
            f"optimizer: unknown name {shown!r}", hint=f"Did you mean {found[0]!r}?" if found else all_known
        )
    return _named(known, model, {"lr": lr, **MEANT.get(known, {}), **table})


def _named(name: str, model: nn.Module, table: dict[str, Any]) -> Optimizer:
    kind = NAMES[name]
    wanted = Wanted(**{key: table.pop(key) for key in GROUPING if key in table})
    options = _options(kind, table, "optimizer")
    check_lr(options["lr"], "optimizer.lr")
    check = functools.partial(_options, kind)
    _check_decays(kind, wanted, name)
    if name == "muon":
        groups = _muon_groups(model, wanted, options)
    else:
        groups = [_laid_out(group, options["lr"]) for group in grouped(model, wanted, check)]
        halves = kind is torch.optim.SGD and _has_halves(groups)
        if halves and options.get("fused"):
            raise ConfigError(
                f"optimizer {name!r}: fused=True, and on a CPU torch's fused SGD does not update weights of 16 bits",
                hint="Leave fused out, or have the weights in float32 (precision='bf16' computes in bfloat16).",
            )
        fusable = not halves and name in FUSED and "foreach" not in options
        if options.get("fused") is None and fusable and _fusable(model, groups):
            options["fused"] = not any(group.get("dampening", options.get("dampening")) for group in groups)
    return _at_rest(_made(kind, name, _unnamed(groups), options))


def _at_rest(optimizer: Optimizer) -> Optimizer:
    """The same, with a momentum of 0 for each parameter where SGD is fused.

    Its kernel takes the momentum of all parameters or of none, and one that is thawed, or used for the first time, has
    none yet. From 0 the first update is torch's own to the bit, as long as nothing is dampened.
    """
    for group in optimizer.param_groups if type(optimizer) is torch.optim.SGD else ():
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


_OTHERWISE = "One that is made in another way can be given as an object, or as a function with a parameter `model`."


def _made(kind: Callable[..., Any], name: str, parameters: Any, options: Mapping[str, Any]) -> Optimizer:
    try:
        made = kind(parameters, **options)
    except StreamtrainError:
        raise
    except Exception as error:  # of anybody's constructor
        said = isinstance(error, TypeError | ValueError | RuntimeError)
        raise ConfigError(
            f"optimizer {name!r}: {error}" if said else f"optimizer {name!r}: {type(error).__name__}: {error}",
            hint=_OTHERWISE if isinstance(error, TypeError) or not said else "",
        ) from error
    if not isinstance(made, Optimizer):
        raise ConfigError(f"the optimizer callable gave a {type(made).__name__}, not a torch Optimizer")
    return made


def _laid_out(group: Group, lr: float) -> dict[str, Any]:
    """A group as torch takes it."""
    made = {"params": group.parameters, "name": group.name, **group.options}
    if group.scale != 1.0:
        made["lr"] = made.get("lr", lr) * group.scale
    return made


def _unnamed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group alone needs no name."""
    return groups if len(groups) > 1 else [{key: value for key, value in groups[0].items() if key != "name"}]


def _muon_groups(model: nn.Module, wanted: Wanted, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups for Muon and for AdamW; the keywords of the latter are checked and completed in `options`."""
    given = options.get("adamw")
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"optimizer.adamw must be a table of AdamW's keywords, not {given!r}")
    others = {"lr": options["lr"], **_options(AdamW, given or {}, "optimizer.adamw")}
    check_lr(others["lr"], "optimizer.adamw.lr")
    matrix = is_matrix(model)

    def check(rule: Mapping[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(rule.get("muon", False), bool):
            raise ConfigError(f"{where}.muon must be true or false, got {rule['muon']!r}")
        plain = {key: value for key, value in rule.items() if key != "muon"}
        theirs = {key: value for key, value in plain.items() if key in _known(AdamW)}
        ours = {key: value for key, value in plain.items() if key not in theirs or key in ("lr", "weight_decay")}
        made = {**_options(AdamW, theirs, where), **_options(MuonWithAdamW, ours, where)}
        return made | ({"muon": rule["muon"]} if "muon" in rule else {})

    def kind(parameter: nn.Parameter, rule: Mapping[str, Any]) -> str:
        return "Muon" if matrix(parameter, rule) else "AdamW"

    groups = []
    for group in grouped(model, wanted, check, kind):
        muon = matrix(group.parameters[0], group.options)
        groups.append({**_laid_out(group, options["lr"] if muon else others["lr"]), "muon": muon})
    rest = [group for group in groups if not group["muon"]]
    if others.get("fused") is None and "foreach" not in others and _fusable(model, rest):
        others["fused"] = True
    options["adamw"] = others
    return groups


def _check_decays(kind: Callable[..., Any], wanted: Wanted, name: str) -> None:
    if wanted.no_decay is not False and "weight_decay" not in _known(kind) and not _open(kind):
        raise ConfigError(f"optimizer.no_decay: {name} has no weight decay")


def _called(make: Callable[..., Any], model: nn.Module, table: dict[str, Any], lr: float, *, alone: bool) -> Optimizer:
    """What a class or another callable makes; `alone`: it came without a table.

    It is given the learning rate that the table says; else `lr`, if it is a class of optimizers, or came in a table and
    has a parameter of that name.
    """
    name = str(getattr(make, "__name__", None) or type(make).__name__)
    wanted = Wanted(**{key: table.pop(key) for key in GROUPING if key in table})
    plain = isinstance(make, functools.partial)
    is_class = inspect.isclass(make) and issubclass(make, Optimizer)
    lr = check_lr(table.get("lr", lr), "optimizer.lr")
    if ("lr" in _known(make) or _open(make)) and (is_class or not (alone or plain)):
        table.setdefault("lr", lr)
    options = _options(make, table, "optimizer")
    first = next(iter(_parameters(make)), "")
    if {first} & _MODEL if is_class else not plain and _MODEL & set(_parameters(make)):
        if wanted != Wanted():
            raise ConfigError(
                f"optimizer: {name} is given the model, and groups its parameters itself",
                hint=f"{', '.join(GROUPING)} are for those that are given parameters.",
            )
        return _made(make, name, model, options)
    if wanted == Wanted():
        return _made(make, name, [parameter for _, parameter in trainable(model)], options)
    _check_decays(make, wanted, name)
    groups = [_laid_out(group, lr) for group in grouped(model, wanted, functools.partial(_options, make))]
    return _made(make, name, _unnamed(groups), options)


_MODEL = frozenset({"model", "module"})


def _parameters(kind: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(kind).parameters
    except (TypeError, ValueError):  # of C
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _known(kind: Callable[..., Any]) -> list[str]:
    """The keywords of an optimizer."""
    closed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = [name for name, parameter in _parameters(kind).items() if parameter.kind not in closed]
    return [name for name in found if name not in ("self", "params", "parameters", "model", "module")]


def _open(kind: Callable[..., Any]) -> bool:
    """Whether it takes any keyword."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(kind).values())


def _of_this_model(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError("the optimizer holds no parameter of this model", hint="Was the model copied or rebuilt?")
    if not all("lr" in group for group in optimizer.param_groups):
        raise ConfigError(
            f"{type(optimizer).__name__} has no 'lr' in its groups, which the log, schedules and checkpoints go by",
            hint="Give it one from a callable: for group in optimizer.param_groups: group.setdefault('lr', 1.0).",
        )
    step = list(_parameters(type(optimizer).step).values())[
        1:
    ]  # of the class: torch's schedulers wrap the object's own
    open_to_all = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [one.name for one in step if one.default is one.empty and one.kind not in open_to_all]
    if needed:
        raise ConfigError(
            f"{type(optimizer).__name__} can't make a step without {', '.join(needed)}: it asks for gradients itself",
            hint="Here a batch has one gradient; take an optimizer whose step() needs no arguments.",
        )
    return optimizer


def _options(kind: Callable[..., Any], table: Mapping[str, Any], where: str) -> dict[str, Any]:
    known, open_to_all = _known(kind), _open(kind)
    for key in table:
        if key not in known and not open_to_all:
            choices = [*known, *(GROUPING if where == "optimizer" else ())]
            found = difflib.get_close_matches(str(key), choices, 1)
            hint = f"Did you mean {found[0]!r}?" if found else f"Known: {', '.join(choices)}."
            raise ConfigError(f"{where}: unknown key {key!r}", hint=hint)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    parameters = _parameters(kind)
    ours = str(getattr(kind, "__module__", "")).startswith(("torch.optim", "streamtrain."))
    for key, value in given.items():
        if key == "lr":
            if where != "optimizer":
                check_lr(value, f"{where}.lr")
        elif ours and key not in ("adamw", "adjust_lr_fn"):  # what the defaults of others mean is not for us to say
            _check_like(value, parameters[key].default, f"{where}.{key}")
    return given


def _check_like(value: object, default: object, where: str) -> None:
    """Refuse what is not of the kind of torch's default: its own checks fail on it in words about Python."""

    def number(one: object) -> bool:
        plain = isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
        return plain or isinstance(one, torch.Tensor)

    if isinstance(default, tuple):
        absent = [one is None for one in default]
        if not isinstance(value, tuple) or len(value) != len(default):
            good = False
        else:
            good = all(number(one) or (one is None and may) for one, may in zip(value, absent, strict=True))
        if not good:
            like = list(default)
            raise ConfigError(f"{where} must be {len(like)} numbers, got {value!r}", hint=f"For instance {like}.")
    elif default is None or isinstance(default, bool):
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, got {value!r}", hint=f"torch's default is {default}.")
    elif isinstance(default, int | float) and not number(value):
        raise ConfigError(f"{where} must be a number, got {value!r}", hint=f"torch's default is {default}.")


def _fusable(model: nn.Module, groups: list[dict[str, Any]]) -> bool:
    """Whether the fused kernels update these parameters rightly; those with sparse gradients they do not."""
    return not any(getattr(module, "sparse", False) for module in model.modules()) and all(
        parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda") and _is_dense(parameter)
        for group in groups
        for parameter in group["params"]
    )


def _has_halves(groups: list[dict[str, Any]]) -> bool:
    """Whether there are parameters of 16 bits on a CPU: torch 2.13's fused SGD leaves them as they are, but for the
    last few of each, and puts into their momentum whatever lay in memory."""
    parameters = (parameter for group in groups for parameter in group["params"])
    return any(parameter.device.type == "cpu" and parameter.itemsize < 4 for parameter in parameters)


def _is_dense(parameter: torch.Tensor) -> bool:
    """Whether its elements lie side by side: the fused kernels go over as many from its first on, whatever its strides
    are, and write to memory that is not its own."""
    return not parameter.numel() or is_dense(parameter.shape, parameter.stride())
