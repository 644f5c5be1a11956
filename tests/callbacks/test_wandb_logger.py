"""What the wandb logger promises: one run of theirs for a run of ours, each line once, and nobody else's run touched.

wandb itself is not needed: a module in its place notes what it is told, in the words of its documentation.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from streamtrain.callbacks.wandb_logger import WandbLogger
from streamtrain.errors import ConfigError, EnvironmentProblem
from streamtrain.events import Log, TrainBegin, TrainEnd
from streamtrain.trainer import Trainer
from tests.callbacks.test_wandb_folder import Record, transaction_log
from tests.engine import AtStep, Samples, lines, network

NUMBERS = itertools.count()


class Run:
    """A run of theirs."""

    def __init__(self, server: dict[str, list[dict[str, Any]]], **given: Any) -> None:
        self.given = given
        self.server = server.setdefault(given["id"], []) if given["mode"] == "online" else []
        self.starting_step = len(self.server) if given["resume"] == "allow" else 0
        self.axes: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        if given["mode"] == "offline":
            folder = Path(given["dir"], "wandb", f"offline-run-{next(NUMBERS)}-{given['id']}")
            folder.mkdir(parents=True)
            self.settings = SimpleNamespace(sync_dir=str(folder))
            self.file = folder / f"run-{given['id']}.wandb"

    def define_metric(self, name: str, **about: Any) -> None:
        self.axes[name] = about

    def log(self, values: dict[str, Any]) -> None:
        assert self.exit_code is None, "a run that is finished takes nothing"
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.server += self.logged
        if self.given["mode"] == "offline":
            self.leave(len(self.logged))

    def leave(self, count: int) -> None:
        """Write so many lines to the file of an offline run."""
        begun = [b'["run", {}]'] if count else []  # before the first line reaches the disk nothing does
        bodies = [*begun, *(json.dumps(["history", row]).encode() for row in self.logged[:count])]
        self.file.write_bytes(transaction_log(bodies))


class Wandb(ModuleType):
    """Their module."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: list[Run] = []
        self.server: dict[str, list[dict[str, Any]]] = {}
        """The rows of each run that is online, as they arrived."""
        self.refusal: Exception | None = None

    def init(self, **given: Any) -> Run:
        if self.refusal is not None:
            raise self.refusal
        self.runs.append(Run(self.server, **given))
        return self.runs[-1]

    def Settings(self, **given: Any) -> dict[str, Any]:  # noqa: N802  (their name)
        return given

    def Image(self, pixels: Any) -> tuple[str, Any]:  # noqa: N802
        return "image", pixels.shape

    def Table(self, columns: list[str], data: list[list[Any]]) -> tuple[str, Any]:  # noqa: N802
        return "table", (columns, data)

    def Histogram(self, np_histogram: tuple[Any, Any]) -> tuple[str, Any]:  # noqa: N802
        return "histogram", np_histogram[0].sum()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module, messages = Wandb(), ModuleType("wandb.proto.wandb_internal_pb2")
    vars(messages).update(Record=Record)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(sys.modules, messages.__name__, messages)
    return module


async def fit(folder: Path, steps: int, logger: WandbLogger, *, log: dict[str, Any] | None = None) -> None:
    callbacks = [logger, *([AtStep(1, lambda: trainer.log_media(log))] if log is not None else [])]
    trainer = Trainer(
        network(), nn.MSELoss(), callbacks=callbacks, run_dir=folder, log_every=2, seed=0, config={"a": 1}, device="cpu"
    )
    await trainer.fit(Samples(80), Samples(16, seed=1), max_steps=steps, max_epochs=9, resume="auto")


async def test_a_fit_that_goes_on_continues_its_run_with_each_line_once(tmp_path: Path, wandb: Wandb) -> None:
    await fit(tmp_path, 10, WandbLogger("rain", name="first", tags=["x"]))
    await fit(tmp_path, 20, WandbLogger("rain", name="first", tags=["x"]))
    first, second = wandb.runs
    assert (first.given["id"], first.given["resume"]) == (second.given["id"], None)
    assert second.given["resume"] == "allow"
    assert first.given | {"resume": None} == second.given | {"resume": None}
    about = {name: first.given[name] for name in ("project", "name", "tags", "mode", "dir", "config", "reinit")}
    assert about == {"project": "rain", "name": "first", "tags": ["x"], "mode": "online", "dir": str(tmp_path)} | {
        "config": {"a": 1},
        "reinit": "create_new",
    }
    assert first.axes["*"] == {"step_metric": "step"}
    assert (first.exit_code, second.exit_code) == (0, 0)
    told = [{k: v for k, v in row.items() if k != "split"} for row in lines(tmp_path)]
    assert first.logged + second.logged == told


async def test_a_fresh_start_is_another_run(tmp_path: Path, wandb: Wandb) -> None:
    logger = WandbLogger()
    await fit(tmp_path / "a", 2, logger)
    await fit(tmp_path / "b", 2, logger)
    assert len({run.given["id"] for run in wandb.runs}) == 2


@pytest.mark.parametrize("mode", ["offline", None], ids=["told", "by-environment"])
async def test_offline_it_is_the_same_run_in_another_folder(
    tmp_path: Path, wandb: Wandb, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online" if mode else "offline")
    await fit(tmp_path, 2, WandbLogger(mode=mode))
    await fit(tmp_path, 4, WandbLogger(mode=mode))
    first, second = wandb.runs
    assert (first.given["id"], second.given["resume"], second.given["mode"]) == (second.given["id"], "allow", "offline")
    assert first.file != second.file


@pytest.mark.parametrize("left", [0, 3, 7, 9], ids=["nothing", "some", "all", "more"])
async def test_offline_each_line_stands_once_whatever_a_kill_took(
    tmp_path: Path, wandb: Wandb, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    await fit(tmp_path, 10, WandbLogger(mode="offline"))
    await fit(tmp_path, 14, WandbLogger(mode="offline"))
    (tmp_path / "checkpoints" / "step-000000014").rename(tmp_path / "lost")  # as if killed before its commit
    first, second = wandb.runs
    whole = [*first.logged, *second.logged]
    first.leave(min(left, len(first.logged)))
    second.leave(max(left - len(first.logged), 0))
    await fit(tmp_path, 20, WandbLogger(mode="offline"))
    told = [{k: v for k, v in row.items() if k not in ("time", "split")} for row in lines(tmp_path)]
    assert whole[:left] + wandb.runs[2].logged == told
    aside = first.file.with_name(first.file.name + ".empty")
    assert (aside.exists(), first.file.exists()) == (not left, bool(left))
    (tmp_path / "checkpoints" / "step-000000020").rename(tmp_path / "lost too")
    await fit(tmp_path, 22, WandbLogger(mode="offline"))  # what was put aside is none that is gone
    assert [row["step"] for row in wandb.runs[3].logged if "loss" in row] == [22]
    assert "is gone" not in caplog.text


def told(folder: Path) -> list[dict[str, Any]]:
    """The lines that there should be."""
    return [{k: v for k, v in row.items() if k not in ("time", "split")} for row in lines(folder)]


def uncommitted(folder: Path, step: int) -> None:
    """As if the life had been killed before the commit of its last step."""
    (folder / "checkpoints" / f"step-{step:09d}").rename(folder / f"lost-{step}")


@pytest.mark.parametrize("first", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("second", [0, 1, 3, 99])
async def test_online_each_line_stands_once_whatever_a_kill_took(
    tmp_path: Path, wandb: Wandb, first: int, second: int, caplog: pytest.LogCaptureFixture
) -> None:
    await fit(tmp_path, 10, WandbLogger(), log={"grey": np.zeros((2, 3))})
    (rows,) = wandb.server.values()
    assert len(rows) == 7  # one of them is no line
    del rows[first:]
    await fit(tmp_path, 14, WandbLogger())
    del rows[first + second :]
    uncommitted(tmp_path, 14)
    await fit(tmp_path, 16, WandbLogger())
    assert [row for row in rows if "samples" in row] == told(tmp_path)
    uncommitted(tmp_path, 16)
    before = list(rows)
    await fit(tmp_path, 20, WandbLogger())
    assert rows[: len(before)] == before
    assert [row for row in rows if "samples" in row] == told(tmp_path)
    assert not [record for record in caplog.records if record.levelname == "WARNING" and "wandb" in record.name]


async def test_online_the_life_before_is_waited_for_before_the_server_is_asked(
    tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await fit(tmp_path, 10, WandbLogger())
    (name,) = wandb.server
    file = tmp_path / "wandb" / f"run-1-{name}" / f"run-{name}.wandb"
    file.parent.mkdir(parents=True)
    file.touch()
    asked: list[tuple[list[Path], int]] = []

    def settle(files: list[Path]) -> bool:
        asked.append((files, len(wandb.runs)))
        return False

    monkeypatch.setattr("streamtrain.callbacks.wandb_logger.settle", settle)
    await fit(tmp_path, 12, WandbLogger())
    assert asked == [([file], 1)]
    assert "a process of wandb still writes in" in caplog.text


async def test_where_the_notes_are_gone_that_is_said_and_nothing_is_logged_again(
    tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    await fit(tmp_path, 10, WandbLogger())
    (rows,) = wandb.server.values()
    del rows[3:]
    (tmp_path / f".wandb-rows-{next(iter(wandb.server))}").unlink()
    await fit(tmp_path, 12, WandbLogger())
    assert "is gone: lines after step 10 may stand twice" in caplog.text
    del rows[3:]  # that nothing before is known stays so
    uncommitted(tmp_path, 12)
    await fit(tmp_path, 12, WandbLogger())
    assert [row["step"] for row in rows[3:] if "loss" in row] == [12]


async def test_two_runs_of_theirs_have_notes_of_their_own(tmp_path: Path, wandb: Wandb) -> None:
    for steps in (10, 12):
        trainer = Trainer(
            network(),
            nn.MSELoss(),
            callbacks=[WandbLogger("a"), WandbLogger("b")],
            run_dir=tmp_path,
            log_every=2,
            seed=0,
            device="cpu",
        )
        await trainer.fit(Samples(80), max_steps=steps, max_epochs=9, resume="auto")
        for number, rows in enumerate(wandb.server.values()):
            if steps == 10:
                del rows[number:]
    assert list(wandb.server.values()) == [told(tmp_path)] * 2


async def test_rows_that_nobody_noted_are_said(tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture) -> None:
    await fit(tmp_path, 10, WandbLogger())
    (rows,) = wandb.server.values()
    rows += [{"step": 11}] * 3
    await fit(tmp_path, 12, WandbLogger())
    assert "wandb has 3 rows of run" in caplog.text
    assert [row for row in rows if "samples" in row] == told(tmp_path)


@pytest.mark.parametrize("left", [0, 3, 6])
async def test_a_run_goes_on_online_with_what_its_offline_lives_hold_left_to_the_sync(
    tmp_path: Path, wandb: Wandb, left: int
) -> None:
    await fit(tmp_path, 10, WandbLogger(mode="offline"))
    wandb.runs[0].leave(left)
    await fit(tmp_path, 14, WandbLogger())
    uncommitted(tmp_path, 14)
    (rows,) = wandb.server.values()
    del rows[6 - left + 1 :]
    await fit(tmp_path, 16, WandbLogger())
    assert wandb.runs[0].logged[:left] + rows == told(tmp_path)


async def test_offline_after_online_what_is_not_known_is_said_and_no_line_stands_twice(
    tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    await fit(tmp_path, 10, WandbLogger())
    await fit(tmp_path, 14, WandbLogger())
    uncommitted(tmp_path, 14)
    for step in (16, 18):
        await fit(tmp_path, step, WandbLogger(mode="offline"))
    await fit(tmp_path, 20, WandbLogger())
    assert caplog.text.count("the life before was online") == 1
    found = [row for run in wandb.runs for row in run.logged]
    assert found == told(tmp_path)


async def test_what_a_folder_that_is_gone_held_is_not_logged_again(
    tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    await fit(tmp_path, 10, WandbLogger(mode="offline"))
    shutil.rmtree(wandb.runs[0].file.parent)  # as `wandb clean` does once it is synced
    await fit(tmp_path, 12, WandbLogger(mode="offline"))
    assert [row["step"] for row in wandb.runs[1].logged if "loss" in row] == [12]
    assert "is gone" in caplog.text


async def test_files_of_a_strange_version_are_said(
    tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    await fit(tmp_path, 10, WandbLogger(mode="offline"))
    wandb.runs[0].file.write_bytes(transaction_log([b"no message"]))
    await fit(tmp_path, 12, WandbLogger(mode="offline"))
    assert [row["step"] for row in wandb.runs[1].logged if "loss" in row] == [12]
    assert "can't be read" in caplog.text


async def test_media_are_theirs(tmp_path: Path, wandb: Wandb) -> None:
    media = {"grey": np.zeros((2, 3)), "rgb": np.zeros((2, 5, 3)), "t": {"a": [1]}, "h": np.arange(4.0)}
    await fit(tmp_path, 4, WandbLogger(), log=media)
    (shown,) = [row for row in wandb.runs[0].logged if "rgb" in row]
    assert shown.pop("step") >= 1
    kinds = {"grey": ("image", (2, 3)), "rgb": ("image", (2, 5, 3)), "t": ("table", (["a"], [[1]]))}
    assert shown == {**kinds, "h": ("histogram", 4)}


def test_resources_have_names_of_their_own(wandb: Wandb) -> None:
    logger = WandbLogger()
    logger.on_train_begin(TrainBegin())
    for _ in range(2):
        logger.on_log(Log(step=3, split="resource", values={"cpu": 0.5}))
    assert wandb.runs[0].logged == [{"resource/cpu": 0.5, "step": 3}] * 2


def test_a_fit_that_failed_is_marked(wandb: Wandb) -> None:
    logger = WandbLogger()
    logger.on_train_begin(TrainBegin())
    logger.on_train_end(TrainEnd(reason="failed"))
    assert wandb.runs[0].exit_code == 1


def test_a_run_that_cannot_begin_is_an_error_with_what_to_do(wandb: Wandb) -> None:
    wandb.refusal = RuntimeError("api_key not configured (no-tty)\nmore")
    with pytest.raises(EnvironmentProblem, match=r"wandb begins no run: api_key not configured \(no-tty\)$") as caught:
        WandbLogger().on_train_begin(TrainBegin())
    assert "offline" in caught.value.hint


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, wandb: Wandb) -> None:
    with pytest.raises(ConfigError, match="mode"):
        WandbLogger(mode="sometimes")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="WandbLogger needs the package wandb"):
        WandbLogger()
