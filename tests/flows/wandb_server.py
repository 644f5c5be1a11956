"""As much of a wandb server as `wandb sync` needs: it keeps the history of one run, row by row, where it is told to."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.loopback import Loopback


class Server(Loopback):
    """On loopback, until `close`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        """Of the run's history."""
        super().__init__(_Handler, server_of=self)

    def streamed(self, files: dict[str, Any]) -> None:
        """Lines of files, each from the line on that is told: what stood there is written over."""
        for name, part in files.items():
            if "history" in name:
                new = [json.loads(line) for line in part["content"]]
                self.rows[part["offset"] : part["offset"] + len(new)] = new

    def answer(self, operation: str) -> dict[str, Any]:
        """To a query by GraphQL."""
        project = {"id": "P", "name": "trackers", "entity": {"id": "E", "name": "me"}}
        bucket = {"id": "B", "name": "run", "displayName": "run", "config": "{}", "project": project, "tags": []}
        if operation == "RunResumeStatus":
            tail = json.dumps([json.dumps(row) for row in self.rows[-1:]])
            counts = {"historyLineCount": len(self.rows), "logLineCount": 0, "eventsLineCount": 0}
            status = {**bucket, **counts, "historyTail": tail, "eventsTail": "[]", "summaryMetrics": "{}"}
            return {"model": {**project, "bucket": {**status, "wandbConfig": '{"t": 1}'} if self.rows else None}}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.rows}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": []}}
        return {"viewer": {"id": "U", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}


class _Handler(BaseHTTPRequestHandler):
    server_of: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path.endswith("/file_stream"):
            self.server_of.streamed(json.loads(body).get("files") or {})
        elif self.path.endswith("/graphql"):
            named = re.search(r"(?:query|mutation)\s+(\w+)", json.loads(body)["query"])
            answer = {"data": self.server_of.answer(named[1] if named else "")}
        self._send(json.dumps(answer).encode())

    def do_GET(self) -> None:
        self._send(b"{}")

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  (their name)
        pass


def synced(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of the run's history, once wandb's own command has sent these folders."""
    server = Server()
    try:
        with tempfile.TemporaryDirectory() as own:
            environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
            environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "WANDB_DIR": own}
            command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
            done = subprocess.run(command, check=False, timeout=100, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "ERROR" not in done.stderr, done.stderr[-2000:]
        return server.rows
    finally:
        server.close()
