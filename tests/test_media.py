"""What may be logged beside numbers: images as PNG that others read, tables and histograms as they were when logged."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.errors import ConfigError
from streamtrain.media import MOST_ROWS, Histogram, Image, Table, medium


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4]), st.integers(0, 99))
def test_others_read_the_png_that_we_write(height: int, width: int, channels: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    read = np.asarray(PIL.Image.open(io.BytesIO(Image(pixels).png())))
    assert np.array_equal(read.reshape(pixels.shape), pixels)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (np.zeros((5, 7)), (5, 7, 1)),
        (np.zeros((3, 5, 7)), (5, 7, 3)),
        (np.zeros((5, 7, 3)), (5, 7, 3)),
        (torch.zeros(1, 5, 7), (5, 7, 1)),
        (torch.zeros(3, 5, 4), (5, 4, 3)),
        (np.zeros((3, 5, 4)), (3, 5, 4)),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_the_axis_of_the_channels_is_found(value: Any, shape: tuple[int, ...]) -> None:
    assert Image.of(value).pixels.shape == shape


@pytest.mark.parametrize(
    ("value", "pixels"),
    [
        (np.array([[0, 255]], np.uint8), [0, 255]),
        (np.array([[False, True]]), [0, 255]),
        (np.array([[0.0, 0.5, 1.0]]), [0, 128, 255]),
        (np.array([[0, 200]], np.int64), [0, 200]),
        (np.array([[250.0, 260.0, 270.0, np.nan]]), [0, 128, 255, 0]),
        (torch.tensor([[-1.0, 1.0]], dtype=torch.bfloat16, requires_grad=True), [0, 255]),
        (np.array([[7.0, 7.0]]), [0, 0]),
        (np.array([[np.nan, np.inf]]), [0, 0]),
    ],
    ids=str,
)
def test_numbers_become_brightness(value: Any, pixels: list[int]) -> None:
    assert Image.of(value).pixels.ravel().tolist() == pixels


def test_what_was_logged_does_not_change_with_its_source() -> None:
    image, values = np.zeros((2, 2), np.uint8), torch.zeros(3)
    logged, counted = medium(image, "a"), medium(values, "b")
    image += 1
    values += 1
    assert isinstance(logged, Image)
    assert not logged.pixels.any()
    assert isinstance(counted, Histogram)
    assert counted.total == 0


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    st.integers(0, 3),
    st.integers(1, 64),
)
def test_a_histogram_is_made_of_any_numbers_however_near_or_far_they_lie(
    values: list[float], ulps: int, bins: int
) -> None:
    near = values[0]
    for _ in range(ulps):
        near = float(np.nextafter(near, 0.0))
    histogram = Histogram.of(np.array([*values, near]), bins=bins)
    assert histogram.counts.sum() == len(values) + 1
    assert np.isfinite(histogram.edges).all()
    assert (np.diff(histogram.edges * 0.5) > 0).all()
    assert histogram.edges[0] <= min(values)
    assert histogram.edges[-1] >= max(values)


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=30), st.sampled_from([1e-3, 0.1, 1.0, 1e4]))
def test_a_histogram_of_usual_numbers_is_numpys(values: list[int], unit: float) -> None:
    histogram = Histogram.of(np.array(values) * unit)
    counts, edges = np.histogram(np.array(values) * unit, 64)
    assert histogram.counts.tolist() == counts.tolist()
    assert histogram.edges == pytest.approx(edges, rel=1e-12, abs=1e-12 * unit)


def test_a_histogram_counts_each_finite_value_once() -> None:
    histogram = Histogram.of(np.array([[0.0, 1.0], [1.0, np.nan]]), bins=2)
    assert (histogram.counts.tolist(), histogram.edges.tolist()) == ([1, 2], [0.0, 0.5, 1.0])
    assert (histogram.total, histogram.squares, histogram.left_out) == (2.0, 2.0, 1)
    assert Histogram.of(torch.tensor([float("nan")])).counts.sum() == 0


@pytest.mark.parametrize(
    "value", [{"a": [1, 2], "b": np.array([0.5, np.nan])}, [{"a": 1, "b": 0.5}, {"a": 2, "b": float("nan")}]], ids=str
)
def test_a_table_comes_by_columns_or_by_rows(value: Any) -> None:
    table = medium(value, "t")
    assert isinstance(table, Table)
    assert (table.columns, table.rows) == (("a", "b"), ((1, 0.5), (2, "nan")))
    json.dumps(table.rows, allow_nan=False)


@pytest.mark.parametrize(
    "bad",
    [
        3.0,
        "text",
        torch.zeros(2, 2, 2, 2),
        np.zeros((2, 5, 7)),
        np.zeros((0, 5)),
        {"a": [1], "b": [1, 2]},
        {"a": "text"},
        {"a": range(MOST_ROWS + 1)},
        np.array(["a", "b"]),
        [[1, 2], [3]],
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_what_is_no_medium_is_refused_by_name(bad: Any) -> None:
    with pytest.raises(ConfigError, match="what"):
        medium(bad, "what")
