"""MLflow: the log's lines as metrics of a run of theirs, in a folder, a database or a server; the same after a resume.

Only its client is used: no run is active in the process, and nothing of the host's own use of mlflow changes. Lines
can't be cut off again there: those that a life sends twice all the same, as after going back to an older checkpoint,
stand there twice.
"""

from __future__ import annotations

import logging
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

logger = logging.getLogger(__name__)

_STRANGE = re.compile(r"[^\w\-. :/]")
"""What the name of a metric or parameter of theirs does not have."""
_PARAMETERS, _TEXT = 100, 500
"""Parameters that go together, and characters of one, in every version of theirs."""


class MLflowLogger(Callback):
    """Logs to mlflow, into `experiment`, at `uri`; by default where MLFLOW_TRACKING_URI of the environment says, else
    to `mlruns/` beside the run's folder, or where mlflow takes no folder to the database `mlflow.db` there.

    Newer versions refuse folders unless MLFLOW_ALLOW_FILE_STORE=true is set. The run's id is kept in checkpoints: a fit
    that goes on continues its run, and a fresh start is a new one. A line that a killed life has sent after its last
    checkpoint is not sent again. The trainer's configuration becomes its parameters. Needs mlflow or mlflow-skinny, and
    for a database alembic and SQLAlchemy (`pip install 'streamtrain[mlflow]'` brings all): ConfigError without mlflow;
    EnvironmentProblem where it begins no run.
    """

    writes_lines = True

    def __init__(self, experiment: str = "streamtrain", *, uri: str | None = None, name: str | None = None) -> None:
        find("MLflowLogger", "mlflow", extra="mlflow")
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        self.needs_folder = uri is None
        self._experiment, self._uri, self._name = experiment, uri, name
        self.state_key = "/".join(text for text in (experiment, name) if text)
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
        beside = folder.parent.absolute()
        self._metric = load("mlflow.entities").Metric
        places = [self._uri] if self._uri else [(beside / "mlruns").as_uri(), f"sqlite:///{beside / 'mlflow.db'}"]
        refusals: list[Exception] = []
        for place in places:
            try:
                self._client = self._opened(place, folder, event)
                break
            except Exception as error:
                refusals.append(error)
        else:
            raise EnvironmentProblem(
                f"mlflow begins no run: {'; nor in a database: '.join(map(_first_line, refusals))}",
                hint="Give uri= of a server; a database needs what `pip install 'streamtrain[mlflow]'` brings; for a "
                "folder set MLFLOW_ALLOW_FILE_STORE=true.",
            ) from refusals[0]
        if refusals:
            logger.info("mlflow takes no folder: the run goes to %s (%s)", place, _first_line(refusals[0]))
        journal = None if event.run_dir is None else folder / f".mlflow-lines-{self._id}"
        self._once.begin(event.step, journal, key=self._id)

    def _opened(self, uri: str, folder: Path, event: TrainBegin) -> Any:
        """A client of what is there, with a run begun or gone on with."""
        client = load("mlflow").MlflowClient(tracking_uri=uri)
        if event.step and self._id:
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._begun(client, self._name or folder.name, event.config, load("mlflow.entities").Param)
        return client

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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
