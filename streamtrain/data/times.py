"""Times: numbers of a unit since a date, as CF spells them, and what people type. Pure.

Its law: a time is decoded exactly or refused by name: only calendars and units that numpy's datetime64 has.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamtrain.errors import DataError

CALENDARS = frozenset({"standard", "gregorian", "proleptic_gregorian"})
MICROSECONDS = {"d": 86_400_000_000, "h": 3_600_000_000, "m": 60_000_000, "s": 1_000_000, "ms": 1_000, "us": 1}
UNITS = {
    "d": ("days", "day", "d"),
    "h": ("hours", "hour", "hr", "hrs", "h"),
    "m": ("minutes", "minute", "min", "mins"),
    "s": ("seconds", "second", "sec", "secs", "s"),
    "ms": ("milliseconds", "millisecond", "msec", "msecs", "millisec", "millisecs", "ms"),
    "us": ("microseconds", "microsecond", "microsec", "microsecs", "us"),
    "ns": ("nanoseconds", "nanosecond", "nanosec", "nanosecs", "ns"),
}
NOT_A_TIME = np.iinfo(np.int64).min
LAST = np.iinfo(np.int64).max
FAR = 1e30
"""A number of any unit that no time is, and that stays finite in a smaller one."""
REFORM = np.datetime64("1582-10-15", "D")
"""Before this day the standard calendar is the Julian one."""
_SINCE = re.compile(r"\s*(\w+)\s+since\s+(.+?)\s*", re.IGNORECASE)
_DATE = re.compile(
    r"(\d{1,4})-(\d{1,2})-(\d{1,2})(?:[T\s]+(\d{1,2})(?::(\d{1,2})(?::(\d{1,2})(\.\d*)?)?)?)?"
    r"\s*(?:Z|UTC|GMT|[+-]00(?::?00)?|[+-]0?0:00)?",
    re.IGNORECASE,
)
_TYPED = re.compile(r"\d{4}(-\d{2}(-\d{2}([T ]\d{2}(:\d{2}(:\d{2}(\.\d{1,9})?)?)?)?)?)?")


def is_since(units: object) -> bool:
    """Whether an attribute `units` makes times of numbers."""
    return isinstance(units, str) and _SINCE.fullmatch(units) is not None


def decode_times(values: NDArray[Any], units: str, calendar: object, name: str) -> NDArray[Any]:
    """Numbers of `units` ("days since 2000-01-01") as datetime64, of microseconds (or nanoseconds); NaN as NaT.

    Raises DataError for a calendar, unit or date that is not decoded, naming it.
    """
    where = f"array {name!r}: its times"
    given = "standard" if calendar is None else calendar
    if not isinstance(given, str) or given.lower() not in CALENDARS:
        raise DataError(
            f"{where} are of the calendar {given!r}; decoded are {', '.join(sorted(CALENDARS))}",
            hint="take places by the axis' number: select={0: slice(0, 365)}",
        )
    found = _SINCE.fullmatch(units)
    assert found is not None
    unit = next((short for short, names in UNITS.items() if found[1].lower() in names), None)
    if unit is None:
        raise DataError(f"{where} count {found[1]!r}, a unit that is not decoded", hint="days, hours, seconds, ... are")
    start, whole = _date(found[2], where), unit if unit == "ns" else "us"
    scale, origin = MICROSECONDS.get(unit, 1), int(start.astype(np.int64)) * (1000 if unit == "ns" else 1)
    if values.dtype.kind == "f":
        missing = ~np.isfinite(values)
        counts = np.rint(np.where(missing, 0, values).astype(np.float64).clip(-FAR, FAR) * scale)
        _check_range(counts, 1, origin, whole, where)
        ticks = counts.astype(np.int64)
    else:
        missing = None
        _check_range(values, scale, origin, whole, where)
        ticks = values.astype(np.int64) * scale
    result: NDArray[Any] = (ticks + origin).view(f"datetime64[{whole}]")
    if missing is not None:
        result.view(np.int64)[missing] = NOT_A_TIME
    days = result.astype("datetime64[D]")  # 1582 in nanoseconds overflows
    if given.lower() != "proleptic_gregorian" and len(result) and (start < REFORM or bool((days < REFORM).any())):
        raise DataError(f"{where} go back before 1582-10-15, where the calendar {given!r} is another")
    return result


def counted_since(values: NDArray[Any], units: str, since: str, calendar: object, name: str) -> NDArray[Any] | None:
    """Numbers of `units` as those of the units `since` that stand for the same times, of the same dtype; None where no
    numbers of it do to the last microsecond. Raises DataError as `decode_times` does."""
    times = decode_times(values, units, calendar, name)
    origin, one = decode_times(np.arange(2), since, calendar, name)
    spans = times - origin  # of the finer unit of the two
    ticks, each = spans.view(np.int64), int((one - origin).astype(spans.dtype).view(np.int64))
    if values.dtype.kind == "f":
        made = np.where(np.isnat(spans), np.nan, ticks / each).astype(values.dtype)
    elif (ticks % each).any():
        return None
    else:
        made = (ticks // each).astype(values.dtype)
    again = decode_times(made, since, calendar, name)
    return made if np.array_equal(again, times, equal_nan=True) else None


def _check_range(counts: NDArray[Any], scale: int, origin: int, whole: str, where: str) -> None:
    """Raise DataError where a time is beyond what 64 bits hold: there it would wrap to another year."""
    ticks = [int(end) * scale for end in (counts.min(), counts.max())] if counts.size else [0]
    farthest = max((each for tick in ticks for each in (tick, origin, tick + origin)), key=abs)
    if abs(farthest) > LAST:
        raise DataError(
            f"{where} go beyond what datetime64[{whole}] holds, to {farthest:.3g} {whole}",
            hint="say in the attribute _FillValue which number stands for a missing time, or correct the values",
        )


def _date(text: str, where: str) -> np.datetime64:
    found = _DATE.fullmatch(text)
    if found is None:
        raise DataError(
            f"{where} count from {text!r}, which is no date of universal time", hint="correct the attribute"
        )
    year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
    fraction = (found[7] or "").rstrip(".")
    try:
        return np.datetime64(
            f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}", "us"
        )  # "2000-1-1" is common, and numpy wants two digits
    except ValueError as error:
        raise DataError(f"{where} count from {text!r}: {error}", hint="correct the attribute") from error


def is_time(given: object) -> bool:
    """Whether this is a date or time, or a text that spells one: "2000", "2000-01-31", "2000-01-31T06:00"."""
    if isinstance(given, str):
        return _TYPED.fullmatch(given) is not None
    return isinstance(given, datetime.date | np.datetime64)


def moment(given: Any) -> np.datetime64:
    """What `is_time` knows, in the unit that it was given in ("2000": a year). Raises ValueError for no such day."""
    if isinstance(given, datetime.datetime) and given.tzinfo is not None:
        given = given.astimezone(datetime.UTC).replace(tzinfo=None)
    return np.datetime64(given)


def period(given: Any) -> tuple[np.datetime64, np.datetime64]:
    """The first moment of it and the one after its last: "2000" is a year, "2000-01-31" a day, a datetime a point."""
    start = moment(given)
    whole = isinstance(given, str) or type(given) is datetime.date
    return start, (start.astype(np.int64) + 1).astype(start.dtype) if whole else start
