"""The codec of state: what goes in comes out, what can't is refused by its path, and no file can do harm."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter, OrderedDict, namedtuple
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from streamtrain.errors import CheckpointError
from streamtrain.state import MAX_DEPTH, check, clone, decode, encode
from streamtrain.tensor_file import DTYPES

ALL_DTYPES = [*DTYPES.values(), torch.complex128]


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, and of the same kind all the way down."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        keys = [(type(key), key) for key in a] == [(type(key), key) for key in b]
        return keys and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and isinstance(b, type(a)) and all(map(same, a, b))
    if isinstance(a, float):
        return type(b) is float and (a.hex() == b.hex() or (math.isnan(a) and math.isnan(b)))
    return type(a) is type(b) and bool(a == b)


def _bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def memory(tree: Any) -> set[int]:
    """Where the tree's tensors and arrays begin."""
    if isinstance(tree, Tensor):
        return {tree.data_ptr()} if tree.numel() else set()
    if isinstance(tree, np.ndarray):
        return {tree.ctypes.data} if tree.size else set()
    members = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return set[int]().union(*(memory(member) for member in members))


def through(tree: Any) -> Any:
    """Out and in again, the JSON as text and the tensors as copies."""
    document, tensors = encode(tree)
    text = json.dumps(document, allow_nan=False)
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return decode(json.loads(text), copies)


def _tensor(dtype: torch.dtype, shape: list[int], turned: bool) -> Tensor:
    count = math.prod(shape) * dtype.itemsize
    raw = torch.arange(count, dtype=torch.uint8)
    raw = raw % 2 if dtype is torch.bool else raw
    tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    return tensor.transpose(0, -1) if turned and shape else tensor


tensors = st.builds(_tensor, st.sampled_from(ALL_DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans())
arrays = hnp.arrays(
    st.sampled_from(["<f4", ">f8", "<i2", ">u4", "?", "<c16", "S3", "<U2", "<M8[s]", "<m8[ns]"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**1024, -(2**5000), 2**1023]),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    arrays,
    arrays.map(lambda array: array.reshape(-1)[0] if array.size else np.float32(1)),
    tensors,
    st.sampled_from(ALL_DTYPES),
)
keys = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.integers(), st.just("$tensor"))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, st.integers(0, 9), max_size=4).map(Counter),
    ),
    max_leaves=12,
)


@settings(max_examples=200)
@given(trees)
def test_what_goes_in_comes_out(tree: Any) -> None:
    assert same(tree, through(tree))


@settings(max_examples=50)
@given(trees)
def test_a_clone_is_equal_and_shares_nothing(tree: Any) -> None:
    copy = clone(tree)
    assert same(tree, copy)
    assert not memory(tree) & memory(copy)


def test_the_state_of_optimizers_and_schedulers_comes_out() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    for state in (optimizer.state_dict(), schedule.state_dict()):
        assert same(state, through(state))


def test_tied_tensors_are_stored_once_and_tied_again() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    document, tensors = encode(model.state_dict(), views=False)
    assert list(tensors) == ["embed.weight"]
    read = decode(json.loads(json.dumps(document)), tensors)
    assert read["embed.weight"].data_ptr() == read["head.weight"].data_ptr()


def test_views_of_one_memory_share_it_again() -> None:
    base = torch.arange(24.0)
    tree = {"all": base, "rows": base.view(4, 6).t(), "tail": base[20:], "bits": base[4:8].view(torch.int32)}
    read = through(tree)
    assert same(tree, read)
    read["all"].zero_()
    assert not any(read[name].any() for name in tree)


def test_a_view_keeps_only_what_it_sees() -> None:
    _, tensors = encode({"row": torch.zeros(1_000_000)[10:14]})
    assert tensors["row"].numel() == 4


@pytest.mark.parametrize(
    ("strided", "kept"), [(torch.zeros(2, 3).t(), (1, 3)), (torch.zeros(2, 3, 4, 5).permute(0, 2, 3, 1), None)]
)
def test_dense_strides_come_back(strided: Tensor, kept: tuple[int, ...] | None) -> None:
    assert through({"x": strided})["x"].stride() == (kept or strided.stride())


def test_names_that_collide_stay_apart() -> None:
    tree = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "__metadata__": torch.full((1,), 2.0)}
    _, tensors = encode(tree)
    assert len(tensors) == 3
    assert "__metadata__" not in tensors
    assert same(tree, through(tree))


Pair = namedtuple("Pair", ["left", "right"])


def test_kinds_of_containers_fall_back_to_the_plain_one() -> None:
    assert through(OrderedDict(b=1, a=2)) == {"b": 1, "a": 2}
    assert through(Pair(1, [2])) == (1, [2])
    assert through(torch.Size([2, 3])) == (2, 3)


class Distributed(Tensor):
    """Answers for itself, as a DTensor does: its parts lie elsewhere."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError

    @staticmethod
    def __new__(cls, like: Tensor) -> Distributed:
        made: Distributed = Tensor._make_wrapper_subclass(cls, like.shape)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return "Distributed()"


def _holds_itself() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("tree", "path", "what"),
    [
        ({"a": [0, {"b c": {1}}]}, "state.a[1]['b c']", "a set"),
        ({"f": len}, "state.f", "builtin_function_or_method"),
        ({"m": nn.Linear(1, 1)}, "state.m", "torch.nn.modules.linear.Linear"),
        ({"x": Fraction(1, 2)}, "state.x", "fractions.Fraction"),
        ({"b": b"raw"}, "state.b", "a bytes"),
        ({1.5: 1}, "state", "a dict with the key 1.5 of type float"),
        ({"o": np.array([None])}, "state.o", "a numpy array of dtype object"),
        ({"s": torch.zeros(2).to_sparse()}, "state.s", "sparse"),
        ({"m": torch.zeros(2, device="meta")}, "state.m", "meta"),
        ({"d": Distributed(torch.zeros(2))}, "state.d", "a tensor of the class Distributed"),
        ({"l": nn.LazyLinear(3).weight}, "state.l", "shape"),
        ({"loop": _holds_itself()}, "state.loop", "holds itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_refused_by_its_path(tree: Any, path: str, what: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check(tree, "state")
    assert str(caught.value).startswith(path)
    assert what in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # torch says of both that they are new or old
def test_quantized_and_compressed_tensors_are_refused_by_their_path() -> None:
    quantized = torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    for odd, what in ((quantized, "qint8"), (torch.eye(2).to_sparse_csr(), "sparse_csr")):
        with pytest.raises(CheckpointError, match=rf"^state\.a\[0\]: .*{what}"):
            check({"a": [odd]}, "state")


def test_depth_has_a_bound_and_what_is_within_it_goes_through() -> None:
    tree: Any = 1
    for _ in range(MAX_DEPTH):
        tree = [tree]
    assert same(tree, through(tree))
    with pytest.raises(CheckpointError, match="nested deeper"):
        encode([tree])


HOSTILE: list[Any] = [
    {"$tensor": "absent"},
    {"$tensor": ["x"]},
    {"$tensor": "x", "stride": [10**9]},
    {"$tensor": "x", "stride": [-1]},
    {"$tensor": "x", "stride": "ab"},
    {"$tensor": "x", "dtype": "float32", "shape": [5], "stride": [1], "offset": 0},
    {"$tensor": "x", "dtype": "float32", "shape": [4], "stride": [1], "offset": 1},
    {"$tensor": "x", "dtype": "float32", "shape": [1], "stride": [1], "offset": -1},
    {"$tensor": "x", "dtype": "float32", "shape": [-1], "stride": [1], "offset": 0},
    {"$tensor": "x", "dtype": "float32", "shape": [2], "stride": [10**18], "offset": 0},
    {"$tensor": "x", "dtype": "float64", "shape": [4], "stride": [1], "offset": 0},
    {"$tensor": "x", "dtype": "load", "shape": [1], "stride": [1], "offset": 0},
    {"$tensor": "x", "dtype": "float32", "shape": [1], "stride": [1], "offset": None},
    {"$tensor": "x", "dtype": "float32", "shape": [1], "stride": [1], "offset": 0.5},
    {"$tensor": "x", "dtype": "nothing", "shape": [1], "stride": [1], "offset": 0},
    {"$tensor": "x", "dtype": 7, "shape": [1], "stride": [1], "offset": 0},
    {"$tensor": "x", "offset": 0},
    {"$array": {"$tensor": "x"}, "dtype": "O", "shape": [1]},
    {"$array": {"$tensor": "x"}, "dtype": "<f4", "shape": [9]},
    {"$array": {"$tensor": "x"}, "dtype": "no", "shape": [1]},
    {"$array": "x", "dtype": "<f4", "shape": [1]},
    {"$dtype": "load"},
    {"$dtype": "nothing"},
    {"$dtype": 7},
    {"$scalar": "O", "hex": "00"},
    {"$scalar": "<f4", "hex": "zz"},
    {"$scalar": "<f4", "hex": ""},
    {"$int": "0xg"},
    {"$int": 5},
    {"$float": "one"},
    {"$float": []},
    {"$dict": [[1]]},
    {"$dict": [[[], 1]]},
    {"$dict": 3},
    {"$counter": 3},
    {"$counter": [[{}, 1]]},
    {"$tuple": None},
    {"$code": "import os"},
    {"$": 1},
]


@pytest.mark.parametrize("document", HOSTILE, ids=repr)
def test_hostile_json_is_refused_by_its_path(document: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\.deep\[0\]"):
        decode({"deep": [document]}, {"x": torch.zeros(4)}, where="state")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just("x"),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["$tensor", "$array", "$scalar", "$dict", "$tuple", "$int", "$float", "$counter", "dtype",
                         "shape", "stride", "offset", "hex", "a"]),
        inner | st.sampled_from(["x", "float32", "<f4", "0x1", [4], [1], 0]),
        max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300)
@given(json_values)
def test_no_json_does_more_than_raise(document: Any) -> None:
    with contextlib.suppress(CheckpointError):
        decode(document, {"x": torch.zeros(4)})


def test_endless_nesting_is_refused() -> None:
    document: Any = 1
    for _ in range(500):
        document = [document]
    with pytest.raises(CheckpointError, match="nested deeper"):
        decode(document, {})
