"""What a run's configuration may say, read from TOML, `--set` and flags, and checked before anything is built.

Its law: one resolved configuration, however it was said; and each complaint names the place where it was said
(the flag, or file:line:column), what the value must be, and what it was. No torch here.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from streamtrain import toml_text
from streamtrain.errors import ConfigError
from streamtrain.spelling import nearest, shown

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Must:
    """What a value must be, in words, for the error message."""

    be: str


Count = Annotated[int, Field(ge=1), Must("an integer of at least 1")]
Threads = Annotated[int, Field(ge=1, le=256), Must("an integer from 1 to 256")]
Natural = Annotated[int, Field(ge=0), Must("an integer of at least 0")]
Seed = Annotated[int, Field(ge=0, lt=1 << 63), Must("an integer of at least 0 and below 2^63")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), Must("a finite number of seconds of at least 0")]
Timeout = Annotated[float, Field(gt=0, le=1e9), Must("a number of seconds above 0 and up to 1e9")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Must("a finite number above 0")]
Text = Annotated[str, Field(min_length=1), Must("a text that is not empty")]
Names = Annotated[Text | list[Text], Must("a name or a list of names")]
Target = Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$"), Must('of the form "pkg.mod:Name"')]
Bytes = Annotated[Annotated[int, Field(ge=1)] | Text, Must('bytes, such as "1GiB" or 1073741824')]
Duration = Annotated[
    Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, allow_inf_nan=False)] | Text,
    Must('a time above 0, such as "2h" or 90 (seconds)'),
]
Every = Annotated[Text, Must('such as "1epoch" or "500steps"')]
Limit = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)],
    Must("a number of batches of at least 1, or a share above 0.0 and up to 1.0"),
]


Along = Annotated[
    Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]],
    Must("an integer of at least 1, or a table of them by axis, such as {time = 24}"),
]
Cropped = Annotated[dict[str, Annotated[int, Field(ge=1)]], Must("a table of places by axis, such as {lat = 64}")]
Value = int | float | Text
Places = Annotated[
    dict[str, Value | Annotated[list[Value], Field(min_length=1)] | dict[Literal["start", "stop", "step"], Value]],
    Must('a table of places by axis, such as {level = [0, 3]}, or values: {time = {start = "2000", stop = "2010"}}'),
]
Numbers = Annotated[Text | list[int], Must("a list of sample numbers, or the name of a boolean array")]
Weights = Annotated[
    Text | list[Annotated[float, Field(allow_inf_nan=False)]], Must("a list of numbers, or the name of an array")
]


class Table(BaseModel):
    """A table whose keys are these and no others."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Named(BaseModel):
    """A thing by name; all other keys are its arguments and are checked against its signature when it is built."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, use_attribute_docstrings=True)

    name: Text
    """A short name, or `pkg.mod:name`."""

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _one_or_several(given: object) -> str:
    """Whether a table is a thing by name, or has one for each of a model's outputs."""
    return "several" if isinstance(given, dict) and "name" not in given else "one"


OneOrSeveral = Annotated[
    Annotated[Named, Tag("one")] | Annotated[dict[str, Named], Field(min_length=1), Tag("several")],
    Discriminator(_one_or_several),
]
"""A thing by name, or one for each of a model's outputs by the output's name."""


class DataTable(Table):
    """`[data]`, `[validation]`: the keywords of ZarrStream."""

    store: Annotated[str | list[Text], Must("a path, URL or glob, or a list of them")]
    inputs: Names | None = None
    targets: Names | None = None
    batch_size: Count = 256
    shuffle: Annotated[bool | Literal["block", "global"], Must('false, true, "block" or "global"')] = False
    seed: Seed = 0
    drop_last: Annotated[bool, Must("true or false")] = False
    shuffle_blocks: Count | None = None
    split: (
        Annotated[
            Annotated[list[float], Field(min_length=2, max_length=2)]
            | Annotated[list[int], Field(min_length=2, max_length=2)],
            Must("two shares such as [0.0, 0.9], or two sample numbers"),
        ]
        | None
    ) = None
    split_by: Annotated[Literal["range", "chunk", "sample"], Must('"range", "chunk" or "sample"')] = "range"
    split_seed: Seed = 0
    sample_axes: Annotated[list[int], Field(min_length=1), Must("a list of axis numbers such as [0]")] = Field(
        default=[0]
    )
    dtype: Annotated[Text | dict[str, Text], Must("a numpy dtype, or a table of them by array")] | None = None
    decode_cf: Annotated[bool | Literal["auto"], Must('"auto" or false')] = "auto"
    normalize: (
        Annotated[
            Literal["stats"] | dict[str, Annotated[list[Any], Field(min_length=2, max_length=3)]],
            Must('"stats", or a table by array of [mean, std] or [mean, std, axis]'),
        ]
        | None
    ) = None
    window: Along | None = None
    stride: Along | None = None
    horizon: Natural | None = None
    target_window: Count | None = None
    select: Places | None = None
    crop: Cropped | None = None
    crop_at: Annotated[Literal["random", "center"], Must('"random" or "center"')] | None = None
    """None: random in `[data]`, center in `[validation]`."""
    jitter: Annotated[Natural | dict[str, Natural], Must("0 or more, or a table of that by axis")] | None = None
    ragged: (
        Annotated[
            dict[str, Text],
            Field(min_length=1),
            Must('a table of arrays and those of their offsets, such as {tokens = "ends"}'),
        ]
        | None
    ) = None
    max_length: Count | None = None
    pad_value: Annotated[int | float, Must("a number")] | None = None
    sparse: Annotated[bool, Must("true or false")] = False
    stack: Annotated[bool, Must("true or false")] = False
    groups: Text | None = None
    indices: Numbers | None = None
    weights: Weights | None = None
    balance: Text | None = None
    transform: Target | None = None
    transform_workers: Annotated[Threads | Text, Must('a number from 1 to 256, "thread:N" or "process:N"')] | None = (
        None
    )
    cache_transform: Annotated[bool, Must("true or false")] | None = None
    memory: Bytes = "1GiB"
    cache: Bytes | Natural = "auto"
    disk_cache: Annotated[Text | Natural, Must('a folder, or a size such as "50GiB"')] | None = None
    disk_cache_bytes: Bytes | Natural | None = None
    io: Annotated[Literal["auto", "mmap", "pread", "store"], Must('"auto", "mmap", "pread" or "store"')] = "auto"
    threads: Threads | None = None
    prefetch: Count | None = None
    read_timeout: Timeout = 60.0
    retries: Natural = 3
    storage_options: Annotated[dict[str, Text | bool | int], Must("a table of strings")] | None = None
    verify: Annotated[Literal["once", "always", "never"], Must('"once", "always" or "never"')] = "once"
    on_bad_chunk: Annotated[Literal["raise", "skip"], Must('"raise" or "skip"')] = "raise"
    max_skipped: Annotated[float, Field(ge=0, le=1), Must("a share from 0 to 1")] = 0.05


class ModelTable(Table):
    """`[model]`."""

    target: Target
    """`pkg.mod:Name` of a torch Module's class, of a function that returns one, or of a Module."""
    args: Annotated[dict[str, Any], Must("a table of keyword arguments")] = Field(default_factory=dict)
    weights: Text | None = None
    """A checkpoint, or a run's folder, with whose weights a fresh run begins."""
    partial: Annotated[bool, Must("true or false")] = False
    """Take of these what fits."""


class OptimizerTable(Named):
    """`[optimizer]`: a name, a learning rate, and the optimizer's own keywords."""

    name: Text = "adamw"
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False), Must("a finite number of at least 0")] = 1e-3


class TrainerTable(Table):
    """`[trainer]`: the keywords of Trainer that are not tables of their own."""

    run_dir: Text | None = None
    step: Target | None = None
    precision: Annotated[Literal["32", "bf16", "16"], Must('"32", "bf16" or "16"')] = "32"
    accumulate_grad_batches: Count = 1
    loss_weights: Annotated[
        dict[str, Annotated[int | float, Field(allow_inf_nan=False)]], Must("a table of numbers by output")
    ] = Field(default_factory=dict)
    """Of losses by output: what each counts in their sum, 1 where none is given."""
    gradient_clip_norm: Positive | None = None
    gradient_clip_value: Positive | None = None
    device: Text = "auto"
    device_transform: Target | None = None
    compile: (
        Annotated[
            bool | Text | dict[str, Any],
            Must('true, false, a mode such as "reduce-overhead", or a table of keywords'),
        ]
        | None
    ) = None
    gradient_checkpointing: Annotated[bool | Text, Must("true, false or a regex of names of modules")] | None = None
    ema: Annotated[float, Field(gt=0, lt=1), Must("a number above 0 and below 1, such as 0.999")] | None = None
    freeze: (
        Annotated[
            Text | list[Text] | dict[str, Text],
            Must('a regex, a list of them, or a table such as {"^backbone" = "2epochs"}'),
        ]
        | None
    ) = None
    seed: Seed | None = None
    deterministic: Annotated[bool, Must("true or false")] = False
    nonfinite: Annotated[Literal["raise", "skip", "rollback"], Must('"raise", "skip" or "rollback"')] = "raise"
    log_every: Count = 50
    validate_every: Every = "1epoch"
    fast_dev_run: Annotated[bool | Count, Must("true, false or a number of batches of at least 1")] = False
    limit_batches: Limit | None = None
    overfit_batches: Count | None = None
    sanity_batches: Natural = 2
    grace: Seconds = 25.0
    watchdog: Seconds = 300.0


class DataOnly(Table):
    """What `inspect` and `bench` are told."""

    data: DataTable


class FitTable(Table):
    """`[fit]`: the limits, as totals over the run's life, and where to go on from."""

    max_epochs: Count | None = None
    max_steps: Count | None = None
    max_time: Duration | None = None
    resume: Text | None = None
    """`auto`, `best` or the path of a checkpoint."""
    allow_data_change: Annotated[bool | None, Must("true or false")] = None
    """Go on though the data are others than those of the checkpoint."""


class Config(Table):
    """A whole configuration, resolved."""

    data: DataTable
    validation: DataTable | None = None
    """Inherits from `[data]` all but shuffle, drop_last, weights, balance and jitter (false or unset here), crop_at
    ("center" here), and split and indices where it names a store."""
    model: ModelTable
    loss: OneOrSeveral | None = None
    metrics: dict[str, OneOrSeveral] = Field(default_factory=dict)
    optimizer: OptimizerTable = Field(default_factory=OptimizerTable)
    scheduler: Named | None = None
    trainer: TrainerTable = Field(default_factory=TrainerTable)
    fit: FitTable = Field(default_factory=FitTable)
    callbacks: list[Named] | None = None
    """None: the defaults; each one named here replaces its default."""

    def dumps(self) -> str:
        """As TOML that gives this configuration again."""
        return toml_text.dumps({key: value for key, value in self.tables().items() if value not in (None, {})})

    def tables(self) -> dict[str, Any]:
        """As plain dicts, lists and scalars; what is None is left out."""
        return self.model_dump(mode="python", exclude_none=True)


@dataclass
class Said:
    """The tables as they were said, and where: a file first, then `--set` and flags, the last one wins."""

    tables: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    file: str = ""
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def assign(self, origin: str, key: str, value: object) -> None:
        """Set `a.b.c` (parts of a list by number); ConfigError where a part on the way holds no keys."""
        parts: list[str | int] = [int(part) if part.isdigit() else part for part in key.split(".")]
        if not all(part != "" for part in parts):
            raise ConfigError(f"{origin}: {key!r} is not a key", hint="Keys look like optimizer.lr.")
        at: Any = self.tables
        for depth, part in enumerate(parts[:-1]):
            if isinstance(part, str) and isinstance(at, dict):
                nested = at.setdefault(part, {})
                if isinstance(nested, str) and depth == 0 and part in SHORT:
                    nested = at[part] = {SHORT[part]: nested}
                at = nested
            elif isinstance(part, int) and isinstance(at, list) and part < len(at):
                at = at[part]
            else:
                at = None
            if not isinstance(at, dict | list):
                raise ConfigError(
                    f"{origin}: {'.'.join(map(str, parts[: depth + 1]))} holds no keys to set",
                    hint="Set a whole table as TOML, or a key inside a table: optimizer.lr=0.001.",
                )
        last = parts[-1]
        if isinstance(at, list) and not (isinstance(last, int) and last < len(at)):
            raise ConfigError(f"{origin}: {key} is not there to be set", hint=f"It has {len(at)} elements, from 0.")
        at[last] = value
        self.origins = {path: text for path, text in self.origins.items() if path[: len(parts)] != tuple(parts)}
        self.origins[tuple(parts)] = origin

    def where(self, path: KeyPath) -> str:
        """Where this key was said: a flag, `file:line:column`, or the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        found = toml_text.place(self.text, path) if self.text else None
        return f"{self.file}:{found[0]}:{found[1]}" if found else self.file


SHORT = {"model": "target", "loss": "name", "optimizer": "name", "scheduler": "name"}
"""Tables that may be said as one text, and the key that it stands for."""


def read(path: str) -> Said:
    """The tables of a TOML file; ConfigError with line and column where it is not one."""
    hint = "Give a TOML file; `streamtrain fit ... --print-config` prints one."
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{path} is a folder, not a configuration file", hint=hint)
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{path} is not a regular file", hint=hint)
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist", hint=_similar_file(path) or hint) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"configuration {path} cannot be read: {reason}", hint=hint) from error
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        byte = raw[error.start]
        raise ConfigError(f"{path}:{line}:{column}: not UTF-8 (byte 0x{byte:02x})", hint="Save it as UTF-8.") from None
    try:
        return Said(tomllib.loads(text), text, path)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep to be read", hint=hint) from None
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, str(error)) from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise ConfigError(f"{path}: {str(error).partition(';')[0]}", hint=hint) from None


def _syntax_error(path: str, text: str, message: str) -> ConfigError:
    match = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    line, column = (int(match[1]), int(match[2])) if match else (text.count("\n") + 1, 1)
    what = message[: match.start()] if match else message.removesuffix(" (at end of document)") + " at the end"
    lines = text.splitlines()
    shown = lines[line - 1].strip()[:60] if line <= len(lines) else ""
    return ConfigError(
        f"{path}:{line}:{column}: not TOML: {what[:1].lower()}{what[1:]}",
        hint=f"The line is: {shown}" if shown else "The file ends too early.",
    )


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
    return ConfigError(f"{_at(said, path)}{name} must be {must or _plain(first['type'])}, got {shown(got)}", hint=HINT)


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


def _similar_file(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        close = difflib.get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.6)
    except OSError:
        return ""
    return f"Did you mean {os.path.join(folder, close[0])}?" if close else ""


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
