"""What the wheel promises: at which step what happens, what is saved when, and that nothing is done twice."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
from torch import Tensor, nn

from streamtrain import checkpoint
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.checkpoint import Committed
from streamtrain.early_stopping import EarlyStopping
from streamtrain.errors import DataError, EnvironmentProblem, UserCodeError
from streamtrain.events import BatchEnd, EpochBegin, EpochEnd, ValidationEnd, Verdict
from streamtrain.metrics import MeanAbsoluteError
from streamtrain.progress import FitResult
from streamtrain.saving import Saver
from streamtrain.state import Snapshot
from streamtrain.trainer import Trainer
from tests.engine import AtStep, Recorder, Samples, bare_loop, lines, network, pairs, same, samples

T = TypeVar("T")


def trainer(**options: Any) -> Trainer:
    return Trainer(network(), nn.MSELoss(), **{"seed": 5, "device": "cpu", "log_every": 5, **options})


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


# --- when it saves ---


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("5steps", [5, 10, 15, 20, 25, 26]),
        ("13steps", [13, 26]),
        ("1epoch", [13, 26]),
        ("1h", [26]),
    ],
)
async def test_saves_fall_on_their_steps_and_the_end_always_saves(
    tmp_path: Path, every: str, expected: list[int]
) -> None:
    stream, recorder = Samples(), Recorder()
    stream.gates = {position: asyncio.Event() for position in range(0, 104, 8)}

    class Opens(Callback):
        """Lets the next batch come once the save of the step before is over: else a save may be left out."""

        async def on_epoch_begin(self, event: Any) -> None:
            for position in range(0, 104, 8):
                stream.gates[position].clear()
            if event.step not in expected:
                stream.gates[0].set()

        async def on_batch_end(self, event: Any) -> None:
            if event.step not in expected and event.step % 13:
                stream.gates[event.step % 13 * 8].set()

        async def on_checkpoint(self, event: Any) -> None:
            stream.gates[event.step % 13 * 8].set()

    saves = ModelCheckpoint(every=every, keep_last=-1)
    fitted = trainer(run_dir=tmp_path, callbacks=[saves, recorder, Opens()])
    await fitted.fit(stream, max_epochs=2)
    assert steps(tmp_path) == expected
    assert [event.step for event in recorder.events("on_checkpoint")] == expected


async def test_saves_by_the_clock_begin_as_soon_as_their_time_has_come(tmp_path: Path) -> None:
    recorder, saves = Recorder(), ModelCheckpoint(every="0.000001min", keep_last=-1)
    await trainer(run_dir=tmp_path, callbacks=[saves, recorder]).fit(Samples(), max_epochs=2)
    made = [(event.step, event.kind) for event in recorder.events("on_checkpoint")]
    assert made[0] == (1, "periodic")
    assert made[-1][0] == 26
    assert [step for step, _ in made] == steps(tmp_path)


async def test_a_save_at_the_end_of_an_epoch_comes_after_its_validation(tmp_path: Path) -> None:
    fitted = trainer(run_dir=tmp_path, callbacks=[ModelCheckpoint(every="13steps", save_top_k=0)])
    await fitted.fit(Samples(), validation=Samples(20), max_epochs=1)
    state = (await asyncio.to_thread(checkpoint.read, tmp_path / "checkpoints" / "step-000000013")).state
    assert state["progress"]["epoch"] == 1
    assert "val_loss" in state["metrics"]


async def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    fitted = trainer(
        lr=0.3,
        run_dir=tmp_path,
        metrics={"mae": MeanAbsoluteError()},
        callbacks=[ModelCheckpoint(every="1epoch", monitor="val_mae", keep_last=1)],
    )
    result = await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=12)
    assert result.best is not None
    assert result.best.monitor == "val_mae"
    values = {row["step"]: row["val_mae"] for row in lines(tmp_path) if row["split"] == "val"}
    assert result.best.value == min(values.values())
    assert values[result.best.step] == result.best.value
    assert set(steps(tmp_path)) == {result.best.step, result.step}
    assert result.best.checkpoint is not None
    assert (await asyncio.to_thread(checkpoint.read, result.best.checkpoint)).state["step"] == result.best.step


async def test_a_best_whose_save_fails_does_not_take_the_place_of_the_one_that_is_kept(tmp_path: Path) -> None:
    first_is_saved = threading.Event()

    class Saved(Callback):
        def on_checkpoint(self, event: object) -> None:
            first_is_saved.set()

    class Breaks(Callback):
        """Puts a file in the place of the folder of checkpoints, before the second epoch's validation."""

        decides = True

        def on_epoch_end(self, event: EpochEnd) -> None:
            if event.epoch == 1:
                first_is_saved.wait(60)
                (tmp_path / "checkpoints").rename(tmp_path / "aside")
                (tmp_path / "checkpoints").write_text("in the way")

    fitted = trainer(run_dir=tmp_path, callbacks=[Breaks(), Saved(), ModelCheckpoint(every="1h", keep_last=1)])
    with pytest.raises(EnvironmentProblem, match="checkpoint"):
        await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=2)
    values = {row["step"]: row["val_loss"] for row in lines(tmp_path) if row["split"] == "val"}
    assert values[26] < values[13]
    best = fitted.state.best
    assert best is not None
    assert (best.step, best.value) == (13, values[13])
    assert best.checkpoint is not None
    saved = (await asyncio.to_thread(checkpoint.read, tmp_path / "aside" / best.checkpoint.name)).state["progress"]
    assert saved["bests"] == [["val_loss", values[13], 0, 13, best.checkpoint.name]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Gated:
    """File work that waits until its gate opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.calls = 0

    async def __call__(self, fn: Callable[[], T], /) -> T:
        self.calls += 1
        await self.gate.wait()
        return await asyncio.to_thread(fn)


async def test_one_save_at_a_time_and_whoever_stops_waiting_does_not_stop_it(tmp_path: Path) -> None:
    files, told = Gated(), []
    saver = Saver(tmp_path, ModelCheckpoint(keep_last=1), files)

    async def tell(committed: Committed) -> None:
        told.append(committed.path.name)

    async def failed(error: Exception, failures: int) -> None:
        raise error

    snapshot = Snapshot({"w": torch.zeros(2)}, {}, {"step": 3})
    saver.begin(snapshot, 3, kind="periodic", told=tell, failed=failed)
    assert saver.busy
    waiting = asyncio.create_task(saver.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    files.gate.set()
    await saver.wait()
    assert (saver.last, told) == (tmp_path / "step-000000003", ["step-000000003"])
    saver.begin(replace(snapshot, state={"step": 4}), 4, kind="end", told=tell, failed=failed)
    await saver.wait()
    assert names(tmp_path) == ["step-000000004"]


# --- when it validates ---


async def test_validations_fall_on_their_steps(tmp_path: Path) -> None:
    recorder = Recorder()
    fitted = trainer(run_dir=tmp_path, validate_every="4steps", callbacks=[recorder], sanity_batches=0)
    await fitted.fit(Samples(), validation=Samples(20), max_epochs=2)
    assert [event.step for event in recorder.events("on_validation_end")] == [4, 8, 12, 16, 20, 24]
    assert [event.epoch for event in recorder.events("on_validation_end")] == [0, 0, 0, 1, 1, 1]


async def test_a_validation_at_the_last_step_of_an_epoch_comes_before_its_end() -> None:
    recorder = Recorder()
    fitted = trainer(validate_every="13steps", callbacks=[recorder], sanity_batches=0)
    await fitted.fit(Samples(), validation=Samples(20), max_epochs=2)
    order = [hook for hook, _ in recorder.told if hook in ("on_epoch_end", "on_validation_end")]
    assert order == ["on_validation_end", "on_epoch_end"] * 2


@pytest.mark.parametrize(
    ("every", "accumulate", "known"),
    [
        ("1epoch", 1, [True] * 4),
        ("2epochs", 1, [False, True] * 2),
        ("7steps", 2, [True] * 4),
        ("8steps", 2, [False, True, True, True]),  # the second epoch's first step
        ("15steps", 2, [False, False, True, False]),
    ],
)
async def test_the_end_of_an_epoch_tells_what_a_validation_of_this_epoch_found(
    every: str, accumulate: int, known: list[bool]
) -> None:
    recorder = Recorder()
    fitted = trainer(validate_every=every, accumulate_grad_batches=accumulate, callbacks=[recorder])
    await fitted.fit(Samples(), validation=Samples(20), max_epochs=4)
    ends = recorder.events("on_epoch_end")
    assert ["val_loss" in event.metrics for event in ends] == known
    found = {event.step: event.metrics["val_loss"] for event in recorder.events("on_validation_end")}
    for event in ends:
        last = max((step for step in found if step <= event.step), default=None)
        assert last is None or event.metrics.get("val_loss", found[last]) == found[last]
    assert all(event.metrics["loss"] > 0 for event in ends)


async def test_each_of_several_validation_streams_has_its_values_in_the_line_the_hooks_and_the_result(
    tmp_path: Path,
) -> None:
    recorder, streams = Recorder(), {"early": Samples(20, seed=2), "late": Samples(30, seed=3)}
    fitted = trainer(run_dir=tmp_path, callbacks=[recorder], metrics={"mae": MeanAbsoluteError()}, sanity_batches=0)
    result = await fitted.fit(Samples(), validation=streams)
    own: dict[str, float] = {}
    for name, stream in {"early": Samples(20, seed=2), "late": Samples(30, seed=3)}.items():
        own |= {f"val_{name}_{each[4:]}": value for each, value in (await fitted.validate(stream)).items()}
    assert set(own) == {"val_early_loss", "val_early_mae", "val_late_loss", "val_late_mae"}
    (line,) = (row for row in lines(tmp_path) if row["split"] == "val" and "val_early_loss" in row)
    (validated,), (ended,) = recorder.events("on_validation_end"), recorder.events("on_epoch_end")
    for told in (line, validated.metrics, ended.metrics, result.metrics):
        assert {name: value for name, value in told.items() if name.startswith("val_")} == own


async def test_validation_every_second_epoch() -> None:
    recorder = Recorder()
    fitted = trainer(validate_every="2epochs", callbacks=[recorder], sanity_batches=0)
    await fitted.fit(Samples(), validation=Samples(20), max_epochs=5)
    assert [event.step for event in recorder.events("on_validation_end")] == [26, 52]


async def test_validation_changes_nothing_in_training() -> None:
    fitted = trainer(validate_every="3steps")
    await fitted.fit(Samples(), validation={"one": Samples(20), "two": [(s, t) for s, t in pairs(Samples(20), 1)[0]]})
    assert same(fitted.model, bare_loop(network(), pairs(Samples(), 1), seed=5))


async def test_data_that_come_late_in_the_middle_of_a_group_change_no_later_one() -> None:
    """Of 11 batches, the last one half a one, the group before the short last one waits for its data."""
    weights = []
    for late in (False, True):
        fitted, stream = trainer(accumulate_grad_batches=3), Samples(84)
        if late:
            stream.gates[56] = Partial(fitted)
        await fitted.fit(stream)
        weights.append(fitted.model)
    assert same(*weights)


class Partial(asyncio.Event):
    """Opens once batches were taken that are part of no update yet."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.trainer = trainer

    async def wait(self) -> Literal[True]:
        while self.trainer._run.life is None or not self.trainer._run.life.step.partial:  # noqa: ASYNC110
            await asyncio.sleep(0)
        self.set()
        return True


@pytest.mark.parametrize("every", ["1epoch", "4steps"])
async def test_a_validation_cut_short_by_a_stop_is_made_by_the_next_life(tmp_path: Path, every: str) -> None:
    whole = trainer(run_dir=tmp_path / "whole", validate_every=every)
    await whole.fit(Samples(), validation=Samples(40), max_epochs=2)

    stream = Samples(40)
    stream.gates[16] = asyncio.Event()
    fitted = trainer(run_dir=tmp_path / "cut", validate_every=every, sanity_batches=0)

    class Stops(Callback):
        async def on_validation_begin(self, event: Any) -> None:
            fitted.stop()
            stream.gates[16].set()

    fitted.callbacks.append(Stops())
    cut = await fitted.fit(Samples(), validation=stream, max_epochs=2)
    assert cut.step == (13 if every == "1epoch" else 4)
    assert fitted.state.owes == ("epoch" if every == "1epoch" else "validation")
    again = trainer(run_dir=tmp_path / "cut", validate_every=every)
    await again.fit(Samples(), validation=Samples(40), max_epochs=2, resume="auto")
    assert same(again.model, whole.model)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("at", [3, 4, 5])
async def test_a_validation_that_an_error_came_before_is_made_by_the_next_life(tmp_path: Path, at: int) -> None:
    async def fit(folder: Path, stream: Samples) -> None:
        fitted = trainer(run_dir=folder, validate_every="4steps", log_every=1)
        await fitted.fit(stream, validation=Samples(30, seed=3), max_epochs=1, resume="auto")

    await fit(tmp_path / "whole", Samples(known=False))
    cut = Samples(known=False)
    cut.failures[8 * at] = DataError("cut")
    with pytest.raises(DataError):
        await fit(tmp_path / "cut", cut)
    await fit(tmp_path / "cut", Samples(known=False))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


class Drawn:
    """Seven batches in an order drawn by a generator of its own; `at_last` is called when the last one is asked for."""

    def __init__(self, at_last: Callable[[], object] = lambda: None) -> None:
        self.generator, self._at_last = torch.Generator().manual_seed(3), at_last

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = samples(28)
        for number, batch in enumerate(torch.randperm(7, generator=self.generator).tolist(), start=1):
            if number == 7:
                self._at_last()
            yield inputs[4 * batch :][:4], targets[4 * batch :][:4]


@pytest.mark.parametrize("ends", ["stop", "error"])
async def test_a_short_last_group_in_which_a_fit_has_ended_is_trained_once(tmp_path: Path, ends: str) -> None:
    async def fit(source: Drawn, fitted: Trainer) -> None:
        await fitted.fit(source, validation=Samples(30, seed=3), max_epochs=2, resume="auto")

    def made(folder: str) -> Trainer:
        return trainer(run_dir=tmp_path / folder, accumulate_grad_batches=2, log_every=1)

    whole, cut = made("whole"), made("cut")
    await fit(Drawn(), whole)
    if ends == "stop":
        await fit(Drawn(cut.stop), cut)
    else:

        class Gap(Drawn):
            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                for number, (inputs, targets) in enumerate(super().__iter__(), start=1):
                    yield inputs, targets * math.nan if number == 7 else targets

        with pytest.raises(DataError, match="step 4"):
            await fit(Gap(), cut)
    made_by_then = (4, 0, 28) if ends == "stop" else (3, 0, 24)  # a stop waits for the update under way
    assert (cut.state.step, cut.state.epoch, cut.state.samples) == made_by_then
    again = made("cut")
    await fit(Drawn(), again)
    assert same(again.model, whole.model)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("hook", ["on_batch_end", "on_epoch_end", "on_validation_end"])
async def test_a_source_with_a_generator_of_its_own_goes_on_exactly_after_an_error_at_the_end_of_an_epoch(
    tmp_path: Path, hook: str
) -> None:
    class Fails(Callback):
        decides = True

        async def on_batch_end(self, event: Any) -> None:
            if hook == "on_batch_end" and event.step == 7:
                raise ValueError(hook)

        async def on_epoch_end(self, event: EpochEnd) -> None:
            if hook == "on_epoch_end":
                raise ValueError(hook)

        async def on_validation_end(self, event: ValidationEnd) -> None:
            if hook == "on_validation_end" and not event.sanity:
                raise ValueError(hook)

    async def fit(folder: str, *callbacks: Callback) -> Trainer:
        fitted = trainer(run_dir=tmp_path / folder, log_every=1, callbacks=list(callbacks))
        await fitted.fit(Drawn(), validation=Samples(30, seed=3), max_epochs=3, resume="auto")
        return fitted

    whole = await fit("whole")
    with pytest.raises(UserCodeError, match=hook):
        await fit("cut", Fails())
    again = await fit("cut")
    assert same(again.model, whole.model)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


async def test_a_rule_that_has_ended_the_run_is_heard_by_the_next_life_though_a_stop_came_just_then(
    tmp_path: Path,
) -> None:
    async def fit(folder: str, *callbacks: Callback) -> tuple[Trainer, FitResult]:
        rule = EarlyStopping(condition=lambda metrics: True, restore_best=False)
        fitted = trainer(run_dir=tmp_path / folder, callbacks=[rule, *callbacks])
        stops.append(fitted.stop)
        return fitted, await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=4, resume="auto")

    class Stops(Callback):
        async def on_validation_end(self, event: ValidationEnd) -> None:
            if not event.sanity:
                stops[-1]()

    stops: list[Callable[[], None]] = []
    whole, _ = await fit("whole")
    _, cut = await fit("cut", Stops())
    assert (cut.reason, cut.step) == ("stopped", 13)
    again, result = await fit("cut")
    assert (result.reason, result.step) == ("early_stopping", 13)
    assert same(again.model, whole.model)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


async def test_the_line_of_the_last_step_is_written_by_the_life_that_ends_the_run(tmp_path: Path) -> None:
    async def fit(folder: Path, *callbacks: Callback) -> None:
        fitted = trainer(run_dir=folder, callbacks=list(callbacks))
        await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=2, resume="auto")

    await fit(tmp_path / "whole")
    with pytest.raises(UserCodeError):
        await fit(tmp_path / "cut", AtStep(26, lambda: 1 / 0))
    await fit(tmp_path / "cut")
    last = lines(tmp_path / "cut")[-1]
    assert (last["split"], last["step"], last["epoch"]) == ("train", 26, 1)  # of the epoch that it ended
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    heard = Recorder()
    await fit(tmp_path / "cut", heard)
    assert heard.events("on_log") == []


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("every", ["1epoch", "13steps", "100steps"])
@pytest.mark.parametrize("how", ["saved", "stopped", "failed"])
async def test_the_end_of_an_epoch_that_comes_with_the_last_step_is_made_by_the_next_life(
    tmp_path: Path, known: bool, every: str, how: str
) -> None:
    fits: list[Trainer] = []

    async def fit(folder: str, *callbacks: Callback, resume: Any = "auto") -> FitResult:
        fits.append(trainer(run_dir=tmp_path / folder, validate_every=every, log_every=2, callbacks=list(callbacks)))
        return await fits[-1].fit(Samples(known=known), Samples(20, seed=3), max_steps=26, resume=resume)

    class Saves(Callback):
        async def on_batch_end(self, event: BatchEnd) -> None:
            if event.step == 26:
                await fits[-1].save_checkpoint(tmp_path / "saved")

    class Fails(Callback):
        def on_epoch_begin(self, event: EpochBegin) -> None:
            if event.epoch == 1:
                raise ValueError("not now")

    whole = await fit("whole")
    if how == "saved":  # what a kill right after it would leave
        await fit("saving", Saves())
    elif how == "stopped":
        await fit("cut", AtStep(26, lambda: fits[-1].stop()))
    else:
        with pytest.raises(UserCodeError, match="not now"):
            await fit("cut", Fails())
    result = await fit("cut", resume=tmp_path / "saved" if how == "saved" else "auto")
    assert (result.reason, result.epoch, result.step) == (whole.reason, whole.epoch, whole.step) == ("completed", 2, 26)
    assert result.metrics == whole.metrics
    assert same(fits[-1].model, fits[0].model)
    told = lines(tmp_path / "whole")
    if how == "saved":  # the other lines are in the first folder
        told = [line for line in told if (line["step"], line["split"]) == (26, "val")]
    assert lines(tmp_path / "cut") == told
    heard = Recorder()
    await fit("cut", heard)
    assert [hook for hook, _ in heard.told] == ["on_train_begin", "on_train_end"]


async def test_a_validation_owed_at_what_turns_out_to_be_an_epochs_last_step_is_made_once(tmp_path: Path) -> None:
    async def fit(folder: str, *callbacks: Callback) -> Recorder:
        heard = Recorder()
        options: dict[str, Any] = {"validate_every": "13steps", "log_every": 1, "sanity_batches": 0}
        fitted = trainer(run_dir=tmp_path / folder, callbacks=[heard, *callbacks], **options)
        await fitted.fit(Samples(known=False), Samples(20, seed=3), max_epochs=2, resume="auto")
        return heard

    class Fails(Callback):
        def on_epoch_begin(self, event: EpochBegin) -> None:
            if event.epoch == 1:  # heard of once the burst of this epoch is over
                raise ValueError("not now")

    await fit("whole")
    with pytest.raises(UserCodeError, match="not now"):
        await fit("cut", Fails())
    heard = await fit("cut")
    assert [event.step for event in heard.events("on_validation_end")] == [26]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


async def test_the_line_of_the_last_step_is_told_though_an_error_came_before_it(tmp_path: Path) -> None:
    async def fit(folder: str, *callbacks: Callback) -> None:
        fitted = trainer(run_dir=tmp_path / folder, callbacks=list(callbacks))
        await fitted.fit(Samples(), max_steps=17, resume="auto")

    class Fails(Callback):
        def on_epoch_begin(self, event: EpochBegin) -> None:
            if event.epoch == 1:
                raise ValueError("not now")

    await fit("whole")
    with pytest.raises(UserCodeError, match="not now"):
        await fit("cut", Fails())
    await fit("cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


async def test_that_a_rule_has_ended_the_run_is_known_to_the_save_of_that_very_step(tmp_path: Path) -> None:
    async def fit(folder: str, *callbacks: Callback) -> tuple[Trainer, FitResult]:
        stops = EarlyStopping("loss", condition=lambda metrics: True, restore_best=False)
        fitted = trainer(run_dir=tmp_path / folder, callbacks=[stops, *callbacks])
        return fitted, await fitted.fit(Samples(), validation=Samples(30, seed=3), max_epochs=4, resume="auto")

    class Refuses(Callback):
        """Its state cannot be taken for the first save after the end of the epoch."""

        decides, refuses = True, False

        async def on_epoch_end(self, event: EpochEnd) -> None:
            self.refuses = True

        def state_dict(self) -> dict[str, Any]:
            if self.refuses:
                self.refuses = False
                raise ValueError("not now")
            return {}

    def best() -> ModelCheckpoint:
        return ModelCheckpoint(every="1000steps", monitor="loss")

    whole, _ = await fit("whole", best())
    with pytest.raises(UserCodeError, match="not now"):
        await fit("cut", best(), Refuses())
    again, result = await fit("cut", best())
    assert (result.reason, result.step) == ("early_stopping", 13)
    assert same(again.model, whole.model)


@pytest.mark.parametrize("at", [8, 13])
async def test_a_fit_that_goes_on_in_the_same_process_logs_what_an_undisturbed_one_does(
    tmp_path: Path, at: int
) -> None:
    whole, cut = trainer(run_dir=tmp_path / "whole"), trainer(run_dir=tmp_path / "cut")
    stopping, train, valid = AtStep(at, cut.stop), Samples(), Samples(30, seed=3)
    train.gates[8 * at] = asyncio.Event()  # so that it stops there
    once = await whole.fit(Samples(), validation=Samples(30, seed=3), max_epochs=2)
    cut.callbacks.append(stopping)
    assert (await cut.fit(train, validation=valid, max_epochs=2)).step == at
    train.gates.clear()
    assert (await cut.fit(train, validation=valid, max_epochs=2)).metrics == once.metrics
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert (await cut.fit(train, validation=valid, max_epochs=2)).metrics == once.metrics  # nothing is left to do


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "in-process"])
async def test_what_was_decided_at_a_validation_outlives_an_error_at_its_epochs_end(
    tmp_path: Path, resumed: bool
) -> None:
    class Decides(Callback):
        decides = True
        asked = ended = 0

        async def on_validation_end(self, event: ValidationEnd) -> Verdict:
            self.asked += 1
            return Verdict(stop=True, detail="enough", lr_factor=0.5, save="best", monitor="val_loss", value=math.nan)

        async def on_epoch_end(self, event: EpochEnd) -> None:
            self.ended += 1
            if self.ended == 1:
                raise ValueError("not now")

    train, decides = Samples(), Decides()
    fitted = trainer(run_dir=tmp_path, sanity_batches=0, callbacks=[decides])
    with pytest.raises(UserCodeError, match="not now"):
        await fitted.fit(train, validation=Samples(40), max_epochs=9)
    assert (fitted.state.epoch, fitted.state.owes, decides.asked) == (0, "epoch_end", 1)
    again = trainer(run_dir=tmp_path, callbacks=[decides]) if resumed else fitted
    resume = "auto" if resumed else None
    result = await again.fit(train, validation=Samples(40), max_epochs=9, resume=resume)
    assert (result.reason, result.detail, result.step) == ("early_stopping", "enough", 13)
    assert (decides.asked, decides.ended) == (1, 2)
    best = again.state.bests["val_loss"]
    assert (best.epoch, best.step) == (0, 13)
    assert again.optimizer is not None
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    assert again.state.verdicts == []


async def test_an_epoch_that_begins_anew_on_another_stream_owes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    stream = Samples(40)
    stream.gates[16] = asyncio.Event()
    fitted = trainer(sanity_batches=0)

    class Stops(Callback):
        async def on_validation_begin(self, event: Any) -> None:
            fitted.stop()
            stream.gates[16].set()

    fitted.callbacks.append(Stops())
    await fitted.fit(Samples(), validation=stream)
    assert fitted.state.owes == "epoch"
    fitted.callbacks.clear()
    result = await fitted.fit(Samples(), validation=Samples(40))
    assert (result.epoch, result.step) == (1, 26)
    assert caplog.text.count("another stream: epoch 0 begins anew, with batches that may have been trained on") == 1


# --- deciders and callbacks ---


class Says(Callback):
    """A decider with a given answer."""

    decides = True

    def __init__(self, step: int, verdict: Verdict) -> None:
        self.step, self.verdict = step, verdict

    async def on_validation_end(self, event: ValidationEnd) -> Verdict | None:
        return self.verdict if event.step == self.step else None


async def test_a_verdict_stops_at_the_step_where_it_was_asked() -> None:
    says = Says(8, Verdict(stop=True, reason="early_stopping", detail="enough"))
    result = await trainer(validate_every="4steps", callbacks=[says]).fit(Samples(), validation=Samples(20))
    assert (result.reason, result.detail, result.step) == ("early_stopping", "enough", 8)


async def test_a_verdict_lowers_the_rate_of_a_schedule_for_good() -> None:
    fitted = trainer(
        validate_every="4steps",
        callbacks=[Says(4, Verdict(lr_factor=0.5))],
        scheduler={"name": "linear", "total": 26},
    )
    await fitted.fit(Samples(), validation=Samples(20), max_epochs=2)
    rates = [1e-3 * (1 - step / 26) * (1 if step < 4 else 0.5) for step in range(26)]
    assert same(fitted.model, bare_loop(network(), pairs(Samples(), 2), seed=5, lr=lambda step: rates[step]))


async def test_an_end_of_epoch_is_asked_too() -> None:
    class Ends(Callback):
        decides = True

        def on_epoch_end(self, event: EpochEnd) -> Verdict:
            return Verdict(stop=event.epoch == 1 and event.metrics["loss"] > 0)

    result = await trainer(callbacks=[Ends()]).fit(Samples(), max_epochs=9)
    assert (result.epoch, result.reason) == (2, "early_stopping")


async def test_a_callback_may_work_on_the_train_thread_between_two_bursts() -> None:
    names: list[str] = []

    class Looks(Callback):
        async def on_epoch_begin(self, event: Any) -> None:
            names.append(await event.on_train_thread(lambda model, optimizer: threading.current_thread().name))

    await trainer(callbacks=[Looks()]).fit(Samples(), max_epochs=2)
    assert names == ["streamtrain-train"] * 2


async def test_batch_events_account_for_every_sample_and_for_the_wait() -> None:
    recorder = Recorder()
    stream = Samples()
    stream.gates[48] = asyncio.Event()
    fitted = trainer(callbacks=[recorder, AtStep(6, stream.gates[48].set)])
    await fitted.fit(stream)
    events = recorder.events("on_batch_end")
    assert sum(event.batch_samples for event in events) == 100
    assert sum(event.count for event in recorder.events("on_batch_begin")) == 13
    assert sum(event.data_wait for event in events) > 0
    assert events[-1].step == 13


async def test_the_first_and_the_last_event_say_how_long_it_is(tmp_path: Path) -> None:
    recorder = Recorder()
    await trainer(run_dir=tmp_path, accumulate_grad_batches=2, callbacks=[recorder]).fit(Samples(), max_epochs=3)
    begin, end = recorder.told[0][1], recorder.told[-1][1]
    assert (begin.batches_per_epoch, begin.steps_per_epoch, begin.max_epochs, begin.run_dir) == (
        13,
        7,
        3,
        str(tmp_path),
    )
    assert (end.reason, end.step) == ("completed", 21)


async def test_the_status_file_tells_where_it_stands(tmp_path: Path) -> None:
    await trainer(run_dir=tmp_path).fit(Samples())
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["epoch"], status["samples"]) == ("completed", 13, 1, 100)


async def test_nothing_is_left_to_do_in_a_run_that_is_complete(tmp_path: Path) -> None:
    await trainer(run_dir=tmp_path).fit(Samples(), max_epochs=2)
    before = (tmp_path / "metrics.jsonl").read_text()
    result = await trainer(run_dir=tmp_path).fit(Samples(), max_epochs=2, resume="auto")
    assert (result.reason, result.step, result.epoch) == ("completed", 26, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000000026"


async def test_deterministic_kernels_are_asked_for_inside_bursts_alone_those_of_a_validation_too() -> None:
    """What a validation finds decides on the rate and the end."""
    seen: set[tuple[bool, bool]] = set()

    def step(model: nn.Module, batch: Any) -> Any:
        seen.add((model.training, torch.are_deterministic_algorithms_enabled()))
        return nn.functional.mse_loss(model(batch.inputs), batch.targets)

    trainer = Trainer(network(), step=step, deterministic=True)
    await trainer.fit(Samples(), validation=Samples(24))
    await trainer.evaluate(Samples(24))
    assert seen == {(True, True), (False, True)}
    assert not torch.are_deterministic_algorithms_enabled()


# --- what is cancelled from within ---


class Waits(Callback):
    """A hook that waits for ever."""

    def __init__(self, entered: asyncio.Event) -> None:
        self.entered = entered

    async def on_validation_end(self, event: ValidationEnd) -> None:
        self.entered.set()
        await asyncio.Event().wait()

    decides = True


class Gate(asyncio.Event):
    """Tells when somebody waits for it."""

    def __init__(self, entered: asyncio.Event) -> None:
        super().__init__()
        self.entered = entered

    async def wait(self) -> bool:  # type: ignore[override]
        self.entered.set()
        return await super().wait()


@pytest.mark.parametrize("what", ["batch", "verdict"])
async def test_a_wheel_that_is_cancelled_where_it_waits_leaves_no_task_of_its_own(what: str) -> None:
    entered, stream = asyncio.Event(), Samples()
    if what == "batch":
        stream.gates[16] = Gate(entered)
    fitted = trainer(callbacks=[Waits(entered)], sanity_batches=0, grace=0)
    fit = asyncio.create_task(fitted.fit(stream, validation=Samples(20)))
    await entered.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    (wheel,) = (task for task in asyncio.all_tasks() if task.get_name() == "streamtrain-fit")
    wheel.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fit
    assert asyncio.all_tasks() == {asyncio.current_task()}
