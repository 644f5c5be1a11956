"""What a dotted path leads to: "package.module.Name" or "package.module:Name"."""

from __future__ import annotations

import importlib

from streamtrain.errors import ConfigError
from streamtrain.spelling import nearest


def is_path(name: str) -> bool:
    """Whether a name is a path rather than one of ours."""
    return "." in name or ":" in name


def found_at(path: str, where: str) -> object:
    """The object at `path`. Raises ConfigError, beginning with `where`, naming the part that leads nowhere."""
    module_name, _, attributes = path.partition(":") if ":" in path else path.rpartition(".")
    hint = "Give it as package.module.Name; the package must be installed, or lie in the current folder."
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of others raises while it is imported
        message = f"{where}: importing {module_name!r} (for {path}) failed: {type(error).__name__}: {error}"
        raise ConfigError(message, hint=hint) from error
    for part in attributes.split("."):
        if not hasattr(found, part):
            close = nearest(part, [name for name in dir(found) if not name.startswith("_")])
            raise ConfigError(
                f"{where}: module {module_name} has no {attributes}", hint=f"Did you mean {close}?" if close else hint
            )
        found = getattr(found, part)
    return found
