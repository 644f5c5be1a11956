"""What choosing and weighting samples promise: exactly these, exactly so often, the same at each run."""

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
from streamtrain.errors import CheckpointError, ConfigError, DataError

ROWS = 60
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
RARE = np.where(np.arange(ROWS) % 10 == 0, 1, 0)
PATIENT = np.arange(ROWS) // 7


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = write(tmp_path_factory.mktemp("chosen") / "data.zarr")
    return path


def write(path: Any, chunk: int = 8) -> Any:
    group = zarr.create_group(path)
    group.create_array("x", data=np.arange(ROWS * 2, dtype=np.float32).reshape(ROWS, 2), chunks=(chunk, 2))
    group.create_array("good", data=np.arange(ROWS) % 3 == 0, chunks=(25,))
    group.create_array("rare", data=RARE, chunks=(13,))
    group.create_array("patient", data=PATIENT)
    group.create_array("weight", data=np.arange(ROWS, dtype=np.float64))
    return path


def stream(store: Any, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "batch_size": 7, "shuffle": "block", "output": "numpy"}
    return ZarrStream(store, **{**given, **keywords})


async def numbers(source: ZarrStream) -> NDArray[np.int64]:
    """The numbers of a pass, whose inputs are the source's."""
    found: list[NDArray[np.int64]] = []
    async for batch in source:
        assert (batch.inputs[:, 0] == 2 * batch.index).all()
        found.append(batch.index.copy())
    return np.concatenate(found)


@quick
@given(
    st.sets(st.integers(0, ROWS - 1), min_size=1),
    st.sampled_from([False, "block", "global"]),
    st.integers(1, 70),
    st.sampled_from(["range", "chunk", "sample"]),
    st.integers(0, 10),
)
def test_exactly_the_chosen_come_once_in_their_splits(
    chosen: set[int], shuffle: Any, chunk: int, split_by: Any, cut: int
) -> None:
    async def scenario(folder: str) -> None:
        seen: list[int] = []
        at = len(chosen) * cut // 11
        for split in [(0, at), (at, len(chosen))]:
            if split[0] < split[1]:
                given = {"shuffle": shuffle, "split": split, "split_by": split_by, "indices": sorted(chosen)}
                async with stream(folder, **given) as source:
                    found = (await numbers(source)).tolist()
                    assert shuffle or found == sorted(found)
                    assert sorted((await numbers(source)).tolist()) == sorted(found)
                seen += found
        assert sorted(seen) == sorted(chosen)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(write(folder, chunk)))


async def test_a_boolean_array_chooses(store: Path) -> None:
    async with stream(store, indices="good") as source:
        assert source.num_samples == 20
        assert sorted((await numbers(source)).tolist()) == list(range(0, ROWS, 3))


async def test_a_split_by_groups_takes_each_whole(store: Path) -> None:
    async with (
        stream(store, groups="patient", split=(0.0, 0.5)) as one,
        stream(store, groups="patient", split=(0.5, 1.0)) as other,
    ):
        first, second = await numbers(one), await numbers(other)
    assert sorted([*first, *second]) == list(range(ROWS))
    assert not {*PATIENT[first]} & {*PATIENT[second]}
    assert 20 <= len(first) <= 40


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
async def test_weighted_samples_come_as_often_as_their_share(store: Path, shuffle: Any) -> None:
    counts, expected = np.zeros(ROWS), np.arange(ROWS) * ROWS / sum(range(ROWS))
    async with stream(store, weights="weight", shuffle=shuffle, seed=3) as source:
        for _ in range(40):
            found = await numbers(source)
            assert len(found) == ROWS
            once = np.bincount(found, minlength=ROWS)
            assert (np.abs(once - expected) < 1).all()
            counts += once
    assert np.allclose(counts / 40, expected, atol=0.25)


async def test_balanced_labels_come_equally_often(store: Path) -> None:
    async with stream(store, balance="rare") as source:
        found = await numbers(source)
    assert abs(RARE[found].mean() - 0.5) < 0.05


async def test_draws_are_the_same_again_and_go_on_in_the_middle(store: Path) -> None:
    async with stream(store, balance="rare", seed=5) as source:
        whole = [batch.index.tolist() async for batch in source]
    async with stream(store, balance="rare", seed=5) as source:
        passing = aiter(source)
        first = [(await anext(passing)).index.tolist() for _ in range(3)]
        state = source.state_dict()
    async with stream(store, balance="rare", seed=5, batch_size=7) as source:
        source.load_state_dict(state)
        assert first + [batch.index.tolist() async for batch in source] == whole
    async with stream(store, weights="weight", seed=5) as source:
        with pytest.raises(CheckpointError, match="chosen"):
            source.load_state_dict(state)


async def test_epochs_differ_in_what_they_draw(store: Path) -> None:
    async with stream(store, weights=np.full(ROWS, 0.5) + np.arange(ROWS) / ROWS) as source:
        first, second = sorted(await numbers(source)), sorted(await numbers(source))
    assert first != second


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"indices": [1, 1]}, "names samples twice"),
        ({"indices": [60]}, "there are samples 0 to 59"),
        ({"indices": [0.5]}, "sample numbers"),
        ({"indices": "rare"}, "not bool"),
        ({"indices": "gud"}, "has no array 'gud'"),
        ({"weights": [1.0]}, "1 numbers for 60 samples"),
        ({"weights": np.full(ROWS, -1.0)}, "must be finite, not negative"),
        ({"weights": "weight", "balance": "rare"}, "two ways to weight"),
        ({"balance": "x"}, "not one value for each"),
        ({"groups": 3}, "must be the name of an array"),
        ({"indices": [], "split": (0.0, 0.5)}, "no samples are chosen|sample numbers"),
        ({"indices": [1, 2, 3], "window": 3, "split": (0.0, 0.5)}, "chosen windows that overlap"),
    ],
    ids=str,
)
async def test_what_is_no_choice_is_refused(store: Path, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        await stream(store, **keywords).open()


async def test_windows_are_chosen_by_their_first_place(store: Path) -> None:
    async with stream(store, window=4, indices="good", output="numpy") as source:
        found = np.concatenate([batch.index.copy() async for batch in source])
    assert sorted(found.tolist()) == [n for n in range(ROWS - 3) if n % 3 == 0]


async def test_rare_rows_of_one_chunk_fit_into_their_block(store: Path) -> None:
    weights = np.zeros(ROWS)
    weights[:3] = 1
    async with stream(store, weights=weights, shuffle_blocks=1) as source:
        assert {*(await numbers(source)).tolist()} == {0, 1, 2}


@pytest.mark.parametrize("scale", [1e308, 1e-310, 5e-324, 2.0**-1000, 2.0**1000, 2.0**-3])
async def test_weights_of_any_size_draw_by_their_proportion(store: Path, scale: float) -> None:
    weights = np.where(RARE == 1, 1.0, 0.0)
    for shuffle in (False, "block"):
        async with stream(store, weights=weights, shuffle=shuffle, seed=3) as source:
            expected = await numbers(source)
        async with stream(store, weights=weights * scale, shuffle=shuffle, seed=3) as source:
            assert (await numbers(source) == expected).all()
