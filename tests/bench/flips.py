"""What a checkpoint's files may come to on a disk: a flipped bit, another length, something else in a file's place.

Each is done to the newest of two checkpoints of a run that was trained. All must be detected and told with the file's
name by `streamtrain checkpoints RUN`, and `resume="auto"` must take the one before. Then the damaged run is trained to
its end, and its weights are those of a run that nobody disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from data_tools.synth import synth
from streamtrain import checkpoint, resume
from streamtrain.cli import main
from streamtrain.errors import CheckpointError
from tests.bench import life
from tests.bench.measure import Measure, Options

COLUMNS, EPOCHS, EVERY, ROWS = 8, 2, 5, 1000
FLIPS, CUTS = 500, 100

Damage = Callable[[Path], None]


def run(options: Options) -> Iterator[Measure]:
    """Every damage in turn, each told and passed over; a few runs go on from there."""
    flips, cuts = (40, 4) if options.quick else (FLIPS, CUTS)
    quieted = logging.getLogger("streamtrain")
    quieted.setLevel(logging.CRITICAL)  # each damage is warned of: not here
    try:
        with options.room() as room:
            yield from measured(room, flips, cuts)
    finally:
        quieted.setLevel(logging.NOTSET)


def measured(room: Path, flips: int, cuts: int) -> Iterator[Measure]:
    """What was done of each kind, and what was missed."""
    store = synth(room / "store.zarr", rows=ROWS, columns=COLUMNS, chunk_rows=100)
    for name, epochs in (("whole", EPOCHS), ("half", EPOCHS - 1)):
        (room / name).mkdir()
        asyncio.run(train(store, room / name, epochs))
    whole = ending(room / "whole")
    done, missed, other = Counter[str](), Counter[str](), 0
    for number, (kind, name, damage) in enumerate(damages(room / "half", flips, cuts)):
        done[kind] += 1
        missed[kind] += not noticed(room / "half", name, damage)
        if number % (1 + (flips + 4 * cuts) // 3) == 0:
            other += resumed(store, room, name, damage) != whole
    for kind, count in done.items():
        yield Measure(name=f"{kind}: done", values=(count,))
        yield Measure(name=f"{kind}: not told, or not passed over", values=(missed[kind],), at_most=0)
    yield Measure(name="damaged runs with other weights at the end", values=(other,), at_most=0)


async def train(store: Path, folder: Path, epochs: int) -> None:
    """A run of so many epochs, or the rest of it."""
    with contextlib.redirect_stdout(io.StringIO()):
        await life.main(str(store), folder, COLUMNS, epochs, EVERY)


def ending(folder: Path) -> str:
    """The digest of the last weights."""
    newest = checkpoint.newest_valid(folder / "run" / "checkpoints")
    assert newest is not None
    return life.digest(checkpoint.read(newest.path).model)


def newest_two(folder: Path) -> tuple[Path, Path]:
    """The newest checkpoint, and the one before."""
    before, newest = sorted((folder / "run" / "checkpoints").glob("step-*"))[-2:]
    return newest, before


def damages(folder: Path, flips: int, cuts: int) -> Iterator[tuple[str, str, Damage]]:
    """Kind, the name of a file of a checkpoint, and what is done to it."""
    rng, (newest, _) = random.Random(7), newest_two(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(newest.iterdir())}
    for number in range(flips):
        name = [*sizes][number % len(sizes)]  # small files as often as large ones
        yield "a bit flipped", name, flipped(rng.randrange(8 * sizes[name]))
    for name, size in sizes.items():
        for length in (0, size - 1, *rng.sample(range(1, size - 1), cuts - 2)):
            yield "cut", name, cut(length)
        for more in (b"\0", b"\n", b" " * 4096):
            yield "extended", name, extended(more)
        for what, put in OTHERS.items():
            yield f"replaced by {what}", name, replaced(put)
        yield "replaced by its older self", name, older


def flipped(bit: int) -> Damage:
    """One bit, as a disk or memory flips it."""

    def damage(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

    return damage


def cut(length: int) -> Damage:
    """The file's beginning, so many bytes."""
    return lambda path: os.truncate(path, length)


def extended(more: bytes) -> Damage:
    """Bytes behind its end."""

    def damage(path: Path) -> None:
        with open(path, "ab") as file:
            file.write(more)

    return damage


OTHERS: dict[str, Damage] = {
    "nothing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a FIFO": lambda path: os.mkfifo(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
}


def replaced(put: Damage) -> Damage:
    """Something else in its place."""

    def damage(path: Path) -> None:
        path.unlink()
        put(path)

    return damage


def older(path: Path) -> None:
    """The same file of the checkpoint before, as a backup may bring it back."""
    before = sorted(path.parent.parent.glob("step-*"))[-2]
    shutil.copy(before / path.name, path)


def noticed(folder: Path, name: str, damage: Damage) -> bool:
    """Whether it is told, with the file's name, and passed over; the checkpoint is as before afterwards."""
    newest, before = newest_two(folder)
    kept = folder / "kept"
    shutil.copytree(newest, kept)
    try:
        damage(newest / name)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = main(["checkpoints", str(folder / "run")])
        told = [line for line in said.getvalue().splitlines() if newest.name in line]
        try:
            found = resume.find(newest.parent, "auto")
        except CheckpointError:
            return False
        passed_over = found is not None and found[0] == before
        # Where a file is that of another checkpoint, the others are as much to blame.
        what = "damaged: " if damage is older else f"damaged: {name}, "
        return passed_over and code == 0 and len(told) == 1 and what in told[0]
    finally:
        shutil.rmtree(newest)
        kept.rename(newest)


def resumed(store: Path, room: Path, name: str, damage: Damage) -> str:
    """Train a copy of the run to its end, with this damage."""
    folder = room / "damaged"
    shutil.copytree(room / "half", folder)
    try:
        damage(newest_two(folder)[0] / name)
        asyncio.run(train(store, folder, EPOCHS))
        return ending(folder)
    finally:
        shutil.rmtree(folder)
