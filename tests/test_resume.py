"""What a resume promises: another run is refused with a table, another rate goes on, what is made again is said."""

from __future__ import annotations

import asyncio
import copy
import errno
import json
import logging
import os
import pwd
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain import checkpoint, resume
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.callbacks.once import Once
from streamtrain.disk import LOCAL, NEW, sync_folder
from streamtrain.errors import CheckpointError, ConfigError, EnvironmentProblem
from streamtrain.events import Log, TrainBegin
from streamtrain.schedulers import get_lr
from streamtrain.state import Snapshot
from streamtrain.trainer import Trainer
from tests.disks import MemoryDisk, RefusingDisk
from tests.engine import Samples, lines, network, same


def trainer(folder: Path, loss: Any = None, **options: Any) -> Trainer:
    common = {"seed": 5, "device": "cpu", "log_every": 1, "run_dir": folder}
    return Trainer(network(), loss or nn.MSELoss(), **{**common, **options})


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss": nn.L1Loss()}, r"loss: .MSELoss\(reduction='mean'\). -> .L1Loss\("),
    "loss's own keywords": ({"loss": nn.MSELoss(reduction="sum")}, "loss: "),
    "step": ({"step": lambda model, batch: model(batch.inputs).mean()}, "loss: .MSELoss.* -> 'step .*lambda"),
    "precision": ({"precision": "bf16"}, "precision: '32' -> 'bf16'"),
    "optimizer": ({"optimizer": "sgd"}, "optimizer.class: 'AdamW' -> 'SGD'"),
    "weight decay": ({"optimizer": {"name": "adamw", "weight_decay": 0.5}}, r"weight_decay: 0\.01 -> 0\.5"),
    "seed": ({"seed": 6}, "seed: 5 -> 6"),
    "scheduler": ({"scheduler": "cosine"}, "scheduler: "),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_another_run_is_refused_with_a_table_of_the_differences(tmp_path: Path, change: str) -> None:
    await trainer(tmp_path).fit(Samples(), max_steps=3)
    options, told = CHANGES[change]
    with pytest.raises(CheckpointError, match=rf"does not fit \(saved -> now\): .*{told}"):
        await trainer(tmp_path, **options).fit(Samples(), max_steps=6, resume="auto")


async def test_the_loss_by_name_and_as_an_object_is_the_same_run(tmp_path: Path) -> None:
    await trainer(tmp_path).fit(Samples(), max_steps=3)
    assert (await trainer(tmp_path, "mse").fit(Samples(), max_steps=6, resume="auto")).step == 6


async def test_a_run_goes_on_with_another_learning_rate(tmp_path: Path) -> None:
    rules = {"name": "adamw", "rules": [["bias$", {"lr": 4e-3}]]}
    first = trainer(tmp_path / "a", optimizer=rules, lr=2e-3)
    await first.fit(Samples(), max_steps=3)
    rules = {"name": "adamw", "rules": [["bias$", {"lr": 6e-4}]]}
    again = trainer(tmp_path / "a", optimizer=rules, lr=3e-4)
    await again.fit(Samples(), max_steps=6, resume="auto")
    assert again.optimizer is not None
    assert sorted(group["lr"] for group in again.optimizer.param_groups) == [3e-4, 6e-4]
    assert [line["lr"] for line in lines(tmp_path / "a")] == [lines(tmp_path / "a")[0]["lr"]] * 3 + [
        get_lr(again.optimizer)
    ] * 3
    last = trainer(tmp_path / "a", optimizer=rules, lr=3e-4)
    await last.fit(Samples(), max_steps=8, resume="auto")
    assert last.optimizer is not None
    assert get_lr(last.optimizer) == get_lr(again.optimizer)


async def test_a_schedule_goes_on_in_proportion(tmp_path: Path) -> None:
    rates = []
    for folder, lr in (("a", 1e-2), ("b", 2e-2)):
        await trainer(tmp_path / folder, lr=1e-2, scheduler="cosine").fit(Samples(), max_epochs=2)
        (tmp_path / folder / "metrics.jsonl").rename(tmp_path / folder / "first.jsonl")
        fitted = trainer(tmp_path / folder, lr=lr, scheduler="cosine")
        await fitted.fit(Samples(), max_epochs=4, resume="auto")
        rates.append([line["lr"] for line in lines(tmp_path / folder) if line["step"] > 26])
    assert len(rates[0]) == 26
    assert [2 * rate for rate in rates[0]] == pytest.approx(rates[1], rel=1e-12)


TORCHS = torch.optim.lr_scheduler
CYCLE: dict[str, Any] = {"base_lr": 1e-4, "max_lr": 1e-3, "step_size_up": 3}


@pytest.mark.parametrize(
    ("kind", "keywords"),
    [
        (TORCHS.ConstantLR, {"total_iters": 4}),
        (TORCHS.CosineAnnealingLR, {"T_max": 10}),
        (TORCHS.CosineAnnealingWarmRestarts, {"T_0": 4}),
        (TORCHS.CyclicLR, {**CYCLE, "cycle_momentum": False}),
        (TORCHS.CyclicLR, {**CYCLE, "scale_fn": lambda x: 1 / (5 ** (x * 0.0001)), "cycle_momentum": False}),
        (TORCHS.ExponentialLR, {"gamma": 0.9}),
        (TORCHS.LambdaLR, {"lr_lambda": lambda step: 0.9**step}),
        (TORCHS.LinearLR, {"total_iters": 4}),
        (TORCHS.MultiplicativeLR, {"lr_lambda": lambda step: 0.9}),
        (TORCHS.MultiStepLR, {"milestones": [2, 7]}),
        (TORCHS.OneCycleLR, {"max_lr": 1e-2, "total_steps": 20}),
        (TORCHS.PolynomialLR, {"total_iters": 9}),
        (TORCHS.StepLR, {"step_size": 3}),
        (lambda opt: TORCHS.ChainedScheduler([TORCHS.StepLR(opt, 3), TORCHS.CyclicLR(opt, **CYCLE)]), None),
        (lambda opt: TORCHS.SequentialLR(opt, [TORCHS.ConstantLR(opt), TORCHS.CyclicLR(opt, **CYCLE)], [3]), None),
    ],
)
async def test_each_of_torchs_schedules_goes_on_where_it_was(tmp_path: Path, kind: Any, keywords: Any) -> None:
    async def fit(folder: str, steps: int) -> Trainer:
        scheduler = kind if keywords is None else {"name": kind, **keywords}
        fitted = trainer(tmp_path / folder, optimizer="adamw", scheduler=scheduler)
        await fitted.fit(Samples(), max_steps=steps, resume="auto")
        return fitted

    whole = await fit("whole", 13)
    await fit("cut", 5)
    cut = await fit("cut", 13)
    assert same(cut.model, whole.model)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


async def test_rates_of_groups_in_no_one_proportion_are_refused(tmp_path: Path) -> None:
    rules = {"name": "adamw", "rules": [["bias$", {"lr": 4e-3}]]}
    await trainer(tmp_path, optimizer=rules, lr=2e-3).fit(Samples(), max_steps=3)
    with pytest.raises(CheckpointError, match=r"lr: 0\.002 -> 0\.001"):
        await trainer(tmp_path, optimizer=rules, lr=1e-3).fit(Samples(), max_steps=6, resume="auto")


async def test_a_group_whose_rate_is_0_in_both_lives_goes_on_with_any_other(tmp_path: Path) -> None:
    rules = {"name": "adamw", "rules": [["bias$", {"lr": 0}]]}
    await trainer(tmp_path, optimizer=rules, lr=2e-3).fit(Samples(), max_steps=3)
    again = trainer(tmp_path, optimizer=rules, lr=1e-3)
    await again.fit(Samples(), max_steps=6, resume="auto")
    assert again.optimizer is not None
    assert [group["lr"] for group in again.optimizer.param_groups] == [1e-3, 0.0]
    rules = {"name": "adamw", "rules": [["bias$", {"lr": 1e-3}]]}
    with pytest.raises(CheckpointError, match=r"lr: 0 -> 0\.001"):
        await trainer(tmp_path, optimizer=rules, lr=1e-3).fit(Samples(), max_steps=9, resume="auto")


async def test_rates_that_are_whole_numbers_are_rates(tmp_path: Path) -> None:
    def sgd(lr: float) -> Any:
        return lambda parameters: torch.optim.SGD(parameters, lr=lr)

    await trainer(tmp_path, optimizer=sgd(1)).fit(Samples(), max_steps=1)
    again = trainer(tmp_path, optimizer=sgd(0.5))
    await again.fit(Samples(), max_steps=2, resume="auto")
    assert again.optimizer is not None
    assert get_lr(again.optimizer) == 0.5


async def test_limits_callbacks_and_what_is_only_said_may_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await trainer(tmp_path).fit(Samples(), max_steps=3)
    again = trainer(tmp_path, callbacks=[ModelCheckpoint(every="2steps")], gradient_clip_norm=1.0, ema=0.9)
    result = await again.fit(Samples(batch_size=4), max_epochs=1, resume="auto")
    assert result.samples == 100
    assert "resumed with gradient_clip_norm: None -> 1.0" in caplog.text
    assert "resumed with batch_size: 8 -> 4" in caplog.text


async def test_what_a_life_before_did_not_keep_is_not_said_to_have_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = trainer(tmp_path / "a")
    await fitted.fit(Samples(), max_steps=3)
    assert fitted._run.life is not None
    del fitted._run.life.habits["batch_size"]
    path = await fitted.save_checkpoint(tmp_path / "old")
    await trainer(tmp_path / "b").fit(Samples(), max_steps=6, resume=path)
    assert "resumed with" not in caplog.text


async def test_a_checkpoint_of_before_losses_were_told_goes_on(tmp_path: Path) -> None:
    fitted = trainer(tmp_path)
    await fitted.fit(Samples(), max_steps=3)
    life = fitted._run.life
    assert life is not None
    del life.settings["loss"]
    path = await fitted.save_checkpoint(tmp_path / "old")
    assert (await trainer(tmp_path / "new").fit(Samples(), max_steps=6, resume=path)).step == 6


async def test_steps_that_are_made_again_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rule = ModelCheckpoint(every="4steps", keep_last=-1)
    await trainer(tmp_path, callbacks=[rule]).fit(Samples(), max_steps=10)
    caplog.set_level(logging.INFO)
    last = tmp_path / "checkpoints" / "step-000000010"
    last.rename(tmp_path / "lost")  # as if the life had been killed before it was made
    await trainer(tmp_path, callbacks=[rule]).fit(Samples(), max_steps=12, resume="auto")
    found = re.search(r"at step (\d+); (\d+) steps that were made after it are repeated", caplog.text)
    assert found is not None
    assert int(found[1]) + int(found[2]) == 10
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))


@pytest.mark.parametrize(
    ("status", "log", "again"),
    [
        (None, None, 0),
        ('{"step": 9}', None, 4),
        ("{", b'{"step": 7}\n{"st', 2),
        ('{"step": 1e999}', b"[" * 9000 + b'\n{"step": 7}\n', 2),
        ('{"step": 2}', b'{"step": 8}\n', 3),
    ],
)
def test_what_was_reached_is_read_from_whatever_is_left(
    tmp_path: Path, status: str | None, log: bytes | None, again: int
) -> None:
    if status is not None:
        (tmp_path / "status.json").write_text(status)
    if log is not None:
        (tmp_path / "metrics.jsonl").write_bytes(log)
    assert resume.repeated(tmp_path, 5) == again


async def test_a_run_with_another_rate_is_the_bare_loops_from_there_on(tmp_path: Path) -> None:
    common: dict[str, Any] = {"optimizer": "sgd"}
    await trainer(tmp_path / "a", lr=1e-2, **common).fit(Samples(), max_steps=5)
    again = trainer(tmp_path / "a", lr=1e-3, **common)
    await again.fit(Samples(), max_steps=10, resume="auto")
    set_there, stream = trainer(tmp_path / "b", lr=1e-2, **common), Samples()
    await set_there.fit(stream, max_steps=5)
    assert set_there.optimizer is not None
    for group in set_there.optimizer.param_groups:
        group["lr"] = 1e-3
    await set_there.fit(stream, max_steps=10)
    assert same(again.model, set_there.model)
    assert json.loads((tmp_path / "a" / "status.json").read_text())["step"] == 10


class Tracker(Callback):
    """A logger whose lines can't be cut off again."""

    def __init__(self) -> None:
        self.once, self.steps = Once(), list[int]()

    async def on_train_begin(self, event: TrainBegin) -> None:
        await asyncio.to_thread(self.once.begin, event.step, Path(str(event.run_dir)) / ".tracker-lines")

    def on_log(self, event: Log) -> None:
        if self.once.first(event):
            self.once.handed(event)
            self.steps.append(event.step)


async def test_lines_of_a_future_that_is_given_up_keep_nobody_from_handing_over_those_of_another(
    tmp_path: Path,
) -> None:
    rule = ModelCheckpoint(every="3steps", keep_last=-1)
    await trainer(tmp_path, callbacks=[rule, Tracker()]).fit(Samples(), max_steps=9)
    tracker = Tracker()
    again = trainer(tmp_path, callbacks=[rule, tracker], lr=1e-4)
    await again.fit(Samples(), max_steps=9, resume=tmp_path / "checkpoints" / "step-000000003")
    assert tracker.steps == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("name", ["step-final", "step-12.bak"])
async def test_a_folder_whose_names_are_no_checkpoints_is_refused_as_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        with pytest.raises(CheckpointError, match=rf"checkpoint {folder}: manifest.json, it is missing"):
            await trainer(tmp_path / "new").fit(Samples(), max_steps=3, resume=folder)


@pytest.mark.parametrize("name", ["x" * 300, "loop", "loop/checkpoints/step-000000001"])
async def test_a_path_that_can_t_be_looked_at_is_refused_with_the_cause(tmp_path: Path, name: str) -> None:
    """The system's own error came up, as if it were one of ours."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    made = trainer(tmp_path / "run")
    for asked in (made.fit(Samples(), resume=tmp_path / name), made.load_checkpoint(tmp_path / name)):
        with pytest.raises(CheckpointError, match=f"{tmp_path / name} can't be read: (File name too long|Too many)"):
            await asked
    with pytest.raises(CheckpointError, match="can't be read"):
        await made.load_weights(tmp_path / name)


async def test_a_path_that_no_file_has_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    for asked in (made.load_checkpoint("a\0b"), made.load_weights("a\0b"), made.fit(Samples(), resume="a\0b")):
        with pytest.raises(ConfigError, match="must be 'auto', 'best' or a path, not"):
            await asked


def test_checkpoints_that_may_not_be_listed_are_not_taken_for_none() -> None:
    """A run began anew beside them, and had trained for nothing when it came to save."""
    folder = Path(tempfile.mkdtemp())
    (folder / "checkpoints" / "step-000000001").mkdir(parents=True)
    folder.chmod(0o711)
    (folder / "checkpoints").chmod(0o311)
    before = os.geteuid()
    try:
        if before == 0:  # who may list everything
            os.seteuid(pwd.getpwnam("nobody").pw_uid)
        with pytest.raises(EnvironmentProblem, match=f"the run folder {folder} can't be read: Permission denied"):
            resume.refuse_unasked(folder / "checkpoints")
    finally:
        os.seteuid(before)
        (folder / "checkpoints").chmod(0o700)
        shutil.rmtree(folder)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "scheduler"])
async def test_a_loaded_checkpoint_is_refused_as_a_resumed_one_is(tmp_path: Path, change: str) -> None:
    """Before anything is changed; what only matters to a fit, once there is one."""
    path = (await trainer(tmp_path / "a").fit(Samples(), max_steps=3)).checkpoint
    options, told = CHANGES[change]
    again, fresh = trainer(tmp_path / "b", **options), network()
    if change in ("precision", "seed"):
        await again.load_checkpoint(str(path))
        fresh = copy.deepcopy(again.model)
    with pytest.raises(CheckpointError, match=rf"does not fit \(saved -> now\): .*{told}"):
        await (again.load_checkpoint(str(path)) if again.state.step == 0 else again.fit(Samples(), max_steps=6))
    assert same(again.model, fresh)


async def test_a_checkpoint_is_loaded_without_a_loss_to_predict_with(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    await first.fit(Samples(), max_steps=3)
    lossless = Trainer(network(), device="cpu")
    await lossless.load_checkpoint(tmp_path)
    assert same(lossless.model, first.model)


@pytest.mark.parametrize("schedule", [None, "cosine", {"name": "torch.optim.lr_scheduler.StepLR", "step_size": 4}])
async def test_a_loaded_checkpoint_goes_on_with_another_learning_rate_as_a_resumed_one_does(
    tmp_path: Path, schedule: Any
) -> None:
    rules = {"name": "adamw", "rules": [["bias$", {"lr": 4e-3}]]}
    first = trainer(tmp_path / "a", optimizer=rules, lr=2e-3, scheduler=schedule)
    path = (await first.fit(Samples(), max_steps=6)).checkpoint
    rules = {"name": "adamw", "rules": [["bias$", {"lr": 6e-4}]]}
    given: dict[str, Any] = {"optimizer": rules, "lr": 3e-4, "scheduler": schedule}
    one, other = trainer(tmp_path / "b", **given), trainer(tmp_path / "c", **given)
    await one.fit(Samples(), max_steps=12, resume=path)
    await other.load_checkpoint(str(path))
    await other.fit(Samples(), max_steps=12)
    assert same(one.model, other.model)
    rates = [[line["lr"] for line in lines(tmp_path / folder) if line["step"] > 6] for folder in "bc"]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 6


async def test_a_schedule_that_begins_anew_has_the_rate_of_now(tmp_path: Path) -> None:
    path = (await trainer(tmp_path / "a", lr=1e-2).fit(Samples(), max_steps=3)).checkpoint
    again = trainer(tmp_path / "b", lr=1e-3, scheduler={"name": "step", "step_size": 100})
    await again.load_checkpoint(str(path))
    await again.fit(Samples(), max_steps=6)
    assert [line["lr"] for line in lines(tmp_path / "b")] == [1e-3] * 3


class Reading(MemoryDisk):
    """Notes which files were opened, and how many of their bytes were read."""

    def __init__(self) -> None:
        super().__init__()
        self.opened, self.bytes = Counter[str](), Counter[str]()
        self._names: dict[int, str] = {}

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        self._names[fd] = f"{path.parent.name}/{path.name}"
        self.opened[self._names[fd]] += 1
        return fd

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        count = super().read(fd, into, offset)
        self.bytes[self._names[fd]] += count
        return count


CHECKPOINTS = Path("/run/checkpoints")


def a_run(*steps: int) -> Reading:
    """On a disk that is nowhere else: whatever is not read by it is not found. The oldest is the best."""
    disk = Reading()
    for step in steps:
        made = Snapshot(
            model={"weight": torch.full((1 << 18,), float(step))},
            optimizer={"m": torch.zeros(4)},
            state={
                "step": step,
                "progress": {"bests": [["loss", 1.0, 0, steps[0], f"step-{steps[0]}"]], "best": "loss"},
            },
        )
        checkpoint.commit(CHECKPOINTS / f"step-{step}", made, disk=disk)
    for name in (".wandb-lines", "metrics.jsonl"):
        disk.close(disk.open(CHECKPOINTS.parent / name, NEW))
    sync_folder(CHECKPOINTS.parent, disk)
    disk.opened.clear()
    disk.bytes.clear()
    return disk


@pytest.mark.parametrize(("asked", "step"), [("auto", 3), ("best", 1), ("/run", 3), (CHECKPOINTS, 3)])
def test_the_checkpoint_to_go_on_from_is_digested_once_and_read_through_the_disk_that_is_given(
    asked: str | Path, step: int
) -> None:
    disk = a_run(1, 2, 3)
    found = resume.find(CHECKPOINTS, asked, disk=disk)
    assert found is not None
    assert (found[0].name, found[1].state["step"]) == (f"step-{step}", step)
    assert {name: count for name, count in disk.opened.items() if count > 1 and "." in name} == {}
    size = disk.stat(CHECKPOINTS / "step-3" / "model.safetensors").st_size
    assert size < disk.bytes["step-3/model.safetensors"] <= 2 * size + 100, "once for the digest, once for the tensors"


def test_a_damaged_newest_is_passed_over_in_the_same_reading(caplog: pytest.LogCaptureFixture) -> None:
    disk = a_run(1, 2)
    disk.unlink(CHECKPOINTS / "step-2" / "state.json")
    found = resume.find(CHECKPOINTS, "auto", disk=disk)
    assert found is not None
    assert found[0].name == "step-1"
    assert "going back to step-1 repeats 1 steps" in caplog.text


def test_what_is_set_aside_stays_so_after_a_power_cut() -> None:
    disk = a_run(1, 2, 3)
    resume.set_newer_aside(CHECKPOINTS, CHECKPOINTS / "step-1", 1, disk=disk)
    for image in disk.images():
        after = MemoryDisk(image)
        assert sorted(after.names(CHECKPOINTS)) == ["abandoned-step-2", "abandoned-step-3", "step-1"]
        assert ".wandb-lines" not in after.names(CHECKPOINTS.parent)


def test_a_disk_that_refuses_to_set_aside_is_an_error_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "step-2").mkdir()
    disk = RefusingDisk(LOCAL, 0, errno.EIO, kinds=frozenset({"rename"}))
    with pytest.raises(EnvironmentProblem, match=r"can't set newer checkpoints in .* aside: .*Input/output error"):
        resume.set_newer_aside(tmp_path, tmp_path / "step-1", 1, disk=disk)


async def test_the_scale_of_half_precision_goes_on_where_it_was(tmp_path: Path) -> None:
    """Which is refused on a CPU, where it would be slow; the scaler is the same there."""

    def made(folder: str) -> Trainer:
        more: dict[str, Any] = {"seed": 5, "device": "cpu", "nonfinite": "skip", "run_dir": tmp_path / folder}
        trainer = Trainer(network(), nn.MSELoss(), precision="bf16", **more)
        for options in (trainer._options, trainer._parts.options):
            object.__setattr__(options, "precision", "16")
        return trainer

    await (whole := made("whole")).fit(Samples(), max_steps=12)
    await made("broken").fit(Samples(), max_steps=5)
    newest = await asyncio.to_thread(checkpoint.newest_valid, tmp_path / "broken" / "checkpoints")
    assert newest is not None
    scaler = (await asyncio.to_thread(checkpoint.read, newest.path)).state["scaler"]
    assert scaler["scale"] < 65536, "updates were left out, and it was lowered"
    await (broken := made("broken")).fit(Samples(), max_steps=12, resume="auto")
    assert same(whole.model, broken.model)
