"""Nothing is ever lost, whatever happens: each campaign of tests/bench in its quick form, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

CAMPAIGNS = ["flips", "kills", "mutations", "pipeline", "syscalls"]


@pytest.mark.parametrize("name", CAMPAIGNS)
async def test_a_campaign_finds_nothing(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-m", "tests.bench", name, "--quick", "--json", "--folder", str(tmp_path)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    out, err = await process.communicate()
    if process.returncode == 5:
        pytest.skip(err.decode().strip())
    measures = json.loads(out)["measures"]
    assert [measure for measure in measures if not measure["ok"]] == [], err.decode()
    assert len([measure for measure in measures if measure["at_most"] is not None]) > 0
    assert process.returncode == 0
