"""What configurations promise: one resolved form however it was said, and complaints that name the place."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import zarr

from streamtrain.assembly import stream
from streamtrain.config import differences, resolve, resolve_data
from streamtrain.config_tables import Config, DataTable, Named
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError
from streamtrain.said import Said, read

LEAST = '[data]\nstore = "d.zarr"\n[model]\ntarget = "nets:Net"\n'
FULL = """\
model = "nets:Net"
loss = "mse"
scheduler = "cosine"

[data]
store = "d.zarr"
inputs = ["a", "b"]
split = [0.0, 0.9]
shuffle = "block"
sample_axes = 0
normalize = { a = [1.0, [2, 3.5], 1] }
decode_cf = false

[validation]
split = [0.9, 1.0]

[metrics]
mae = "mae"
r2 = { name = "mine:R2", eps = 1e-6 }

[optimizer]
name = "sgd"
lr = 0.1
momentum = 0.9

[trainer]
gradient_clip_norm = 1.0

[fit]
max_epochs = 3
max_time = "2h"

[[callbacks]]
name = "EarlyStopping"
monitor = "val_mae"
"""


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "c.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def said(text: str) -> Said:
    return Said(tomllib.loads(text), text, "c.toml")


def complaint(text: str) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        resolve(said(text))
    return str(caught.value), caught.value.hint


def test_a_resolved_configuration_written_and_read_is_the_same() -> None:
    config = resolve(said(FULL))
    assert resolve(said(config.dumps())) == config


def test_short_forms_stand_for_tables() -> None:
    config = resolve(said(FULL))
    assert config.model.target == "nets:Net"
    mae, r2 = config.metrics["mae"], config.metrics["r2"]
    assert isinstance(config.loss, Named)
    assert config.loss.name == "mse"
    assert isinstance(mae, Named)
    assert isinstance(r2, Named)
    assert (mae.name, r2.arguments) == ("mae", {"eps": 1e-6})
    assert config.data.sample_axes == [0]


def test_losses_and_metrics_may_be_said_for_each_output() -> None:
    tables = "[loss]\na = 'mse'\nb = {name = 'huber', delta = 0.5}\n[metrics]\nall = 'x:f'\n[metrics.a]\nmae = 'mae'\n"
    config = resolve(said(LEAST + tables + "[trainer.loss_weights]\nb = 1\n"))
    assert config.tables()["loss"] == {"a": {"name": "mse"}, "b": {"name": "huber", "delta": 0.5}}
    assert config.tables()["metrics"] == {"all": {"name": "x:f"}, "a": {"mae": {"name": "mae"}}}
    assert resolve(said(config.dumps())) == config


def test_validation_inherits_the_data_but_neither_shuffles_nor_drops() -> None:
    config = resolve(said(FULL))
    assert config.validation is not None
    assert config.validation.store == "d.zarr"
    assert config.validation.inputs == ["a", "b"]
    assert config.validation.split == [0.9, 1.0]
    assert config.validation.shuffle is False


def test_validation_takes_the_middle_where_training_crops_at_random() -> None:
    config = resolve(said(FULL.replace("[data]", "[data]\ncrop = { lat = 8 }\nwindow = 4\njitter = 2")))
    assert config.validation is not None
    assert (config.data.crop_at, config.data.jitter) == (None, 2)
    assert (config.validation.crop, config.validation.crop_at, config.validation.jitter) == ({"lat": 8}, "center", None)


SAMPLES = """
window = { time = 24, 1 = 8 }
stride = 4
horizon = 1
target_window = 2
select = { level = [0, 3] }
stack = true
groups = "g"
indices = [0, 5]
weights = [0.5, 1]
transform_workers = "thread:2"
"""


def test_values_are_selected_by_lists_and_tables_of_start_and_stop() -> None:
    spelt = 'select = { time = { start = "2000", stop = "2010" }, level = [500.0], 1 = [0, 3], name = ["a"] }'
    config = resolve(said(FULL.replace("[data]", f"[data]\n{spelt}")))
    assert config.data.select == {
        "time": {"start": "2000", "stop": "2010"}, "level": [500.0], "1": [0, 3], "name": ["a"],
    }  # fmt: skip


def test_windows_choices_and_several_stores_are_keys_of_the_data() -> None:
    text = LEAST.replace('"d.zarr"', f'["a.zarr", "b.zarr"]{SAMPLES}') + "[validation]\nsplit = [0.0, 0.5]\n"
    config = resolve(said(text))
    assert config.data.store == ["a.zarr", "b.zarr"]
    assert config.data.window == {"time": 24, "1": 8}
    assert config.validation is not None
    assert (config.validation.indices, config.validation.weights) == ([0, 5], None)
    assert resolve(said(config.dumps())) == config


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("window = 0", "window must be an integer of at least 1, or a table"),
        ('window = { time = "x" }', "window.*must be an integer of at least 1, or a table"),
        ("horizon = -1", "horizon must be an integer of at least 0, got -1"),
        ("select = [0]", "select must be a table of places by axis"),
        ("stack = 1", "stack must be true or false"),
        ("sparse = 1", "sparse must be true or false"),
        ('ragged = "ends"', "ragged must be a table of arrays and those of their offsets"),
        ("ragged = {}", "ragged must be a table of arrays"),
        ("pad_value = true", "pad_value.*must be a number"),
        ("weights = 1", "weights must be a list of numbers, or the name of an array"),
        ("indices = [0.5]", "indices.*must be a list of sample numbers, or the name"),
        ("balance = 3", "balance must be a text that is not empty"),
        ("windows = 3", "unknown key data.windows"),
    ],
)
def test_what_samples_cannot_be_is_said(line: str, told: str) -> None:
    message, _ = complaint(LEAST.replace('"d.zarr"', f'"d.zarr"\n{line}'))
    assert re.search(told, message), message


def test_a_validation_store_of_its_own_is_not_split_like_the_data() -> None:
    config = resolve(said(FULL.replace("split = [0.9, 1.0]", 'store = "v.zarr"')))
    assert config.validation is not None
    assert config.validation.split is None


def test_the_learning_rate_may_stand_in_the_trainers_table() -> None:
    assert resolve(said(LEAST + "[trainer]\nlr = 0.5\n")).optimizer.lr == 0.5
    message, _ = complaint(LEAST + "[trainer]\nlr = 0.5\n[optimizer]\nlr = 0.1\n")
    assert message == "c.toml:6:1: trainer.lr is 0.5, but optimizer.lr is 0.1"


def test_data_has_the_keywords_of_a_stream_but_those_that_are_the_trainers() -> None:
    keywords = {name for name, it in inspect.signature(ZarrStream).parameters.items() if it.kind is not it.VAR_KEYWORD}
    assert keywords - set(DataTable.model_fields) == {"rank", "world_size", "lanes", "output"}
    assert set(DataTable.model_fields) <= keywords


def test_rows_of_different_lengths_are_read_as_the_data_says(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "s")
    group.create_array("tokens", data=np.arange(6))
    group.create_array("ends", data=np.array([0, 1, 3, 6]))
    lines = f'store = "{tmp_path}/s"\ninputs = "tokens"\nragged = {{tokens = "ends"}}\nmax_length = 2\npad_value = -1'
    said = Said(tomllib.loads(f"[data]\n{lines}"))
    (batch,) = stream(resolve_data(said), said, "data", output="numpy").as_loader()
    assert batch.inputs["tokens"].tolist() == [[0, -1], [1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("extra", "message", "hint"),
    [
        ("[optimizer]\nlr = nan", "c.toml:6:1: optimizer.lr must be a finite number of at least 0, got nan", ""),
        ("[fit]\nmax_epochs = 0", "c.toml:6:1: fit.max_epochs must be an integer of at least 1, got 0", ""),
        ("[fit]\nmax_epochs = 1.5", "c.toml:6:1: fit.max_epochs must be an integer of at least 1, got 1.5", ""),
        ("[fit]\nmax_epochs = true", "c.toml:6:1: fit.max_epochs must be an integer of at least 1, got True", ""),
        (
            "[data.normalize]\nx = [1.0]",
            'c.toml:5:2: data.normalize must be "stats", or a table by array of [mean, std]',
            "",
        ),
        ("[fit]\nmax_epocs = 1", "c.toml:6:1: unknown key fit.max_epocs", "Did you mean max_epochs?"),
        ("[trainre]\nx = 1", "c.toml:5:2: unknown key trainre", "Did you mean trainer?"),
        ("[trainer]\nprecision = '64'", 'c.toml:6:1: trainer.precision must be "32", "bf16" or "16", got \'64\'', ""),
        ("[loss]\nname = ''", "c.toml:6:1: loss.name must be a text that is not empty, got ''", ""),
        ("[validation]\nsplit = [0.5]", "c.toml:6:1: validation.split must be two shares such as [0.0, 0.9]", ""),
        ("[[callbacks]]\nmonitor = 'x'", "c.toml:5:3: callbacks.0.name is missing", ""),
        ("[metrics]\nacc = 3", "c.toml:6:1: metrics.acc must be a name, or a table with a name, got 3", ""),
        ("[metrics.a]\nacc = 3", "c.toml:6:1: metrics.a.acc must be a name, or a table with a name, got 3", ""),
        ("[loss]\na = 3", "c.toml:6:1: loss.a must be a name, or a table with a name, got 3", ""),
        ("[loss]\na = {name = 3}", "c.toml:6:6: loss.a.name must be a text that is not empty, got 3", ""),
        (
            "[trainer.loss_weights]\na = 'x'",
            "c.toml:5:2: trainer.loss_weights must be a table of numbers by output",
            "",
        ),
        ("fit = 3", "c.toml:5:1: unknown key model.fit", "Known here: args, partial, target, weights."),
    ],
)
def test_a_complaint_names_place_key_what_it_must_be_and_what_it_was(extra: str, message: str, hint: str) -> None:
    said_message, said_hint = complaint(LEAST + extra + "\n")
    assert said_message.startswith(message)
    assert said_hint.startswith(hint)


def test_what_is_missing_is_said_with_how_to_give_it() -> None:
    message, hint = complaint("[data]\nstore = 'd.zarr'\n")
    assert message == "c.toml: model is missing"
    assert hint == "Give --model, or [model] in the configuration."


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[data\n", ":1:6: not TOML: expected ']'"),
        (b"a = 1\na = 2\n", ":2:6: not TOML: cannot overwrite a value"),
        (b"a = \xff\n", ":1:5: not UTF-8 (byte 0xff)"),
        (b"a = [1,\n", ": not TOML: "),
    ],
)
def test_a_file_that_is_no_toml_is_said_with_line_and_column(tmp_path: Path, raw: bytes, message: str) -> None:
    path = write(tmp_path, raw)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_said_with_a_near_one(tmp_path: Path) -> None:
    write(tmp_path, LEAST)
    with pytest.raises(ConfigError, match="does not exist") as caught:
        read(str(tmp_path / "cc.toml"))
    assert caught.value.hint == f"Did you mean {tmp_path / 'c.toml'}?"
    with pytest.raises(ConfigError, match="is a folder"):
        read(str(tmp_path))


def test_what_is_set_later_wins_and_is_complained_of_by_its_own_name() -> None:
    given = said(LEAST + "[optimizer]\nlr = 0.1\n")
    given.assign("--set optimizer.lr", "optimizer.lr", 0.2)
    assert resolve(given).optimizer.lr == 0.2
    given.assign("--lr", "optimizer.lr", -1.0)
    with pytest.raises(ConfigError, match=r"^--lr: optimizer\.lr must be a finite number of at least 0, got -1\.0$"):
        resolve(given)


def test_a_key_inside_a_short_form_can_be_set() -> None:
    given = said('loss = "huber"\n' + LEAST)
    given.assign("--set", "loss.delta", 0.5)
    assert resolve(given).loss.model_dump() == {"name": "huber", "delta": 0.5}  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["data.store.x", "fit..x", "callbacks.3.name", "data.split.7"])
def test_a_key_that_cannot_be_set_is_refused(key: str) -> None:
    given = said(FULL)
    with pytest.raises(ConfigError, match=r"^--set: "):
        given.assign("--set", key, 1)


def test_a_stream_alone_needs_no_model() -> None:
    given = Said()
    given.assign("DATA", "data.store", "d.zarr")
    assert resolve_data(given).store == "d.zarr"
    given.assign("--batch-size", "data.batch_size", 0)
    with pytest.raises(ConfigError, match=r"^--batch-size: data\.batch_size must be"):
        resolve_data(given)


def changed(**tables: object) -> list[str]:
    before = resolve(said(FULL))
    after = before.model_dump(exclude_none=True)
    for key, value in tables.items():
        table, _, name = key.partition("__")
        after[table] = {**after[table], name: value}
    return differences(before.tables(), Config.model_validate(after).tables())


def test_a_run_may_change_its_limits_memory_and_place() -> None:
    assert changed(fit__max_epochs=9, data__memory="4GiB", trainer__run_dir="x", data__store="moved.zarr") == []


def test_what_a_run_may_not_change_is_named_with_both_values() -> None:
    assert changed(optimizer__weight_decay=0.2) == ["optimizer.weight_decay: unset -> 0.2"]
    assert changed(optimizer__lr=0.2) == []
    assert changed(data__seed=1, trainer__precision="bf16") == [
        "data.seed: 0 -> 1",
        "trainer.precision: '32' -> 'bf16'",
    ]
    assert changed(optimizer__nesterov=True) == ["optimizer.nesterov: unset -> True"]
