"""What plots promise: whole files at any time, the past of a run that goes on, little time, no global state."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from torch import nn

from streamtrain.callbacks.plots import PANELS, Plots, place_of
from streamtrain.callbacks.resource_monitor import ResourceMonitor
from streamtrain.errors import ConfigError
from streamtrain.events import Log, TrainBegin, TrainEnd
from streamtrain.trainer import Trainer
from tests.engine import Samples, network


def drawn(folder: Path) -> list[str]:
    files = sorted((folder / "plots").iterdir())
    for file in files:
        PIL.Image.open(file).load()
    return [file.name for file in files]


def courses(plots: Plots, file: str) -> dict[str, int]:
    """Points of each course by its name."""
    return {name: len(one.points[0]) for (_, name), one in plots._series[file].items()}


async def fit(folder: Path, steps: int, plots: Plots) -> None:
    trainer = Trainer(
        network(),
        nn.MSELoss(),
        callbacks=[plots, ResourceMonitor()],
        metrics={"mae": nn.L1Loss()},
        run_dir=folder,
        log_every=2,
        validate_every="4steps",
        device="cpu",
    )
    await trainer.fit(Samples(80), Samples(16, seed=1), max_steps=steps, max_epochs=9, resume="auto")


async def test_a_run_draws_its_course_and_that_of_the_lives_before(tmp_path: Path) -> None:
    await fit(tmp_path, 8, first := Plots())
    assert drawn(tmp_path) == ["learning_rate.png", "loss.png", "metrics.png", "throughput.png"]
    assert courses(first, "loss") == {"loss": 4, "val_loss": 2}
    await fit(tmp_path, 16, second := Plots())
    assert courses(second, "loss") == {"loss": 8, "val_loss": 4}
    assert courses(second, "metrics") == {"val_mae": 4}


def told(folder: Path, plots: Plots, events: list[Log]) -> Plots:
    plots.on_train_begin(TrainBegin(run_dir=str(folder)))
    for event in events:
        plots.on_log(event)
    return plots


def test_the_throughput_is_that_of_the_samples_since_the_line_before(tmp_path: Path) -> None:
    lines = [(10, 2.0, 80), (20, 4.0, 160), (30, 5.0, 320)]  # step, time, samples
    events = [Log(step=step, time=time, samples=samples, values={"loss": 1.0}) for step, time, samples in lines]
    between = Log(step=25, time=4.5, samples=200, split="val", values={"val_loss": 1.0})
    plots = told(tmp_path, Plots(), [*events[:2], between, events[2]])
    (series,) = plots._series["throughput"].values()
    assert tuple(map(list, series.points)) == ([20, 30], [40.0, 160.0])


def test_of_the_past_only_what_lies_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    rows = [{"step": step, "samples": step, "time": 1.0 * step, "split": "train", "loss": 0.5} for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots = Plots()
    plots.on_train_begin(TrainBegin(run_dir=str(tmp_path), step=4))
    assert courses(plots, "loss") == {"loss": 2}


def test_resources_are_drawn_over_the_time(tmp_path: Path) -> None:
    figures = {"cpu": 0.5, "rss": 2.0**30, "gpu0_used": 2.0**31}
    plots = told(tmp_path, Plots(), [Log(time=10.0 * n, split="resource", values=figures) for n in range(3)])
    plots.on_train_end(TrainEnd())
    assert drawn(tmp_path) == ["resources.png"]
    assert plots._series["resources"]["rss (GiB)", "rss"].points == ((0, 10, 20), (1, 1, 1))


def test_drawing_takes_a_small_share_of_the_time_however_long_it_takes(tmp_path: Path) -> None:
    plots = Plots(every=10)
    clock: Iterator[float] = iter(float(second) for second in range(1000))  # each drawing takes a second
    plots._clock = lambda: next(clock)
    told(tmp_path, plots, [Log(step=n, time=float(n), values={"loss": 1.0}) for n in range(1, 1000)])
    assert next(clock) == 2 * 5  # at 10, 210, 410, 610 and 810 seconds


def test_names_may_be_anything(tmp_path: Path) -> None:
    values = {"a$b$": 1.0, "$\\frac": float("nan"), "größe_": 2.0, "_hidden": 3.0, "x\0y": 1.0}
    told(tmp_path, Plots(), [Log(step=1, values=values)]).on_train_end(TrainEnd())
    assert drawn(tmp_path) == ["metrics.png"]


def test_more_metrics_than_fit_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plots = Plots(every=0)
    values = {f"m{number}": 1.0 for number in range(PANELS + 3)}
    told(tmp_path, plots, [Log(step=n, time=1e6 * n, values=values) for n in range(2)]).on_train_end(TrainEnd())
    assert caplog.text.count(f"the first {PANELS} of {PANELS + 3} metrics") == 1


def test_a_disk_that_refuses_is_said_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plots").write_text("no folder")
    plots = told(tmp_path, Plots(every=0), [Log(step=n, time=1e6 * n, values={"loss": 1.0}) for n in range(3)])
    plots.on_train_end(TrainEnd())
    assert caplog.text.count("can't be written") == 1


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("loss", ("loss", "loss")),
        ("val_loss", ("loss", "loss")),
        ("val_north_loss", ("loss", "loss")),
        ("lr", ("learning_rate", "learning rate")),
        ("lr_head", ("learning_rate", "learning rate")),
        ("momentum_0", ("learning_rate", "momentum")),
        ("accuracy", ("metrics", "accuracy")),
        ("val_accuracy", ("metrics", "accuracy")),
    ],
)
def test_training_and_validation_share_a_panel(name: str, place: tuple[str, str]) -> None:
    assert place_of(name) == place


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    script = f"""
import sys
from streamtrain.callbacks.plots import Plots
from streamtrain.events import Log, TrainBegin, TrainEnd
plots = Plots()
assert not any(name.startswith("matplotlib") for name in sys.modules)
plots.on_train_begin(TrainBegin(run_dir={str(tmp_path)!r}))
plots.on_log(Log(step=1, values={{"loss": 1.0}}))
plots.on_train_end(TrainEnd())
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
    assert drawn(tmp_path) == ["loss.png"]


def test_matplotlib_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Plots needs the package matplotlib"):
        Plots()


@pytest.mark.parametrize("every", [-1, "x", float("inf")])
def test_what_cannot_work_is_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="every"):
        Plots(every=every)
