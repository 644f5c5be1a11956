"""A save that fails costs nothing that was saved before; the run ends once it has failed again and again."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamtrain import Callback, ModelCheckpoint, Trainer, buffers, checkpoint
from streamtrain.disk import LOCAL, Disk, LocalDisk
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import CheckpointError, EnvironmentProblem, UserCodeError
from streamtrain.events import Event
from streamtrain.file_thread import file_thread
from streamtrain.life import Life
from streamtrain.saving import Saver
from streamtrain.state import Copier, Snapshot, Tree
from tests.disks import RefusingDisk
from tests.engine import Recorder, Samples, network, same
from tests.test_checkpoint import problems, put, snapshot

IN_A_COMMIT = frozenset({"mkdir", "open", "write", "fsync", "rename"})


def operations(tmp_path: Path) -> list[str]:
    """What one commit beside another asks of the disk."""
    disk = RefusingDisk(LOCAL, kinds=IN_A_COMMIT)
    put(tmp_path / "counted", 1)
    checkpoint.commit(tmp_path / "counted" / "step-2", snapshot(2), disk=disk)
    return disk.asked


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_whatever_fails_in_a_save_the_one_before_stands_and_the_error_names_path_and_cause(
    tmp_path: Path, code: int
) -> None:
    asked = operations(tmp_path)
    assert set(asked) == IN_A_COMMIT
    for number in range(len(asked)):
        folder = tmp_path / str(number)
        put(folder, 1)
        disk = RefusingDisk(LOCAL, number, code, kinds=IN_A_COMMIT)
        with pytest.raises(EnvironmentProblem) as caught:
            checkpoint.commit(folder / "step-2", snapshot(2), disk=disk)
        assert str(folder / "step-2") in str(caught.value)
        assert os.strerror(code) in str(caught.value)
        assert [path.name for path in folder.iterdir()] == ["step-000000001"]
        assert problems(folder) == {"step-000000001": None}


class Lies(LocalDisk):
    """Keeps other bytes than it was given."""

    def write(self, fd: int, data: memoryview) -> int:
        return super().write(fd, memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1])))


def test_what_does_not_read_back_as_it_was_written_gets_no_name(tmp_path: Path) -> None:
    put(tmp_path, 1)
    with pytest.raises(EnvironmentProblem, match=r"does not read back as it was written: manifest\.json, "):
        checkpoint.commit(tmp_path / "step-2", snapshot(2), disk=Lies())
    assert problems(tmp_path) == {"step-000000001": None}


class Failing(LocalDisk):
    """Refuses so many syncs in checkpoints (or of files whose names end so), or says that so many bytes are free."""

    def __init__(self, *, syncs: int = 0, free: int = 1 << 40, of: str = "/checkpoints/") -> None:
        self.syncs, self.left, self.of = syncs, free, of

    def fsync(self, fd: int) -> None:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if self.syncs and (self.of in name if self.of.endswith("/") else name.endswith(self.of)):
            self.syncs -= 1
            raise OSError(errno.EIO, "Input/output error")
        super().fsync(fd)

    def free(self, path: Path) -> int:
        return self.left


def on(disk: Disk, run: Path, recorder: Recorder) -> Trainer:
    callbacks = [ModelCheckpoint(every="3steps"), recorder]
    made = Trainer(network(), nn.MSELoss(), run_dir=run, callbacks=callbacks, seed=5, device="cpu")
    made._run.disk = disk
    return made


async def test_a_failed_save_is_told_and_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    recorder = Recorder()
    quiet, hit = on(LOCAL, tmp_path / "a", Recorder()), on(Failing(syncs=1), tmp_path / "b", recorder)
    await quiet.fit(Samples(), max_epochs=2)
    result = await hit.fit(Samples(), max_epochs=2)
    (event,) = recorder.events("on_checkpoint_failed")
    assert (event.step, event.failures, event.kind) == (3, 1, "periodic")
    assert "Input/output error" in str(event.error)
    assert result.checkpoint == tmp_path / "b" / "checkpoints" / "step-000000026"
    assert same(quiet.model, hit.model)
    told = [json.loads(line) for line in (tmp_path / "b" / "events.jsonl").read_text().splitlines()]
    (line,) = (line for line in told if line["event"] == "checkpoint_failed")
    assert (line["step"], line["path"]) == (3, str(tmp_path / "b" / "checkpoints" / "step-000000003"))


async def test_a_best_whose_checkpoint_is_gone_is_said_at_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def made() -> Trainer:
        rule = ModelCheckpoint(every="1epoch", monitor="val_loss", mode="max", keep_last=3)  # of a loss that falls
        return Trainer(network(), nn.MSELoss(), lr=1e-3, run_dir=tmp_path, callbacks=[rule], seed=5, device="cpu")

    result = await made().fit(Samples(), Samples(), max_epochs=3)
    assert result.best is not None
    assert result.best.checkpoint is not None
    assert result.best.checkpoint != result.checkpoint
    await made().fit(Samples(), Samples(), max_epochs=3, resume="auto")
    assert not [record for record in caplog.records if "not there any more" in record.getMessage()]
    shutil.rmtree(result.best.checkpoint)
    await made().fit(Samples(), Samples(), max_epochs=4, resume="auto")
    (said,) = [record.getMessage() for record in caplog.records if "not there any more" in record.getMessage()]
    assert f"step {result.best.step} as the best val_loss ({result.best.value:g})" in said


async def test_a_log_that_can_not_be_synced_costs_no_checkpoint_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    result = await on(Failing(syncs=10**9, of=".jsonl"), tmp_path, recorder).fit(Samples(), max_epochs=2)
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000000026"
    assert not recorder.events("on_checkpoint_failed")
    assert caplog.text.count(f"a power cut may cost lines of the log in {tmp_path}") == 1


class Watching(LocalDisk):
    """Looks, when a checkpoint gets its name, which lines of the log a power cut could not take."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lasting: dict[str, set[int]] = {}
        """Steps of the lines in `metrics.jsonl`, checkpoint by checkpoint."""
        self.run, self._sync, self._safe = run, os.fsync, b""
        monkeypatch.setattr(os, "fsync", self._synced)

    def _synced(self, descriptor: int) -> None:
        self._sync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(self.run / "metrics.jsonl"):
            self._safe = (self.run / "metrics.jsonl").read_bytes()

    def rename(self, old: Path, new: Path) -> None:
        if re.fullmatch(r"step-\d{9}", new.name):
            state = json.loads((old / "state.json").read_bytes())
            lines: list[str] = [*self._safe.decode().splitlines(), *_unwritten(state)]
            self.lasting[new.name] = {int(json.loads(line)["step"]) for line in lines}
        super().rename(old, new)


def _unwritten(state: Any) -> list[str]:
    """The lines of metrics that travel in a checkpoint."""
    if not isinstance(state, dict):
        return []
    lines: list[str] = [line for line in state.get("unwritten", []) if line.startswith('{"step"')]
    return lines + [line for each in state.values() for line in _unwritten(each)]


async def test_the_lines_of_the_log_before_a_checkpoint_survive_a_power_cut_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamtrain.callbacks.lines.GATHER", 0.0)  # lines are in the file, not in checkpoints
    disk = Watching(tmp_path, monkeypatch)
    trainer = Trainer(
        network(),
        nn.MSELoss(),
        run_dir=tmp_path,
        callbacks=[ModelCheckpoint(every="5steps")],
        log_every=1,
        device="cpu",
    )
    trainer._run.disk = disk
    result = await trainer.fit(Samples(), max_epochs=8)
    assert len(disk.lasting) > 1
    for name, steps in disk.lasting.items():
        assert steps >= set(range(1, int(name[5:]) + 1))
    assert result.step == int(max(disk.lasting)[5:])


async def test_the_third_failed_save_in_a_row_ends_the_run_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    await on(LOCAL, tmp_path, Recorder()).fit(Samples(), max_epochs=1)
    recorder = Recorder()
    again = on(Failing(syncs=10**9), tmp_path, recorder)
    with pytest.raises(EnvironmentProblem) as caught:
        await again.fit(Samples(), max_epochs=100, resume="auto")
    assert caught.value.exit_code == 5
    assert str(caught.value).endswith(f"in a row: 3); the last good one is {tmp_path}/checkpoints/step-000000013")
    assert [event.failures for event in recorder.events("on_checkpoint_failed")] == [1, 2, 3]
    assert (await asyncio.to_thread(problems, tmp_path / "checkpoints"))["step-000000013"] is None


class Breaks(Callback):
    """Takes the room away once there is a checkpoint, and fails some steps later."""

    def __init__(self, disk: Failing) -> None:
        self._disk, self._kept = disk, 0

    def on_checkpoint(self, event: Event) -> None:
        self._disk.left, self._kept = 5, event.step

    def on_batch_end(self, event: Event) -> None:
        if 0 < self._kept < event.step:
            raise ValueError("broken")


async def test_where_nothing_can_be_saved_after_an_error_that_is_said_with_what_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Failing()
    trainer = on(disk, tmp_path, Recorder())
    trainer.callbacks.append(Breaks(disk))
    with pytest.raises(UserCodeError, match="broken"):
        await trainer.fit(Samples(), max_epochs=1000)
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    told = re.search(r"^after the error step (\d+) could not be saved either: .*/step-(\d+), (\d+) step", said)
    assert told is not None, said
    assert int(told[1]) - int(told[2]) == int(told[3])


class Fills(Recorder):
    """Takes the room away after the first save."""

    def __init__(self, disk: Failing) -> None:
        super().__init__()
        self._disk = disk

    async def on_checkpoint(self, event: Event) -> None:
        self._disk.left = 5


async def test_where_there_is_no_room_no_snapshot_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, taken, real = Failing(), [], Life.snapshot

    def snapshot(self: Life, state: Tree, copier: Copier) -> Snapshot:
        taken.append(state["step"])
        return real(self, state, copier)

    monkeypatch.setattr(Life, "snapshot", snapshot)
    recorder = Fills(disk)
    with pytest.raises(EnvironmentProblem, match=r"the disk is full: .* needs [\d,]+ bytes, 5 bytes are free"):
        await on(disk, tmp_path, recorder).fit(Samples(), max_epochs=100)
    assert taken == [3]
    assert [event.failures for event in recorder.events("on_checkpoint_failed")] == [1, 2, 3]


async def test_a_save_for_whose_snapshot_there_is_no_memory_has_failed_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two times that memory is asked for: before the first snapshot, and for it."""
    asked: list[int] = []
    pages = buffers._pages

    def refused(size: int) -> Any:
        asked.append(size)
        if len(asked) <= 2:
            raise MemoryError("no pages")
        return pages(size)

    monkeypatch.setattr(buffers, "_pages", refused)
    recorder = Recorder()
    hit = on(LOCAL, tmp_path, recorder)
    result = await hit.fit(Samples(), max_epochs=2)
    (event,) = recorder.events("on_checkpoint_failed")
    assert (event.step, event.failures, event.kind) == (3, 1, "periodic")
    assert "no memory for a snapshot" in str(event.error)
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000000026"


async def test_nor_has_one_to_a_place_of_its_own_and_whoever_asked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Asks(Callback):
        async def on_epoch_end(self, event: Event) -> None:
            with pytest.raises(EnvironmentProblem) as caught:
                await fitted.save_checkpoint(tmp_path / "elsewhere")
            told.append(str(caught.value))

    def refused(size: int) -> Any:
        raise MemoryError("no pages")

    recorder = Recorder()
    callbacks = [ModelCheckpoint(every="1000steps"), Asks(), recorder]
    fitted = Trainer(network(), nn.MSELoss(), run_dir=tmp_path / "run", callbacks=callbacks, seed=5, device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr(buffers, "_pages", refused)
        with pytest.raises(EnvironmentProblem, match="no memory for a snapshot"):  # of the end, which saves
            await fitted.fit(Samples(), max_epochs=2)
    assert len(told) == 2
    assert told[0].startswith("no memory for a snapshot")
    assert [event.kind for event in recorder.events("on_checkpoint_failed")] == ["end"]
    assert fitted.state.step == 26


class Held(LocalDisk):
    """Keeps whoever opens the file of this name for the first time until its gate is open."""

    def __init__(self, name: str) -> None:
        self._name, self.entered, self.gate = name, threading.Event(), threading.Event()

    def open(self, path: Path, flags: int) -> int:
        if path.name == self._name and not self.entered.is_set():
            self.entered.set()
            assert self.gate.wait(60)
        return super().open(path, flags)


async def test_a_save_whose_task_is_cancelled_before_its_first_step_is_made_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `asyncio.run` at its end, in the turn of the loop in which it began: the run had no checkpoint."""
    begin, begun, recorder, stream = Saver.begin, asyncio.Event(), Recorder(), Samples()
    stream.gates[24] = asyncio.Event()  # behind the step that is saved

    def cut(self: Saver, *arguments: Any, **how: Any) -> None:
        begin(self, *arguments, **how)
        if not begun.is_set():
            begun.set()
            for task in asyncio.all_tasks() - {whoever}:
                task.cancel()

    monkeypatch.setattr(Saver, "begin", cut)
    whoever = asyncio.current_task()
    fitted = on(LOCAL, tmp_path, recorder)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(fitted.fit(stream, max_epochs=2))
    assert [event.step for event in recorder.events("on_checkpoint")] == [3]
    assert fitted.checkpoint == tmp_path / "checkpoints" / "step-000000003"


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
async def test_a_save_under_way_is_made_and_told_where_every_task_is_cancelled(tmp_path: Path, name: str) -> None:
    """As by `asyncio.run` at its end. The stream stands still behind the step that is saved: no other save follows."""
    disk, recorder, stream = Held(name), Recorder(), Samples()
    stream.gates[24] = asyncio.Event()
    fitted = on(disk, tmp_path, recorder)
    fit = asyncio.create_task(fitted.fit(stream, max_epochs=2))
    await asyncio.to_thread(disk.entered.wait)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    disk.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await fit
    assert [event.step for event in recorder.events("on_checkpoint")] == [3]
    assert fitted.checkpoint == tmp_path / "checkpoints" / "step-000000003"
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]


class Odd(Callback):
    """Keeps what no checkpoint can."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [1, {2}]}


async def test_what_a_callback_can_not_have_kept_is_found_before_the_first_step(tmp_path: Path) -> None:
    stream = Samples()
    with pytest.raises(CheckpointError, match=r"state\.callbacks\.Odd\.seen\[1\]: a set can't be kept"):
        await Trainer(network(), nn.MSELoss(), run_dir=tmp_path, callbacks=[Odd()], device="cpu").fit(stream)
    assert stream.passes == []
    assert not (tmp_path / "checkpoints").exists()


class Keeps(torch.optim.SGD):
    """An optimizer that keeps something odd once it has made an update."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["odd"] = {1, 2}


async def test_what_an_optimizer_can_not_have_kept_is_found_after_its_first_update(tmp_path: Path) -> None:
    model = network()
    fitted = Trainer(model, nn.MSELoss(), optimizer=Keeps(model.parameters(), lr=0.1), run_dir=tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match=r"^optimizer\.state\['0\.weight'\]\.odd: a set can't be kept"):
        await fitted.fit(Samples(), max_epochs=10_000)
    assert fitted.state.step < 1000


async def test_what_was_never_verified_pushes_out_nothing(tmp_path: Path) -> None:
    """The newest is rotten: the run went back to the one before it, and must not lose that, nor what it saves then."""

    async def nobody(*_: object) -> None:
        pass

    def rot() -> None:
        put(tmp_path, 10, 20)
        with open(tmp_path / "step-000000020" / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")

    await asyncio.to_thread(rot)
    rule, before = ModelCheckpoint(keep_last=1), tmp_path / "step-000000010"
    async with file_thread() as files:
        saver = Saver(tmp_path, rule, files, before=before)
        saver.begin(snapshot(15), 15, kind="periodic", told=nobody, failed=nobody)
        await saver.wait()
    left = await asyncio.to_thread(problems, tmp_path)
    assert left.pop("step-000000015") is None
    assert list(left) == ["step-000000020"]


class Gated(LocalDisk):
    """Syncs nothing before the gate opens."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()

    def fsync(self, fd: int) -> None:
        self.entered.set()
        self.gate.wait(60)
        super().fsync(fd)


class Breaking(torch.optim.SGD):
    """Breaks in the middle of its sixth update, while a save is under way."""

    disk: Gated
    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if self.calls == 6:
            self.disk.entered.wait(60)
            raise RuntimeError("torn")
        return super().step(closure)


async def test_a_save_under_way_is_waited_for_where_the_weights_are_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, disk, real = network(), Gated(), Saver.wait
    optimizer = Breaking(model.parameters(), lr=0.1)
    optimizer.disk = disk

    async def wait(self: Saver) -> None:
        if optimizer.calls == 6:  # the disk answers to whoever waits for it
            disk.gate.set()
        await real(self)

    monkeypatch.setattr(Saver, "wait", wait)
    trainer = Trainer(
        model,
        nn.MSELoss(),
        optimizer=optimizer,
        run_dir=tmp_path,
        callbacks=[ModelCheckpoint(every="3steps")],
        device="cpu",
    )
    trainer._run.disk = disk
    with pytest.raises(UserCodeError, match="torn"):
        await trainer.fit(Samples())
    assert await asyncio.to_thread(problems, tmp_path / "checkpoints") == {"step-000000003": None}
    assert trainer.checkpoint == tmp_path / "checkpoints" / "step-000000003"


class AtTheEnd(Callback):
    """Saves once more when training has ended."""

    trainer: Trainer
    saved: Path

    async def on_train_end(self, event: Event) -> None:
        self.saved = await self.trainer.save_checkpoint()


async def test_the_best_weights_do_not_replace_the_last_ones_in_the_run_s_folder(tmp_path: Path) -> None:
    asker = AtTheEnd()
    rules: list[object] = [
        ModelCheckpoint(every="1000steps", monitor="val_loss", mode="max"),
        EarlyStopping("val_loss", mode="max", patience=2),
    ]
    trainer = asker.trainer = Trainer(
        network(), nn.MSELoss(), lr=0.01, run_dir=tmp_path, callbacks=[*rules, asker], seed=5, device="cpu"
    )
    result = await trainer.fit(Samples(), Samples(40, seed=3), max_epochs=12)
    assert result.best is not None
    assert result.best.step < result.step
    assert asker.saved == result.checkpoint == tmp_path / "checkpoints" / f"step-{result.step:09d}"
    quiet = Trainer(network(), nn.MSELoss(), lr=0.01, seed=5, device="cpu")
    await quiet.fit(Samples(), Samples(40, seed=3), max_steps=result.step)
    last = await asyncio.to_thread(checkpoint.read, asker.saved)
    assert all(torch.equal(value, last.model[name]) for name, value in quiet.model.state_dict().items())


@pytest.mark.parametrize("ema", [None, 0.9])
async def test_a_save_after_the_fit_does_not_replace_the_last_weights_by_the_best(
    tmp_path: Path, ema: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    asker = AtTheBeginning()
    rules = [ModelCheckpoint(monitor="val_loss", mode="max"), EarlyStopping("val_loss", mode="max", patience=2), asker]
    trainer = asker.trainer = Trainer(
        network(), nn.MSELoss(), lr=0.01, run_dir=tmp_path / "a", callbacks=rules, seed=5, device="cpu", ema=ema
    )
    stream = Samples()
    result = await trainer.fit(stream, Samples(40, seed=3), max_epochs=12)
    assert result.checkpoint is not None
    last = await asyncio.to_thread(checkpoint.read, result.checkpoint)
    assert [await trainer.save_checkpoint(), await trainer.save_checkpoint()] == [result.checkpoint] * 2
    assert caplog.text.count("nothing is saved: the model has the best weights") == 1
    again = await asyncio.to_thread(checkpoint.read, result.checkpoint)
    assert all(torch.equal(value, again.model[name]) for name, value in last.model.items())
    best = await asyncio.to_thread(checkpoint.read, await trainer.save_checkpoint(tmp_path / "best"))
    live = trainer.model.state_dict()
    assert all(torch.equal(value, live[name]) for name, value in best.model.items())
    assert not all(torch.equal(value, last.model[name]) for name, value in best.model.items())
    assert (await trainer.fit(stream, Samples(40, seed=3), max_steps=result.step + 2)).step == result.step + 2
    assert all(torch.equal(value, asker.saved.model[name]) for name, value in last.model.items()), "no step made yet"
    assert (await trainer.save_checkpoint()).name == f"step-{result.step + 2:09d}"


async def test_nor_by_their_average_where_the_last_is_the_best(tmp_path: Path) -> None:
    rules = [ModelCheckpoint(monitor="val_loss", mode="max"), EarlyStopping("val_loss", mode="max")]
    trainer = Trainer(network(), nn.MSELoss(), lr=0.01, run_dir=tmp_path, callbacks=rules, device="cpu", ema=0.9)
    result = await trainer.fit(Samples(), Samples(40, seed=3), max_epochs=1)
    assert result.best is not None
    assert result.checkpoint is not None
    assert result.best.step == result.step
    last = await asyncio.to_thread(checkpoint.read, result.checkpoint)
    assert await trainer.save_checkpoint() == result.checkpoint
    again = await asyncio.to_thread(checkpoint.read, result.checkpoint)
    assert all(torch.equal(value, again.model[name]) for name, value in last.model.items())
    assert not all(torch.equal(value, last.model[name]) for name, value in trainer.model.state_dict().items())


class AtTheBeginning(Callback):
    """Saves when a fit goes on that has ended before."""

    trainer: Trainer
    saved: Snapshot

    async def on_train_begin(self, event: Event) -> None:
        if event.step:
            path = await self.trainer.save_checkpoint()
            self.saved = await asyncio.to_thread(checkpoint.read, path)


async def test_a_fit_that_goes_on_from_an_older_checkpoint_names_that_one_as_its_last(tmp_path: Path) -> None:
    rule = ModelCheckpoint(every="3steps", keep_last=-1)
    trainer = Trainer(network(), nn.MSELoss(), run_dir=tmp_path, callbacks=[rule], seed=5, device="cpu")
    await trainer.fit(Samples())
    older = tmp_path / "checkpoints" / "step-000000003"
    await trainer.load_checkpoint(older)
    seen: list[Path | None] = []
    trainer.callbacks.append(Seeing(lambda: seen.append(trainer.checkpoint)))
    await trainer.fit(Samples(), max_steps=5)
    assert seen == [older]


class Seeing(Callback):
    """Looks when training begins."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def on_train_begin(self, event: Event) -> None:
        self._look()


async def test_a_run_that_another_one_s_checkpoint_has_brought_to_its_end_has_a_checkpoint_of_its_own(
    tmp_path: Path,
) -> None:
    first = on(LOCAL, tmp_path / "a", Recorder())
    await first.fit(Samples())
    second = on(LOCAL, tmp_path / "b", Recorder())
    result = await second.fit(Samples(), resume=tmp_path / "a")
    assert result.step == 13
    assert result.checkpoint == tmp_path / "b" / "checkpoints" / "step-000000013"
    assert await asyncio.to_thread(problems, tmp_path / "b" / "checkpoints") == {"step-000000013": None}
    assert same(first.model, second.model)
