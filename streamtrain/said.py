"""What was said of a run's configuration, in a TOML file, by `--set` and by flags, and where each key was said.

Its law: nothing of it is checked here but that it is TOML, and that there is room for what is set.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamtrain import toml_text
from streamtrain.errors import ConfigError

KeyPath = tuple[str | int, ...]


@dataclass
class Said:
    """The tables as they were said, and where: a file first, then `--set` and flags, the last one wins."""

    tables: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    file: str = ""
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def assign(self, origin: str, key: str, value: object) -> None:
        """Set `a.b.c` (parts of a list by number); ConfigError where a part on the way holds no keys."""
        parts: list[str | int] = [int(part) if part.isdigit() else part for part in key.split(".")]
        if not all(part != "" for part in parts):
            raise ConfigError(f"{origin}: {key!r} is not a key", hint="Keys look like optimizer.lr.")
        at: Any = self.tables
        for depth, part in enumerate(parts[:-1]):
            if isinstance(part, str) and isinstance(at, dict):
                nested = at.setdefault(part, {})
                if isinstance(nested, str) and depth == 0 and part in SHORT:
                    nested = at[part] = {SHORT[part]: nested}
                at = nested
            elif isinstance(part, int) and isinstance(at, list) and part < len(at):
                at = at[part]
            else:
                at = None
            if not isinstance(at, dict | list):
                raise ConfigError(
                    f"{origin}: {'.'.join(map(str, parts[: depth + 1]))} holds no keys to set",
                    hint="Set a whole table as TOML, or a key inside a table: optimizer.lr=0.001.",
                )
        last = parts[-1]
        if isinstance(at, list) and not (isinstance(last, int) and last < len(at)):
            raise ConfigError(f"{origin}: {key} is not there to be set", hint=f"It has {len(at)} elements, from 0.")
        at[last] = value
        self.origins = {path: text for path, text in self.origins.items() if path[: len(parts)] != tuple(parts)}
        self.origins[tuple(parts)] = origin

    def where(self, path: KeyPath) -> str:
        """Where this key was said: a flag, `file:line:column`, or the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        found = toml_text.place(self.text, path) if self.text else None
        return f"{self.file}:{found[0]}:{found[1]}" if found else self.file


SHORT = {"model": "target", "loss": "name", "optimizer": "name", "scheduler": "name"}
"""Tables that may be said as one text, and the key that it stands for."""


def read(path: str) -> Said:
    """The tables of a TOML file; ConfigError with line and column where it is not one."""
    hint = "Give a TOML file; `streamtrain fit ... --print-config` prints one."
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(f"{path} is a folder, not a configuration file", hint=hint)
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{path} is not a regular file", hint=hint)
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist", hint=_similar_file(path) or hint) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"configuration {path} cannot be read: {reason}", hint=hint) from error
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        byte = raw[error.start]
        raise ConfigError(f"{path}:{line}:{column}: not UTF-8 (byte 0x{byte:02x})", hint="Save it as UTF-8.") from None
    try:
        return Said(tomllib.loads(text), text, path)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep to be read", hint=hint) from None
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, str(error)) from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise ConfigError(f"{path}: {str(error).partition(';')[0]}", hint=hint) from None


def _syntax_error(path: str, text: str, message: str) -> ConfigError:
    match = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    line, column = (int(match[1]), int(match[2])) if match else (text.count("\n") + 1, 1)
    what = message[: match.start()] if match else message.removesuffix(" (at end of document)") + " at the end"
    lines = text.splitlines()
    shown = lines[line - 1].strip()[:60] if line <= len(lines) else ""
    return ConfigError(
        f"{path}:{line}:{column}: not TOML: {what[:1].lower()}{what[1:]}",
        hint=f"The line is: {shown}" if shown else "The file ends too early.",
    )


def _similar_file(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        close = difflib.get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.6)
    except OSError:
        return ""
    return f"Did you mean {os.path.join(folder, close[0])}?" if close else ""
