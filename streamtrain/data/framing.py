"""What a sample is: along which axes samples are numbered, and which places of each array one of them covers. Pure.

Its law: a sample belongs to a split only whole, whatever it looks ahead to included.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.cropping import CropSite
from streamtrain.data.crops import CropAt, Shift, axis_of, check_alike, crops_of, shift_along
from streamtrain.data.feed import Site
from streamtrain.data.layout import ArrayLayout, decoded_whole
from streamtrain.data.permutation import Ints
from streamtrain.data.ragged_site import RaggedArray, cell_rows
from streamtrain.data.selecting import Wanted
from streamtrain.data.windows import Reach, WindowSite
from streamtrain.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

LARGE_CHUNK = 64 << 20
RAW_CELL = 16 << 20
"""Uncompressed chunks above LARGE_CHUNK are shuffled in cells of this size, and windows in cells of at most this."""
SPANS = 4
"""A cell of windows covers at least so many spans of one, so that at most a quarter of what is read is read twice."""

Axis = int | str


@dataclass(frozen=True)
class Field:
    """One part of a batch: an array and the dtype that it is cast to."""

    name: str
    layout: ArrayLayout
    dtype: np.dtype[Any]
    target: bool = False
    ragged: RaggedArray | None = None
    """Set where its rows have different lengths: the layout is that of their elements."""


@dataclass(frozen=True)
class Framing:
    """What the user says of samples."""

    sample_axes: tuple[int, ...] = (0,)
    window: Mapping[Axis, int] = field(default_factory=dict)
    """Places that a sample covers along these axes, by number or name."""
    stride: int | Mapping[Axis, int] | None = None
    """Places from one sample to the next; None is 1 for windows over one axis, the window itself for patches."""
    horizon: int | None = None
    """Places from the window's last one to the target's first; None: targets cover the window itself."""
    target_window: int | None = None
    """Places of a target behind a horizon; None is one, whose axis is gone."""
    select: Mapping[Axis, Wanted] = field(default_factory=dict)
    """What is taken of some axes, as it was given."""
    taken: Mapping[Axis, Ints] = field(default_factory=dict)
    """The same as places, in their order: of one store."""
    crop: Mapping[Axis, int] = field(default_factory=dict)
    """Places in a row that are taken of some axes of a sample, others of each sample."""
    crop_at: CropAt = "random"
    jitter: int | Mapping[Axis, int] = 0
    """By how many places at most windows begin later."""

    @property
    def random(self) -> bool:
        """Whether an epoch's samples lie at other places than those of the one before."""
        return bool(self.jitter) or (bool(self.crop) and self.crop_at == "random")

    def fingerprint(self, select: Mapping[str, Any]) -> dict[str, Any]:
        """What of it is part of the order, JSON-able; `select` tells what is taken in all stores."""
        said: dict[str, Any] = {**select}
        if self.crop:
            said |= {"crop": {str(axis): length for axis, length in self.crop.items()}, "crop_at": self.crop_at}
        if self.jitter:
            said["jitter"] = _spelt(self.jitter)
        if self.plain:
            return {"sample_axes": list(self.sample_axes), **said}
        return {
            "sample_axes": list(self.sample_axes),
            "window": {str(axis): length for axis, length in self.window.items()},
            "stride": _spelt(self.stride),
            "horizon": self.horizon,
            "target_window": self.target_window,
            **said,
        }

    @property
    def plain(self) -> bool:
        """Whether each sample is one place along each sample axis."""
        return not self.window


def _spelt(given: int | Mapping[Axis, int] | None) -> int | dict[str, int] | None:
    """A number, or numbers by axis, as JSON."""
    return {str(axis): number for axis, number in given.items()} if isinstance(given, Mapping) else given


@dataclass(frozen=True)
class Frame:
    """How samples are numbered and lie in the arrays."""

    sample_shape: tuple[int, ...]
    """Samples along each sample axis."""
    cell: tuple[int, ...]
    """Samples of a cell along each."""
    sites: list[Site]
    """One for each field."""
    strides: tuple[int, ...]
    spans: tuple[int, ...]
    """Places that one sample covers along each sample axis, targets included."""
    places: tuple[int, ...]
    """The arrays' lengths along the sample axes."""
    jitters: tuple[int, ...]
    """By how many places a sample may begin later along each, where there are so many."""
    kept: tuple[NDArray[np.bool_] | None, ...]
    """Which places along each may be had; None: all."""

    @property
    def overlaps(self) -> bool:
        """Whether samples share places, so that a split must not cut between just any two."""
        return any(
            span + jitter > stride for span, stride, jitter in zip(self.spans, self.strides, self.jitters, strict=True)
        )

    @property
    def cut_out(self) -> bool:
        """Whether some places along a sample axis can't be had."""
        return any(kept is not None for kept in self.kept)

    def whole(self, start: int, stop: int) -> tuple[int, int]:
        """Numbers of the samples that lie whole between these places along the first sample axis."""
        step, span, each = self.strides[0], self.spans[0], math.prod(self.sample_shape[1:])
        if stop < self.places[0]:
            span += self.jitters[0]
        first = min(-(-start // step), self.sample_shape[0])
        last = min((stop - span) // step + 1, self.sample_shape[0]) if stop >= span else 0
        return first * each, max(first, last) * each


def take_frames(stores: Sequence[Sequence[Field]], framings: Sequence[Framing], names: Sequence[str]) -> list[Frame]:
    """One for each store, of these names; all must have samples of one kind. Raises DataError or ConfigError."""
    frames = []
    for fields, framing, name in zip(stores, framings, names, strict=True):
        try:
            frames.append(take_frame(fields, framing))
        except DataError as error:
            if len(stores) == 1:
                raise
            raise DataError(f"{name}: {error}", hint=error.hint) from error
    _say_paired(stores[0], framings[0])
    for number, (fields, frame) in enumerate(zip(stores, frames, strict=True)):
        for each, site, mine in zip(fields, frame.sites, frames[0].sites, strict=True):
            if site.row_shape != mine.row_shape or site.dtype != mine.dtype:
                raise DataError(
                    f"array {each.name!r} has samples of {mine.dtype}{list(mine.row_shape)} in the first store, of "
                    f"{site.dtype}{list(site.row_shape)} in store number {number + 1}",
                    hint="all stores of a dataset need the same; dtype= casts",
                )
    return frames


def whole(frames: Sequence[Frame], start: int, stop: int) -> tuple[int, int]:
    """Numbers of the samples that lie whole between these places of all stores in a row, along the first axis."""
    places = samples = 0
    first = last = -1
    for frame in frames:
        length = frame.places[0]
        lower, upper = frame.whole(max(start - places, 0), max(0, min(stop - places, length)))
        if lower < upper:
            first, last = samples + lower if first < 0 else first, samples + upper
        places += length
        samples += math.prod(frame.sample_shape)
    return max(first, 0), max(last, 0)


def take_frame(fields: Sequence[Field], framing: Framing) -> Frame:
    """Raises DataError or ConfigError where arrays and arguments do not fit together."""
    if any(each.ragged is not None for each in fields):
        return _ragged(fields, framing)
    _check_selected(fields, framing)
    if framing.plain:
        return _plain(fields, framing)
    axes, window = _axes(fields[0].layout, fields[0].name, framing)
    stride = _stride(fields[0], axes, window, framing.stride)
    own = [_own_axes(each, fields[0].layout, axes) for each in fields]
    places = _places(fields, own, axes)
    reaches = [
        tuple(_reach(each.target, ax, window.get(k), stride[k], framing) for ax, k in zip(mine, axes, strict=True))
        for each, mine in zip(fields, own, strict=True)
    ]
    spans = tuple(max(r[k].span for r in reaches) for k in range(len(axes)))
    steps = tuple(stride[axis] for axis in axes)
    shape = tuple((n - span) // step + 1 for n, span, step in zip(places, spans, steps, strict=True))
    if min(shape) < 1:
        short = next(k for k, count in enumerate(shape) if count < 1)
        raise DataError(
            f"a sample covers {spans[short]} places of axis {axes[short]}, and there are {places[short]}",
            hint="take a shorter window or horizon",
        )
    jitter = _stride(fields[0], axes, window, framing.jitter, "jitter", none=0)
    jitters = tuple(jitter[axis] for axis in axes)
    kept = _kept(fields, axes, places, framing.taken)
    shifts = tuple(map(shift_along, jitters, places, spans, kept))
    sites = _reaching(fields, framing, reaches, shifts, shape)
    reached = tuple(span + most for span, most in zip(spans, jitters, strict=True))
    cell = _window_cell(fields[0].layout, axes, shape, steps, reached, sites)
    return Frame(shape, cell, sites(cell), steps, spans, places, jitters, kept)


def _reaching(
    fields: Sequence[Field],
    framing: Framing,
    reaches: Sequence[tuple[Reach, ...]],
    shifts: tuple[Shift, ...],
    shape: tuple[int, ...],
) -> Callable[[tuple[int, ...]], list[Site]]:
    """What makes the sites of cells of a given size."""
    first = fields[0].layout
    crops = [
        crops_of(f.layout, first, framing.crop, framing.crop_at, framing.taken, [reach.axis for reach in mine])
        for f, mine in zip(fields, reaches, strict=True)
    ]
    check_alike([(f.name, mine) for f, mine in zip(fields, crops, strict=True)], framing.crop)
    own = [tuple(r.axis for r in mine if r.axis is not None) for mine in reaches]
    uncropped = {axis: places for axis, places in framing.taken.items() if not _among(axis, framing.crop, first)}
    taken = [_selection(each, first, mine, uncropped) for each, mine in zip(fields, own, strict=True)]

    def sites(cell: tuple[int, ...]) -> list[Site]:
        if not framing.crop and not framing.jitter:
            return [
                WindowSite(each.layout, axes, cell, each.dtype, places, mine)
                for each, axes, places, mine in zip(fields, own, taken, reaches, strict=True)
            ]
        return [
            CropSite(each.layout, axes, cell, each.dtype, places, mine, crop, shifts, shape)
            for each, axes, places, mine, crop in zip(fields, own, taken, reaches, crops, strict=True)
        ]

    return sites


def _among(axis: Axis, others: Mapping[Axis, int], first: ArrayLayout) -> bool:
    """Whether an axis is one of these, by number or name."""
    return axis in others or axis_of(axis, first, first) in {axis_of(other, first, first) for other in others}


def row_axes_of(fields: Sequence[Field], framing: Framing) -> list[tuple[int, ...]]:
    """The axes of one sample of each array."""
    _check_rows(fields, framing)
    if framing.plain:
        numbered = _numbered(fields, framing.sample_axes)
        return [tuple(a for a in range(f.layout.ndim) if a not in own) for f, own in zip(fields, numbered, strict=True)]
    axes, window = _axes(fields[0].layout, fields[0].name, framing)
    found = []
    for each in fields:
        own = _own_axes(each, fields[0].layout, axes)
        reaches = [
            _reach(each.target, mine, window.get(axis), 1, framing) for mine, axis in zip(own, axes, strict=True)
        ]
        gone = {reach.axis for reach in reaches if reach.length is None}
        found.append(tuple(a for a in range(each.layout.ndim) if a not in gone))
    return found


def _plain(fields: Sequence[Field], framing: Framing) -> Frame:
    axes = framing.sample_axes
    own = _numbered(fields, axes)
    by_number = [list(axes) == mine for mine in own]
    shape = sample_shape({each.name: each.layout for each, rows in zip(fields, by_number, strict=True) if rows}, axes)
    _places(fields, own, axes)
    cell = cell_shape(fields[0].layout, axes)
    ones = (1,) * len(axes)
    zeros = (0,) * len(axes)
    kept = _kept(fields, axes, shape, framing.taken)
    if framing.crop:
        still = (Shift(),) * len(axes)
        make = _reaching(fields, framing, [tuple(map(Reach, mine)) for mine in own], still, shape)
        cell = _bounded(cell, make)
        return Frame(shape, cell, make(cell), ones, ones, shape, zeros, kept)

    def sites(cell: tuple[int, ...]) -> list[Site]:
        first = fields[0].layout
        made: list[Site] = []
        for each, mine, rows in zip(fields, own, by_number, strict=True):
            numbered = tuple(axis for axis in mine if axis is not None)
            taken = _selection(each, first, numbered, framing.taken)
            if rows:
                made.append(Site(each.layout, numbered, cell, each.dtype, taken))
            else:  # by the axes' names: as beside windows, of one place
                made.append(WindowSite(each.layout, numbered, cell, each.dtype, taken, tuple(map(Reach, mine))))
        return made

    if not all(by_number):
        cell = _bounded(cell, sites)
    return Frame(shape, cell, sites(cell), ones, ones, shape, zeros, kept)


def _numbered(fields: Sequence[Field], axes: Sequence[int]) -> list[list[int | None]]:
    """Each array's axes that number samples of one place each: the same numbers as the first one's. But where one of
    them is, by its name, another axis of the first, names decide, and an array that has no such axis has None (as one
    that has no axes at all has in any case)."""
    names = fields[0].layout.dims
    found: list[list[int | None]] = [[None] * len(axes) if _scalar(each, fields) else list(axes) for each in fields]
    if not all(names) or max(axes) >= len(names) or any(each.ragged is not None for each in fields):
        return found
    wanted = [names[axis] for axis in axes]
    for number, each in enumerate(fields):
        mine = each.layout.dims
        there = [mine[axis] if axis < len(mine) else name for axis, name in zip(axes, wanted, strict=True)]
        if all(mine) and any(own != name and own in names for own, name in zip(there, wanted, strict=True)):
            found[number] = [mine.index(name) if name in mine else None for name in wanted]
    return found


def _scalar(each: Field, fields: Sequence[Field]) -> bool:
    """Whether an array has no axes, beside a first one that has: it is the same for all samples."""
    return each.layout.ndim == 0 and fields[0].layout.ndim > 0


def _say_paired(fields: Sequence[Field], framing: Framing) -> None:
    """Tell which arrays are paired row by row though their axes are named otherwise."""
    first, axes = fields[0], framing.sample_axes
    if not framing.plain or not all(first.layout.dims) or any(each.ragged is not None for each in fields):
        return
    for each, own in zip(fields, _numbered(fields, axes), strict=True):
        mine = each.layout.dims
        if own != list(axes) or not mine or not all(mine):
            continue
        for axis in axes:
            if first.layout.dims and mine[axis] != first.layout.dims[axis]:
                logger.warning(
                    "array %r is paired with %r row by row, though its axis %d is named %r and not %r",
                    each.name,
                    first.name,
                    axis,
                    mine[axis],
                    first.layout.dims[axis],
                )


def _check_rows(fields: Sequence[Field], framing: Framing) -> None:
    """Where rows have different lengths, they are the samples."""
    first = next((each for each in fields if each.ragged is not None), None)
    if first is not None and (not framing.plain or framing.crop or framing.sample_axes != (0,)):
        raise ConfigError(
            f"array {first.name!r} has rows of different lengths: its samples are those rows",
            hint="leave window=, crop= and sample_axes= out",
        )


def _ragged(fields: Sequence[Field], framing: Framing) -> Frame:
    """Rows of different lengths, perhaps beside others: cells are so many rows, by the first such array."""
    first = next(each for each in fields if each.ragged is not None)
    _check_rows(fields, framing)
    layouts = {f.name: replace(f.layout, shape=(f.ragged.table.rows,)) if f.ragged else f.layout for f in fields}
    [rows] = sample_shape({name: layout for name, layout in layouts.items() if layout.ndim}, (0,))
    if any(axis == 0 or any(f.layout.dims[:1] == (axis,) for f in fields) for axis in framing.select):
        raise ConfigError(
            f"select= along the axis that numbers the rows of {first.name!r}, which have different lengths",
            hint="indices= takes some of the rows",
        )
    _check_selected(fields, framing)
    assert first.ragged is not None
    cell = (cell_rows(first.layout, first.ragged.columns, rows),)
    sites: list[Site] = []
    for each in fields:
        taken = _selection(each, first.layout, (0,), framing.taken)
        if each.layout.ndim == 0:
            sites.append(WindowSite(each.layout, (), cell, each.dtype, (), (Reach(None),)))
        elif each.ragged is None:
            sites.append(Site(each.layout, (0,), cell, each.dtype, taken))
        else:
            sites.append(each.ragged.site(each.layout, cell, each.dtype, taken))
    return Frame((rows,), cell, sites, (1,), (1,), (rows,), (0,), (None,))


def _selection(
    each: Field, first: ArrayLayout, sampled: Sequence[int], taken: Mapping[Axis, Ints]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """What is taken of this array's own axes, those that number samples left out."""
    found = []
    for axis, places in taken.items():
        number = axis_of(axis, each.layout, first)
        if number is None or number in sampled:
            continue
        length = each.layout.shape[number]
        if len(places) and int(places.max()) >= length:
            raise DataError(
                f"select= takes place {int(places.max())} of axis {axis!r}; array {each.name!r} has {length} there"
            )
        found.append((number, tuple(places.tolist())))
    return tuple(found)


def _check_selected(fields: Sequence[Field], framing: Framing) -> None:
    """Raise DataError where an axis of one sample, by its number, has other lengths in arrays that no names tell
    apart."""
    first = fields[0].layout
    for axis in framing.select:
        if not isinstance(axis, int) or axis in framing.sample_axes:
            continue
        named = axis < len(first.dims) and first.dims[axis] is not None
        known: dict[int, str] = {}
        for each in fields:
            mine = each.layout
            if axis >= mine.ndim or (mine is not first and named and mine.dims and all(mine.dims)):
                continue
            known.setdefault(mine.shape[axis], each.name)
        if len(known) > 1:
            (length, one), (other_length, other) = list(known.items())[:2]
            raise DataError(
                f"select= along axis {axis}: array {one!r} has {length} places there, {other!r} {other_length}, and "
                "the same are taken of both",
                hint="name the arrays' dimensions: of one without the axis all is taken then",
            )


def _kept(
    fields: Sequence[Field], axes: tuple[int, ...], lengths: tuple[int, ...], taken: Mapping[Axis, Ints]
) -> tuple[NDArray[np.bool_] | None, ...]:
    """Which places along each sample axis are taken."""
    first = fields[0].layout
    by_number = {axis_of(axis, first, first): places for axis, places in taken.items()}
    return tuple(
        np.bincount(by_number[axis], minlength=length).astype(bool) if axis in by_number else None
        for axis, length in zip(axes, lengths, strict=True)
    )


def sample_axes_of(fields: Sequence[Field], framing: Framing) -> tuple[int, ...]:
    """The axes of the first array along which samples are numbered."""
    return framing.sample_axes if framing.plain else _axes(fields[0].layout, fields[0].name, framing)[0]


def _axes(layout: ArrayLayout, name: str, framing: Framing) -> tuple[tuple[int, ...], dict[int, int]]:
    """The sample axes of the first array, and the window's length along some of them."""
    window = {_axis(axis, layout, name, "window"): length for axis, length in framing.window.items()}
    named = framing.sample_axes
    axes = tuple(sorted({*named, *window}))
    if list(named) != sorted(named):  # an order of its own, which windows keep
        axes = (*named, *(axis for axis in axes if axis not in named))
    if max(axes) >= layout.ndim:
        raise DataError(
            f"array {name!r} has shape {layout.shape}: no axis {max(axes)} for sample_axes={framing.sample_axes}",
            hint="choose axes that all arrays have",
        )
    if framing.horizon is not None and len(window) != 1:
        raise ConfigError("horizon= needs a window over one axis", hint="for example window={'time': 24}, horizon=1")
    return axes, window


def _axis(axis: Axis, layout: ArrayLayout, name: str, what: str) -> int:
    """The number of an axis that was given by number or name."""
    if isinstance(axis, str):
        if axis in layout.dims:
            return layout.dims.index(axis)
        there = ", ".join(repr(dim) for dim in layout.dims if dim) or "none: its axes have no names"
        raise DataError(f"{what}= names the axis {axis!r}; array {name!r} has {there}", hint="give the axis' number")
    if not 0 <= axis < layout.ndim:
        raise DataError(f"{what}= names axis {axis}; array {name!r} has shape {layout.shape}")
    return axis


def _stride(
    first: Field,
    axes: tuple[int, ...],
    window: dict[int, int],
    given: int | Mapping[Axis, int] | None,
    what: str = "stride",
    *,
    none: int = 1,
) -> dict[int, int]:
    """Places by sample axis; where nothing is said, a stride is the patch's own along its axes, all else `none`."""
    if isinstance(given, int):
        return {axis: given if axis in window else none for axis in axes}
    steps = {_axis(axis, first.layout, first.name, what): step for axis, step in (given or {}).items()}
    if unknown := sorted(steps.keys() - set(axes)):
        raise ConfigError(f"{what}= names axis {unknown[0]}, along which samples are not numbered")
    patch = window if what == "stride" and len(window) > 1 else {}
    return {axis: steps.get(axis, patch.get(axis, none)) for axis in axes}


def _own_axes(each: Field, first: ArrayLayout, axes: tuple[int, ...]) -> list[int | None]:
    """This array's own numbers of the first one's axes: by name where both name them, None where it has no such."""
    layout = each.layout
    if layout.ndim == 0:
        return [None] * len(axes)
    names = [first.dims[axis] if first.dims else None for axis in axes]
    if all(names) and layout.dims and all(layout.dims):
        return [layout.dims.index(name) if name in layout.dims else None for name in names]
    if max(axes) >= layout.ndim:
        raise DataError(
            f"array {each.name!r} has shape {layout.shape}: no axis {max(axes)}",
            hint="name the arrays' dimensions, so that one that has no such axis can stand beside the others",
        )
    return list(axes)


def _places(fields: Sequence[Field], own: Sequence[Sequence[int | None]], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths along the sample axes, in which all arrays that have them agree."""
    lengths: list[int] = []
    for k, axis in enumerate(axes):
        table = {f.name: f.layout.shape[a] for f, mine in zip(fields, own, strict=True) if (a := mine[k]) is not None}
        if len(set(table.values())) > 1:
            text = ", ".join(f"{name}: {length}" for name, length in table.items())
            raise DataError(f"arrays differ in their lengths along axis {axis}: {text}", hint="all need the same")
        lengths.append(next(iter(table.values())))
    return tuple(lengths)


def _reach(target: bool, axis: int | None, length: int | None, stride: int, framing: Framing) -> Reach:
    if length is None or not target or framing.horizon is None:
        return Reach(axis, stride, 0, length)
    return Reach(axis, stride, length - 1 + framing.horizon, framing.target_window)


def _window_cell(
    layout: ArrayLayout,
    axes: tuple[int, ...],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    spans: tuple[int, ...],
    sites: Callable[[tuple[int, ...]], list[Site]],
) -> tuple[int, ...]:
    """Samples of a cell: whole chunks that make up several spans, but no more than RAW_CELL bytes of samples."""
    cell: list[int] = []
    for axis, count, stride, span in zip(axes, shape, strides, spans, strict=True):
        chunk = min(layout.chunk_shape[axis], layout.shape[axis])
        wanted = chunk if span <= stride else -(-max(chunk, SPANS * span) // chunk) * chunk
        cell.append(max(1, min(count, wanted // stride)))
    return _bounded(tuple(cell), sites)


def _bounded(given: tuple[int, ...], sites: Callable[[tuple[int, ...]], list[Site]]) -> tuple[int, ...]:
    """A cell with no more than RAW_CELL bytes of samples, unless one sample is larger."""
    cell = list(given)

    def size() -> int:
        return math.prod(cell) * sum(site.row_bytes for site in sites(tuple(cell)))

    while size() > RAW_CELL and max(cell) > 1:
        longest = cell.index(max(cell))
        cell[longest] = -(-cell[longest] // 2)
    return tuple(cell)


def sample_shape(layouts: Mapping[str, ArrayLayout], axes: Sequence[int]) -> tuple[int, ...]:
    """The lengths of the sample axes, which all arrays must share."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layout in layouts.items():
        if max(axes) >= layout.ndim:
            raise DataError(
                f"array {name!r} has shape {layout.shape}: no axis {max(axes)} for sample_axes={tuple(axes)}",
                hint="choose axes that all arrays have; the first one named must have them"
                if not layout.ndim
                else "choose axes that all arrays have",
            )
        shapes[name] = tuple(layout.shape[a] for a in axes)
    first = next(iter(shapes.values()))
    if any(shape != first for shape in shapes.values()):
        table = ", ".join(f"{name}: {' x '.join(map(str, shape))}" for name, shape in shapes.items())
        raise DataError(
            f"arrays differ in their numbers of samples: {table}",
            hint="all need the same; one without the sample axis is the same for all samples where the names of its "
            "dimensions say so",
        )
    if 0 in first:
        raise DataError(
            f"arrays {', '.join(map(repr, shapes))} have 0 samples", hint="nothing to train on: fill or leave it out"
        )
    return first


def cell_shape(layout: ArrayLayout, axes: Sequence[int]) -> tuple[int, ...]:
    """Samples of a cell along each sample axis: those of a chunk; fewer of very large uncompressed ones."""
    cell = [min(layout.chunk_shape[a], layout.shape[a]) for a in axes]
    if layout.chunk_bytes > LARGE_CHUNK and not decoded_whole(layout) and layout.slow is None:
        cell[0] = max(1, cell[0] // -(-layout.chunk_bytes // RAW_CELL))
    return tuple(cell)
