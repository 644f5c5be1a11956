"""What decoding chunks side by side promises: the batches of one by one, in fewer calls, and within the budget."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, TransposeCodec, ZstdCodec

from streamtrain.data import survey
from streamtrain.data.batch import Batch
from streamtrain.data.block import Block
from streamtrain.data.feed import Feed
from streamtrain.data.layout import TOGETHER_BYTES
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import DataError
from tests.data.test_gathering import go_alike, listed, orders

ROWS, CHUNK = 203, 8
X = np.random.default_rng(0).integers(0, 99, (ROWS, 8, 4)).astype("i4")
Y = np.arange(ROWS * 16, dtype="f4").reshape(ROWS, 16) // 7


def write(path: Path, *, lacking: tuple[int, ...] = (), **codecs: Any) -> Path:
    """Encoded inputs, whose last chunk is not full, beside targets as `codecs` say (encoded, if they say nothing)."""
    group = zarr.create_group(path)
    group.create_array("x", data=X, chunks=(CHUNK, 8, 4), compressors=ZstdCodec(), fill_value=5)
    group.create_array("y", data=Y, chunks=(CHUNK, 16), **{"compressors": BloscCodec(), **codecs})
    for number in lacking:
        os.unlink(path / f"x/c/{number}/0/0")
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("stores") / "data.zarr")


class Puts:
    """How many rows each call copied, and which cells were decoded for others to lie beside."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.cells = 0


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> Puts:
    found, put, whole = Puts(), Block.put, Feed.whole

    def noted(self: Block, number: int, at: Any, values: Any) -> None:
        if number == 0:
            found.rows.append(len(values))
        put(self, number, at, values)

    def counted(self: Feed, *given: Any) -> Any:
        found.cells += 1
        return whole(self, *given)

    monkeypatch.setattr(Block, "put", noted)
    monkeypatch.setattr(Feed, "whole", counted)
    return found


def stream(path: Path | list[Path], **keywords: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "x", "targets": "y", "batch_size": 10, "shuffle": "block", "output": "numpy"}
    return ZarrStream(path, **{**given, "shuffle_blocks": 5, "memory": "32MiB", "cache": 0, **keywords})


def right(batches: list[Batch], x: Any = X, y: Any = Y) -> None:
    for batch in batches:
        np.testing.assert_array_equal(batch.inputs, x[batch.index])
        np.testing.assert_array_equal(batch.targets, y[batch.index])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(orders(), st.integers(0, 20))
def test_batches_are_those_of_chunk_by_chunk(store: Path, order: dict[str, Any], left_at: int) -> None:
    source, plain = stream(store, **order), stream(store, on_bad_chunk="skip", **order)
    asyncio.run(go_alike(source, plain, right, epochs=1, left_at=left_at))


async def test_rows_of_several_chunks_are_put_by_one_call(store: Path, puts: Puts) -> None:
    async with stream(store) as source:
        right(await listed(source))
    assert sum(puts.rows) >= ROWS
    assert len(puts.rows) < ROWS // CHUNK
    assert max(puts.rows) > CHUNK


async def test_chunks_are_read_one_by_one_where_memory_is_short(
    store: Path, puts: Puts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "WORTH_BESIDE", 1 << 20)
    async with stream(store) as source:
        right(await listed(source))
    assert puts.cells == 0


async def test_what_lies_side_by_side_is_granted(store: Path) -> None:
    async with stream(store, threads=2) as source, stream(store, threads=2, on_bad_chunk="skip") as other:
        await anext(aiter(source))
        sizes = source._opened.survey.sizes  # type: ignore[union-attr]
        x, y = (array.layout for array in source._opened.stores[0].values())  # type: ignore[union-attr]
        most = max((each.together - 1) * each.chunk_bytes for each in (x, y))
        assert sizes.beside_bytes == most > 0
        assert sizes.scratch_bytes >= most + max(2 * x.chunk_bytes, 2 * y.chunk_bytes)
        assert min(x.together, y.together) * x.chunk_bytes <= TOGETHER_BYTES
        del other


@pytest.mark.parametrize(
    "codecs",
    [
        {"compressors": None},
        {"compressors": None, "chunks": (CHUNK, 16), "shards": (CHUNK * 4, 16)},
        {"shards": (CHUNK * 4, 16)},
        {"compressors": ZstdCodec(), "filters": [TransposeCodec(order=(1, 0))]},
        {"chunks": (CHUNK, 5)},
        {"chunks": (CHUNK, 32)},
        {"chunks": (CHUNK * 2, 16)},
    ],
    ids=["raw", "raw shards", "shards", "transposed", "cut rows", "wide chunks", "longer chunks"],
)
async def test_arrays_of_other_kinds_beside_them_are_right(tmp_path: Path, codecs: dict[str, Any]) -> None:
    group = zarr.create_group(tmp_path / "s.zarr")
    group.create_array("x", data=X, chunks=(CHUNK, 8, 4), compressors=ZstdCodec())
    group.create_array("y", data=Y, **{"chunks": (CHUNK, 16), **codecs})
    async with stream(tmp_path / "s.zarr") as source:
        for _ in range(2):
            right(await listed(source))


async def test_stores_whose_chunks_differ_are_read_together(tmp_path: Path, puts: Puts) -> None:
    paths = [tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "c.zarr"]
    for path, chunk, codec in zip(paths, (8, 16, 4), (ZstdCodec(), BloscCodec(), None), strict=True):
        group = zarr.create_group(path)
        for name, values in {"x": X, "y": Y}.items():
            group.create_array(name, data=values, chunks=(chunk, *values.shape[1:]), compressors=codec)
    async with stream(paths) as source:
        right(await listed(source), np.concatenate([X] * 3), np.concatenate([Y] * 3))
    assert max(puts.rows) > 16


async def test_absent_chunks_are_fill_among_others(tmp_path: Path, puts: Puts) -> None:
    x = X.copy()
    for number in (0, 3, 4, 25):
        x[number * CHUNK : (number + 1) * CHUNK] = 5
    async with stream(write(tmp_path / "s.zarr", lacking=(0, 3, 4, 25))) as source:
        for _ in range(2):
            right(await listed(source), x)
    assert puts.cells > 0


async def test_a_damaged_chunk_among_others_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "s.zarr")
    victim = path / "y/c/11/0"
    victim.write_bytes(victim.read_bytes()[:-3])
    async with stream(path) as source:
        with pytest.raises(DataError, match=r"array 'y': chunk 11\.0 \(rows \[88:96, 0:16\]\).*c/11/0"):
            await listed(source)
        assert source.statistics().chunks > 0


@pytest.mark.parametrize(
    ("checksum", "location"),
    [("fletcher32", None), ("jenkins_lookup3", None)]
    + [(name, where) for name in ("adler32", "crc32", "crc32c") for where in (None, "start", "end")],
)
async def test_a_checksum_before_the_data_shifts_no_row(checksum: str, location: str | None, tmp_path: Path) -> None:
    codec: Any = {"id": checksum} | ({} if location is None else {"location": location})
    codec |= {"initval": 1} if checksum == "jenkins_lookup3" else {}
    group = zarr.create_group(tmp_path / "s.zarr", zarr_format=2)
    for name, values in {"x": X, "y": Y}.items():
        filters, compressor = [numcodecs.get_codec(dict(codec))], numcodecs.Zstd()
        group.create_array(
            name, data=values, chunks=(CHUNK, *values.shape[1:]), filters=filters, compressors=compressor
        )
    for shuffle in (False, "block"):
        async with stream(tmp_path / "s.zarr", shuffle=shuffle) as source:
            right(await listed(source))


async def test_nothing_is_set_aside_where_chunks_are_not_read_together(store: Path) -> None:
    for keywords in ({"shuffle": "global"}, {"rank": 0, "world_size": 2}, {"cache": "1MiB"}):
        async with stream(store, **keywords) as source:
            await anext(aiter(source))
            assert source._opened.survey.sizes.beside_bytes == 0  # type: ignore[union-attr]
