"""Optimizers: torch's own, in the right groups, with the fastest kernel, or an error with the nearest name."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.learning_rate import get_lr
from streamtrain.optimizer_state import load_by_name, signature, state_by_name
from streamtrain.optimizers import FUSED, NAMES, build_optimizer, check_lr
from streamtrain.parameter_groups import layers, table
from streamtrain.several_optimizers import build_optimizers
from streamtrain.state import decode, encode

MUONS = ["muon"] if hasattr(torch.optim, "Muon") else []
"""torch has it since 2.9."""
with_muon = pytest.mark.skipif(not MUONS, reason="this torch has no Muon")


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    made[2].bias.requires_grad_(False)
    return made


class Whole(torch.optim.SGD):
    """It wants a model, and does not say so."""

    def __init__(self, net: Any, lr: float = 0.1) -> None:
        super().__init__(net.parameters(), lr=lr)


def names(of: nn.Module, group: dict[str, Any]) -> list[str]:
    by_id = {id(parameter): name for name, parameter in of.named_parameters()}
    return [by_id[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "muon" or MUONS])
def test_every_name_is_torchs_optimizer(name: str) -> None:
    of = model()
    made = build_optimizer(of, name.upper(), lr=0.01)
    assert type(made) is NAMES[name]
    assert made.param_groups[0]["lr"] == 0.01
    held = [sorted(names(of, group)) for group in made.param_groups]
    together = [["0.bias", "0.weight", "1.bias", "1.weight", "2.weight"]]
    assert held == ([["0.weight", "2.weight"], ["0.bias", "1.bias", "1.weight"]] if name == "muon" else together)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(FUSED))
def test_weights_of_16_bits_are_trained(name: str, dtype: torch.dtype) -> None:
    """torch's fused SGD left them as they were, and made their momentum of what lay in memory."""
    one, other = (nn.ParameterList([torch.linspace(-1, 1, 1000, dtype=kind)]) for kind in (dtype, torch.float64))
    pair = build_optimizer(one, name, lr=0.05), build_optimizer(other, {"name": name, "fused": False}, lr=0.05)
    for _ in range(10):
        for of, optimizer in zip((one, other), pair, strict=True):
            optimizer.zero_grad()
            (of[0] * torch.linspace(1, 2, 1000, dtype=of[0].dtype)).sum().backward()
            optimizer.step()
    torch.testing.assert_close(one[0].double(), other[0], rtol=0.05, atol=0.05)
    with pytest.raises(ConfigError, match="fused SGD does not update weights of 16 bits"):
        build_optimizer(one, {"name": "momentum", "fused": True})


@pytest.mark.parametrize("name", [*sorted(FUSED), *MUONS])
def test_parameters_with_gaps_are_updated_and_their_neighbours_are_not(name: str) -> None:
    """torch's fused kernels take them for dense: they trained them wrongly, and wrote to what lies between."""
    of, memory = nn.ParameterDict(), torch.ones(8)
    of["gaps"], of["plain"] = nn.Parameter(memory[::2]), nn.Parameter(torch.ones(4))
    optimizer = build_optimizer(of, name, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in of.values()).backward()
        optimizer.step()
    assert torch.equal(of["gaps"], of["plain"])
    assert not torch.equal(of["gaps"], torch.ones(4))
    assert torch.equal(memory[1::2], torch.ones(4))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 5)])
def test_transposed_parameters_have_the_fused_kernel_too(shape: tuple[int, ...]) -> None:
    of = nn.ParameterList(
        [
            nn.Parameter(torch.ones(shape).transpose(0, -1)),
            nn.Parameter(torch.ones(8, 4)[:1]),
            nn.Parameter(torch.ones(3, 0)),
        ]
    )
    assert build_optimizer(of).param_groups[0]["fused"]


@pytest.mark.parametrize("choice", [{"foreach": True}, {"fused": False}])
def test_a_choice_of_kernel_is_kept(choice: dict[str, bool]) -> None:
    made = build_optimizer(model(), {"name": "adam", **choice})
    assert not made.param_groups[0]["fused"]


@pytest.mark.parametrize(("name", "momentum", "nesterov"), [("momentum", 0.9, False), ("nesterov", 0.9, True)])
def test_momentum_and_nesterov_are_sgds(name: str, momentum: float, nesterov: bool) -> None:
    group = build_optimizer(model(), name).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (momentum, nesterov)
    assert build_optimizer(model(), {"name": name, "momentum": 0.5}).param_groups[0]["momentum"] == 0.5


def trained(of: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 4) -> nn.Module:
    torch.manual_seed(1)
    for _ in range(steps):
        of(torch.randn(8, 3)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return of


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)


def twins() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    one = model()
    return one, copy.deepcopy(one)


@with_muon
def test_muon_is_torchs_on_matrices_and_adamw_on_all_else_to_the_bit() -> None:
    one, other = twins()
    made = build_optimizer(
        one, {"name": "muon", "lr": 0.02, "momentum": 0.9, "adamw": {"lr": 0.01, "betas": [0.8, 0.9]}}
    )
    matrices = [parameter for parameter in other.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in other.parameters() if parameter.ndim != 2 and parameter.requires_grad]
    plain = torch.optim.Muon(matrices, lr=0.02, momentum=0.9), torch.optim.AdamW(rest, 0.01, (0.8, 0.9), fused=True)
    assert equal(trained(one, made), trained(other, *plain))


@with_muon
def test_muon_goes_through_a_checkpoint_with_one_state_and_its_groups() -> None:
    one, other = twins()
    first, second = (build_optimizer(of, "muon") for of in (one, other))
    trained(one, first, steps=2)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert len(second.state) == 5
    for of, optimizer in ((one, first), (other, second)):
        optimizer.param_groups[0]["lr"] *= 0.5
        trained(of, optimizer, steps=3)
    assert equal(one, other)


@with_muon
def test_embeddings_and_what_a_rule_says_are_no_matrices_to_muon() -> None:
    of = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 2, bias=False))
    made = build_optimizer(
        of, {"name": "muon", "rules": [("^2", {"muon": False, "weight_decay": 0.5, "betas": [0.5, 0.9]})]}
    )
    held = {group["name"]: (names(of, group), group["muon"], group["weight_decay"]) for group in made.param_groups}
    assert held == {
        "Muon": (["1.weight"], True, 0.1),
        "AdamW": (["0.weight", "1.bias"], False, 0.01),
        "rule '^2', AdamW": (["2.weight"], False, 0.5),
    }


@with_muon
def test_complex_matrices_are_none_to_muon() -> None:
    of = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, dtype=torch.complex64))
    for rules in ((), [("1.weight", {"muon": True})]):
        groups = build_optimizer(of, {"name": "muon", "rules": rules}).param_groups
        assert [names(of, group) for group in groups if group["muon"]] == [["0.weight"]]


@with_muon
def test_a_group_that_is_added_to_muon_is_updated_too() -> None:
    of = nn.Linear(3, 3)
    made = build_optimizer(of, "muon")
    late = nn.Parameter(torch.ones(2))
    made.add_param_group({"params": [late]})
    late.grad = torch.ones(2)
    made.step()
    assert (late < 1).all()


def test_where_torch_has_no_muon_it_says_since_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match=r"'muon' needs torch 2\.9 or later, and this is"):
        build_optimizer(model(), "muon")


def test_biases_and_norms_are_left_out_of_the_decay() -> None:
    of = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((2, 4)), nn.Linear(4, 1))
    made = build_optimizer(of, {"name": "adamw", "weight_decay": 0.1, "no_decay": True})
    assert [(names(of, group), group["weight_decay"]) for group in made.param_groups] == [
        (["0.weight", "2.weight"], 0.1),
        (["0.bias", "1.weight", "1.bias", "2.bias"], 0.0),
    ]
    made = build_optimizer(of, {"name": "adamw", "weight_decay": 0.1, "no_decay": ["^1", "2.bias"]})
    assert [names(of, group) for group in made.param_groups][1] == ["1.weight", "1.bias", "2.bias"]
    rules = [("^1", {"weight_decay": 0.3}), ("^2", {"lr": 0.5})]
    made = build_optimizer(of, {"name": "adamw", "no_decay": True, "rules": rules})
    decays = {name: group["weight_decay"] for group in made.param_groups for name in names(of, group)}
    assert decays["1.weight"] == 0.3  # a rule's own wins
    assert (decays["2.weight"], decays["2.bias"]) == (0.01, 0.0)


def vit_names(blocks: int) -> list[str]:
    of_block = [f"blocks.{n}.{part}" for n in range(blocks) for part in ("attn.weight", "mlp.0.weight", "mlp.2.bias")]
    return ["cls_token", "pos_embed", "patch_embed.weight", *of_block, "norm.weight", "head.weight"]


def test_layers_of_a_transformer_are_numbered_as_in_beit() -> None:
    found = layers(vit_names(3))
    assert [found[name] for name in ("cls_token", "pos_embed", "patch_embed.weight")] == [0, 0, 0]
    assert [found[f"blocks.{n}.mlp.2.bias"] for n in range(3)] == [1, 2, 3]
    assert [found[name] for name in ("norm.weight", "head.weight")] == [4, 4]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["0.weight", "0.bias", "2.weight"], [0, 0, 1]),
        (["conv1.w", "layer1.0.w", "layer1.1.w", "layer2.0.w", "fc.w"], [0, 1, 2, 3, 4]),
        (["fc1.w", "fc1.b", "fc2.w", "fc3.w"], [0, 0, 1, 2]),
        (["net.fc1.w", "net.fc2.w"], [0, 1]),
        (["a", "b"], [0, 1]),
        (["enc.0.w", "bridge.w", "dec.0.w"], [0, 0, 1]),
        (["weight"], [0]),
    ],
)
def test_layers_go_by_the_first_number_and_the_order(given: list[str], expected: list[int]) -> None:
    assert list(layers(given).values()) == expected


@pytest.mark.parametrize("no_decay", [False, True])
@pytest.mark.parametrize(
    "spec",
    [{"name": "adamw", "layer_decay": 0.5}, *({"name": name, "adamw": {"lr": 1e-4}} for name in MUONS)],
    ids=str,
)
def test_the_first_groups_rate_which_is_the_runs_is_the_given_one(spec: dict[str, Any], no_decay: bool) -> None:
    """It is what the log tells, and what `set_lr` brings to its value: as that of the first of twelve layers it would
    give the last one a rate of another size."""
    optimizer = build_optimizer(model(), {**spec, "no_decay": no_decay}, lr=0.02)
    assert get_lr(optimizer) == 0.02
    assert len({group["lr"] for group in optimizer.param_groups}) > 1


def test_the_rate_of_each_layer_is_that_of_the_next_one_times_the_decay() -> None:
    of = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    made = build_optimizer(of, {"name": "sgd", "layer_decay": 0.5, "rules": [(r"1\.bias", {"lr": 0.1})]}, lr=1.0)
    rates = {name: group["lr"] for group in made.param_groups for name in names(of, group)}
    assert rates == {**{f"{n}.{part}": 0.5 ** (2 - n) for n in range(3) for part in ("weight", "bias")}, "1.bias": 0.05}


def test_tied_parameters_are_counted_once_and_go_by_each_of_their_names() -> None:
    of = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    of["head"].weight = of["embed"].weight
    made = build_optimizer(of, {"name": "adamw", "rules": [("head", {"lr": 0.5})]})
    assert [len(group["params"]) for group in made.param_groups] == [1]
    assert made.param_groups[0]["lr"] == 0.5


@given(st.data())
def test_each_parameter_is_in_one_group_by_its_first_rule(data: st.DataObject) -> None:
    of = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 1))
    patterns = data.draw(st.lists(st.sampled_from(["weight", "bias", "^0", "^1", r"2\.", "3", "^.*$"]), max_size=4))
    keys = {"no_decay": data.draw(st.booleans()), "layer_decay": data.draw(st.sampled_from([None, 0.5, 1.0]))}
    rules = [(pattern, {"eps": 10.0 ** -(at + 1)}) for at, pattern in enumerate(patterns)]
    firsts = {
        name: next((at for at, pattern in enumerate(patterns) if re.search(pattern, name)), -1)
        for name, _ in of.named_parameters()
    }
    spec = {"name": "adam", "rules": rules, **{key: value for key, value in keys.items() if value is not None}}
    if not set(range(len(patterns))) <= set(firsts.values()):
        with pytest.raises(ConfigError, match="names no parameter"):
            build_optimizer(of, spec)
        return
    made = build_optimizer(of, spec)
    held = [name for group in made.param_groups for name in names(of, group)]
    assert sorted(held) == sorted(firsts)
    for group in made.param_groups:
        assert {firsts[name] for name in names(of, group)} == {
            round(-math.log10(group["eps"])) - 1 if group["eps"] > 1e-8 else -1
        }


def test_the_table_tells_of_each_group() -> None:
    of = model()
    made = build_optimizer(of, {"name": "adamw", "no_decay": True})
    assert list(table(made)) == [
        "optimizer AdamW, fused",
        "  group 0 (all others): 2 parameters, 16 elements, lr 0.001, weight decay 0.01",
        "  group 1 (no decay): 3 parameters, 12 elements, lr 0.001, weight decay 0",
    ]


class Foreign(torch.optim.SGD):
    """An optimizer of another package, with a keyword of its own."""

    def __init__(self, params: Any, lr: float = 0.1, *, warmth: Any = None, weight_decay: float = 0.0) -> None:
        self.warmth = warmth
        super().__init__(params, lr=lr, weight_decay=weight_decay)


@pytest.mark.parametrize("name", ["tests.test_optimizers.Foreign", "tests.test_optimizers:Foreign", Foreign])
def test_an_optimizer_of_another_package_takes_rules_and_its_keywords(name: Any) -> None:
    of = model()
    spec = {"name": name, "warmth": "much", "rules": [("bias", {"lr": 0.5})], "no_decay": True, "weight_decay": 0.1}
    made = build_optimizer(of, spec, lr=0.01)
    assert type(made).__name__ == "Foreign"
    assert made.warmth == "much"  # type: ignore[attr-defined]
    assert [(group["lr"], group["weight_decay"]) for group in made.param_groups] == [
        (0.01, 0.1),
        (0.01, 0.0),
        (0.5, 0.0),
    ]
    assert build_optimizer(of, name, lr=0.02).param_groups[0]["lr"] == 0.02
    with pytest.raises(ConfigError, match="unknown key 'wormth'") as caught:
        build_optimizer(of, {"name": name, "wormth": 3})
    assert caught.value.hint == "Did you mean 'warmth'?"


def test_a_callable_is_given_what_its_table_says() -> None:
    def make(parameters: Any, lr: float, momentum: float = 0.0) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)

    made = build_optimizer(model(), {"name": make, "momentum": 0.5}, lr=0.3)
    assert [made.param_groups[0][key] for key in ("lr", "momentum")] == [0.3, 0.5]
    with pytest.raises(ConfigError, match="unknown key 'lr'"):
        build_optimizer(model(), {"name": by_model, "lr": 0.3})
    with pytest.raises(ConfigError, match="is given the model, and groups its parameters itself"):
        build_optimizer(model(), {"name": by_model, "layer_decay": 0.5})


def test_the_state_finds_its_parameter_whatever_their_order_is() -> None:
    class Ordered(nn.Module):
        def __init__(self, *order: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = {name: nn.Linear(3, 3) for name in ("a", "b", "c")}
            for name in order:
                self.add_module(name, layers[name])

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.get_submodule("c")(self.get_submodule("b")(self.get_submodule("a")(inputs)))

    for spec in ("adamw", *MUONS, {"name": "adam", "rules": [("bias", {"lr": 0.5})]}):
        one, other = Ordered("a", "b", "c"), Ordered("c", "a", "b")
        first, second = build_optimizer(one, spec), build_optimizer(other, spec)
        trained(one, first)
        other.load_state_dict(one.state_dict())
        json_like, tensors = encode(state_by_name(first, one))
        load_by_name(
            second, other, decode(json.loads(json.dumps(json_like)), {k: v.clone() for k, v in tensors.items()})
        )
        assert equal(trained(one, first), trained(other, second))


class Sums(torch.optim.Optimizer):
    """Keeps what is not of its parameters' dtype: finer sums, counts, a mask, and those of before in a list."""

    def __init__(self, parameters: Any, finer: torch.dtype) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.finer = finer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            state, gradient = self.state[parameter], parameter.grad.to(self.finer)
            if not state:
                state["sums"] = {"all": torch.zeros_like(gradient)}
                state["count"], state["above"] = torch.tensor(0), gradient > 0
                state["before"] = [gradient.clone(), (gradient.clone(),)]
            state["sums"]["all"].mul_(0.9).add_(gradient)
            state["count"] += 1
            state["above"] |= state["before"][0] > gradient
            state["before"] = [state["before"][1][0].clone(), (gradient.clone(),)]
            sums = torch.where(state["above"], state["sums"]["all"], state["before"][0]) / state["count"]
            parameter.sub_((0.01 * sums).to(parameter.dtype))


@pytest.mark.parametrize(
    ("own", "finer"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=lambda d: str(d)[6:]
)
def test_a_state_that_is_not_of_its_parameters_dtype_is_taken_up_as_it_was(
    own: torch.dtype, finer: torch.dtype
) -> None:
    def trained(on: nn.Module, optimizer: Any) -> list[Any]:
        for number in range(1, 4):
            for parameter in on.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.grad = noise.to(own)
            optimizer.step()
        states = [value for each in state_by_name(optimizer, on)["state"].values() for value in encode(each)[1].items()]
        return [*on.state_dict().values(), *(value for pair in states for value in pair)]

    one, other = (nn.Linear(3, 4).to(own) for _ in range(2))
    first, second = Sums(one.parameters(), finer), Sums(other.parameters(), finer)
    trained(one, first)
    other.load_state_dict(one.state_dict())
    json_like, tensors = encode(state_by_name(first, one))
    load_by_name(second, other, decode(json_like, {name: tensor.clone() for name, tensor in tensors.items()}))
    for mine, theirs in zip(trained(one, first), trained(other, second), strict=True):
        assert (
            mine == theirs if isinstance(mine, str) else (mine.dtype, mine.tolist()) == (theirs.dtype, theirs.tolist())
        )


class Halves(torch.Tensor):
    """A tensor that consists of others, as the states of low-precision optimizers do."""

    @staticmethod
    def __new__(cls, half: torch.Tensor, kind: torch.dtype) -> Halves:
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=kind)

    def __init__(self, half: torch.Tensor, kind: torch.dtype) -> None:
        self.half_of = half

    def __tensor_flatten__(self) -> tuple[list[str], list[Any]]:
        return ["half_of"], [self.dtype]

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, torch.Tensor], context: list[Any], size: Any, stride: Any) -> Halves:
        return cls(parts["half_of"], *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"nobody computes with it: {func}")


def test_states_that_are_tensors_of_the_optimizers_own_package_are_kept() -> None:
    of = nn.Linear(2, 2)
    optimizer = Foreign(of.parameters())
    optimizer.state[of.weight] = {"mean": Halves(torch.arange(4.0).reshape(2, 2), torch.float32), "step": 3}
    json_like, tensors = encode(state_by_name(optimizer, of))
    other = Foreign(of.parameters())
    load_by_name(other, of, decode(json.loads(json.dumps(json_like)), tensors))
    mean = other.state[of.weight]["mean"]
    assert type(mean) is Halves
    assert (mean.dtype, mean.half_of.tolist()) == (torch.float32, [[0.0, 1.0], [2.0, 3.0]])
    saved = state_by_name(optimizer, of)
    for name in ("os:system", "subprocess:Popen", "tests.test_optimizers:Foreign", "tests.nowhere:Halves"):
        saved["state"]["weight"]["mean"]["tensor_class"] = name
        with pytest.raises(CheckpointError, match="which is not the optimizer's"):
            load_by_name(other, of, saved)


def test_a_state_of_other_parameters_is_refused() -> None:
    one, other = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))
    saved = state_by_name(build_optimizer(one), one)
    with pytest.raises(CheckpointError, match="hold other parameters"):
        load_by_name(build_optimizer(other), other, saved)


class Master(torch.optim.Optimizer):
    """Keeps weights of bfloat16 in float32 as well, beside a mask, a count and a list."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"master": parameter.float(), "mask": parameter > 0, "count": torch.tensor(0)}
                    state["more"] = {"list": [torch.zeros(3, dtype=torch.float64)]}
                state["count"] += 1
                state["more"]["list"][0] += 0.1
                state["master"] -= group["lr"] * parameter.grad.float() * state["mask"]
                parameter.copy_(state["master"])


@pytest.mark.parametrize("spec", [Master, "nadam", "asgd", {"0": {"name": Master}, "1": "nadam", "2": "asgd"}])
def test_a_state_has_its_own_dtypes_again(spec: Any) -> None:
    """torch casts all of it to the parameter's: the master copies of a run with weights in bfloat16 were lost."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        of = model().bfloat16()
        return of, (build_optimizers(of, spec, 1e-3) if isinstance(spec, dict) else build_optimizer(of, spec))

    def trained(of: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        of(torch.arange(12.0).reshape(4, 3).sin().bfloat16()).square().sum().backward()
        for one in getattr(optimizer, "members", {"": optimizer}).values():
            one.step()

    (one, first), (other, second) = made(), made()
    for _ in range(3):
        trained(one, first)
    json_like, tensors = encode(state_by_name(first, one))
    other.load_state_dict(one.state_dict())
    load_by_name(second, other, decode(json_like, {name: tensor.clone() for name, tensor in tensors.items()}))
    for _ in range(2):
        assert same_tree(state_by_name(first, one), state_by_name(second, other))
        trained(one, first)
        trained(other, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def same_tree(one: Any, other: Any) -> bool:
    """Whether all tensors have the same dtypes and values."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tree(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_tree, one, other))
    return bool(one == other)


def test_a_parameter_that_is_not_the_models_goes_by_its_place() -> None:
    one = nn.Linear(2, 2)
    weights = nn.Parameter(torch.ones(3))
    groups: list[dict[str, Any]] = [{"params": one.parameters()}, {"params": [weights]}]
    optimizer = torch.optim.Adam(groups)
    weights.grad = torch.ones(3)
    optimizer.step()
    saved = state_by_name(optimizer, one)
    assert saved["param_groups"][1]["params"] == ["#1.0"]
    assert list(saved["state"]) == ["#1.0"]


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
        ({"lr": 0.1}, "optimizer has no name", "Give {'name': 'adamw', ...}"),
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
        (
            Whole,
            "optimizer 'Whole': AttributeError: 'list' object has no attribute",
            "One that is made in another way",
        ),
        (lambda parameters: 3, "gave a int, not a torch Optimizer", ""),
        (
            {"name": "sgd", "rules": [("weight", {}), (r"0\.weight", {})]},
            "names no parameter that the rules before it",
            "",
        ),
        ({"name": "sgd", "rules": [("weight", {"lr": -1})]}, "rules[0].lr must be a finite number", ""),
        ({"name": "sgd", "layer_decay": 2}, "layer_decay must be a number above 0 and up to 1, not 2", ""),
        (
            {"name": "sgd", "no_decay": "bias"},
            "no_decay must be true, false or a list of regexes, not 'bias'",
            "true: ",
        ),
        ({"name": "sgd", "no_decay": ["bais"]}, "no_decay[0]: 'bais' names no parameter", "names: "),
        ({"name": "rprop", "no_decay": True}, "no_decay: rprop has no weight decay", ""),
        ({"name": "muon", "adamw": 3}, "optimizer.adamw must be a table", ""),
        ({"name": "muon", "adamw": {"beta": 3}}, "optimizer.adamw: unknown key 'beta'", "Did you mean 'betas'?"),
        ({"name": "muon", "rules": [("bias", {"muon": 3})]}, "rules[0].muon must be true or false", ""),
        ({"name": "adafactor", "eps": ["x", 1]}, "eps must be 2 numbers", ""),
        ("torch.optim.Adamm", "module torch.optim has no Adamm", "Did you mean Adam?"),
        ("torch.optim.LBFGS", "LBFGS can't make a step without closure", "Here a batch has one gradient"),
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


def test_a_class_that_asks_for_the_model_is_given_it() -> None:
    class OfModel(torch.optim.SGD):
        def __init__(self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
            super().__init__(model.named_parameters(), lr=lr, weight_decay=weight_decay)

    made = build_optimizer(of := model(), {"name": OfModel, "weight_decay": 0.5}, lr=0.25)
    assert isinstance(made, OfModel)
    assert (made.param_groups[0]["lr"], made.param_groups[0]["weight_decay"]) == (0.25, 0.5)
    assert len(made.param_groups[0]["params"]) == len(list(of.parameters()))
    with pytest.raises(ConfigError, match="OfModel is given the model, and groups its parameters itself"):
        build_optimizer(of, {"name": OfModel, "no_decay": True})


def test_an_optimizer_without_a_rate_is_refused_with_what_to_do() -> None:
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"most": 1.0})

        def step(self, closure: Any = None) -> Any: ...

    with pytest.raises(ConfigError, match="Rateless has no 'lr' in its groups") as told:
        build_optimizer(model(), Rateless)
    assert "group.setdefault('lr', 1.0)" in told.value.hint
