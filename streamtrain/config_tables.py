"""The tables of a configuration: which keys there are, what each must be, in words, and what it is if nobody says it.

Its law: the keys are the keywords of ZarrStream, Trainer and fit, and a key that is none of them is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from streamtrain import toml_text


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
