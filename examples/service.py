"""A web service that trains on its own event loop: POST /start, GET /status, POST /cancel.

    python -m examples.service runs/service [--port 8000] [--quick]

The loop that answers requests is the one that trains. Ctrl-C (or a rolling restart) saves; /start then goes on at the
very next batch.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from torch import nn

from data_tools.synth import synth
from streamtrain import FitResult, Trainer, ZarrStream


class Training:
    """The one training of this service."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.task: asyncio.Task[FitResult] | None = None
        self.trainer: Trainer | None = None

    async def run(self, trainer: Trainer) -> FitResult:
        """Make data up once, and train on it from wherever the last training stopped."""
        data = self.folder / "data.zarr"
        if not data.exists():
            await asyncio.to_thread(synth, data, rows=self.rows, columns=64, chunk_rows=512)
        async with ZarrStream(data, inputs="x", targets="y", batch_size=64, shuffle="block", memory="64MiB") as stream:
            return await trainer.fit(stream, max_epochs=1000, resume="auto")

    async def start(self, request: Request) -> JSONResponse:
        """202, or 409 while one is running."""
        if self.task is not None and not self.task.done():
            return JSONResponse({"error": "a training is running"}, status_code=409)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))
        self.trainer = Trainer(model, nn.MSELoss(), lr=1e-3, run_dir=self.folder / "run", seed=0)
        self.task = asyncio.create_task(self.run(self.trainer))
        return JSONResponse({"started": True}, status_code=202)

    async def status(self, request: Request) -> JSONResponse:
        """Where the training stands, and how it ended if it has."""
        told: dict[str, object] = {"running": self.task is not None and not self.task.done()}
        if self.trainer is not None:
            told |= {"epoch": self.trainer.state.epoch, "step": self.trainer.state.step}
        if self.task is not None and self.task.done() and not self.task.cancelled():
            if error := self.task.exception():
                told |= {"error": str(error)}
            else:
                told |= {"reason": self.task.result().reason, "checkpoint": str(self.task.result().checkpoint)}
        return JSONResponse(told)

    async def cancel(self, request: Request) -> JSONResponse:
        """End after the current step, or before the first, save, and tell where that was."""
        if self.task is None or self.trainer is None:
            return JSONResponse({"error": "no training was started"}, status_code=409)
        self.trainer.stop("POST /cancel")  # obeyed by a fit that has not begun, too
        await asyncio.wait([self.task])
        return await self.status(request)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """When the service ends, so does the training, after it was saved."""
        yield
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task


def application(folder: Path, *, rows: int = 100_000) -> Starlette:
    """The service as an ASGI application."""
    training = Training(folder, rows)
    routes = [
        Route("/start", training.start, methods=["POST"]),
        Route("/status", training.status),
        Route("/cancel", training.cancel, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=training.lifespan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--quick", action="store_true", help="little data")
    given = parser.parse_args()
    uvicorn.run(application(given.folder, rows=5_000 if given.quick else 100_000), port=given.port, log_level="info")
