"""From a resolved configuration to live objects: models, losses, metrics, callbacks and streams by name.

Its law: a name that leads nowhere is the user's mistake and is named, with what was found instead; what user code
raises while it is being built is said to come from there.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from streamtrain.callbacks.base import HOOKS, hooks_of
from streamtrain.config_tables import Config, DataTable, Named
from streamtrain.errors import ConfigError, StreamtrainError, UserCodeError
from streamtrain.said import Said
from streamtrain.spelling import nearest, shown

if TYPE_CHECKING:
    from torch import nn

    from streamtrain.data.stream import ZarrStream
    from streamtrain.trainer import Trainer

CALLBACKS = {
    "EarlyStopping": "streamtrain.early_stopping",
    "ModelCheckpoint": "streamtrain.callbacks.model_checkpoint",
    "ProgressBar": "streamtrain.callbacks.progress_bar",
    "CSVLogger": "streamtrain.callbacks.csv_logger",
    "JSONLogger": "streamtrain.callbacks.json_logger",
    "TensorBoard": "streamtrain.callbacks.tensorboard",
    "LearningRateMonitor": "streamtrain.callbacks.lr_monitor",
    "ResourceMonitor": "streamtrain.callbacks.resource_monitor",
    "Plots": "streamtrain.callbacks.plots",
    "Profiler": "streamtrain.callbacks.profiler",
    "RemoteLogger": "streamtrain.callbacks.remote_logger",
    "WandbLogger": "streamtrain.callbacks.wandb_logger",
    "MLflowLogger": "streamtrain.callbacks.mlflow_logger",
}


@dataclass(frozen=True, slots=True)
class Job:
    """What a configuration comes to."""

    trainer: Trainer
    train: ZarrStream
    validation: ZarrStream | None
    limits: dict[str, Any]
    """The keywords of `fit`."""


def make_importable(folder: str) -> None:
    """Let user code lie in this folder, as under `python -m`."""
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)


def build(config: Config, said: Said, *, callbacks: tuple[object, ...] = ()) -> Job:
    """Import, make and check all that the configuration names; nothing is written and no data is read.

    Raises ConfigError (exit 2) for names and arguments that cannot work, UserCodeError (exit 7) for what user code
    raised, EnvironmentProblem (exit 5) for a device that is not there.
    """
    make_importable(os.getcwd())
    if config.fit.max_time is not None:
        from streamtrain.options import duration

        duration(config.fit.max_time, f"{_where(said, ('fit', 'max_time'))}max_time")
    train = stream(config.data, said, "data")
    validation = None if config.validation is None else stream(config.validation, said, "validation")
    if config.trainer.seed is not None:
        import torch

        torch.manual_seed(config.trainer.seed)
    from streamtrain.trainer import Trainer

    given = config.trainer.model_dump(include=config.trainer.model_fields_set)
    for name in ("step", "device_transform"):
        if given.get(name) is not None:
            given[name] = _function(given[name], said, ("trainer", name))
    made: dict[str, Any] = {
        "model": model(config, said),
        "loss": loss(config.loss, said),
        "optimizer": optimizer(config, said),
        "lr": config.optimizer.lr,
        "scheduler": scheduler(config.scheduler, said),
        "metrics": metrics(config.metrics, said),
        "callbacks": [*(callback(c, said, i) for i, c in enumerate(config.callbacks or [])), *callbacks],
        "config": config.tables(),
    }
    try:
        trainer = Trainer(**made, **given)
    except ConfigError as error:
        raise ConfigError(f"{_where_meant(error, said)}{error}", hint=error.hint) from error
    return Job(trainer, train, validation, config.fit.model_dump(exclude_none=True))


def stream(table: DataTable, said: Said, name: str, *, output: Literal["torch", "numpy"] = "torch") -> ZarrStream:
    """The stream of `[data]` or `[validation]`; nothing is opened yet."""
    from streamtrain.data.stream import ZarrStream

    keywords = table.model_dump(exclude={"store"}, exclude_none=True)
    keywords["sample_axes"] = tuple(table.sample_axes)
    for key in ("window", "stride", "select", "crop", "jitter"):
        if isinstance(keywords.get(key), dict):
            keywords[key] = {int(k) if k.isdecimal() else k: places for k, places in keywords[key].items()}
    if table.split is not None:
        keywords["split"] = tuple(table.split)
    if table.transform is not None:
        keywords["transform"] = _function(table.transform, said, (name, "transform"))
    return ZarrStream(table.store, output=output, **keywords)


def model(config: Config, said: Said) -> nn.Module:
    """The Module that `[model]` names."""
    import torch

    where = _where(said, ("model", "target"))
    target = load(config.model.target, where)
    if isinstance(target, torch.nn.Module):
        made: object = target
    elif callable(target):
        made = call(target, config.model.args, said, ("model", "args"), config.model.target)
    else:
        made = target
    if not isinstance(made, torch.nn.Module):
        raise ConfigError(
            f"{where}{config.model.target} gave {shown(made)} of type {type(made).__name__}, not a torch.nn.Module",
            hint="Name a Module's class, a function that returns a Module, or a Module.",
        )
    if next(made.parameters(), None) is None:
        raise ConfigError(
            f"{where}{config.model.target} gave a {type(made).__name__} without parameters: nothing to train",
            hint="Check that its layers are attributes, or lie in an nn.ModuleList.",
        )
    return made


def loss(
    named: Named | Mapping[str, Named] | None, said: Said, path: tuple[Any, ...] = ("loss",)
) -> Callable[..., Any] | dict[str, Any] | None:
    """The loss that `[loss]` names, or one for each output."""
    if named is None:
        return None
    if isinstance(named, Mapping):
        return {output: loss(one, said, (*path, output)) for output, one in named.items()}
    if ":" in named.name:
        found: Callable[..., Any] = _function(named.name, said, (*path, "name"), named.arguments)
        return found
    from streamtrain.losses import LOSSES, short_loss

    name = _known(named.name, LOSSES, said, (*path, "name"), "loss")
    _check_arguments(LOSSES[name][1], named.arguments, said, path, name)
    return short_loss(name, named.arguments)


def optimizer(config: Config, said: Said) -> object:
    """What `[optimizer]` describes, for `build_optimizer`: a short name with keywords, or a callable."""
    named = config.optimizer
    tables = list(named.arguments.values())
    if tables and all(isinstance(table, dict) for table in tables):
        return named.arguments  # several, by name; "name" is the default of one
    if ":" in named.name:
        said_lr = {"lr": named.lr} if "lr" in named.model_fields_set else {}
        return {"name": load(named.name, _where(said, ("optimizer", "name"))), **said_lr, **named.arguments}
    return {"name": named.name, "lr": named.lr, **named.arguments}


def scheduler(named: Named | None, said: Said) -> object:
    """What `[scheduler]` describes, for `build_scheduler`; short names are tried on an optimizer of nothing."""
    if named is None:
        return None
    if ":" in named.name:
        return {"name": load(named.name, _where(said, ("scheduler", "name"))), **named.arguments}
    from torch import nn
    from torch.optim import SGD

    from streamtrain.schedulers import build_scheduler

    spec = {"name": named.name, **named.arguments}
    try:
        trial = SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        totals = {"total_steps": 1 << 40, "total_epochs": 1 << 20, "total_samples": 1 << 50, "total_seconds": 1e9}
        build_scheduler(trial, spec, **totals, steps_per_epoch=1 << 20, samples_per_epoch=1 << 30)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{_where(said, ('scheduler',))}{error}", hint=error.hint) from error
    return spec


def metrics(tables: Mapping[str, Named | Mapping[str, Named]], said: Said) -> dict[str, Any]:
    """The metrics of `[metrics]`, those of one output in a dict of their own."""
    return {
        name: {key: metric(one, said, name, key) for key, one in named.items()}
        if isinstance(named, Mapping)
        else metric(named, said, name)
        for name, named in tables.items()
    }


def metric(named: Named, said: Said, *keys: str) -> object:
    """A metric that `[metrics]` names: an object, or a function averaged over samples."""
    path = ("metrics", *keys)
    if ":" in named.name:
        return _function(named.name, said, path, named.arguments)
    from streamtrain.metrics import SHORT

    return call(SHORT[_known(named.name, SHORT, said, path, "metric")], named.arguments, said, path, named.name)


def callback(named: Named, said: Said, number: int) -> object:
    """A callback that a `[[callbacks]]` table names."""
    path = ("callbacks", number)
    if ":" in named.name:
        target: Any = load(named.name, _where(said, (*path, "name")))
        made = call(target, named.arguments, said, path, named.name) if callable(target) else target
    else:
        name = _known(named.name, CALLBACKS, said, (*path, "name"), "callback")
        target = getattr(importlib.import_module(CALLBACKS[name]), name)
        made = call(target, named.arguments, said, path, name)
    if not hooks_of(made):
        raise ConfigError(
            f"{_where(said, (*path, 'name'))}{named.name} gave a {type(made).__name__}, which has none of the hooks",
            hint=f"A callback has some of {', '.join(HOOKS)}.",
        )
    return made


def load(target: str, where: str = "") -> object:
    """What `pkg.mod:Name` names; ConfigError names the module or attribute that failed, and why."""
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{where}there is no module {error.name} (for {target})",
                hint=f"Modules are looked for in {os.getcwd()} and where Python finds packages.",
            ) from error
        raise _import_failed(where, target, module_name, error) from error
    except StreamtrainError:
        raise
    except (Exception, SystemExit) as error:
        raise _import_failed(where, target, module_name, error) from error
    found: object = module
    done: list[str] = []
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                f"{where}module {module_name} has no {attribute}", hint=_instead(found, done, part, target)
            )
        found = getattr(found, part)
        done.append(part)
    return found


def _instead(found: object, done: list[str], part: str, target: str) -> str:
    """What to name in place of an attribute that `found` lacks: one like it, `found` itself, or one of its own."""
    module = target.partition(":")[0]
    public = [name for name in dir(found) if not name.startswith("_")]
    close = nearest(part, public)
    if close:
        return f"Did you mean {'.'.join([*done, close])}?"
    if done:
        return f"Name {'.'.join(done)} itself: {module}:{'.'.join(done)}."
    own = [name for name in public if getattr(getattr(found, name), "__module__", module) == module] or public
    return f"It has: {', '.join(own[:12]) or 'nothing public'}."


def _import_failed(where: str, target: str, module: str, error: BaseException) -> ConfigError:
    text = error.msg if isinstance(error, SyntaxError) and error.filename else str(error)
    return ConfigError(
        f"{where}importing {module} (for {target}) failed: {type(error).__name__}: {text}{_line_of(error)}",
        hint=f'Try `python -c "import {module}"`, or --debug here for the traceback.',
    )


def call(target: Callable[..., Any], arguments: Mapping[str, Any], said: Said, path: tuple[Any, ...], name: str) -> Any:
    """`target(**arguments)`; ConfigError where they do not fit its signature, UserCodeError for what it raises."""
    _check_arguments(target, arguments, said, path, name)
    try:
        return target(**arguments)
    except StreamtrainError as error:
        raise type(error)(f"{_where(said, path)}{error}", hint=error.hint) from error
    except (Exception, SystemExit) as error:
        raise UserCodeError(
            f"{_where(said, path)}{name} raised {type(error).__name__}: {error}{_line_of(error)}",
            hint="--debug shows the traceback.",
        ) from error


def _check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], said: Said, path: tuple[Any, ...], name: str
) -> None:
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return
    known = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for key in arguments:
            if key not in known:
                close = nearest(key, known)
                raise ConfigError(
                    f"{_where(said, (*path, key))}unknown key {'.'.join(map(str, path))}.{key}: {name} takes no such "
                    "argument",
                    hint=f"Did you mean {close}?" if close else f"It takes: {', '.join(known) or 'nothing'}.",
                )
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"{_where(said, path)}{name} cannot be made: {error}",
            hint=f"Its arguments are {signature}; give them in [{path[0]}].",
        ) from error


def _function(target: str, said: Said, path: tuple[Any, ...], arguments: Mapping[str, Any] | None = None) -> Any:
    found: Any = load(target, _where(said, path))
    if isinstance(found, type):
        found = call(found, arguments or {}, said, path, target)
    elif arguments:
        found = functools.partial(found, **arguments)
    if not callable(found) and not hasattr(found, "update"):
        raise ConfigError(
            f"{_where(said, path)}{target} is {shown(found)}, which cannot be called",
            hint="Name a function or a class.",
        )
    return found


def _known(name: str, known: Mapping[str, object], said: Said, path: tuple[Any, ...], kind: str) -> str:
    spelled = {plain(each): each for each in known}
    if plain(name) in spelled:
        return spelled[plain(name)]
    close = nearest(name, known)
    raise ConfigError(
        f"{_where(said, path)}there is no {kind} {shown(name)}",
        hint=(f"Did you mean {close}? " if close else "") + f"Known: {', '.join(known)}, or pkg.mod:name.",
    )


def plain(name: str) -> str:
    """A name as it is compared: without case, - and _."""
    return name.replace("_", "").replace("-", "").lower()


def _where(said: Said, path: tuple[Any, ...]) -> str:
    where = said.where(path)
    return f"{where}: " if where else ""


def _where_meant(error: ConfigError, said: Said) -> str:
    """Where the key was said by which a message of the trainer begins: `device ...`, `optimizer.betas ...`."""
    words = re.match(r"(\w+(?:\.\w+)*)(?:: unknown (key|name) '?([^']*))?", str(error))
    if words is None:
        return ""
    keys = words[1].split(".")
    if keys[0] == "optimizer":
        more = {None: (), "key": (words[3],), "name": ("name",)}[words[2]]
        return _where(said, (*keys, *more))
    trainer = said.tables.get("trainer")
    return _where(said, ("trainer", keys[0])) if isinstance(trainer, Mapping) and keys[0] in trainer else ""


def _line_of(error: BaseException) -> str:
    """Where in the user's code it was raised; of what is no Python at all, the line that is not."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    here = os.path.dirname(__file__)
    theirs = [f for f in frames if not f.filename.startswith((here, "<frozen"))]
    return f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
