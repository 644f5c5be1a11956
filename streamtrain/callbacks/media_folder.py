"""`media/` in the run's folder: images as PNG, tables and histograms as JSON, where no logger shows them.

A file is named by what it shows and its step, and replaced whole: a step that is made again has its media once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path

from streamtrain.callbacks.base import Callback
from streamtrain.callbacks.lines import NO_ROOM
from streamtrain.errors import EnvironmentProblem
from streamtrain.events import Media, TrainBegin
from streamtrain.media import Histogram, Image, Medium

logger = logging.getLogger(__name__)

NAME = re.compile(r"[^\w.+=,@-]+")
"""What a folder's name does not have: above all separators."""
LONGEST = 200
"""Bytes of a name that are kept as they are."""


class MediaFolder(Callback):
    """Writes what `log_media` is given to `media/<name>/step-000001234.png` or `.json` in the run's folder.

    A table is `{"columns": [...], "rows": [[...], ...]}`, a histogram `{"edges": [...], "counts": [...],
    "left_out": n}`. What finds no room on the disk is left out, which is said. Raises EnvironmentProblem where the disk
    refuses otherwise.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._full = False
        """That there is no room was said, and nothing was written since."""

    def on_train_begin(self, event: TrainBegin) -> None:
        """Learn where."""
        self._folder = None if event.run_dir is None else Path(event.run_dir, "media")

    def on_media(self, event: Media) -> None:
        """Write a file for each."""
        if self._folder is None:
            return
        for name, shown in event.values.items():
            folder = self._folder / folder_name(name)
            suffix, data = written(shown)
            self._write(folder / f"step-{event.step:09d}{suffix}", data)

    def _write(self, path: Path, data: bytes) -> None:
        try:
            _replace(path, data)
            self._full = False
        except OSError as error:
            why = error.strerror or error
            if error.errno not in NO_ROOM:
                hint = "make room on the disk, or mend the permissions"
                raise EnvironmentProblem(f"{path} can't be written: {why}", hint=hint) from error
            if not self._full:
                self._full = True
                logger.warning("%s is left out, and what comes before there is room: %s", path, why)


def folder_name(name: str) -> str:
    """A folder for what is named so: without separators, and no longer than file systems take (255 bytes)."""
    plain = NAME.sub("-", name).lstrip(".") or "-"
    if len(raw := os.fsencode(plain)) <= LONGEST:
        return plain
    told = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{raw[:LONGEST].decode(errors='ignore')}-{told}"


def written(shown: Medium) -> tuple[str, bytes]:
    """The suffix and the bytes of its file."""
    if isinstance(shown, Image):
        return ".png", shown.png()
    if isinstance(shown, Histogram):
        edges, counts = shown.edges.tolist(), shown.counts.tolist()
        return ".json", _json({"edges": edges, "counts": counts, "left_out": shown.left_out})
    return ".json", _json({"columns": shown.columns, "rows": shown.rows})


def _json(document: object) -> bytes:
    return json.dumps(document, allow_nan=False).encode() + b"\n"


def _replace(path: Path, data: bytes) -> None:
    """Raises OSError, and leaves nothing behind then."""
    temp = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temp.write_bytes(data)
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
