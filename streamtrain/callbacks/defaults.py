"""The callbacks that a run has without being asked; its law: one that is given replaces its default."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from streamtrain.callbacks.base import HOOKS, Callback, hooks_of
from streamtrain.callbacks.csv_logger import CSVLogger
from streamtrain.callbacks.event_log import EventLog
from streamtrain.callbacks.json_logger import JSONLogger
from streamtrain.callbacks.media_folder import MediaFolder
from streamtrain.callbacks.model_checkpoint import ModelCheckpoint
from streamtrain.callbacks.progress_bar import ProgressBar, on_terminal
from streamtrain.errors import ConfigError
from streamtrain.spelling import nearest

logger = logging.getLogger(__name__)

WITH_A_FOLDER = (ModelCheckpoint, JSONLogger, CSVLogger, EventLog)


def with_defaults(given: object, run_dir: Path | None, *, dev: bool) -> list[object]:
    """These callbacks, and the defaults that none of them replaces; `dev`: a run of which nothing is kept.

    Raises ConfigError for what is no callback, and for two that write the same file.
    """
    if not isinstance(given, Iterable) or isinstance(given, str | Mapping):
        raise ConfigError(
            f"callbacks must be a list of them, not {given!r:.80}", hint="For instance callbacks=[EarlyStopping()]."
        )
    callbacks = list(given)
    for callback in callbacks:
        if inspect.isclass(callback) or not (isinstance(callback, Callback) or hooks_of(callback)):
            made = f"Make one: {callback.__name__}(...)." if inspect.isclass(callback) else ""
            raise ConfigError(
                f"{callback!r:.80} is no callback",
                hint=made or f"Give an object with at least one of {', '.join(HOOKS[:4])}, ...",
            )
        _say_uncalled(callback)
    _apart(callbacks)
    if on_terminal(sys.stderr) and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(ProgressBar())
    if dev:
        return [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
    if run_dir is not None:
        callbacks += [kind() for kind in WITH_A_FOLDER if not any(isinstance(own, kind) for own in callbacks)]
        if not any("on_media" in hooks_of(callback) for callback in callbacks):
            callbacks.append(MediaFolder())
    return callbacks


def _say_uncalled(callback: object) -> None:
    """Say which methods look like hooks and are none: misspelled, or those of another trainer."""
    own = {name for name in dir(type(callback)) if name.startswith("on_") and callable(getattr(callback, name, None))}
    for name in sorted(own.difference(HOOKS)):
        plain = name.removeprefix("on_").removeprefix("train_").replace("step", "batch")
        near = nearest(plain, [hook.removeprefix("on_") for hook in HOOKS])
        meant = f"; did you mean on_{near}?" if near else ""
        logger.warning("callback %s: nothing calls its %s%s", type(callback).__name__, name, meant)


def directions(callback: object) -> Mapping[str, str]:
    """Of the names by which a callback tells better from worse, which way that is: `"min"` or `"max"`."""
    found = getattr(callback, "directions", None)
    return found if isinstance(found, Mapping) else {}


def _apart(callbacks: Iterable[object]) -> None:
    """Two that write one file would leave each line there twice, and cut off each other's."""
    seen: dict[str, object] = {}
    for callback in callbacks:
        place = getattr(callback, "writes", "")
        if place and place in seen:
            raise ConfigError(
                f"two callbacks write {place}: {type(seen[place]).__name__} and {type(callback).__name__}",
                hint="Give one of them.",
            )
        seen[place] = callback


def watched(callback: object) -> Sequence[str]:
    """The names that a callback needs to be logged."""
    return callback.required if isinstance(callback, ModelCheckpoint) else getattr(callback, "monitors", ())
