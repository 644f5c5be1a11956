"""What plain web servers tell of versions, and what a stream makes of it: no change unsaid, no false alarm."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from streamtrain.data.fetch import DATED, differ, tells
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import DataError
from tests.data.cloud import Files

DATA = np.arange(40 * 4, dtype=np.float32).reshape(40, 4)
OLD, NEW = "Wed, 01 Jan 2025 00:00:00 GMT", "Thu, 02 Jan 2025 00:00:00 GMT"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Files]:
    zarr.create_group(tmp_path).create_array("x", data=DATA, chunks=(10, 4), compressors=None)
    files = Files(tmp_path)
    yield files
    files.close()


def stream(server: Files) -> ZarrStream:
    return ZarrStream(server.url, inputs="x", batch_size=10, output="numpy", cache=0)


async def epoch(source: ZarrStream) -> None:
    async for batch in source:
        assert (batch.inputs == DATA[batch.index]).all()


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"ETag": '"a"'}, {"ETag": '"b"'}),
        ({"ETag": 'W/"a"'}, {"ETag": 'W/"b"'}),
        ({"ETag": '"a"'}, {"ETag": 'W/"b"', "Last-Modified": OLD}),
    ],
    ids=["strong", "weak", "mixed"],
)
async def test_another_etag_is_another_object(server: Files, then: dict[str, str], now: dict[str, str]) -> None:
    async with stream(server) as source:
        server.versions = then
        await epoch(source)
        server.versions = now
        with pytest.raises(
            DataError, match=r"chunk \d\.0 .* it changed during the run: 160 bytes of version .*a.* before"
        ):
            await epoch(source)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"ETag": '"a"'}, {"ETag": 'W/"a"'}),
        ({"ETag": 'W/"a"', "Last-Modified": OLD}, {"ETag": '"a"', "Last-Modified": NEW}),
        ({"ETag": '"a"'}, {"Last-Modified": NEW}),
        ({}, {}),
        ({}, {"Last-Modified": NEW}),
    ],
    ids=["made weak", "made strong", "lost", "none", "a date now"],
)
async def test_what_tells_no_change_is_none(
    server: Files, then: dict[str, str], now: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with stream(server) as source:
        server.versions = then
        await epoch(source)
        server.versions = now
        await epoch(source)
    assert "changed" not in caplog.text


async def test_another_date_alone_is_said_once_and_no_error(server: Files, caplog: pytest.LogCaptureFixture) -> None:
    async with stream(server) as source:
        for server.versions in ({"Last-Modified": OLD}, {"Last-Modified": NEW}):
            await epoch(source)
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "may have changed during the run: 160 bytes dated 2025-01-01 00:00:00 UTC before" in said.message


@pytest.mark.parametrize(
    ("versions", "lasting"),
    [({"ETag": '"a"'}, True), ({"ETag": 'W/"a"'}, False), ({"Last-Modified": OLD}, False), ({}, False)],
    ids=["strong", "weak", "date", "none"],
)
async def test_chunks_are_kept_for_others_by_strong_etags_alone(
    server: Files, versions: dict[str, str], lasting: bool
) -> None:
    server.versions = versions
    marks = []
    for _ in range(2):
        async with stream(server) as source:
            await epoch(source)
            assert source._opened is not None
            version = source._opened.stores[0]["x"].reader.version((0, 0))
            assert version is not None
            assert version.lasting == lasting
            marks.append(version.mark)
    assert (marks[0] == marks[1]) == lasting


def test_versions_differ_by_what_rfc_9110_compares() -> None:
    assert differ('"a"', '"b"')
    assert not differ('W/"a"', '"a"')
    assert not differ(None, '"a"')
    assert not differ(f"{DATED}x", f"{DATED}y")
    assert [tells(version) for version in (None, '"a"', 'W/"a"', f"{DATED}x")] == [False, True, False, False]
