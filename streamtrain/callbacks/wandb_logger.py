"""Weights & Biases: the log's lines and media in a run of theirs, online or offline, the same one after a resume.

Theirs can't be cut off again. Offline its file tells which lines a killed life has left there: they are not logged
again, and those that were lost with it are, out of `metrics.jsonl`. Online nobody tells: steps that a killed life made
beyond its checkpoint stand there twice, at the same place of the axis `step`.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.lines import APART
from streamtrain.callbacks.needed import find, load
from streamtrain.callbacks.once import Once
from streamtrain.callbacks.wandb_folder import Kind, kind_of, mend, missing, offline, reached, settle
from streamtrain.errors import EnvironmentProblem
from streamtrain.events import Log, Media, TrainBegin, TrainEnd
from streamtrain.media import Image, Table
from streamtrain.options import one_of

logger = logging.getLogger(__name__)


class WandbLogger(Callback):
    """Logs to wandb: `project`, `name`, `entity`, `group` and `tags` as `wandb.init` takes them.

    `mode`: `"online"`, or `"offline"`: into the run's folder, for `wandb sync` later; by default what the environment's
    WANDB_MODE says, else online. The run's id is kept in checkpoints, so that a fit which goes on continues its run; a
    fresh start is a new one. Offline each life has a folder of its own, and each line stands in one of them: what a
    `kill -9` took with it, for wandb holds lines back for a while, the next life logs again, from `metrics.jsonl` (but
    no media or resources). `wandb sync` of wandb 0.31 and later appends folder after folder to one run; that of older
    ones lets each replace the one before, but with `--append`. Files that a kill left torn or empty, at which it would
    give up, are cut to what is whole, or put aside. Online, lines that a kill took are missing in theirs. The
    configuration is the trainer's. What the program prints is not captured. Needs wandb (`pip install
    'streamtrain[wandb]'`): ConfigError without; where a run can't be begun (no login, no network), EnvironmentProblem.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        name: str | None = None,
        mode: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        find("WandbLogger", "wandb", extra="wandb")
        self._mode = None if mode is None else one_of(mode, ("online", "offline"), "WandbLogger: mode")
        self._about = {"project": project, "name": name, "entity": entity, "group": group, "tags": list(tags)}
        self.state_key = "/".join(text for text in (entity, project, group, name) if text)
        self._once = Once()
        self._id = self._folder = ""
        """`_folder`: where this life's lines lie, by its name; nothing online."""
        self._there: dict[Kind, int] = {}
        """The last step of each kind of line that lives before this one have left."""
        self._wandb: Any = None
        self._run: Any = None

    def on_train_begin(self, event: TrainBegin) -> None:
        """Begin a run, or go on with it."""
        again = bool(event.step and self._id)
        self._id = self._id if again else uuid.uuid4().hex[:8]
        last, before = self._once.state_dict(), self._folder if again else ""
        self._once.begin(event.step)  # without a journal: what a killed life has logged may have been lost with it
        self._wandb = load("wandb")
        mode = self._mode or os.environ.get("WANDB_MODE") or "online"
        try:
            self._run = self._wandb.init(
                **self._about,
                id=self._id,
                resume="allow" if again else None,
                mode=mode,
                dir=event.run_dir,
                config=dict(event.config),
                reinit="create_new",  # other runs of this process, and wandb.run, stay what they are
                settings=self._wandb.Settings(console="off", silent=True),
            )
        except Exception as error:
            raise EnvironmentProblem(
                f"wandb begins no run: {str(error).strip().partition(chr(10))[0] or type(error).__name__}",
                hint="`wandb login` once, or WandbLogger(mode='offline') (WANDB_MODE=offline) and `wandb sync` later.",
            ) from error
        # Their own count of calls is no step of ours, and could not go back after a resume.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._there, self._folder = {}, ""
        if mode == "offline":
            folder = Path(self._run.settings.sync_dir)
            self._folder = folder.name
            if before and event.run_dir is not None:
                self._go_on(event, folder, before, (last["step"], [kind_of(names) for _, names in last["there"]]))

    def on_log(self, event: Log) -> None:
        """Log a line."""
        if self._run is None:
            return
        if event.split == APART:
            self._log(event.step, {f"resource/{name}": value for name, value in event.values.items()})
        elif self._once.first(event) and event.step > self._there.get(kind_of(event.values), -1):
            self._log(event.step, {"epoch": event.epoch, "samples": event.samples, **event.values})

    def on_media(self, event: Media) -> None:
        """Log them as theirs."""
        if self._run is not None:
            self._log(event.step, {name: self._theirs(shown) for name, shown in event.values.items()})

    def on_train_end(self, event: TrainEnd) -> None:
        """Finish the run; one of a fit that failed is marked so."""
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=int(event.reason == "failed"))

    def state_dict(self) -> dict[str, Any]:
        """The run's id, and which lines of the last step it has."""
        return {"id": self._id, "folder": self._folder, **self._once.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._id, self._folder = str(state.get("id", "")), str(state.get("folder", ""))
        self._once.load_state_dict(state)

    def _go_on(self, event: TrainBegin, folder: Path, before: str, last: tuple[int, list[Kind]]) -> None:
        """Find out what lives before this one have left, and log what they have not."""
        files = offline(folder, self._id)
        if before not in {file.parent.name for file in files}:
            logger.warning("%s is gone from %s: what a kill took from it is not logged again", before, folder.parent)
            last = (last[0], [])
        ended = settle(files)
        if not ended:
            logger.warning("%s: a process of wandb still writes there: lines may stand there twice", folder.parent)
        record = load("wandb.proto.wandb_internal_pb2").Record
        try:
            self._there = reached(files, record)
            if ended:
                mend(files, record)
        except Exception as error:  # of a version whose files are others
            logger.warning("%s can't be read (%r): lines may be missing there, or stand there twice", before, error)
            return
        count = 0
        for row in missing(Path(str(event.run_dir), "metrics.jsonl"), event.step, self._there, last):
            self._run.log(row)
            count += 1
        beyond = max(self._there.values(), default=0)
        if count or beyond > event.step:
            logger.info(
                "wandb: %d lines that were lost with an earlier life are logged again; lines up to step %d are there",
                count,
                beyond,
            )

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({**values, "step": step})

    def _theirs(self, shown: Any) -> Any:
        if isinstance(shown, Image):
            pixels = shown.pixels
            return self._wandb.Image(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        if isinstance(shown, Table):
            return self._wandb.Table(columns=list(shown.columns), data=[list(row) for row in shown.rows])
        return self._wandb.Histogram(np_histogram=(shown.counts, shown.edges))
