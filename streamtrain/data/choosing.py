"""What the user says of samples beyond a range: numbers, weights, groups; and the arrays that say it.

Its law: such an array is read once, whole, when the stream opens; an array along the sample axes has a value for each
place, and a window has that of its first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.cells import Cells
from streamtrain.data.chosen import Chosen, Floats, Weighted, balancing, part_by_group, part_of
from streamtrain.data.columns import Labels, whole
from streamtrain.data.framing import Frame
from streamtrain.data.opening import OpenArray
from streamtrain.data.permutation import Ints
from streamtrain.data.places import lying, parted, places_in_all
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


@dataclass(frozen=True)
class Picked:
    """The samples of a split."""

    numbers: Ints
    """In any order."""
    cut: int = 0
    """Samples that lie in the split's places, but not whole."""

    @property
    def run(self) -> tuple[int, int] | None:
        """The first and the one after the last, where they are all in between; else None."""
        if not len(self.numbers):
            return None
        lower, upper = int(self.numbers.min()), int(self.numbers.max()) + 1
        return (lower, upper) if upper - lower == len(self.numbers) else None


def pick(
    choice: Choice,
    values: Mapping[str, Values],
    grid: Cells,
    frames: Sequence[Frame],
    split: Sequence[float] | None,
    by: SplitBy,
    seed: int,
) -> Picked:
    """The samples of a split. `values`: one for each sample, by the name of their array.

    Raises ConfigError or DataError for what can't be.
    """
    try:
        if split is not None and frames[0].overlaps:
            picked = _parted(choice, frames, split, by, seed)
        else:
            picked = Picked(_divided(choice, values, grid, frames, split, by, seed))
    except ValueError as error:
        raise DataError(str(error), hint="split=(0.0, 0.9), or two numbers of chosen samples") from error
    if not len(picked.numbers):
        raise DataError(f"no samples are chosen (split {split})", hint="choose a wider split, or more of them")
    return picked


def _parted(choice: Choice, frames: Sequence[Frame], split: Sequence[float], by: SplitBy, seed: int) -> Picked:
    """Of samples that overlap: a split divides places, and has those that lie in its own whole."""
    if choice.indices is not None or choice.groups is not None:
        raise ConfigError(
            "a split of chosen windows that overlap would put the same places into both parts",
            hint="take a stride of at least what a sample covers, or leave split= out and choose the parts by indices=",
        )
    if by == "sample":
        raise ConfigError(
            f"split_by={by!r} of windows that overlap would put the same places into both parts",
            hint="split_by='range' or 'chunk', or a stride of at least what a sample covers",
        )
    lower, upper = split_bounds(split, places_in_all(frames))
    mine, cut = parted(frames, lower, upper, by, seed)
    return Picked(np.flatnonzero(mine).astype(np.int64), cut)


def _divided(
    choice: Choice,
    values: Mapping[str, Values],
    grid: Cells,
    frames: Sequence[Frame],
    split: Sequence[float] | None,
    by: SplitBy,
    seed: int,
) -> Ints:
    """Of samples that share no places: a split divides the chosen ones."""
    numbers, kept = _numbers(choice.indices, values, grid.num_samples), lying(frames)
    if kept is not None:
        numbers = numbers[kept[numbers]]
    lower, upper = split_bounds(split, len(numbers))
    if choice.groups is not None:
        return part_by_group(numbers, _there(choice.groups, values, numbers), lower, upper, seed)
    return part_of(numbers, grid, lower, upper, by, seed)


def draw(choice: Choice, values: Mapping[str, Values], grid: Cells, numbers: Ints, by: SplitBy) -> Draw:
    """These samples, weighted. Raises DataError for weights that can't be."""
    chosen = Chosen(grid, numbers, by)
    weights = _weights(choice, values, chosen.numbers, grid.num_samples)
    digest = hashlib.blake2b(numbers.tobytes(), digest_size=8)
    digest.update(b"" if weights is None else weights.tobytes())
    if weights is not None:  # by a power of two, which changes no draw, so that no sum of them overflows or is lost
        weights = np.ldexp(weights, -np.frexp(weights.max())[1])
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
        return balancing(_there(choice.balance, values, numbers))
    if choice.weights is None:
        return None
    if isinstance(choice.weights, str):
        _there(choice.weights, values, numbers)
    given = values[choice.weights] if isinstance(choice.weights, str) else choice.weights
    if len(given) != count:
        raise DataError(f"weights= has {len(given)} numbers for {count} samples")
    if given.dtype.kind not in "biuf":
        raise DataError(f"weights={choice.weights!r}: the array is {given.dtype}, no numbers")
    weights: Floats = given[numbers].astype(np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise DataError("weights= must be finite, not negative, and not all 0")
    return weights


def _there(name: str, values: Mapping[str, Values], numbers: Ints) -> Values:
    """The values of these samples. Raises DataError for one that has no category."""
    some = values[name][numbers]
    if np.ma.is_masked(some):
        which = int(np.flatnonzero(np.ma.getmaskarray(some))[0])
        raise DataError(
            f"array {name!r}: sample {numbers[which]} has no category (code {np.ma.getdata(some)[which]})",
            hint="leave such rows out: indices= takes sample numbers, or the name of a boolean array",
        )
    return np.asarray(some)


def read_values(arrays: Sequence[OpenArray | Labels], frames: Sequence[Frame], name: str) -> Values:
    """A value for each sample, store by store; codes that stand for no category are masked, since their samples may be
    left out. Blocks: off the event loop. Raises DataError."""
    parts = []
    for array, frame in zip(arrays, frames, strict=True):
        shape = array.shape if isinstance(array, Labels) else array.layout.shape
        if shape != frame.places:
            raise DataError(f"array {name!r} has shape {shape}, not one value for each of {frame.places} places")
        places = array.read() if isinstance(array, Labels) else _known(array, name)
        cut = tuple(slice(0, n * s, s) for n, s in zip(frame.sample_shape, frame.strides, strict=True))
        parts.append(places[cut].reshape(-1))
    join: Any = np.ma.concatenate if any(np.ma.is_masked(part) for part in parts) else np.concatenate
    return np.asanyarray(join(parts))


def _known(array: OpenArray, name: str) -> Values:
    """All values of an array of which none is missing, but for codes of no category, which are masked."""
    if array.encoding is not None and array.encoding.kind == "nullable" and whole(array.beside[0]).any():
        raise DataError(f"array {name!r} has rows without a value", hint="fill them in, or use another array")
    values = whole(array)
    if array.encoding is None or array.encoding.kind != "categorical":
        return values
    outside = (values < 0) | (values >= len(array.categories or ()))
    return np.ma.masked_array(values, outside) if outside.any() else values
