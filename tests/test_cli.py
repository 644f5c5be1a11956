"""What the command line promises: quick help, two lines for an error, exit codes, and each command's words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
import zarr

from data_tools.convert import COMPLETE
from data_tools.synth import synth
from streamtrain.checkpoint import commit
from streamtrain.cli import main
from streamtrain.state import Snapshot
from tests import warm
from tests.data.sparse import random_sparse, write_arrays, write_sparse

Capture = pytest.CaptureFixture[str]


def child(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """A real process: the command line, or the code given."""
    command = ["-c", code] if code is not None else ["-m", "streamtrain"]
    return subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


LOADED = """
import json, sys
from streamtrain.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["bench", "--help"], [], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    done = child(*arguments, code=LOADED)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code == (0 if arguments else 2)
    assert not {"torch", "numpy", "zarr", "numcodecs", "pydantic"} & set(loaded)


def test_without_arguments_there_is_usage_and_three_examples() -> None:
    done = child()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: streamtrain {")
    assert done.stderr.count("\n  streamtrain ") == 3


def test_help_lists_the_commands_that_there_are(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    listed = [line.split(":")[0].strip() for line in shown.splitlines() if line.startswith("  ") and ": " in line]
    commands = ["bench", "checkpoints", "demo", "evaluate", "fit", "import-pt", "inspect", "predict", "validate"]
    commands += ["verify"]
    assert listed[: len(commands)] == commands
    assert shown.isascii()


@pytest.mark.parametrize(
    "command", ["demo", "fit", "validate", "evaluate", "predict", "inspect", "bench", "checkpoints", "verify"]
)
def test_each_command_has_help(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: streamtrain {command}")


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["fitt"], "unknown command fitt", "Did you mean fit?"),
        (
            ["plot"],
            "unknown command plot",
            "There are: demo, fit, validate, evaluate, predict, inspect, bench, checkpoints, verify, import-pt.",
        ),
        (["--epochs=3"], "unknown option --epochs", "`streamtrain --help` lists what there is."),
        (["fit", "--epcohs", "3"], "unknown option --epcohs", "Did you mean --max-epochs?"),
        (["fit", "--batchsize=3"], "unknown option --batchsize", "Did you mean --batch-size?"),
        (["fit", "--zzz"], "unknown option --zzz", "`streamtrain fit --help` lists what there is."),
        (["bench", "x", "--secs", "3"], "unknown option --secs", "Did you mean --seconds?"),
        (["fit", "--lr"], "streamtrain fit: --lr needs a value", "`streamtrain fit --help` lists what there is."),
        (["inspect"], "streamtrain inspect: DATA needs a value", "`streamtrain inspect --help` lists what there is."),
        (["fit", "a.toml", "b.toml"], "unexpected argument b.toml", "`streamtrain fit --help` lists what there is."),
        (["fit", "--set", "lr"], "--set lr: expected a.b=value", "For instance --set optimizer.lr=0.001."),
        (["bench", "x", "--seconds", "0"], "--seconds must be a finite number above 0, got '0'", "For instance 10."),
        (
            ["demo", "--max-epochs", "1.5"],
            "--max-epochs must be an integer of at least 1, got '1.5'",
            "For instance 3.",
        ),
    ],
)
def test_wrong_usage_is_said_in_two_lines(arguments: list[str], error: str, hint: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {error}\nhint: {hint}\n"


def test_debug_adds_the_traceback_wherever_it_stands(capsys: Capture) -> None:
    assert main(["fit", "nothing.toml", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.splitlines()[-2] == "error: configuration nothing.toml does not exist"


def test_what_is_printed_fits_any_locale(tmp_path: Path) -> None:
    (tmp_path / "k\u00e4se").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "streamtrain", "fit", "k\u00e4se"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == rb"error: k\xe4se is a folder, not a configuration file"


def test_a_reader_that_has_seen_enough_ends_it_in_peace(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "streamtrain", "--help"],
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command", ["--help", "--version", "inspect STORE", "bench STORE --seconds 0.01"])
def test_an_output_that_is_full_is_named_with_what_to_do(command: str, store: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "streamtrain", *command.replace("STORE", str(store)).split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 5
    assert done.stderr.splitlines() == [
        "error: the output can't be written: No space left on device",
        "hint: Make room where stdout goes, or send it elsewhere. What was done before stands.",
    ]


def test_a_fit_whose_report_finds_no_room_says_that_it_is_done(store: Path, tmp_path: Path) -> None:
    named = ["--data", str(store), "--inputs", "x", "--targets", "y", "--loss", "mse"]
    model = ["--model", "torch.nn:Linear", "--set", "model.args={in_features=4, out_features=1}"]
    with open("/dev/full", "wb") as full:
        done = warm.run(["-m", "streamtrain", "fit", *named, *model, "--run-dir", str(tmp_path / "run")], stdout=full)
    assert done.returncode == 5
    assert done.stderr.splitlines()[-2:] == [
        "error: the output can't be written: No space left on device",
        f"hint: The training itself is done (completed) and saved in {tmp_path / 'run'}; only its report is lost.",
    ]
    assert main(["checkpoints", str(tmp_path / "run")]) == 0


SLOW = """
import signal, threading
from torch import nn

threading.Thread(target=threading.Event().wait, args=(60,)).start()
signal.raise_signal(signal.SIGINT)
"""


def test_after_a_ctrl_c_no_thread_keeps_the_process(store: Path, tmp_path: Path) -> None:
    """Such as one of zarr's in a read that hangs: Python would wait for it at its end."""
    (tmp_path / "slow_nets.py").write_text(SLOW)
    named = ["--data", str(store), "--inputs", "x", "--model", "slow_nets:Net"]
    done = warm.run(["-m", "streamtrain", "fit", *named], cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == "error: ended by SIGINT\nhint: The same command starts over.\n"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    for step in (10, 20):
        commit(
            tmp_path / "checkpoints" / f"step-{step:09}",
            Snapshot(model={"w": torch.zeros(3)}, optimizer={}, state={"step": step}),
        )
    return tmp_path


def test_checkpoints_are_listed_with_step_bytes_and_state(run_folder: Path, capsys: Capture) -> None:
    damaged = run_folder / "checkpoints" / "step-000000020" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["checkpoints", str(run_folder)]) == 0
    good, bad = capsys.readouterr().out.splitlines()
    size = sum(file.stat().st_size for file in (run_folder / "checkpoints" / "step-000000010").iterdir())
    assert good == f"step-000000010  step 10  {size} bytes  ok"
    assert bad.startswith("step-000000020  step 20  ")
    assert "  damaged: model.safetensors, it has " in bad


def test_a_run_without_a_valid_checkpoint_ends_with_4(run_folder: Path, capsys: Capture) -> None:
    for manifest in run_folder.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    assert main(["checkpoints", str(run_folder)]) == 4
    shown = capsys.readouterr()
    assert shown.out.count("damaged: manifest.json, ") == 2
    assert shown.err.startswith("error: none of the 2 checkpoints in ")


def test_verify_says_each_damage_and_ends_with_3(tmp_path: Path, capsys: Capture) -> None:
    array = zarr.create_array(tmp_path / "d", data=np.arange(12.0), chunks=(4,), compressors=None)
    assert array.shape == (12,)
    assert main(["verify", str(tmp_path / "d"), "--write-manifest"]) == 0
    assert capsys.readouterr().out.endswith("ok: 3 files, 96 B, every byte\n")
    chunk = tmp_path / "d" / "c" / "1"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    assert main(["verify", str(tmp_path / "d"), "--deep"]) == 3
    shown = capsys.readouterr()
    assert shown.out.startswith("damaged: array 'array': chunk 1 ")
    assert shown.err.startswith("error: ")


def test_a_folder_without_checkpoints_ends_with_4(tmp_path: Path, capsys: Capture) -> None:
    assert main(["checkpoints", str(tmp_path)]) == 4
    assert capsys.readouterr().err.startswith("error: there is no checkpoint in ")
    assert main(["checkpoints", str(tmp_path / "none")]) == 2


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return synth(tmp_path / "d.zarr", rows=640, columns=4, chunk_rows=64, codec="zstd")


def test_inspect_tells_how_arrays_lie_what_a_pass_costs_and_what_to_change(store: Path, capsys: Capture) -> None:
    assert main(["inspect", str(store), "--inputs", "x", "--targets", "y", "--shuffle", "--batch-size", "32"]) == 0
    shown = capsys.readouterr().out
    assert "x: float32 640 x 4, 10.0 KiB\n  chunks 64 x 4 of 1.0 KiB; 10 files" in shown
    assert "codecs zstd (level 1)" in shown
    assert "a pass over x, y: 640 samples in 20 batches of 32\n  reads 20 chunks" in shown
    assert "shuffle block, 10 of 10 cells permuted together" in shown
    assert shown.endswith("what to change:\n  nothing: this streams well as it is\n")


def test_inspect_takes_arrays_of_one_length_where_none_are_named(store: Path, capsys: Capture) -> None:
    group: Any = zarr.open_group(store, mode="r+")
    group.create_array("scale", data=np.ones(3))
    assert main(["inspect", str(store)]) == 0
    assert "a pass over x, y: 640 samples" in capsys.readouterr().out


def test_inspect_hides_no_array_behind_one_that_is_damaged(store: Path, capsys: Capture) -> None:
    (store / "x" / "zarr.json").write_text('{"zarr')
    assert main(["inspect", str(store)]) == 3
    shown = capsys.readouterr()
    assert "x: can't be read: " in shown.out
    assert "y: float32 640" in shown.out
    assert main(["inspect", str(store), "--inputs", "y"]) == 0


def cells(path: Path) -> Path:
    """A store as AnnData writes it: a sparse matrix, a categorical, texts, and what can't be trained on."""
    matrix = random_sparse(60, 20, 5)
    root = zarr.open_group(path, mode="w", zarr_format=2)
    write_sparse(root, "X", matrix)
    layers = root.create_group("layers")
    write_sparse(layers, "turned", matrix).attrs["encoding-type"] = "csc_matrix"
    obs = root.create_group("obs", attributes={"encoding-type": "dataframe", "column-order": ["kind"]})
    kind = obs.create_group("kind", attributes={"encoding-type": "categorical"})
    write_arrays(kind, {"codes": np.arange(60, dtype=np.int8) % 3, "categories": np.arange(3)}, 60)
    obs.create_array("_index", data=np.array([f"c{n}" for n in range(60)]), chunks=(60,))
    return path


def test_inspect_shows_groups_of_anndata_as_what_they_are(tmp_path: Path, capsys: Capture) -> None:
    path = str(cells(tmp_path / "cells.zarr"))
    assert main(["inspect", path, "--inputs", "X", "--targets", "obs/kind"]) == 0
    shown = capsys.readouterr().out
    assert "X: sparse matrix (CSR) 60 x 20; its numbers that are stored: float32 " in shown
    assert "obs/kind: categorical of 3 categories; its codes: int8 60" in shown
    assert "a pass over X, obs/kind: 60 samples" in shown


def test_inspect_lists_what_cannot_be_trained_on_and_goes_on(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", str(cells(tmp_path / "cells.zarr"))]) == 0
    shown = capsys.readouterr().out
    assert "obs/_index: can't be trained on: " in shown
    assert "layers/turned: can't be trained on: 'layers/turned' is a csc_matrix" in shown
    assert "a pass over X, obs/kind: 60 samples" in shown


def test_inspect_says_which_lane_is_slow_and_why(tmp_path: Path, capsys: Capture) -> None:
    zarr.create_array(
        tmp_path / "odd.zarr", data=np.ones((64, 4)), chunks=(16, 4), zarr_format=2, compressors=numcodecs.BZ2()
    )
    assert main(["inspect", str(tmp_path / "odd.zarr")]) == 0
    shown = capsys.readouterr().out
    assert "lane zarr's own API, slower: codec 'bz2'" in shown
    assert "the array: converting it to raw or zstd chunks takes it off the slow lane" in shown


def test_bench_measures_in_one_json_object_without_torch(store: Path) -> None:
    done = child("bench", str(store), "--seconds", "0.05", "--json", "--shuffle", code=LOADED)
    measured = json.loads(done.stdout)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert "torch" not in loaded
    assert {"samples_per_s", "bytes_per_s", "first_batch_s", "peak_rss_bytes", "cpu_s", "stages"} <= set(measured)
    assert measured["samples"] >= 256  # one batch at least, however slow the machine
    assert measured["bytes_per_s"] == pytest.approx(measured["samples_per_s"] * 20)
    assert measured["stages"]["lanes"] == {"x": "pread", "y": "pread"}
    assert measured["stages"]["chunks"] >= 20


def test_a_store_of_one_array_is_called_the_same_by_all(tmp_path: Path, capsys: Capture) -> None:
    one = tmp_path / "one.zarr"
    zarr.create_array(one, data=np.ones((64, 4)), chunks=(16, 4), compressors=None, attributes={**COMPLETE})
    assert main(["inspect", str(one)]) == 0
    assert capsys.readouterr().out.startswith("array: float64 64 x 4")
    assert main(["bench", str(one), "--seconds", "0.01"]) == 0
    assert "\n  array by mmap\n" in capsys.readouterr().out
    (one / "c/1/0").unlink()
    assert main(["bench", str(one), "--seconds", "0.01"]) == 3
    assert "error: array 'array': chunk 1.0 " in capsys.readouterr().err
    metadata = json.loads((one / "zarr.json").read_text())
    (one / "zarr.json").write_text(json.dumps({**metadata, "shape": [10**15, 4]}))
    assert main(["inspect", str(one)]) == 3
    shown = capsys.readouterr()
    assert "array: can't be read: array 'array' claims the shape" in shown.out


def test_bench_tells_people_in_words(store: Path, capsys: Capture) -> None:
    assert main(["bench", str(store), "--seconds", "0.01", "--inputs", "x"]) == 0
    shown = capsys.readouterr().out
    assert " samples/s, " in shown
    assert "  x by pread\n" in shown
    assert "  y by" not in shown


def test_bench_shows_others_over_the_same_store_beside_ours(store: Path, capsys: Capture) -> None:
    """Each in a process of its own; annbatch is not installed beside us."""
    command = ["bench", str(store), "--seconds", "0.2", "--shuffle", "--json", "--batch-size", "64"]
    assert main([*command, "--compare", "zarr,dataloader,xbatcher,annbatch"]) == 0
    found = json.loads(capsys.readouterr().out)["compare"]
    assert list(found) == ["zarr", "dataloader", "xbatcher", "annbatch"]
    for name in ("zarr", "dataloader", "xbatcher"):
        assert found[name]["problem"] is None
        assert found[name]["bytes_per_s"] == pytest.approx(found[name]["samples_per_s"] * 20)
        assert found[name]["peak_rss_bytes"] > 30 << 20
        assert found[name]["version"]
    assert found["annbatch"]["problem"] == "not installed (pip install annbatch)"


def test_bench_says_others_in_words(store: Path, capsys: Capture) -> None:
    assert main(["bench", str(store), "--seconds", "0.05", "--inputs", "x", "--compare", "zarr,annbatch"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\n  zarr 3\.\S+: [\d,]+ samples/s, .*; peak memory \d+ MiB; a slice a run", shown)
    assert "\n  annbatch: not installed (pip install annbatch)\n" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "zar"], "--compare knows no"),
        (["--compare", "zarr", "--split", "0,0.5"], "--compare reads one whole store"),
        (["--compare", "zarr", "--sample-axes", "1", "--inputs", "x"], "--compare reads one whole store"),
    ],
)
def test_what_others_can_not_be_asked_is_refused(
    store: Path, options: list[str], message: str, capsys: Capture
) -> None:
    assert main(["bench", str(store), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
