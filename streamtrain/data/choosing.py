"""What the user says of samples beyond a range: numbers, weights, groups; and the arrays that say it.

Its law: such an array is read once, whole, when the stream opens; an array along the sample axes has a value for each
place, and a window has that of its first.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.cells import Cells
from streamtrain.data.chosen import Chosen, Floats, Weighted, balancing, part_by_group, part_of
from streamtrain.data.framing import Frame
from streamtrain.data.opening import OpenArray
from streamtrain.data.permutation import Ints
from streamtrain.data.readers import Scratch
from streamtrain.data.splits import SplitBy, split_bounds
from streamtrain.errors import ConfigError, DataError

Values = NDArray[Any]


@dataclass(frozen=True)
class Choice:
    """What the user says; names are of arrays."""

    indices: str | Ints | None = None
    """Sample numbers, or a boolean array."""
    groups: str | None = None
    """A split takes samples with the same value here together."""
    weights: str | Floats | None = None
    """How often a sample comes, in proportion."""
    balance: str | None = None
    """Labels that shall come equally often."""

    @property
    def names(self) -> list[str]:
        """The arrays that are to be read."""
        return [each for each in (self.indices, self.groups, self.weights, self.balance) if isinstance(each, str)]

    @property
    def all(self) -> bool:
        """Whether each sample comes once."""
        return self.indices is None and self.groups is None and self.weights is None and self.balance is None


@dataclass(frozen=True)
class Draw:
    """Samples by their numbers, and their weights."""

    chosen: Chosen
    weights: Floats | None
    digest: str
    """Of numbers and weights: part of the fingerprint."""

    def most(self, cells: int) -> int:
        """Most samples that so many cells can contribute in an epoch."""
        if self.weights is None:
            return self.chosen.most(cells)
        firsts = self.chosen.starts
        expected = np.add.reduceat(self.weights, firsts[:-1]) * (len(self.weights) / self.weights.sum())
        return int(np.sort(np.ceil(expected) + 1)[-cells:].sum())

    def split(self, seed: int, epoch: int) -> Chosen:
        """What an epoch has of them."""
        return self.chosen if self.weights is None else Weighted(self.chosen, self.weights, seed, epoch)


def draw(
    choice: Choice,
    values: Mapping[str, Values],
    grid: Cells,
    frames: Sequence[Frame],
    split: Sequence[float] | None,
    by: SplitBy,
    seed: int,
) -> Draw:
    """The samples of a split, chosen and weighted. `values`: one for each sample, by the name of their array.

    Raises ConfigError or DataError for what can't be.
    """
    if split is not None and frames[0].overlaps:
        raise ConfigError(
            "a split of chosen windows that overlap would put the same places into both parts",
            hint="take a stride of at least what a sample covers, or leave split= out and choose the parts by indices=",
        )
    numbers = _numbers(choice.indices, values, grid.num_samples)
    try:
        lower, upper = split_bounds(split, len(numbers))
    except ValueError as error:
        raise DataError(str(error), hint="split=(0.0, 0.9), or two numbers of chosen samples") from error
    if choice.groups is not None:
        numbers = part_by_group(numbers, values[choice.groups][numbers], lower, upper, seed)
    else:
        numbers = part_of(numbers, grid, lower, upper, by, seed)
    if not len(numbers):
        raise DataError(f"no samples are chosen (split {split})", hint="choose a wider split, or more of them")
    chosen = Chosen(grid, numbers, by)
    weights = _weights(choice, values, chosen.numbers, grid.num_samples)
    digest = hashlib.blake2b(numbers.tobytes(), digest_size=8)
    digest.update(b"" if weights is None else weights.tobytes())
    return Draw(chosen, weights, f"{len(numbers)} of {grid.num_samples}, {digest.hexdigest()}")


def _numbers(indices: str | Ints | None, values: Mapping[str, Values], count: int) -> Ints:
    if indices is None:
        return np.arange(count, dtype=np.int64)
    if isinstance(indices, str):
        if values[indices].dtype != bool:
            raise DataError(
                f"indices={indices!r}: the array is {values[indices].dtype}, not bool", hint="or give sample numbers"
            )
        return np.flatnonzero(values[indices]).astype(np.int64)
    if len(indices) and not (indices.min() >= 0 and indices.max() < count):
        raise DataError(f"indices= go from {indices.min()} to {indices.max()}; there are samples 0 to {count - 1}")
    if len(np.unique(indices)) < len(indices):
        raise ConfigError("indices= names samples twice", hint="weights= has samples come more often than others")
    return indices


def _weights(choice: Choice, values: Mapping[str, Values], numbers: Ints, count: int) -> Floats | None:
    if choice.balance is not None:
        return balancing(values[choice.balance][numbers])
    if choice.weights is None:
        return None
    given = values[choice.weights] if isinstance(choice.weights, str) else choice.weights
    if len(given) != count:
        raise DataError(f"weights= has {len(given)} numbers for {count} samples")
    weights: Floats = given[numbers].astype(np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise DataError("weights= must be finite, not negative, and not all 0")
    return weights


def read_values(arrays: Sequence[OpenArray], frames: Sequence[Frame], name: str) -> Values:
    """A value for each sample, store by store. Blocks: off the event loop. Raises DataError."""
    parts = []
    for array, frame in zip(arrays, frames, strict=True):
        layout = array.layout
        if layout.shape != frame.places:
            raise DataError(f"array {name!r} has shape {layout.shape}, not one value for each of {frame.places} places")
        places = whole_array(array)
        if array.encoding is not None and array.encoding.kind == "nullable" and whole_array(array.beside[0]).any():
            raise DataError(f"array {name!r} has rows without a value", hint="fill them in, or use another array")
        cut = tuple(slice(0, n * s, s) for n, s in zip(frame.sample_shape, frame.strides, strict=True))
        parts.append(places[cut].reshape(-1))
    return np.concatenate(parts)


def whole_array(array: OpenArray) -> Values:
    """All that an array holds. Blocks: off the event loop."""
    layout, scratch = array.layout, Scratch()
    result = np.empty(layout.shape, dtype=layout.native)
    grid = [range(-(-s // c)) for s, c in zip(layout.shape, layout.chunk_shape, strict=True)]
    for chunk in itertools.product(*grid):
        box = layout.box(chunk)
        place = tuple(slice(a, b) for a, b in box)
        data = array.reader.read(chunk, (0, layout.chunk_shape[0]), scratch)
        inside = tuple(slice(0, b - a) for a, b in box)
        result[place] = layout.fill_value if data is None else data[inside]
    return result
