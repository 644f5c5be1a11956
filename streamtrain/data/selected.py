"""What `select=` comes to in each store: places of its arrays' axes, by position or by its own coordinates. Pure."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamtrain.data.crops import Axis, axis_of
from streamtrain.data.framing import Field, Framing, sample_axes_of
from streamtrain.data.permutation import Ints
from streamtrain.data.selecting import Coordinate, Wanted, missing_error, places_of
from streamtrain.errors import ConfigError, DataError

SHOWN = 24
"""Places that a position shows; more of them, or those of several stores, as a digest."""


def resolved(
    framing: Framing, stores: Sequence[Sequence[Field]], coordinates: Sequence[Mapping[str, Coordinate]]
) -> list[Framing]:
    """The framing of each store, its selection as places. Raises DataError or ConfigError for what can't be."""
    check_named_once(framing.select, stores[0])
    _check_sparse(framing.select, stores[0])
    taken: list[dict[Axis, Ints]] = [{} for _ in stores]
    for axis, wanted in framing.select.items():
        for mine, places in zip(taken, _resolved(axis, wanted, framing, stores, coordinates), strict=True):
            mine[axis] = places
    return [replace(framing, taken=mine) for mine in taken]


def check_named_once(axes: Iterable[Axis], fields: Sequence[Field]) -> None:
    """Raise ConfigError where two of these axes, a number and a name perhaps, are one."""
    first = fields[0].layout
    for one, other in itertools.combinations(axes, 2):
        for each in fields:
            number = axis_of(one, each.layout, first)
            if number is not None and number == axis_of(other, each.layout, first):
                raise ConfigError(f"select= names one axis of {each.name!r} twice: {one!r} and {other!r}")


def _resolved(
    axis: Axis,
    wanted: Wanted,
    framing: Framing,
    stores: Sequence[Sequence[Field]],
    coordinates: Sequence[Mapping[str, Coordinate]],
) -> list[Ints]:
    axes = [_axis(axis, fields) for fields in stores]
    sampled = [number in sample_axes_of(fields, framing) for (number, _), fields in zip(axes, stores, strict=True)]
    along = [(length, known.get(str(axis))) for (_, length), known in zip(axes, coordinates, strict=True)]
    found: list[Ints] = []
    nowhere: set[Any] | None = None
    taken = places_of(axis, wanted, along, anywhere=all(sampled))
    for (places, missing), cut_out, known in zip(taken, sampled, coordinates, strict=True):
        if missing and not cut_out:
            raise missing_error(axis, missing, known[str(axis)])
        if not len(places) and not cut_out:
            raise DataError(f"select= takes nothing of axis {axis!r}: {wanted}", hint="choose a wider range")
        nowhere = {*missing} if nowhere is None else nowhere & {*missing}
        found.append(places)
    if nowhere:
        raise missing_error(axis, sorted(nowhere), coordinates[0][str(axis)])
    return found


def _axis(axis: Axis, fields: Sequence[Field]) -> tuple[int | None, int]:
    """The first array's number of an axis, None where it has no such, and its length. Raises DataError for none."""
    first = fields[0].layout
    for each in fields:
        number = axis_of(axis, each.layout, first)
        if number is not None:
            return (number if each is fields[0] else None), each.layout.shape[number]
    if isinstance(axis, int):
        shapes = ", ".join(f"array {each.name!r} has shape {each.layout.shape}" for each in fields)
        raise DataError(f"select= names axis {axis}; {shapes}", hint="axes are numbered from 0")
    there = ", ".join(dict.fromkeys(repr(dim) for f in fields for dim in f.layout.dims if dim)) or "no names"
    raise DataError(f"select= names the axis {axis!r}; the arrays' axes have {there}", hint="or give the axis' number")


def _check_sparse(axes: Iterable[Axis], fields: Sequence[Field]) -> None:
    """Raise ConfigError for columns of sparse rows, which are no axis of what is stored."""
    sparse = next((each.name for each in fields if each.ragged is not None and each.ragged.columns is not None), None)
    known = {dim for each in fields for dim in each.layout.dims}
    for axis in axes:
        if sparse is not None and axis != 0 and axis not in known:
            raise ConfigError(
                f"select= names the axis {axis!r}: columns of the sparse rows of {sparse!r} can't be selected",
                hint="take them in a transform (batch.inputs[:, columns]), or write the array again without the others",
            )


def told(framings: Sequence[Framing]) -> dict[str, Any]:
    """What a position says of it, JSON-able; nothing where nothing is selected."""
    if not framings[0].taken:
        return {}
    if len(framings) == 1 and sum(map(len, framings[0].taken.values())) <= SHOWN:
        return {"select": {str(axis): places.tolist() for axis, places in framings[0].taken.items()}}
    digest = hashlib.blake2b(digest_size=8)
    for framing in framings:
        for axis, places in framing.taken.items():
            digest.update(f"/{axis}/{len(places)}/".encode())
            digest.update(places.astype("<i8").tobytes())
    return {"select": f"digest {digest.hexdigest()}"}


def named(framing: Framing) -> list[str]:
    """The axes whose coordinates must be known."""
    return [axis for axis in framing.select if isinstance(axis, str)]
