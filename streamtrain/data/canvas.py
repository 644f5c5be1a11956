"""Where predictions belong: which places of the source's axes the output of one sample covers. Pure.

Its law: the geometry is the stream's own, read backwards, as `locating` reads numbers; what an output is an output of
is told by its shape alone, targets before inputs, and what fits nothing has a row for each sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from streamtrain.data.cropping import CropSite
from streamtrain.data.feed import Site
from streamtrain.data.framing import Frame
from streamtrain.data.layout import ArrayLayout
from streamtrain.data.opening import Located
from streamtrain.data.permutation import Ints
from streamtrain.data.ragged_site import RaggedSite
from streamtrain.data.values import Normalization
from streamtrain.data.windows import Reach, ReachingSite
from streamtrain.errors import ConfigError

Shape = tuple[int, ...]
Column = int | None
"""Which axis of an array an axis of an output is; None: none of them."""


NOWHERE = Reach(None)
"""Of an axis along which no sample moves, or of no array's."""


@dataclass(frozen=True)
class Part:
    """One array of a batch, as it lies in the first store."""

    layout: ArrayLayout
    site: Site
    normal: Normalization | None
    target: bool

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """What a sample covers along each sample axis."""
        if isinstance(self.site, ReachingSite):
            return self.site.reaches
        return tuple(map(Reach, self.site.sample_axes))

    def dim(self, axis: int | None) -> str | None:
        """The name of an axis of it."""
        return self.layout.dims[axis] if axis is not None and self.layout.dims else None


@dataclass(frozen=True)
class Ground:
    """What the numbers of a stream's samples stand for."""

    parts: tuple[Part, ...]
    frames: tuple[Frame, ...]
    """One for each store; at least one."""
    where: tuple[Located, ...]
    """The stores, whose coordinates are copied."""
    ordered: bool
    """Whether the numbers of an epoch ascend, but for those of one layer of cells along the first sample axis."""
    memory: int
    """Bytes of the stream's budget."""
    timeout: float
    """Seconds until reading a coordinate counts as hung."""
    retries: int


@dataclass(frozen=True)
class Axis:
    """One axis of an array of predictions."""

    dim: str | None
    """Its name in the source; None where it is no axis of it."""
    length: int
    sample: int | None = None
    """The sample axis that moves along it; None: each sample covers all of it."""
    reach: Reach = NOWHERE
    """What a sample covers of it, if one moves along it."""
    beside: str = ""
    """The array that has it in the source, whose coordinate is copied."""
    full: int = 0
    """Its length there, in the first store."""
    taken: slice | Ints = field(default_factory=lambda: slice(None))
    """The places of it that stand here."""

    @property
    def extent(self) -> int:
        """Places that one sample covers."""
        return self.length if self.sample is None else self.reach.length or 1

    @property
    def overlaps(self) -> bool:
        """Whether samples next to each other share places."""
        return self.sample is not None and self.reach.stride < (self.reach.length or 1)


@dataclass(frozen=True)
class Canvas:
    """How the outputs of one shape lie in the array that is written; samples move along its first axis."""

    axes: tuple[Axis, ...]
    order: tuple[int, ...]
    """The axes of an output in the order in which they stand here; the others are those of one place."""
    like: Part | None = None
    """The array whose samples have this shape (`same_shape`): attributes and figures are its."""
    stitched: bool = False
    """Whether samples cover more than a place each."""
    numbered: bool = False
    """Whether there is a row for each sample, because it fits no array."""
    frames: tuple[Frame, ...] = ()
    """Empty: sample number n is place n."""
    bases: Shape = (0,)
    """Where the samples of each store begin along the first axis."""

    @property
    def shape(self) -> Shape:
        return tuple(axis.length for axis in self.axes)

    @property
    def extent(self) -> Shape:
        """What one sample covers."""
        return tuple(axis.extent for axis in self.axes)

    @property
    def blends(self) -> bool:
        """Whether samples share places, so that a mean of them stands there."""
        return any(axis.overlaps for axis in self.axes)

    def spread(self, outputs: Any) -> Any:
        """Outputs (B, ...) as (B, *extent)."""
        return outputs.transpose(0, *(1 + axis for axis in self.order)).reshape(len(outputs), *self.extent)

    def starts(self, numbers: Ints) -> Ints:
        """The first place of these samples along each axis: (n, axes)."""
        result = np.zeros((len(numbers), len(self.axes)), dtype=np.int64)
        if not self.frames:
            result[:, 0] = numbers
            return result
        firsts = np.cumsum([0, *(math.prod(frame.sample_shape) for frame in self.frames)])
        stores = np.searchsorted(firsts, numbers, side="right") - 1
        for store in np.unique(stores).tolist():
            mine = np.flatnonzero(stores == store)
            places = np.unravel_index(numbers[mine] - firsts[store], self.frames[store].sample_shape)
            for number, axis in enumerate(self.axes):
                if axis.sample is not None:
                    base = self.bases[store] if axis.sample == 0 else 0
                    result[mine, number] = places[axis.sample] * axis.reach.stride + axis.reach.offset + base
        return result

    def frontier(self, number: int) -> int:
        """The place along the first axis before which no sample lies that comes after this one, where numbers ascend
        but for those of one layer of cells."""
        if not self.frames:
            return number + 1
        first, reach = 0, self.axes[0].reach
        for frame, base in zip(self.frames, self.bases, strict=True):
            count = math.prod(frame.sample_shape)
            if number < first + count:
                along = (number - first) // math.prod(frame.sample_shape[1:])
                return int(along // frame.cell[0] * frame.cell[0] * reach.stride + reach.offset + base)
            first += count
        return self.axes[0].length

    @property
    def layer(self) -> int:
        """Places along the first axis that are open at once, where numbers ascend so."""
        if not self.frames:
            return 1
        reach = self.axes[0].reach
        return max(frame.cell[0] for frame in self.frames) * reach.stride + (reach.length or 1)


def rows(shape: Shape, length: int) -> Canvas:
    """Of a source that tells nothing of itself: a row for each sample."""
    axes = (
        Axis(
            None,
            length,
            sample=0,
        ),
        *(Axis(None, size) for size in shape),
    )
    return Canvas(axes, tuple(range(len(shape))))


def canvas_of(shape: Shape, ground: Ground, name: str = "") -> Canvas:
    """Where outputs of this shape lie; `name`: the array that they are named after, if they are.

    Raises ConfigError where the stores have other lengths along the other axes that number samples.
    """
    for part in _candidates(shape, ground.parts, name):
        columns = _matching(shape, part)
        if columns is not None:
            return _placed(shape, columns, part, ground)
    return _numbered(shape, ground)


def same_shape(shape: Shape, parts: Sequence[Part], name: str = "") -> Part | None:
    """The array whose samples have this shape, if that is but one: a target; an input where there is no target. Of
    none with it, one whose shape differs by axes of length 1 alone, beside which the short losses put outputs too."""
    supervised = any(part.target for part in parts)
    able = [part for part in parts if part.target == supervised]
    found = [part for part in able if part.site.row_shape == shape]
    found = found or [part for part in able if _squeezed(part.site.row_shape) == _squeezed(shape)]
    named = [part for part in found if part.layout.name == name]
    only = named or found
    return only[0] if len(only) == 1 else None


def _squeezed(shape: Shape) -> Shape:
    return tuple(length for length in shape if length != 1)


def _candidates(shape: Shape, parts: Sequence[Part], name: str) -> list[Part]:
    """The arrays that it may be like, the best first."""
    supervised = any(part.target for part in parts)
    fit = [
        part
        for part in parts
        if not isinstance(part.site, RaggedSite)
        and all(reach.axis is not None for reach in part.reaches)
        and (part.target or not supervised or any(reach.length for reach in part.reaches))
    ]
    return sorted(fit, key=lambda p: (p.layout.name != name, not p.target, p.site.row_shape != shape))


def _matching(shape: Shape, part: Part) -> list[Column] | None:
    """Which axes of the array those of an output are; None where it is none of that array.

    The same number of axes, of the same lengths where windows lie; or more of them before or behind (channels).
    """
    own, axes = part.site.row_shape, part.site.row_axes
    fixed = [any(reach.axis == axis and reach.length for reach in part.reaches) for axis in axes]
    more = len(shape) - len(own)
    if more < 0:
        return None
    if not more:
        pairs = list(zip(shape, own, fixed, axes, strict=True))
        if any(there and size != length for size, length, there, _ in pairs):
            return None
        return [axis if size == length else None for size, length, _, axis in pairs]
    if shape[more:] == own:
        return [*[None] * more, *axes]
    return [*axes, *[None] * more] if shape[: len(own)] == own else None


def _placed(shape: Shape, columns: Sequence[Column], part: Part, ground: Ground) -> Canvas:
    """In the places of the source."""
    frames, site = ground.frames, part.site
    _check_alike([frame.places for frame in frames])
    lengths = (sum(frame.places[0] for frame in frames), *frames[0].places[1:])
    along = {reach.axis: (k, reach) for k, reach in enumerate(part.reaches)}
    axes: list[Axis] = []
    order: list[Column] = []
    for axis, (k, reach) in along.items():
        if reach.length is None:
            axes.append(_of_source(part, axis, lengths[k], sample=k, reach=reach))
            order.append(None)
    for number, (size, column) in enumerate(zip(shape, columns, strict=True)):
        if column is None:
            axes.append(Axis(None, size))
        elif column in along:
            k, reach = along[column]
            axes.append(_of_source(part, column, lengths[k], sample=k, reach=reach))
        else:
            axes.append(replace(_of_source(part, column, size), taken=_taken(site, column)))
        order.append(number)
    first = next(number for number, axis in enumerate(axes) if axis.sample == 0)
    axes.insert(0, axes.pop(first))
    order.insert(0, order.pop(first))
    exact = same_shape(shape, ground.parts, part.layout.name) is part
    return Canvas(
        tuple(axes),
        tuple(number for number in order if number is not None),
        like=part if exact else None,
        stitched=any(reach.length for reach in part.reaches),
        frames=frames,
        bases=tuple(itertools.accumulate((frame.places[0] for frame in frames[:-1]), initial=0)),
    )


def _numbered(shape: Shape, ground: Ground) -> Canvas:
    """A row for each sample, at the coordinates where it begins."""
    frames, first = ground.frames, ground.parts[0]
    _check_alike([frame.sample_shape for frame in frames])
    lengths = (sum(frame.sample_shape[0] for frame in frames), *frames[0].sample_shape[1:])
    axes = []
    for k, (length, stride) in enumerate(zip(lengths, frames[0].strides, strict=True)):
        axis = None if isinstance(first.site, RaggedSite) else first.site.sample_axes[k]
        plain = Axis(None, length) if axis is None else _of_source(first, axis, length)
        taken = slice(0, frames[0].sample_shape[k] * stride, stride)
        axes.append(replace(plain, sample=k, reach=Reach(axis), taken=taken))
    bases = itertools.accumulate((frame.sample_shape[0] for frame in frames[:-1]), initial=0)
    others = tuple(Axis(None, size) for size in shape)
    return Canvas((*axes, *others), tuple(range(len(shape))), numbered=True, frames=frames, bases=tuple(bases))


def _of_source(part: Part, axis: int | None, length: int, **said: Any) -> Axis:
    assert axis is not None
    return Axis(part.dim(axis), length, beside=part.layout.name, full=part.layout.shape[axis], **said)


def _taken(site: Site, axis: int) -> slice | Ints:
    """The places of an axis that stand in each sample."""
    if isinstance(site, CropSite) and axis in site.cropped:
        crop = site.cropped[axis]
        low = crop.low + (crop.high - crop.low - crop.length) // 2
        return slice(low, low + crop.length)
    return site.taken.get(axis, slice(None))


def _check_alike(shapes: Sequence[Shape]) -> None:
    if len({shape[1:] for shape in shapes}) > 1:
        raise ConfigError(
            f"predict(out=...): the stores have other lengths along the axes that number samples: {shapes[:4]}",
            hint="predict each store into one of its own",
        )
