"""An asyncio streaming trainer for data that does not fit in memory.

The public names, each resolved on first use, so that `import streamtrain` and `--help` load no torch, numpy or zarr.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamtrain.callbacks.base import Callback as Callback
    from streamtrain.callbacks.csv_logger import CSVLogger as CSVLogger
    from streamtrain.callbacks.json_logger import JSONLogger as JSONLogger
    from streamtrain.callbacks.lr_monitor import LearningRateMonitor as LearningRateMonitor
    from streamtrain.callbacks.mlflow_logger import MLflowLogger as MLflowLogger
    from streamtrain.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from streamtrain.callbacks.plots import Plots as Plots
    from streamtrain.callbacks.profiler import Profiler as Profiler
    from streamtrain.callbacks.progress_bar import ProgressBar as ProgressBar
    from streamtrain.callbacks.remote_logger import RemoteLogger as RemoteLogger
    from streamtrain.callbacks.resource_monitor import ResourceMonitor as ResourceMonitor
    from streamtrain.callbacks.tensorboard import TensorBoard as TensorBoard
    from streamtrain.callbacks.wandb_logger import WandbLogger as WandbLogger
    from streamtrain.data.batch import Batch as Batch
    from streamtrain.data.budget import Budget as Budget
    from streamtrain.data.iterable import from_iterable as from_iterable
    from streamtrain.data.mix import mix as mix
    from streamtrain.data.stream import ZarrStream as ZarrStream
    from streamtrain.early_stopping import EarlyStopping as EarlyStopping
    from streamtrain.errors import CheckpointError as CheckpointError
    from streamtrain.errors import ConfigError as ConfigError
    from streamtrain.errors import DataError as DataError
    from streamtrain.errors import EnvironmentProblem as EnvironmentProblem
    from streamtrain.errors import NonFiniteError as NonFiniteError
    from streamtrain.errors import StreamtrainError as StreamtrainError
    from streamtrain.errors import UserCodeError as UserCodeError
    from streamtrain.events import Verdict as Verdict
    from streamtrain.optimizers import build_optimizer as build_optimizer
    from streamtrain.progress import Best as Best
    from streamtrain.progress import FitResult as FitResult
    from streamtrain.schedulers import build_scheduler as build_scheduler
    from streamtrain.schedules import Scheduler as Scheduler
    from streamtrain.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {
    "Batch": "data.batch",
    "Best": "progress",
    "Budget": "data.budget",
    "CSVLogger": "callbacks.csv_logger",
    "Callback": "callbacks.base",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "EarlyStopping": "early_stopping",
    "EnvironmentProblem": "errors",
    "FitResult": "progress",
    "JSONLogger": "callbacks.json_logger",
    "LearningRateMonitor": "callbacks.lr_monitor",
    "MLflowLogger": "callbacks.mlflow_logger",
    "ModelCheckpoint": "callbacks.model_checkpoint",
    "NonFiniteError": "errors",
    "Plots": "callbacks.plots",
    "Profiler": "callbacks.profiler",
    "ProgressBar": "callbacks.progress_bar",
    "RemoteLogger": "callbacks.remote_logger",
    "ResourceMonitor": "callbacks.resource_monitor",
    "Scheduler": "schedules",
    "StreamtrainError": "errors",
    "TensorBoard": "callbacks.tensorboard",
    "Trainer": "trainer",
    "UserCodeError": "errors",
    "Verdict": "events",
    "WandbLogger": "callbacks.wandb_logger",
    "ZarrStream": "data.stream",
    "build_optimizer": "optimizers",
    "build_scheduler": "schedulers",
    "from_iterable": "data.iterable",
    "mix": "data.mix",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'streamtrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"streamtrain.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
