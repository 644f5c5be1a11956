"""What bad input gets: its exit code, one `error:` line and one `hint:` line, no traceback, nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import zarr

from data_tools.synth import synth
from streamtrain.cli import main
from streamtrain.run_folder import RunFolder
from tests import warm

Capture = pytest.CaptureFixture[str]
Prepare = Callable[[Path], object]

NETS = """
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, x):
        return self.layer(x)

class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)

class Overflow(Net):
    def forward(self, x):
        return self.layer(x) * float("inf")

class Raises(Net):
    def forward(self, x):
        raise KeyError("no such layer")

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5000), nn.Linear(5000, 1))

    def forward(self, x):
        return self.layers(x)

class Bare(nn.Module):
    pass

def nothing():
    return None

def bad_transform(batch):
    raise ValueError("cannot augment")

def drop_all(batch):
    return batch.inputs[:0], batch.targets[:0]

class Angry:
    def on_epoch_end(self, event):
        raise RuntimeError("I object")
"""
CONFIG = """
[data]
store = "d.zarr"
inputs = "x"
targets = "y"
batch_size = 16

[model]
target = "bad_nets:Net"

[loss]
name = "mse"

[trainer]
run_dir = "run"
device = "cpu"
seed = 1

[fit]
max_epochs = 1

[[callbacks]]
name = "ModelCheckpoint"
every = "1epoch"
"""
FIT = ["fit", "c.toml"]
COSINE = ["--scheduler", "cosine", "--set"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw store with x (64, 4) and y (64,) in 4 chunks, and the same compressed."""
    folder = tmp_path_factory.mktemp("stores")
    synth(folder / "d.zarr", rows=64, columns=4, chunk_rows=16)
    synth(folder / "z.zarr", rows=64, columns=4, chunk_rows=16, codec="zstd")
    group: Any = zarr.open_group(folder / "d.zarr", mode="r+")
    labels = np.arange(64) % 3
    labels[37] = 3
    group.create_array("labels", data=labels.astype(np.int64), chunks=(16,))
    group.create_array("short", data=np.zeros(63, np.float32), chunks=(16,))
    group.create_array("empty", shape=(0, 4), dtype="float32", chunks=(16, 4))
    holes = np.zeros((64, 4), np.float32)
    holes[21, 2] = np.nan
    group.create_array("holes", data=holes, chunks=(16, 4), compressors=None)
    return folder


@pytest.fixture
def place(stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of one's own with both stores, a module and a configuration; it is the current one."""
    shutil.copytree(stores, tmp_path, dirs_exist_ok=True)
    (tmp_path / "bad_nets.py").write_text(NETS)
    (tmp_path / "c.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield tmp_path
    sys.modules.pop("bad_nets", None)


class Row(NamedTuple):
    """A bad input and what it gets."""

    name: str
    prepare: Prepare | None
    arguments: list[str]
    code: int
    error: str
    """A regular expression that the whole error line matches from its beginning."""
    hint: str = ""
    """The same for the hint."""


def write(name: str, text: str | bytes) -> Prepare:
    def do(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return do


def cut(name: str, keep: int) -> Prepare:
    return lambda place: os.truncate(place / name, keep)


def flip(name: str, at: int) -> Prepare:
    def do(place: Path) -> None:
        raw = bytearray((place / name).read_bytes())
        raw[at] ^= 0xFF
        (place / name).write_bytes(raw)

    return do


def remove(name: str) -> Prepare:
    return lambda place: (place / name).unlink()


def link_out(name: str) -> Prepare:
    def do(place: Path) -> None:
        (place / name).rename(place / "elsewhere")
        (place / name).symlink_to(place / "elsewhere")

    return do


def fifo(name: str) -> Prepare:
    def do(place: Path) -> None:
        (place / name).unlink()
        os.mkfifo(place / name)

    return do


def metadata(**changes: Any) -> Prepare:
    """Claim something else of x."""

    def do(place: Path) -> None:
        path = place / "d.zarr/x/zarr.json"
        document = json.loads(path.read_text())
        for key, value in changes.items():
            if key == "chunk_shape":
                document["chunk_grid"]["configuration"]["chunk_shape"] = value
            else:
                document[key] = value
        path.write_text(json.dumps(document))

    return do


def larger_chunk(place: Path) -> None:
    """A chunk that decodes to a thousand times its size."""
    other: Any = zarr.create_array(
        place / "large.zarr", data=np.ones(64 * 4 * 1000, np.float32), chunks=(64 * 4 * 1000,)
    )
    assert other is not None
    shutil.copy(place / "large.zarr/c/0", place / "z.zarr/x/c/1/0")


def trained(place: Path) -> None:
    """A run with two checkpoints."""
    assert main([*FIT, "-q", "--set", "fit.max_epochs=2"]) == 0
    assert len(list((place / "run/checkpoints").glob("step-*"))) == 2


def damage(*which: int) -> Prepare:
    def do(place: Path) -> None:
        trained(place)
        found = sorted((place / "run/checkpoints").glob("step-*"))
        for number in which:
            flip(str(found[number] / "model.safetensors"), -1)(place)

    return do


def newer(place: Path) -> None:
    trained(place)
    for path in (place / "run/checkpoints").glob("step-*/manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def changed_data(place: Path) -> None:
    trained(place)
    shutil.rmtree(place / "d.zarr")
    synth(place / "d.zarr", rows=80, columns=4, chunk_rows=16)


def stopping(line: str) -> Prepare:
    return write("c.toml", f'{CONFIG}\n[[callbacks]]\nname = "EarlyStopping"\n{line}\n')


X1 = "d.zarr/x/c/1/0"
"""The chunk of x with rows 16 to 32."""
SAVE = [*FIT, "--set"]
RESUME = [*FIT, "--set", "fit.max_epochs=3", "--resume"]

USAGE = [
    Row("max_epochs below 1", None, [*FIT, "--max-epochs", "-1"], 2, "--max-epochs: .* at least 1, got -1"),
    Row("max_epochs of 0", None, [*FIT, "--max-epochs", "0"], 2, "--max-epochs: .* at least 1, got 0"),
    Row("max_epochs broken", None, [*FIT, "--max-epochs", "1.5"], 2, "--max-epochs: .* at least 1, got 1.5"),
    Row("max_epochs no number", None, [*FIT, "--max-epochs", "abc"], 2, "--max-epochs: .* at least 1, got 'abc'"),
    Row("batch_size of 0", None, [*FIT, "--batch-size", "0"], 2, "--batch-size: .* at least 1, got 0"),
    Row("a seed too large", None, [*FIT, "--seed", "9" * 30], 2, "--seed: .* below 2.63, got 9"),
    Row("lr nan", None, [*FIT, "--lr", "nan"], 2, "--lr: .* finite number of at least 0, got nan"),
    Row("lr infinite", None, [*FIT, "--lr", "inf"], 2, "--lr: .* finite number of at least 0, got inf"),
    Row("lr negative", None, [*FIT, "--lr", "-1"], 2, "--lr: .* finite number of at least 0, got -1"),
    Row("threads beyond measure", None, [*FIT, "--threads", "100000"], 2, "--threads: .*from 1 to 256, got 100000"),
    Row("a timeout beyond measure", None, [*FIT, "--read-timeout", "1e300"], 2, "--read-timeout: .* up to 1e9, got 1e"),
    Row("max_time", None, [*FIT, "--max-time", "soon"], 2, ".*max_time.*soon"),
    Row("memory", None, [*FIT, "--memory", "lots"], 2, ".*memory.*lots"),
    Row("max_time of a rehearsal", None, [*FIT, "--max-time", "5foo", "--dry-run"], 2, ".*max_time.*5foo", ".*minute"),
    Row("split backwards", None, [*FIT, "--split", "0.9,0.1"], 2, ".*split"),
    Row("unknown option", None, [*FIT, "--epcohs", "3"], 2, "unknown option --epcohs", "Did you mean --max-epochs"),
    Row("unknown key", None, [*FIT, "--set", "trainer.lrr=1"], 2, "--set trainer.lrr: unknown key trainer.lrr"),
    Row(
        "unknown key of an optimizer",
        None,
        [*FIT, "--set", "optimizer.lrr=1"],
        2,
        ".*optimizer.*lrr",
        "(?i)did you mean",
    ),
    Row("unknown optimizer", None, [*FIT, "--optimizer", "adamx"], 2, ".*adamx", ".*adam"),
    Row("unknown scheduler", None, [*FIT, "--scheduler", "cosin"], 2, ".*cosin", ".*cosine"),
    Row("a schedule of a wrong length", None, [*FIT, *COSINE, "scheduler.total=x"], 2, ".*scheduler.total.*'x'"),
    Row("a schedule without what it needs", None, [*FIT, "--scheduler", "multistep"], 2, ".*milestones is missing"),
    Row("a key that a schedule has not", None, [*FIT, *COSINE, "scheduler.gama=1"], 2, ".*'gama'", ".*Known: "),
    Row("a schedule that leads nowhere", None, [*FIT, "--scheduler", "torch.optim.Nix"], 2, ".*has no Nix"),
    Row("an optimizer that leads nowhere", None, [*FIT, "--optimizer", "torch.optim.Adamm"], 2, ".*Adamm", ".*Adam"),
    Row("a decay that raises", None, [*FIT, "--set", "optimizer.layer_decay=2"], 2, ".*layer_decay.*up to 1, not 2"),
    Row("a schedule over before it began", None, [*FIT, *COSINE, "scheduler.total=0"], 2, ".*scheduler.total.*not 0"),
    Row("save_top_k no number", None, [*SAVE, "callbacks.0.save_top_k=x"], 2, "c.toml:.*save_top_k='x'", "0 for none"),
    Row("a monitor no name", None, [*SAVE, "callbacks.0.monitor=5"], 2, "c.toml:.*monitor must be the name of a .*5"),
    Row("min_delta no number", stopping('min_delta = "x"'), FIT, 2, "c.toml:.*min_delta must be a finite num.*'x'"),
    Row("restore_best no truth", stopping('restore_best = "x"'), FIT, 2, "c.toml:.*restore_best must be true or fal"),
    Row("config missing", None, ["fit", "d.toml"], 2, "configuration d.toml does not exist", "Did you mean c.toml"),
    Row("config a folder", None, ["fit", "d.zarr"], 2, "d.zarr is a folder, not a configuration file"),
    Row("config not UTF-8", write("c.toml", b"a = '\xff'"), FIT, 2, "c.toml:1:6: not UTF-8"),
    Row("config no TOML", write("c.toml", "[data\n"), FIT, 2, "c.toml:1:6: not TOML: expected"),
    Row("config with a number of 5,000 digits", write("c.toml", "a = " + "9" * 5000), FIT, 2, "c.toml: .*digits"),
    Row("an option of 5,000 digits", None, [*FIT, "--max-epochs", "9" * 5000], 2, "--max-epochs: .*got '999"),
    Row("config of a wrong type", write("c.toml", CONFIG.replace("= 16", "= 'x'")), FIT, 2, r"c.toml:6:1: .* got 'x'"),
    Row("model missing", None, [*FIT, "--model", "bad_nets:Nett"], 2, ".*bad_nets has no Nett", "Did you mean Net"),
    Row("model no Module", None, [*FIT, "--model", "bad_nets:nothing"], 2, ".*gave None of type NoneType"),
    Row("model without parameters", None, [*FIT, "--model", "bad_nets:Bare"], 2, ".*without parameters"),
    Row("device that is not there", None, [*FIT, "--device", "cuda"], 5, ".*(?i:cuda)"),
    Row("log level", None, [*FIT, "--log-level", "warn"], 2, "--log-level must be", "Did you mean warning"),
    Row("loss missing", write("c.toml", CONFIG.replace('[loss]\nname = "mse"\n', "")), FIT, 2, ".*loss"),
]
"""Refused before anything is written."""

DATA = [
    Row("dataset missing", None, [*FIT, "--data", "nix.zarr"], 3, ".*nix.zarr does not exist"),
    Row("dataset empty", lambda p: (p / "e").mkdir(), [*FIT, "--data", "e"], 3, ".*not a Zarr store .no zarr.json"),
    Row("dataset a file", None, [*FIT, "--data", "c.toml"], 3, ".*not a Zarr store"),
    Row("zarr.json empty", write("d.zarr/x/zarr.json", ""), FIT, 3, ".*d.zarr/x/zarr.json is empty"),
    Row("zarr.json cut", cut("d.zarr/x/zarr.json", 40), FIT, 3, ".*d.zarr/x/zarr.json is no JSON: .* byte"),
    Row("zarr.json binary", write("d.zarr/zarr.json", b"\x89\xff\0"), FIT, 3, ".*d.zarr/zarr.json is no JSON: .* byte"),
    Row(
        "a number of 5,000 digits",
        write("d.zarr/x/zarr.json", '{"zarr_format": 3, "shape": [' + "9" * 5000 + ", 4]}"),
        FIT,
        3,
        ".*d.zarr/x/zarr.json is no JSON that can be read: a number of 5000 digits at byte 29 of 5034",
    ),
    Row("array absent", None, [*FIT, "--inputs", "xx"], 3, ".*no array 'xx'.*x, y"),
    Row("array absent and none like it", None, [*FIT, "--inputs", "qq"], 3, ".*'qq'; there are: .*x, y", "name one"),
    Row("row counts differ", None, [*FIT, "--targets", "short"], 3, ".*x: 64, short: 63"),
    Row("no rows", None, [*FIT, "--inputs", "empty", "--targets", "empty"], 3, ".*'empty'.* 0 samples"),
    Row("fewer rows than a batch", None, [*FIT, "--batch-size", "100", "--drop-last"], 3, ".*64.*100"),
    Row("a shape of 1e15", metadata(shape=[10**15, 4]), FIT, 3, "array 'x' claims the shape .1000000000000000, 4."),
    Row("a chunk of 0", metadata(chunk_shape=[0, 4]), FIT, 3, ".*x.*(chunk|size)"),
    Row("a chunk of 2 TiB", metadata(chunk_shape=[2**37, 4]), FIT, 3, "array 'x' claims chunks of 2.0 TiB"),
    Row(
        "an unknown codec",
        metadata(codecs=[{"name": "bytes"}, {"name": "zap"}]),
        FIT,
        3,
        ".*x.*zap",
        ".*no codec .zap.: install",
    ),
    Row("an unsafe codec", metadata(codecs=[{"name": "numcodecs.pickle"}]), FIT, 3, ".*x.*pickle"),
    Row("objects", metadata(data_type="string"), FIT, 3, ".*x"),
    Row("a chunk missing", remove(X1), FIT, 3, f"array 'x': chunk 1.0 .rows .16:32.*{X1}: it is missing"),
    Row("a chunk cut", cut(X1, 100), FIT, 3, f"array 'x': chunk 1.0 .rows .16:32.*{X1}: it has 100 bytes"),
    Row("a link out of the store", link_out(X1), FIT, 3, f"array 'x': chunk 1.0 .*{X1}: it is a link out"),
    Row("a pipe for a chunk", fifo(X1), FIT, 3, f"array 'x': chunk 1.0 .*{X1}: it is not a regular file"),
    Row(
        "a link out by zarr's own way",
        link_out(X1),
        [*FIT, "--io", "store"],
        3,
        f"array 'x': chunk 1.0 .*{X1}: it is a",
    ),
    Row("a pipe by zarr's own way", fifo(X1), [*FIT, "--io", "store"], 3, f"array 'x': chunk 1.0 .*{X1}: it is not a"),
    Row("a chunk too large", larger_chunk, [*FIT, "--data", "z.zarr"], 3, "array 'x': chunk 1.0 .*z.zarr/x/c/1/0: it"),
    Row(
        "a compressed chunk flipped", flip("z.zarr/x/c/1/0", 0), [*FIT, "--data", "z.zarr"], 3, "array 'x': chunk 1.0 "
    ),
    Row(
        "a label out of range",
        None,
        [*FIT, "--targets", "labels", "--model", "bad_nets:Classes", "--loss", "cross_entropy"],
        3,
        ".* 3 at row 37",
    ),
    Row("not a number in the features", None, [*FIT, "--inputs", "holes"], 3, ".*nan at row 21, column 2"),
    Row("a filter that leaves nothing", None, [*FIT, "--transform", "bad_nets:drop_all"], 3, ".*nothing|.*no "),
]

RUNS = [
    Row(
        "no resume where there are checkpoints", trained, FIT, 2, ".*checkpoint", ".*resume.*run.dir|.*run.dir.*resume"
    ),
    Row(
        "monitor that nothing logs",
        write("c.toml", CONFIG + '[validation]\n[[callbacks]]\nname = "EarlyStopping"\nmonitor = "val_zeal"\n'),
        FIT,
        2,
        ".*val_zeal",
        ".*loss",
    ),
    Row("resume from nowhere", None, [*FIT, "--resume", "nix"], 4, ".*nix"),
    Row("resume best from nothing", None, [*FIT, "--resume", "best"], 4, ".*best|.*checkpoint"),
    Row("resume from a pickle", write("m.pt", b"\x80\x02."), [*FIT, "--resume", "m.pt"], 4, ".*m.pt"),
    Row("another optimizer", trained, [*RESUME, "auto", "--optimizer", "sgd"], 4, ".*optimizer.name: 'adamw' -> 'sgd'"),
    Row("another loss", trained, [*RESUME, "auto", "--loss", "mae"], 4, ".*loss.name: 'mse' -> 'mae'"),
    Row("another seed", trained, [*RESUME, "auto", "--set", "data.seed=5"], 4, ".*data.seed: 0 -> 5"),
    Row("another precision", trained, [*RESUME, "auto", "--precision", "bf16"], 4, ".*precision: '32' -> 'bf16'"),
    Row("the run of another configuration", trained, [*FIT, "--loss", "mae"], 2, ".*loss.name: 'mse' -> 'mae'"),
    Row(
        "all checkpoints damaged",
        damage(0, 1),
        [*RESUME, "auto"],
        4,
        ".*step-000000008: model.safetensors, .*step-000000004: model.safetensors, ",
    ),
    Row("a newer format", newer, [*RESUME, "auto"], 4, ".*format 99 is newer"),
    Row("data changed since", changed_data, [*RESUME, "auto"], 3, ".*x.*64x4.*80x4", ".*--allow-data-change"),
    Row("run folder not writable", write("f", ""), [*FIT, "--run-dir", "f/run"], 5, ".*f/run.*"),
    Row("loss not finite", None, [*FIT, "--model", "bad_nets:Overflow"], 6, ".*step"),
    Row("a model that raises", None, [*FIT, "--model", "bad_nets:Raises"], 7, ".*no such layer"),
    Row("a transform that raises", None, [*FIT, "--transform", "bad_nets:bad_transform"], 7, ".*cannot augment"),
    Row(
        "a callback that raises",
        write("c.toml", CONFIG + '[[callbacks]]\nname = "bad_nets:Angry"\n'),
        FIT,
        7,
        ".*Angry.*on_epoch_end.*I object",
    ),
]


def ids(row: Row) -> str:
    return row.name


def expect(row: Row, capsys: Capture) -> None:
    """Run it; one error line and one hint line, as the row says."""
    capsys.readouterr()
    code = main(row.arguments)
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
    assert "Traceback" not in shown
    assert (code, len(errors), len(hints)) == (row.code, 1, 1), shown
    assert re.match(row.error, errors[0]), errors[0]
    assert re.match(row.hint or ".", hints[0]), hints[0]


@pytest.mark.parametrize("row", USAGE, ids=ids)
def test_wrong_usage_is_refused_before_anything_is_written(row: Row, place: Path, capsys: Capture) -> None:
    if row.prepare is not None:
        row.prepare(place)
    expect(row, capsys)
    assert not (place / "run").exists() or not any((place / "run").glob("[!.]*"))


@pytest.mark.parametrize("row", DATA, ids=ids)
def test_data_that_cannot_be_used_is_named(row: Row, place: Path, capsys: Capture) -> None:
    if row.prepare is not None:
        row.prepare(place)
    expect(row, capsys)


@pytest.mark.parametrize("row", RUNS, ids=ids)
def test_a_run_that_cannot_go_on_says_why_and_loses_nothing(row: Row, place: Path, capsys: Capture) -> None:
    if row.prepare is not None:
        row.prepare(place)
    before = sorted((place / "run/checkpoints").glob("step-*"))
    expect(row, capsys)
    assert set(before) <= set((place / "run/checkpoints").glob("step-*"))


def test_resume_auto_without_checkpoints_starts_fresh_and_says_so(place: Path, capsys: Capture) -> None:
    assert main([*FIT, "--resume", "auto"]) == 0
    assert "fresh" in capsys.readouterr().err


def test_changed_data_go_on_where_that_is_allowed(place: Path, capsys: Capture) -> None:
    changed_data(place)
    assert main([*RESUME, "auto", "--allow-data-change"]) == 0
    assert re.search("warning: going on with other data, .*64x4.*80x4", capsys.readouterr().err)
    rows = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["samples"] == 2 * 64 + 80


def test_raised_limits_and_memory_and_another_rate_go_on(place: Path) -> None:
    trained(place)
    assert main([*RESUME, "auto", "--memory", "512MiB", "--lr", "0.25", "-q"]) == 0
    rates = [json.loads(line)["lr"] for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert rates[-1] == 0.25
    steps = [json.loads(line)["step"] for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 12
    assert (place / "run/checkpoints/step-000000012").is_dir()


def test_a_damaged_newest_checkpoint_is_warned_of_and_the_older_one_resumed(place: Path, capsys: Capture) -> None:
    damage(1)(place)
    assert main([*RESUME, "auto"]) == 0
    shown = capsys.readouterr().err
    assert "warning: " in shown
    assert "step-000000008 is damaged" in shown
    assert "repeats 4 steps" in shown


def test_a_run_folder_in_use_names_the_process(place: Path, capsys: Capture) -> None:
    with RunFolder(place / "run"):
        expect(Row("", None, FIT, 5, f".*run is in use by this very process .{os.getpid()}. since "), capsys)


def test_more_than_one_rank_is_refused_before_anything_is_written(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    expect(Row("", None, FIT, 2, ".*WORLD_SIZE|.*world size"), capsys)
    assert not (place / "run/checkpoints").exists()


def child(place: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamtrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=place, check=False, **more)


def test_a_real_process_says_the_same(place: Path) -> None:
    done = child(place, *FIT, "--data", "nix.zarr")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["error: dataset nix.zarr does not exist", "hint: check the path"]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from streamtrain.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_limit_of_files_ends_with_5_and_the_last_checkpoint_stands(place: Path) -> None:
    assert main([*FIT, "-q", "--model", "bad_nets:Wide"]) == 0
    done = warm.run(["-c", LIMITED, *RESUME, "auto", "-q", "--model", "bad_nets:Wide"])
    assert done.returncode == 5, done.stderr
    told = "(?m)^error: a file would be larger than is allowed: .* needs [0-9,]+ bytes, [0-9,]+ bytes are free"
    assert re.search(told, done.stderr)
    assert "ulimit -f" in done.stderr
    assert "training goes on (failed saves in a row: 1 of 3)" in done.stderr
    assert "Traceback" not in done.stderr
    assert main(["checkpoints", "run"]) == 0


@pytest.mark.parametrize(
    "change",
    ["seed=5", "shuffle=global", "shuffle_blocks=3", "split=[0.0, 0.5]", "split_by=sample"],
)
def test_a_run_of_another_order_is_refused_by_its_checkpoint_too(place: Path, capsys: Capture, change: str) -> None:
    """The configuration in the run's folder is gone, so that only the checkpoint can tell."""
    order = ["--set", "data.shuffle=block", "--set", "data.split=[0.0, 0.9]"]
    assert main([*FIT, *order, "-q", "--set", "fit.max_epochs=2"]) == 0
    (place / "run/config.toml").unlink()
    key, _, _ = change.partition("=")
    again = [*RESUME, "auto", *order, "--set", f"data.{change}"]
    expect(Row("", None, again, 4, f"checkpoint .*step-0+8 does not fit: .*another order: .*{key}: .* then, "), capsys)
