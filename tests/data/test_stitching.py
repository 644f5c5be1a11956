"""What stitching promises: places as the source has them, means weighted by a Hann window, bands once and whole."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data.canvas import Axis, Canvas
from streamtrain.data.framing import Frame
from streamtrain.data.stitching import Band, Stitching, hann
from streamtrain.data.windows import Reach
from streamtrain.errors import ConfigError

Values = NDArray[Any]


def patches(places: tuple[int, ...], windows: tuple[int, ...], strides: tuple[int, ...], *, cell: int = 2) -> Canvas:
    """Of windows over all axes."""
    counts = tuple((n - w) // s + 1 for n, w, s in zip(places, windows, strides, strict=True))
    zeros = (0,) * len(places)
    frame = Frame(counts, (cell, *counts[1:]), [], strides, windows, places, zeros, (None,) * len(places))
    axes = tuple(
        Axis(None, n, sample=k, reach=Reach(k, s, 0, w))
        for k, (n, w, s) in enumerate(zip(places, windows, strides, strict=True))
    )
    return Canvas(axes, tuple(range(len(places))), stitched=True, frames=(frame,), bases=(0,))


def cut(source: Values, canvas: Canvas, number: int) -> Values:
    """The sample of this number."""
    start = canvas.starts(np.array([number]))[0]
    return source[tuple(slice(a, a + n) for a, n in zip(start, canvas.extent, strict=True))]


def samples(canvas: Canvas) -> int:
    return int(np.prod(canvas.frames[0].sample_shape))


def stitched(canvas: Canvas, batches: list[tuple[list[int], Values]], folder: Path, **said: Any) -> Values:
    """What stands there in the end, NaN where no band came."""
    dtype = batches[0][1].dtype
    given = {"height": 3, "ordered": True, "memory": 1 << 30, **said}
    stitching = Stitching(canvas, dtype, np.nan, folder=folder, **given)
    result, came = np.full(canvas.shape, np.nan, dtype), []

    def take(band: Band) -> None:
        came.append(band.start)
        result[band.start : band.start + len(band.values)] = band.values
        assert band.missing == bool(np.isnan(band.values).any())

    for numbers, values in batches:
        for band in stitching.put(np.array(numbers), values):
            take(band)
    for band in stitching.rest():
        take(band)
    stitching.close()
    assert came == sorted(set(came)), "each band once, in order"
    return result


def covered(canvas: Canvas) -> NDArray[np.bool_]:
    found = np.zeros(canvas.shape, dtype=bool)
    for number in range(samples(canvas)):
        start = canvas.starts(np.array([number]))[0]
        found[tuple(slice(a, a + n) for a, n in zip(start, canvas.extent, strict=True))] = True
    return found


geometries = st.integers(1, 3).flatmap(
    lambda ndim: st.tuples(*[st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 5)) for _ in range(ndim)])
)


@given(geometries, st.integers(1, 4), st.integers(1, 7), st.booleans(), st.sampled_from(["f2", "f4", "c8"]))
def test_a_model_that_gives_back_its_input_leaves_the_source_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory,
    geometry: tuple[tuple[int, int, int], ...],
    height: int,
    batch: int,
    ordered: bool,
    dtype: str,
) -> None:
    places, windows, strides = zip(*((more + w, w, s) for more, w, s in geometry), strict=True)
    canvas = patches(places, windows, strides)
    source = np.random.default_rng(0).standard_normal(places).astype(dtype)
    order = np.arange(samples(canvas)) if ordered else np.random.default_rng(1).permutation(samples(canvas))
    batches = [
        (numbers.tolist(), np.stack([cut(source, canvas, n) for n in numbers]))
        for numbers in np.split(order, range(batch, len(order), batch))
    ]
    folder = tmp_path_factory.getbasetemp()
    result = stitched(canvas, batches, folder, height=height, ordered=ordered)
    np.testing.assert_array_equal(result, np.where(covered(canvas), source, np.nan).astype(dtype))


def test_overlapping_samples_are_a_mean_weighted_by_a_hann_window(tmp_path: Path) -> None:
    canvas = patches((9, 7), (4, 3), (2, 2))
    values = np.random.default_rng(0).standard_normal((samples(canvas), 4, 3))
    sums, weights = np.zeros((9, 7)), np.zeros((9, 7))
    weight = np.outer(np.sin(np.pi * (np.arange(4) + 0.5) / 4) ** 2, np.sin(np.pi * (np.arange(3) + 0.5) / 3) ** 2)
    for value, (i, j) in zip(values, itertools.product(range(0, 6, 2), range(0, 5, 2)), strict=True):
        sums[i : i + 4, j : j + 3] += weight * value
        weights[i : i + 4, j : j + 3] += weight
    expected = np.full((9, 7), np.nan)
    np.divide(sums, weights, out=expected, where=weights > 0)
    result = stitched(canvas, [(list(range(samples(canvas))), values)], tmp_path)
    np.testing.assert_allclose(result, expected, rtol=1e-14)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_weights_are_above_zero_symmetric_and_sum_to_one_at_half_a_stride(length: int) -> None:
    weights = hann(length)
    assert weights.min() > 0
    np.testing.assert_allclose(weights, weights[::-1])
    if length % 2 == 0:
        np.testing.assert_allclose(weights[: length // 2] + weights[length // 2 :], 1)


def test_bands_are_let_go_while_samples_still_come(tmp_path: Path) -> None:
    canvas = patches((100,), (4,), (2,), cell=1)
    stitching = Stitching(canvas, np.dtype("f4"), np.nan, height=5, folder=tmp_path, ordered=True, memory=1 << 20)
    came = [
        [band.start for band in stitching.put(np.array([n]), np.ones((1, 4), "f4"))] for n in range(samples(canvas))
    ]
    assert [start for starts in came for start in starts] == list(range(0, 95, 5))
    assert max(map(len, came)) == 1
    assert [band.start for band in stitching.rest()] == [95]


def test_more_than_memory_should_hold_waits_in_a_file(tmp_path: Path) -> None:
    canvas = patches((64, 64), (8, 8), (4, 4))
    source = np.random.default_rng(0).standard_normal((64, 64)).astype("f4")
    batches = [([n], cut(source, canvas, n)[None]) for n in range(samples(canvas))]
    stitching = Stitching(canvas, np.dtype("f4"), np.nan, height=3, folder=tmp_path, ordered=True, memory=1 << 10)
    assert not stitching.in_memory
    stitching.close()
    np.testing.assert_array_equal(stitched(canvas, batches, tmp_path, memory=1 << 10), source)


def test_whole_numbers_that_overlap_are_refused_and_side_by_side_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outputs of int64 overlap, and whole numbers can't be blended"):
        Stitching(
            patches((9,), (4,), (2,)), np.dtype("i8"), -1, height=3, folder=tmp_path, ordered=True, memory=1 << 20
        )
    canvas = patches((9,), (4,), (4,))
    stitching = Stitching(canvas, np.dtype("i8"), -1, height=9, folder=tmp_path, ordered=True, memory=1 << 20)
    list(stitching.put(np.arange(2), np.arange(8).reshape(2, 4)))
    (band,) = stitching.rest()
    assert band.values.tolist() == [*range(8), -1]
    assert band.missing


def test_a_source_that_does_not_say_how_long_it_is_may_grow(tmp_path: Path) -> None:
    canvas = Canvas((Axis(None, 0, sample=0), Axis(None, 2)), (0,))
    stitching = Stitching(canvas, np.dtype("f4"), np.nan, height=4, folder=tmp_path, ordered=False, memory=1 << 20)
    for number in (11, 2, 40):
        assert not list(stitching.put(np.array([number]), np.full((1, 2), number, "f4")))
    bands = {band.start: band.values for band in stitching.rest(41)}
    assert sorted(bands) == [0, 8, 40]
    assert bands[40].tolist() == [[40, 40]]
    assert bands[8][3].tolist() == [11, 11]
