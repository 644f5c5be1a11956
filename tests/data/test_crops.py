"""What crops promise: a patch of each sample, at a place that the seed, the epoch and its number decide alone."""

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
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from streamtrain.data.crops import drawn
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import CheckpointError, ConfigError, DataError

quick = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
ROWS, LAT, LON = 12, 20, 14
X: NDArray[np.int32] = np.arange(ROWS * LAT * LON, dtype=np.int32).reshape(ROWS, LAT, LON)
CHANNELS: NDArray[np.int32] = np.stack([X, X + 100_000], axis=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crops") / "data.zarr"
    group = zarr.create_group(path)
    group.create_array("x", data=X, chunks=(3, 5, 4), dimension_names=("time", "lat", "lon"))
    group.create_array("raw", data=X, chunks=(3, 5, 4), compressors=None, dimension_names=("time", "lat", "lon"))
    group.create_array("c", data=CHANNELS, chunks=(4, 1, 7, 7), dimension_names=("time", "band", "lat", "lon"))
    group.create_array("bare", data=X, chunks=(5, 20, 14))
    group.create_array("small", data=X[:, :9], chunks=(5, 9, 9), dimension_names=("time", "lat", "lon"))
    group.create_array("y", data=np.arange(ROWS) * 10, chunks=(5,), dimension_names=("time",))
    return path


def stream(store: Any, **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "batch_size": 5, "output": "numpy", "crop": {"lat": 6, "lon": 5}}
    return ZarrStream(store, **{**given, **keywords})


async def one_pass(source: ZarrStream) -> dict[int, Any]:
    """Inputs by sample number."""
    found: dict[int, Any] = {}
    async for batch in source:
        for row, number in enumerate(batch.index.tolist()):
            parts = batch.inputs if isinstance(batch.inputs, dict) else {"": batch.inputs}
            copies = {name: part[row].copy() for name, part in parts.items()}
            found[number] = copies.get("", copies)
    return found


async def samples(store: Any, **keywords: Any) -> dict[int, Any]:
    async with stream(store, **keywords) as source:
        return await one_pass(source)


def place(patch: NDArray[Any], number: int, lat: int = 6, lon: int = 5) -> tuple[int, int]:
    """Where a patch of this sample of X begins; it is whole."""
    first = int(patch[0, 0]) - number * LAT * LON
    a, b = divmod(first, LON)
    assert (patch == X[number, a : a + lat, b : b + lon]).all()
    return a, b


def same(one: dict[int, Any], other: dict[int, Any]) -> bool:
    return one.keys() == other.keys() and all((one[n] == other[n]).all() for n in one)


async def test_each_sample_gives_a_patch_of_its_own(store: Path) -> None:
    found = await samples(store)
    assert sorted(found) == list(range(ROWS))
    assert len({place(patch, number) for number, patch in found.items()}) > ROWS // 2


async def test_patches_change_with_the_epoch_and_the_seed_and_come_again(store: Path) -> None:
    async with stream(store) as source:
        first, second = await one_pass(source), await one_pass(source)
    assert not same(first, second)
    assert not same(first, await samples(store, seed=1))
    assert same(first, await samples(store))


@pytest.mark.parametrize(
    "keywords",
    [
        {"batch_size": 3},
        {"threads": 1},
        {"shuffle": "block"},
        {"shuffle": "global"},
        {"cache": 0},
        {"inputs": "raw"},
        {"inputs": "raw", "io": "pread"},
        {"io": "store"},
        {"memory": "64MiB"},
    ],
    ids=str,
)
async def test_nothing_else_moves_a_patch(store: Path, keywords: dict[str, Any]) -> None:
    assert same(await samples(store), await samples(store, **keywords))


async def test_a_position_goes_on_with_the_same_patches(store: Path) -> None:
    expected = await samples(store, batch_size=4)
    async with stream(store, batch_size=4) as source:
        await anext(aiter(source))
        state = source.state_dict()
    async with stream(store, batch_size=3) as other:
        other.load_state_dict(state)
        rest = await one_pass(other)
    assert sorted(rest) == list(range(4, ROWS))
    assert same(rest, {number: expected[number] for number in rest})


@pytest.mark.parametrize("other", [{"seed": 1}, {"crop": {"lat": 6, "lon": 6}}, {"crop_at": "center"}], ids=str)
async def test_a_position_of_other_patches_is_refused(store: Path, other: dict[str, Any]) -> None:
    async with stream(store) as source, stream(store, **other) as changed:
        await source.open()
        with pytest.raises(CheckpointError, match=next(iter(other))):
            changed.load_state_dict(source.state_dict())


async def test_the_middle_is_the_same_in_every_epoch(store: Path) -> None:
    async with stream(store, crop_at="center") as source:
        first, second = await one_pass(source), await one_pass(source)
    assert {place(patch, number) for number, patch in first.items()} == {(7, 4)}
    assert same(first, second)


async def test_arrays_that_have_the_axes_are_cropped_alike(store: Path) -> None:
    found = await samples(store, inputs=["x", "c", "y"])
    for number, parts in found.items():
        a, b = place(parts["x"], number)
        assert (parts["c"] == CHANNELS[number, :, a : a + 6, b : b + 5]).all()
        assert parts["y"] == 10 * number


async def test_numbers_of_axes_are_those_of_the_first_array(store: Path) -> None:
    by_name = await samples(store, inputs=["c", "x"])
    by_number = await samples(store, inputs=["c", "x"], crop={2: 6, 3: 5})
    assert all((by_name[n][k] == by_number[n][k]).all() for n in by_name for k in ("c", "x"))


async def test_targets_are_cropped_with_their_inputs(store: Path) -> None:
    async with stream(store, inputs="x", targets="raw") as source:
        async for batch in source:
            assert (batch.inputs == batch.targets).all()


async def test_a_crop_lies_within_the_places_that_are_selected(store: Path) -> None:
    found = await samples(store, select={"lat": list(range(10, 18))})
    assert {place(patch, number)[0] for number, patch in found.items()} <= {10, 11, 12}


async def test_channels_may_be_selected_beside_a_crop(store: Path) -> None:
    found = await samples(store, inputs=["c", "x"], select={"band": [1]})
    for number, parts in found.items():
        a, b = place(parts["x"], number)
        assert (parts["c"] == CHANNELS[number, 1:, a : a + 6, b : b + 5]).all()


async def test_normalised_numbers_are_those_of_the_patch(store: Path) -> None:
    plain, found = await samples(store), await samples(store, normalize={"x": (10.0, 2.0)})
    assert all(np.allclose(found[n], (plain[n] - 10.0) / 2.0) for n in plain)


async def test_only_chunks_that_a_crop_touches_are_read_each_once(store: Path) -> None:
    async with stream(store, crop={"lat": 5, "lon": 4}, crop_at="center", cache=0) as source:
        async for _ in source:
            pass
        # rows 7 to 12 lie in 2 of 4 chunks along lat, columns 5 to 9 in 2 of 4 along lon, for 4 cells of 3 samples
        assert source.statistics().chunks == 4 * 2 * 2
        assert source.plan().chunks <= 4 * 16


async def test_of_a_store_elsewhere_those_chunks_alone_are_asked_for() -> None:
    memory = MemoryStore()
    zarr.create_array(memory, data=X, chunks=(3, 5, 4), compressors=None)
    async with stream(memory, inputs=None, crop={1: 5, 2: 4}, crop_at="center", verify="never") as source:
        async for batch in source:
            assert (batch.inputs == X[batch.index, 7:12, 5:9]).all()
        told = source.statistics().fetch
    assert told is not None
    assert told.requests == 4 * 2 * 2


async def test_windows_are_cropped_too(store: Path) -> None:
    found = await samples(store, window={"time": 4}, stride=2, shuffle="block")
    assert sorted(found) == list(range(5))
    for number, patch in found.items():
        a, b = place(patch[0], 2 * number)
        assert (patch == X[2 * number : 2 * number + 4, a : a + 6, b : b + 5]).all()


async def test_jitter_begins_windows_later_within_the_array(store: Path) -> None:
    seen: set[int] = set()
    async with stream(store, inputs="x", targets="y", crop=None, window=3, stride=3, horizon=1, jitter=2) as source:
        assert source.num_samples == 3
        for _ in range(8):
            async for batch in source:
                for number, inputs, target in zip(batch.index, batch.inputs, batch.targets, strict=True):
                    start = int(inputs[0, 0, 0]) // (LAT * LON)
                    assert (inputs == X[start : start + 3]).all()
                    assert target == 10 * (start + 3)
                    assert 0 <= start - 3 * number <= 2
                    seen.add(start)
    assert seen == set(range(9))


@pytest.mark.parametrize("jitter", [0, 1, 2])
async def test_jitter_stays_within_what_is_selected_and_drops_no_window(store: Path, jitter: int) -> None:
    seen: set[tuple[int, int]] = set()
    options: dict[str, Any] = {"window": 2, "stride": 2, "jitter": jitter or None, "select": {0: slice(1, 6)}}
    async with stream(store, crop=None, **options) as source:
        assert source.num_samples == 2
        for _ in range(12):
            for number, patch in (await one_pass(source)).items():
                seen.add((number, int(patch[0, 0, 0]) // (LAT * LON)))
    assert seen == {(1, 2 + shift) for shift in range(jitter + 1)} | {(2, 4)}


async def test_jitter_crosses_no_split(store: Path) -> None:
    for split in ((0.0, 0.5), (0.5, 1.0)):
        async with stream(store, crop=None, window=2, stride=2, jitter=2, split=split) as source:
            for _ in range(6):
                for patch in (await one_pass(source)).values():
                    start = int(patch[0, 0, 0]) // (LAT * LON)
                    assert split[0] * ROWS <= start
                    assert start + 2 <= split[1] * ROWS


async def test_samples_with_a_bad_chunk_in_their_crop_are_skipped_and_no_others(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "s", data=X, chunks=(3, 5, 4), compressors=None)
    (tmp_path / "s" / "c" / "1" / "1" / "1").write_bytes(b"cut short")
    given: dict[str, Any] = {"inputs": None, "crop": {1: 6, 2: 5}, "shuffle": "block"}
    expected = await samples(tmp_path / "s", **given, on_bad_chunk="skip", max_skipped=1.0)
    async with stream(tmp_path / "s", **given, on_bad_chunk="skip", max_skipped=1.0) as source:
        found = await one_pass(source)
        skipped = source.statistics().rows_skipped
    assert same(found, expected)
    assert skipped == ROWS - len(found)
    assert {*range(ROWS)} - {*found} <= {3, 4, 5}
    for number, patch in found.items():
        a, b = place(patch, number)
        assert not (number in (3, 4, 5) and a < 10 and a + 6 > 5 and b < 8 and b + 5 > 4)


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
async def test_arrays_beside_a_crop_lose_no_samples_for_its_bad_chunks(tmp_path: Path, shuffle: Any) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("x", data=X, chunks=(3, 5, 4), compressors=None, dimension_names=("time", "lat", "lon"))
    group.create_array("y", data=np.arange(ROWS), chunks=(ROWS,), dimension_names=("time",))
    (tmp_path / "s/x/c/1/1/1").write_bytes(b"cut short")
    given: dict[str, Any] = {"crop": {"lat": 2, "lon": 2}, "on_bad_chunk": "skip", "max_skipped": 1.0, "seed": 2}
    alone = await samples(tmp_path / "s", **given, shuffle=shuffle)
    assert ROWS - 3 <= len(alone) < ROWS
    for names in (["x", "y"], ["y", "x"]):
        assert {*await samples(tmp_path / "s", **given, inputs=names, shuffle=shuffle)} == {*alone}


async def test_transforms_of_crops_are_not_kept_for_the_next_epoch(store: Path) -> None:
    async with stream(store, transform=lambda batch: batch, cache_transform=True) as source:
        assert not same(await one_pass(source), await one_pass(source))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"crop": {"lat": 21}}, "crop= takes 21 places of axis 'lat'; array 'x' has 20 there"),
        ({"crop": {"time": 2}}, "crop= names axis 'time', along which samples are numbered"),
        ({"crop": {"hight": 2}}, "crop= names the axes 'hight'; the arrays have none"),
        ({"crop": {}}, "crop= is empty"),
        ({"crop": 5}, "crop must be a dict"),
        ({"crop": {"lat": 0}}, r"crop\['lat'\] must be an integer of at least 1"),
        ({"crop_at": "middle"}, "crop_at must be one of 'random', 'center'"),
        ({"jitter": 2}, "jitter= without window="),
        ({"window": 3, "jitter": -1}, "jitter must be an integer of at least 0"),
        ({"inputs": ["x", "small"]}, "array 'x' has places 0 to 20, 'small' 0 to 9"),
        ({"select": {"lat": [0, 3, 4, 5, 6, 7, 8]}}, "of which select= takes some that are not"),
        ({"normalize": {"x": ([0.0] * LAT, [1.0] * LAT)}}, "normalize= has 20 figures along axis 1"),
    ],
)
async def test_what_is_no_crop_is_refused(store: Path, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        await samples(store, **keywords)


def test_places_are_drawn_evenly_and_up_to_the_last() -> None:
    counts = np.bincount(drawn(7, np.arange(60_000), np.int64(5)), minlength=6)
    assert len(counts) == 6
    assert np.abs(counts - 10_000).max() < 500


@st.composite
def drawn_crops(draw: st.DrawFn) -> dict[str, Any]:
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 12)), draw(st.integers(1, 6)))
    over = draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=2, unique=True))
    return {
        "shape": shape,
        "chunks": tuple(draw(st.integers(1, size + 1)) for size in shape),
        "codec": draw(st.sampled_from([None, ZstdCodec(level=1)])),
        "keywords": {
            "crop": {axis: draw(st.integers(1, shape[axis])) for axis in over},
            "window": draw(st.none() | st.integers(1, shape[0])),
            "batch_size": draw(st.integers(1, 9)),
            "shuffle": draw(st.sampled_from([False, "block", "global"])),
            "seed": draw(st.integers(0, 3)),
            "cache": draw(st.sampled_from(["auto", 0])),
        },
    }


@quick
@given(drawn_crops())
def test_every_sample_is_a_patch_of_itself_whatever_its_chunks(case: dict[str, Any]) -> None:
    data = np.arange(np.prod(case["shape"]), dtype=np.int32).reshape(case["shape"]) + 1
    crop = case["keywords"]["crop"]
    lengths = [crop.get(axis, data.shape[axis]) for axis in (1, 2)]

    async def scenario(folder: str) -> None:
        found = await samples(folder, inputs=None, **case["keywords"])
        window = case["keywords"]["window"]
        assert sorted(found) == list(range(len(data) - (window or 1) + 1))
        for number, patch in found.items():
            patch = patch if window else patch[None]
            _, a, b = (int(n) for n in np.unravel_index(int(patch.flat[0]) - 1, data.shape))
            cut = data[number : number + (window or 1), a : a + lengths[0], b : b + lengths[1]]
            assert patch.shape == cut.shape
            assert (patch == cut).all()

    with tempfile.TemporaryDirectory() as folder:
        zarr.create_array(folder, data=data, chunks=case["chunks"], compressors=case["codec"], overwrite=True)
        asyncio.run(scenario(folder))
