"""TOML as text: where a key stands, and how a resolved configuration is written.

Its law: what `dumps` writes, `tomllib` reads back equal. None cannot be written and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Path = tuple[str | int, ...]
Place = tuple[int, int]
"""Line and column, both from 1."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def places(text: str) -> dict[Path, Place]:
    """Where each key of a valid TOML document stands, by its path; elements of arrays have numbers."""
    scanner = _Scanner(text)
    scanner.document()
    return scanner.found


def place(text: str, path: Path) -> Place | None:
    """Where the key `path`, or else its nearest parent, stands in a valid TOML document."""
    found = places(text)
    for length in range(len(path), 0, -1):
        if path[:length] in found:
            return found[path[:length]]
    return None


def dumps(tables: Mapping[str, Any]) -> str:
    """A TOML document: plain values first, then one table for each mapping, then arrays of tables."""
    plain = {key: value for key, value in tables.items() if not _is_table(value) and not _is_tables(value)}
    parts = [_assignments(plain)] if plain else []
    parts += [f"[{_key(key)}]\n{_assignments(value)}" for key, value in tables.items() if _is_table(value)]
    for key, value in tables.items():
        if _is_tables(value):
            parts += [f"[[{_key(key)}]]\n{_assignments(item)}" for item in value]
    return "\n".join(parts)


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_table, value))


def _assignments(table: Mapping[str, Any]) -> str:
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in table.items() if value is not None)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"cannot write {type(value).__name__} as TOML")


class _Scanner:
    """Walks a document that `tomllib` has accepted, so it may trust its syntax."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[Path, Place] = {}
        self._arrays: dict[Path, int] = {}

    def document(self) -> None:
        table: Path = ()
        while self._skip(newlines=True):
            if self.text.startswith("[[", self.at):
                table = self._header(2)
            elif self.text[self.at] == "[":
                table = self._header(1)
            else:
                self._pair(table)

    def _header(self, brackets: int) -> Path:
        self.at += brackets
        self._skip(newlines=False)
        start = self.at
        names = self._names()
        self.at = self.text.index("]" * brackets, self.at) + brackets
        path: Path = ()
        for position, name in enumerate(names):
            path = (*path, name)
            self._note(path, start)
            if brackets == 2 and position == len(names) - 1:
                self._arrays[path] = self._arrays.get(path, -1) + 1
            if path in self._arrays:
                path = (*path, self._arrays[path])
                self._note(path, start)
        return path

    def _pair(self, table: Path) -> None:
        start = self.at
        path = (*table, *self._names())
        for length in range(len(table) + 1, len(path) + 1):
            self._note(path[:length], start)
        self.at = self.text.index("=", self.at) + 1
        self._value(path)

    def _value(self, path: Path) -> None:
        self._skip(newlines=False)
        self._note(path, self.at)
        opening = self.text[self.at]
        if opening in "\"'":
            self._string()
        elif opening == "[":
            self._items(path, "]")
        elif opening == "{":
            self._items(path, "}")
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}\n#":
                self.at += 1

    def _items(self, path: Path, closing: str) -> None:
        self.at += 1
        number = 0
        while self._skip(newlines=True) and self.text[self.at] != closing:
            if self.text[self.at] == ",":
                self.at += 1
            elif closing == "}":
                self._pair(path)
            else:
                self._value((*path, number))
                number += 1
        self.at += 1

    def _names(self) -> list[str]:
        names: list[str] = []
        while True:
            self._skip(newlines=False)
            start = self.at
            if self.text[start] in "\"'":
                self._string()
                quoted = self.text[start : self.at]
                names.append(json.loads(quoted) if quoted[0] == '"' else quoted[1:-1])
            else:
                match = _BARE.match(self.text, start)
                assert match is not None
                self.at = match.end()
                names.append(match[0])
            self._skip(newlines=False)
            if self.text[self.at] != ".":
                return names
            self.at += 1

    def _string(self) -> None:
        quote = self.text[self.at]
        mark = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(mark)
        while not self.text.startswith(mark, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        self.at += len(mark)
        while len(mark) == 3 and self.text.startswith(quote, self.at):
            self.at += 1

    def _skip(self, *, newlines: bool) -> bool:
        blank = " \t\r\n" if newlines else " \t"
        while self.at < len(self.text):
            if self.text[self.at] in blank:
                self.at += 1
            elif self.text[self.at] == "#" and newlines:
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return True
        return False

    def _note(self, path: Path, start: int) -> None:
        line = self.text.count("\n", 0, start) + 1
        self.found.setdefault(path, (line, start - self.text.rfind("\n", 0, start)))
