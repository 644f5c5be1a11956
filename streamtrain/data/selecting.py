"""Places of an axis that the user chose: by position, or by the values of a coordinate. Pure.

Its law: one spelling has one meaning. An axis by number takes positions; an axis by name takes values of the coordinate
array of that name: numbers exactly, ranges with both ends. Whole numbers in a list may be either, and where both can be
meant and differ, that is an error that names both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.data.crops import Axis
from streamtrain.data.permutation import Ints
from streamtrain.data.times import is_time, moment, period
from streamtrain.errors import ConfigError, DataError

SHOWN = 8
"""Values that a message shows."""


@dataclass(frozen=True)
class Between:
    """A slice as it was given: of positions up to before `stop`, of values with both ends."""

    start: Any = None
    stop: Any = None
    step: int | None = None

    def __str__(self) -> str:
        parts = (self.start, self.stop) if self.step is None else (self.start, self.stop, self.step)
        return f"slice({', '.join(map(repr, parts))})"


Wanted = Between | tuple[Any, ...]
"""A slice, or values (or positions) in the order in which they are taken."""


@dataclass(frozen=True)
class Coordinate:
    """The values along an axis: numbers, times (datetime64) or texts."""

    name: str
    values: NDArray[Any]

    @property
    def kind(self) -> str:
        """`numbers`, `times` or `texts`."""
        return {"M": "times", "U": "texts", "T": "texts", "S": "texts", "O": "texts"}.get(
            self.values.dtype.kind, "numbers"
        )


def wanted_of(axis: Axis, given: object) -> Wanted:
    """What was given for one axis, checked as far as it goes without data. Raises ConfigError."""
    name = f"select[{axis!r}]"
    if isinstance(given, Mapping):
        if not given or not given.keys() <= {"start", "stop", "step"}:
            raise ConfigError(f"{name} must have start, stop and step alone, not {', '.join(map(str, given))}")
        given = slice(given.get("start"), given.get("stop"), given.get("step"))
    if isinstance(given, slice):
        step = given.step
        if step is not None and (isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 1):
            raise ConfigError(f"{name}: the step of a slice must be a whole number of at least 1, not {step!r}")
        return Between(_plain(name, given.start), _plain(name, given.stop), None if step is None else int(step))
    if isinstance(given, str) or not isinstance(given, list | tuple | range | np.ndarray):
        if isinstance(given, str) and is_time(given):
            return Between(given, given)
        given = [given]
    if not len(given):
        raise ConfigError(f"{name} takes nothing", hint="give places such as [0, 3], values, or a slice of them")
    found = tuple(_plain(name, value) for value in given)
    if None in found or len({_sort(value) for value in found}) > 1:
        raise ConfigError(
            f"{name} must be places such as [0, 3], values of a coordinate, or a slice, not {_shown(found)}"
        )
    return found


def _sort(value: object) -> str:
    return "number" if isinstance(value, int | float) else "time" if not isinstance(value, str) else "text"


def _plain(name: str, value: object) -> Any:
    """A number, text or time; numpy's numbers as Python's."""
    if isinstance(value, np.bool_ | bool):
        raise ConfigError(f"{name} must be places or values, not {value!r}", hint="indices= takes a boolean array")
    if isinstance(value, np.integer | np.floating | np.str_):
        value = value.item()
    if value is None or isinstance(value, int | float | str) or is_time(value):
        return value
    raise ConfigError(f"{name} must be places such as [0, 3] or values of a coordinate, not {value!r}")


Along = tuple[int, Coordinate | None]
"""An axis of one store: its length, and its coordinate where it has one."""
Found = tuple[Ints, tuple[Any, ...]]
"""The places that are taken of it, and which of the values are not there."""


def places_of(axis: Axis, wanted: Wanted, stores: Sequence[Along], *, anywhere: bool = False) -> list[Found]:
    """What is taken of an axis in each store. `anywhere`: a value need only be in one of them.

    Raises DataError or ConfigError where what is wanted can't be, or can't be told.
    """
    if isinstance(axis, str):
        for length, coordinate in stores:
            if coordinate is not None and len(coordinate.values) != length:
                raise DataError(
                    f"select= by {axis!r}: the coordinate array has {len(coordinate.values)} values for {length} "
                    "places",
                    hint="take places by the axis' number",
                )
        if not isinstance(wanted, Between) and all(isinstance(value, int) for value in wanted):
            return _whole_numbers(axis, wanted, stores, anywhere)
    return [_in_one(axis, wanted, length, coordinate) for length, coordinate in stores]


def _in_one(axis: Axis, wanted: Wanted, length: int, coordinate: Coordinate | None) -> Found:
    if isinstance(axis, int) or coordinate is None:
        return _positions(axis, wanted, length), ()
    if isinstance(wanted, Between):
        return _between(axis, wanted, coordinate), ()
    return _valued(axis, wanted, coordinate)


def _positions(axis: Axis, wanted: Wanted, length: int) -> Ints:
    parts = (wanted.start, wanted.stop) if isinstance(wanted, Between) else wanted
    if not all(isinstance(part, int | None) for part in parts):
        why = (
            "an axis by number takes positions" if isinstance(axis, int) else "the store has no coordinate array of it"
        )
        raise DataError(
            f"select= takes {_said(wanted)} of axis {axis!r}, and {why}",
            hint="positions are whole numbers; values need a 1-D array with the dimension's name beside the data",
        )
    if isinstance(wanted, Between):
        if isinstance(axis, str):
            raise DataError(
                f"select= takes {wanted} of axis {axis!r}, and the store has no coordinate array of it",
                hint=f"slices of positions go by the axis' number: select={{1: {wanted}}}",
            )
        return np.arange(length, dtype=np.int64)[slice(wanted.start, wanted.stop, wanted.step)]
    beyond = [place for place in wanted if not -length <= place < length]
    if beyond:
        raise DataError(f"select= takes {list(wanted)} of axis {axis!r}, which has {length} places")
    return np.array([place % length for place in wanted], dtype=np.int64)


def _whole_numbers(axis: str, wanted: tuple[int, ...], stores: Sequence[Along], anywhere: bool) -> list[Found]:
    """Whole numbers in a list: positions in every store, or values in every store, or one error that names both."""
    numbered = [known for _, known in stores if known is not None and known.kind == "numbers"]
    valued = [_exactly(axis, wanted, known) for known in numbered]
    fit = all(-length <= place < length for length, _ in stores for place in wanted)
    if not fit and len(valued) == len(stores):
        return valued
    placed: list[Found] = [(_positions(axis, wanted, length), ()) for length, _ in stores]
    absent = [{*missing} for _, missing in valued]
    if not absent or (set.intersection if anywhere else set.union)(*absent):
        return placed
    for known, (by_value, _) in zip(numbered, valued, strict=True):
        places = _positions(axis, wanted, len(known.values))
        if not np.array_equal(by_value, places):
            at = f"at the positions {_shown(by_value)}" if len(by_value) else "in other stores"
            raise ConfigError(
                f"select= takes {list(wanted)} of axis {axis!r}, which can be positions (where {axis} is "
                f"{_shown(known.values[places])}) or values ({at})",
                hint=f"values: {[*map(float, wanted)]}; positions: by the axis' number, as in {{1: [...]}}",
            )
    return placed


def _valued(axis: Axis, wanted: tuple[Any, ...], coordinate: Coordinate) -> tuple[Ints, tuple[Any, ...]]:
    sort = {"number": "numbers", "time": "times", "text": "texts"}[_sort(wanted[0])]
    if coordinate.kind == "times" and all(map(is_time, wanted)):
        try:
            wanted = tuple(moment(value) for value in wanted)
        except ValueError as error:
            raise ConfigError(f"select= of axis {axis!r}: {error}") from error
    elif sort != coordinate.kind:
        raise DataError(
            f"select= takes {sort} of axis {axis!r} ({_shown(wanted)}), and its coordinate has {coordinate.kind}",
            hint=f"it begins with {_shown(coordinate.values[:3])}",
        )
    return _exactly(axis, wanted, coordinate)


def _exactly(axis: Axis, wanted: Sequence[Any], coordinate: Coordinate) -> tuple[Ints, tuple[Any, ...]]:
    """Where these values are, each at one place, and those that are nowhere."""
    values = _comparable(coordinate.values, wanted)
    order = np.argsort(values, kind="stable")
    targets = _as(values, wanted)
    left, right = (np.searchsorted(values[order], targets, side=side) for side in ("left", "right"))
    several = np.flatnonzero(right - left > 1)
    if len(several):
        raise DataError(
            f"select= takes {wanted[int(several[0])]!r} of axis {axis!r}, and that value stands there more than once",
            hint="take places by the axis' number",
        )
    there = right > left
    missing = tuple(value for value, found in zip(wanted, there.tolist(), strict=True) if not found)
    places: Ints = order[left[there]].astype(np.int64)
    return places, missing


def _as(values: NDArray[Any], wanted: Sequence[Any]) -> NDArray[Any]:
    """Wanted values as the coordinate has them: 0.1 is found in float32, too."""
    if values.dtype.kind == "M":
        return np.array(wanted)
    if values.dtype.kind == "f":
        return np.array(wanted, dtype=values.dtype)
    return np.array(wanted) if values.dtype.kind in "iub" else np.array(wanted, dtype=object).astype(values.dtype)


def _comparable(values: NDArray[Any], others: Sequence[Any]) -> NDArray[Any]:
    """Times in microseconds where the others are no finer: nanoseconds overflow at years far away."""
    fine = any(isinstance(one, np.datetime64) and np.datetime_data(one.dtype)[0] == "ns" for one in others)
    return values if values.dtype.kind != "M" or fine else values.astype("M8[us]")


def _between(axis: Axis, wanted: Between, coordinate: Coordinate) -> Ints:
    """The places whose values lie between two, both included, as xarray's slices of labels."""
    values = coordinate.values
    rising, falling = bool((values[1:] > values[:-1]).all()), bool((values[1:] < values[:-1]).all())
    if not (rising or falling):
        raise DataError(
            f"select= takes {wanted} of axis {axis!r}, whose coordinate neither rises nor falls throughout",
            hint="give the values as a list, or places by the axis' number",
        )
    low, high = (wanted.stop, wanted.start) if falling and not rising else (wanted.start, wanted.stop)
    first, last = _bounds(axis, wanted, low, high, coordinate)
    values = _comparable(values, [part for part in (first, last[0] if last else None) if part is not None])
    inside = np.ones(len(values), dtype=bool)
    if first is not None:
        inside &= values >= first
    if last is not None:
        inside &= (values < last[0]) if last[1] else (values <= last[0])
    if not inside.any() and first is not None and last is not None and last[0] < first:
        raise ConfigError(
            f"select= takes {wanted} of axis {axis!r}, whose coordinate {'falls' if falling else 'rises'}",
            hint=f"the other way round: slice({wanted.stop!r}, {wanted.start!r})",
        )
    return np.flatnonzero(inside)[:: wanted.step or 1].astype(np.int64)


def _bounds(
    axis: Axis, wanted: Between, low: Any, high: Any, coordinate: Coordinate
) -> tuple[Any, tuple[Any, bool] | None]:
    """The least value, and the greatest with whether it lies outside."""
    kind = coordinate.kind
    try:
        if kind == "times" and all(part is None or is_time(part) for part in (low, high)):
            first = None if low is None else period(low)[0]
            start, stop = (None, None) if high is None else period(high)
            return first, None if stop is None else (stop, stop != start)
    except ValueError as error:
        raise ConfigError(f"select= of axis {axis!r}: {error}") from error
    allowed: Any = str if kind == "texts" else int | float
    if kind == "times" or not all(part is None or isinstance(part, allowed) for part in (low, high)):
        raise DataError(
            f"select= takes {wanted} of axis {axis!r}, whose coordinate has {kind}",
            hint=f"it begins with {_shown(coordinate.values[:3])}",
        )
    if kind == "texts":
        return low, None if high is None else (high, False)
    return _number(low, coordinate.values), None if high is None else (_number(high, coordinate.values), False)


def _number(value: float | None, values: NDArray[Any]) -> Any:
    return values.dtype.type(value) if value is not None and values.dtype.kind == "f" else value


def _said(wanted: Wanted) -> str:
    return str(wanted) if isinstance(wanted, Between) else _shown(wanted)


def _shown(values: Any) -> str:
    some = [str(value) if isinstance(value, np.generic) else repr(value) for value in list(values)[:SHOWN]]
    return ", ".join(some) + (", ..." if len(values) > SHOWN else "")


def missing_error(axis: Axis, missing: Sequence[Any], coordinate: Coordinate) -> DataError:
    """What to say where wanted values are nowhere."""
    values = coordinate.values
    return DataError(
        f"select= takes {_shown(missing)} of axis {axis!r}, which is not there",
        hint=f"there are {len(values)} values in all: {_shown(values)}"
        if len(values) <= SHOWN
        else f"the {len(values)} values go from {values[0]} to {values[-1]}; numbers are compared exactly",
    )
