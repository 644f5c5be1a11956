"""A position is of data, not only of their shapes: files that manifests vouch for are known again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.data import contents
from streamtrain.data.stream import ZarrStream
from streamtrain.data.vouching import vouch
from streamtrain.errors import DataError


def written(path: Path, value: float, *, codec: Any = None, vouched: bool = True) -> Path:
    group = zarr.create_group(path)
    for name in ("x", "y"):
        group.create_array(name, data=np.full((40, 3), value, np.float32), chunks=(10, 3), compressors=codec)
    if vouched:
        vouch(path)
    return path


def stream(*stores: Path, **options: Any) -> ZarrStream:
    named = [str(store) for store in stores]
    return ZarrStream(named if len(named) > 1 else named[0], inputs="x", batch_size=8, output="numpy", **options)


@pytest.mark.parametrize("io", ["auto", "store"])
@pytest.mark.parametrize("count", [1, 12], ids=["one", "several"])
def test_other_values_of_the_same_shape_are_other_data(tmp_path: Path, io: Any, count: int) -> None:
    state = stream(*(written(tmp_path / f"a{n}", n) for n in range(count)), io=io).state_dict()
    assert len(json.dumps(state)) <= 1024
    others = [written(tmp_path / f"b{n}", 99 if n == count - 1 else n) for n in range(count)]
    with pytest.raises(DataError, match=r"^the dataset changed since .*: the files.* then, .* now, by the manifest$"):
        stream(*others, io=io).load_state_dict(state)


@pytest.mark.parametrize(
    "other", [{}, {"codec": "auto"}, {"vouched": False}], ids=["a copy", "encoded otherwise", "not vouched for"]
)
def test_what_is_the_same_or_cant_be_compared_goes_on(tmp_path: Path, other: dict[str, Any]) -> None:
    first, second = written(tmp_path / "a", 1), written(tmp_path / "b", 1, **other)
    for one, two in ((first, second), (second, first)):
        stream(two).load_state_dict(stream(one).state_dict())


def test_an_array_that_is_not_read_may_change(tmp_path: Path) -> None:
    state = stream(written(tmp_path / "a", 1)).state_dict()
    changed = written(tmp_path / "b", 1)
    shutil.rmtree(changed / "y")
    zarr.open_group(changed, mode="a").create_array("y", data=np.zeros((40, 3), np.float32), chunks=(10, 3))
    stream(changed).load_state_dict(state)


@given(st.lists(st.text("0123456789abcdef", min_size=8, max_size=8), min_size=2, max_size=30))
def test_one_table_that_differs_is_found_however_many_there_are(tables: list[str]) -> None:
    def told(of: list[str]) -> dict[str, str]:
        return contents.told({f"array{n}": [f"00000000-{table}"] for n, table in enumerate(of)})

    other = [*tables[:-1], "g" * 8]
    assert contents.changed(told(tables), told(tables)) == []
    assert len(contents.changed(told(tables), told(other))) == 1
    assert len(str(told(tables))) <= contents.LONGEST
