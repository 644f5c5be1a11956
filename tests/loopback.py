"""A web server on loopback, as several tests' stand-ins are."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Loopback:
    """Answers at `url` until `close`, by a handler of its own that has these attributes."""

    def __init__(self, handler: type[BaseHTTPRequestHandler], **attributes: Any) -> None:
        own = type(handler.__name__, (handler,), attributes)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), own)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        """Returns once it has ended."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
