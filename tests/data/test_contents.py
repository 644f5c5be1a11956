"""A position is of data, not only of their shapes: files that manifests vouch for are known again."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore, WrapperStore, ZipStore

from streamtrain.data import contents
from streamtrain.data.manifest import PLACE
from streamtrain.data.stream import ZarrStream
from streamtrain.data.vouching import vouch
from streamtrain.errors import DataError
from tests.data.test_remote_manifest import content, in_memory


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


@pytest.mark.parametrize("vouched", [True, False], ids=["manifest", "none"])
@pytest.mark.parametrize("io", ["auto", "store"])
@pytest.mark.parametrize("count", [1, 12], ids=["one", "several"])
def test_other_values_of_the_same_shape_are_other_data(tmp_path: Path, io: Any, count: int, vouched: bool) -> None:
    state = stream(*(written(tmp_path / f"a{n}", n, vouched=vouched) for n in range(count)), io=io).state_dict()
    assert len(json.dumps(state)) <= 1024
    others = [written(tmp_path / f"b{n}", 99 if n == count - 1 else n, vouched=vouched) for n in range(count)]
    by = "the manifest" if vouched else "the beginnings of some"
    with pytest.raises(DataError, match=rf"^the dataset changed since .*: the files.* then, .* now, by {by}$"):
        stream(*others, io=io).load_state_dict(state)


def test_values_that_change_behind_all_beginnings_are_seen_by_a_manifest_alone(tmp_path: Path) -> None:
    for vouched in (True, False):
        states = []
        for name, last in (("a", 1), ("b", 2)):
            data = np.zeros((1, 1 << 16), np.float32)
            data[0, -1] = last
            group = zarr.create_group(tmp_path / f"{name}{vouched}")
            group.create_array("x", data=data, chunks=data.shape, compressors=None)
            if vouched:
                vouch(tmp_path / f"{name}{vouched}")
            states.append(stream(tmp_path / f"{name}{vouched}").state_dict()["of"]["contents"])
        assert (states[0] != states[1]) == vouched


@contextmanager
def elsewhere(kind: str, root: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The same bytes in another place, as a stream's arguments."""
    if kind == "folder":
        yield {"store": str(root)}
    elif kind == "zip":
        with zipfile.ZipFile(root.with_suffix(".zip"), "w") as packed:
            for key, data in content(root).items():
                packed.writestr(key, data)
        yield {"store": ZipStore(root.with_suffix(".zip"), mode="r")}
    elif kind == "memory":
        yield {"store": in_memory(content(root))}
    elif kind == "s3":
        cloud = pytest.importorskip("tests.data.cloud", reason="obstore is not installed")
        server = request.getfixturevalue("s3")
        yield {"store": cloud.put(server, in_memory(content(root))), "storage_options": cloud.options(server)}
    else:
        server = pytest.importorskip("tests.data.cloud", reason="obstore is not installed").Files(root)
        try:
            yield {"store": server.url}
        finally:
            server.close()


PLACES = ["folder", "zip", "memory", "s3", "http"]


@pytest.mark.parametrize("vouched", [True, False], ids=["manifest", "none"])
@pytest.mark.parametrize("place", PLACES)
def test_a_copy_goes_on_wherever_it_is_and_other_values_do_not(
    place: str, vouched: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    same, other = (written(tmp_path / f"{value}", value, codec="auto", vouched=vouched) for value in (1, 2))
    asked: dict[str, Any] = {"inputs": "x", "batch_size": 8, "output": "numpy"}
    state = stream(same).state_dict()
    assert state["of"]["contents"]
    with elsewhere(place, same, request) as where:
        copy = ZarrStream(**where, **asked)
        copy.load_state_dict(state)
        assert copy.state_dict() == state
    with elsewhere(place, other, request) as where, pytest.raises(DataError, match="the dataset changed since"):
        ZarrStream(**where, **asked).load_state_dict(state)


class Asked(WrapperStore[MemoryStore]):
    """A store that notes what it is asked for, and answers for some keys never, or with an error."""

    def __init__(self, store: MemoryStore, answer: Callable[[str], Exception | None] = lambda key: None) -> None:
        super().__init__(store)
        self.keys: list[str] = []
        self.answer = answer

    async def get(self, key: str, *given: Any, **named: Any) -> Any:
        self.keys.append(key)
        wrong = self.answer(key)
        if isinstance(wrong, TimeoutError):
            await asyncio.Event().wait()
        elif wrong is not None:
            raise wrong
        return await super().get(key, *given, **named)


def many(arrays: int, files: int) -> MemoryStore:
    store = MemoryStore()
    group = zarr.create_group(store)
    for n in range(arrays):
        group.create_array(f"x{n}", data=np.ones((files, 1), np.float32), chunks=(1, 1))
    return store


@pytest.mark.parametrize(("arrays", "files", "looks"), [(1, 100, 8), (1, 5, 5), (20, 50, 60), (70, 2, 70)])
def test_however_large_the_data_few_files_are_looked_at(arrays: int, files: int, looks: int) -> None:
    store = Asked(many(arrays, files))
    names = [f"x{n}" for n in range(arrays)]
    ZarrStream(store, inputs=names, batch_size=1, memory="64MiB", output="numpy").state_dict()
    assert sum("/c/" in key for key in store.keys) == looks
    assert sum(PLACE in key for key in store.keys) == arrays


@pytest.mark.parametrize("wrong", [TimeoutError(), PermissionError("no"), RuntimeError("broken")], ids=repr)
def test_what_cant_be_had_is_not_known_and_no_reason_not_to_open(
    wrong: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = ZarrStream(many(1, 9), inputs=["x0"], batch_size=1, output="numpy").state_dict()
    store = Asked(many(1, 9), lambda key: wrong if "/c/" in key else None)
    other = ZarrStream(store, inputs=["x0"], batch_size=1, output="numpy", retries=0, read_timeout=0.4)
    other.load_state_dict(first)
    assert other.state_dict()["of"]["contents"] == {}
    assert "changed values may go unnoticed" in caplog.text


async def test_the_header_of_a_manifest_is_asked_for_once(tmp_path: Path) -> None:
    store = Asked(in_memory(content(written(tmp_path / "a", 1))))
    async with ZarrStream(store, inputs="x", batch_size=8, output="numpy") as source:
        async for _ in source:
            pass
        assert source.statistics().chunks_checked == 4
    assert store.keys.count(f"x/{PLACE}") == 2  # its header at the opening, the rest with the first chunk


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {}),
        ({}, {"codec": "auto"}),
        ({}, {"vouched": False}),
        ({"vouched": False}, {"vouched": False}),
        ({"vouched": False}, {"vouched": False, "codec": "auto"}),
    ],
    ids=["a copy", "encoded otherwise", "not vouched for", "a copy without", "encoded otherwise without"],
)
def test_what_is_the_same_or_cant_be_compared_goes_on(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    first, second = written(tmp_path / "a", 1, **one), written(tmp_path / "b", 1, **other)
    for saved, resumed in ((first, second), (second, first)):
        stream(resumed).load_state_dict(stream(saved).state_dict())


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
