"""A fit that is cancelled, at whatever moment, is over when it raises: no thread of it lives, no task, no loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from torch import nn

from streamtrain import Trainer, ZarrStream
from tests.bench.cancels import WAYS, Campaign


@pytest.fixture
def store(tmp_path: Path) -> Path:
    group = zarr.create_group(tmp_path / "tiny.zarr")
    group.create_array("x", data=np.zeros((512, 8), np.float32), chunks=(64, 8))
    group.create_array("y", data=np.zeros((512, 1), np.float32), chunks=(64, 1))
    return tmp_path / "tiny.zarr"


def stream(store: Path, io: str) -> ZarrStream:
    return ZarrStream(store, inputs="x", targets="y", batch_size=32, memory="8MiB", io=io)  # type: ignore[arg-type]


def moments() -> Iterator[int]:
    """Turns of the event loop: each of the first, then about as many as it takes until the wheel turns."""
    yield from range(12)
    turns = 12.0
    while turns < 5000:
        yield int(turns)
        turns *= 1.1


@pytest.mark.parametrize("io", ["auto", "store"])
async def test_a_fit_cancelled_at_any_moment_leaves_no_thread_behind(
    store: Path, io: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())  # zarr's own, which made the store, among them
    for turns in moments():
        fitted = Trainer(nn.Linear(8, 1), nn.MSELoss(), device="cpu")
        task = asyncio.create_task(fitted.fit(stream(store, io), validation=stream(store, io), max_epochs=10**6))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left = sorted(thread.name for thread in set(threading.enumerate()) - before)
        assert (turns, left) == (turns, [])
        assert asyncio.all_tasks() == {asyncio.current_task()}
    assert caplog.text == ""


def test_cancellations_at_random_wakeups_tear_nothing_and_leave_nothing(tmp_path: Path) -> None:
    """In every way, natively and by scopes; at length in tests/bench."""
    counts = Campaign(tmp_path).run(3 * len(WAYS), every=False)
    assert counts.cancelled >= 3 * len(WAYS)
    assert counts.begun
    assert (counts.swallowed, counts.torn, counts.lost, counts.unequal) == (0, 0, 0, 0)
    assert (counts.left, counts.errors) == ([], [])
