"""The flags of `fit`: one row each, naming the key of the configuration that it sets.

Its law: a flag is a way to write a key, never a second place where values are checked.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

SHUFFLES = ("block", "global", "true", "false")
_ASSIGNMENT = re.compile(r"[A-Za-z0-9_.]+=")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of the command line and the key that it sets."""

    name: str
    """As typed, `--batch-size`."""
    keys: tuple[str, ...]
    """The keys that it sets, `data.batch_size`; nearly always one."""
    help: str
    kind: Literal["text", "value", "names", "bool"] = "value"
    """text: taken as it is; value: as TOML, else as it is; names: `a,b` or repeated; bool: `--x` and `--no-x`."""
    also: str = ""
    """Another name of the same."""

    @property
    def field(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


_STORE = [
    Flag("--data", ("data.store",), "path, URL or glob of the Zarr store", "text", "--store"),
]
_STREAM = [
    Flag("--inputs", ("data.inputs",), "array of the inputs; a,b or repeated for several", "names"),
    Flag("--targets", ("data.targets",), "array of the targets", "names"),
    Flag("--batch-size", ("data.batch_size",), "samples in a batch, over all ranks"),
    Flag("--shuffle", ("data.shuffle",), "block, global, true or false; alone: block"),
    Flag("--shuffle-blocks", ("data.shuffle_blocks",), "cells permuted together"),
    Flag("--drop-last", ("data.drop_last",), "leave out a partial last batch", "bool"),
    Flag("--split", ("data.split",), "which samples: 0.0,0.9 (shares) or 0,1000 (numbers)"),
    Flag("--split-by", ("data.split_by",), "range, chunk or sample", "text"),
    Flag("--split-seed", ("data.split_seed",), "seed of that split"),
    Flag("--sample-axes", ("data.sample_axes",), "axes that number the samples: 0 or 0,1"),
    Flag("--window", ("data.window",), "places that a sample covers: 24 or '{time = 24, lat = 8}'"),
    Flag("--stride", ("data.stride",), "places from one sample to the next, likewise"),
    Flag("--horizon", ("data.horizon",), "places from a window's last one to the first of its target"),
    Flag("--target-window", ("data.target_window",), "places of that target"),
    Flag("--select", ("data.select",), "places or values of an axis: '{lat = {start = 60, stop = 30}}'"),
    Flag("--crop", ("data.crop",), "places in a row taken of some axes of a sample: '{lat = 64, lon = 64}'"),
    Flag("--crop-at", ("data.crop_at",), "random or center", "text"),
    Flag("--jitter", ("data.jitter",), "by how many places at most windows begin later"),
    Flag("--ragged", ("data.ragged",), "rows of different lengths, and their offsets: '{tokens = \"ends\"}'"),
    Flag("--max-length", ("data.max_length",), "elements that are taken of such a row at most"),
    Flag("--pad-value", ("data.pad_value",), "what lies behind its last element"),
    Flag("--sparse", ("data.sparse",), "give sparse rows as they are", "bool"),
    Flag("--stack", ("data.stack",), "make the inputs channels of one array", "bool"),
    Flag("--groups", ("data.groups",), "array whose equal values a split keeps together", "text"),
    Flag("--indices", ("data.indices",), "sample numbers, or the name of a boolean array"),
    Flag("--weights", ("data.weights",), "array of how often each sample comes, or the numbers"),
    Flag("--balance", ("data.balance",), "array of labels that come equally often", "text"),
    Flag("--dtype", ("data.dtype",), "cast to this while gathering", "text"),
    Flag("--decode-cf", ("data.decode_cf",), "auto, or false: leave scale_factor and fill values alone"),
    Flag("--normalize", ("data.normalize",), "stats: by the store's own; or {name = [mean, std]}"),
    Flag("--transform", ("data.transform",), "pkg.mod:function, called with each batch of numpy arrays", "text"),
    Flag("--transform-workers", ("data.transform_workers",), "how many at once: 4, thread:4 or process:4"),
    Flag("--cache-transform", ("data.cache_transform",), "keep what it makes, of shuffled data too", "bool"),
    Flag("--memory", ("data.memory",), "budget of the stream: 1GiB"),
    Flag("--cache", ("data.cache",), "auto, or how much of it keeps decoded chunks"),
    Flag("--disk-cache", ("data.disk_cache",), "folder for decoded chunks, or a size such as 20GiB"),
    Flag("--disk-cache-bytes", ("data.disk_cache_bytes",), "how much it may hold: 50GiB"),
    Flag("--io", ("data.io",), "auto, mmap, pread or store", "text"),
    Flag("--threads", ("data.threads",), "threads that read and decode"),
    Flag("--prefetch", ("data.prefetch",), "batches made ahead"),
    Flag("--read-timeout", ("data.read_timeout",), "seconds until a read counts as hung"),
    Flag("--retries", ("data.retries",), "how often a failed request to a remote store is made again"),
    Flag("--storage-options", ("data.storage_options",), "settings of a URL's store: '{region = \"eu-west-1\"}'"),
    Flag("--verify", ("data.verify",), "check chunks against their manifest: once, always or never", "text"),
    Flag("--on-bad-chunk", ("data.on_bad_chunk",), "raise, or skip its rows", "text"),
    Flag("--max-skipped", ("data.max_skipped",), "share of an epoch's samples that may be skipped"),
]
_VALIDATION = [
    Flag("--validation-data", ("validation.store",), "store to validate on; --data by default", "text"),
    Flag("--validation-split", ("validation.split",), "samples to validate on: 0.9,1.0"),
]
_MODEL = [
    Flag("--model", ("model.target",), "pkg.mod:Name of a Module, or of what makes one", "text"),
    Flag("--model-weights", ("model.weights",), "checkpoint or run with whose weights a fresh run begins", "text"),
    Flag("--partial-weights", ("model.partial",), "take of these what fits", "bool"),
    Flag("--loss", ("loss.name",), "mse, mae, cross_entropy, bce, huber or pkg.mod:name", "text"),
    Flag("--metrics", ("metrics",), "accuracy, mae, f1, ... or name=pkg.mod:name; a,b or repeated", "names"),
    Flag("--optimizer", ("optimizer.name",), "adamw, sgd, muon, ..., or package.module.Class", "text"),
    Flag("--lr", ("optimizer.lr",), "learning rate"),
    Flag("--scheduler", ("scheduler.name",), "cosine, onecycle, wsd, ..., or package.module.Class", "text"),
]
_TRAINER = [
    Flag("--max-epochs", ("fit.max_epochs",), "passes over the data in the run's whole life"),
    Flag("--max-steps", ("fit.max_steps",), "updates in the run's whole life"),
    Flag("--max-time", ("fit.max_time",), "training time in the run's whole life: 90s, 2h"),
    Flag("--resume", ("fit.resume",), "auto, best or the path of a checkpoint", "text"),
    Flag("--allow-data-change", ("fit.allow_data_change",), "go on though the data have changed", "bool"),
    Flag("--run-dir", ("trainer.run_dir",), "the run's folder; runs/<name>-<time> by default", "text"),
    Flag("--grace", ("trainer.grace",), "seconds that saving may take after a signal"),
    Flag("--watchdog", ("trainer.watchdog",), "seconds until what does not come back is named; 0: never"),
    Flag("--step", ("trainer.step",), "pkg.mod:function of (model, batch) that gives the loss", "text"),
    Flag("--device-transform", ("trainer.device_transform",), "pkg.mod:function, called on the device", "text"),
    Flag("--device", ("trainer.device",), "auto, cpu, cuda, cuda:1, mps", "text"),
    Flag("--precision", ("trainer.precision",), "32, bf16 or 16", "text"),
    Flag("--seed", ("trainer.seed", "data.seed"), "seed of weights, dropout and the order"),
    Flag("--accumulate-grad-batches", ("trainer.accumulate_grad_batches",), "batches that make one update"),
    Flag("--loss-weights", ("trainer.loss_weights",), "of losses by output: '{kind = 0.1}'"),
    Flag("--gradient-clip-norm", ("trainer.gradient_clip_norm",), "clip the gradient to this norm"),
    Flag("--gradient-clip-value", ("trainer.gradient_clip_value",), "clip each gradient value to this"),
    Flag("--compile", ("trainer.compile",), "true, or a mode of torch.compile such as reduce-overhead"),
    Flag(
        "--gradient-checkpointing", ("trainer.gradient_checkpointing",), "true, or a regex of blocks to compute twice"
    ),
    Flag("--ema", ("trainer.ema",), "validate with a moving average of the weights, of this decay: 0.999"),
    Flag("--freeze", ("trainer.freeze",), 'regex of parameters to leave alone, or \'{"^backbone" = "2epochs"}\''),
    Flag("--deterministic", ("trainer.deterministic",), "only deterministic kernels", "bool"),
    Flag("--nonfinite", ("trainer.nonfinite",), "raise, skip or rollback", "text"),
    Flag("--log-every", ("trainer.log_every",), "steps between two lines of metrics.jsonl"),
    Flag("--validate-every", ("trainer.validate_every",), "1epoch, 500steps", "text"),
    Flag("--sanity-batches", ("trainer.sanity_batches",), "validation batches tried before training"),
    Flag("--limit-batches", ("trainer.limit_batches",), "batches of an epoch"),
    Flag("--overfit-batches", ("trainer.overfit_batches",), "train on these few batches only"),
    Flag("--fast-dev-run", ("trainer.fast_dev_run",), "a few batches of everything, nothing written", "bool"),
]

FLAGS: tuple[Flag, ...] = (*_STORE, *_STREAM, *_VALIDATION, *_MODEL, *_TRAINER)
STREAM_FLAGS: tuple[Flag, ...] = (*_STREAM, Flag("--seed", ("data.seed",), "seed of the order"))
"""Of `inspect` and `bench`: how a stream reads the store that they are given."""
RUN_FLAGS: tuple[Flag, ...] = (
    *_STORE,
    *_STREAM,
    *(flag for flag in _TRAINER if flag.name in ("--device", "--precision")),
)
"""Of `validate`, `evaluate` and `predict`: what a run's model is given, and where it runs."""


def _fields(*groups: tuple[str, Sequence[Flag]]) -> Iterator[tuple[str, Any, None]]:
    for title, flags in groups:
        group = Group(title)
        for flag in flags:
            hint: Any = {"bool": bool | None, "names": list[str] | None}.get(flag.kind, str | None)
            names = [flag.name, flag.also] if flag.also else [flag.name]
            negative = None if flag.kind == "bool" else ()
            parameter = Parameter(name=names, help=flag.help, group=group, negative=negative, show_default=False)
            yield flag.field, Annotated[hint, parameter], None


if TYPE_CHECKING:

    class Flags:
        """What was typed, by field name; None for what was not."""

    class StreamFlags:
        """What was typed of a stream's options alone."""

    class RunFlags:
        """What was typed of those of a command on a checkpoint."""

else:
    _GROUPS = ("Data", [*_STORE, *_STREAM, *_VALIDATION]), ("Model", _MODEL), ("Training", _TRAINER)
    Flags = make_dataclass("Flags", list(_fields(*_GROUPS)), frozen=True)
    StreamFlags = make_dataclass("StreamFlags", list(_fields(("Reading", STREAM_FLAGS))), frozen=True)
    RunFlags = make_dataclass("RunFlags", list(_fields(("Data", RUN_FLAGS))), frozen=True)
    Flags.__module__ = StreamFlags.__module__ = RunFlags.__module__ = __name__


def assignments(typed: Flags | StreamFlags | RunFlags | None) -> Iterator[tuple[str, str, object]]:
    """(flag, key, value) for each flag that was typed."""
    known = STREAM_FLAGS if isinstance(typed, StreamFlags) else RUN_FLAGS if isinstance(typed, RunFlags) else FLAGS
    for flag in known:
        given = getattr(typed, flag.field, None)
        if given is None:
            continue
        for key in flag.keys:
            yield flag.name, key, _metrics(given) if key == "metrics" else _value(flag, given)


def parse_value(text: str) -> object:
    """A value as TOML would read it; text that is no TOML value is taken as it is."""
    try:
        value = tomllib.loads(f"x = {text}")
    except ValueError:  # no TOML, or an integer of more digits than Python reads
        return text
    return value["x"] if len(value) == 1 and isinstance(value["x"], str | int | float | bool | list | dict) else text


def normalise(tokens: Sequence[str]) -> list[str]:
    """Spell out what a parser of options with one value each cannot see.

    `--shuffle` alone is `--shuffle block`, `--no-shuffle` is `--shuffle false`, numbers may stand apart
    (`--split 0 0.9`, `--sample-axes 0 1`), and so may what `--set` sets (`--set a.b=1 c.d=2`).
    """
    result: list[str] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if token == "--":
            return [*result, token, *rest]
        if token == "--no-shuffle":
            result += ["--shuffle", "false"]
        elif token == "--shuffle" and not (rest and _is_shuffle(rest[0])):
            result += [token, "block"]
        elif token in ("--split", "--validation-split", "--sample-axes"):
            numbers: list[str] = []
            while rest and _NUMBER.fullmatch(rest[0]):
                numbers.append(rest.pop(0))
            result += [token, ",".join(numbers)] if numbers else [token]
        elif token == "--set" and rest:
            result += [token, rest.pop(0)]
            while rest and _ASSIGNMENT.match(rest[0]):
                result += [token, rest.pop(0)]
        else:
            result.append(token)
    return result


def _is_shuffle(token: str) -> bool:
    return bool(difflib.get_close_matches(token.lower(), SHUFFLES, n=1, cutoff=0.6))


def _value(flag: Flag, given: Any) -> object:
    if flag.kind == "names":
        return _names(given)
    if flag.kind in ("text", "bool"):
        return given
    value = parse_value(given)
    if isinstance(value, str) and "," in value:
        value = parse_value(f"[{value}]")
    return value


def _names(given: list[str]) -> object:
    names: list[object] = []
    for text in given:
        value = parse_value(text) if text.startswith("[") else text.split(",")
        names += value if isinstance(value, list) else [value]
    bracketed = any(text.startswith("[") for text in given)
    return names if bracketed or len(names) > 1 else names[0]


def _metrics(given: list[str]) -> dict[str, object]:
    pairs = [text.strip() for typed in given for text in typed.split(",")]
    return {
        (name if target else name.rpartition(":")[2]): target or name
        for name, _, target in (pair.partition("=") for pair in pairs)
    }
