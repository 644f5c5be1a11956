"""From what was said of a run to its one resolved configuration, checked before anything is built.

Its law: one resolved configuration, however it was said; and each complaint names the place where it was said
(the flag, or file:line:column), what the value must be, and what it was. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from streamtrain.config_tables import Config, DataOnly, DataTable, Must
from streamtrain.errors import ConfigError
from streamtrain.said import SHORT, KeyPath, Said
from streamtrain.spelling import nearest, precision_meant, shown


def resolve(said: Said) -> Config:
    """Check all that was said; ConfigError names the place, what it must be, and what it was."""
    tables = dict(said.tables)
    for name, key in SHORT.items():
        if isinstance(tables.get(name), str):
            tables[name] = {key: tables[name]}
    _fold_lr(tables, said)
    if isinstance(tables.get("data"), dict):
        tables["data"] = _listed(tables["data"])
    if isinstance(tables.get("metrics"), dict):
        tables["metrics"] = {name: _named(value) for name, value in tables["metrics"].items()}
    if isinstance(tables.get("loss"), dict):
        tables["loss"] = _named(tables["loss"])
    if isinstance(tables.get("validation"), dict) and isinstance(tables.get("data"), dict):
        tables["validation"] = _inherit(tables["data"], tables["validation"])
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        raise _explain(error, said) from None


def resolve_data(said: Said) -> DataTable:
    """Check what was said of a stream alone."""
    try:
        return DataOnly.model_validate({**said.tables, "data": _listed(said.tables["data"])}).data
    except ValidationError as error:
        raise _explain(error, said) from None


def _fold_lr(tables: dict[str, Any], said: Said) -> None:
    trainer, optimizer = tables.get("trainer"), tables.get("optimizer", {})
    if not (isinstance(trainer, dict) and "lr" in trainer and isinstance(optimizer, dict)):
        return
    if "lr" in optimizer and optimizer["lr"] != trainer["lr"]:
        raise ConfigError(
            f"{said.where(('trainer', 'lr'))}: trainer.lr is {trainer['lr']}, but optimizer.lr is {optimizer['lr']}",
            hint="Keep one of them.",
        )
    tables["optimizer"] = {**optimizer, "lr": trainer["lr"]}
    tables["trainer"] = {key: value for key, value in trainer.items() if key != "lr"}
    said.origins.setdefault(("optimizer", "lr"), said.where(("trainer", "lr")))


def _listed(data: dict[str, Any]) -> dict[str, Any]:
    axes = data.get("sample_axes")
    return {**data, "sample_axes": [axes]} if isinstance(axes, int) and not isinstance(axes, bool) else data


def _named(value: object) -> object:
    """A thing that may be said as its name alone, or a table of such for several outputs."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and "name" not in value:
        return {key: {"name": part} if isinstance(part, str) else part for key, part in value.items()}
    return value


NOT_INHERITED = ("shuffle", "drop_last", "weights", "balance", "crop_at", "jitter")
"""A validation measures: each sample once, in order, the same each time, unless told otherwise."""


def _inherit(data: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    inherited = {key: value for key, value in data.items() if key not in NOT_INHERITED}
    if "store" in own:
        inherited.pop("split", None)
        inherited.pop("indices", None)
    cropped = {**inherited, **own}.get("crop") is not None
    return {**({"crop_at": "center"} if cropped else {}), **inherited, **_listed(own)}


def _explain(error: ValidationError, said: Said) -> ConfigError:
    first = error.errors()[0]
    path, must, known = _field(first["loc"])
    name = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{_at(said, path)}unknown key {name}", hint=_nearest(str(path[-1]), known))
    if first["type"] == "missing":
        return ConfigError(f"{_at(said, path)}{name} is missing", hint=_how_to_give(path))
    got: Any = said.tables
    for part in path:
        if (isinstance(got, dict) and part in got) or (isinstance(got, list) and isinstance(part, int)):
            got = got[part]  # type: ignore[index]
        else:
            got = first["input"]
    hint = precision_meant(got) if path == ("trainer", "precision") else HINT
    return ConfigError(f"{_at(said, path)}{name} must be {must or _plain(first['type'])}, got {shown(got)}", hint=hint)


HINT = "`--help` after the command lists its options; the README lists the keys of each table."


def _nearest(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = nearest(word, names)
    return f"Did you mean {close}?" if close else f"Known here: {', '.join(names)}."


def _at(said: Said, path: KeyPath) -> str:
    where = said.where(path)
    return f"{where}: " if where else ""


def _field(loc: tuple[int | str, ...]) -> tuple[KeyPath, str, list[str]]:
    """The key that an error's location means, what its value must be, and the keys known beside it."""
    if loc[0] in ("metrics", "callbacks", "loss") and len(loc) > 1:
        depth = {"metrics": 2, "callbacks": 2, "loss": 1}[loc[0]]
        several = loc[depth : depth + 1] == ("several",)
        loc = tuple(part for at, part in enumerate(loc) if at != depth or part not in ("one", "several"))
        depth += several
        whole = "a table with a name" if loc[0] == "callbacks" else "a name, or a table with a name"
        return tuple(loc[: depth + 1]), "a text that is not empty" if len(loc) > depth else whole, ["name"]
    model: type[BaseModel] | None = Config
    path: list[str | int] = []
    must, known = "", list(Config.model_fields)
    for part in loc:
        if model is None:
            break
        known = list(model.model_fields)
        path.append(part)
        info = model.model_fields.get(str(part))
        if info is None:
            return tuple(path), "", known
        must = next((item.be for item in info.metadata if isinstance(item, Must)), "") or _must(info.annotation)
        model = _table_of(info.annotation)
    return tuple(path), must or ("a table" if model else ""), known


def _table_of(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _must(annotation: Any) -> str:
    for item in _metadata(annotation):
        if isinstance(item, Must):
            return item.be
    return ""


def _metadata(annotation: Any) -> Iterator[object]:
    yield from getattr(annotation, "__metadata__", ())
    for option in getattr(annotation, "__args__", ()):
        yield from _metadata(option)


def _plain(kind: str) -> str:
    return {"dict_type": "a table", "model_type": "a table", "list_type": "a list"}.get(kind, "another kind of value")


def _how_to_give(path: KeyPath) -> str:
    flags = {"data": "--data", "store": "--data", "model": "--model", "target": "--model"}
    key = ".".join(map(str, path))
    flag = flags.get(str(path[-1]))
    table = f"[{path[0]}] in the configuration"
    return f"Give {flag}, or {table}." if flag else f"Give {key} as --set {key}=..., or in {table}."


MAY_CHANGE = frozenset(
    {f"data.{key}" for key in ("memory", "cache", "io", "threads", "prefetch", "read_timeout", "batch_size")}
    | {"data.retries", "data.storage_options"}
    | {"data.transform_workers", "data.cache_transform", "data.disk_cache", "data.disk_cache_bytes"}
    | {
        f"trainer.{key}"
        for key in ("run_dir", "grace", "watchdog", "log_every", "validate_every", "sanity_batches", "device")
    }
    | {"trainer.nonfinite", "data.store", "model.weights", "model.partial"}
    | {"fit.max_epochs", "fit.max_steps", "fit.max_time", "fit.resume", "fit.allow_data_change", "optimizer.lr"}
)
"""Keys that a run may change in the course of its life; a store that moved is known again by its fingerprint."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for what a run must not change in the course of its life."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    same = {key for key in before.keys() & after.keys() if before[key] == after[key]}
    return [
        f"{key}: {shown(before[key]) if key in before else 'unset'} -> {shown(after[key]) if key in after else 'unset'}"
        for key in sorted((before.keys() | after.keys()) - same)
        if key.replace("validation.", "data.") not in MAY_CHANGE and not key.startswith("callbacks")
    ]


def _leaves(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
