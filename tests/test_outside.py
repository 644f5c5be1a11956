"""Outside of a fit: a call leaves nothing behind however it ends, and keeps out of a fit that has begun."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from torch import nn

from streamtrain import checkpoint
from streamtrain.data.predicted import PredictedStore
from streamtrain.errors import ConfigError
from streamtrain.run_folder import RunFolder
from streamtrain.trainer import Trainer
from tests.engine import Samples, network, same


class Slow:
    """A call that has begun, and goes on once the gate is open."""

    def __init__(self, call: Any) -> None:
        self.call, self.gate = call, threading.Event()
        self.loop, self.entered = asyncio.get_running_loop(), asyncio.Event()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.loop.call_soon_threadsafe(self.entered.set)
        self.gate.wait(60)
        return self.call(*arguments, **named)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def fitted(tmp_path: Path) -> Iterator[Trainer]:
    """A trainer whose folder is free at the end."""
    yield Trainer(network(), nn.MSELoss(), seed=5, device="cpu", run_dir=tmp_path)
    with RunFolder(tmp_path):
        pass


async def test_a_save_in_a_cancelled_scope_gives_the_folder_free(
    fitted: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(checkpoint.commit)
    monkeypatch.setattr(checkpoint, "commit", slow)
    async with anyio.create_task_group() as group:
        group.start_soon(fitted.save_checkpoint)
        await slow.entered.wait()
        asyncio.get_running_loop().call_later(0.05, slow.gate.set)
        group.cancel_scope.cancel()


@pytest.mark.parametrize("times", [1, 4], ids=["once", "again and again"])
@pytest.mark.parametrize("where", ["lock", "commit"])
async def test_a_save_that_is_cancelled_gives_the_folder_free(
    fitted: Trainer, where: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(RunFolder.lock if where == "lock" else checkpoint.commit)
    if where == "lock":
        monkeypatch.setattr(RunFolder, "lock", lambda folder: slow(folder))
    else:
        monkeypatch.setattr(checkpoint, "commit", slow)
    saving = asyncio.create_task(fitted.save_checkpoint())
    await slow.entered.wait()
    for _ in range(times):
        saving.cancel()
        await asyncio.sleep(0)
    slow.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await saving


@pytest.mark.parametrize("call", ["load_checkpoint", "load_weights"])
async def test_what_is_read_while_a_fit_begins_is_not_put_into_its_model(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, undisturbed = (Trainer(network(), nn.MSELoss(), seed=5, device="cpu") for _ in range(2))
    other = Trainer(network(), nn.MSELoss(), device="cpu")
    await other.fit(Samples(), max_steps=3)
    path = await other.save_checkpoint(tmp_path / "other")
    slow = Slow(checkpoint.read)
    monkeypatch.setattr(checkpoint, "read", slow)
    loading = asyncio.create_task(getattr(fitted, call)(path))
    await slow.entered.wait()
    fit = asyncio.create_task(fitted.fit(Samples(), max_steps=20))
    await asyncio.sleep(0)
    slow.gate.set()
    with pytest.raises(ConfigError, match=r"while fit runs|begins with other weights"):
        await loading
    await fit
    await undisturbed.fit(Samples(), max_steps=20)
    assert same(fitted.model, undisturbed.model)


async def test_a_prediction_in_a_cancelled_scope_leaves_nothing_of_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, add = Slow(lambda: None), PredictedStore.add

    def added(store: PredictedStore, *rows: Any) -> None:
        add(store, *rows)
        slow()

    monkeypatch.setattr(PredictedStore, "add", added)
    fitted = Trainer(network(), nn.MSELoss(), device="cpu")

    async def predict() -> None:
        await fitted.predict(Samples(), tmp_path / "p.zarr")

    async with anyio.create_task_group() as group:
        group.start_soon(predict)
        await slow.entered.wait()
        assert names(tmp_path)
        asyncio.get_running_loop().call_later(0.05, slow.gate.set)
        group.cancel_scope.cancel()
    assert names(tmp_path) == []
