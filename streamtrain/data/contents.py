"""What arrays hold, as far as manifests or a few of their bytes tell: by which a position knows data again that only
look the same.

Its law: what was encoded otherwise can't be compared, and is not held to be other data; nor what was known by a
manifest then and is not now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamtrain.data.permutation import derive_key

LONGEST = 160
"""Characters of what is told of all arrays; more of it becomes one digest."""
SAMPLED = "s"
"""Begins what is told of an array without a manifest: by the beginnings of some of its files."""
ALL = "*"
"""Stands for all arrays together."""


def joined(each: Iterable[str | None]) -> str | None:
    """`metadata-table` of each of several manifests (or samples), as one text; None where one is missing."""
    found = list(each)
    return None if None in found else "+".join(map(str, found))


def told(arrays: Mapping[str, Sequence[str | None]]) -> dict[str, str]:
    """What a position says of arrays by name, each in every store; those without a manifest are left out."""
    found = {name: text for name, stores in arrays.items() if (text := joined(stores))}
    if len(str(found)) <= LONGEST:
        return found
    pairs = [part.split("-") for text in found.values() for part in text.split("+")]
    metadata, tables = (derive_key(*found, *side) for side in zip(*pairs, strict=True))
    return {ALL: f"{metadata:016x}-{tables:016x}"}


def changed(then: Any, now: Mapping[str, str]) -> list[str]:
    """Of which arrays the files were others then, as far as both tell; a line each."""
    if not isinstance(then, Mapping):
        return []
    lines = []
    for name in sorted(then.keys() & now.keys()):
        pairs = zip(str(then[name]).split("+"), now[name].split("+"), strict=False)
        for one, other in pairs:
            (metadata, _, table), (own, _, mine) = one.partition("-"), other.partition("-")
            if metadata == own and table != mine:
                which = "the files" if name == ALL else f"the files of {name}"
                by = "the beginnings of some" if metadata.startswith(SAMPLED) else "the manifest"
                lines.append(f"{which}: checksum {table} then, {mine} now, by {by}")
                break
    return lines
