"""What a checkpoint's state holds, looked through before anything live takes it up.

Its law: it only looks. Each part is tried on something that stands in for it, or is given back at once; whatever a
state that no run has left raises here, the run is still as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from streamtrain import own_rng
from streamtrain import rng as rngs
from streamtrain.data.source import Stream
from streamtrain.errors import CheckpointError
from streamtrain.progress import Means, Progress
from streamtrain.schedulers import LearningRate
from streamtrain.spikes import Spikes
from streamtrain.toggled import check_toggled

VERSION = 2
KEYS = frozenset(
    {"version", "step", "progress", "stream", "rng", "epoch_rng", "own_rng", "scheduler", "scaler", "callbacks"}
    | {"metrics", "window", "means", "settings", "habits", "ended", "restores", "config", "average", "spikes", "kept"}
)
"""What the state of this version holds."""
OWES = ("", "validation", "epoch", "epoch_end", "end")
"""What a run may owe to its next life."""


def check_state(state: Any, path: Path) -> None:
    """Look through all of a state that needs nothing live beside it.

    Raises CheckpointError for one of another version, or with other keys than this one's, and whatever comes of values
    that no run has left (see `streamtrain.refusing`).
    """
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise CheckpointError(f"checkpoint {path}: its state is of a version that this streamtrain does not know")
    check_keys(state, path)
    _check_progress(state["progress"])
    rngs.checked(state["rng"])
    if state["epoch_rng"] is not None:
        rngs.checked(state["epoch_rng"])
    for means in (state["window"], state["means"]):
        Means().load_state_dict(means)
    Spikes().load_state_dict(state["spikes"])
    if state["scaler"]:
        _check_scaler(state["scaler"])
    _check_rest(state)


def check_keys(state: Mapping[str, Any], path: Path) -> None:
    """Refuse a state with a key too few or too many: what is left out would be lost in silence."""
    for name, saved, known, more in (
        ("state", state, KEYS, set[str]()),
        ("state.progress", state.get("progress", {}), Progress().state_dict().keys(), {"passed"}),
    ):
        wrong = [f"{key!r} is unknown" for key in sorted(saved.keys() - known - more, key=str)]
        wrong += [f"{key!r} is missing" for key in sorted(known - saved.keys())]
        if wrong:
            raise CheckpointError(
                f"checkpoint {path}: its {name} is not one of this streamtrain: {', '.join(wrong)}",
                hint="Was it edited, or written by another version? That version, or another checkpoint, goes on.",
            )


def _check_progress(state: Mapping[str, Any]) -> None:
    progress = Progress()
    progress.load_state_dict(state)
    counts = {name: getattr(progress, name) for name in ("epoch", "step", "samples", "batch", "passed", "time")}
    for name, value in counts.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"progress.{name} is {value!r}")
    if progress.owes not in OWES:
        raise ValueError(f"progress.owes is {progress.owes!r:.80}")


def _check_scaler(state: Mapping[str, Any]) -> None:
    for value in state.values():
        float(value)
    torch.amp.GradScaler("cpu").load_state_dict(dict(state))


def _check_rest(state: Mapping[str, Any]) -> None:
    for value in dict(state["metrics"]).values():
        float(value)
    for name, table in ((name, state[name]) for name in ("callbacks", "own_rng", "settings", "habits")):
        if not isinstance(table, dict):
            raise TypeError(f"{name} is a {type(table).__name__}")
    check_toggled(state["habits"])
    if state["ended"] is not None:
        reason, detail = state["ended"]
        if not (isinstance(reason, str) and isinstance(detail, str)):
            raise TypeError(f"ended is {state['ended']!r:.80}")
    if not isinstance(state["restores"], str | None):
        raise TypeError(f"restores is {state['restores']!r:.80}")


def check_schedule(lr: LearningRate, state: dict[str, Any]) -> None:
    """Whether a schedule takes up this state: it does, and is given back its own. Raises whatever it raises."""
    before = lr.state_dict()
    try:
        lr.load_state_dict(state)
    finally:
        lr.load_state_dict(before)


def check_own_rng(stream: Stream | None, states: dict[str, Any]) -> None:
    """The same of the generators that a foreign source keeps for itself."""
    if stream is None or not states:
        return
    before = own_rng.capture(stream)
    try:
        own_rng.put_back(stream, states)
    finally:
        own_rng.put_back(stream, before)
