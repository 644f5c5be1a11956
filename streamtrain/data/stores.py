"""Several stores as one dataset: from a list or a glob to where each of them lies.

Its law: their order is that of the list, a glob's that of its sorted names; it is part of the samples' numbers.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from streamtrain.data.opening import Located, StoreLike, locate
from streamtrain.errors import ConfigError, DataError

Stores = StoreLike | Sequence[StoreLike]
Named = Located | str
"""A store, or a glob of some."""


def name_stores(store: object, options: object = None, *, retries: int = 3) -> list[Named]:
    """What the user gave, without looking at a disk; at least one. Raises ConfigError for what is no store."""
    if isinstance(store, list | tuple):
        if not store:
            raise ConfigError("store is an empty list", hint="give the folder of a Zarr store, or several")
        return [named for each in store for named in name_stores(each, options, retries=retries)]
    if isinstance(store, str | os.PathLike):
        text = os.path.expanduser(os.fspath(store))
        if glob.has_magic(text) and "://" not in text:
            return [text]
    return [locate(store, options, retries=retries)]


def find_stores(named: Sequence[Named]) -> list[Located]:
    """Where each store lies; looks for those of a glob. Raises DataError for a glob that matches nothing."""
    found: list[Located] = []
    for each in named:
        if isinstance(each, Located):
            found.append(each)
            continue
        paths = [each] if os.path.lexists(each) else sorted(glob.glob(each, recursive=True))
        if not paths:
            raise DataError(f"no store matches {each!r}", hint="check the pattern, and the folder it starts from")
        found += map(locate, paths)
    return found


def name_of(named: Sequence[Named]) -> str:
    """What messages call them."""
    first = named[0] if isinstance(named[0], str) else named[0].name
    return first if len(named) == 1 else f"{first} and {len(named) - 1} more"
