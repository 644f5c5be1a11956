"""Which models are being trained in this process; its law: one fit at a time for each, and it is free whatever ends
that.

Two fits that take turns on one train thread would each make whole updates, of weights that the other one has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from streamtrain.errors import ConfigError

_LOCK = threading.Lock()
_MODELS: set[int] = set()
"""By identity: a fit holds its model for as long as it stands here."""


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """While the block runs the model is its own. Raises ConfigError if another fit trains it; a module that
    `torch.compile` gave is the one that it was made of."""
    own: object = getattr(model, "_orig_mod", model)
    with _LOCK:
        if id(own) in _MODELS:
            raise ConfigError(
                f"another fit is training this very {type(own).__name__}: two at once would undo each other's updates",
                hint="Await the other fit first, or give one of them a copy: copy.deepcopy(model).",
            )
        _MODELS.add(id(own))
    try:
        yield
    finally:
        with _LOCK:
            _MODELS.discard(id(own))
