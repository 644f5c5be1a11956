"""Packages that a callback needs and streamtrain does not: imported when a fit begins, with what to install if not."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from streamtrain.errors import ConfigError


def find(who: str, *names: str, extra: str) -> str:
    """The first of these packages that is installed; nothing is imported. Raises ConfigError if none is."""
    for name in names:
        if importlib.util.find_spec(name) is not None:
            return name
    raise ConfigError(
        f"{who} needs the package {' or '.join(names)}, which is not installed",
        hint=f"pip install 'streamtrain[{extra}]'",
    )


def load(module: str) -> Any:
    """Import it; without annotations of its own, so that checks are the same whether or not it is installed."""
    return importlib.import_module(module)
