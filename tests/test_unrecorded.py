"""Updates without torch's records promise what torch's own do: the same weights, hooks, subclasses and profiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from streamtrain.unrecorded import drop_gradients, make_update
from tests.engine import COLUMNS, network, same


def trained(made: Callable[[Any], Optimizer], update: Callable[[Optimizer], None], steps: int = 3) -> nn.Module:
    """A network after so many updates."""
    model = network()
    optimizer = made(model.parameters())
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(8, COLUMNS)).square().mean().backward()
        update(optimizer)
        optimizer.zero_grad()
    return model


def plain(optimizer: Optimizer) -> None:
    optimizer.step()


class Own(torch.optim.SGD):
    """Has a step of its own around its parent's."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] *= 0.5
        return super().step(closure)


@pytest.mark.parametrize("made", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Rprop, Own])
def test_the_weights_are_those_of_the_optimizers_own_step(made: Any) -> None:
    def build(parameters: Any) -> Optimizer:
        optimizer: Optimizer = made(parameters, lr=0.05)
        return optimizer

    assert same(trained(build, make_update), trained(build, plain))
    assert not same(trained(build, make_update), network())


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is recorded for profilers."""
    names: list[str] = []
    recorded = torch.autograd.profiler.record_function

    def record(name: str, *rest: Any) -> Any:
        names.append(name)
        return recorded(name, *rest)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", record)
    return names


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_nothing_is_recorded_while_no_profiler_runs(records: list[str]) -> None:
    def update(optimizer: Optimizer) -> None:
        make_update(optimizer)
        drop_gradients(optimizer, optimizer.param_groups[0]["params"])
        assert all(parameter.grad is None for parameter in optimizer.param_groups[0]["params"])
        assert records == []

    trained(sgd, update, steps=1)
    trained(sgd, plain, steps=1)  # as torch does it
    assert "Optimizer.step#SGD.step" in records


def test_a_profiler_sees_each_update() -> None:
    def update(optimizer: Optimizer) -> None:
        make_update(optimizer)
        drop_gradients(optimizer, optimizer.param_groups[0]["params"])

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trained(sgd, update, steps=4)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#SGD.step"] == 4
    assert counts["Optimizer.zero_grad#SGD.zero_grad"] == 2 * 4  # those of `trained`, too


def test_hooks_around_the_step_are_called() -> None:
    called: list[str] = []

    def hooked(parameters: Any) -> Optimizer:
        optimizer = sgd(parameters)
        optimizer.register_step_post_hook(lambda *_: called.append("post"))
        return optimizer

    trained(hooked, make_update, steps=2)
    assert called == ["post", "post"]

    def hooked_before(parameters: Any) -> Optimizer:
        optimizer = sgd(parameters)
        optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
        return optimizer

    trained(hooked_before, make_update, steps=1)
    assert called[2:] == ["pre"]


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_on_all_optimizers_are_called(register: Any) -> None:
    called: list[object] = []
    handle = register(lambda *_: called.append(None))
    try:
        trained(sgd, make_update, steps=2)
    finally:
        handle.remove()
    assert len(called) == 2


def test_a_step_that_was_put_into_an_optimizers_place_is_the_one_that_is_made() -> None:
    called: list[object] = []

    def replaced(parameters: Any) -> Optimizer:
        optimizer = sgd(parameters)
        own = optimizer.step

        def step(closure: Any = None) -> Any:
            called.append(None)
            return own(closure)

        optimizer.step = step  # type: ignore[method-assign]
        return optimizer

    assert same(trained(replaced, make_update, steps=2), trained(sgd, plain, steps=2))
    assert len(called) == 2


def test_a_step_that_a_class_got_after_its_optimizer_was_made_is_the_one_that_is_made() -> None:
    class Later(torch.optim.SGD):
        pass

    called: list[object] = []

    def made(parameters: Any) -> Optimizer:
        optimizer = Later(parameters, lr=0.1)
        Later.step = lambda self, closure=None: called.append(self)  # type: ignore[method-assign]
        return optimizer

    trained(made, make_update, steps=2)
    assert len(called) == 2


def test_a_step_that_says_that_it_is_its_parents_is_the_one_that_is_made() -> None:
    """`functools.wraps` copies the mark by which torch knows its own wrapper, and what that is around."""
    sgd(network().parameters())  # from now on torch's wrapper is around the class's step
    called: list[object] = []

    class Named(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            called.append(None)
            return super().step(closure)

    functools.update_wrapper(Named.step, torch.optim.SGD.step)
    trained(lambda parameters: Named(parameters, lr=0.1), make_update, steps=2)
    assert len(called) == 2


def test_a_wrapper_around_the_step_of_a_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    sgd(network().parameters())
    own: Any = torch.optim.SGD.step
    called: list[object] = []

    @functools.wraps(own)
    def step(*arguments: Any, **more: Any) -> Any:
        called.append(None)
        return own(*arguments, **more)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert same(trained(sgd, make_update, steps=2), trained(sgd, plain, steps=2))
    assert len(called) == 4


def test_what_a_subclass_does_after_each_step_is_done() -> None:
    called: list[object] = []

    class After(torch.optim.SGD):
        def _optimizer_step_code(self) -> None:
            called.append(None)

    trained(lambda parameters: After(parameters, lr=0.1), make_update, steps=2)
    assert len(called) == 2


def test_gradients_are_dropped_by_whom_an_optimizer_hands_that_to() -> None:
    """A wrapper that has another one's `zero_grad`: this drops the other's gradients, and none of its own."""
    model = network()
    (first, *_), held = list(model.parameters()), list(model.parameters())[1:]
    outer, inner = torch.optim.SGD([first], lr=0.1), torch.optim.SGD(held, lr=0.1)
    outer.zero_grad = inner.zero_grad  # type: ignore[method-assign]
    model(torch.randn(8, COLUMNS)).sum().backward()
    drop_gradients(outer, [first])
    assert first.grad is not None
    assert all(parameter.grad is None for parameter in held)
