"""Snapshots are copied into the same memory again and again, and each is whole until the next."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from streamtrain import ModelCheckpoint, Trainer
from streamtrain.buffers import Buffers, needed
from streamtrain.errors import EnvironmentProblem
from streamtrain.life import Life
from streamtrain.state import Copier, Snapshot, Tree, clone
from tests.engine import Recorder, Samples, network
from tests.test_state import memory, same, trees

SHAPES: dict[str, Tensor] = {
    "large": torch.randn(300, 200),
    "turned": torch.randn(300, 200).t(),
    "with gaps": torch.randn(300, 400)[:, ::2],
    "channels last": torch.randn(8, 16, 20, 20).to(memory_format=torch.channels_last),
    "double": torch.randn(40_000, dtype=torch.float64),
    "flags": torch.arange(50_000) % 3 == 0,
    "half": torch.randn(70_000).to(torch.bfloat16),
    "one": torch.tensor(7),
    "none": torch.empty(0, 3),
    "complex": torch.randn(40_000, dtype=torch.complex128),
}


def test_copies_are_equal_of_the_same_strides_and_share_nothing() -> None:
    copies = Buffers().copies(SHAPES)
    for name, tensor in SHAPES.items():
        assert torch.equal(copies[name], tensor), name
        assert copies[name].dtype == tensor.dtype
        assert name == "with gaps" or copies[name].stride() == tensor.stride()
    assert not memory(list(SHAPES.values())) & memory(list(copies.values()))


@settings(max_examples=100)
@given(trees)
def test_a_tree_cloned_into_buffers_is_the_same(tree: Any) -> None:
    buffers = Buffers()
    copy = clone(tree, buffers.copies)
    assert same(tree, copy)
    again = clone(tree, buffers.copies)
    assert same(tree, again)


def test_the_second_copy_lies_where_the_first_did() -> None:
    buffers = Buffers()
    first = memory(list(buffers.copies(SHAPES).values()))
    taken = buffers.bytes
    assert taken >= needed(SHAPES.values())
    assert (
        memory(
            list(
                buffers.copies(
                    {name: tensor + 1 if name == "one" else tensor for name, tensor in SHAPES.items()}
                ).values()
            )
        )
        == first
    )
    assert buffers.bytes == taken


def test_tensors_of_other_strides_stay_where_they_were_copied_to() -> None:
    buffers = Buffers()
    tree = clone({"w": SHAPES["channels last"]}, buffers.copies)
    assert memory(tree) == memory(buffers.copies({"w": SHAPES["channels last"]}))


def test_what_grows_beyond_the_buffers_gets_others() -> None:
    buffers = Buffers()
    buffers.copies({"a": torch.zeros(100_000)})
    copies = buffers.copies({"a": torch.zeros(100_000), "b": torch.ones(1_000_000)})
    assert torch.equal(copies["b"], torch.ones(1_000_000))
    assert buffers.bytes >= 4_400_000


@pytest.mark.parametrize(("needed", "taken"), [(3 << 20, 4 << 20), (4 << 20, 4 << 20), ((4 << 20) + 1, 8 << 20)])
def test_of_pinned_memory_it_takes_and_says_what_torch_takes(
    needed: int, taken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole powers of two: with a share on top 4 MiB were 8, and said to be 5."""
    asked: list[int] = []
    plain: Any = torch.empty

    def empty(size: Any, *more: Any, pin_memory: bool = False, **how: Any) -> Any:
        asked.extend([size] if pin_memory else [])
        return plain(size, *more, **how)

    monkeypatch.setattr(torch, "empty", empty)
    caplog.set_level("INFO")
    made = Buffers()
    made.reserve(needed, pinned=True)
    assert asked == [made.bytes] == [taken]
    assert f"snapshots take {taken / 2**20:.1f} MiB" in caplog.text


def test_where_there_is_no_memory_it_says_how_much_was_needed() -> None:
    with pytest.raises(EnvironmentProblem, match=r"no memory for a snapshot: [\d,]+ bytes beside the model") as caught:
        Buffers().reserve(1 << 60)
    assert caught.value.hint


async def test_the_saves_of_a_fit_share_one_memory_which_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    places: list[set[int]] = []
    real = Life.snapshot

    def snapshot(self: Life, state: Tree, copier: Copier) -> Snapshot:
        made = real(self, state, copier)
        places.append(memory(made.model) | memory(made.optimizer))
        return made

    monkeypatch.setattr(Life, "snapshot", snapshot)
    caplog.set_level(logging.INFO)
    recorder = Recorder()
    fitted = Trainer(
        network(),
        nn.MSELoss(),
        run_dir=tmp_path,
        callbacks=[ModelCheckpoint(every="2steps", keep_last=-1), recorder],
        seed=5,
        device="cpu",
    )
    await fitted.fit(Samples(), max_epochs=4)
    assert len(places) > 1
    assert all(place == places[0] for place in places)
    assert "of memory, beside the budgets of streams" in caplog.text
    assert {event.buffers > 0 for event in recorder.events("on_checkpoint")} == {True}
