"""The demo: learn the map of the world, pixel by pixel, from a mask of land and sea that a package ships.

Law: nothing here is private; it is the program that a user would write. 21600 x 43200 pixels are turned into Zarr once,
streamed in shuffled order, and fitted by a small network that sees only where on the sphere a pixel lies.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor, nn

from data_tools.convert import Layout, convert
from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.callbacks.progress_bar import ProgressBar
from streamtrain.data.batch import Batch
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import DataError, EnvironmentProblem
from streamtrain.events import ValidationEnd
from streamtrain.metrics import Accuracy
from streamtrain.progress import FitResult
from streamtrain.trainer import Trainer
from streamtrain.watch import Watch

MASK_SHAPE = (21600, 43200)
"""Lines from north to south, pixels from the date line eastward."""
SEA_SHARE = 0.669
"""Share of the mask's pixels that are sea: what always answering "sea" would score."""
PICTURE = (360, 720)
"""Height and width of the drawn map, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How much of everything: the sizes that decide how long the demo takes and how well it does."""

    every: int
    """Keep each n-th line and column of the mask (1: all of its 933 million pixels)."""
    lines_together: int
    """Lines of latitude that are shuffled together; each is one chunk."""
    validation: tuple[float, float]
    """The part of the lines that is held out."""
    validate_on: int
    """Of the held out pixels, look at one in so many."""
    batch_size: int
    features: int
    hidden: int
    steps: int
    validate_every: int
    save_every: str = "10s"


FULL = Recipe(
    every=1,
    lines_together=256,
    validation=(0.9, 0.92),
    validate_on=64,
    batch_size=4096,
    features=128,
    hidden=256,
    steps=700,
    validate_every=140,
)
QUICK = Recipe(
    every=10,
    lines_together=256,
    validation=(0.9, 1.0),
    validate_on=16,
    batch_size=2048,
    features=64,
    hidden=64,
    steps=200,
    validate_every=50,
)


class FourierMLP(nn.Module):
    """Logits of "land", shape (B,), for points on the unit sphere, float32 of shape (B, 3).

    A plain network on coordinates learns only smooth shapes. Sines and cosines of random projections, with wavelengths
    from a continent down to a bay, let it learn coastlines (Tancik et al. 2020, arXiv 2006.10739).
    """

    waves: Tensor

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        scale = torch.logspace(0, math.log10(30), features)
        self.register_buffer("waves", torch.randn(3, features, generator=generator) * scale)
        self.layers = nn.Sequential(
            nn.Linear(2 * features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, points: Tensor) -> Tensor:
        """Logits (B,) for points (B, 3)."""
        phase = points @ self.waves
        logits: Tensor = self.layers(torch.cat([phase.sin(), phase.cos()], dim=1))
        return logits.squeeze(1)


def points_on_sphere(index: NDArray[np.int64], height: int, width: int) -> NDArray[np.float32]:
    """Unit vectors (B, 3) of the pixels with these numbers, counted line by line from the north-west corner."""
    line, column = np.divmod(index, width)
    latitude = np.float32(math.pi) * (np.float32(0.5) - (line.astype(np.float32) + np.float32(0.5)) / height)
    longitude = np.float32(2 * math.pi) * ((column.astype(np.float32) + np.float32(0.5)) / width - np.float32(0.5))
    across = np.cos(latitude)
    return np.stack([across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)], axis=1)


@dataclass(frozen=True)
class ToPoints:
    """The transform: a batch of pixels (True is sea) becomes (points, land), both float32; one in `keep` stays."""

    height: int
    width: int
    keep: int = 1

    def __call__(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        chosen = slice(None) if self.keep == 1 else np.flatnonzero(batch.index % self.keep == 0)
        land = 1.0 - batch.inputs[chosen].astype(np.float32)
        return points_on_sphere(batch.index[chosen], self.height, self.width), land


class Painter(Callback):
    """After each validation: the world as the model sees it, left, beside the true one, as a PNG."""

    def __init__(self, truth: NDArray[np.bool_], folder: Path) -> None:
        self.truth, self.folder = truth, folder
        height, width = truth.shape
        self.points = torch.from_numpy(points_on_sphere(np.arange(height * width), height, width))

    async def on_validation_end(self, event: ValidationEnd) -> None:
        if not event.sanity:
            accuracy = event.metrics["val_accuracy"]
            await event.on_train_thread(lambda model, _: self.paint(model, event.step, accuracy))

    def paint(self, model: nn.Module, step: int, accuracy: float) -> None:
        """Draw `world-<step>.png` and the same as `world.png`; runs between two bursts of steps."""
        from PIL import Image, ImageDraw

        device = next(model.parameters()).device
        with torch.inference_mode():
            land = torch.cat([model(part.to(device)).sigmoid().cpu() for part in torch.split(self.points, 16384)])
        height, width = self.truth.shape
        picture = Image.new("RGB", (2 * width + 12, height + 24), "white")
        for left, title, share in (
            (0, f"learned: step {step}, val_accuracy {accuracy:.2%}", land.numpy().reshape(height, width)),
            (width + 12, "true", self.truth.astype(np.float32)),
        ):
            picture.paste(Image.fromarray(colours(share)), (left, 24))
            ImageDraw.Draw(picture).text((left + 4, 6), title, fill="black")
        for name in (f"world-{step:06d}.png", "world.png"):
            part = self.folder / f".{name}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                picture.save(part, format="PNG")
                part.rename(self.folder / name)
            except OSError as error:
                with suppress(OSError):
                    part.unlink()
                raise EnvironmentProblem(
                    f"{self.folder / name} can't be written: {error.strerror or error}",
                    hint="Make room, or mend the permissions; the same command carries on from the last checkpoint.",
                ) from error


def colours(land: NDArray[np.float32]) -> NDArray[np.uint8]:
    """RGB of shape (H, W, 3) for shares of land in [0, 1], shape (H, W): blue sea to green land."""
    sea, earth = np.array([28, 74, 132], dtype=np.float32), np.array([112, 158, 76], dtype=np.float32)
    return (sea + land[..., None] * (earth - sea)).astype(np.uint8)


def run(*, out: Path = Path("runs/demo"), quick: bool = False, max_epochs: int | None = None) -> int:
    """Run the demo in the folder `out` and return the exit code: 0, or 129/130/143 if a signal ended it (saved).

    The same call again carries on from the newest checkpoint. `quick` takes a hundredth of the pixels and a smaller
    model, and some seconds. Raises EnvironmentProblem where the packages of the extra `demo` are missing.
    """
    mask, recipe = find_mask(), QUICK if quick else FULL
    with Watch(grace=25) as watch:
        world = prepare(mask, out / ("world-quick.zarr" if quick else "world.zarr"), recipe)
        trainer = build(out, world, recipe)
        result = asyncio.run(train(trainer, world, recipe, max_epochs, watch))
    report(out, world, recipe, result)
    return watch.exit_code(result.reason)


def find_mask() -> Path:
    """The file that the package ships, found without importing it (which would take 1 GB of memory)."""
    missing = [name for name in ("global_land_mask", "PIL") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"the demo needs {' and '.join(missing)}, which is not installed", hint="pip install 'streamtrain[demo]'"
        )
    package = importlib.util.find_spec("global_land_mask")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name("globe_combined_mask_compressed.npz")


def prepare(mask: Path, world: Path, recipe: Recipe) -> Path:
    """Turn the mask into Zarr, unless that is done: one chunk a line of latitude, 240 of them in a file."""
    if world.exists():
        return world
    started = time.monotonic()
    print(f"writing {world} (once)", flush=True)
    width = -(-MASK_SHAPE[1] // recipe.every)
    convert(
        mask,
        world,
        member="mask",
        every=recipe.every,
        layout=Layout(chunks=(1, width), shards=(240, width), codec="zstd"),
        attributes={"about": "True is sea; line 0 is the north pole, column 0 the date line", "source": mask.name},
    )
    print(f"done in {time.monotonic() - started:.0f} s", flush=True)
    return world


def true_map(world: Path) -> NDArray[np.bool_]:
    """The land of the world, thinned out to a picture's size. Raises DataError where zarr can't read it."""
    try:
        array: Any = zarr.open_array(world, mode="r")
        down, right = array.shape[0] // PICTURE[0], array.shape[1] // PICTURE[1]
        lines = [array[line][right // 2 :: right] for line in range(down // 2, array.shape[0], down)]
    except Exception as error:  # zarr's codecs raise what they like
        raise DataError(
            f"{world} can't be read: {type(error).__name__}: {error}",
            hint=f"streamtrain verify {world} --deep names what is damaged; without it the demo writes it again.",
        ) from error
    return ~np.stack(lines)


def build(
    out: Path, world: Path, recipe: Recipe, *, step: Callable[[nn.Module], Callable[..., Any]] | None = None
) -> Trainer:
    """The model and all that trains it; nothing is read or written yet but the true map. `step`: makes a step function
    of one's own out of the loss."""
    torch.manual_seed(0)  # the weights that a model begins with are drawn when it is made
    loss = nn.BCEWithLogitsLoss()
    return Trainer(
        FourierMLP(recipe.features, recipe.hidden),
        loss,
        step=None if step is None else step(loss),
        optimizer="adam",
        lr=5e-3,
        scheduler={"name": "cosine", "warmup": "20steps"},
        metrics={"accuracy": Accuracy()},
        callbacks=[
            Painter(true_map(world), out / "plots"),
            ModelCheckpoint(every=recipe.save_every, monitor="val_accuracy", save_top_k=1, keep_last=2),
            ProgressBar(),
        ],
        run_dir=out,
        seed=0,
        log_every=10,
        validate_every=f"{recipe.validate_every}steps",
    )


def streams(world: Path, recipe: Recipe) -> tuple[ZarrStream, ZarrStream]:
    """The world's pixels to be trained on, in shuffled order, and those that are held out."""
    height, width = (-(-size // recipe.every) for size in MASK_SHAPE)
    common: dict[str, Any] = {"batch_size": recipe.batch_size, "sample_axes": (0, 1), "split_by": "chunk", "seed": 0}
    lines = ZarrStream(
        world,
        split=(0.0, 0.9),
        shuffle="block",
        shuffle_blocks=recipe.lines_together,
        transform=ToPoints(height, width),
        memory="512MiB",
        **common,
    )
    held_out = ZarrStream(
        world,
        split=recipe.validation,
        transform=ToPoints(height, width, keep=recipe.validate_on),
        memory="256MiB",
        **common | {"batch_size": recipe.batch_size * recipe.validate_on},
    )
    return lines, held_out


async def train(trainer: Trainer, world: Path, recipe: Recipe, max_epochs: int | None, watch: Watch) -> FitResult:
    """Stream the world's pixels through `trainer`, from where the last run in this folder stopped."""
    lines, held_out = streams(world, recipe)
    async with lines, held_out:
        watch.begins(trainer)
        return await trainer.fit(
            lines, validation=held_out, max_epochs=max_epochs, max_steps=recipe.steps, resume="auto"
        )


def report(out: Path, world: Path, recipe: Recipe, result: FitResult) -> None:
    """Say how it went, where everything lies, and how to go on."""
    if result.best is not None:
        print(
            f"best val_accuracy {result.best.value:.2%} at step {result.best.step}, "
            f'on held out lines of the map (always "sea": {SEA_SHARE:.1%})'
        )
    if result.step < recipe.steps:
        print(f"stopped at step {result.step} of {recipe.steps} ({result.reason}); the same command again carries on")
    else:
        print(f"finished: {result.step} steps; remove {out} to start over")
    for what, where in (
        ("the learned world beside the true one", out / "plots" / "world.png"),
        ("the same after each validation", out / "plots" / "world-*.png"),
        ("metrics, a line each", out / "metrics.jsonl"),
        ("newest checkpoint", result.checkpoint),
        ("all checkpoints", f"python -m streamtrain checkpoints {out}"),
        ("the data", f"python -m streamtrain inspect {world}"),
    ):
        print(f"  {what:40} {where}")
