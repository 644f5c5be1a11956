"""Devices: a name becomes a device or an error that says what there is; on the CPU a batch stays where it lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from streamtrain.data.batch import Batch, Cursor
from streamtrain.device import CUBLAS, check_deterministic, generators, mover, resolve_device
from streamtrain.errors import ConfigError, EnvironmentProblem, UserCodeError
from streamtrain.trainer import Trainer

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_auto_takes_the_gpu_where_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_an_error_with_the_build(name: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"device '{name}': this torch .* sees no GPU") as caught:
        resolve_device(name)
    assert torch.__version__ in str(caught.value)
    assert "device='cpu'" in caught.value.hint


@gpu
def test_a_number_that_no_gpu_has_is_an_error_with_their_count() -> None:
    with pytest.raises(EnvironmentProblem, match=r"there are \d+ GPUs"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("name", ["gpu", "", "cpu0", "cuda:x", "mps", "meta", "xla", 3.5, None])
def test_what_is_no_device_of_ours_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="device"):
        resolve_device(name)


def test_on_the_cpu_nothing_is_copied() -> None:
    inputs = np.zeros((2, 3), np.float32)
    batch = mover(torch.device("cpu"))(Batch(inputs, cursor=Cursor(0, 2)))
    assert batch.inputs.data_ptr() == inputs.ctypes.data
    assert batch.cursor == (0, 2)
    same = Batch(torch.zeros(2), torch.zeros(2))
    assert mover(torch.device("cpu"))(same) is same


@gpu
def test_on_a_gpu_inputs_and_targets_go_there_and_the_index_stays() -> None:
    batch = Batch({"x": np.zeros(2, np.float32)}, np.ones(2, np.float32), np.arange(2))
    moved = mover(torch.device("cuda"))(batch)
    assert (moved.inputs["x"].device.type, moved.targets.device.type, moved.index.device.type) == (
        "cuda",
        "cuda",
        "cpu",
    )


@pytest.mark.parametrize(
    "transform",
    [
        lambda batch: (batch.inputs + 1, batch.targets),
        lambda batch: Batch(batch.inputs + 1, batch.targets, batch.index, batch.epoch, batch.cursor),
    ],
)
def test_a_transform_on_the_device_gets_tensors_and_keeps_the_place(transform: Any) -> None:
    batch = Batch(np.zeros(2), np.ones(2), np.array([7, 8]), epoch=3, cursor=Cursor(3, 9))
    made = mover(torch.device("cpu"), transform)(batch)
    assert (made.inputs.tolist(), made.targets.tolist(), made.index.tolist()) == ([1, 1], [1, 1], [7, 8])
    assert (made.epoch, made.cursor) == (3, (3, 9))


@pytest.mark.parametrize("made", [None, torch.zeros(2, 3), (1, 2, 3)], ids=["nothing", "two-rows", "three"])
def test_what_a_transform_on_the_device_returns_is_a_batch_or_named(made: Any) -> None:
    batch = Batch(np.zeros(2), np.ones(2), np.array([7, 8]))
    with pytest.raises(UserCodeError, match=r"device_transform returned .*, not a Batch or"):
        mover(torch.device("cpu"), lambda _: made)(batch)


def test_a_step_may_draw_from_the_generators_of_the_cpu_and_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    those = tuple(torch.Generator() for _ in range(2))
    monkeypatch.setattr(torch.cuda, "default_generators", those)
    assert generators(torch.device("cpu")) == [torch.default_generator]
    for number, own in enumerate(those):
        here, there = generators(torch.device("cuda", number))
        assert here is torch.default_generator
        assert there is own


def test_a_gpu_is_in_use_once_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generators are part of no random state before, and a fit of a seed would draw the host's numbers there."""
    begun: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: begun.append(True))
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert begun == [True]


@pytest.mark.parametrize("value", [None, "", ":0:0"])
def test_deterministic_kernels_on_a_gpu_need_an_environment_that_the_error_names(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first matrix product raises, in what seems to be the user's model."""
    monkeypatch.delenv(CUBLAS, raising=False)
    if value is not None:
        monkeypatch.setenv(CUBLAS, value)
    monkeypatch.setattr("streamtrain.trainer.resolve_device", lambda name: torch.device("cuda", 0))
    with pytest.raises(EnvironmentProblem, match="cuBLAS is deterministic only with CUBLAS_WORKSPACE_CONFIG") as caught:
        Trainer(nn.Linear(1, 1), nn.MSELoss(), deterministic=True)
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in caught.value.hint
    check_deterministic(torch.device("cpu"))
    monkeypatch.setenv(CUBLAS, ":16:8")
    check_deterministic(torch.device("cuda", 0))
