"""What error.json promises: where a fit failed, on which rows, with what, and what was saved of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor, nn

from streamtrain import checkpoint
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import DataError, EnvironmentProblem, NonFiniteError, UserCodeError
from streamtrain.events import BatchEnd, TrainBegin
from streamtrain.running_statistics import RunningStatistics
from streamtrain.trainer import Trainer
from tests.engine import Samples, network, pairs, same

HUGE = 1 << 60


class Fails(nn.Module):
    """Does something at its n-th call."""

    def __init__(self, at: int, act: Callable[[], Tensor]) -> None:
        super().__init__()
        self.layer, self.at, self.act, self.calls = nn.Linear(4, 1), at, act, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        outputs: Tensor = self.layer(inputs)
        return outputs + self.act() if self.calls == self.at else outputs


def broken() -> Tensor:
    raise KeyError("no such layer")


def trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    return Trainer(model, nn.MSELoss(), **{"seed": 5, "device": "cpu", "log_every": 1, "run_dir": folder, **options})


def told(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "error.json").read_text())
    return document


async def test_it_tells_the_step_the_batch_the_last_lines_and_what_was_saved(tmp_path: Path) -> None:
    stream = Samples(1000)
    with pytest.raises(UserCodeError):
        await trainer(Fails(71, broken), tmp_path, config={"model": {"width": 4}}).fit(stream, max_epochs=3)
    document = told(tmp_path)
    assert (document["type"], document["exit_code"], document["step"], document["epoch"]) == ("UserCodeError", 7, 70, 0)
    assert "no such layer" in document["traceback"]
    batch = next(batch for number, batch in enumerate(stream.batches(0), 1) if number == 71)
    assert document["batch"] == {
        "step": 71,
        "cursor": {"epoch": 0, "position": 568},
        "rows": 8,
        "index": batch.index.tolist(),
        "places": None,
    }
    assert document["position"] == {"epoch": 0, "position": 560}
    assert [line["step"] for line in document["metrics"]] == list(range(21, 71))
    assert document["config"] == {"model": {"width": 4}}
    assert document["settings"]["precision"] == "32"
    assert document["versions"]["torch"] == str(torch.__version__)
    assert {"streamtrain", "python", "numpy", "zarr"} <= document["versions"].keys()
    assert 0 < document["memory"]["rss"] <= document["memory"]["rss_peak"]
    assert document["memory"]["available"] > 0
    saved = await asyncio.to_thread(checkpoint.read, Path(document["checkpoint"]))
    assert saved.state["step"] == 70


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """64 samples over days that xarray would know, in chunks of 16."""
    group: Any = zarr.open_group(tmp_path / "d.zarr", mode="w")
    group.create_array("x", data=np.ones((64, 4), np.float32), chunks=(16, 4), dimension_names=("time", "c"))
    group.create_array("y", data=np.ones((64, 1), np.float32), chunks=(16, 1), dimension_names=("time", "one"))
    days = group.create_array("time", data=np.arange(64), chunks=(64,), dimension_names=("time",))
    days.attrs["units"] = "days since 2001-01-01"
    return tmp_path / "d.zarr"


async def test_rows_of_a_store_are_told_with_their_coordinates(store: Path, tmp_path: Path) -> None:
    stream = ZarrStream(store, inputs="x", targets="y", batch_size=4, shuffle="block", seed=3, memory="64MiB")
    async with stream:
        bad = Fails(6, lambda: torch.tensor(float("inf")))
        with pytest.raises(NonFiniteError):
            await trainer(bad, tmp_path / "run").fit(stream)
        document = told(tmp_path / "run")
        assert (document["step"], document["batch"]["step"]) == (5, 6)
        for number, place in zip(document["batch"]["index"], document["batch"]["places"], strict=True):
            assert place["row"] == [number]
            day = np.datetime64("2001-01-01") + np.timedelta64(number, "D")
            assert np.datetime64(place["coordinates"]["time"]) == day
    assert document["memory"]["budget"] == 64 << 20
    assert 0 < document["memory"]["budget_peak"] <= 64 << 20


class Angry(Callback):
    """Raises what it was given, at the fifth step."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def on_batch_end(self, event: BatchEnd) -> None:
        if event.step >= 5:
            raise self.error


async def test_an_error_of_a_callback_or_of_the_data_has_no_batch(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError):
        await trainer(network(), tmp_path / "a", callbacks=[Angry(ValueError("no"))]).fit(Samples(), max_epochs=99)
    assert told(tmp_path / "a")["batch"] is None
    assert told(tmp_path / "a")["step"] >= 5
    stream = Samples()
    stream.failures[40] = DataError("cut")
    with pytest.raises(DataError):
        await trainer(network(), tmp_path / "b", accumulate_grad_batches=2).fit(stream)
    document = told(tmp_path / "b")
    assert (document["batch"], document["step"], document["position"]["position"]) == (None, 2, 32)

    def cut() -> Iterator[tuple[Tensor, Tensor]]:
        yield from (pair for pair in pairs(Samples(), 1)[0][:5])
        raise OSError("gone")

    with pytest.raises(UserCodeError):  # pulled on the train thread, in the middle of a group
        await trainer(network(), tmp_path / "c", accumulate_grad_batches=2).fit(cut())
    document = told(tmp_path / "c")
    assert (document["batch"], document["step"]) == (None, 2)


async def test_what_fails_before_a_life_began_is_told_without_one(tmp_path: Path) -> None:
    class Early(Callback):
        async def on_train_begin(self, event: TrainBegin) -> None:
            raise ValueError("no")

    stream = Samples()
    stream.failures[0] = DataError("cut")
    with pytest.raises(DataError):
        await trainer(nn.LazyLinear(1), tmp_path / "a").fit(stream)
    assert "step" not in told(tmp_path / "a")
    with pytest.raises(UserCodeError):
        await trainer(network(), tmp_path / "b", callbacks=[Early()]).fit(Samples())
    assert (told(tmp_path / "b")["step"], told(tmp_path / "b")["checkpoint"]) == (0, None)


def much() -> Tensor:
    return torch.empty(HUGE)


def too_much() -> Tensor:
    np.empty(HUGE, np.uint8)
    raise AssertionError


@pytest.mark.parametrize("take", [much, too_much], ids=["torch", "numpy"])
async def test_memory_that_runs_out_in_the_model_is_said_with_sizes_and_saved(
    store: Path, tmp_path: Path, take: Callable[[], Tensor]
) -> None:
    stream = ZarrStream(store, inputs="x", targets="y", batch_size=4, memory="64MiB")
    async with stream:
        with pytest.raises(EnvironmentProblem) as caught:
            await trainer(Fails(3, take), tmp_path / "run").fit(stream)
    said = str(caught.value)
    assert said.startswith("step 3: out of memory with a batch of 80 B: ")
    assert "of its memory of 64.0 MiB, its queue " in said
    assert "the process " in said
    assert "Lower batch_size" in caught.value.hint
    assert (told(tmp_path / "run")["exit_code"], told(tmp_path / "run")["step"]) == (5, 2)
    assert told(tmp_path / "run")["checkpoint"].endswith("step-000000002")


async def test_memory_that_runs_out_in_a_transform_or_a_callback_is_the_machines_too(
    store: Path, tmp_path: Path
) -> None:
    def greedy(batch: Any) -> Any:
        return np.empty(HUGE, np.uint8), batch.targets

    stream = ZarrStream(store, inputs="x", targets="y", batch_size=4, memory="64MiB", transform=greedy)
    async with stream:
        with pytest.raises(EnvironmentProblem, match=r"out of memory: transform raised .*; the stream holds .*process"):
            await trainer(network(), tmp_path / "a").fit(stream)
    with pytest.raises(EnvironmentProblem, match=r"callback Angry: on_batch_end raised MemoryError"):
        await trainer(network(), tmp_path / "b", callbacks=[Angry(MemoryError())]).fit(Samples(), max_epochs=99)


async def test_what_can_t_be_told_or_written_never_hides_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamtrain.failure.PACKAGES", ("no-such-package",))
    with pytest.raises(UserCodeError, match="no such layer"):
        await trainer(Fails(3, broken), tmp_path / "a").fit(Samples())
    assert told(tmp_path / "a")["versions"] is None

    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("streamtrain.run_folder.RunFolder.write_error", full)
    with pytest.raises(UserCodeError, match="no such layer"):
        await trainer(Fails(3, broken), tmp_path / "b").fit(Samples())
    assert "error.json is not written: OSError: the disk is full" in caplog.text


class Forgetful(Callback):
    """Can't tell its state after a while."""

    def __init__(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return {} if self.asked < 3 else {"lost": [][self.asked]}


async def test_a_callback_that_can_t_tell_its_state_is_named(tmp_path: Path) -> None:
    rules: list[object] = [ModelCheckpoint(every="1steps"), Forgetful()]
    with pytest.raises(UserCodeError, match="callback Forgetful: state_dict raised IndexError"):
        await trainer(network(), tmp_path, callbacks=rules).fit(Samples())
    assert told(tmp_path)["checkpoint"] == str(tmp_path / "checkpoints" / "step-000000001")


class Mute(Exception):
    """Can't say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


async def test_an_error_that_cant_be_told_is_named_by_its_type_and_costs_no_step(tmp_path: Path) -> None:
    def mute() -> Tensor:
        raise Mute

    with pytest.raises(UserCodeError, match=r"^step 3: the model, loss or step raised Mute$"):
        await trainer(Fails(3, mute), tmp_path / "a").fit(Samples())
    assert told(tmp_path / "a")["batch"]["step"] == 3
    assert told(tmp_path / "a")["checkpoint"].endswith("step-000000002")
    with pytest.raises(UserCodeError, match=r"^callback Angry: on_batch_end raised Mute$"):
        await trainer(network(), tmp_path / "b", callbacks=[Angry(Mute())]).fit(Samples(), max_epochs=99)
    assert told(tmp_path / "b")["checkpoint"]


async def test_memory_that_runs_out_without_a_word_ends_no_message_in_a_colon(tmp_path: Path) -> None:
    def nothing() -> Tensor:
        raise MemoryError

    with pytest.raises(EnvironmentProblem, match=r"^step 3: out of memory with a batch of \d+ B; the process"):
        await trainer(Fails(3, nothing), tmp_path / "a").fit(Samples())


class Clinging(torch.optim.SGD):
    """Does not let go of the gradients of batches that are part of no update."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.state and not self.stepped:
            raise RuntimeError("mine")
        self.stepped = False
        super().zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        self.stepped = True
        return super().step(closure)

    stepped = False


def clinging(run_dir: Path) -> Trainer:
    model = network()
    optimizer = Clinging(model.parameters(), lr=0.01, momentum=0.9)
    return Trainer(
        model, nn.MSELoss(), optimizer=optimizer, accumulate_grad_batches=2, run_dir=run_dir, seed=5, device="cpu"
    )


@pytest.mark.parametrize("where", ["between two bursts", "in the model"])
async def test_what_is_whole_is_saved_though_half_a_group_can_t_be_forgotten(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    stream, fitted = Samples(), clinging(tmp_path / "a")
    if where == "in the model":
        left = iter([*range(9, 0, -1), 0])

        def tenth(*_: object) -> None:
            _ = 1 // next(left)

        fitted.model.register_forward_pre_hook(tenth)
    else:
        stream.failures[72] = DataError("chunk 9 is damaged")
    with pytest.raises((DataError, UserCodeError), match=r"chunk 9|ZeroDivisionError"):
        await fitted.fit(stream)
    assert "RuntimeError: mine" in caplog.text
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-000000004"]
    again, whole = clinging(tmp_path / "a"), clinging(tmp_path / "b")
    await again.fit(Samples(), resume="auto")
    await whole.fit(Samples())
    assert same(again.model, whole.model)


async def test_half_a_group_whose_statistics_stay_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(self: RunningStatistics) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(RunningStatistics, "give_back", lost)
    stream, fitted = Samples(), clinging(tmp_path)
    stream.failures[72] = DataError("chunk 9 is damaged")
    with pytest.raises(DataError, match="chunk 9"):
        await fitted.fit(stream)
    assert "the device is lost" in caplog.text
    assert not (tmp_path / "checkpoints").exists()


class Gauging(Callback):
    """Can't read the seventh update."""

    def gauge(self, optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, float]:
        self.read += 1
        return {"inverse": 1 / (7 - self.read)}

    read = 0


async def test_weights_of_an_update_that_was_not_counted_are_not_saved_as_those_before_it(tmp_path: Path) -> None:
    callbacks = [Gauging(), ModelCheckpoint(every="3steps")]
    fitted = Trainer(network(), nn.MSELoss(), callbacks=callbacks, log_every=1, run_dir=tmp_path, seed=5, device="cpu")
    with pytest.raises(UserCodeError, match="ZeroDivisionError"):
        await fitted.fit(Samples())
    await Trainer(network(), nn.MSELoss(), log_every=1, run_dir=tmp_path, seed=5, device="cpu").fit(
        Samples(), resume="auto"
    )
    whole = Trainer(network(), nn.MSELoss(), seed=5, device="cpu")
    await whole.fit(Samples())
    last = await asyncio.to_thread(checkpoint.read, tmp_path / "checkpoints" / "step-000000013")
    assert all(torch.equal(value, last.model[name]) for name, value in whole.model.state_dict().items())


async def test_where_the_folder_was_moved_that_is_told_and_not_the_file_that_is_missing_then(tmp_path: Path) -> None:
    class Moves(Callback):
        def on_batch_end(self, event: BatchEnd) -> None:
            (tmp_path / "run").rename(tmp_path / "moved")
            raise EnvironmentProblem("metrics.csv can't be written: No such file or directory", hint="Mend the disk.")

    trainer = Trainer(network(), nn.MSELoss(), run_dir=tmp_path / "run", device="cpu", callbacks=[Moves()])
    with pytest.raises(EnvironmentProblem, match="was moved or removed while the run was writing to it") as caught:
        await trainer.fit(Samples())
    assert "metrics.csv" in str(caught.value.__cause__)
