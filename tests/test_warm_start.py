"""What a warm start promises: the weights that fit, what does not is said, and all else begins fresh."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_tools.synth import synth
from streamtrain import checkpoint
from streamtrain.cli import main
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.trainer import Trainer
from streamtrain.warm_start import begin_with, match
from tests.engine import Samples, lines, network, same

Capture = pytest.CaptureFixture[str]


def trainer(model: nn.Module | None = None, **options: object) -> Trainer:
    common = {"seed": 5, "device": "cpu", "log_every": 1}
    return Trainer(model or network(), nn.MSELoss(), **{**common, **options})  # type: ignore[arg-type]


def other_head() -> nn.Module:
    """The network with three outputs in place of one."""
    model = network()
    assert isinstance(model, nn.Sequential)
    model[4] = nn.Linear(16, 3)
    return model


async def test_a_run_begins_with_the_weights_and_all_else_fresh(tmp_path: Path) -> None:
    first = trainer(run_dir=tmp_path / "a")
    await first.fit(Samples(), max_epochs=1)
    begun = trainer(run_dir=tmp_path / "b")
    await begun.load_weights(tmp_path / "a")
    assert same(begun.model, first.model)
    bare = trainer(run_dir=tmp_path / "c")
    bare.model.load_state_dict(first.model.state_dict())
    for each in (begun, bare):
        await each.fit(Samples(), max_epochs=1)
    assert same(begun.model, bare.model)
    assert lines(tmp_path / "b") == lines(tmp_path / "c")
    assert lines(tmp_path / "b")[0]["step"] == 1


async def test_the_weights_of_an_average_are_those_that_count(tmp_path: Path) -> None:
    first = trainer(ema=0.5, run_dir=tmp_path / "a")
    await first.fit(Samples(), max_epochs=1)
    begun = trainer()
    await begun.load_weights(tmp_path / "a")
    average = first.average
    assert average is not None
    assert all(torch.equal(begun.model.state_dict()[name], weight) for name, weight in average.items())
    assert not same(begun.model, first.model)


async def test_what_does_not_fit_is_refused_with_a_table_and_changes_nothing(tmp_path: Path) -> None:
    await trainer(run_dir=tmp_path / "a").fit(Samples(), max_steps=2)
    model = other_head()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"4\.weight: float32\[1, 16\] -> float32\[3, 16\]") as caught:
        await trainer(model).load_weights(tmp_path / "a")
    assert "partial=True" in caught.value.hint
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


async def test_a_part_is_taken_and_what_is_not_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = trainer(run_dir=tmp_path / "a")
    await first.fit(Samples(), max_steps=2)
    head = other_head()
    kept = head.state_dict()["4.weight"].clone()
    with caplog.at_level(logging.INFO):
        await trainer(head).load_weights(tmp_path / "a", partial=True)
    assert torch.equal(head.state_dict()["0.weight"], first.model.state_dict()["0.weight"])
    assert torch.equal(head.state_dict()["4.weight"], kept)
    assert "7 tensors" in caplog.text
    assert "of another shape (saved -> now): 4.weight: float32[1, 16] -> float32[3, 16]" in caplog.text


def test_names_that_are_left_and_unused_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    weights = {"body.weight": torch.ones(2, 2), "body.bias": torch.ones(2), "tail.weight": torch.ones(1)}
    begin_with(weights, model, Path("w"), partial=True)
    assert "left as they were, for there is nothing for them: head.weight, head.bias" in caplog.text
    assert "unused, for the model has no place: tail.weight" in caplog.text
    with pytest.raises(CheckpointError, match="unused"):
        begin_with(weights, model, Path("w"), partial=False)
    with pytest.raises(CheckpointError, match="do not fit") as caught:
        begin_with({"other": torch.ones(1)}, model, Path("w"), partial=True)
    assert "Not one tensor fits" in caught.value.hint


def test_half_precision_fits_whole_numbers_do_not() -> None:
    model = nn.Linear(2, 2)
    assert match({"weight": torch.ones(2, 2).half(), "bias": torch.ones(2).bfloat16()}, model).whole
    assert not match({"weight": torch.ones(2, 2).int(), "bias": torch.ones(2)}, model).whole


def test_tied_weights_under_one_of_their_names_are_all_there() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert match({"embed.weight": torch.ones(4, 2)}, model).whole


async def test_sizes_that_nobody_knows_yet_come_from_the_weights(tmp_path: Path) -> None:
    await trainer(nn.Linear(4, 1), run_dir=tmp_path / "a").fit(Samples(), max_steps=2)
    lazy = trainer(nn.LazyLinear(1))
    await lazy.load_weights(tmp_path / "a")
    assert lazy.optimizer is not None
    assert lazy.model.weight.shape == (1, 4)


async def test_a_run_that_has_begun_takes_no_other_weights(tmp_path: Path) -> None:
    begun = trainer(run_dir=tmp_path / "a")
    await begun.fit(Samples(), max_steps=2)
    with pytest.raises(ConfigError, match="after 2 steps"):
        await begun.load_weights(tmp_path / "a")


# --- the command line ---

NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.body(x))
"""
FIT = ["fit", "--data", "d.zarr", "--inputs", "x", "--targets", "y", "--model", "warm_nets:Net", "--loss", "mse"]
FIT += ["--batch-size", "16", "--device", "cpu", "--seed", "1", "-q", "--run-dir"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data, a model, and weights as Lightning and DDP would have saved them."""
    synth(tmp_path / "d.zarr", rows=64, columns=4, chunk_rows=16)
    (tmp_path / "warm_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    body, head = nn.Linear(4, 8), nn.Linear(8, 1)
    named = {"body": body, "head": head}
    state = {f"model.{name}.{key}": t for name, layer in named.items() for key, t in layer.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 9}, tmp_path / "net.ckpt")
    yield tmp_path
    sys.modules.pop("warm_nets", None)


def test_a_foreign_file_is_brought_in_and_begun_with(place: Path, capsys: Capture) -> None:
    assert main(["import-pt", "net.ckpt", "w", "--model", "warm_nets:Net"]) == 0
    assert "--model-weights /" in capsys.readouterr().out
    saved = checkpoint.read(place / "w").model
    assert sorted(saved) == ["body.bias", "body.weight", "head.bias", "head.weight"]
    assert main([*FIT, "run", "--model-weights", "w", "--lr", "0"]) == 0
    (trained,) = (place / "run" / "checkpoints").iterdir()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in checkpoint.read(trained).model.items())
    assert main([*FIT, "run", "--model-weights", "elsewhere", "--lr", "0", "--resume", "auto"]) == 0


def test_what_a_kill_left_of_an_import_goes_when_it_is_done_again(place: Path) -> None:
    left = place / ".tmp-w-0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert main(["import-pt", "net.ckpt", "w"]) == 0
    assert not left.exists()


def test_a_part_fits_another_head(place: Path, capsys: Capture) -> None:
    assert main(["import-pt", "net.ckpt", "w"]) == 0
    wider = ["x" if word == "y" else word for word in FIT] + ["run", "--set", "model.args={outputs = 4}"]
    wider += ["--model-weights", "w", "--lr", "0"]
    assert main(wider) == 4
    assert "head.weight: float32[1, 8] -> float32[4, 8]" in capsys.readouterr().err
    code = main([*wider, "--partial-weights"])
    shown = capsys.readouterr().err
    assert (code, "head.weight" in shown) == (0, True), shown


def test_weights_for_a_run_lie_beside_its_checkpoints_and_must_fit_its_model(place: Path, capsys: Capture) -> None:
    assert main([*FIT, "run"]) == 0
    assert main(["import-pt", "net.ckpt", "run"]) == 0
    assert (place / "run" / "weights" / "net").is_dir()
    torch.save({"other": torch.zeros(2)}, "other.pt")
    assert main(["import-pt", "other.pt", "run"]) == 4
    assert "other" in capsys.readouterr().err
    assert not (place / "run" / "weights" / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["import-pt", "nix.pt", "w"], 2, "nix.pt is not there"),
        (["import-pt", "d.zarr", "w"], 2, "d.zarr is a folder"),
        (["import-pt", "warm_nets.py", "w"], 4, "warm_nets.py is no"),
        (["import-pt", "net.ckpt", "d.zarr"], 4, "d.zarr exists already"),
        ([*FIT, "run", "--model-weights", "net.ckpt"], 4, "net.ckpt is a file, not a checkpoint"),
        ([*FIT, "run", "--model-weights", "nix"], 4, "nix"),
    ],
    ids=["nothing", "folder", "no-weights", "in-the-way", "pickle", "no-checkpoint"],
)
def test_what_can_t_be_begun_with_is_refused(
    place: Path, capsys: Capture, arguments: list[str], code: int, said: str
) -> None:
    assert main(arguments) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert not (place / "run" / "metrics.jsonl").exists()


def test_weights_alone_are_nothing_to_go_on_with(place: Path, capsys: Capture) -> None:
    assert main(["import-pt", "net.ckpt", "w", "--model", "warm_nets:Net"]) == 0
    assert main([*FIT, "run", "--resume", "w"]) == 4
    assert "holds weights alone (of net.ckpt)" in capsys.readouterr().err
    assert main([*FIT, "run", "--model-weights", "w"]) == 0
    assert json.loads((place / "run" / "status.json").read_text())["state"] == "completed"


class Tied(nn.Module):
    """Two layers with one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.other.weight = self.one.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.other(self.one(inputs)))
        return outputs


async def test_tied_weights_of_an_average_count_under_each_of_their_names(tmp_path: Path) -> None:
    first = trainer(Tied(), ema=0.9, run_dir=tmp_path / "a")
    await first.fit(Samples(), max_epochs=1)
    begun = trainer(Tied())
    await begun.load_weights(tmp_path / "a")
    average, weights = first.average, begun.model.state_dict()
    assert average is not None
    assert all(torch.equal(weights[name], value) for name, value in average.items())


@pytest.mark.parametrize("path", [3, None, "", b""], ids=repr)
async def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(ConfigError, match=r"load_weights: path must be 'auto', 'best' or a path, not "):
        await Trainer(network(), nn.MSELoss(), device="cpu").load_weights(path)
