"""The arguments of a stream, checked one by one before anything is opened. Pure.

Its law: each complaint names the argument, what it must be, and what it was.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from streamtrain.data.choosing import Choice
from streamtrain.data.crops import CropAt
from streamtrain.data.framing import Framing
from streamtrain.data.ranks import Ranks
from streamtrain.data.scanning import RaggedWish
from streamtrain.data.selecting import Wanted, wanted_of
from streamtrain.data.splits import split_bounds
from streamtrain.errors import ConfigError

MOST_THREADS = 256
"""More threads, tasks or processes than this are a slip of the hand, which the machine may not survive."""
MOST_SECONDS = 1e9
"""Clocks of operating systems take no more."""


def at_least(value: object, least: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r}")
    return int(value)


def thread_count(value: object, name: str) -> int:
    count = at_least(value, 1, name)
    if count > MOST_THREADS:
        raise ConfigError(f"{name} must be at most {MOST_THREADS}, not {value!r}", hint="one for each core is plenty")
    return count


def seconds_above_zero(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_SECONDS:
        raise ConfigError(f"{name} must be a number of seconds above 0 and up to {MOST_SECONDS:g}, not {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True)
class Crew:
    """Who transforms: `count` (None: as many as read, or as befits) threads, tasks or processes."""

    kind: Literal["thread", "process"] = "thread"
    count: int | None = None


def transform_crew(given: object) -> Crew:
    """Of None, 4, "thread:4", "process:4" or "process"."""
    if given is None:
        return Crew()
    if isinstance(given, str):
        kind, colon, count = given.partition(":")
        known = re.fullmatch("[1-9][0-9]{0,8}", count) if colon else kind == "process"
        if kind in ("thread", "process") and known:
            number = thread_count(int(count), "transform_workers") if colon else None
            return Crew("process" if kind == "process" else "thread", number)
    elif isinstance(given, int | np.integer) and not isinstance(given, bool) and given >= 1:
        return Crew("thread", thread_count(given, "transform_workers"))
    raise ConfigError(f'transform_workers must be a number, "thread:N" or "process:N" with N above 0, not {given!r}')


def share_of_one(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a share from 0 to 1, not {value!r}")
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
    if any(isinstance(axis, str) for axis in given):
        raise ConfigError(
            f"sample_axes are numbers, such as (0, 1), not names: {axes!r}",
            hint="count the array's axes from 0; it is window=, crop= and select= that take names",
        )
    return tuple(at_least(axis, 0, "sample_axes") for axis in given)


def ranks_of(rank: object, world_size: object) -> Ranks:
    """This rank's part."""
    world = at_least(world_size, 1, "world_size")
    if at_least(rank, 0, "rank") >= world:
        raise ConfigError(f"rank={rank} of world_size={world}: ranks are numbered from 0 to {world - 1}")
    return Ranks(int(rank), world)  # type: ignore[call-overload]


def choice_of(indices: Any, groups: str | None, weights: Any, balance: str | None) -> Choice:
    """Which samples, and how often."""
    if weights is not None and balance is not None:
        raise ConfigError("weights= and balance= are two ways to weight", hint="give one of them")
    if indices is not None and not isinstance(indices, str):
        indices = np.asarray(indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise ConfigError("indices= must be sample numbers, or the name of a boolean array")
        indices = indices.astype(np.int64)
    if weights is not None and not isinstance(weights, str):
        weights = np.asarray(weights)
        if weights.ndim != 1 or weights.dtype.kind not in "biuf":
            raise ConfigError("weights= must be one number for each sample, or the name of an array")
    for name, value in (("groups", groups), ("balance", balance)):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{name}= must be the name of an array, not {value!r}")
    return Choice(indices, groups, weights, balance)


def framing_of(
    sample_axes: object,
    window: object,
    stride: object,
    horizon: int | None,
    target_window: int | None,
    select: object,
    crop: object = None,
    crop_at: object = "random",
    jitter: object = None,
) -> Framing:
    """What a sample is, as far as that is known without the arrays."""
    axes, taken = axis_numbers(sample_axes), _selected(select)
    cropped = _cropped(crop)
    at: CropAt = choice(crop_at, ("random", "center"), "crop_at")
    if window is None:
        for name, value in (
            ("stride", stride),
            ("horizon", horizon),
            ("target_window", target_window),
            ("jitter", jitter),
        ):
            if value is not None:
                raise ConfigError(f"{name}= without window=", hint="for example window={'time': 24}")
        return Framing(axes, select=taken, crop=cropped, crop_at=at)
    if target_window is not None and horizon is None:
        raise ConfigError("target_window= without horizon=", hint="horizon=1 is the place right after the window")
    lengths = _by_axis(window, "window", axes[0])
    steps = (
        None
        if stride is None
        else at_least(stride, 1, "stride")
        if isinstance(stride, int)
        else _by_axis(stride, "stride", axes[0])
    )
    return Framing(
        axes,
        lengths,
        steps,
        None if horizon is None else at_least(horizon, 0, "horizon"),
        None if target_window is None else at_least(target_window, 1, "target_window"),
        select=taken,
        crop=cropped,
        crop_at=at,
        jitter=_jitter(jitter, axes[0]),
    )


def ragged_of(ragged: object, max_length: object, pad_value: object, sparse: object) -> RaggedWish:
    """What is said of rows of different lengths."""
    if ragged is None:
        for name, value in (("max_length", max_length), ("pad_value", pad_value)):
            if value is not None:
                raise ConfigError(f"{name}= without ragged=", hint="ragged={'values': 'offsets'} names both arrays")
        return RaggedWish(kept_sparse=bool(sparse))
    if not isinstance(ragged, Mapping) or not ragged:
        raise ConfigError(f"ragged must be a dict of names, not {ragged!r}", hint="ragged={'values': 'offsets'}")
    for pair in ragged.items():
        if not all(isinstance(name, str) for name in pair):
            raise ConfigError(f"ragged must be a dict of names, not of {pair[0]!r} to {pair[1]!r}")
    if pad_value is not None and (isinstance(pad_value, bool) or not isinstance(pad_value, int | float)):
        raise ConfigError(f"pad_value must be a number, not {pad_value!r}")
    longest = None if max_length is None else at_least(max_length, 1, "max_length")
    return RaggedWish(dict(ragged), longest, pad_value or 0, bool(sparse))


def _cropped(crop: object) -> dict[int | str, int]:
    if crop is None:
        return {}
    if not isinstance(crop, Mapping):
        raise ConfigError(f"crop must be a dict of places by axis, not {crop!r}", hint="crop={'lat': 64, 'lon': 64}")
    return _by_axis(crop, "crop", 0)


def _jitter(jitter: object, first: int) -> int | dict[int | str, int]:
    if jitter is None:
        return 0
    return _by_axis(jitter, "jitter", first, 0) if isinstance(jitter, Mapping) else at_least(jitter, 0, "jitter")


def _selected(select: object) -> dict[int | str, Wanted]:
    if select is None:
        return {}
    if not isinstance(select, Mapping):
        raise ConfigError(f"select must be a dict by axis, not {select!r}", hint="select={'level': [0, 3]}")
    taken: dict[int | str, Wanted] = {}
    for axis, given in select.items():
        taken[axis if isinstance(axis, str) else at_least(axis, 0, "an axis of select")] = wanted_of(axis, given)
    return taken


def _by_axis(given: object, name: str, first: int, least: int = 1) -> dict[int | str, int]:
    if not isinstance(given, Mapping):
        return {first: at_least(given, least, name)}
    if not given:
        raise ConfigError(f"{name}= is empty", hint=f"{name}={{'time': 24}}")
    for axis in given:
        if not isinstance(axis, str):
            at_least(axis, 0, f"an axis of {name}")
    return {axis: at_least(length, least, f"{name}[{axis!r}]") for axis, length in given.items()}


def decode_mode(decode_cf: object) -> bool:
    if decode_cf not in ("auto", True, False):
        raise ConfigError(f"decode_cf must be 'auto' or False, not {decode_cf!r}")
    return bool(decode_cf)


def cast_dtypes(dtype: Any) -> np.dtype[Any] | dict[str, np.dtype[Any]] | None:
    if dtype is None:
        return None
    if isinstance(dtype, Mapping):
        return {name: _one_dtype(each) for name, each in dtype.items()}
    return _one_dtype(dtype)


def _one_dtype(dtype: Any) -> np.dtype[Any]:
    if str(dtype).lower().removeprefix("torch.") in ("bfloat16", "bf16"):
        raise ConfigError(
            f"dtype={dtype!r}: streams hand over numpy's dtypes, and bfloat16 is none of them",
            hint="dtype='float32', and precision='bf16' for the trainer: it casts where that is safe",
        )
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise ConfigError(f"dtype={dtype!r} is no numpy dtype", hint="for example dtype='float32'") from error
    if found.kind not in "biufc":
        raise ConfigError(f"dtype={dtype!r} can't be trained on", hint="for example dtype='float32'")
    native: np.dtype[Any] = found.newbyteorder("=")
    return native
