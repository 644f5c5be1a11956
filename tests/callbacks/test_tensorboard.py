"""What TensorBoard's files promise: each step once in any life, weights as they were, a graph that changes nothing."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.once import Once
from streamtrain.callbacks.tensorboard import TensorBoard, _behind
from streamtrain.errors import ConfigError, UserCodeError
from streamtrain.events import Event, Log
from streamtrain.trainer import Trainer
from tests.engine import AtStep, Samples, lines, network, same


async def fit(folder: Path, steps: int, *callbacks: object, model: nn.Module | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        model or network(),
        nn.MSELoss(),
        callbacks=[TensorBoard(**options), *callbacks],
        run_dir=folder,
        log_every=2,
        seed=0,
        device="cpu",
        validate_every="4steps",
    )
    await trainer.fit(Samples(80), Samples(16, seed=1), max_steps=steps, max_epochs=3, resume="auto")
    return trainer


def read(folder: Path) -> Any:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance=dict.fromkeys(("scalars", "histograms"), 0))
    return found.Reload()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(name)]


def as_lines(folder: Path, name: str) -> list[tuple[int, Any]]:
    return [(row["step"], pytest.approx(row[name])) for row in lines(folder) if name in row]


@pytest.mark.parametrize("stop", [4, 6, 8])
async def test_a_resumed_run_has_each_step_once(tmp_path: Path, stop: int) -> None:
    await fit(tmp_path, stop)
    await fit(tmp_path, 12)
    for name in ("loss", "lr", "val_loss"):
        assert scalars(tmp_path, name) == as_lines(tmp_path, name)


async def test_a_validation_that_is_told_again_after_an_error_in_it_stands_there_once(tmp_path: Path) -> None:
    class Broken(Callback):
        async def on_validation_end(self, event: Event) -> None:
            if event.step == 4:
                raise ValueError("not now")

    with pytest.raises(UserCodeError):
        await fit(tmp_path, 12, Broken())
    await fit(tmp_path, 12)
    for name in ("loss", "lr", "val_loss"):
        assert scalars(tmp_path, name) == as_lines(tmp_path, name)


async def test_steps_beyond_the_checkpoint_of_a_life_that_was_killed_are_forgotten(tmp_path: Path) -> None:
    trainer = await fit(tmp_path, 4)
    await fit(tmp_path, 8)
    for path in (tmp_path / "checkpoints").glob("step-000000008"):
        path.rename(tmp_path / "gone")
    del trainer
    await fit(tmp_path, 12)
    assert [step for step, _ in scalars(tmp_path, "loss")] == [2, 4, 6, 8, 10, 12]


def test_files_of_lives_within_one_second_are_read_in_their_order(tmp_path: Path) -> None:
    numbers = iter(range(8, 12))

    class Written:
        def __init__(self) -> None:
            self.path = tmp_path / f"events.out.tfevents.{int(time.time())}.host.1.{next(numbers)}"
            self.path.touch()

        def close(self) -> None:
            self.path.write_text("whole")

    names = [_behind(tmp_path, Written).path.name for _ in range(3)]
    assert names == sorted(names)
    assert names == sorted(os.listdir(tmp_path))


@pytest.mark.parametrize("what", ["add_scalar", "flush", "close"])
async def test_a_disk_that_is_full_ends_the_file_and_no_run(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written, does = list[int](), getattr(SummaryWriter, what)

    def refuses(writer: Any, *arguments: Any, **named: Any) -> Any:
        written.append(1)
        if len(written) > (0 if what == "close" else 3):
            does(writer, *arguments, **named)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return does(writer, *arguments, **named)

    monkeypatch.setattr(SummaryWriter, what, refuses)
    trainer = await fit(tmp_path, 12)
    assert trainer.state.step == 12
    said = [text for record in caplog.records if (text := record.getMessage()).startswith("TensorBoard: ")]
    folder = tmp_path / "tensorboard"
    assert said == [f"TensorBoard: {folder} can't be written: No space left on device: it gets no more of this life"]
    assert [row["step"] for row in lines(tmp_path) if row["split"] == "train"] == [2, 4, 6, 8, 10, 12]


async def test_media_are_shown(tmp_path: Path) -> None:
    def log() -> None:
        trainer.log_media({"map": np.zeros((3, 5, 7)), "worst": {"row": [1]}, "errors": np.arange(4.0)})

    def make() -> Trainer:
        callbacks = [TensorBoard(), AtStep(1, log)]
        return Trainer(network(), nn.MSELoss(), callbacks=callbacks, run_dir=tmp_path, device="cpu")

    trainer = make()
    await trainer.fit(Samples(80), max_steps=4)
    found = read(tmp_path)
    assert (found.Images("map")[0].width, found.Images("map")[0].height) == (7, 5)
    assert b"| row |" in found.Tensors("worst/text_summary")[0].tensor_proto.string_val[0]
    assert found.Histograms("errors")[0].histogram_value.num == 4
    assert not (tmp_path / "media").exists()


async def test_histograms_hold_all_weights_at_each_multiple(tmp_path: Path) -> None:
    trainer = await fit(tmp_path, 12, histograms_every=4)
    weights = {name: parameter.numel() for name, parameter in trainer.model.named_parameters()}
    found = read(tmp_path)
    assert {name.removeprefix("weights/") for name in found.Tags()["histograms"]} == set(weights)
    for name, numel in weights.items():
        events = found.Histograms(f"weights/{name}")
        assert [event.step // 4 for event in events] == [1, 2, 3]
        assert {event.histogram_value.num for event in events} == {numel}


class Branching(nn.Module):
    """Cannot be traced: what it gives is not a tensor at last."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, inputs: Tensor) -> Any:
        made = self.net(inputs)
        return made if self.training else object()


async def test_the_graph_is_drawn_once_and_changes_nothing(tmp_path: Path) -> None:
    frozen = network()
    frozen[1].eval()  # type: ignore[index]
    drawn = await fit(tmp_path / "drawn", 6, model=frozen, graph=True)
    modes = [module.training for module in drawn.model.modules()]
    plain = network()
    plain[1].eval()  # type: ignore[index]
    bare = await fit(tmp_path / "bare", 6, model=plain)
    assert same(drawn.model, bare.model)
    assert modes == [module.training for module in bare.model.modules()]
    assert b"Linear" in read(tmp_path / "drawn").Graph().SerializeToString()
    await fit(tmp_path / "drawn", 12, graph=True)
    files = sorted((tmp_path / "drawn" / "tensorboard").iterdir())
    assert [b"Linear" in file.read_bytes() for file in files] == [True, False]


class Drawing(nn.Module):
    """Draws random numbers in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, inputs: Tensor) -> Tensor:
        made: Tensor = self.net(inputs)
        return made + torch.rand(())


async def test_the_graph_of_a_model_that_draws_costs_the_host_no_random_numbers(tmp_path: Path) -> None:
    model = Drawing()
    before = torch.get_rng_state()
    await fit(tmp_path, 6, model=model, graph=True)
    assert torch.equal(torch.get_rng_state(), before)


async def test_a_full_file_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamtrain.callbacks.tensorboard.FULL", 6)
    await fit(tmp_path, 12)
    await fit(tmp_path, 16)
    assert len(list((tmp_path / "tensorboard").iterdir())) > 3
    assert scalars(tmp_path, "loss") == as_lines(tmp_path, "loss")


async def test_a_model_that_cannot_be_traced_trains_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(
        Branching(), nn.MSELoss(), callbacks=[TensorBoard(graph=True)], run_dir=tmp_path, log_every=2, device="cpu"
    )
    result = await trainer.fit(Samples(80), max_steps=4)
    assert result.step == 4
    assert caplog.text.count("the model can't be traced") == 1
    assert capsys.readouterr().out == ""


async def test_a_folder_of_its_own_needs_no_run(tmp_path: Path) -> None:
    trainer = Trainer(network(), nn.MSELoss(), callbacks=[TensorBoard(log_dir=tmp_path / "tensorboard")], log_every=2)
    await trainer.fit(Samples(80), max_steps=4)
    assert [step for step, _ in scalars(tmp_path, "loss")] == [2, 4]


async def test_without_any_folder_it_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="TensorBoard needs a run_dir"):
        await Trainer(network(), nn.MSELoss(), callbacks=[TensorBoard()]).fit(Samples(80))


def test_a_package_that_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="TensorBoard needs the package tensorboard or tensorboardX") as caught:
        TensorBoard()
    assert caught.value.hint == "pip install 'streamtrain[tensorboard]'"


@pytest.mark.parametrize("options", [{"histograms_every": 0}, {"graph": "yes"}], ids=str)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        TensorBoard(**options)


def test_a_line_that_was_handed_over_is_known_in_the_next_life() -> None:
    line, other = Log(step=4, values={"loss": 1.0}), Log(step=4, split="val", values={"val_loss": 1.0})
    once = Once()
    assert [once.first(line), once.first(line), once.first(other)] == [True, False, True]
    later, fresh = Once(), Once()
    later.load_state_dict(once.state_dict())
    fresh.load_state_dict(once.state_dict())
    later.begin(4)
    fresh.begin(0)
    assert [later.first(line), later.first(other), later.first(Log(step=5, values={"loss": 1.0}))] == [
        False,
        False,
        True,
    ]
    assert fresh.first(line)


def test_weights_of_any_kind_have_a_histogram() -> None:
    from streamtrain.callbacks.tensorboard import _count

    assert _count(torch.ones(5)).counts.sum() == 5
    assert _count(torch.tensor([1.0, float("nan")])).left_out == 1
    assert _count(torch.tensor([float("inf")])).counts.sum() == 0
    assert _count(torch.tensor([3e38, -3e38])).counts.sum() == 2
    turned = _count(torch.tensor([1 + 2j, 3 - 4j]).conj())
    assert (turned.counts.sum(), turned.total, turned.squares) == (4, 1 + 3 - 2 + 4, 1 + 9 + 4 + 16)
