"""A model has one fit at a time: a second one is refused before it changes anything, and whatever ends it frees it."""

from __future__ import annotations

import asyncio
import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain.errors import ConfigError, DataError
from streamtrain.trainer import Trainer
from streamtrain.under_training import training
from tests.engine import AtStep, Samples, bare_loop, network, pairs, same

SEED = 5
REFUSED = "another fit is training this very Sequential"


def trainer(model: nn.Module, **options: Any) -> Trainer:
    return Trainer(model, nn.MSELoss(), **{"seed": SEED, "device": "cpu", **options})


async def test_a_second_fit_of_the_same_model_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    """Nor is a copy of it refused, nor an evaluation beside it; and once the first has ended the second may begin."""
    model, refused, evaluated = network(dropout=0.0), list[BaseException](), list[dict[str, Any]]()
    other = trainer(model, run_dir=tmp_path / "other")
    beside = trainer(copy.deepcopy(model))
    done = asyncio.Event()

    async def try_all() -> None:
        with pytest.raises(ConfigError, match=REFUSED) as caught:
            await other.fit(Samples())
        refused.append(caught.value)
        assert not (tmp_path / "other").exists()
        await beside.fit(Samples())
        evaluated.append(await other.evaluate(Samples(24)))
        done.set()

    tries: list[asyncio.Task[None]] = []
    first = trainer(model, callbacks=[AtStep(3, lambda: tries.append(asyncio.create_task(try_all())))])
    stream = Samples()
    stream.gates[80] = done
    await first.fit(stream)
    assert len(refused) == len(evaluated) == 1
    expected = bare_loop(network(dropout=0.0), pairs(Samples(), 1), seed=SEED)
    assert same(model, expected)
    assert same(beside.model, expected)
    assert (await other.fit(Samples())).step == 13


class Holding(Samples):
    """No batch comes before the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gates[8] = asyncio.Event()


@pytest.mark.parametrize("end", ["cancelled", "failed", "refused", "stopped"])
async def test_whatever_ends_a_fit_its_model_is_free_again(end: str) -> None:
    model, stream = network(), Holding()
    began = asyncio.Event()
    first = trainer(model, callbacks=[AtStep(1, began.set)])
    if end == "failed":
        stream.gates.clear()
        stream.failures[8] = DataError("chunk 1")
    if end == "refused":
        with pytest.raises(ConfigError, match="needs a run_dir"):
            await first.fit(stream, resume="auto")
    else:
        task = asyncio.create_task(first.fit(stream))
        if end != "failed":
            await began.wait()
            (task.cancel if end == "cancelled" else first.stop)()
        await asyncio.wait([task])
        raised = None if task.cancelled() else task.exception()
        assert (task.cancelled(), raised is not None) == (end == "cancelled", end == "failed")
    assert (await trainer(model).fit(Samples(), max_steps=2)).step == 2


def test_fits_in_two_threads_know_of_each_other() -> None:
    model, refused = network(), list[str]()

    def second() -> None:
        try:
            trainer(model).fit_sync(Samples())
        except ConfigError as error:
            refused.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    with training(model):
        in_a_thread()
    assert len(refused) == 1
    in_a_thread()
    assert len(refused) == 1


def test_what_torch_compiled_is_the_model_that_it_was_made_of() -> None:
    model = network()
    compiled: Any = torch.compile(model, backend="eager")
    with training(model), pytest.raises(ConfigError, match=REFUSED), training(compiled):
        pass
