"""A million steps with all loggers: memory, the files, and whether each line stands there once.

The steps are as small as they can be, and a line is logged each ten of them; the files are rotated at a size that this
many lines fill several times. The service that the remote logger sends to runs on the loopback address.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from streamtrain import (
    CSVLogger,
    JSONLogger,
    LearningRateMonitor,
    Plots,
    RemoteLogger,
    ResourceMonitor,
    TensorBoard,
    Trainer,
    from_iterable,
)
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.rolling import parts, rows
from streamtrain.events import Log
from tests.bench.measure import Measure, Options

LOG_EVERY = 10
PART = 1 << 20
"""Bytes of a part of metrics.jsonl and metrics.csv."""


class Items:
    """So many batches, always the same one."""

    def __init__(self, count: int) -> None:
        self.count, self.item = count, (torch.randn(4, 4), torch.randn(4, 1))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.count):
            yield self.item


class Memory(Callback):
    """What is resident at each of so many lines of the log."""

    def __init__(self, every: int) -> None:
        self.every, self.seen, self.found = every, 0, list[float]()
        self._process = psutil.Process()

    async def on_log(self, event: Log) -> None:
        """Look."""
        self.seen += 1
        if self.seen % self.every == 0:
            self.found.append(self._process.memory_info().rss / 2**20)


class _Service(BaseHTTPRequestHandler):
    lines: set[int] = set()

    def do_POST(self) -> None:
        """Take what is sent, and count the lines of training."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sent = [json.loads(line) for line in body.splitlines()]
        self.lines.update(line["step"] for line in sent if line.get("split") == "train")
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def service() -> Iterator[str]:
    """The address of one that takes lines."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run(options: Options) -> Iterator[Measure]:
    """What the second half of the steps took in memory; lines missing or twice; the largest file of a log."""
    steps = 10_000 if options.quick else 1_000_000
    memory = Memory(steps // LOG_EVERY // 20)
    with options.room() as room, service() as url:
        folder = room / "run"
        asyncio.run(_fit(steps, folder, memory, url))
        wanted = [*range(LOG_EVERY, steps + 1, LOG_EVERY)]
        found = [row["step"] for row in rows(folder / "metrics.jsonl") if row["split"] == "train"]
        logs = [each for name in ("metrics.jsonl", "metrics.csv") for each in parts(folder / name)]
        largest = max(each.stat().st_size for each in logs) / PART
    print(f"  MiB resident: {' '.join(f'{each:.0f}' for each in memory.found)}", flush=True)
    yield Measure(
        name="memory of the second half of the steps",
        values=(memory.found[-1] - memory.found[9],),
        at_most=8,
        unit=" MiB",
    )
    yield Measure(name="lines missing, twice or out of order", values=(float(found != wanted),), at_most=0)
    yield Measure(name="lines that the service lacks", values=(float(len(set(wanted) - _Service.lines)),), at_most=0)
    # a part ends behind the lines that filled it, which are written together
    yield Measure(name="the largest file of a log, in parts", values=(largest,), at_most=1.05)
    yield Measure(name="  files of the logs", values=(float(len(logs)),))


async def _fit(steps: int, folder: Path, memory: Memory, url: str) -> None:
    loggers = [JSONLogger(part=PART), CSVLogger(part=PART), TensorBoard(), LearningRateMonitor(), Plots()]
    loggers += [ResourceMonitor(every=1), RemoteLogger(url)]
    trainer = Trainer(
        nn.Linear(4, 1),
        nn.MSELoss(),
        optimizer="sgd",
        run_dir=folder,
        log_every=LOG_EVERY,
        callbacks=[*loggers, memory],
    )
    await trainer.fit(from_iterable(Items(steps)))
