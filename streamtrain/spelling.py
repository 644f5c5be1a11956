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


_PRECISIONS = {
    "32": ("32-true", "float32", "fp32", "f32", "float", "single"),
    "bf16": ("bf16-mixed", "bf16-true", "bfloat16"),
    "16": ("16-mixed", "16-true", "float16", "fp16", "f16", "half"),
}


def precision_meant(value: object) -> str:
    """A hint for a precision that goes by another name elsewhere, or none of ours."""
    text = str(value).lower().removeprefix("torch.")
    found = next((name for name, others in _PRECISIONS.items() if text in others), "")
    kept = "its weights stay float32 (autocast)" if found != "32" else ""
    return (
        f"Give {found!r}{kept and ': '}{kept}."
        if found
        else "'bf16' and '16' compute under autocast: weights stay float32."
    )
