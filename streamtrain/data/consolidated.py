"""Consolidated metadata: a copy of all arrays' metadata in one place, which may be stale, or all that there is.

Its law: an array's own metadata count wherever they can be read, since its chunks were written by them; a copy that
disagrees is named, and serves only what has no metadata of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.api import asynchronous as zarr_api
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import StorePath, WrapperStore

logger = logging.getLogger(__name__)

CONSOLIDATED = ".zmetadata"
"""The file of Zarr 2; in Zarr 3 the copy is a part of the group's own."""


def consolidated_names(node: zarr.AsyncGroup) -> list[str]:
    """Arrays that the copy knows, below this group."""
    copy = node.metadata.consolidated_metadata
    if copy is None:
        return []
    return [name for name, entry in copy.flattened_metadata.items() if not hasattr(entry, "consolidated_metadata")]


async def own_metadata(node: zarr.AsyncGroup, array: zarr.AsyncArray[Any], name: str) -> zarr.AsyncArray[Any]:
    """The array by its own metadata, if `node` gave it by a copy and it has some."""
    if node.metadata.consolidated_metadata is None:
        return array
    path = array.store_path
    try:
        own = await zarr_api.open_array(
            store=path.store, path=path.path, mode="r", zarr_format=array.metadata.zarr_format
        )
    except FileNotFoundError:
        return array
    if repr(array.metadata) == repr(own.metadata):  # `to_dict` warns of dtypes that Zarr 3 does not specify
        return own
    if different := _differences(array.metadata.to_dict(), own.metadata.to_dict()):
        level = logging.INFO if different == ["attributes"] else logging.WARNING
        logger.log(
            level,
            "the consolidated metadata are out of date for array %s (%s); its own are used: zarr.consolidate_metadata "
            "brings the copy up to date",
            name,
            ", ".join(different),
        )
    return own


def _differences(copy: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    keys = sorted({*copy, *own} - {"consolidated_metadata"})
    return [key for key in keys if repr(copy.get(key)) != repr(own.get(key))]


async def open_copy(store: Store, path: str) -> zarr.AsyncGroup | None:
    """The group of Zarr 2 of which only the copy was kept; None where there is none.

    Raises ValueError where it is no JSON, KeyError where it is of another kind.
    """
    found = await (StorePath(store, path) / CONSOLIDATED).get()
    if found is None:
        return None
    prefix = f"{path}/" if path else ""
    copied = json.loads(found.to_bytes())["metadata"]
    files = {f"{prefix}{name}": json.dumps(value).encode() for name, value in copied.items()}
    return await zarr_api.open_group(store=_Overlaid(store, files), path=path or None, mode="r", zarr_format=2)


class _Overlaid(WrapperStore[Store]):
    """A store with files that it lacks."""

    def __init__(self, store: Store, files: Mapping[str, bytes]) -> None:
        super().__init__(store)
        self._files = files

    def _with_store(self, store: Store) -> _Overlaid:
        return _Overlaid(store, self._files)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await super().get(key, prototype, byte_range)
        if found is None and key in self._files:
            return (prototype or default_buffer_prototype()).buffer.from_bytes(self._files[key])
        return found
