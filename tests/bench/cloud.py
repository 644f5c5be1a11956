"""Shuffled batches from S3 on loopback, 20 ms added to each request, against obstore fetching the same ranges.

moto serves, in a process of its own. What a pass asks for is recorded, and obstore asks for the same in the same order
and does nothing with it, at each of several concurrencies; that with the best median counts. Both share the cores with
the server, which gives some hundred answers a second whatever their size.
"""

from __future__ import annotations

import asyncio
import http.client
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import zarr
from obstore.store import S3Store
from zarr.storage import LocalStore

from streamtrain import ZarrStream
from streamtrain.data import bucket
from tests.bench.measure import Measure, Options, ratios

DELAY = 0.02
AT_ONCE = (4, 8, 16, 32)
ROWS, COLUMNS, BATCH, MEMORY = 1 << 19, 512, 256, "256MiB"
CREDENTIALS = {"access_key_id": "bench", "secret_access_key": "bench", "region": "us-east-1"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "raw": {"chunks": (2048, COLUMNS), "compressors": None},
    "zstd": {"chunks": (2048, COLUMNS)},
    "shards": {"chunks": (32, COLUMNS), "shards": (8192, COLUMNS), "compressors": None},
}
"""Chunks of 4 MiB; inner chunks of 64 KiB in shards of 16 MiB."""
BARS = {"raw": 0.9, "shards": 0.9, "zstd": None}
"""obstore does not decode: where chunks are compressed and the server is near, that is what counts."""
SMALLER = 8
"""Of the shards there is less, since each inner chunk is a request."""
Asked = list[tuple[str, Any]]


def run(options: Options) -> Iterator[Measure]:
    """The ratio for each layout, and the rates behind it."""
    rows = ROWS // 16 if options.quick else ROWS
    with options.room() as room, server() as url:
        for name in LAYOUTS:
            count = rows // SMALLER if name == "shards" else rows
            write(room, url, name, count)
            yield from asyncio.run(measured(url, name, count, options.rounds))


async def measured(url: str, name: str, rows: int, rounds: int) -> list[Measure]:
    """One layout: ours, and obstore's at each concurrency, in turn."""
    ours: list[float] = []
    theirs: dict[int, list[float]] = {count: [] for count in AT_ONCE}
    async with stream(url, name) as source:
        asked = await recorded(source)
        for number in range(rounds):
            work: list[tuple[list[float], Callable[[], Any]]] = [(ours, lambda: one_pass(source))]
            work += [(theirs[count], lambda count=count: replay(url, asked, count)) for count in AT_ONCE]  # type: ignore[misc]
            for into, call in work if number % 2 else reversed(work):
                began = time.perf_counter()
                await call()
                into.append(rows * COLUMNS * 4 / (time.perf_counter() - began) / 1e6)
        told = source.statistics().fetch
    best = max(theirs.values(), key=statistics.median)
    assert told is not None
    return [
        Measure(name=f"{name}: over obstore at its best", values=ratios(ours, best), at_least=BARS[name]),
        Measure(name=f"  {name}", values=tuple(ours), unit=" MB/s"),
        *(Measure(name=f"  obstore, {n} at once", values=tuple(rates), unit=" MB/s") for n, rates in theirs.items()),
        Measure(name=f"  {name}: requests of a pass", values=(float(told.requests),)),
        Measure(name=f"  {name}: at once", values=(float(told.at_once),)),
        Measure(name=f"  {name}: latency", values=(1e3 * told.latency,), unit=" ms"),
    ]


def stream(url: str, name: str) -> ZarrStream:
    """What is measured."""
    given: Any = {"endpoint": url, **CREDENTIALS}
    return ZarrStream(
        "s3://bucket/bench",
        inputs=name,
        batch_size=BATCH,
        shuffle="block",
        memory=MEMORY,
        cache=0,
        storage_options=given,
    )


async def recorded(source: ZarrStream) -> Asked:
    """What the first pass asks for, in order."""
    asked: Asked = []
    get = bucket.get

    async def noted(client: Any, key: str, wanted: Any, headed: Any) -> Any:
        asked.append((key, wanted))
        try:
            return await get(client, key, wanted, headed)
        except FileNotFoundError:  # no manifest: asked for once, when the store is opened
            asked.remove((key, wanted))
            raise

    bucket.get = noted
    try:
        await one_pass(source)
    finally:
        bucket.get = get
    return [(key, wanted) for key, wanted in asked if wanted is None or isinstance(wanted, tuple)]  # indexes are kept


async def one_pass(source: ZarrStream) -> None:
    """All batches of an epoch."""
    async for batch in source:
        assert len(batch) == BATCH


async def replay(url: str, asked: Asked, at_once: int) -> None:
    """The same requests by obstore alone."""
    client, waiting = connected(url), iter(asked)

    async def serve() -> None:
        for key, wanted in waiting:
            options: Any = {} if wanted is None else {"range": wanted}
            await (await obstore.get_async(client, key, options=options)).bytes_async()

    await asyncio.gather(*(serve() for _ in range(at_once)))


def connected(url: str) -> S3Store:
    """A client with obstore's own settings."""
    config: Any = {"endpoint": url, **CREDENTIALS}
    return S3Store("bucket", prefix="bench", config=config, client_options={"allow_http": True})


def write(room: Path, url: str, name: str, rows: int) -> None:
    """Make an array in a folder, then put its files into the bucket."""
    group = zarr.open_group(LocalStore(room / "x.zarr"))
    rng = np.random.default_rng(0)
    array = group.create_array(name, shape=(rows, COLUMNS), dtype="f4", **LAYOUTS[name])
    for start in range(0, rows, 1 << 13):
        array[start : start + (1 << 13)] = rng.integers(0, 256, (min(rows, 1 << 13), COLUMNS)).astype("f4")
    client = connected(url)
    for path in sorted(room.rglob("*")):
        if path.is_file():
            obstore.put(client, str(path.relative_to(room / "x.zarr")), path.read_bytes())


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server that speaks S3, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.cloud"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), "the server did not start"
            connection = http.client.HTTPConnection(url.removeprefix("http://"))
            connection.request("PUT", "/bucket")
            assert connection.getresponse().status == 200
            connection.close()
            yield url
        finally:
            process.kill()


def serve() -> None:
    """What that process does: moto, and DELAY before each answer to a GET. It ends with its parent."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app  # type: ignore[attr-defined]
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)

    def delayed(environ: Any, start: Any) -> Any:
        if environ["REQUEST_METHOD"] == "GET":
            time.sleep(DELAY)
        return application(environ, start)

    made = make_server("127.0.0.1", 0, delayed, threaded=True)
    print(f"http://127.0.0.1:{made.server_port}", flush=True)
    made.serve_forever()


if __name__ == "__main__":
    serve()
