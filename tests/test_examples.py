"""Each example runs as its docstring says, in a process of its own."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from examples.service import application
from tests import warm

ROOT = Path(__file__).parent.parent


def test_the_async_tests_of_the_example_pass() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "examples/test_training.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


async def test_the_service_starts_tells_cancels_and_goes_on(tmp_path: Path) -> None:
    first = await one_life(tmp_path, cancel=True)
    second = await one_life(tmp_path, cancel=False)
    assert 0 < first <= second


async def test_the_service_cancels_also_what_has_not_begun_to_train(tmp_path: Path) -> None:
    """The data are still being made, then (the second time) the run's folder is being opened."""
    service = httpx.ASGITransport(app=application(tmp_path, rows=2_000))
    async with httpx.AsyncClient(transport=service, base_url="http://test", timeout=60) as client:
        for _ in range(2):
            assert (await client.post("/start")).status_code == 202
            ended = await client.post("/cancel")
            assert (ended.status_code, ended.json()["reason"], ended.json()["step"]) == (200, "stopped", 0)
            assert (await client.get("/status")).json() == ended.json()
        assert (await client.post("/start")).status_code == 202
        task = asyncio.gather(client.post("/cancel"), client.post("/cancel"))
        assert [one.status_code for one in await task] == [200, 200]


async def test_the_service_tells_why_a_training_failed(tmp_path: Path) -> None:
    (tmp_path / "data.zarr").mkdir()
    service = httpx.ASGITransport(app=application(tmp_path))
    async with httpx.AsyncClient(transport=service, base_url="http://test", timeout=60) as client:
        assert (await client.post("/start")).status_code == 202
        assert "is not a Zarr store" in (await client.post("/cancel")).json()["error"]


async def one_life(folder: Path, *, cancel: bool) -> int:
    """Start the service and a training in it; the step that it reached when it was cancelled, or the service ended."""
    process, said = warm.piped(["-m", "examples.service", str(folder), "--port", "0", "--quick"], cwd=ROOT)
    port, told = None, b""
    while port is None:
        line = said.readline()
        assert line, told.decode()
        told += line
        port = re.search(rb"http://127\.0\.0\.1:(\d+)", line)
    rest = asyncio.create_task(asyncio.to_thread(said.read))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{int(port[1])}") as client:
        assert (await client.get("/status")).json() == {"running": False}
        assert (await client.post("/start")).status_code == 202
        assert (await client.post("/start")).status_code == 409
        step = 0
        while step < 3:
            status = (await client.get("/status")).json()
            assert status["running"], status
            step = status.get("step", 0)
        if cancel:
            ended = (await client.post("/cancel")).json()
            assert ended["reason"] == "stopped"
            assert Path(ended["checkpoint"]).name in saved(folder)
            step = ended["step"]
    process.send_signal(signal.SIGINT)
    assert b"Traceback" not in await rest
    assert process.wait(10) == 0
    said.close()
    assert saved(folder)
    return step


def saved(folder: Path) -> list[str]:
    """Names of the checkpoints."""
    return [path.name for path in (folder / "run" / "checkpoints").glob("step-*")]
