"""What a checkpoint holds that no run has left is refused as an error of the checkpoint, whatever it hits first."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from streamtrain import Callback, Trainer, checkpoint
from streamtrain.errors import CheckpointError, DataError
from streamtrain.refusing import refusing
from tests.engine import Samples, network


def trainer(run_dir: Path) -> Trainer:
    return Trainer(network(), nn.MSELoss(), seed=0, device="cpu", ema=0.9, run_dir=run_dir)


@pytest.mark.parametrize(
    ("key", "value"), [("rng", {"torch": torch.zeros(2)}), ("means", 3), ("progress", None), ("average", [1])]
)
async def test_a_state_that_no_run_has_left_is_refused(tmp_path: Path, key: str, value: object) -> None:
    """Its digests are right: somebody has made them anew."""
    path = (await trainer(tmp_path).fit(Samples(), max_epochs=1)).checkpoint
    assert path is not None

    def edit() -> None:
        snapshot = checkpoint.read(path)
        checkpoint.commit(path, replace(snapshot, state={**snapshot.state, key: value}), replace=True)

    await asyncio.to_thread(edit)
    with pytest.raises(CheckpointError, match=rf"checkpoint .*{path.name}: its state .*") as caught:
        await trainer(tmp_path).fit(Samples(), max_epochs=2, resume="auto")
    assert caught.value.hint


async def test_a_best_that_no_run_has_left_is_refused(tmp_path: Path) -> None:
    path = (await trainer(tmp_path).fit(Samples(), max_epochs=1)).checkpoint
    assert path is not None
    snapshot = await asyncio.to_thread(checkpoint.read, path)
    edited = replace(snapshot, state={**snapshot.state, "progress": {"best": "val_loss"}})
    await asyncio.to_thread(checkpoint.commit, path, edited, replace=True)
    with pytest.raises(CheckpointError, match=r"its state can't be taken up: KeyError: 'bests'"):
        await trainer(tmp_path).fit(Samples(), max_epochs=2, resume="best")


class Forgets(Callback):
    """Has a state that it does not take up."""

    def state_dict(self) -> dict[str, int]:
        return {"seen": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise KeyError("sight")


async def test_a_callback_that_does_not_take_up_its_state_is_named(tmp_path: Path) -> None:
    first, second = trainer(tmp_path), trainer(tmp_path)
    first.callbacks.append(Forgets())
    second.callbacks.append(Forgets())
    await first.fit(Samples(), max_epochs=1)
    with pytest.raises(CheckpointError, match=r"callback Forgets can't .*: load_state_dict raised KeyError: 'sight'"):
        await second.fit(Samples(), max_epochs=2, resume="auto")


def test_errors_of_ours_are_what_they_were_and_others_name_the_checkpoint() -> None:
    def take_up(error: Exception, path: Path) -> None:
        raise error

    with pytest.raises(DataError, match=r"^other data$"):
        refusing(take_up)(DataError("other data"), Path("step-1"))
    with pytest.raises(CheckpointError, match=r"^checkpoint step-1: .*: KeyError: 'a'$") as caught:
        refusing(take_up)(KeyError("a"), path=Path("step-1"))
    assert isinstance(caught.value.__cause__, KeyError)
