"""What is written down of a fit that failed, for `error.json`: where it stood, on which rows, with what, and how much
memory there was.

Its law: it is asked for once something has gone wrong, so what can't be told is left out with the reason, and never
hides the error itself.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import resource
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

import streamtrain
from streamtrain.blame import Culprit
from streamtrain.callbacks.rolling import rows
from streamtrain.data.batch import Cursor
from streamtrain.data.budget import available_memory
from streamtrain.data.source import Stream
from streamtrain.life import Life

logger = logging.getLogger(__name__)

LINES = 50
"""Of metrics.jsonl, the last ones."""
PACKAGES = ("numpy", "zarr", "numcodecs")
Document = dict[str, Any]


def standing(life: Life, folder: Path, checkpoint: Path | None) -> Document:
    """All that is told of a life that failed, in values of JSON; blocking, for a thread.

    `step`, `epoch`, `samples`: finished before. `position`: of the stream, after the last batch of a finished update.
    `batch`: the one that was computed when it failed, or null: the `step` that it was part of, its `cursor`, how many
    `rows` it has, the first of their numbers (`index`), and where those lie (`places`, as `stream.locate` gives them).
    `metrics`: the last lines of metrics.jsonl. `checkpoint`: the last that is committed, after this failure if the
    state could be saved.
    """
    progress, step, stream = life.progress, life.step, life.stream
    told: Document = {"step": progress.step, "epoch": progress.epoch, "samples": progress.samples}
    told["position"] = _told("the position", lambda: _position(stream))
    told["batch"] = None if step.culprit is None else _batch(step.culprit, stream)
    told["checkpoint"] = None if checkpoint is None else str(checkpoint)
    told["memory"] = _told("the memory", lambda: memory(stream))
    told["versions"] = _told("the versions", versions)
    told["settings"] = {**life.settings, **life.habits}
    told["config"] = dict(life.config)
    told["metrics"] = _told("the metrics", lambda: list(deque(rows(folder / "metrics.jsonl"), maxlen=LINES)))
    return told


def versions() -> dict[str, str]:
    """Of streamtrain and what it stands on."""
    found = {"streamtrain": streamtrain.__version__, "python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    return {**found, "torch": str(torch.__version__)}


def memory(stream: Stream | None) -> dict[str, int | None]:
    """Bytes: `rss` and `rss_peak` of this process, `available` on the machine, `limit` of what the process may have,
    and the stream's `budget`, with what of it is used now and was used at most."""
    scale = 1 if sys.platform == "darwin" else 1024
    rss = psutil.Process().memory_info().rss
    found: dict[str, int | None] = {
        "rss": rss,
        "rss_peak": max(rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale),
        "available": psutil.virtual_memory().available,
        "limit": available_memory(),
    }
    budget = None if stream is None else getattr(stream.statistics(), "budget", None)
    return {
        **found,
        "budget": getattr(budget, "total", None),
        "budget_used": getattr(budget, "used", None),
        "budget_peak": getattr(budget, "peak", None),
    }


def _position(stream: Stream | None) -> dict[str, int] | None:
    if stream is None:
        return None
    state = stream.state_dict()
    return {key: state[key] for key in ("epoch", "position") if key in state}


def _batch(culprit: Culprit, stream: Stream | None) -> Document:
    locate = getattr(stream, "locate", None)
    first = culprit.index
    places = _told("where its rows lie", lambda: [_place(each) for each in locate(first)]) if locate and first else None
    cursor: Cursor = culprit.cursor
    return {
        "step": culprit.step,
        "cursor": {"epoch": cursor.epoch, "position": cursor.position},
        "rows": culprit.rows,
        "index": first,
        "places": places,
    }


def _place(location: Any) -> Document:
    coordinates: Mapping[str, Any] = location.coordinates
    return {
        "store": location.store,
        "row": list(location.row),
        "coordinates": {name: _plain(value) for name, value in coordinates.items()},
    }


def _plain(value: Any) -> Any:
    """A coordinate as JSON has it: a number, or text (times too)."""
    item = value.item() if hasattr(value, "item") else value
    return item if isinstance(item, bool | int | float | str) and value.dtype.kind not in "mM" else str(value)


def _told(what: str, tell: Callable[[], Any]) -> Any:
    try:
        return tell()
    except Exception as error:  # whatever it is: another error is being told
        logger.warning("error.json does not tell %s: %s: %s", what, type(error).__name__, error)
        return None
