"""What the flags of the command line promise: each sets a key that exists, in all the ways in which people type it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import pytest
from cyclopts import App, Parameter

from streamtrain.config import resolve
from streamtrain.config_tables import DataTable, FitTable, Table, TrainerTable
from streamtrain.flags import FLAGS, STREAM_FLAGS, Flags, StreamFlags, assignments, normalise, parse_value
from streamtrain.said import Said

app = App(result_action="return_value", exit_on_error=False, print_error=False)


@app.default
def keep(*, flags: Annotated[Flags | None, Parameter(name="*")] = None) -> Flags | None:
    return flags


def typed(*tokens: str) -> dict[str, object]:
    """The keys that a command line sets."""
    return {key: value for _, key, value in assignments(app(normalise(tokens)))}


GOOD = {
    "--inputs": "a", "--targets": "b", "--batch-size": "8", "--shuffle": "global", "--shuffle-blocks": "4",
    "--split": "0,0.9", "--split-by": "chunk", "--split-seed": "1", "--sample-axes": "0,1", "--dtype": "float32",
    "--decode-cf": "false", "--normalize": "stats",
    "--transform-workers": "process:2",
    "--transform": "m:f", "--memory": "2GiB", "--cache": "1GiB", "--io": "pread", "--threads": "2", "--prefetch": "3",
    "--read-timeout": "5", "--validation-data": "v", "--validation-split": "0.9,1.0", "--loss": "mse",
    "--retries": "5", "--storage-options": '{region = "x"}',
    "--verify": "always", "--on-bad-chunk": "skip", "--max-skipped": "0.1",
    "--metrics": "mae", "--optimizer": "sgd", "--lr": "0.1", "--scheduler": "cosine", "--max-epochs": "2",
    "--max-steps": "9", "--max-time": "2h", "--resume": "auto", "--run-dir": "r", "--grace": "3", "--device": "cpu",
    "--watchdog": "9",
    "--precision": "32", "--seed": "1", "--accumulate-grad-batches": "2", "--gradient-clip-norm": "1",
    "--loss-weights": "{kind = 0.1}",
    "--gradient-clip-value": "1.5", "--nonfinite": "skip", "--log-every": "1", "--validate-every": "9steps",
    "--sanity-batches": "0", "--limit-batches": "0.5", "--overfit-batches": "1", "--data": "d", "--model": "m:N",
    "--model-weights": "runs/a",
    "--step": "m:f", "--device-transform": "m:f", "--window": "{time = 24}", "--stride": "4", "--horizon": "0",
    "--target-window": "2", "--select": "{level = [0, 3]}", "--groups": "g", "--indices": "0,2,5", "--weights": "w",
    "--balance": "b", "--disk-cache": "cache", "--disk-cache-bytes": "9GiB",
    "--ragged": '{values = "offsets"}', "--max-length": "16", "--pad-value": "-1",
    "--crop": "{lat = 8}", "--crop-at": "center", "--jitter": "2",
    "--compile": "true", "--ema": "0.999", "--gradient-checkpointing": "true", "--freeze": '{"^a" = "2epochs"}',
}  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_sets_keys_that_the_configuration_knows(flag: Any) -> None:
    said = Said({"data": {"store": "d"}, "model": {"target": "m:N"}})
    tokens = [flag.name] if flag.kind == "bool" else [flag.name, GOOD[flag.name]]
    for origin, key, value in assignments(app(normalise(tokens))):
        said.assign(origin, key, value)
    resolve(said)


@pytest.mark.parametrize(
    ("name", "table"),
    [("data", DataTable), ("trainer", TrainerTable), ("fit", FitTable)],
    ids=["data", "trainer", "fit"],
)
def test_every_key_of_these_tables_has_a_flag_of_its_name(name: str, table: type[Table]) -> None:
    kebab = {f"--{key.replace('_', '-')}" for key in table.model_fields}
    assert kebab <= {spelling for flag in FLAGS for spelling in (flag.name, flag.also)}
    assert {f"{name}.{key}" for key in table.model_fields} <= {key for flag in FLAGS for key in flag.keys}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--lr", "-1e-3"], {"optimizer.lr": -1e-3}),
        (["--lr=3"], {"optimizer.lr": 3}),
        (["--max-epochs", "abc"], {"fit.max_epochs": "abc"}),
        (["--shuffle"], {"data.shuffle": "block"}),
        (["--shuffle", "--lr", "1"], {"data.shuffle": "block", "optimizer.lr": 1}),
        (["--shuffle", "false"], {"data.shuffle": False}),
        (["--no-shuffle"], {"data.shuffle": False}),
        (["--split", "0", "0.9"], {"data.split": [0, 0.9]}),
        (["--split", "0.0,0.9"], {"data.split": [0.0, 0.9]}),
        (["--sample-axes", "0"], {"data.sample_axes": 0}),
        (["--inputs", "a"], {"data.inputs": "a"}),
        (["--inputs", "a,b"], {"data.inputs": ["a", "b"]}),
        (["--inputs", "a", "--inputs", "b"], {"data.inputs": ["a", "b"]}),
        (["--inputs", '["a"]'], {"data.inputs": ["a"]}),
        (["--metrics", "mae,mine=pkg:M"], {"metrics": {"mae": "mae", "mine": "pkg:M"}}),
        (["--metrics", "pkg.mod:M"], {"metrics": {"M": "pkg.mod:M"}}),
        (["--seed", "7"], {"trainer.seed": 7, "data.seed": 7}),
        (["--no-deterministic"], {"trainer.deterministic": False}),
        (["--precision", "32"], {"trainer.precision": "32"}),
        (["--run-dir", "1"], {"trainer.run_dir": "1"}),
        (["--store", "d.zarr"], {"data.store": "d.zarr"}),
        ([], {}),
    ],
)
def test_what_is_typed_comes_out_as_meant(tokens: Sequence[str], expected: dict[str, object]) -> None:
    assert typed(*tokens) == expected


def test_shares_may_be_mixed_with_whole_numbers() -> None:
    said = Said({"model": "m:N"})
    for origin, key, value in assignments(app(normalise(["--data", "d", "--split", "0", "0.9"]))):
        said.assign(origin, key, value)
    assert resolve(said).data.split == [0.0, 0.9]


def test_several_settings_may_follow_one_set() -> None:
    assert normalise(["c.toml", "--set", "a.b=1", "c=2", "d.toml"]) == [
        "c.toml", "--set", "a.b=1", "--set", "c=2", "d.toml",
    ]  # fmt: skip


def test_what_follows_two_dashes_is_left_alone() -> None:
    assert normalise(["--", "--shuffle"]) == ["--", "--shuffle"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("nan-like", "nan-like"),
        ("cpu", "cpu"),
        ("'3'", "3"),
        ("2024-01-01", "2024-01-01"),
        ("1\ny = 2", "1\ny = 2"),
    ],
)
def test_a_value_is_read_as_toml_or_taken_as_it_is(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_a_stream_alone_has_the_streams_flags_only() -> None:
    assert {flag.keys[0].partition(".")[0] for flag in STREAM_FLAGS} == {"data"}
    assert not hasattr(StreamFlags, "model")
