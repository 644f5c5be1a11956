"""One store cut along axis 0 into several, such as one to train on and one to validate on: `split`.

Law: bounds are floor(fraction * samples), as in ZarrStream's `split=`, so that no sample is lost or given twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Sequence
from pathlib import Path

from data_tools.convert import Codec, Progress
from data_tools.others import carry
from data_tools.reshuffle import copy
from data_tools.source import Source
from streamtrain.data.budget import parse_bytes
from streamtrain.data.whole import check_apart, whole_or_nothing
from streamtrain.errors import ConfigError, DataError


def split(
    source: str | Path,
    targets: Sequence[str | Path],
    *,
    fractions: Sequence[float],
    arrays: Sequence[str] | None = None,
    codec: Codec | None = None,
    memory: str | int = "1GiB",
    progress: Progress | None = None,
) -> list[Path]:
    """Write the samples of `source`, in their order, as the `targets`, and return their paths.

    `fractions`: a share for each target; they add up to at most 1, and what is beyond is left out. `arrays` with a row
    for each sample are cut, by default as `reshuffle` chooses them, the others copied into each. Statistics among the
    attributes of what is cut are dropped. Reshuffle before where samples are sorted. Raises ConfigError for shares that
    do not fit, or where it is not clear which arrays have samples; DataError for damage in the source, for sparse
    matrices, categoricals and the like, or for a part without a sample; each target appears whole or not at all.
    """
    limit, paths = parse_bytes(memory), [Path(target) for target in targets]
    if (
        len(fractions) != len(paths)
        or not all(0 < share <= 1 for share in fractions)
        or math.fsum(fractions) > 1 + 1e-9
    ):
        raise ConfigError(
            f"fractions={list(fractions)} must be a share above 0 for each of {len(paths)} targets, at most 1 in all",
            hint="for example --fractions 0.9,0.1 for two targets",
        )
    if len(set(paths)) < len(paths):
        raise ConfigError("two targets are the same", hint="name each once")
    check_apart(source, *paths)
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists already", hint="name another target, or remove this one")
    with Source(Path(source)) as opened:
        cut = opened.with_samples(arrays)
        count = next(iter(cut.values())).shape[0]
        bounds = [math.floor(math.fsum(fractions[:at]) * count) for at in range(len(paths) + 1)]
        if math.fsum(fractions) > 1 - 1e-9:
            bounds[-1] = count  # as decimals, shares seldom add up to 1
        if any(a == b for a, b in itertools.pairwise(bounds)):
            raise DataError(f"{count} samples leave one of the parts {list(fractions)} without any")
        for number, path in enumerate(paths):
            _write(opened, path, cut, (bounds[number], bounds[number + 1]), codec, limit)
            if progress:
                progress(bounds[number + 1], bounds[-1])
    return paths


def _write(
    opened: Source, target: Path, cut: Container[str], bounds: tuple[int, int], codec: Codec | None, memory: int
) -> None:
    with whole_or_nothing(target) as part:
        where = opened.create_groups(part)
        for name, array in opened.arrays.items():
            if name in cut:
                shape = (bounds[1] - bounds[0], *array.layout.shape[1:])
                copy(array, array.create(where, shape=shape, codec=codec, stats=False), memory, *bounds)
            else:
                copy(array, array.create(where, codec=codec), memory)
        for other, group in opened.others_in(where):
            carry(other, group, memory, bounds=bounds if other.name in cut else None)
