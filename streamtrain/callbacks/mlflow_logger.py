"""MLflow: the log's lines as metrics of a run of theirs, in a folder, a database or a server; the same after a resume.

Only its client is used: no run is active in the process, and nothing of the host's own use of mlflow changes. Lines
can't be cut off again there: those that a life sends twice all the same, as after going back to an older checkpoint,
stand there twice.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.lines import APART
from streamtrain.callbacks.needed import find, load
from streamtrain.callbacks.once import Once
from streamtrain.errors import EnvironmentProblem
from streamtrain.events import Log, TrainBegin, TrainEnd

_STRANGE = re.compile(r"[^\w\-. :/]")
"""What the name of a metric or parameter of theirs does not have."""
_PARAMETERS, _TEXT = 100, 500
"""Parameters that go together, and characters of one, in every version of theirs."""


class MLflowLogger(Callback):
    """Logs to mlflow, into `experiment`, at `uri`; by default where MLFLOW_TRACKING_URI of the environment says, else
    to `mlruns/` beside the run's folder.

    Newer versions of mlflow want a database (`sqlite:///mlflow.db`, with the whole package mlflow) or a server, and
    refuse folders unless MLFLOW_ALLOW_FILE_STORE=true is set. The run's id is kept in checkpoints: a fit that goes on
    continues its run, and a fresh start is a new one. A line that a killed life has sent after its last checkpoint is
    not sent again. The trainer's configuration becomes its parameters. Needs mlflow
    or mlflow-skinny (`pip install 'streamtrain[mlflow]'`): ConfigError without; EnvironmentProblem where it begins no
    run.
    """

    def __init__(self, experiment: str = "streamtrain", *, uri: str | None = None, name: str | None = None) -> None:
        find("MLflowLogger", "mlflow", extra="mlflow")
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        self.needs_folder = uri is None
        self._experiment, self._uri, self._name = experiment, uri, name
        self._once = Once()
        self._id = ""
        self._client: Any = None
        self._metric: Any = None

    def on_train_begin(self, event: TrainBegin) -> None:
        """Begin a run, or go on with it."""
        self._client = None
        if self._uri is None and event.run_dir is None:
            return
        folder = Path(event.run_dir or ".")
        mlflow, entities = load("mlflow"), load("mlflow.entities")
        self._metric = entities.Metric
        try:
            client = mlflow.MlflowClient(tracking_uri=self._uri or (folder.parent / "mlruns").absolute().as_uri())
            if event.step and self._id:
                client.update_run(self._id, status="RUNNING")
            else:
                self._id = self._begun(client, self._name or folder.name, event.config, entities.Param)
        except Exception as error:
            raise EnvironmentProblem(
                f"mlflow begins no run: {str(error).strip().partition(chr(10))[0] or type(error).__name__}",
                hint="Give uri= of a server, or 'sqlite:///mlflow.db'; for a folder set MLFLOW_ALLOW_FILE_STORE=true.",
            ) from error
        self._client = client
        journal = None if event.run_dir is None else folder / ".mlflow-lines"
        self._once.begin(event.step, journal, key=self._id)

    def on_log(self, event: Log) -> None:
        """Log a line."""
        if self._client is None or not (event.split == APART or self._once.first(event)):
            return
        now = int(time.time() * 1000)
        prefix = "resource/" if event.split == APART else ""
        metrics = [
            self._metric(_STRANGE.sub("_", f"{prefix}{name}"), value, now, event.step)
            for name, value in event.values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)
        if event.split != APART:
            self._once.handed(event)

    def on_train_end(self, event: TrainEnd) -> None:
        """Say how the run ended: FINISHED, FAILED, or KILLED where it was stopped and may go on."""
        client, self._client = self._client, None
        if client is not None:
            status = {"failed": "FAILED", "signal": "KILLED", "stopped": "KILLED", "cancelled": "KILLED"}
            client.set_terminated(self._id, status=status.get(event.reason, "FINISHED"))

    def state_dict(self) -> dict[str, Any]:
        """The run's id, and which lines of the last step it has."""
        return {"id": self._id, **self._once.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._id = str(state.get("id", ""))
        self._once.load_state_dict(state)

    def _begun(self, client: Any, name: str, config: Mapping[str, Any], parameter: Any) -> str:
        found = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if found is None else found.experiment_id
        run: str = client.create_run(experiment, run_name=name).info.run_id
        told = [parameter(_STRANGE.sub("_", key), str(value)[:_TEXT]) for key, value in _flat(config)]
        for begin in range(0, len(told), _PARAMETERS):
            client.log_batch(run, params=told[begin : begin + _PARAMETERS])
        return run


def _flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
