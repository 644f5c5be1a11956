"""What the metadata of a store's arrays said when it was opened, so that another array in one's place is noticed.

Its law: nothing is asked for each chunk. Files that were read are known by what they were; of those that are new to us
one look at the metadata, a `stat`, serves for LOOK_BYTES of them, and for each that is younger than the opening.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from streamtrain.data.seen import Signature, signature_of

METADATA = ("zarr.json", ".zarray")
"""Files that describe an array, of version 3 and 2."""
GONE = "the store was moved, removed or replaced during the run"
LOOK_BYTES = 256 << 10
"""Of files seen for the first time: to gather so much takes 60 us, a look 1.5."""


@dataclass
class _Told:
    """What an array's own metadata were, and said."""

    path: Path
    signature: Signature
    said: object


class Described:
    """The arrays of one store that are read. Thread-safe: looks that come at once cost one more."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._told: dict[str, _Told | None] = {}
        self.unlooked = 0
        """Bytes of files that were seen for the first time since all were looked at."""

    def describe(self, name: str) -> None:
        """Keep in mind what an array's metadata say, before the first of its chunks is looked for."""
        if name not in self._told:
            self._told[name] = self._look(name)

    def _look(self, name: str) -> _Told | None:
        """None where consolidated metadata alone tell of it."""
        for file in METADATA:
            path = self._root / name / file
            with contextlib.suppress(OSError):
                return _Told(path, signature_of(os.stat(path)), said_by(path.read_bytes()))
        return None

    def array_of(self, key: str) -> str | None:
        """The array that a file belongs to; None of one that nobody has described."""
        at = key.find("/")
        while at >= 0:
            if key[:at] in self._told:
                return key[:at]
            at = key.find("/", at + 1)
        return "" if "" in self._told else None

    @property
    def due(self) -> bool:
        """Whether to look at all of them again: LOOK_BYTES for each came from files that are new to us."""
        return self.unlooked >= LOOK_BYTES * len(self._told)

    def any_changed(self) -> str | None:
        """The same as `changed` of the first array of which that is so."""
        self.unlooked = 0
        return next((why for name in tuple(self._told) if (why := self.changed(name))), None)

    def changed(self, name: str) -> str | None:
        """Why the metadata of an array are no longer what they were; None where they say what they said (but for
        attributes), or nobody knows what that was."""
        told = self._told.get(name)
        if told is None:
            return None
        what = f"array {name!r}" if name else "its array"
        with contextlib.suppress(OSError):
            if signature_of(os.stat(told.path)) == told.signature:
                return None
        now = self._look(name)
        if now is None:
            return f"the metadata of {what} are gone: {GONE}"
        if now.said != told.said:
            return f"the metadata of {what} have changed: {GONE}"
        self._told[name] = now
        return None


def said_by(metadata: bytes) -> object:
    """What the metadata of an array say, but for its attributes, which are written beside training too."""
    try:
        found = json.loads(metadata)
    except ValueError:
        return metadata
    return {key: value for key, value in found.items() if key != "attributes"} if isinstance(found, dict) else found
