"""What the mlflow logger promises: one run of theirs for a run of ours, each line once, by their client alone.

mlflow itself is not needed: modules in its place note what they are told, in the words of its documentation.
"""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from torch import nn

from streamtrain.callbacks.mlflow_logger import MLflowLogger
from streamtrain.errors import ConfigError, EnvironmentProblem
from streamtrain.events import Log, TrainBegin, TrainEnd
from streamtrain.trainer import Trainer
from tests.engine import Samples, lines, network


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    key: str
    value: str


class Store:
    """What lies at one address, through their client."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.metrics: list[Metric] = []
        self.params: list[Param] = []
        self.batches: list[int] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = f"e{len(self.experiments)}"
        return self.experiments[name]

    def create_run(self, experiment: str, run_name: str) -> Any:
        run = f"r{len(self.runs)}"
        self.runs[run] = {"experiment": experiment, "name": run_name, "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def log_batch(self, run: str, metrics: list[Metric] = [], params: list[Param] = []) -> None:  # noqa: B006
        assert self.runs[run]["status"] == "RUNNING"
        self.metrics += metrics
        self.params += params
        self.batches.append(len(params))


class Mlflow(ModuleType):
    """Their module, whose stores are known by their addresses."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = ModuleSpec("mlflow", None)
        self.stores: dict[str, Store] = {}
        self.refusal: Exception | None = None
        self.refused = ""
        """How the addresses that are refused begin."""

    def MlflowClient(self, tracking_uri: str) -> Store:  # noqa: N802  (their name)
        if self.refusal is not None and tracking_uri.startswith(self.refused):
            raise self.refusal
        return self.stores.setdefault(tracking_uri, Store())


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    module, entities = Mlflow(), ModuleType("mlflow.entities")
    vars(entities).update(Metric=Metric, Param=Param)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return module


async def fit(folder: Path, steps: int, logger: MLflowLogger) -> None:
    config = {"optimizer": {"lr": 1e-3}, "seed": 0}
    trainer = Trainer(
        network(), nn.MSELoss(), callbacks=[logger], run_dir=folder, log_every=2, seed=0, config=config, device="cpu"
    )
    await trainer.fit(Samples(80), Samples(16, seed=1), max_steps=steps, max_epochs=9, resume="auto")


async def test_a_fit_that_goes_on_continues_its_run_with_each_line_once(tmp_path: Path, mlflow: Mlflow) -> None:
    await fit(tmp_path / "run", 10, MLflowLogger())
    await fit(tmp_path / "run", 20, MLflowLogger())
    ((address, store),) = mlflow.stores.items()
    assert address == (tmp_path / "mlruns").as_uri()
    assert store.runs == {"r0": {"experiment": "e0", "name": "run", "status": "FINISHED"}}
    assert store.params == [Param("optimizer.lr", "0.001"), Param("seed", "0")]
    metrics = ("loss", "lr", "val_loss")
    told = [(row["step"], name, row[name]) for row in lines(tmp_path / "run") for name in metrics if name in row]
    assert [(metric.step, metric.key, metric.value) for metric in store.metrics] == told


async def test_what_was_sent_beyond_a_lost_checkpoint_is_not_again(tmp_path: Path, mlflow: Mlflow) -> None:
    for steps in (10, 14):
        await fit(tmp_path / "run", steps, MLflowLogger())
    (tmp_path / "run" / "checkpoints" / "step-000000014").rename(tmp_path / "lost")  # as if killed before its commit
    await fit(tmp_path / "run", 20, MLflowLogger())
    (store,) = mlflow.stores.values()
    assert [metric.step for metric in store.metrics if metric.key == "loss"] == list(range(2, 21, 2))


async def test_a_fresh_start_is_another_run_of_the_experiment(tmp_path: Path, mlflow: Mlflow) -> None:
    logger = MLflowLogger("rain", uri="http://server", name="named")
    await fit(tmp_path / "a", 2, logger)
    await fit(tmp_path / "b", 2, logger)
    runs = mlflow.stores["http://server"].runs.values()
    assert [(run["experiment"], run["name"]) for run in runs] == [("e0", "named")] * 2


async def test_without_an_address_that_of_the_environment_counts(
    tmp_path: Path, mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    await fit(tmp_path / "a", 2, MLflowLogger())
    await fit(tmp_path / "b", 2, MLflowLogger(uri="http://other"))
    assert [*mlflow.stores] == ["http://server", "http://other"]


@pytest.mark.parametrize(
    ("reason", "status"), [("completed", "FINISHED"), ("failed", "FAILED"), ("signal", "KILLED"), ("stopped", "KILLED")]
)
def test_how_a_run_ended_is_told(mlflow: Mlflow, reason: str, status: str) -> None:
    logger = MLflowLogger(uri="u")
    logger.on_train_begin(TrainBegin())
    logger.on_train_end(TrainEnd(reason=reason))
    assert mlflow.stores["u"].runs["r0"]["status"] == status


def test_names_and_sizes_are_what_theirs_take(mlflow: Mlflow) -> None:
    logger = MLflowLogger(uri="u")
    config = {f"p{number}": "x" * 1000 for number in range(150)} | {"wörld[0]": 1}
    logger.on_train_begin(TrainBegin(config=config))
    logger.on_log(Log(step=1, values={"val_top@5": 1.0}))
    logger.on_log(Log(step=1, split="resource", values={"cpu": 1.0}))
    store = mlflow.stores["u"]
    assert [metric.key for metric in store.metrics] == ["val_top_5", "resource/cpu"]
    assert store.params[-1].key == "wörld_0_"
    assert max(len(param.value) for param in store.params) == 500
    assert max(store.batches) <= 100


async def test_where_no_folder_is_taken_the_run_is_in_a_database_beside(
    tmp_path: Path, mlflow: Mlflow, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mlflow.refusal, mlflow.refused = RuntimeError("folders are refused"), "file:"
    for steps in (10, 20):
        await fit(tmp_path / "run", steps, MLflowLogger())
    ((address, store),) = mlflow.stores.items()
    assert address == f"sqlite:///{tmp_path}/mlflow.db"
    assert [metric.step for metric in store.metrics if metric.key == "loss"] == list(range(2, 21, 2))
    assert [*store.runs] == ["r0"]
    assert "mlflow takes no folder: the run goes to sqlite:///" in caplog.text


def test_a_store_that_refuses_is_an_error_with_what_to_do(mlflow: Mlflow) -> None:
    mlflow.refusal = RuntimeError("The filesystem tracking backend is in maintenance mode\nmore")
    with pytest.raises(EnvironmentProblem, match=r"mlflow begins no run: .*maintenance mode$") as caught:
        MLflowLogger(uri="file:x").on_train_begin(TrainBegin())
    assert "MLFLOW_ALLOW_FILE_STORE=true" in caught.value.hint


async def test_without_an_address_it_needs_a_folder(mlflow: Mlflow) -> None:
    with pytest.raises(ConfigError, match="MLflowLogger needs a run_dir"):
        await Trainer(network(), nn.MSELoss(), callbacks=[MLflowLogger()]).fit(Samples(80))


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="MLflowLogger needs the package mlflow"):
        MLflowLogger()
