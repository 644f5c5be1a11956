"""An optimizer's state by the names of its parameters; its law: it finds its parameter whatever their order is.

torch numbers the parameters in the order of the groups, and gives each the state of its number without a word.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from streamtrain.errors import CheckpointError


def names_of(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """The names of each group's parameters; one that is not the model's goes by its place, "#group.number"."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [known.get(id(parameter), f"#{at}.{number}") for number, parameter in enumerate(group["params"])]
        for at, group in enumerate(optimizer.param_groups)
    ]


def state_by_name(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """`optimizer.state_dict()` with names in the places of numbers; tensors are not copied.

    What an optimizer keeps otherwise, beside or in place of these, stays as it is.
    """
    saved = optimizer.state_dict()
    if "state" not in saved or "param_groups" not in saved:
        return dict(saved)
    names = names_of(optimizer, model)
    of_number = _by_number(saved, names)
    groups = [{**group, "params": here} for group, here in zip(saved["param_groups"], names, strict=True)]
    state = {of_number.get(number, number): _taken_apart(value) for number, value in saved["state"].items()}
    return {**saved, "state": state, "param_groups": groups}


def load_by_name(optimizer: Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    """Take back what `state_by_name` gave. Raises CheckpointError where groups hold other parameters."""
    given = loadable(optimizer, model, saved)
    optimizer.load_state_dict(given)
    if given is saved:
        return
    for group, here in zip(optimizer.param_groups, given["param_groups"], strict=True):
        for parameter, number in zip(group["params"], here["params"], strict=True):
            _as_saved(optimizer.state.get(parameter), given["state"].get(number))


def _as_saved(now: Any, saved: Any) -> Any:
    """What was loaded, with the dtypes that were saved: torch gives all of a parameter's state the parameter's own, in
    silence, so that sums in float64 beside float32, or in float32 beside bfloat16, and whole numbers are others."""
    if type(now) is type(saved) is torch.Tensor:
        return now if now.dtype == saved.dtype else saved.to(now.device, copy=True)
    if isinstance(now, dict) and isinstance(saved, dict):
        now.update({key: _as_saved(now[key], value) for key, value in saved.items() if key in now})
    elif type(now) is type(saved) and type(now) in (list, tuple) and len(now) == len(saved):
        return type(now)(map(_as_saved, now, saved))
    return now


def loadable(optimizer: Optimizer, model: nn.Module, saved: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes of what `state_by_name` gave; nothing is touched. Raises CheckpointError
    where groups hold other parameters, or a parameter's state is none."""
    if "state" not in saved or "param_groups" not in saved:
        return saved
    names, live = names_of(optimizer, model), optimizer.state_dict()
    if [sorted(group["params"]) for group in saved["param_groups"]] != [sorted(here) for here in names]:
        raise CheckpointError("the optimizer's groups hold other parameters than those of the checkpoint")
    number_of = {name: number for number, name in _by_number(live, names).items()}
    _check_shapes(optimizer, names, saved["state"])
    groups = [
        {**group, "params": here["params"]}
        for group, here in zip(saved["param_groups"], live["param_groups"], strict=True)
    ]
    state = {number_of.get(name, name): _put_together(value, optimizer) for name, value in saved["state"].items()}
    return {**saved, "state": state, "param_groups": groups}


def _check_shapes(optimizer: Optimizer, names: list[list[str]], states: dict[Any, Any]) -> None:
    """Raise CheckpointError where a parameter's state is none, or not of its shape: torch takes it without a word."""
    kind = type(optimizer)
    alike = kind.__module__.startswith("torch.optim.") and kind.__name__ not in _OF_OTHER_SHAPES
    for group, here in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], here, strict=True):
            if name not in states:
                continue
            if not isinstance(states[name], dict):
                raise CheckpointError(f"the checkpoint holds no state of the optimizer for {name}")
            for key, value in states[name].items() if alike else ():
                if isinstance(value, torch.Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                    now, then = list(parameter.shape), list(value.shape)
                    raise CheckpointError(f"the optimizer's {key} of {name} has the shape {then}, and it is {now}")


_OF_OTHER_SHAPES = ("Adafactor", "LBFGS")
"""Of torch's optimizers, those that keep other things of a parameter than its like."""
_APART = frozenset({"tensor_class", "parts", "context", "size", "stride"})
"""The keys of a tensor of another class that was taken apart."""


def _taken_apart(value: Any) -> Any:
    """The same with tensors of other packages' classes (torchao's 8-bit states) as the plain ones that they consist of.

    They go by torch's own protocol for that, `__tensor_flatten__`.
    """
    if isinstance(value, dict):
        return {key: _taken_apart(one) for key, one in value.items()}
    if type(value) in (torch.Tensor, nn.Parameter) or not hasattr(value, "__tensor_flatten__"):
        return value
    names, context = value.__tensor_flatten__()
    return {
        "tensor_class": f"{type(value).__module__}:{type(value).__qualname__}",
        "parts": {name: getattr(value, name) for name in names},
        "context": _named_dtypes(context),
        "size": list(value.size()),
        "stride": list(value.stride()),
    }


def _put_together(value: Any, optimizer: Optimizer) -> Any:
    """The opposite; only of classes of the optimizer's own package, and nothing is imported for it."""
    if not isinstance(value, dict):
        return value
    if value.keys() != _APART:
        return {key: _put_together(one, optimizer) for key, one in value.items()}
    module, _, name = str(value["tensor_class"]).partition(":")
    kind = getattr(sys.modules.get(module), name, None)
    members = getattr(optimizer, "members", None)
    homes = [optimizer, *(members.values() if isinstance(members, dict) else ())]
    own = module.partition(".")[0] in {type(home).__module__.partition(".")[0] for home in homes}
    if not own or not (isinstance(kind, type) and issubclass(kind, torch.Tensor)):
        raise CheckpointError(
            f"the checkpoint holds a tensor of the class {module}.{name}, which is not the optimizer's"
        )
    make, context = kind.__tensor_unflatten__, _dtypes(value["context"])  # type: ignore[attr-defined]
    return make(value["parts"], context, torch.Size(value["size"]), tuple(value["stride"]))


def _named_dtypes(value: Any) -> Any:
    """What a class keeps beside its parts, with the names of dtypes."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return type(value)(map(_named_dtypes, value)) if type(value) in (list, tuple) else value


def _dtypes(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"dtype"}:
        found = getattr(torch, str(value["dtype"]), None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"the checkpoint holds the dtype {value['dtype']!r:.80}, which torch has not")
        return found
    return type(value)(map(_dtypes, value)) if type(value) in (list, tuple) else value


def _by_number(saved: dict[str, Any], names: list[list[str]]) -> dict[Any, str]:
    pairs = zip(saved["param_groups"], names, strict=True)
    return {number: name for group, here in pairs for number, name in zip(group["params"], here, strict=True)}


def signature(optimizer: Optimizer) -> dict[str, Any]:
    """What must not change between two lives of a run: class, and each group's size and hyperparameters."""
    groups = [
        {key: _plain(value) for key, value in group.items() if key not in ("params", "name")}
        | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "groups": groups}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else repr(value)
