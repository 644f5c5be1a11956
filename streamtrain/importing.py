"""The command `import-pt`: from a file that others have saved to a checkpoint with which a run can begin.

Its law: a model, where one is named, is asked before anything is written.
"""

from __future__ import annotations

import os
from pathlib import Path

from streamtrain import assembly, checkpoint, foreign
from streamtrain.config import resolve
from streamtrain.errors import ConfigError
from streamtrain.said import Said, read
from streamtrain.warm_start import begin_with


def bring_in(file: Path, out: Path, *, model: str | None, partial: bool) -> Path:
    """Read the weights of `file` and commit them as a checkpoint; where that is.

    `out`: the checkpoint's folder, which must not be there; of a run's folder, its `weights/<name of the file>`, and
    the model that must fit is the run's own. `model`: `pkg.mod:Name`, which must fit else. `partial`: in part at least.
    Raises CheckpointError for a file that is none, or does not fit.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is {'a folder' if file.is_dir() else 'not there'}", hint="Give the path of a .pt.")
    run = out / "config.toml"
    target = out / "weights" / file.stem if run.is_file() or (out / "checkpoints").is_dir() else out
    weights = foreign.read(file)
    said = read(str(run)) if model is None and run.is_file() else None
    if model is not None:
        said = Said({"model": {"target": model}, "data": {"store": "none"}})
    if said is not None:
        assembly.make_importable(os.getcwd())
        made = assembly.model(resolve(said), said)
        weights = dict(begin_with(weights, made, file, partial=partial).taken)
    checkpoint.sweep(target.parent, of=target.name)  # what the same command left when it was killed
    return checkpoint.commit(target, foreign.as_snapshot(weights, file)).path
