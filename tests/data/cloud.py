"""S3 on loopback: moto's server, a proxy of ours before it that can go wrong, and stores put into it."""

from __future__ import annotations

import http.client
import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import obstore
import zarr
from moto.server import ThreadedMotoServer
from obstore.store import S3Store
from zarr.storage import MemoryStore

from tests.loopback import Loopback

CREDENTIALS = {"access_key_id": "testing", "secret_access_key": "testing", "region": "us-east-1"}
Fault = Callable[[str, int], str | float | None]
"""Given a path and the number of requests for it before: `"503"` (a status), `"cut"` (half of the body), `"drop"` (no
answer), `"hang"` (until the proxy ends), seconds of delay, or None: all is well."""


def sound(path: str, before: int) -> str | float | None:
    """No fault."""
    return None


class Proxy(Loopback):
    """Hands requests on to another server, records them, and answers some wrongly."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.fault: Fault = sound
        self.requests: list[tuple[str, str]] = []
        """Path and Range of each GET."""
        self.ended = threading.Event()
        self.waiting = threading.Semaphore(0)
        """Released once for each request that hangs."""
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self.at_once = self.most_at_once = 0
        self.connections = 0
        """Open ones."""
        super().__init__(_Handler, proxy=self)

    def close(self) -> None:
        self.ended.set()
        super().close()

    def count(self, path: str) -> int:
        """Requests for this path before."""
        with self._lock:
            self._counts[path] = self._counts.get(path, 0) + 1
            return self._counts[path] - 1

    def forget(self) -> None:
        """Record as if nothing had been asked for yet."""
        with self._lock:
            self.requests.clear()
            self._counts.clear()

    def busy(self, change: int) -> None:
        with self._lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)

    def connected(self, change: int) -> None:
        with self._lock:
            self.connections += change


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.proxy.connected(1)

    def finish(self) -> None:
        super().finish()
        self.proxy.connected(-1)

    def do_GET(self) -> None:
        self.proxy.busy(1)
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):  # who asked went away
            self.close_connection = True
        finally:
            self.proxy.busy(-1)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.proxy.requests.append((path, self.headers.get("Range", "")))
        fault = self.proxy.fault(path, self.proxy.count(path))
        if fault == "hang":
            self.proxy.waiting.release()
            self.proxy.ended.wait(60)
        if fault in ("hang", "drop"):
            self.close_connection = True
            return
        if isinstance(fault, float):
            self.proxy.ended.wait(fault)
        if isinstance(fault, str) and fault.isdigit():
            status, headers, body = int(fault), dict[str, str](), b""
        else:
            status, headers, body = self._upstream()
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "server", "date", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    def _upstream(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream)
        try:
            connection.request(self.command, self.path, headers={k: v for k, v in self.headers.items() if k != "Host"})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def moto() -> Iterator[str]:
    """The URL of a server that speaks S3."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        connection = http.client.HTTPConnection(f"{host}:{port}")
        connection.request("PUT", "/bucket")
        assert connection.getresponse().status == 200
        connection.close()
        yield url
    finally:
        server.stop()


def options(url: str) -> dict[str, str]:
    """`storage_options` for a server."""
    return {"endpoint": url, **CREDENTIALS}


def put(s3: str, store: MemoryStore, name: str | None = None) -> str:
    """Put everything of a store in memory into the bucket; its URL."""
    name = name or uuid.uuid4().hex
    client = bucket(s3, name)
    for key, value in store._store_dict.items():
        obstore.put(client, key, value.to_bytes())
    return f"s3://bucket/{name}"


def bucket(s3: str, name: str) -> S3Store:
    """A client of obstore for one store in the bucket."""
    config: Any = {"endpoint": s3, **CREDENTIALS}
    return S3Store("bucket", prefix=name, config=config, client_options={"allow_http": True})


def made(arrays: Mapping[str, Mapping[str, Any]]) -> MemoryStore:
    """A group in memory with these arrays, by `create_array`'s keywords."""
    store = MemoryStore()
    group = zarr.create_group(store)
    for name, keywords in arrays.items():
        group.create_array(name, **keywords)
    return store


class Files(Loopback):
    """A plain web server of the files below a folder, which knows ranges and lists nothing.

    `versions`: headers that tell them, of each file.
    """

    def __init__(self, folder: Path) -> None:
        self.versions: dict[str, str] = {"Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        super().__init__(_FileHandler, root=folder, server_of=self)


class _FileHandler(BaseHTTPRequestHandler):
    root: Path
    server_of: Files
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.root / self.path.strip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, wanted = path.read_bytes(), re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        total, start, stop = len(data), 0, len(data)
        if wanted is not None:
            start = int(wanted[1]) if wanted[1] else total - int(wanted[2])
            stop = min(total, int(wanted[2]) + 1) if wanted[1] and wanted[2] else total
        self.send_response(200 if wanted is None else 206)
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        self.send_header("Content-Length", str(stop - start))
        for header, value in self.server_of.versions.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:stop])

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        """Nothing."""
