"""A save that can't be over in time is not begun: which one that is, what is said, and what stands then."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from streamtrain import checkpoint, saving
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.grace import Forecast, disk_rate, lost
from streamtrain.progress import FitResult
from streamtrain.trainer import Trainer
from tests.engine import Samples, network


class Midway(Samples):
    """Calls a function before the batch of this number, once, and has others wait meanwhile."""

    def __init__(self, batch: int, act: Callable[[], object]) -> None:
        super().__init__()
        self.gates[8 * batch] = Acts(act)


class Acts(asyncio.Event):
    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act = act

    async def wait(self) -> bool:  # type: ignore[override]
        self._act()
        return await super().wait()


def trainer(run_dir: Path, **options: Any) -> Trainer:
    saves = ModelCheckpoint(every="2steps", keep_last=-1)
    return Trainer(network(), nn.MSELoss(), seed=5, device="cpu", run_dir=run_dir, callbacks=[saves], **options)


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every save says that it took 1,000 s."""
    commit = checkpoint.commit
    monkeypatch.setattr(checkpoint, "commit", lambda *a, **k: replace(commit(*a, **k), seconds=1000.0))


async def stopped(fitted: Trainer, at: int, within: float | None) -> FitResult:
    """A fit that a signal stops before the batch of this number."""

    def act() -> None:
        async def when_trained() -> None:
            while fitted.state.step < at:  # noqa: ASYNC110  (nobody tells of a step)
                await asyncio.sleep(0)
            fitted.control.stop("signal", "SIGTERM", within=within)

        tasks.append(asyncio.create_task(when_trained()))

    tasks: list[asyncio.Task[None]] = []
    return await fitted.fit(Midway(at, act), max_epochs=2)


@pytest.mark.usefixtures("slow_disk")
async def test_a_save_that_does_not_fit_into_the_grace_is_not_begun_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = await stopped(trainer(tmp_path), 3, within=60)
    assert (result.reason, result.step, steps(tmp_path)) == ("signal", 3, [2])
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000000002"
    said = r"step 3 is not saved: that would take about 1e\+03 s \(.*/s\), and (60|59\.\d) s of the grace are left; "
    assert re.search(said + "step-000000002 is the last checkpoint, 1 step after it is lost", caplog.text)


@pytest.mark.usefixtures("slow_disk")
async def test_a_cancelled_fit_skips_it_too_and_the_next_life_goes_on(tmp_path: Path) -> None:
    fitted, reached = trainer(tmp_path), asyncio.Event()
    task = asyncio.create_task(fitted.fit(Midway(3, reached.set), max_epochs=2))
    await reached.wait()
    while fitted.state.step < 3:  # noqa: ASYNC110  (nobody tells of a step)
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps(tmp_path) == [2]
    assert (await trainer(tmp_path).fit(Samples(), max_steps=4, resume="auto")).step == 4


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("within", [None, 2000.0], ids=["no hurry", "time enough"])
async def test_a_save_that_fits_is_made(tmp_path: Path, within: float | None) -> None:
    assert (await stopped(trainer(tmp_path), 3, within)).step == 3
    assert steps(tmp_path) == [2, 3]


class Probe:
    """A disk of this many bytes a second."""

    def __init__(self, rate: float) -> None:
        self.rate, self.asked = rate, list[Path]()

    def __call__(self, folder: Path) -> float:
        self.asked.append(folder)
        return self.rate


@pytest.mark.parametrize(("probed", "saved"), [(1 << 30, True), (1, False)])
async def test_where_no_save_has_told_a_probe_of_the_disk_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, probed: int, saved: bool
) -> None:
    probe = Probe(probed)
    monkeypatch.setattr(saving, "PROBE", 1)
    monkeypatch.setattr(saving, "disk_rate", probe)
    await stopped(trainer(tmp_path), 1, within=60)
    assert probe.asked == [tmp_path]
    assert steps(tmp_path) == [1] * saved
    assert ("; there is no checkpoint yet" in caplog.text) == (not saved)


async def test_a_state_that_is_small_is_saved_without_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(1.0)
    monkeypatch.setattr(saving, "disk_rate", probe)
    await stopped(trainer(tmp_path), 1, within=60)
    assert (probe.asked, steps(tmp_path)) == ([], [1])


async def test_a_disk_that_refuses_the_probe_is_asked_to_save_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(folder: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "PROBE", 1)
    monkeypatch.setattr(saving, "disk_rate", refuses)
    await stopped(trainer(tmp_path), 1, within=60)
    assert steps(tmp_path) == [1]


def test_a_probe_leaves_nothing_behind_and_tells_a_rate(tmp_path: Path) -> None:
    assert disk_rate(tmp_path, 1 << 20) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_forecast_is_said_in_words() -> None:
    assert str(Forecast(bytes=1 << 30, rate=float(1 << 29))) == "about 2 s (1.0 GiB at 512 MiB/s)"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("step-000000120", ", 14 steps after it are lost"),
        ("step-000000134", ""),
        ("step-000000200", ""),
        ("mine", ""),
    ],
)
def test_how_much_is_lost_is_told_from_the_name(name: str, said: str) -> None:
    assert lost(Path("checkpoints", name), 134) == said
