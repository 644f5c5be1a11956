"""TensorBoard's event files: scalars, media, histograms of the weights, and the model's graph.

A file's lines can't be cut off again: a life that goes on tells TensorBoard to forget the steps after its checkpoint,
which is how each step stands there once.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamtrain import rng
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.lines import APART
from streamtrain.callbacks.needed import find, load
from streamtrain.callbacks.once import Once
from streamtrain.evaluation import evaluating
from streamtrain.events import Log, Media, TrainBegin, TrainEnd
from streamtrain.media import Histogram, Image, Table
from streamtrain.options import count, flag

logger = logging.getLogger(__name__)

BINS = 64
FULL = 1_000_000
"""Numbers of a file, about 50 MB; then another one begins, and TensorBoard reads them in their order."""


class TensorBoard(Callback):
    """Writes event files into `tensorboard/` in the run's folder, or into `log_dir`.

    Scalars go by the names that they have in `metrics.jsonl`, those of resources as `resource/<name>`. With
    `histograms_every=500` the weights are counted at the first line of the log at or after every 500th step (on the
    train thread, between two updates); with `graph=True` the model is traced once, on the inputs of its first batch.
    Where the disk refuses, at its beginning apart, the run goes on without it, which is said.
    Needs the package tensorboard, or tensorboardX (`pip install 'streamtrain[tensorboard]'`): ConfigError without.
    """

    writes_lines = True

    def __init__(
        self, *, log_dir: str | os.PathLike[str] | None = None, histograms_every: int | None = None, graph: bool = False
    ) -> None:
        self._package = find("TensorBoard", "tensorboard", "tensorboardX", extra="tensorboard")
        self.needs_folder = log_dir is None
        self._given = None if log_dir is None else Path(os.path.abspath(log_dir))
        self.state_key = "" if log_dir is None else os.fspath(log_dir)
        self.writes = "tensorboard/" if self._given is None else str(self._given)
        self._every = None if histograms_every is None else count(histograms_every, "TensorBoard: histograms_every")
        self._graph = flag(graph, "TensorBoard: graph")
        self._once = Once()
        self._writer: Any = None
        self._inputs: tuple[Any, ...] | None = None
        self._due: int | None = None
        self._drawn = False
        self._counted: list[tuple[int, float, dict[str, Histogram]]] = []
        self._open: Callable[[int | None], Any] = lambda again: None
        self._folder: Path | None = None
        self._numbers = 0
        """In the file so far."""

    def on_train_begin(self, event: TrainBegin) -> Coroutine[Any, Any, None] | None:
        """Open a file of this life."""
        folder = self._given or (None if event.run_dir is None else Path(event.run_dir, "tensorboard"))
        if folder is None:
            return None
        self._once.begin(event.step)
        again = event.step + 1 if event.step else 0 if folder.is_dir() else None
        self._folder = folder
        module = load("torch.utils.tensorboard" if self._package == "tensorboard" else "tensorboardX")
        self._open = lambda again: _behind(folder, lambda: module.SummaryWriter(str(folder), purge_step=again))
        self._writer, self._numbers = self._open(again), 0
        if self._every is not None:
            self._due = event.step // self._every * self._every + self._every
        return self._watch(event) if self._graph and not self._drawn else None

    def on_log(self, event: Log) -> Coroutine[Any, Any, None] | None:
        """Write its numbers."""
        if self._writer is None:
            return None
        try:
            self._write_line(event)
        except OSError as error:
            self._give_up(error)
            return None
        if self._inputs is not None or (self._due is not None and event.step >= self._due):
            return self._look(event)
        return None

    def _write_line(self, event: Log) -> None:
        self._write_counted()
        wall = time.time()
        if event.split == APART or self._once.first(event):
            prefix = "resource/" if event.split == APART else ""
            for name, value in event.values.items():
                self._writer.add_scalar(f"{prefix}{name}", value, event.step, wall)
            self._count_up(len(event.values))
        self._writer.flush()  # a kill would take what no later life writes again: the steps before its checkpoint

    def on_media(self, event: Media) -> None:
        """Write them."""
        if self._writer is not None:
            try:
                self._write_media(event)
            except OSError as error:
                self._give_up(error)

    def _write_media(self, event: Media) -> None:
        for name, shown in event.values.items():
            if isinstance(shown, Image):
                self._writer.add_image(name, shown.pixels, event.step, dataformats="HWC")
            elif isinstance(shown, Table):
                self._writer.add_text(name, _markdown(shown), event.step)
            else:
                self._write_histogram(name, shown, event.step, time.time())
        self._writer.flush()

    def on_train_end(self, event: TrainEnd) -> None:
        """Write the rest and end the writer's thread."""
        if self._writer is not None:
            try:
                self._write_counted()
                self._writer.close()
            except OSError as error:
                self._give_up(error)
        self._writer = self._inputs = None

    def _give_up(self, error: OSError) -> None:
        """The package's own thread has ended at the error: no more can be written in this life."""
        why = error.strerror or error
        logger.warning("TensorBoard: %s can't be written: %s: it gets no more of this life", self._folder, why)
        with suppress(OSError):
            self._writer.close()
        self._writer = self._inputs = self._due = None

    def state_dict(self) -> dict[str, Any]:
        """Which lines of the last step are written, and whether the graph is."""
        return {**self._once.state_dict(), "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._once.load_state_dict(state)
        self._drawn = bool(state.get("drawn", False))

    def _count_up(self, numbers: int) -> None:
        self._numbers += numbers
        if self._numbers >= FULL:
            self._writer.close()
            self._writer, self._numbers = self._open(None), 0

    async def _watch(self, event: TrainBegin) -> None:
        """Keep a copy of what the model is first called with."""

        def keep(model: nn.Module, inputs: tuple[Any, ...]) -> None:
            handle.remove()
            self._inputs = tuple(_copied(value) for value in inputs)

        handle = await event.on_train_thread(lambda model, optimizer: model.register_forward_pre_hook(keep))

    async def _look(self, event: Log) -> None:
        """What needs the model, on the train thread; it is written in our own with the next line."""
        if self._inputs is not None:
            inputs, self._inputs, self._drawn = self._inputs, None, True
            await event.on_train_thread(lambda model, optimizer: self._draw(model, inputs))
        if self._due is not None and self._every is not None and event.step >= self._due:
            step, histograms = await event.on_train_thread(lambda model, optimizer: (event.updates(), _counts(model)))
            self._counted.append((step, time.time(), histograms))
            self._due = step // self._every * self._every + self._every

    def _draw(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        before = rng.capture()
        try:
            # torch's own way back would put all modules into the mode of the outermost one. What is traced first does
            # not fail in add_graph, which prints; and what tracing warns of (that it is old) is no news to users.
            with evaluating(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.trace(model, inputs)  # type: ignore[no-untyped-call, unused-ignore]
                self._writer.add_graph(model, inputs)
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            logger.warning("TensorBoard: the model can't be traced, so there is no graph: %s", text)
        finally:
            rng.restore(before)

    def _write_counted(self) -> None:
        for step, wall, histograms in self._counted:
            for name, histogram in histograms.items():
                self._write_histogram(f"weights/{name}", histogram, step, wall)
        self._counted.clear()

    def _write_histogram(self, name: str, histogram: Histogram, step: int, wall: float) -> None:
        edges, counts = histogram.edges.tolist(), histogram.counts.tolist()
        ends = {"min": edges[0], "max": edges[-1], "num": sum(counts)}
        sums = {"sum": histogram.total, "sum_squares": histogram.squares}
        # A bucket is known by its upper limit: an empty first one tells where the second begins.
        buckets = {"bucket_limits": edges, "bucket_counts": [0, *counts]}
        self._writer.add_histogram_raw(name, **ends, **sums, **buckets, global_step=step, walltime=wall)


def _behind(folder: Path, begin: Callable[[], Any]) -> Any:
    """A writer whose file TensorBoard reads behind those that are there. It goes by their names, in which the files of
    one second have numbers without zeros in front: one whose number has a digit more is begun in the next second."""
    while True:
        before = set(_names(folder))
        writer = begin()
        own = next((name for name in _names(folder) if name not in before), "")
        same = own.rstrip("0123456789")
        if all(name < own for name in before if own and name.startswith(same)):
            return writer
        writer.close()
        (folder / own).unlink()
        time.sleep(1.0 - time.time() % 1.0)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _copied(value: Any) -> Any:
    """Tensors in memory of their own, wherever they lie in it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _counts(model: nn.Module) -> dict[str, Histogram]:
    """The weights by name, each counted once; one parameter at a time is copied to the host."""
    return {name: _count(parameter.detach()) for name, parameter in model.named_parameters()}


def _count(weights: Tensor) -> Histogram:
    """Of complex ones both parts are counted."""
    weights = torch.view_as_real(weights.resolve_conj()) if weights.is_complex() else weights
    values = weights.cpu().to(torch.float32).flatten()
    known = values[torch.isfinite(values)]
    if not known.numel():
        return Histogram.of(values.numpy(), bins=BINS)
    low, high = (float(end) for end in known.aminmax())
    if high - low > torch.finfo(torch.float32).max:  # torch counts none then
        return Histogram.of(values.numpy(), bins=BINS)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(known, BINS, low, high).numpy().astype(np.int64)
    sums = float(known.sum(dtype=torch.float64)), float(known.double().square().sum())
    return Histogram(np.linspace(low, high, BINS + 1), counts, *sums, values.numel() - known.numel())


def _markdown(table: Table) -> str:
    def line(cells: tuple[Any, ...]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(table.columns), "|" + " --- |" * len(table.columns), *map(line, table.rows)])
