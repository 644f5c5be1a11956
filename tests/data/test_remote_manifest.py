"""What a manifest gives a store elsewhere: no damage of any object goes unseen, and a good chunk is checked once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from data_tools.convert import Layout, convert
from streamtrain.data import remote_manifest
from streamtrain.data.fetch import Fetcher, Heading
from streamtrain.data.manifest import PLACE
from streamtrain.data.opening import locate, open_arrays
from streamtrain.data.reading import Scratch
from streamtrain.data.remote_manifest import RemoteManifest, open_manifest
from streamtrain.data.remote_zarr import RemoteZarrReader
from streamtrain.data.stream import ZarrStream
from streamtrain.data.vouching import vouch
from streamtrain.data.zarr_bytes import StoreBytes
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import DataError

Objects = dict[str, bytes]
Damage = Callable[[Objects, str, str], None]
DATA: NDArray[np.float32] = np.arange(64 * 4, dtype="float32").reshape(64, 4)
LAYOUTS = {
    "raw": Layout(chunks=(4, 4), codec="raw"),
    "zstd": Layout(chunks=(4, 4), codec="zstd"),
    "shards of raw": Layout(chunks=(4, 4), shards=(8, 4), codec="raw"),
    "shards of blosc": Layout(chunks=(4, 4), shards=(8, 4), codec="blosc"),
}
FIRST, SECOND = "c/2/0", "c/1/0"


def objects(folder: Path, layout: str = "raw") -> Objects:
    """A store with a manifest, as keys and bytes."""
    np.save(folder / "x.npy", DATA)
    return content(convert(folder / "x.npy", folder / "x.zarr", layout=LAYOUTS[layout]))


def content(root: Path) -> Objects:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def in_memory(found: Objects) -> MemoryStore:
    buffer = default_buffer_prototype().buffer
    return MemoryStore({key: buffer.from_bytes(value) for key, value in found.items()})


def stream(store: Any, **keywords: Any) -> ZarrStream:
    return ZarrStream(store, **{"batch_size": 8, "output": "numpy", "memory": "8MiB", **keywords})


async def read(store: Any, **keywords: Any) -> Any:
    async with stream(store, **keywords) as source:
        return np.concatenate([batch.inputs.copy() async for batch in source])


def flip(found: Objects, key: str, other: str) -> None:
    found[key] = found[key][:5] + bytes([found[key][5] ^ 4]) + found[key][6:]


def cut(found: Objects, key: str, other: str) -> None:
    found[key] = found[key][:-3]


def lose(found: Objects, key: str, other: str) -> None:
    del found[key]


def replace(found: Objects, key: str, other: str) -> None:
    found[key] = found[other]


@pytest.mark.parametrize("io", ["auto", "store"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", [flip, cut, lose, replace], ids=lambda damage: damage.__name__)
async def test_every_damage_is_an_error_that_names_it(damage: Damage, layout: str, io: str, tmp_path: Path) -> None:
    found = objects(tmp_path, layout)
    assert (await read(in_memory(found), io=io) == DATA).all()
    damage(found, FIRST, SECOND)
    with pytest.raises(DataError, match=r"array 'array': chunk \d+\.0 \(rows \[\d+:\d+, 0:4\]\) in .*/?c/2/0: .*it"):
        await read(in_memory(found), io=io)


@pytest.mark.parametrize("layout", ["raw", "shards of blosc"])
async def test_damage_in_a_bucket_is_seen(layout: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("obstore")
    from tests.data.cloud import options, put

    server = request.getfixturevalue("s3")
    found = objects(tmp_path, layout)
    given: dict[str, Any] = {"storage_options": options(server), "shuffle": "block"}
    url = put(server, in_memory(found))
    async with stream(url, **given) as source:
        for checked in (16, 0):
            async for batch in source:
                assert (batch.inputs == DATA[batch.index]).all()
            assert source.statistics().chunks_checked == checked
    replace(found, FIRST, SECOND)
    with pytest.raises(DataError, match=r"its checksum .* is .*, its manifest says"):
        await read(put(server, in_memory(found)), **given)
    assert len(await read(put(server, in_memory(found)), **given, verify="never")) == len(DATA)


@pytest.mark.parametrize("io", ["auto", "store"])
async def test_damage_behind_a_web_server_is_seen(io: str, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    from tests.data.cloud import Files

    found = objects(tmp_path)
    server = Files(tmp_path / "x.zarr")
    try:
        assert (await read(server.url, io=io) == DATA).all()
        (tmp_path / "x.zarr" / FIRST).write_bytes(found[SECOND])
        with pytest.raises(DataError, match=r"chunk 2\.0 .* its checksum .* is .*, its manifest says"):
            await read(server.url, io=io)
    finally:
        server.close()


async def test_a_store_that_shows_no_manifest_is_read_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(MemoryStore):
        async def get(self, key: str, *arguments: Any, **keywords: Any) -> Any:
            if key == PLACE:
                raise PermissionError(13, "no names that begin with a dot")
            return await super().get(key, *arguments, **keywords)

    store = Refusing(in_memory(objects(tmp_path))._store_dict)
    with caplog.at_level(logging.INFO):
        assert (await read(store) == DATA).all()
    assert "no names that begin with a dot" in caplog.text
    assert "its manifest is gone" in caplog.text


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_manifest_is_opened_where_a_store_refuses_to_say_what_is_absent(zarr_format: Any, tmp_path: Path) -> None:
    class Refusing(MemoryStore):
        async def get(self, key: str, *arguments: Any, **keywords: Any) -> Any:
            found = await super().get(key, *arguments, **keywords)
            if found is None:
                raise PermissionError(13, "no leave to list")
            return found

    zarr.create_array(tmp_path / "x.zarr", data=DATA, chunks=(4, 4), zarr_format=zarr_format)
    vouch(tmp_path / "x.zarr")
    store = in_memory(content(tmp_path / "x.zarr"))
    loop = ZarrLoop()
    try:
        (array,) = loop.run(open_arrays(locate(store), None, io="auto", loop=loop, timeout=9), 9).values()
        fetcher = Fetcher(StoreBytes(Refusing(store._store_dict)), retries=0, timeout=9)
        assert isinstance(open_manifest(array.layout, fetcher, loop), RemoteManifest)
    finally:
        loop.close()


@pytest.mark.parametrize("small", [1 << 20, 0], ids=["whole", "by pages"])
def test_an_object_of_another_size_is_refused_before_its_bytes_are_taken(
    small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_manifest, "SMALL", small)

    class Grown:
        """The folder's files, but for one that says it has a terabyte."""

        lane, taken = "store", [""]

        async def get(self, key: str, wanted: Any, headed: Callable[[Heading], None]) -> NDArray[np.uint8]:
            data = np.fromfile(tmp_path / "x.zarr" / key, dtype=np.uint8)[slice(*wanted) if wanted else slice(None)]
            headed(Heading(1 << 40 if key == FIRST else len(data), None, None))
            self.taken.append(key)
            return data

        def transient(self, error: Exception) -> bool:
            return False

        def url(self, key: str) -> str:
            return key

    objects(tmp_path)
    loop, source = ZarrLoop(), Grown()
    try:
        root = locate(tmp_path / "x.zarr")
        (array,) = loop.run(open_arrays(root, None, io="store", loop=loop, timeout=9), 9).values()
        stored = loop.run(zarr.api.asynchronous.open_array(store=tmp_path / "x.zarr", mode="r"), 9)
        reader = RemoteZarrReader(array.layout, stored, loop, Fetcher(source, retries=0, timeout=9), timeout=9)
        reader.vouch("once")
        assert reader.read((1, 0), (0, 4), Scratch()) is not None
        with pytest.raises(DataError, match="it has 1099511627776 bytes, its manifest says 64"):
            reader.read((2, 0), (0, 4), Scratch())
    finally:
        loop.close()
    assert SECOND in source.taken
    assert FIRST not in source.taken


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bucket_is_verified(
    layout: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    from streamtrain.data.verification import verify
    from tests.data.cloud import put

    server = request.getfixturevalue("s3")
    for name, value in {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    found = objects(tmp_path, layout)
    lines = list(verify(put(server, in_memory(found)), deep=True))
    assert lines[-1].startswith("ok: ")
    assert lines[-1].endswith("every byte")
    assert "objects were not looked at" in "".join(verify(put(server, in_memory(found))))
    for damage in (flip, cut, lose, replace):
        damaged = dict(found)
        damage(damaged, FIRST, SECOND)
        said: list[str] = []
        with pytest.raises(DataError, match="1 damaged"):
            said.extend(verify(put(server, in_memory(damaged)), deep=True))
        assert [
            line for line in said if line.startswith("damaged") and f"/{FIRST}: it" in line and "manifest says" in line
        ]
    del found[PLACE]
    with pytest.raises(DataError, match="1 damaged"):
        list(verify(put(server, in_memory(found))))


@pytest.mark.parametrize("io", ["auto", "store"])
@pytest.mark.parametrize(("verify", "counts"), [("once", [16, 0]), ("always", [16, 16]), ("never", [0, 0])])
async def test_good_chunks_are_checked_as_often_as_is_wished(
    io: str, verify: str, counts: list[int], tmp_path: Path
) -> None:
    async with stream(in_memory(objects(tmp_path)), io=io, verify=verify, cache=0) as source:
        for checked in counts:
            assert sum([len(batch) async for batch in source]) == len(DATA)
            assert source.statistics().chunks_checked == checked


async def test_rows_of_a_chunk_are_checked_with_all_of_it(tmp_path: Path) -> None:
    found = objects(tmp_path)
    flip(found, FIRST, SECOND)  # in its first row
    with pytest.raises(DataError, match=r"chunk 2\.0"):
        await read(in_memory(found), split=(10, 12))
    assert (await read(in_memory(found), split=(10, 12), verify="never") == DATA[10:12]).all()


async def test_bad_chunks_can_be_skipped(tmp_path: Path) -> None:
    found = objects(tmp_path)
    replace(found, FIRST, SECOND)
    rows = await read(in_memory(found), on_bad_chunk="skip", max_skipped=0.1)
    assert (rows == np.delete(DATA, range(8, 12), axis=0)).all()


async def test_absent_chunks_are_fill_where_the_manifest_says_so(tmp_path: Path) -> None:
    array: Any = zarr.create_array(str(tmp_path), name="x", shape=(8,), chunks=(2,), dtype="int32", fill_value=9)
    array[2:6] = 7
    vouch(tmp_path)
    found = content(tmp_path)
    assert (await read(in_memory(found), inputs="x")).tolist() == [9, 9, 7, 7, 7, 7, 9, 9]
    lose(found, "x/c/1", "")
    with pytest.raises(DataError, match="it is missing; its manifest says"):
        await read(in_memory(found), inputs="x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-1], "is damaged: it ends after"),
        (lambda text: b"X" + text[1:], "does not begin as a manifest does"),
        (lambda text: text[:20] + b"!" + text[21:], "the checksum of its header"),
        (lambda text: text[:-1] + bytes([text[-1] ^ 1]), "the checksum of its page 0"),
        (lambda text: text[:100], "is damaged: it ends after 100"),
    ],
    ids=["short", "magic", "header", "page", "cut"],
)
@pytest.mark.parametrize("small", [1 << 20, 0], ids=["whole", "by pages"])
async def test_a_damaged_manifest_is_an_error(
    damage: Any, message: str, small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_manifest, "SMALL", small)
    found = objects(tmp_path)
    assert (await read(in_memory(found)) == DATA).all()
    found[PLACE] = damage(found[PLACE])
    with pytest.raises(DataError, match=message):
        await read(in_memory(found))


async def test_a_manifest_of_other_metadata_is_refused(tmp_path: Path) -> None:
    found = objects(tmp_path)
    found["zarr.json"] = found["zarr.json"].replace(b'"fill_value": 0.0', b'"fill_value": 1.0')
    with pytest.raises(DataError, match="was written for other metadata"):
        await read(in_memory(found))


async def test_a_manifest_that_is_gone_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = objects(tmp_path)
    del found[PLACE]
    with caplog.at_level(logging.WARNING):
        assert (await read(in_memory(found)) == DATA).all()
    assert [record.message for record in caplog.records if "its manifest is gone" in record.message]


def test_a_store_without_one_is_asked_once(tmp_path: Path) -> None:
    class Counting(MemoryStore):
        asked: list[str] = []

        async def get(self, key: str, *arguments: Any, **keywords: Any) -> Any:
            self.asked.append(key)
            return await super().get(key, *arguments, **keywords)

    store = Counting()
    zarr.create_array(store, data=DATA, chunks=(4, 4))
    asyncio.run(read(store, threads=4))
    assert Counting.asked.count(PLACE) == 1
