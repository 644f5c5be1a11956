"""Which parameters an optimizer treats alike; its law: each is in one group, by the first rule that names it.

A tied parameter goes by all of its names, and is counted once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from streamtrain.errors import ConfigError

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Wanted:
    """How the groups are to be made."""

    rules: Sequence[Any] = ()
    """Pairs of a regex and the options of the parameters in whose names it is found."""
    no_decay: bool | Sequence[str] = False
    """No weight decay for biases and norms (True), or for what these regexes name."""
    layer_decay: float | None = None
    """The learning rate of a layer over that of the one behind it."""


@dataclass
class Group:
    """Parameters that are treated alike."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    """Of the learning rate."""
    parameters: list[nn.Parameter] = field(default_factory=list)


def trainable(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """The parameters that require gradients, once each, with all of their names. Raises ConfigError if none does."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    if not names:
        raise ConfigError(f"the model {type(model).__name__} has no parameter that requires a gradient")
    return [(found, parameter) for parameter, found in names.items()]


def grouped(
    model: nn.Module,
    wanted: Wanted,
    check: Callable[[Mapping[str, Any], str], dict[str, Any]],
    kind: Callable[[nn.Parameter, Mapping[str, Any]], str] = lambda parameter, options: "",
) -> list[Group]:
    """The groups: what no rule names first, then rule by rule; within these the kinds, decayed or not, and from the
    last layer, whose rate is the given one, to the first.

    `check(options, where)` gives a rule's options, or refuses them; `kind` tells apart what one optimizer must not take
    together. Raises ConfigError.
    """
    parameters = trainable(model)
    rules = [_rule(number, rule, check) for number, rule in enumerate(wanted.rules)]
    bare = _not_decayed(model, parameters, wanted.no_decay)
    layers = _layers(parameters, wanted.layer_decay)
    found: dict[tuple[int, str, bool, int], Group] = {}
    for names, parameter in parameters:
        number = next((at for at, (pattern, _) in enumerate(rules) if any(map(pattern.search, names))), -1)
        options = dict(rules[number][1]) if number >= 0 else {}
        apart, undecayed, layer = kind(parameter, options), parameter in bare, layers.get(names[0], 0)
        if undecayed:
            options.setdefault("weight_decay", 0.0)
        words = [f"rule {rules[number][0].pattern!r}"] if number >= 0 else []
        words += [apart] if apart else []
        words += [f"layer {layer}"] if layers else []
        words += ["no decay"] if undecayed else []
        group = found.setdefault((number, apart, undecayed, layer), Group(", ".join(words) or "all others", options))
        group.parameters.append(parameter)
        if wanted.layer_decay is not None:
            group.scale = wanted.layer_decay ** (max(layers.values()) - layer)
    _refuse_idle(
        [(pattern, f"rules[{at}]") for at, (pattern, _) in enumerate(rules)], [key[0] for key in found], parameters
    )
    return [found[key] for key in sorted(found, key=lambda key: (*key[:-1], -key[-1]))]


def _rule(
    number: int, rule: Any, check: Callable[[Mapping[str, Any], str], dict[str, Any]]
) -> tuple[re.Pattern[str], dict[str, Any]]:
    where = f"optimizer.rules[{number}]"
    pair = isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2
    if not pair or not isinstance(rule[1], Mapping):
        raise ConfigError(f"{where} must be (regex, {{option: value}}), not {rule!r}")
    return _pattern(rule[0], where), check(rule[1], where)


def _pattern(text: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{where}: {text!r} is no regular expression: {error}") from error


def _refuse_idle(
    patterns: Iterable[tuple[re.Pattern[str], str]],
    used: Iterable[int],
    parameters: list[tuple[list[str], nn.Parameter]],
) -> None:
    """Refuse rules that no parameter follows: a name was misspelled, or a rule before it takes all."""
    for number, (pattern, where) in enumerate(patterns):
        if number not in set(used):
            names = ", ".join(found[0] for found, _ in parameters[:8])
            first = any(pattern.search(name) for found, _ in parameters for name in found)
            before = " that the rules before it leave" if first else ""
            raise ConfigError(
                f"optimizer.{where}: {pattern.pattern!r} names no parameter{before}", hint=f"names: {names}"
            )


def _not_decayed(
    model: nn.Module, parameters: list[tuple[list[str], nn.Parameter]], no_decay: Any
) -> set[nn.Parameter]:
    """Biases, and what norm layers hold: all of one dimension or none, as timm's weight decay leaves them out."""
    if no_decay is False:
        return set()
    if no_decay is True:
        norms = {
            parameter for module in model.modules() if isinstance(module, _NORMS) for parameter in module.parameters()
        }
        return {
            parameter
            for names, parameter in parameters
            if parameter.ndim <= 1 or parameter in norms or any(name.endswith("bias") for name in names)
        }
    if not isinstance(no_decay, list | tuple) or not no_decay:
        raise ConfigError(
            f"optimizer.no_decay must be true, false or a list of regexes, not {no_decay!r}",
            hint="true: biases and norms are not decayed.",
        )
    patterns = [(_pattern(text, f"optimizer.no_decay[{at}]"), f"no_decay[{at}]") for at, text in enumerate(no_decay)]
    hits = [[any(map(pattern.search, names)) for pattern, _ in patterns] for names, _ in parameters]
    _refuse_idle(patterns, [at for at in range(len(patterns)) if any(hit[at] for hit in hits)], parameters)
    return {parameter for (_, parameter), hit in zip(parameters, hits, strict=True) if any(hit)}


def _layers(parameters: list[tuple[list[str], nn.Parameter]], layer_decay: Any) -> dict[str, int]:
    if layer_decay is None:
        return {}
    number = isinstance(layer_decay, int | float) and not isinstance(layer_decay, bool) and math.isfinite(layer_decay)
    if not number or not 0 < layer_decay <= 1:
        raise ConfigError(f"optimizer.layer_decay must be a number above 0 and up to 1, not {layer_decay!r}")
    return layers([names[0] for names, _ in parameters])


def layers(names: Sequence[str]) -> dict[str, int]:
    """The layer of each parameter, from 0 at the input, by its name and the order of the modules.

    The path to the first number in a name is a layer ("blocks.3" of "blocks.3.mlp.0.weight"). All that comes before the
    first of these (embeddings, a stem) is layer 0, all behind the last (a norm, a head) the last one, as BEiT and timm
    number the layers of transformers; what stands between belongs to the layer before it. Without numbers each module
    of the model is a layer.
    """
    found: list[str | None] = [_numbered(name) for name in names]
    if not any(found):
        depth = _common(names)
        found = [name.split(".")[min(depth, name.count("."))] for name in names]
    order = list(dict.fromkeys(unit for unit in found if unit is not None))
    first = next(at for at, unit in enumerate(found) if unit is not None)
    last = max(at for at, unit in enumerate(found) if unit is not None)
    shift, made, here = int(first > 0), {}, 0
    for at, (name, unit) in enumerate(zip(names, found, strict=True)):
        if unit is not None:
            here = order.index(unit) + shift
        made[name] = 0 if at < first else len(order) + shift if at > last else here
    return made


def _numbered(name: str) -> str | None:
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return None if at is None else ".".join(parts[: at + 1])


def _common(names: Sequence[str]) -> int:
    """How many parts all names begin with: wrappers around the model."""
    split = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(len(parts) > depth + 1 and parts[depth] == split[0][depth] for parts in split):
        depth += 1
    return depth


def table(optimizer: Optimizer) -> Iterator[str]:
    """A line on the optimizer, and one a group: parameters, elements, learning rate, weight decay."""
    groups = optimizer.param_groups
    fused = ", fused" if any(group.get("fused") for group in groups) else ""
    yield f"optimizer {type(optimizer).__name__}{fused}"
    for number, group in enumerate(groups):
        name = f" ({group['name']})" if "name" in group else ""
        elements = sum(parameter.numel() for parameter in group["params"])
        decay = f", weight decay {float(group['weight_decay']):g}" if "weight_decay" in group else ""
        count = len(group["params"])
        yield f"  group {number}{name}: {count} parameters, {elements} elements, lr {float(group['lr']):g}{decay}"
