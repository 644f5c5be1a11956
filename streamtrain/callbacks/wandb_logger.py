"""Weights & Biases: the log's lines and media in a run of theirs, online or offline, the same one after a resume.

Theirs can't be cut off again. Offline its files tell which lines a killed life has left there, online their server does
by the number of rows: they are not logged again, and those that were lost with it are, out of `metrics.jsonl`.
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
from streamtrain.callbacks.wandb_folder import Kind, folder_of, kind_of, lives, mend, missing, offline, reached, settle
from streamtrain.callbacks.wandb_rows import Rows, joined
from streamtrain.errors import EnvironmentProblem
from streamtrain.events import Log, Media, TrainBegin, TrainEnd
from streamtrain.media import Image, Table
from streamtrain.options import one_of

logger = logging.getLogger(__name__)

ROWS = ".wandb-rows-%s"
"""Notes of the online run of that id, in our run's folder (streamtrain.callbacks.wandb_rows)."""


class WandbLogger(Callback):
    """Logs to wandb: `project`, `name`, `entity`, `group` and `tags` as `wandb.init` takes them.

    `mode`: `"online"`, or `"offline"`: into the run's folder, for `wandb sync` later; by default what the environment's
    WANDB_MODE says, else online. The run's id is kept in checkpoints, so that a fit which goes on continues its run; a
    fresh start is a new one. Each line stands there once: what a `kill -9` took with it, for wandb holds lines back for
    a while, the next life logs again, from `metrics.jsonl` (but no media or resources), and no line that is there
    (media may stand twice). Online the server says how many rows of the run it has, and `.wandb-rows-<id>` in the run's
    folder which lines they are; where that file is gone, or says too little, a warning tells what can't be held.

    Offline each life has a folder of its own. `wandb sync` of wandb 0.31 and later appends folder after folder to one
    run; that of older ones lets each replace the one before, but with `--append`. Files that a kill left torn or empty,
    at which it would give up, are cut to what is whole, or put aside. A run may go on in the other mode: then the
    folders of its offline lives are still to be synced, and what a kill took from one that was online is not known
    offline, which is said.

    The configuration is the trainer's. What the program prints is not captured. Needs wandb (`pip install
    'streamtrain[wandb]'`): ConfigError without; where a run can't be begun (no login, no network), EnvironmentProblem.
    """

    writes_lines = True

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
        self._rows: Rows | None = None
        self._floor = -1
        """Lines up to this step are not logged again: nobody can tell whether they are there."""
        self._wandb: Any = None
        self._run: Any = None

    def on_train_begin(self, event: TrainBegin) -> None:
        """Begin a run, or go on with it."""
        again = bool(event.step and self._id)
        self._id, self._floor = (self._id, self._floor) if again else (uuid.uuid4().hex[:8], -1)
        last, before = self._once.state_dict(), self._folder if again else ""
        self._once.begin(event.step)  # without a journal: what a killed life has logged may have been lost with it
        self._wandb = load("wandb")
        mode = self._mode or os.environ.get("WANDB_MODE") or "online"
        self._there, self._folder, self._rows = {}, "", None
        # Before the server is asked what has arrived: a life's process sends for a while after its end.
        ended = not again or event.run_dir is None or settle(lives(folder_of(event.run_dir), self._id))
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
        if mode in ("offline", "dryrun"):
            self._folder = Path(self._run.settings.sync_dir).name
        if event.run_dir is None or mode == "disabled":
            return
        if not self._folder:
            self._rows = Rows(Path(event.run_dir, ROWS % self._id), self._id)
        if again:
            self._go_on(event, ended, before, (last["step"], [kind_of(names) for _, names in last["there"]]))
        elif self._rows is not None:
            self._rows.begin(0, {})

    def on_log(self, event: Log) -> None:
        """Log a line."""
        if self._run is None:
            return
        if event.split == APART:
            self._log({**{f"resource/{name}": value for name, value in event.values.items()}, "step": event.step})
        elif self._once.first(event) and event.step > self._there.get(kind := kind_of(event.values), -1):
            fixed = {"epoch": event.epoch, "samples": event.samples}
            self._log({**fixed, **event.values, "step": event.step}, kind)

    def on_media(self, event: Media) -> None:
        """Log them as theirs."""
        if self._run is not None:
            self._log({**{name: self._theirs(shown) for name, shown in event.values.items()}, "step": event.step})

    def on_train_end(self, event: TrainEnd) -> None:
        """Finish the run; one of a fit that failed is marked so."""
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=int(event.reason == "failed"))

    def state_dict(self) -> dict[str, Any]:
        """The run's id, and which lines of the last step it has."""
        return {"id": self._id, "folder": self._folder, "floor": self._floor, **self._once.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._id, self._folder = str(state.get("id", "")), str(state.get("folder", ""))
        self._floor = int(state.get("floor", -1))
        self._once.load_state_dict(state)

    def _go_on(self, event: TrainBegin, ended: bool, before: str, last: tuple[int, list[Kind]]) -> None:
        """Find out what lives before this one have left, and log what they have not. `ended`: whether they have."""
        folder = Path(str(event.run_dir))
        if not ended:
            logger.warning("a process of wandb still writes in %s: lines may stand there twice", folder_of(folder))
        known = self._left(folder_of(folder), before, ended)
        known = self._arrived(folder / (ROWS % self._id), event.step, before, known) and known
        last = (last[0], last[1] if known else [])
        count = 0
        for row in missing(folder / "metrics.jsonl", event.step, self._there, last):
            if row["step"] > self._floor:
                self._log(row, kind_of(row))
                count += 1
        beyond = max(self._there.values(), default=0)
        if count or beyond > event.step:
            logger.info(
                "wandb: %d lines that were lost with an earlier life are logged again; lines up to step %d are there",
                count,
                beyond,
            )

    def _left(self, place: Path, before: str, ended: bool) -> bool:
        """Note what offline lives have left; whether all of it is known."""
        files = offline(place, self._id, self._folder)
        known = not before or before in {file.parent.name for file in files}
        if not known:
            logger.warning("%s is gone from %s: what a kill took from it is not logged again", before, place)
        try:
            if files:
                record = load("wandb.proto.wandb_internal_pb2").Record
                self._there = reached(files, record)
                if ended:
                    mend(files, record)
        except Exception as error:  # of a version whose files are others
            text = "what lives before left in %s can't be read (%r): lines may be missing there, or stand there twice"
            logger.warning(text, place, error)
            return False
        return known

    def _arrived(self, path: Path, step: int, before: str, known: bool) -> bool:
        """Note what of lives that were online has arrived; whether that is known. `known`: whether the others' is."""
        online, notes = self._rows is not None, self._rows or Rows(path, self._id)
        arrived = int(self._run.starting_step) if online else None
        self._there = joined(self._there, notes.arrived(arrived))
        gone = not (before or notes.known)
        if gone:
            text = "%s is gone: lines after step %d may stand twice in wandb, and what a kill took is not logged again"
            logger.warning(text, path, step)
        elif not before and not online:
            logger.warning("the life before was online: what a kill took from it is not logged again in wandb offline")
        certain = bool(before) or (online and not gone)
        self._floor = max(self._floor, notes.floor, -1 if known and certain else step)
        if online or notes.known:
            notes.begin(arrived, self._there, self._floor)
        return certain

    def _log(self, values: Mapping[str, Any], kind: Kind | None = None) -> None:
        """A row; `kind`: of a line of the log."""
        if self._rows is not None:
            self._rows.note(int(values["step"]), kind)
        self._run.log(values)

    def _theirs(self, shown: Any) -> Any:
        if isinstance(shown, Image):
            pixels = shown.pixels
            return self._wandb.Image(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        if isinstance(shown, Table):
            return self._wandb.Table(columns=list(shown.columns), data=[list(row) for row in shown.rows])
        return self._wandb.Histogram(np_histogram=(shown.counts, shown.edges))
