"""What was most likely meant by a name that is not known, and how a value is shown in a message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """The known name that was most likely meant; empty if none is near."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else ""


def shown(value: object) -> str:
    """A value, short, for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
