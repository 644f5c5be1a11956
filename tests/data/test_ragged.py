"""What streams of ragged rows promise: padded to one length, their own lengths beside them, whatever reads them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamtrain.data import ragged_site, survey
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError, DataError
from tests.data.sparse import write_arrays

RAGGED = {"tokens": "ends"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of a few rows, and blocks that are filled one by one, as large data have them."""
    monkeypatch.setattr(ragged_site, "CELL_BYTES", 0)
    monkeypatch.setattr(ragged_site, "SPANS", 2)
    monkeypatch.setattr(survey, "UNIT_BYTES", 1)


def rows_store(path: Path, lengths: Sequence[int], inner: tuple[int, ...] = (), chunk: int = 20) -> Path:
    """`tokens`, numbered, in rows of these lengths; `ends`, their offsets; `y`, the rows' numbers."""
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shape = (int(ends[-1]), *inner)
    root = zarr.open_group(path, mode="w")
    array = root.create_array("tokens", shape=shape, dtype="int32", chunks=(chunk, *(max(1, n // 2) for n in inner)))
    array[...] = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    write_arrays(root, {"ends": ends, "y": np.arange(len(lengths))}, 7)
    return path


def padded(path: Path, width: int, pad: float = 0) -> NDArray[Any]:
    """All rows, by numpy."""
    root = zarr.open_group(path, mode="r")
    values, ends = (np.asarray(root[name][...]) for name in ("tokens", "ends"))  # type: ignore[index]
    out = np.full((len(ends) - 1, width, *values.shape[1:]), pad, dtype=values.dtype)
    for row, (a, b) in enumerate(itertools.pairwise(ends)):
        part = values[a:b][:width]
        out[row, : len(part)] = part
    return out


def stream(path: Path, **options: Any) -> ZarrStream:
    usual = {"inputs": "tokens", "ragged": RAGGED, "batch_size": 6, "memory": "16MiB", "output": "numpy"}
    return ZarrStream(path, **{**usual, **options})


def epoch(made: ZarrStream, most: int | None = None) -> dict[str, NDArray[Any]]:
    """The batches of a pass, one after another, by name."""

    async def read() -> list[dict[str, NDArray[Any]]]:
        found = []
        async with made:
            async for batch in made:
                found.append({name: part.copy() for name, part in {**batch.inputs, "index": batch.index}.items()})
                if len(found) == most:
                    break
        return found

    batches = asyncio.run(read())
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


LENGTHS = np.random.default_rng(3).integers(0, 15, 101).tolist()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=40).filter(any),
    width=st.none() | st.integers(1, 15),
    inner=st.sampled_from([(), (3,), (2, 4)]),
    chunk=st.integers(1, 30),
    batch=st.integers(1, 20),
    shuffle=st.sampled_from([False, "block", "global"]),
)
def test_rows_are_cut_and_padded_as_numpy_would(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    width: int | None,
    inner: tuple[int, ...],
    chunk: int,
    batch: int,
    shuffle: Any,
) -> None:
    path = rows_store(tmp_path_factory.mktemp("rows") / "s.zarr", lengths, inner, chunk)
    made = stream(path, max_length=width, pad_value=-7, shuffle=shuffle, batch_size=batch)
    found = epoch(made)
    width = max(lengths) if width is None else width
    assert sorted(found["index"]) == list(range(len(lengths)))
    assert np.array_equal(found["tokens"], padded(path, width, -7)[found["index"]])
    assert found["tokens.lengths"].dtype == np.int64
    assert np.array_equal(found["tokens.lengths"], np.minimum(lengths, width)[found["index"]])


@pytest.mark.parametrize(
    "order",
    [
        {"shuffle": True, "shuffle_blocks": 1},
        {"shuffle": True, "split": (0.2, 0.8)},
        {"shuffle": "global", "indices": [1, 5, 100, 7]},
        {"weights": np.arange(101.0)},
    ],
    ids=lambda order: "-".join(map(str, order)),
)
def test_the_order_is_the_same_whatever_reads_it(tmp_path: Path, order: dict[str, Any]) -> None:
    path = rows_store(tmp_path / "s.zarr", LENGTHS)
    first = epoch(stream(path, **order))
    again = epoch(stream(path, **order, threads=1, batch_size=23, prefetch=1, io="pread"))
    assert np.array_equal(first["tokens"], padded(path, max(LENGTHS))[first["index"]])
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("taken", [1, 8])
def test_a_stream_goes_on_where_another_stopped(tmp_path: Path, taken: int) -> None:
    path = rows_store(tmp_path / "s.zarr", LENGTHS)
    whole, first = epoch(stream(path, shuffle=True)), stream(path, shuffle=True)
    begun = epoch(first, taken)
    rest = stream(path, shuffle=True, batch_size=5)
    rest.load_state_dict(first.state_dict())
    after = epoch(rest)
    assert all(np.array_equal(whole[name], np.concatenate([begun[name], after[name]])) for name in whole)


def test_places_of_an_elements_axes_are_taken_and_its_numbers_changed_but_not_the_padding(tmp_path: Path) -> None:
    path = rows_store(tmp_path / "s.zarr", LENGTHS, (4,))
    found = epoch(stream(path, select={1: [2, 0]}, normalize={"tokens": (10.0, 2.0)}, pad_value=-1, shuffle=True))
    expected = (padded(path, max(LENGTHS))[:, :, [2, 0]].astype(np.float32) - 10) / 2
    for row, values in zip(found["index"], found["tokens"], strict=True):
        assert np.array_equal(values[: LENGTHS[row]], expected[row, : LENGTHS[row]])
        assert (values[LENGTHS[row] :] == -1).all()


def test_bad_chunks_cost_the_rows_that_touch_them(tmp_path: Path) -> None:
    path = rows_store(tmp_path / "s.zarr", LENGTHS)
    (path / "tokens" / "c" / "4").write_bytes(b"no chunk")
    ends = np.concatenate([[0], np.cumsum(LENGTHS)])
    lost = {row for row in range(101) if ends[row] < 100 and ends[row + 1] > 80 and LENGTHS[row]}
    found = epoch(stream(path, targets="y", shuffle=True, on_bad_chunk="skip", max_skipped=0.2))
    assert set(range(101)) - set(found["index"].tolist()) == lost
    assert np.array_equal(found["tokens"], padded_without(path, LENGTHS, 4)[found["index"]])


def padded_without(path: Path, lengths: Sequence[int], chunk: int) -> NDArray[Any]:
    """All rows, by the numbers that the store was made of."""
    out, first = np.zeros((len(lengths), max(lengths)), dtype=np.int32), 0
    for row, length in enumerate(lengths):
        out[row, :length] = np.arange(first, first + length)
        first += length
    return out


def test_targets_may_be_ragged_beside_plain_inputs(tmp_path: Path) -> None:
    path = rows_store(tmp_path / "s.zarr", LENGTHS)

    async def read() -> None:
        async for batch in stream(path, inputs="y", targets="tokens", shuffle=True):
            assert sorted(batch.inputs) == ["tokens.lengths", "y"]
            assert np.array_equal(batch.inputs["y"], batch.index)
            assert np.array_equal(batch.targets, padded(path, max(LENGTHS))[batch.index])

    asyncio.run(read())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"ragged": None, "max_length": 3}, ConfigError, "max_length= without ragged="),
        ({"ragged": None, "pad_value": 3}, ConfigError, "pad_value= without ragged="),
        ({"ragged": "tokens"}, ConfigError, "ragged must be a dict of names"),
        ({"ragged": {"tokens": 3}}, ConfigError, "ragged must be a dict of names"),
        ({"max_length": 0}, ConfigError, "max_length must be an integer of at least 1"),
        ({"pad_value": "x"}, ConfigError, "pad_value must be a number"),
        ({"ragged": {**RAGGED, "y": "ends"}}, ConfigError, "ragged= names 'y', which is neither"),
        ({"ragged": {"tokens": "end"}}, DataError, "no array 'end'"),
        (
            {"ragged": {"tokens": "falls"}},
            DataError,
            "'falls': chunk 1: row 2 would end at element 1, before",
        ),
        ({"ragged": {"tokens": "two"}, "targets": "y"}, DataError, "arrays differ in their numbers of samples"),
        ({"pad_value": 0.5}, ConfigError, "pad_value=0.5 is no int32, which 'tokens' is"),
        ({"pad_value": float("nan")}, ConfigError, "pad_value=nan is no int32"),
        ({"window": 3}, ConfigError, "'tokens' has rows of different lengths"),
        ({"inputs": ["tokens", "two"], "targets": "y"}, DataError, "arrays differ in their numbers of samples"),
    ],
)
def test_what_can_not_be_is_said(tmp_path: Path, options: dict[str, Any], error: Any, said: str) -> None:
    path = rows_store(tmp_path / "s.zarr", LENGTHS)
    falling = np.array([0, 3, 5, 1])
    write_arrays(zarr.open_group(path, mode="r+"), {"two": np.arange(2), "falls": falling}, 2)
    with pytest.raises(error, match=said):
        epoch(stream(path, **options))


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
def test_rows_are_as_long_as_the_longest_of_all_stores(tmp_path: Path, shuffle: Any) -> None:
    lengths = ([3, 5, 0, 2], [0, 0, 0], [1, 9])
    paths = [rows_store(tmp_path / f"{number}.zarr", each) for number, each in enumerate(lengths)]
    found = epoch(stream(paths, shuffle=shuffle))  # type: ignore[arg-type]
    expected = np.concatenate([padded(path, 9) for path in paths])
    assert np.array_equal(found["tokens"], expected[found["index"]])
    assert np.array_equal(found["tokens.lengths"], np.concatenate(lengths)[found["index"]])
    with pytest.raises(DataError, match="all of its rows are empty"):
        epoch(stream(paths[1]))


@pytest.mark.parametrize("inner", [(4,), (3, 2)])
def test_long_rows_of_elements_that_are_cut_are_put_together_whole(tmp_path: Path, inner: tuple[int, ...]) -> None:
    lengths = np.random.default_rng(0).integers(150, 300, 24).tolist()
    path = rows_store(tmp_path / "x.zarr", lengths, inner, chunk=500)

    async def scenario() -> None:
        expected = padded(path, max(lengths))
        async with stream(path, shuffle="block") as source:
            async for batch in source:
                rows = batch.inputs["tokens"]
                np.testing.assert_array_equal(rows, expected[batch.index][:, : rows.shape[1]])

    asyncio.run(scenario())
