"""Optimizers: torch's own, in the right groups, with the fastest kernel, or an error with the nearest name."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain.errors import ConfigError
from streamtrain.optimizers import FUSED, NAMES, build_optimizer, check_lr, signature


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    made[2].bias.requires_grad_(False)
    return made


def names(of: nn.Module, group: dict[str, Any]) -> list[str]:
    by_id = {id(parameter): name for name, parameter in of.named_parameters()}
    return [by_id[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_torchs_optimizer(name: str) -> None:
    of = model()
    made = build_optimizer(of, name.upper(), lr=0.01)
    assert type(made) is NAMES[name]
    assert made.param_groups[0]["lr"] == 0.01
    assert names(of, made.param_groups[0]) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]
    assert bool(made.param_groups[0].get("fused")) == (name in FUSED)


@pytest.mark.parametrize("name", sorted(FUSED))
def test_the_fused_kernel_trains_as_the_plain_one(name: str) -> None:
    torch.manual_seed(0)
    one = model()
    other = model()
    other.load_state_dict(one.state_dict())
    pair = [(one, build_optimizer(one, name)), (other, build_optimizer(other, {"name": name, "fused": False}))]
    inputs = torch.randn(8, 3)
    for of, optimizer in pair:
        for _ in range(3):
            optimizer.zero_grad()
            of(inputs).square().sum().backward()
            optimizer.step()
    for mine, plain in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("choice", [{"foreach": True}, {"fused": False}])
def test_a_choice_of_kernel_is_kept(choice: dict[str, bool]) -> None:
    made = build_optimizer(model(), {"name": "adam", **choice})
    assert not made.param_groups[0]["fused"]


def test_torchs_keywords_are_passed_on_and_lists_become_tuples() -> None:
    made = build_optimizer(model(), {"name": "sgd", "momentum": 0.9, "nesterov": True, "lr": 0.5})
    assert [made.param_groups[0][key] for key in ("momentum", "nesterov", "lr")] == [0.9, True, 0.5]
    assert build_optimizer(model(), {"name": "adam", "betas": [0.8, 0.9]}).param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": 3}, "optimizer.betas must be 2 numbers, got 3"),
        ({"betas": [0.9]}, r"optimizer.betas must be 2 numbers, got \(0.9,\)"),
        ({"betas": "x"}, "optimizer.betas must be 2 numbers, got 'x'"),
        ({"eps": "x"}, "optimizer.eps must be a number, got 'x'"),
        ({"weight_decay": True}, "optimizer.weight_decay must be a number, got True"),
        ({"amsgrad": 1}, "optimizer.amsgrad must be true or false, got 1"),
        ({"fused": "yes"}, "optimizer.fused must be true or false, got 'yes'"),
        ({"rules": [("bias", {"betas": 3})]}, r"optimizer.rules\[0\].betas must be 2 numbers, got 3"),
    ],
)
def test_an_option_of_another_kind_is_refused_in_words_about_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_optimizer(model(), {"name": "adamw", **options})
    assert caught.value.hint


def test_a_parameter_follows_the_first_rule_that_names_it() -> None:
    of = model()
    rules = [(r"bias$|^1\.", {"weight_decay": 0.0}), ["weight", {"lr": 0.5}]]
    made = build_optimizer(of, {"name": "adamw", "weight_decay": 0.1, "rules": rules[:1]}, lr=0.01)
    assert [names(of, group) for group in made.param_groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias"],
    ]
    assert [(group["weight_decay"], group["lr"]) for group in made.param_groups] == [(0.1, 0.01), (0.0, 0.01)]
    made = build_optimizer(of, {"name": "adamw", "rules": rules}, lr=0.01)
    assert [names(of, group) for group in made.param_groups] == [
        ["0.bias", "1.weight", "1.bias"],
        ["0.weight", "2.weight"],
    ]
    assert [group["lr"] for group in made.param_groups] == [0.01, 0.5]


def by_model(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.25)


def by_parameters(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    assert all(parameter.requires_grad for parameter in parameters)
    return torch.optim.SGD(parameters, lr=0.25)


@pytest.mark.parametrize(
    ("spec", "lr"),
    [
        (by_model, 0.25),
        (by_parameters, 0.25),
        (torch.optim.SGD, 0.01),
        (functools.partial(torch.optim.SGD, lr=0.75), 0.75),
        (lambda module: by_model(module), 0.25),
    ],
)
def test_callables_get_what_they_ask_for(spec: Any, lr: float) -> None:
    assert build_optimizer(model(), spec, lr=0.01).param_groups[0]["lr"] == lr


def test_an_object_is_used_as_it_is_if_it_is_of_this_model() -> None:
    of = model()
    made = by_model(of)
    assert build_optimizer(of, made) is made
    with pytest.raises(ConfigError, match="holds no parameter of this model"):
        build_optimizer(model(), made)


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("adamv", "unknown name 'adamv'", "Did you mean 'adam"),
        ("xyz", "unknown name 'xyz'", "Known: sgd"),
        ({"lr": 0.1}, "unknown name", "Known: sgd"),
        (3, "unknown name 3", "Known: sgd"),
        ({"name": "sgd", "momentun": 0.9}, "unknown key 'momentun'", "Did you mean 'momentum'?"),
        ({"name": "sgd", "params": []}, "unknown key 'params'", "Known: "),
        ({"name": "sgd", "momentum": -1}, "Invalid momentum", ""),
        ({"name": "sgd", "nesterov": True}, "Nesterov momentum requires", ""),
        ({"name": "sgd", "lr": "fast"}, "optimizer.lr must be a finite number", ""),
        ({"name": "sgd", "rules": [("(", {})]}, "rules[0]: '(' is no regular expression", ""),
        ({"name": "sgd", "rules": ["weight"]}, "rules[0] must be (regex, {option: value})", ""),
        ({"name": "sgd", "rules": [("weight", {}), ("wait", {})]}, "rules[1]: 'wait' names no parameter", "names: 0."),
        ({"name": "sgd", "rules": [("weight", {"lrr": 1})]}, "rules[0]: unknown key 'lrr'", "Did you mean 'lr'?"),
        (lambda parameters: 3, "gave a int, not a torch Optimizer", ""),
    ],
)
def test_what_cannot_work_is_refused(spec: Any, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(model(), spec)
    assert message in str(caught.value)
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1, "0.1", True, None])
def test_a_rate_must_be_a_number(lr: Any) -> None:
    with pytest.raises(ConfigError, match="lr must be a finite number, at least 0, not"):
        check_lr(lr)
    with pytest.raises(ConfigError):
        build_optimizer(model(), "adamw", lr=lr)


def test_a_model_without_gradients_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no parameter that requires a gradient"):
        build_optimizer(nn.Linear(1, 1).requires_grad_(False))


def test_a_signature_tells_what_must_not_change() -> None:
    def of(spec: Any) -> Any:
        return json.loads(json.dumps(signature(build_optimizer(model(), spec))))

    assert of("adamw") == of({"name": "adamw"})
    changed = ["adam", {"name": "adamw", "betas": [0.8, 0.9]}, {"name": "adamw", "rules": [("bias", {})]}]
    assert all(of(spec) != of("adamw") for spec in changed)
    assert of("adamw")["groups"][0]["fused"] is True
    assert of("adamw")["groups"][0]["parameters"] == 5
