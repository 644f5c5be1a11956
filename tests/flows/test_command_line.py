"""Whole journeys on the command line: train, be interrupted, carry on, look at what was left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.synth import synth
from streamtrain.checkpoint import newest_valid, scan
from streamtrain.cli import main
from streamtrain.grace import Forecast
from streamtrain.saving import Saver
from tests import warm

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]

NETS = """
import glob
import os
import threading
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)

class Stuck(Net):
    def forward(self, x):
        if glob.glob("run/checkpoints/step-*"):
            print("stuck", flush=True)
            threading.Event().wait(60)
        return self.layer(x)

class Asked(Net):  # is sent a signal while it computes, and computes on until that has been heard
    signum = 0

    def forward(self, x):
        if Asked.signum:
            os.kill(os.getpid(), Asked.signum)
            threading.Event().wait(0.5)
        return self.layer(x)

class Patient(Net):  # trains on until nobody looks any more
    def forward(self, x):
        while glob.glob("run/checkpoints/step-*") and not os.path.exists("gone"):
            threading.Event().wait(0.01)
        return self.layer(x)

class Raises:
    def on_log(self, event):
        raise ValueError("no")

class Moves:
    def on_log(self, event):
        if event.step == 6 and os.path.isdir("run"):
            os.rename("run", "moved")

class Kill:
    def __init__(self, signum, at):
        self.signum, self.at, self.done = signum, at, False

    def on_log(self, event):
        if event.step == self.at and not self.done:
            self.done = True
            os.kill(os.getpid(), self.signum)
"""
BASIC = ["--data", "d.zarr", "--inputs", "x", "--targets", "y", "--model", "flow_nets:Net", "--loss", "mse"]
FIT = ["fit", *BASIC, "--batch-size", "16", "--shuffle", "--seed", "1", "--device", "cpu", "--log-every", "1"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    synth(tmp_path / "d.zarr", rows=64, columns=4, chunk_rows=16)
    (tmp_path / "flow_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("flow_nets", None)


def steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["split"] == "train"]


def newest(run: Path) -> int:
    entry = newest_valid(run / "checkpoints")
    assert entry is not None
    return entry.step


def test_a_run_leaves_what_its_folder_promises_and_says_where(place: Path, capsys: Capture) -> None:
    assert main([*FIT, "--validation-split", "0.5,1.0", "--metrics", "mae", "--max-epochs", "2"]) == 0
    (run,) = (place / "runs").iterdir()
    assert run.name.startswith("d-")
    found = {path.name for path in run.iterdir()}
    assert {"config.toml", "metrics.jsonl", "metrics.csv", "events.jsonl", "status.json", "log.txt"} <= found
    assert "error.json" not in found
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "completed: epoch 2, step 8, 128 samples"
    assert "val_mae" in shown[1]
    assert shown[-1] == f"  run folder runs/{run.name}, newest checkpoint step-000000008"


def test_a_kept_configuration_runs_again_and_goes_on(place: Path) -> None:
    assert main([*FIT, "--run-dir", "run", "-q"]) == 0
    assert main(["fit", "run/config.toml", "--resume", "auto", "--max-epochs", "3", "-q"]) == 0
    assert steps(place / "run") == list(range(1, 13))


def test_a_run_folder_that_moved_goes_on_where_it_is(place: Path) -> None:
    assert main([*FIT, "--run-dir", "run", "-q"]) == 0
    (place / "run").rename(place / "moved")
    assert main(["fit", "moved/config.toml", "--resume", "auto", "--max-epochs", "2", "-q"]) == 0
    assert steps(place / "moved") == list(range(1, 9))
    assert not (place / "run").exists()


def test_quiet_says_nothing(place: Path, capsys: Capture) -> None:
    assert main([*FIT, "--run-dir", "run", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_all_local_callbacks_go_together_from_a_configuration(place: Path, capsys: Capture) -> None:
    names = ("TensorBoard", "LearningRateMonitor", "ResourceMonitor", "Plots")
    (place / "c.toml").write_text("".join(f'[[callbacks]]\nname = "{name}"\n' for name in names))
    more = ["--profile", "--log-file-level", "debug", "--run-dir", "run", "-q", "--max-epochs", "8"]
    assert main(["fit", "c.toml", *FIT[1:], *more]) == 0
    run = place / "run"
    assert [path.name for path in (run / "profile").iterdir() if path.suffix == ".json"] == [
        "steps-000000010-000000030.json"
    ]
    assert (run / "plots" / "loss.png").stat().st_size
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["lr_0"] == 1e-3
    levels = {json.loads(line)["level"] for line in (run / "log.jsonl").read_text().splitlines()}
    assert "info" in levels
    assert capsys.readouterr() == ("", "")


def test_the_error_that_ends_a_run_is_in_its_log(place: Path) -> None:
    (place / "c.toml").write_text('[[callbacks]]\nname = "flow_nets:Raises"\n')
    assert main(["fit", "c.toml", *FIT[1:], "--run-dir", "run", "-q"]) == 7
    assert "ended by UserCodeError: callback Raises: on_log raised ValueError: no" in (
        (place / "run" / "log.txt").read_text()
    )


def test_a_rehearsal_checks_everything_and_writes_nothing(place: Path, capsys: Capture) -> None:
    before = sorted(place.rglob("*"))
    assert main([*FIT, "--max-epochs", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "model Net: 5 parameters",
        "train on 64 samples in 4 batches of 16",
    ]
    assert [path for path in sorted(place.rglob("*")) if "__pycache__" not in path.parts] == before


def test_the_printed_configuration_is_one_that_fit_takes(place: Path, capsys: Capture) -> None:
    assert main([*FIT, "--run-dir", "run", "--print-config"]) == 0
    (place / "c.toml").write_text(capsys.readouterr().out)
    assert main(["fit", "c.toml", "-q"]) == 0
    assert (place / "run" / "config.toml").read_text() == (place / "c.toml").read_text()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_finished_step_and_the_same_command_carries_on(
    signum: signal.Signals, code: int, place: Path, capsys: Capture
) -> None:
    (place / "c.toml").write_text(f'[[callbacks]]\nname = "flow_nets:Kill"\nsignum = {int(signum)}\nat = 6\n')
    command = [*FIT, "c.toml", "--run-dir", "run", "--resume", "auto"]
    assert main([*command, "--max-epochs", "1000000"]) == code
    shown = capsys.readouterr()
    stopped = newest(place / "run")
    assert stopped >= 6
    assert shown.out.startswith(f"signal ({signum.name}): ")
    assert "  carry on: streamtrain fit run/config.toml --resume auto\n" in shown.out
    assert main([*command, "--max-steps", str(stopped + 3), "-q"]) == 0
    assert steps(place / "run") == list(range(1, stopped + 4))


def test_a_second_ctrl_c_ends_within_two_seconds_and_harms_no_checkpoint(place: Path) -> None:
    (place / "c.toml").write_text('[[callbacks]]\nname = "ModelCheckpoint"\nevery = "1steps"\n')
    stuck = [part.replace("Net", "Stuck") for part in FIT]
    command = [*stuck, "c.toml", "--run-dir", "run", "--max-epochs", "1000000", "-q"]
    process, said = warm.piped(["-m", "streamtrain", *command])
    with said:
        try:
            assert b"stuck\n" in iter(said.readline, b"")
            process.send_signal(signal.SIGINT)
            assert any(b"finishing the step" in line for line in iter(said.readline, b""))
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            assert time.monotonic() - began < 2
        finally:
            process.kill()
    kept = scan(place / "run" / "checkpoints")
    assert kept
    assert all(entry.problem is None for entry in kept)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_training_ends_it_with_nothing_written(
    signum: signal.Signals, code: int, place: Path, capsys: Capture
) -> None:
    (place / "flow_nets.py").write_text(f"import os\nos.kill(os.getpid(), {int(signum)})\n" + NETS)
    assert main([*FIT, "--run-dir", "run"]) == code
    assert capsys.readouterr().err == f"error: ended by {signum.name}\nhint: The same command starts over.\n"
    assert not (place / "run").exists()


def test_a_run_whose_folder_is_moved_ends_before_it_is_torn_in_two_and_goes_on_where_it_lies(
    place: Path, capsys: Capture
) -> None:
    (place / "c.toml").write_text(
        '[[callbacks]]\nname = "flow_nets:Moves"\n[[callbacks]]\nname = "ModelCheckpoint"\nevery = "2steps"\n'
    )
    command = ["fit", "c.toml", *FIT[1:], "--max-steps", "60", "-q"]
    assert main([*command, "--run-dir", "run"]) == 5
    assert f"error: the run folder {place / 'run'} was moved or removed while the run was" in capsys.readouterr().err
    assert not (place / "run").exists()
    assert main([*command, "--run-dir", "moved", "--resume", "auto"]) == 0
    assert steps(place / "moved") == list(range(1, 61))
    assert newest(place / "moved") == 60


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_saves_has_a_checkpoint_made_and_the_run_goes_on(signum: signal.Signals, place: Path) -> None:
    (place / "c.toml").write_text(f'[[callbacks]]\nname = "flow_nets:Kill"\nsignum = {int(signum)}\nat = 6\n')
    assert main(["fit", "c.toml", *FIT[1:], "--run-dir", "run", "--max-steps", "400", "-q"]) == 0
    events = [json.loads(line) for line in (place / "run" / "events.jsonl").read_text().splitlines()]
    saved = [event for event in events if event["event"] == "checkpoint"]
    assert [event["kind"] for event in saved] == ["request", "end"]
    assert 6 <= saved[0]["step"] < 400
    assert steps(place / "run") == list(range(1, 401))


def test_a_signal_that_asks_where_it_stands_is_answered_on_stderr_and_in_the_log(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "c.toml").write_text(f'[[callbacks]]\nname = "flow_nets:Kill"\nsignum = {int(signal.SIGQUIT)}\nat = 6\n')
    assert main(["fit", "c.toml", *FIT[1:], "--run-dir", "run", "--max-steps", "2000"]) == 0
    shown = capfd.readouterr().err
    assert shown.count("SIGQUIT: where it stands, and goes on") == 1
    for part in ("thread MainThread:\n", "daemon thread streamtrain-train:\n", "task streamtrain-fit:\n"):
        assert part in shown
        assert part in (place / "run" / "log.txt").read_text()


@pytest.mark.parametrize("command", ["validate", "evaluate", "predict"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_commands_on_a_checkpoint_unwind_at_a_signal(
    command: str, signum: signal.Signals, code: int, place: Path, capsys: Capture
) -> None:
    assert main([*[part.replace("Net", "Asked") for part in FIT], "--run-dir", "run", "-q"]) == 0
    sys.modules["flow_nets"].Asked.signum = int(signum)
    before = {*place.rglob("*")}
    assert main([command, "run", *(["--out", "p.zarr"] if command == "predict" else [])]) == code
    assert capsys.readouterr().err.endswith(f"error: ended by {signum.name}\nhint: The same command starts over.\n")
    assert {*place.rglob("*")} == before


def test_a_save_that_would_outlast_the_grace_is_left_out_and_said(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "c.toml").write_text(
        f'[[callbacks]]\nname = "flow_nets:Kill"\nsignum = {int(signal.SIGTERM)}\nat = 6\n'
        '[[callbacks]]\nname = "ModelCheckpoint"\nevery = "1000000steps"\n'
    )
    command = ["fit", "c.toml", *FIT[1:], "--run-dir", "run", "--resume", "auto"]
    assert main([*command, "--max-steps", "4", "-q"]) == 0

    async def slow(saver: Saver, size: object) -> Forecast:
        return Forecast(bytes=10**9, rate=10.0**6)

    monkeypatch.setattr(Saver, "forecast", slow)
    assert main([*command, "--max-epochs", "1000000", "--grace", "60"]) == 143
    shown = capsys.readouterr()
    assert newest(place / "run") == 4
    assert "newest checkpoint step-000000004" in shown.out
    assert re.search(
        r"warning: step \d+ is not saved: that would take about 1e\+03 s .* grace are left; step-000000004 is the last "
        r"checkpoint, \d+ steps? after it (is|are) lost",
        shown.err,
    )


@pytest.mark.parametrize("signum", [None, signal.SIGTERM], ids=["to its end", "ended by SIGTERM"])
def test_a_run_whose_output_nobody_reads_goes_on_and_ends_as_it_would(
    signum: signal.Signals | None, place: Path
) -> None:
    said = f'[[callbacks]]\nname = "flow_nets:Kill"\nsignum = {int(signum or 0)}\nat = {6 if signum else 10**9}\n'
    (place / "c.toml").write_text(said)
    command = ["fit", "c.toml", *FIT[1:], "--run-dir", "run", "--max-steps", "400" if signum is None else "1000000"]
    with subprocess.Popen(
        [sys.executable, "-m", "streamtrain", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        assert process.wait(timeout=100) == (0 if signum is None else 143)
    assert newest(place / "run") == steps(place / "run")[-1] >= (400 if signum is None else 6)


@pytest.mark.parametrize("signum", [None, signal.SIGTERM], ids=["to its end", "ended by SIGTERM"])
def test_a_run_whose_reader_is_stuck_goes_on_and_saves_when_it_is_told_to_end(
    signum: signal.Signals | None, place: Path
) -> None:
    reading, end = os.pipe()
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, b"x" * 4096)
    os.set_blocking(end, True)
    many = ["--max-steps", "40", "-q"] if signum is None else ["--max-steps", "1000000"]
    with open(end, "wb", buffering=0) as stuck:
        process = warm.start(["-m", "streamtrain", *FIT, "--run-dir", "run", *many], stdout=stuck, stderr=stuck)
    try:
        if signum is not None:
            deadline = time.monotonic() + 60
            while not (place / "run" / "metrics.jsonl").is_file() or len(steps(place / "run")) < 6:
                assert time.monotonic() < deadline, "it waits for its reader"
                time.sleep(0.01)
            process.send_signal(signum)
        assert process.wait(timeout=60) == (0 if signum is None else 143)
    finally:
        process.kill()
        os.close(reading)
    assert newest(place / "run") == steps(place / "run")[-1]


@pytest.mark.parametrize("signum", [None, signal.SIGHUP], ids=["to its end", "ended by SIGHUP"])
def test_a_run_whose_terminal_goes_away_ends_as_any_other(signum: signal.Signals | None, place: Path) -> None:
    looking, terminal = os.openpty()
    (place / "c.toml").write_text('[[callbacks]]\nname = "ModelCheckpoint"\nevery = "6steps"\n')
    patient = [each.replace(":Net", ":Patient") for each in FIT[1:]]
    many = ["--run-dir", "run", "--max-steps", "40" if signum is None else "1000000"]
    with open(terminal, "r+b", buffering=0) as end:
        command = ["-m", "streamtrain", "fit", "c.toml", *patient, *many]
        process = warm.start(command, stdout=end, stderr=end, environment={"TERM": "xterm"})
    try:
        while not list((place / "run").glob("checkpoints/step-*")):
            os.read(looking, 1 << 16)
        os.close(looking)
        (place / "gone").touch()
        if signum is not None:
            process.send_signal(signum)
        assert process.wait(timeout=60) == (0 if signum is None else 129)
    finally:
        process.kill()
    assert newest(place / "run") == steps(place / "run")[-1] >= (40 if signum is None else 6)
    assert not (place / "run" / "error.json").exists()


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("when", ["starts", "ends"])
def test_a_request_to_save_harms_no_command_that_starts_or_ends(when: str, signum: signal.Signals, place: Path) -> None:
    """`python -m streamtrain`, with an import, or a class's end, that sends the signal."""
    sends = f"os.kill(os.getpid(), {int(signum)})"
    sent = {
        "starts": f"class Finder:\n    def find_spec(self, name, *_):\n        name == 'streamtrain.cli' and {sends}\n"
        "sys.meta_path.insert(0, Finder())\n",
        "ends": "class Last:\n    def __del__(self, kill=os.kill, pid=os.getpid()):\n"
        f"        kill(pid, {int(signum)})\nsys.last_of_all = Last()\n",
    }
    (place / "sender.py").write_text(
        f"import os, sys\n{sent[when]}from streamtrain.__main__ import main\nsys.exit(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "sender.py", "--version"]
    assert subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=100, check=False).returncode == 0


def test_a_save_that_never_ends_keeps_no_command_from_ending_and_is_named(place: Path) -> None:
    """`python -m streamtrain`, with a disk whose fsync does not return."""
    (place / "stuck_disk.py").write_text(
        "import os, sys, threading\n"
        "synced = os.fsync\n"
        "def never_synced(descriptor):\n"
        "    if 'checkpoints' not in os.readlink(f'/proc/self/fd/{descriptor}'):\n"
        "        return synced(descriptor)\n"
        "    print('stuck', flush=True)\n"
        "    threading.Event().wait()\n"
        "os.fsync = never_synced\n"
        "from streamtrain.__main__ import main\n"
        "sys.exit(main())\n"
    )
    command = [*FIT, "--run-dir", "run", "--max-epochs", "3", "--grace", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "stuck_disk.py", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"stuck\n"
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 143
    assert b"not saved within 1 s: leaving, the last checkpoint stands" in said
    assert b" in never_synced\n" in said
    assert scan(place / "run" / "checkpoints") == []


def test_a_read_that_never_returns_ends_the_command_with_its_chunk_named_and_what_was_trained_saved(
    place: Path,
) -> None:
    (place / "stuck_store.py").write_text(
        "import os, sys, threading\n"
        "read, reads = os.preadv, []\n"
        "def never_read(descriptor, *arguments):\n"
        "    reads.append(os.readlink(f'/proc/self/fd/{descriptor}'))\n"
        "    if '/x/c/' in reads[-1] and sum('/x/c/' in path for path in reads) > 6:\n"
        "        threading.Event().wait()\n"
        "    return read(descriptor, *arguments)\n"
        "os.preadv = never_read\n"
        "from streamtrain.__main__ import main\n"
        "sys.exit(main())\n"
    )
    command = [*FIT, "--run-dir", "run", "--max-epochs", "9", "--io", "pread", "--cache", "0", "--read-timeout", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "stuck_store.py", *command],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment,
    )
    assert done.returncode == 5, done.stderr
    assert re.search(
        r"error: .*chunk .* was not read within 1 s\nhint: check the storage, or raise read_timeout\n", done.stderr
    )
    assert re.search(r"is being read for .* s, in .*stuck_store\.py:6", done.stderr)
    assert newest(place / "run") == steps(place / "run")[-1]
