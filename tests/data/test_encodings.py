"""What AnnData's groups promise: categoricals and masked columns are numbers, and what is none is refused by name."""

from __future__ import annotations

import asyncio
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from streamtrain.data.encodings import encoding_of
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError, DataError
from tests.data.sparse import random_sparse, sparse_store, write_arrays, write_sparse

CODES = np.array([1, 0, 2, 2, 1, 0, 1] * 9, dtype=np.int8)
NAMES = np.array([7, 8, 9])


def categorical(path: Path, codes: Any = CODES) -> Path:
    """A store with a categorical; its categories are numbers, which every zarr writes without a warning."""
    root = zarr.open_group(path, mode="w")
    group = root.create_group("obs").create_group("kind")
    group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
    write_arrays(group, {"codes": codes, "categories": NAMES}, 10)
    write_arrays(root, {"x": np.arange(len(codes), dtype=np.float32)}, 7)
    return path


def stream(path: Path, **options: Any) -> ZarrStream:
    usual = {"inputs": "x", "targets": "obs/kind", "batch_size": 8, "output": "numpy"}
    return ZarrStream(path, **{**usual, **options})


def epoch(made: ZarrStream) -> list[Any]:
    async def read() -> list[Any]:
        async with made:
            return [batch async for batch in made]

    return asyncio.run(read())


@pytest.mark.parametrize("shuffle", [False, True, "global"])
def test_a_categorical_is_its_codes_and_its_names_are_told(tmp_path: Path, shuffle: Any) -> None:
    made = stream(categorical(tmp_path / "s.zarr"), shuffle=shuffle)
    for batch in epoch(made):
        assert batch.targets.dtype == np.int64
        assert np.array_equal(batch.targets, CODES[batch.index])
    assert made.categories("obs/kind") == ("7", "8", "9")
    with pytest.raises(ConfigError, match="'x' is no categorical"):
        made.categories("x")


def test_a_categorical_chooses_groups_and_balances(tmp_path: Path) -> None:
    path = categorical(tmp_path / "s.zarr")
    first, second = (
        set(np.concatenate([b.targets for b in epoch(stream(path, groups="obs/kind", split=part))]))
        for part in ((0.0, 0.5), (0.5, 1.0))
    )
    assert not first & second
    path = categorical(tmp_path / "sorted.zarr", np.sort(CODES))
    found = np.concatenate([b.targets for b in epoch(stream(path, balance="obs/kind"))])
    assert np.ptp(np.bincount(found)) <= 1


@pytest.mark.parametrize(
    ("code", "said"),
    [(-1, r"'obs/kind/codes': row 13 has no category"), (3, r"row 13 has the code 3; there are categories 0 to 2")],
)
@pytest.mark.parametrize("shuffle", [False, True, "global"])
def test_a_row_without_a_category_is_refused_and_may_be_left_out(
    tmp_path: Path, code: int, said: str, shuffle: Any
) -> None:
    codes = CODES.copy()
    codes[13] = code
    path = categorical(tmp_path / "s.zarr", codes)
    with pytest.raises(DataError, match=said):
        epoch(stream(path, shuffle=shuffle))
    kept = np.delete(np.arange(len(codes)), 13)
    found = epoch(stream(path, shuffle=shuffle, indices=kept))
    assert sorted(np.concatenate([batch.index for batch in found])) == kept.tolist()


@pytest.mark.parametrize("option", [{"balance": "obs/kind"}, {"groups": "obs/kind", "split": (0.0, 1.0)}])
@pytest.mark.parametrize("code", [-1, 3])
def test_a_row_without_a_category_is_no_class_of_its_own(tmp_path: Path, option: Any, code: int) -> None:
    codes = CODES.copy()
    codes[13] = code
    path = categorical(tmp_path / "s.zarr", codes)
    with pytest.raises(DataError, match=rf"'obs/kind': sample 13 has no category \(code {code}\)"):
        epoch(stream(path, targets=None, **option))
    kept = np.delete(np.arange(len(codes)), 13)
    found = epoch(stream(path, targets=None, indices=kept, **option))
    assert 13 not in np.concatenate([batch.index for batch in found])


def test_a_categorical_as_older_anndata_wrote_it(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=2)
    obs = root.create_group("obs")
    write_arrays(obs, {"kind": CODES}, 10)
    obs["kind"].attrs["categories"] = "__categories/kind"
    write_arrays(obs.create_group("__categories"), {"kind": NAMES}, 10)
    write_arrays(root, {"x": np.arange(len(CODES), dtype=np.float32)}, 7)
    made = stream(tmp_path / "s.zarr")
    assert np.array_equal(np.concatenate([batch.targets for batch in epoch(made)]), CODES)
    assert made.categories("obs/kind") == ("7", "8", "9")


def test_sparse_rows_as_older_anndata_wrote_them(tmp_path: Path) -> None:
    matrix = random_sparse(30, 8, 5)
    path = sparse_store(tmp_path / "s.zarr", matrix, zarr_format=2)
    attributes = zarr.open_group(path, mode="r+")["X"].attrs
    attributes.put({"h5sparse_format": "csr", "h5sparse_shape": [30, 8]})
    [batch] = epoch(stream(path, inputs="X", targets=None, batch_size=30))
    assert np.array_equal(batch.inputs, matrix.dense)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_masked_column_is_its_values_where_none_is_missing(tmp_path: Path, shuffle: bool) -> None:
    path = categorical(tmp_path / "s.zarr")
    group = zarr.open_group(path, mode="r+").create_group("obs/age")
    group.attrs["encoding-type"] = "nullable-integer"
    values, mask = np.arange(len(CODES)), np.zeros(len(CODES), dtype=bool)
    write_arrays(group, {"values": values, "mask": mask}, 10)
    for batch in epoch(stream(path, targets="obs/age", shuffle=shuffle)):
        assert np.array_equal(batch.targets, batch.index)
    group["mask"][41] = True  # type: ignore[index]
    with pytest.raises(DataError, match="'obs/age/mask': row 41 has no value"):
        epoch(stream(path, targets="obs/age", shuffle=shuffle))
    with pytest.raises(DataError, match="'obs/age' has rows without a value"):
        epoch(stream(path, weights="obs/age"))


def masked(path: Path, missing: tuple[int, ...]) -> Path:
    """A store with a masked column, whose rows are all in one chunk of `x`."""
    root = zarr.open_group(path, mode="w")
    group = root.create_group("obs/age")
    group.attrs["encoding-type"] = "nullable-integer"
    rows = np.arange(63)
    write_arrays(group, {"values": rows, "mask": np.isin(rows, missing)}, 10, compressors=None)
    write_arrays(root, {"x": rows.astype(np.float32)}, 63)
    return path


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
def test_where_a_mask_is_damaged_its_rows_are_lost_and_no_others(tmp_path: Path, shuffle: Any) -> None:
    path = masked(tmp_path / "s.zarr", (35,))
    for name, chunk in (("mask", 3), ("values", 5)):
        (path / f"obs/age/{name}/c/{chunk}").write_bytes(b"cut")
    given: dict[str, Any] = {"on_bad_chunk": "skip", "max_skipped": 0.5, "shuffle": shuffle}
    found = epoch(stream(path, targets="obs/age", **given))
    assert all(np.array_equal(batch.targets, batch.index) for batch in found)
    lost = {*range(30, 40), *range(50, 60)}
    assert sorted(np.concatenate([batch.index for batch in found])) == sorted({*range(63)} - lost)


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
def test_a_damaged_part_of_a_mask_hides_no_missing_row_of_the_others(tmp_path: Path, shuffle: Any) -> None:
    path = masked(tmp_path / "s.zarr", (47,))
    (path / "obs/age/mask/c/3").write_bytes(b"cut")
    with pytest.raises(DataError, match="'obs/age/mask': row 47 has no value"):
        epoch(stream(path, targets="obs/age", on_bad_chunk="skip", max_skipped=0.5, shuffle=shuffle))


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"encoding-type": "csc_matrix", "shape": [3, 4]}, r"'X' is a csc_matrix.*tocsr\(\)"),
        ({"encoding-type": "dataframe", "column-order": ["age"]}, "'X' is a dataframe.*'X/age'"),
        ({"encoding-type": "nullable-string-array"}, "'X' is a nullable-string-array.*strings_to_categoricals"),
        ({"encoding-type": "csr_matrix", "shape": [3]}, r"'X' has the shape \[3\]"),
        ({"encoding-type": "csr_matrix"}, "'X' has the shape None"),
        ({"encoding-type": "csr_matrix", "shape": [3, -4]}, "not rows and columns"),
    ],
)
def test_what_is_no_row_of_numbers_is_refused_with_what_to_do(attributes: Any, said: str) -> None:
    with pytest.raises(DataError) as raised:
        encoding_of("X", attributes)
    assert re.search(said, f"{raised.value} {raised.value.hint}")


@pytest.mark.parametrize("attributes", [{}, {"encoding-type": 3}, {"encoding-type": []}, 3, None])
def test_a_plain_group_is_no_encoding(attributes: Any) -> None:
    assert encoding_of("X", attributes) is None


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"targets": "obs/kin"}, "no array 'obs/kin'; there are: X, obs/kind, x$", "did you mean 'obs/kind'"),
        ({"inputs": "XX"}, "no array 'XX'; there are: X, obs/kind, x$", "did you mean 'X'"),
        ({"inputs": None, "targets": None}, "holds X, obs/kind, x$", "name one"),
    ],
)
def test_who_misses_an_array_is_told_of_groups_and_not_of_the_arrays_in_them(
    tmp_path: Path, options: dict[str, Any], said: str, hint: str
) -> None:
    path = categorical(tmp_path / "s.zarr")
    write_sparse(zarr.open_group(path, mode="r+"), "X", random_sparse(len(CODES), 4, 3))
    with pytest.raises(DataError, match=said) as caught:
        epoch(stream(path, **options))
    assert hint in caught.value.hint


def test_a_group_without_its_arrays_is_named(tmp_path: Path) -> None:
    path = sparse_store(tmp_path / "s.zarr", random_sparse(9, 4, 3))
    root = zarr.open_group(path, mode="r+")
    del root["X/indices"]
    with pytest.raises(DataError, match="no array 'X/indices'"):
        epoch(stream(path, inputs="X", targets=None))
    write_arrays(root, {"X/indices": np.arange(2)}, 2)
    with pytest.raises(DataError, match="there must be one column for each value"):
        epoch(stream(path, inputs="X", targets=None))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_anndata_writes(tmp_path: Path, zarr_format: int) -> None:
    anndata = pytest.importorskip("anndata")
    pandas, scipy = pytest.importorskip("pandas"), pytest.importorskip("scipy.sparse")
    matrix = random_sparse(63, 20, 9)
    kinds = pandas.Categorical.from_codes(CODES, ["a", "b", "c"])
    obs = pandas.DataFrame({"kind": kinds, "name": [f"n{i}" for i in range(63)]}, index=[str(i) for i in range(63)])
    x = scipy.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=(63, 20))
    path = tmp_path / "a.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with anndata.settings.override(zarr_write_format=zarr_format):
            anndata.AnnData(X=x, obs=obs, layers={"counts": x * 2, "columns": x.tocsc()}).write_zarr(path)
    made = stream(path, inputs=["X", "layers/counts"], shuffle=True)
    for batch in epoch(made):
        assert np.array_equal(batch.inputs["X"], matrix.dense[batch.index])
        assert np.array_equal(batch.inputs["layers/counts"], 2 * matrix.dense[batch.index])
        assert np.array_equal(batch.targets, CODES[batch.index])
    assert made.categories("obs/kind") == ("a", "b", "c")
    for name, said in (("layers/columns", "is a csc_matrix"), ("obs", "is a dataframe"), ("obs/name", "obs/name")):
        with pytest.raises(DataError, match=said):
            epoch(stream(path, inputs=name, targets=None))


def test_two_ways_to_write_one_layer(tmp_path: Path) -> None:
    matrix = random_sparse(40, 9, 6)
    path = sparse_store(tmp_path / "s.zarr", matrix, chunk=5, compressors=None)
    write_sparse(zarr.open_group(path, mode="r+"), "layers/counts", matrix, chunk=1000)
    for batch in epoch(stream(path, inputs=["X", "layers/counts"], targets="y", shuffle=True)):
        assert np.array_equal(batch.inputs["X"], batch.inputs["layers/counts"])
