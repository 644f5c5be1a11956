"""The arguments of a stream, checked one by one before anything is opened. Pure.

Its law: each complaint names the argument, what it must be, and what it was.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streamtrain.data.splits import split_bounds
from streamtrain.errors import ConfigError


def at_least(value: object, least: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r}")
    return int(value)


def seconds_above_zero(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a number of seconds above 0, not {value!r}")
    return float(value)


def choice(value: Any, known: Sequence[str], name: str) -> Any:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}", hint=hint)
    return value


def shuffle_mode(shuffle: object) -> object:
    if shuffle is False or shuffle is None:
        return "none"
    return "block" if shuffle is True else shuffle


def array_names(names: object, what: str) -> tuple[tuple[str, ...], bool] | None:
    """The names, and whether batches hold a dict of them."""
    if names is None:
        return None
    if isinstance(names, str):
        return (names,), False
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        if len(set(names)) < len(names):
            raise ConfigError(f"{what}={names!r} names an array twice")
        return tuple(names), True
    raise ConfigError(f"{what} must be a name or a list of names, not {names!r}")


def split_pair(split: Any) -> tuple[float, float] | tuple[int, int] | None:
    if split is None:
        return None
    if isinstance(split, list | tuple) and len(split) == 2:
        try:
            split_bounds(split, 1 << 62)
        except ValueError as error:
            raise ConfigError(str(error), hint="split=(0.0, 0.9), or two sample numbers") from error
        return split[0], split[1]
    raise ConfigError(f"split must be two fractions or two sample numbers, not {split!r}", hint="split=(0.0, 0.9)")


def axis_numbers(axes: object) -> tuple[int, ...]:
    given = (axes,) if isinstance(axes, int) else axes
    if not isinstance(given, list | tuple) or not given or len(set(given)) < len(given):
        raise ConfigError(f"sample_axes must be different axis numbers such as (0,), not {axes!r}")
    return tuple(at_least(axis, 0, "sample_axes") for axis in given)


def cast_dtypes(dtype: Any) -> np.dtype[Any] | dict[str, np.dtype[Any]] | None:
    if dtype is None:
        return None
    if isinstance(dtype, Mapping):
        return {name: _one_dtype(each) for name, each in dtype.items()}
    return _one_dtype(dtype)


def _one_dtype(dtype: Any) -> np.dtype[Any]:
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise ConfigError(f"dtype={dtype!r} is no numpy dtype", hint="for example dtype='float32'") from error
    if found.kind not in "biufc":
        raise ConfigError(f"dtype={dtype!r} can't be trained on", hint="for example dtype='float32'")
    native: np.dtype[Any] = found.newbyteorder("=")
    return native
