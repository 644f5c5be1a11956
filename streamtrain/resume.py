"""Which checkpoint a fit goes on from. Blocking, for a thread; its law: a run is never started over in silence."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from streamtrain import checkpoint
from streamtrain.disk import LOCAL, Disk, sync_folder
from streamtrain.errors import UNREADABLE, CheckpointError, ConfigError, EnvironmentProblem
from streamtrain.foreign import refuse_to_go_on
from streamtrain.refusing import refusing
from streamtrain.state import Snapshot

logger = logging.getLogger(__name__)

JOURNALS = ".*-lines"
"""Files of a run's folder that tell which lines of its log are elsewhere already."""
TAIL = 4096
"""Bytes at the end of a log."""
Resume = str | os.PathLike[str] | None


def weights(checkpoints: Path, path: str | os.PathLike[str], *, disk: Disk = LOCAL) -> tuple[Path, dict[str, Tensor]]:
    """The weights that count of a checkpoint, where `find` finds it; those of the moving average if it has one.

    Raises CheckpointError.
    """
    if os.path.isfile(path):
        raise CheckpointError(
            f"{path} is a file, not a checkpoint (pickles are never loaded)",
            hint=f"Bring it in first: streamtrain import-pt {path} OUT, which gives a checkpoint.",
        )
    where, snapshot = _read(checkpoints, path, disk) or (None, None)
    if where is None or snapshot is None:
        raise CheckpointError(f"there is no checkpoint in {checkpoints}", hint="Give the path of one.")
    average = snapshot.state.get("average") if isinstance(snapshot.state, dict) else None
    averaged = average.get("weights", {}) if isinstance(average, dict) else {}
    if averaged:
        logger.info("the weights of %s are those of its moving average", where)
    return where, _with(averaged, snapshot.model)


def _with(averaged: dict[str, Tensor], model: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state with these parameters, under all names of each: an average knows tied ones by their first."""
    there = {_place(model[name]): tensor for name, tensor in averaged.items() if name in model}
    return {name: there.get(_place(tensor), tensor) for name, tensor in model.items()}


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What tied tensors have in common, and no others."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape) if tensor.numel() else (id(tensor),)


def check(resume: object, name: str = "resume") -> None:
    """Raise ConfigError for what names no checkpoint."""
    if not isinstance(resume, str | os.PathLike) or not os.fspath(resume) or "\0" in os.fsdecode(resume):
        raise ConfigError(
            f"{name} must be 'auto', 'best' or a path, not {resume!r:.80}",
            hint="'auto' goes on from the newest checkpoint of the run's folder.",
        )


def refuse_unasked(checkpoints: Path, own: Collection[Path] = ()) -> None:
    """Raise ConfigError if there are checkpoints: whoever fits into this folder has to say what becomes of them.

    Those that are the trainer's `own` are of the run that goes on. Raises EnvironmentProblem where it can't be read.
    """
    try:
        names = os.listdir(checkpoints) if checkpoints.is_dir() else []  # a glob takes what it may not read for empty
        found = sorted({checkpoints / name for name in names if name.startswith("step-")}.difference(own))
    except OSError as error:
        raise EnvironmentProblem(
            f"the run folder {checkpoints.parent} can't be read: {error.strerror}",
            hint="choose another run_dir, or mend its permissions",
        ) from error
    if found:
        raise ConfigError(
            f"{checkpoints} holds checkpoints ({found[-1].name} is the newest), and resume was not given",
            hint="Give resume='auto' (--resume auto) to go on from there, or another run_dir to start anew.",
        )


def find(checkpoints: Path, resume: Resume, *, disk: Disk = LOCAL) -> tuple[Path, Snapshot] | None:
    """The checkpoint to go on from, verified and read at once; None for a fresh start, which is said.

    Nothing is changed but that what a commit left behind when it died is cleared away.
    "auto": the newest that is valid; "best": the one that the newest names as its best; else a path of a checkpoint,
    a folder of checkpoints, or a run's folder. Raises CheckpointError.
    """
    found = _read(checkpoints, resume, disk)
    if found is not None:
        refuse_to_go_on(found[1].state, found[0])
    return found


def _read(checkpoints: Path, resume: Resume, disk: Disk) -> tuple[Path, Snapshot] | None:
    assert resume is not None
    if resume == "auto":
        checkpoint.sweep(checkpoints, disk=disk)
        found = checkpoint.read_newest(checkpoints, disk=disk)
        if found is None:
            logger.info("no checkpoint in %s: starting fresh", checkpoints)
        return found
    if resume == "best":
        checkpoint.sweep(checkpoints, disk=disk)
        return _best(checkpoints, disk)
    path = Path(os.path.abspath(resume))
    try:
        for folder in (path / "checkpoints", path):
            if checkpoint.holds_any(folder, disk=disk):
                found = checkpoint.read_newest(folder, disk=disk)
                if found is not None:
                    return found
        return path, checkpoint.read(path, disk=disk)
    except OSError as error:  # of a name that is none, a folder that may not be looked into, a disk that fails
        raise CheckpointError(
            f"{path} can't be read: {error.strerror}",
            hint="Give the path of a checkpoint or of a run's folder; are its permissions right?",
        ) from error


def _best(checkpoints: Path, disk: Disk) -> tuple[Path, Snapshot]:
    newest = checkpoint.read_newest(checkpoints, disk=disk)
    if newest is None:
        raise CheckpointError(
            f"resume='best': there is no checkpoint in {checkpoints}",
            hint="Give 'auto', which starts fresh where there is none.",
        )
    path, snapshot = newest
    name = _named_best(snapshot, path)
    if name is None:
        raise CheckpointError(
            f"resume='best': {path} names no best checkpoint", hint="Was there a validation? Give 'auto'."
        )
    best = checkpoints / Path(name).name
    return newest if best == path else (best, checkpoint.read(best, disk=disk))


@refusing
def _named_best(snapshot: Snapshot, path: Path) -> str | None:
    """The name of the best checkpoint, as the one at `path` tells it; None if it tells none."""
    progress = snapshot.state["progress"]
    names: dict[str, str] = {monitor: str(name) for monitor, _, _, _, name in progress["bests"] if name is not None}
    return names.get(progress["best"])


def repeated(folder: Path, step: int) -> int:
    """How many steps after this one the run has made already, as far as its status and the end of its log tell."""
    reached = step
    with suppress(OSError, *UNREADABLE):
        reached = max(reached, int(json.loads((folder / "status.json").read_bytes())["step"]))
    with suppress(OSError), open(folder / "metrics.jsonl", "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        for line in file.read().splitlines():
            with suppress(*UNREADABLE):
                reached = max(reached, int(json.loads(line)["step"]))
    return reached - step


def set_newer_aside(checkpoints: Path, path: Path, step: int, *, disk: Disk = LOCAL) -> None:
    """Newer checkpoints of the run belong to a future that is given up: they get another name, durably, which is said.

    Journals go too: the lines of the future that begins may be others, and are to be handed over. To be called once
    everything fits: a life that is refused gives up nothing. Raises EnvironmentProblem.
    """
    moved = checkpoint.set_aside(checkpoints, step, disk=disk)
    for newer, aside in moved:
        logger.warning("going on from %s: the newer %s is set aside as %s", path.name, newer, aside)
    if not moved:
        return
    folder = checkpoints.parent
    try:
        for name in [name for name in disk.names(folder) if fnmatchcase(name, JOURNALS)]:
            disk.unlink(folder / name)
        sync_folder(folder, disk)
    except OSError as error:
        raise EnvironmentProblem(f"can't remove the journals of {folder}: {error}") from error
