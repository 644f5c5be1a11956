"""What the demo promises: it learns, draws, says where to look, and carries on where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamtrain import demo
from streamtrain.cli import main
from streamtrain.data.batch import Batch
from streamtrain.demo import MASK_SHAPE, Recipe, ToPoints, points_on_sphere
from streamtrain.events import BatchEnd
from streamtrain.trainer import Trainer
from tests.engine import same

TINY = Recipe(
    every=30,
    lines_together=64,
    validation=(0.9, 1.0),
    validate_on=4,
    batch_size=512,
    features=32,
    hidden=32,
    steps=80,
    validate_every=40,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mask thinned out, made once."""
    return demo.prepare(demo.find_mask(), tmp_path_factory.mktemp("demo") / "world.zarr", TINY)


@pytest.fixture
def out(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a world, where the quick demo is a tiny one."""
    monkeypatch.setattr(demo, "QUICK", TINY)
    (tmp_path / "world-quick.zarr").symlink_to(world)
    return tmp_path


def demonstrate(out: Path) -> int:
    return main(["demo", "--quick", "--out", str(out)])


def test_it_learns_draws_and_says_where_to_look(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demonstrate(out) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["val_accuracy"] for line in lines if line["split"] == "val"]
    assert len(accuracies) == 2
    assert accuracies[-1] > demo.SEA_SHARE
    with Image.open(out / "plots" / "world.png") as picture:
        assert picture.size == (2 * 720 + 12, 360 + 24)
    assert {path.name for path in (out / "plots").iterdir()} == {"world-000040.png", "world-000080.png", "world.png"}
    shown, told = capsys.readouterr()
    assert f"{out}/plots/world.png" in shown
    assert "warning" not in told
    assert "finished: 80 steps" in shown
    assert demonstrate(out) == 0
    assert "finished: 80 steps" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, -1])
def test_a_damaged_world_is_an_error_of_the_data_wherever_it_is_met(
    out: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    world = out / "world-quick.zarr"
    whole, copied = world.resolve(), out / "copy.zarr"
    shutil.copytree(whole, copied)
    world.unlink()
    copied.rename(world)
    shard = sorted(path for path in (world / "c").rglob("*") if path.is_file())[number]
    data = bytearray(shard.read_bytes())
    for at in range(len(data) // 4, len(data) // 2):
        data[at] ^= 0xFF
    shard.write_bytes(data)
    assert demonstrate(out) == 3
    told = capsys.readouterr().err
    assert "internal error" not in told
    assert f"verify {world}" in told or "damaged" in told


def test_a_picture_that_can_t_be_written_is_the_environments_problem_and_it_carries_on(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "plots").write_text("in the way")
    assert demonstrate(out) == 5
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error == f"error: {out}/plots/world-000040.png can't be written: File exists"
    assert hint.startswith("hint: Make room")
    (out / "plots").unlink()
    assert demonstrate(out) == 0
    assert "finished: 80 steps" in capsys.readouterr().out


class Interrupt:
    def __init__(self) -> None:
        self.done = False

    def on_batch_end(self, event: BatchEnd) -> None:
        if not self.done:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_and_the_same_command_again_carry_on(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = demo.build

    def with_interrupt(out: Path, world: Path, recipe: Recipe) -> Trainer:
        trainer = build(out, world, recipe)
        trainer.callbacks.append(Interrupt())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(demo, "build", with_interrupt)
        assert demonstrate(out) == 130
    assert "the same command again carries on" in capsys.readouterr().out
    assert demonstrate(out) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 80
    resumed = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert resumed[-1]["event"] == "train_end"


def test_two_fresh_demos_begin_with_the_same_weights(world: Path, tmp_path: Path) -> None:
    one, other = (demo.build(tmp_path, world, TINY) for _ in range(2))
    assert same(one.model, other.model)


def test_pixels_lie_where_they_should_on_the_sphere() -> None:
    height, width = MASK_SHAPE
    middle = (height // 2) * width + width // 2
    points = points_on_sphere(np.array([0, middle, height * width - 1]), height, width)
    assert np.allclose(points, [[0, 0, 1], [1, 0, 0], [0, 0, -1]], atol=1e-3)
    assert np.allclose(np.linalg.norm(points, axis=1), 1, atol=1e-6)


def test_the_transform_turns_sea_into_land_and_may_thin_out() -> None:
    batch = Batch(inputs=np.array([True, False, True, False]), index=np.arange(4))
    points, land = ToPoints(2, 2)(batch)
    assert points.shape == (4, 3)
    assert land.tolist() == [0, 1, 0, 1]
    assert ToPoints(2, 2, keep=2)(batch)[1].tolist() == [0, 0]
