"""`plots/`: the course of a run as PNG: losses, metrics, learning rates, throughput and resources.

Its law: drawing takes at most a two-hundredth of the time. It is Python that runs beside the training, in this
callback's thread, and the next drawing waits 200 times as long as the last one took. A series has at most 2000 points.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.lines import APART
from streamtrain.callbacks.needed import find, load
from streamtrain.callbacks.rolling import rows
from streamtrain.callbacks.series import Series
from streamtrain.events import Log, TrainBegin, TrainEnd
from streamtrain.options import at_least

logger = logging.getLogger(__name__)

SHARE = 1 / 200
"""Of the time, for drawing."""
PANELS = 12
"""Axes of one file; what has more says so."""
GIB = float(1 << 30)


class Plots(Callback):
    """Draws `plots/{loss,metrics,learning_rate,throughput,resources}.png` each `every` seconds and at the end.

    The files are replaced whole. A run that goes on reads its past from `metrics.jsonl` and `resources.jsonl`;
    resources are there beside a ResourceMonitor. Needs matplotlib (`pip install 'streamtrain[plots]'`): ConfigError
    without. Figures are made by its objects alone: nothing of pyplot or of its settings is touched.
    """

    needs_folder = True

    def __init__(self, *, every: float = 60.0) -> None:
        find("Plots", "matplotlib", extra="plots")
        self._every = at_least(every, 0.0, "Plots: every")
        self._clock: Callable[[], float] = time.thread_time
        self._folder: Path | None = None
        self._series: dict[str, dict[tuple[str, str], Series]] = {}
        """By file, panel and name."""
        self._last: tuple[float, float] | None = None
        self._next = 0.0
        self._said: set[str] = set()

    def on_train_begin(self, event: TrainBegin) -> None:
        """Read the past."""
        self._folder, self._series, self._last = None, {}, None
        if event.run_dir is None:
            return
        self._folder = Path(event.run_dir)
        self._next = event.time + self._every
        if event.step:
            for row in rows(self._folder / "metrics.jsonl"):
                if _number(row, "step") <= event.step:
                    self._take(str(row.get("split")), row, _number(row, "step"), row)
        if event.step:
            for row in rows(self._folder / "resources.jsonl"):
                self._take(APART, row, _number(row, "step"), row)

    def on_log(self, event: Log) -> None:
        """Remember the numbers; draw if it is time."""
        if self._folder is None:
            return
        self._take(event.split, event.values, event.step, {"time": event.time, "samples": event.samples})
        if event.time >= self._next:
            self._next = event.time + max(self._every, self._draw() / SHARE)

    def on_train_end(self, event: TrainEnd) -> None:
        """Draw the whole."""
        if self._folder is not None:
            self._draw()
        self._folder = None

    def _take(self, split: str, values: Mapping[str, Any], step: float, about: Mapping[str, Any]) -> None:
        if split == APART:
            for name, value in values.items():
                if isinstance(value, float) and name != "time":
                    large = name in ("rss", "memory_available", "disk_free") or name.endswith(("ed",))
                    panel, value = (f"{name} (GiB)", value / GIB) if large else (name, value)
                    self._add("resources", panel, name, _number(about, "time"), value)
            return
        for name, value in values.items():
            if isinstance(value, float) and name != "time":
                file, panel = place_of(name)
                self._add(file, panel, name, step, value)
        if split == "train":
            now, samples = _number(about, "time"), _number(about, "samples")
            before, self._last = self._last, (now, samples)
            if before is not None and now > before[0] and samples > before[1]:
                rate = (samples - before[1]) / (now - before[0])
                self._add("throughput", "samples/s", "samples/s", step, rate)

    def _add(self, file: str, panel: str, name: str, place: float, value: float) -> None:
        self._series.setdefault(file, {}).setdefault((panel, name), Series()).add(place, value)

    def _draw(self) -> float:
        """Draw every file; the seconds of this thread that it took."""
        began = self._clock()
        assert self._folder is not None
        folder = self._folder / "plots"
        try:
            folder.mkdir(exist_ok=True)
            for file, series in self._series.items():
                self._write(folder / f"{file}.png", file, series)
        except OSError as error:
            self._say("disk", "the plots in %s can't be written: %s", folder, error.strerror or error)
        return self._clock() - began

    def _write(self, path: Path, file: str, series: Mapping[tuple[str, str], Series]) -> None:
        panels: dict[str, dict[str, Series]] = {}
        for (panel, name), one in series.items():
            panels.setdefault(panel, {})[name] = one
        if len(panels) > PANELS:
            self._say(file, "%s has the first %d of %d metrics", path, PANELS, len(panels))
        shown = list(panels.items())[:PANELS]
        figure = load("matplotlib.figure").Figure(figsize=(8, 2.6 * len(shown)), layout="constrained")
        canvas = load("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        for axes, (panel, lines) in zip(figure.subplots(len(shown), squeeze=False).flat, shown, strict=True):
            for name, one in lines.items():
                label = name if name[:1] != "_" else f" {name}"  # which would be left out
                axes.plot(*one.points, linewidth=1, label=_plain(label), marker="." if len(one.points[0]) == 1 else "")
            axes.set_ylabel(_plain(panel))
            axes.set_xlabel("seconds" if file == "resources" else "step")
            axes.grid(visible=True, alpha=0.3)
            axes.legend(loc="best", fontsize="small")
        temp = path.with_name(f".{path.name}.tmp")
        canvas.print_png(str(temp))
        os.replace(temp, path)

    def _say(self, what: str, message: str, *arguments: object) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(message, *arguments)


def place_of(name: str) -> tuple[str, str]:
    """The file and the panel of a metric: a metric of training and those of its validations share one."""
    base = name.removeprefix("val_").removeprefix("test_")
    if base == "lr" or base.startswith("lr_"):
        return "learning_rate", "learning rate"
    if base.startswith("momentum_"):
        return "learning_rate", "momentum"
    if base == "loss" or base.endswith("_loss"):
        return "loss", "loss"
    return "metrics", base


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _plain(text: str) -> str:
    """Without what matplotlib would take for mathematics, and what no font has."""
    return "".join(letter if letter.isprintable() else "?" for letter in text).replace("$", r"\$")
