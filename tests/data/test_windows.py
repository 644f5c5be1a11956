"""What windows and patches promise: each sample is the source's own places, whole, once an epoch, in its split."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, ZstdCodec

from streamtrain.data.batch import Batch
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError, DataError

STEPS, WIDE, HIGH = 50, 3, 2
T: NDArray[np.float32] = np.arange(STEPS * WIDE, dtype=np.float32).reshape(STEPS, WIDE)
Y: NDArray[np.int64] = np.arange(STEPS, dtype=np.int64) * 10
MAP: NDArray[np.int32] = np.arange(12 * 15, dtype=np.int32).reshape(12, 15)
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "data.zarr"
    group = zarr.create_group(path)
    group.create_array("t", data=T, chunks=(7, 2), compressors=None, dimension_names=("time", "x"))
    group.create_array("y", data=Y, chunks=(11,), dimension_names=("time",))
    group.create_array("height", data=np.arange(WIDE), dimension_names=("x",))
    group.create_array("map", data=MAP, chunks=(5, 4), dimension_names=("lat", "lon"))
    series = np.arange(4 * 12 * 15, dtype=np.int32).reshape(4, 12, 15)
    group.create_array("series", data=series, chunks=(2, 5, 4), dimension_names=("time", "lat", "lon"))
    return path


async def collect(source: ZarrStream) -> list[Batch]:
    """Batches of a pass, as copies."""
    found: list[Batch] = []
    async for batch in source:
        targets = None if batch.targets is None else batch.targets.copy()
        inputs = batch.inputs
        copied = {k: v.copy() for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.copy()
        found.append(Batch(copied, targets, batch.index.copy()))
        del batch, inputs
    return found


async def samples(store: Any, **keywords: Any) -> tuple[NDArray[Any], NDArray[Any], Any]:
    """Sample numbers in ascending order with their inputs and targets."""
    given: dict[str, Any] = {"inputs": "t", "batch_size": 4, "output": "numpy", "shuffle": "block", **keywords}
    async with ZarrStream(store, **given) as source:
        batches = await collect(source)
    numbers = np.concatenate([batch.index for batch in batches])
    order = np.argsort(numbers)
    inputs = np.concatenate([batch.inputs for batch in batches])[order]
    targets = np.concatenate([b.targets for b in batches])[order] if batches[0].targets is not None else None
    return numbers[order], inputs, targets


async def test_a_window_is_so_many_places_from_each_start(store: Path) -> None:
    numbers, inputs, _ = await samples(store, window={"time": 8})
    assert numbers.tolist() == list(range(STEPS - 7))
    assert all((window == T[number : number + 8]).all() for number, window in zip(numbers, inputs, strict=True))


async def test_a_stride_takes_every_so_manyth_start(store: Path) -> None:
    numbers, inputs, _ = await samples(store, window=8, stride=5)
    assert len(numbers) == (STEPS - 8) // 5 + 1
    assert (inputs[3] == T[15:23]).all()


async def test_the_target_lies_a_horizon_behind_the_windows_last_place(store: Path) -> None:
    numbers, inputs, targets = await samples(store, targets="y", window=8, horizon=3)
    assert targets.shape == (STEPS - 10,)
    assert (targets == Y[numbers + 7 + 3]).all()
    assert (inputs[-1] == T[STEPS - 11 : STEPS - 3]).all()


async def test_a_target_window_is_so_many_places_with_an_axis(store: Path) -> None:
    numbers, _, targets = await samples(store, targets="y", window=8, horizon=1, target_window=4)
    assert targets.shape == (STEPS - 11, 4)
    assert (targets == Y[numbers[:, None] + 8 + np.arange(4)]).all()


async def test_without_a_horizon_targets_cover_the_window(store: Path) -> None:
    numbers, _, targets = await samples(store, targets="y", window=8)
    assert (targets == Y[numbers[:, None] + np.arange(8)]).all()


async def test_an_array_without_the_axis_stands_beside_every_window(store: Path) -> None:
    async with ZarrStream(store, inputs=["t", "height"], window={"time": 8}, batch_size=4, output="numpy") as source:
        for batch in await collect(source):
            assert batch.inputs["height"].shape == (len(batch), WIDE)
            assert (batch.inputs["height"] == np.arange(WIDE)).all()


async def test_patches_lie_side_by_side_unless_told_otherwise(store: Path) -> None:
    numbers, inputs, _ = await samples(store, inputs="map", window={"lat": 4, "lon": 5})
    assert len(numbers) == 3 * 3
    assert (inputs[4] == MAP[4:8, 5:10]).all()


async def test_patches_overlap_by_their_stride(store: Path) -> None:
    numbers, inputs, _ = await samples(store, inputs="map", window={"lat": 4, "lon": 5}, stride={"lat": 2, "lon": 1})
    assert len(numbers) == 5 * 11
    assert (inputs[12] == MAP[2:6, 1:6]).all()


@pytest.mark.parametrize(
    ("stride", "count"), [(None, 9), ({"lat": 2}, 15), ({"lon": 1}, 33), ({"lat": 2, "lon": 1}, 55), (4, 9)]
)
async def test_patches_keep_their_own_stride_along_axes_of_which_nothing_is_said(
    store: Path, stride: Any, count: int
) -> None:
    numbers, _, _ = await samples(store, inputs="map", window={"lat": 4, "lon": 5}, stride=stride)
    assert len(numbers) == count


async def test_windows_keep_the_order_in_which_sample_axes_are_named(store: Path) -> None:
    series = np.arange(4 * 12 * 15).reshape(4, 12, 15)
    plain: dict[str, Any] = {"inputs": "series", "sample_axes": (2, 0)}
    _, rows, _ = await samples(store, **plain)
    assert (rows == series.transpose(2, 0, 1).reshape(60, 12)).all()
    _, inputs, _ = await samples(store, **plain, window={"lon": 3})
    starts = np.arange(13)[:, None] + np.arange(3)
    assert (inputs == series[:, :, starts].transpose(2, 0, 1, 3).reshape(52, 12, 3)).all()
    _, patches, _ = await samples(store, **plain, window={"lat": 4, "lon": 5})
    assert len(patches) == 3 * 4 * 3
    assert (patches[1] == series[0, 4:8, :5]).all()
    assert (patches[3] == series[1, :4, :5]).all()
    assert (patches[12] == series[0, :4, 5:10]).all()


async def test_patches_of_each_step_of_a_series(store: Path) -> None:
    numbers, inputs, _ = await samples(store, inputs="series", window={"lat": 4, "lon": 5})
    assert len(numbers) == 4 * 9
    assert inputs.shape == (36, 4, 5)


@pytest.mark.parametrize("stride", [1, 3])
async def test_a_window_belongs_to_a_split_only_whole_horizon_included(store: Path, stride: int) -> None:
    seen: list[set[int]] = []
    for split in ((0.0, 0.5), (0.5, 1.0)):
        numbers, _, _ = await samples(store, targets="y", window=8, horizon=2, stride=stride, split=split)
        starts = numbers * stride
        assert starts.min() >= split[0] * STEPS
        assert (starts + 10).max() <= split[1] * STEPS
        seen.append({place for start in starts for place in range(start, start + 10)})
    assert not seen[0] & seen[1]


async def test_overlapping_windows_cannot_be_split_by_sample(store: Path) -> None:
    with pytest.raises(ConfigError, match="both parts"):
        await samples(store, window=8, split=(0.0, 0.5), split_by="sample")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"window": 51}, "a sample covers 51 places of axis 0, and there are 50"),
        ({"window": {"tyme": 8}}, "names the axis 'tyme'"),
        ({"window": {5: 8}}, "names axis 5"),
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"stride": 2}, "stride= without window="),
        ({"horizon": 1}, "horizon= without window="),
        ({"window": 8, "target_window": 2}, "target_window= without horizon="),
        ({"window": {"time": 2, "x": 2}, "horizon": 1}, "horizon= needs a window over one axis"),
        ({"window": {}}, "window= is empty"),
    ],
)
async def test_what_is_no_window_is_refused(store: Path, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        await samples(store, **keywords)


@pytest.mark.parametrize("places", [[0, 36], [36, 0, 35], slice(0, 37, 12), [5]], ids=str)
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"sample_axes": (0, 1)},
        {"window": 1},
        {"window": 4, "stride": 4},
        {"window": 4, "stride": 4, "io": "store"},
        {"window": 4, "stride": 4, "shuffle": "global"},
        {"window": {1: 2}},
    ],
    ids=str,
)
async def test_chunks_of_which_nothing_is_selected_are_neither_read_nor_planned_nor_missed(
    tmp_path: Path, places: Any, keywords: dict[str, Any]
) -> None:
    data = np.arange(16 * 4 * 37, dtype=np.int32).reshape(16, 4, 37)
    zarr.create_array(tmp_path / "s", data=data, chunks=(4, 4, 1))
    taken = np.arange(37)[places]
    for level in {*range(37)} - {*taken.tolist()}:
        for row in range(4):
            (tmp_path / f"s/c/{row}/0/{level}").write_bytes(b"cut short")
    given: dict[str, Any] = {"batch_size": 4, "select": {2: places}, "cache": 0, "output": "numpy", **keywords}
    async with ZarrStream(tmp_path / "s", **given) as source:
        for batch in await collect(source):
            assert batch.inputs.shape[-1] == len(taken)
            if not keywords:
                assert (batch.inputs == data[batch.index][..., taken]).all()
        assert source.statistics().chunks == source.plan().chunks == 4 * len(taken)
        assert source.plan().read_amplification == 1


async def test_a_bad_chunk_costs_the_windows_that_have_something_of_it(tmp_path: Path) -> None:
    data = np.arange(40 * 2 * 6, dtype=np.int32).reshape(40, 2, 6)
    given: dict[str, Any] = {"window": 4, "stride": 3, "on_bad_chunk": "skip", "max_skipped": 1.0, "batch_size": 5}
    for column, lost in ((0, 4), (1, 0), (2, 4), (3, 0)):
        zarr.create_array(tmp_path / "s", data=data, chunks=(10, 2, 1), overwrite=True)
        (tmp_path / f"s/c/1/0/{column}").write_bytes(b"cut short")
        async with ZarrStream(tmp_path / "s", select={2: [2, 0]}, output="numpy", **given) as source:
            for batch in await collect(source):
                starts = 3 * batch.index[:, None]
                assert (batch.inputs == data[starts + np.arange(4)][..., [2, 0]]).all()
            assert source.statistics().rows_skipped == lost


async def test_a_chunk_serves_all_windows_of_its_cell_with_one_read(tmp_path: Path) -> None:
    data = np.arange(4096 * 4, dtype=np.float32).reshape(4096, 4)
    zarr.create_array(tmp_path / "one", data=data, chunks=(8, 4))
    async with ZarrStream(tmp_path / "one", window=24, batch_size=32, output="numpy", cache=0) as source:
        async for _ in source:
            pass
        assert source.statistics().chunks <= 1.3 * 4096 / 8


# ---- for every shape


@dataclass(frozen=True)
class Drawn:
    shape: tuple[int, ...]
    options: dict[str, Any]
    keywords: dict[str, Any] = field(default_factory=dict)


@st.composite
def drawn_windows(draw: st.DrawFn) -> Drawn:
    ndim = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 40 if axis == 0 else 7)) for axis in range(ndim))
    chunks = tuple(draw(st.integers(1, size + 1)) for size in shape)
    over = draw(st.lists(st.integers(0, ndim - 1), min_size=1, max_size=2, unique=True))
    window = {axis: draw(st.integers(1, shape[axis])) for axis in over}
    keywords: dict[str, Any] = {
        "window": window,
        "stride": draw(st.none() | st.integers(1, 5)),
        "sample_axes": draw(st.sampled_from([(0,), tuple(over)])),
        "batch_size": draw(st.integers(1, 9)),
        "shuffle": draw(st.sampled_from([False, "block", "global"])),
        "shuffle_blocks": draw(st.none() | st.integers(1, 4)),
        "cache": draw(st.sampled_from(["auto", 0])),
        "threads": draw(st.integers(1, 3)),
    }
    codec = draw(st.sampled_from([None, None, ZstdCodec(level=1), BloscCodec(typesize=1)]))
    return Drawn(shape, {"chunks": chunks, "compressors": codec}, keywords)


@contextmanager
def written(drawn: Drawn) -> Iterator[tuple[str, NDArray[Any]]]:
    data = np.arange(np.prod(drawn.shape), dtype=np.int32).reshape(drawn.shape) + 1
    with tempfile.TemporaryDirectory() as folder:
        zarr.create_array(folder, data=data, overwrite=True, **drawn.options)
        yield folder, data


def expected(data: NDArray[Any], drawn: Drawn) -> NDArray[Any]:
    """All samples in the order of their numbers, by numpy's own windows."""
    window: dict[int, int] = drawn.keywords["window"]
    given = drawn.keywords["stride"]
    axes = sorted({*drawn.keywords["sample_axes"], *window})
    strides = [1 if axis not in window else given or (1 if len(window) == 1 else window[axis]) for axis in axes]
    view = np.lib.stride_tricks.sliding_window_view(data, [window.get(a, 1) for a in axes], axis=tuple(axes))
    cut = [slice(None)] * data.ndim
    for axis, stride in zip(axes, strides, strict=True):
        cut[axis] = slice(None, None, stride)
    view = view[tuple(cut)]
    others = [axis for axis in range(data.ndim) if axis not in axes]
    # (starts along the axes, then one sample's axes in the array's order, single places left out)
    inner = {axis: data.ndim + place for place, axis in enumerate(axes)}
    kept = [inner[axis] if axis in axes else axis for axis in range(data.ndim) if axis in window or axis in others]
    gone = [inner[axis] for axis in axes if axis not in window]
    moved = view.transpose([*axes, *kept, *gone]).reshape(
        *(view.shape[a] for a in axes), *(view.shape[k] for k in kept)
    )
    result: NDArray[Any] = moved.reshape(-1, *moved.shape[len(axes) :])
    return result


@quick
@given(drawn_windows())
def test_every_sample_once_an_epoch_as_numpy_cuts_it(drawn: Drawn) -> None:
    async def scenario(folder: str, data: NDArray[Any]) -> None:
        wanted = expected(data, drawn)
        async with ZarrStream(folder, output="numpy", memory="16MiB", **drawn.keywords) as source:
            for _ in range(2):
                batches = await collect(source)
                numbers = np.concatenate([batch.index for batch in batches])
                assert sorted(numbers.tolist()) == list(range(len(wanted)))
                found = np.concatenate([batch.inputs for batch in batches])
                assert found.shape[1:] == wanted.shape[1:]
                assert (found == wanted[numbers]).all()

    with written(drawn) as (folder, data):
        asyncio.run(scenario(folder, data))


@quick
@given(drawn_windows(), st.data())
def test_of_windows_any_places_are_selected_in_any_order(drawn: Drawn, more: st.DataObject) -> None:
    framed = {*drawn.keywords["sample_axes"], *drawn.keywords["window"]}
    inner = [axis for axis in range(len(drawn.shape)) if axis not in framed]
    select: dict[int | str, Any] = {
        axis: more.draw(st.lists(st.integers(0, drawn.shape[axis] - 1), min_size=1, max_size=9)) for axis in inner
    }

    async def scenario(folder: str, data: NDArray[Any]) -> None:
        for axis in inner:
            data = data.take(select[axis], axis=axis)
        wanted = expected(data, drawn)
        async with ZarrStream(folder, select=select, output="numpy", memory="16MiB", **drawn.keywords) as source:
            for batch in await collect(source):
                assert (batch.inputs == wanted[batch.index]).all()

    assume(inner)
    with written(drawn) as (folder, data):
        asyncio.run(scenario(folder, data))


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
async def test_only_windows_that_touch_a_bad_chunk_are_skipped(tmp_path: Path, shuffle: Any) -> None:
    zarr.create_array(tmp_path / "s", data=T, chunks=(7, WIDE), compressors=None)
    (tmp_path / "s" / "c" / "3" / "0").write_bytes(b"cut short")
    given: dict[str, Any] = {
        "window": 4,
        "batch_size": 5,
        "shuffle": shuffle,
        "on_bad_chunk": "skip",
        "max_skipped": 1.0,
    }
    async with ZarrStream(tmp_path / "s", output="numpy", **given) as source:
        batches = await collect(source)
        skipped = source.statistics().rows_skipped
    numbers = np.concatenate([batch.index for batch in batches])
    touching = {start for start in range(STEPS - 3) if start < 28 and start + 4 > 21}
    assert sorted(numbers.tolist()) == [n for n in range(STEPS - 3) if n not in touching]
    assert skipped == len(touching)
    inputs = np.concatenate([batch.inputs for batch in batches])
    assert (inputs == T[numbers[:, None] + np.arange(4)]).all()


@pytest.mark.parametrize("names", [["t", "y"], ["y", "t"]], ids=str)
@pytest.mark.parametrize("shuffle", [False, "block", "global"])
async def test_arrays_beside_windows_lose_none_for_their_bad_chunks(
    tmp_path: Path, shuffle: Any, names: list[str]
) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("t", data=T, chunks=(7, WIDE), compressors=None, dimension_names=("time", "x"))
    group.create_array("y", data=Y, chunks=(STEPS,), dimension_names=("time",))
    (tmp_path / "s/t/c/3/0").write_bytes(b"cut short")
    given: dict[str, Any] = {"window": {"time": 4}, "on_bad_chunk": "skip", "max_skipped": 1.0, "batch_size": 5}
    async with ZarrStream(tmp_path / "s", inputs=names, shuffle=shuffle, output="numpy", **given) as source:
        numbers = np.concatenate([batch.index for batch in await collect(source)])
    assert sorted(numbers.tolist()) == [n for n in range(STEPS - 3) if not (n < 28 and n + 4 > 21)]
