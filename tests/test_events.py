"""Events are facts: frozen, comparable, and each hook has one."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest

from streamtrain import events
from streamtrain.callbacks.base import HOOKS
from streamtrain.events import BatchEnd, Event, TrainBegin

KINDS = [
    kind for _, kind in inspect.getmembers(events, inspect.isclass) if issubclass(kind, Event) and kind is not Event
]


def test_each_hook_has_an_event() -> None:
    told = {(kind.__doc__ or "").split("`")[1] for kind in KINDS}
    assert told == set(HOOKS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_never_changes(kind: type[Event]) -> None:
    event = kind(step=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.step = 4  # type: ignore[misc]
    assert event == kind(step=3)
    assert event != kind(step=4)


def test_the_mean_loss_weighs_by_samples() -> None:
    assert BatchEnd(loss_sum=6.0, batch_samples=4).loss == 1.5
    assert math.isnan(BatchEnd().loss)


async def test_a_function_runs_on_the_train_thread_only_while_there_is_one() -> None:
    async def runner(fn: Any) -> Any:
        return fn("model", "optimizer")

    assert await TrainBegin(runner=runner).on_train_thread(lambda model, optimizer: (model, optimizer)) == (
        "model",
        "optimizer",
    )
    with pytest.raises(RuntimeError, match="does not come from a running fit"):
        await TrainBegin().on_train_thread(lambda model, optimizer: None)
