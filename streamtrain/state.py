"""Trees of state and their one codec: JSON with references to tensors; whatever else is met is refused by its path.

A tree is made of None, bool, int, float (non-finite too), str, numpy scalars and arrays, tensors, torch's dtypes, and
dict (keys str or int), OrderedDict, Counter, list and tuple of trees. Tensors that share memory share it again after
decoding. Nothing is ever pickled; the worst that a hostile file can do is to raise CheckpointError.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from streamtrain.dense import is_dense
from streamtrain.errors import CheckpointError

Tree: TypeAlias = Any
"""A value as the module's docstring describes it."""
Json: TypeAlias = Any
"""What `json.dumps(..., allow_nan=False)` takes."""

MAX_DEPTH = 100
"""Levels of nesting; deeper trees are refused, since they are nearly always a value that holds itself."""
_PLAIN_INT = 1 << 1024
"""Larger integers go as hexadecimal text: Python refuses to parse very long decimals."""
_ARRAY_KINDS = "biufcmMSU"
_RESERVED = "__metadata__"
"""The one name that the safetensors format keeps for itself."""
_ALIGN = 16
"""Shared memory seen through several dtypes is kept from a multiple of this many bytes on."""


@dataclass(frozen=True)
class Snapshot:
    """One instant of a run, in CPU tensors that nobody else writes to: it can be written while training goes on."""

    model: dict[str, Tensor]
    """Parameters and buffers by their names in `model.state_dict()`; tied ones share memory."""
    optimizer: Tree
    """`optimizer.state_dict()`, or a tree that holds it."""
    state: Tree
    """All else: step, epoch, samples, stream, rng, scheduler, callbacks, ..."""


def encode(tree: Tree, *, where: str = "", views: bool = True) -> tuple[Json, dict[str, Tensor]]:
    """Split a tree into JSON and the tensors that it refers to, named by their paths; no tensor is copied.

    The tensors may be views of the tree's own memory, of any stride and device. With `views=False` only tensors that
    are the same region of memory are stored once, and merely overlapping ones each for itself (their values are kept,
    their kinship is not). Raises CheckpointError with the path of what can't be kept, `where` being its beginning.
    """
    walk = _Encoder(where)
    json = walk.encode(tree)
    return json, walk.lay_out(views=views)


def decode(json: Json, tensors: Mapping[str, Tensor], *, where: str = "") -> Tree:
    """Put a tree together again; the opposite of `encode`.

    Tensors of `tensors` become part of the tree without a copy (only dense ones of unusual strides are copied).
    Raises CheckpointError with the path of what does not fit.
    """
    return _Decoder(tensors, where).decode(json)


def check(tree: Tree, where: str) -> None:
    """Raise CheckpointError, naming the path from `where` on, if `tree` holds anything that can't be kept."""
    _Encoder(where).encode(tree)


Copier: TypeAlias = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Copies tensors by name to the CPU, with their shapes and, where they are dense, their strides."""


def fresh(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in memory of their own."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def clone(tree: Tree, copier: Copier = fresh) -> Tree:
    """Copy a tree's tensors and arrays to CPU memory of its own; what shares memory shares it in the copy too."""
    json, tensors = encode(tree)
    return decode(json, copier(tensors))


@dataclass(slots=True)
class _Found:
    """A tensor met in the tree, with the JSON reference that is filled in once all tensors are known."""

    name: str
    tensor: Tensor
    reference: dict[str, Json]

    @property
    def region(self) -> tuple[object, ...]:
        tensor = self.tensor
        return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())

    @property
    def span(self) -> tuple[int, int]:
        """First byte, and one past the last, within the storage."""
        tensor = self.tensor
        first = int(tensor.storage_offset()) * tensor.itemsize
        return first, first + _extent(tensor.shape, tensor.stride()) * tensor.itemsize


@dataclass(slots=True)
class _Encoder:
    where: str
    keys: list[str | int] = field(default_factory=list)
    found: list[_Found] = field(default_factory=list)

    def encode(self, value: Tree) -> Json:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -_PLAIN_INT < value < _PLAIN_INT else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            return self._refer(_checked(value, self._refusal))
        if isinstance(value, np.generic):
            return self._scalar(value)
        if kind is np.ndarray:
            return self._array(value)
        if kind is torch.dtype:
            return {"$dtype": str(value).removeprefix("torch.")}
        if kind is dict or kind is OrderedDict:
            return self._dict(value)
        if kind is Counter:
            return {"$counter": self._pairs(value)}
        if kind is list:
            return self._items(value)
        if kind is tuple or kind is torch.Size or (isinstance(value, tuple) and hasattr(value, "_fields")):
            return {"$tuple": self._items(value)}
        raise self._refusal(f"a {kind.__module__}.{kind.__qualname__}".replace("builtins.", ""))

    def _refusal(self, what: str) -> CheckpointError:
        path = _render(self.where, self.keys)
        return CheckpointError(
            f"{path}: {what} can't be kept in a checkpoint",
            hint="keep None, bool, int, float, str, tensors, dtypes, numpy arrays, and dict, list and tuple of them",
        )

    def _items(self, values: Sequence[Tree]) -> list[Json]:
        return [self._below(number, value) for number, value in enumerate(values)]

    def _pairs(self, value: Mapping[Any, Tree]) -> list[Json]:
        for key in value:
            if type(key) not in (str, int, bool):
                raise self._refusal(f"a dict with the key {key!r:.80} of type {type(key).__name__}")
        return [[key, self._below(key, item)] for key, item in value.items()]

    def _dict(self, value: Mapping[Any, Tree]) -> dict[str, Json]:
        pairs = self._pairs(value)
        if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": pairs}

    def _below(self, key: str | int, value: Tree) -> Json:
        if len(self.keys) >= MAX_DEPTH:
            del self.keys[8:]
            raise self._refusal(f"a value that holds itself, or is nested deeper than {MAX_DEPTH} levels,")
        self.keys.append(key)
        json = self.encode(value)
        self.keys.pop()
        return json

    def _refer(self, tensor: Tensor) -> dict[str, Json]:
        reference: dict[str, Json] = {}
        self.found.append(_Found(".".join(map(str, self.keys)) or "value", tensor, reference))
        return reference

    def _array(self, value: np.ndarray[Any, Any]) -> dict[str, Json]:
        if value.dtype.kind not in _ARRAY_KINDS or value.dtype.hasobject:
            raise self._refusal(f"a numpy array of dtype {value.dtype}")
        data = np.frombuffer(value.tobytes(), np.uint8) if value.size else np.empty(0, np.uint8)
        reference = self._refer(torch.from_numpy(data.copy()))
        return {"$array": reference, "dtype": value.dtype.str, "shape": list(value.shape)}

    def _scalar(self, value: np.generic) -> dict[str, Json]:
        if value.dtype.kind not in _ARRAY_KINDS:
            raise self._refusal(f"a numpy scalar of dtype {value.dtype}")
        return {"$scalar": value.dtype.str, "hex": value.tobytes().hex()}

    def lay_out(self, *, views: bool) -> dict[str, Tensor]:
        """Decide what is stored once, fill in all references, and name the tensors to be stored."""
        stored: dict[str, Tensor] = {}
        for group in _kin(self.found, views=views):
            name, copies = group[0].name, 1
            while name in stored or name == _RESERVED:
                copies += 1
                name = f"{group[0].name}~{copies}"
            if len({item.region for item in group}) == 1:
                stored[name] = group[0].tensor
                for item in group:
                    item.reference.update(_plain_reference(name, item.tensor))
            else:
                base, first = _base(group)
                stored[name] = base
                for item in group:
                    item.reference.update(_view_reference(name, item, first))
        return stored


def _checked(value: Tensor, refusal: Callable[[str], CheckpointError]) -> Tensor:
    """The tensor as plain strided memory without gradient, conjugate or negative bit."""
    if is_lazy(value):
        raise refusal("a lazy tensor that no forward pass has given its shape yet")
    if value.is_meta or value.layout is not torch.strided or value.is_quantized:
        raise refusal(f"a tensor with device {value.device}, layout {value.layout}, dtype {value.dtype}")
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise refusal(f"a tensor of the class {type(value).__qualname__}")
    return value.detach().as_subclass(Tensor).resolve_conj().resolve_neg()


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to one past the last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _kin(found: list[_Found], *, views: bool) -> Iterator[list[_Found]]:
    """Group tensors whose memory overlaps (or, without `views`, is the same), in the order of their first members."""
    clusters: dict[object, list[_Found]] = {}
    by_storage: dict[object, list[_Found]] = {}
    for number, item in enumerate(found):
        if item.tensor.numel() == 0:
            clusters[number] = [item]
        elif not views:
            clusters.setdefault((item.tensor.device, item.region), []).append(item)
        else:
            key = (item.tensor.device, item.tensor.untyped_storage().data_ptr())
            by_storage.setdefault(key, []).append(item)
    place = {id(item): number for number, item in enumerate(found)}
    groups = list(clusters.values())
    for members in by_storage.values():
        end = -1
        for item in sorted(members, key=lambda item: item.span):
            first, last = item.span
            if first >= end:
                groups.append([])
            groups[-1].append(item)
            end = max(end, last)
    for group in groups:
        group.sort(key=lambda item: place[id(item)])
    return iter(sorted(groups, key=lambda group: place[id(group[0])]))


def _base(group: list[_Found]) -> tuple[Tensor, int]:
    """One flat tensor over all that the group's members see, and the byte of the storage at which it begins."""
    first = min(item.span[0] for item in group)
    last = max(item.span[1] for item in group)
    dtypes = {item.tensor.dtype for item in group}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
    if dtype is torch.uint8:
        first -= first % _ALIGN
    tensor = group[0].tensor
    base = torch.empty(0, dtype=dtype, device=tensor.device)
    base.set_(tensor.untyped_storage(), first // base.itemsize, ((last - first) // base.itemsize,), (1,))
    return base, first


def _plain_reference(name: str, tensor: Tensor) -> dict[str, Json]:
    if tensor.is_contiguous() or not is_dense(tensor.shape, tensor.stride()):
        return {"$tensor": name}
    return {"$tensor": name, "stride": list(tensor.stride())}


def _view_reference(name: str, item: _Found, first: int) -> dict[str, Json]:
    tensor = item.tensor
    return {
        "$tensor": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": (item.span[0] - first) // tensor.itemsize,
    }


def _render(where: str, keys: Sequence[str | int]) -> str:
    path = where
    for key in keys:
        if isinstance(key, str) and key.isidentifier():
            path += f".{key}" if path else key
        else:
            path += f"[{key!r:.80}]"
    return path or "state"


@dataclass(slots=True)
class _Decoder:
    tensors: Mapping[str, Tensor]
    where: str
    keys: list[str | int] = field(default_factory=list)
    restrided: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def decode(self, json: Json) -> Tree:
        if isinstance(json, list):
            return [self._below(number, item) for number, item in enumerate(json)]
        if not isinstance(json, dict):
            return json
        tag = next(iter(json), "")
        if not tag.startswith("$"):
            return {key: self._below(key, item) for key, item in json.items()}
        try:
            return self._tagged(tag, json)
        except CheckpointError:
            raise
        except (LookupError, AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise self._refusal(f"a malformed {tag}: {error}") from error

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{_render(self.where, self.keys)}: the checkpoint holds {what}")

    def _below(self, key: str | int, json: Json) -> Tree:
        if len(self.keys) > MAX_DEPTH:
            del self.keys[8:]
            raise self._refusal(f"a value nested deeper than {MAX_DEPTH} levels")
        self.keys.append(key)
        value = self.decode(json)
        self.keys.pop()
        return value

    def _tagged(self, tag: str, json: dict[str, Json]) -> Tree:
        body = json[tag]
        if tag == "$tensor":
            return self._tensor(json)
        if tag == "$tuple":
            return tuple(self._below(number, item) for number, item in enumerate(body))
        if tag == "$dict":
            return {key: self._below(key, item) for key, item in body}
        if tag == "$counter":
            return Counter({key: self._below(key, item) for key, item in body})
        if tag == "$int":
            return int(body, 16)
        if tag == "$float":
            return float(body)
        if tag == "$array":
            data = self._tensor(body).numpy()
            return data.view(_dtype(json["dtype"])).reshape(json["shape"])
        if tag == "$dtype":
            return self._torch_dtype(body)
        if tag == "$scalar":
            dtype, raw = _dtype(body), bytes.fromhex(json["hex"])
            return np.frombuffer(raw, dtype)[0] if dtype.itemsize else dtype.type()  # an empty text has no bytes
        raise self._refusal(f"{tag!r:.80}, which this version does not know")

    def _tensor(self, json: dict[str, Json]) -> Tensor:
        name = json["$tensor"]
        if name not in self.tensors:
            raise self._refusal(f"a reference to the tensor {name!r:.80}, which is not there")
        base = self.tensors[name]
        if "offset" in json:
            return self._view(base, json)
        if "stride" not in json:
            return base
        stride = tuple(json["stride"])
        if base.stride() == stride:
            return base
        if (name, stride) not in self.restrided:
            if len(stride) != base.dim() or not is_dense(base.shape, stride):
                raise self._refusal(f"strides {stride} that do not fit the shape {tuple(base.shape)}")
            strided = torch.empty_strided(tuple(base.shape), stride, dtype=base.dtype)
            self.restrided[name, stride] = strided.copy_(base)
        return self.restrided[name, stride]

    def _torch_dtype(self, name: str) -> torch.dtype:
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise self._refusal(f"the dtype {dtype!r:.80}")
        return dtype

    def _view(self, base: Tensor, json: dict[str, Json]) -> Tensor:
        dtype = self._torch_dtype(json["dtype"])
        shape, stride, offset = tuple(json["shape"]), tuple(json["stride"]), json["offset"]
        view = torch.empty(0, dtype=dtype, device=base.device)
        inside = min((*shape, *stride, offset), default=0) >= 0
        # set_ would silently grow the storage to fit, so the bounds are ours to check.
        if not inside or (offset + _extent(shape, stride)) * view.itemsize > base.numel() * base.itemsize:
            raise self._refusal("a view that reaches out of its tensor")
        start = base.storage_offset() * base.itemsize // view.itemsize
        return view.set_(base.untyped_storage(), start + offset, shape, stride)


def _dtype(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if dtype.kind not in _ARRAY_KINDS or dtype.hasobject:
        raise ValueError(f"the dtype {text!r:.40}")
    return dtype
