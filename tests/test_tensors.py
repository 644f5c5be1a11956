"""The door from numpy to torch: the same memory wherever torch can take it, the same values everywhere."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streamtrain.data.batch import Batch, Cursor
from streamtrain.errors import DataError
from streamtrain.tensors import map_tree, tensor_batch, tensors, to_tensor

NUMBERS = [f"{order}{kind}" for order in "<>" for kind in ("f2", "f4", "f8", "i2", "i4", "i8", "u2", "u4", "u8", "c8")]
DTYPES = [*NUMBERS, "i1", "u1", "?"]


@given(
    hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    st.booleans(),
)
def test_values_and_shapes_are_kept(array: np.ndarray[Any, Any], writable: bool) -> None:
    array.flags.writeable = writable
    tensor = to_tensor(array)
    assert tuple(tensor.shape) == array.shape
    assert np.array_equal(tensor.numpy(), array, equal_nan=array.dtype.kind in "fc")
    assert tensor.numpy().dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if not dtype.startswith(">")])
def test_memory_is_shared(dtype: str) -> None:
    array = np.zeros((3, 4), dtype)[1:, ::2]
    tensor = to_tensor(array)
    array[0, 1] = 1
    assert bool(tensor[0, 1] == 1)
    assert tensor.data_ptr() == array.ctypes.data


def test_memory_that_must_not_be_written_is_copied() -> None:
    array = np.zeros(3)
    array.flags.writeable = False
    to_tensor(array).fill_(1)
    assert array.tolist() == [0, 0, 0]


@pytest.mark.parametrize("array", [np.array(["a"]), np.zeros(1, "M8[s]"), np.zeros(1, "f4,i4"), np.zeros(1, "V3")])
def test_what_torch_has_no_dtype_for_is_refused_by_name(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(DataError) as caught:
        to_tensor(array)
    assert str(caught.value) == f"torch has no dtype for {array.dtype}"
    assert caught.value.hint


Pair = namedtuple("Pair", ["left", "right"])


def test_a_nest_keeps_its_form() -> None:
    tree = {"a": [1, (2, Pair(3, {"b": 4}))], "c": None}
    assert map_tree(lambda leaf: leaf and leaf * 10, tree) == {"a": [10, (20, Pair(30, {"b": 40}))], "c": None}
    assert isinstance(map_tree(lambda leaf: leaf, tree)["a"][1][1], Pair)


def test_arrays_in_a_nest_become_tensors_and_all_else_stays() -> None:
    held = torch.ones(1)
    made = tensors({"x": np.arange(3), "y": [np.float32(0.5), held], "name": "n", "none": None})
    assert made["x"].tolist() == [0, 1, 2]
    assert float(made["y"][0]) == 0.5
    assert made["y"][1] is held
    assert (made["name"], made["none"]) == ("n", None)


def test_a_batch_of_arrays_becomes_one_of_tensors_with_the_same_place() -> None:
    batch = Batch(np.zeros((2, 3)), {"y": np.ones(2)}, np.array([4, 5]), epoch=1, cursor=Cursor(1, 6))
    made = tensor_batch(batch)
    assert [type(part) for part in (made.inputs, made.targets["y"], made.index)] == [torch.Tensor] * 3
    assert (made.epoch, made.cursor, made.index.tolist()) == (1, (1, 6), [4, 5])


@pytest.mark.parametrize("targets", [None, torch.ones(2)])
def test_a_batch_of_tensors_is_left_alone(targets: torch.Tensor | None) -> None:
    batch = Batch(torch.zeros(2, 3), targets, torch.tensor([4, 5]))
    assert tensor_batch(batch) is batch
