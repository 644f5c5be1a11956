"""As much of a wandb server as `wandb sync` and a run that is online need: it keeps the history of one run, row by row,
where it is told to."""

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
        self.most: int | None = None
        """Rows that it takes; of those that are more it takes the first ones, and answers with an error."""
        self.full = False
        """Whether it has answered so."""
        self.name = ""
        """Of the run, once it is begun: its id in their words."""
        super().__init__(_Handler, server_of=self)

    def streamed(self, files: dict[str, Any]) -> bool:
        """Lines of files, each from the line on that is told: what stood there is written over.

        Whether all are taken.
        """
        for name, part in files.items():
            if "history" in name:
                new = [json.loads(line) for line in part["content"]]
                assert part["offset"] <= len(self.rows), "no row is left out"
                self.rows[part["offset"] : part["offset"] + len(new)] = new
                if self.most is not None and len(self.rows) > self.most:
                    del self.rows[self.most :]
                    self.full = True
                    return False
        return True

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To a query by GraphQL."""
        project = {"id": "P", "name": "trackers", "entity": {"id": "E", "name": "me"}}
        begun = bool(self.name)
        if operation == "UpsertBucket":
            self.name = variables["name"]
        bucket = {"id": "B", "name": self.name, "displayName": "run", "config": "{}", "project": project, "tags": []}
        if operation == "RunResumeStatus":
            tail = json.dumps([json.dumps(row) for row in self.rows[-1:]])
            counts = {"historyLineCount": len(self.rows), "logLineCount": 0, "eventsLineCount": 0}
            status = {**bucket, **counts, "historyTail": tail, "eventsTail": "[]", "summaryMetrics": "{}"}
            return {"model": {**project, "bucket": {**status, "wandbConfig": '{"t": 1}'} if begun else None}}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": bucket, "inserted": not begun}}
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
        status = 200
        if self.path.endswith("/file_stream"):
            status = 200 if self.server_of.streamed(json.loads(body).get("files") or {}) else 503
        elif self.path.endswith("/graphql"):
            asked = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            answer = {"data": self.server_of.answer(named[1] if named else "", asked.get("variables") or {})}
        self._send(json.dumps(answer).encode(), status)

    def do_GET(self) -> None:
        steps = [row["step"] for row in self.server_of.rows]
        state = {"step": max(steps, default=0), "full": self.server_of.full}
        self._send(json.dumps(state).encode() if self.path == "/state" else b"{}")

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  (their name)
        pass


def environment(server: Server) -> dict[str, str]:
    """What wandb has to be told of it."""
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}


def synced(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of the run's history, once wandb's own command has sent these folders."""
    server = Server()
    try:
        with tempfile.TemporaryDirectory() as own:
            told = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
            told |= environment(server) | {"WANDB_DIR": own}
            command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
            done = subprocess.run(command, check=False, timeout=100, capture_output=True, text=True, env=told)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "ERROR" not in done.stderr, done.stderr[-2000:]
        return server.rows
    finally:
        server.close()
