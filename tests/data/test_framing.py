"""What selecting places of samples promises: these places, in this order, of the arrays that have the axis."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError, DataError

quick = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
DATA: NDArray[np.float32] = np.arange(20 * 6 * 4, dtype=np.float32).reshape(20, 6, 4)


def write(path: Any, chunks: tuple[int, ...]) -> Any:
    group = zarr.create_group(path)
    group.create_array("x", data=DATA, chunks=chunks, dimension_names=("time", "level", "lon"))
    group.create_array("y", data=DATA[:, 0, 0], dimension_names=("time",))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = write(tmp_path_factory.mktemp("selected") / "data.zarr", (7, 2, 4))
    return path


async def epoch(store: Any, **keywords: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs and targets in the order of their numbers."""
    given: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 3, "shuffle": "block", "output": "numpy"}
    async with ZarrStream(store, **{**given, **keywords}) as source:
        found = [(batch.index.copy(), batch.inputs.copy(), batch.targets.copy()) async for batch in source]
    numbers, inputs, targets = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(numbers)
    return inputs[order], targets[order]


@quick
@given(
    st.tuples(st.integers(1, 21), st.integers(1, 7), st.integers(1, 5)),
    st.lists(st.integers(-6, 5), min_size=1, max_size=7),
    st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.booleans(),
)
def test_exactly_these_places_in_this_order(
    chunks: tuple[int, ...], levels: list[int], lons: list[int] | None, windows: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(folder, chunks)
        select: dict[int | str, list[int]] = {"level": levels} if lons is None else {"level": levels, 2: lons}
        more: dict[str, Any] = {"window": {"time": 3}} if windows else {}
        inputs, targets = asyncio.run(epoch(folder, select=select, **more))
    expected = DATA[:, levels] if lons is None else DATA[:, levels][:, :, lons]
    if windows:
        starts = np.arange(18)[:, None] + np.arange(3)
        assert (targets == DATA[:, 0, 0][starts]).all()
        expected = expected[starts]
    assert inputs.shape == expected.shape
    assert (inputs == expected).all()


async def test_chunks_from_which_nothing_is_taken_are_not_read(store: Path) -> None:
    async with ZarrStream(store, inputs="x", select={"level": [4]}, batch_size=20, output="numpy") as source:
        async for _ in source:
            pass
        assert source.statistics().chunks == 3


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"level": [6]}, "axis 'level', which has 6 places"),
        ({"lvl": [0]}, "names the axis 'lvl'"),
        ({3: [0]}, "names the axis 3"),
        ({"level": []}, "takes nothing"),
        ({"level": ["a"]}, "the store has no coordinate array of it"),
        ({2: [0.5]}, "an axis by number takes positions"),
        ({"level": slice(0, 3)}, "the store has no coordinate array of it"),
        ({2: slice(0, 3, -1)}, "step of a slice must be"),
        ({2: slice(9, 12)}, "takes nothing of axis 2"),
        ({"level": [True]}, "must be places or values, not True"),
        (3, "must be a dict"),
    ],
    ids=str,
)
async def test_what_cannot_be_selected_is_refused(store: Path, select: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        await epoch(store, select=select)
