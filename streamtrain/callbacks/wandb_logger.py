"""Weights & Biases: the log's lines and media in a run of theirs, online or offline, the same one after a resume.

Theirs can't be cut off again: steps that a killed life made beyond its checkpoint stand there twice, at the same place
of the axis `step`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.lines import APART
from streamtrain.callbacks.needed import find, load
from streamtrain.callbacks.once import Once
from streamtrain.errors import EnvironmentProblem
from streamtrain.events import Log, Media, TrainBegin, TrainEnd
from streamtrain.media import Image, Table
from streamtrain.options import one_of


class WandbLogger(Callback):
    """Logs to wandb: `project`, `name`, `entity`, `group` and `tags` as `wandb.init` takes them.

    `mode`: `"online"`, or `"offline"`: into the run's folder, for `wandb sync` later; by default what the environment's
    WANDB_MODE says, else online. The run's id is kept in checkpoints, so that a fit which goes on continues its run; a
    fresh start is a new one. wandb holds lines back for a while: a `kill -9` may take those of the killed life with it,
    which `metrics.jsonl` has. The configuration is the
    trainer's. What the program prints is not captured. Needs wandb (`pip install 'streamtrain[wandb]'`): ConfigError
    without; where a run can't be begun (no login, no network), EnvironmentProblem.
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
        self._once = Once()
        self._id = ""
        self._wandb: Any = None
        self._run: Any = None

    def on_train_begin(self, event: TrainBegin) -> None:
        """Begin a run, or go on with it."""
        again = bool(event.step and self._id)
        self._id = self._id if again else uuid.uuid4().hex[:8]
        self._once.begin(event.step)  # without a journal: what a killed life has logged may have been lost with it
        self._wandb = load("wandb")
        mode = self._mode or os.environ.get("WANDB_MODE") or "online"
        try:
            self._run = self._wandb.init(
                **self._about,
                id=self._id,
                resume="allow" if again and mode == "online" else None,
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

    def on_log(self, event: Log) -> None:
        """Log a line."""
        if self._run is None:
            return
        if event.split == APART:
            self._log(event.step, {f"resource/{name}": value for name, value in event.values.items()})
        elif self._once.first(event):
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
        return {"id": self._id, **self._once.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._id = str(state.get("id", ""))
        self._once.load_state_dict(state)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({**values, "step": step})

    def _theirs(self, shown: Any) -> Any:
        if isinstance(shown, Image):
            pixels = shown.pixels
            return self._wandb.Image(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        if isinstance(shown, Table):
            return self._wandb.Table(columns=list(shown.columns), data=[list(row) for row in shown.rows])
        return self._wandb.Histogram(np_histogram=(shown.counts, shown.edges))
