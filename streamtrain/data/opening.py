"""From what the user calls a store to the layouts and readers of its arrays.

Its law: metadata is checked before any of it is believed, and what is wrong is said with its file. zarr's own API does
the parsing, on a private loop.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import logging
import math
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.api import asynchronous as zarr_api
from zarr.storage import LocalStore, ObjectStore

from streamtrain.data.bucket import Bucket, Owned, is_url
from streamtrain.data.budget import format_bytes
from streamtrain.data.consolidated import CONSOLIDATED, consolidated_names, open_copy, own_metadata
from streamtrain.data.encodings import Encoding, encoding_of, old_categories, stands_for_one
from streamtrain.data.fetch import REFUSALS, ByteSource, Fetcher, one_line
from streamtrain.data.files import StoreFiles, is_local
from streamtrain.data.layout import ALONE, ArrayLayout, check_trainable, parse_array
from streamtrain.data.readers import LocalReader, maps_serve
from streamtrain.data.reading import ChunkReader
from streamtrain.data.remote import RemoteReader
from streamtrain.data.remote_zarr import RemoteZarrReader
from streamtrain.data.zarr_bytes import StoreBytes
from streamtrain.data.zarr_codecs import within_bounds
from streamtrain.data.zarr_lane import ZarrLoop, ZarrReader
from streamtrain.errors import NO_THREAD, ConfigError, DataError, EnvironmentProblem, StreamtrainError

logger = logging.getLogger(__name__)

IO = Literal["auto", "mmap", "pread", "store"]
METADATA = ("zarr.json", ".zgroup", ".zarray", CONSOLIDATED)
MOST_BYTES = 4 << 30
"""Labels, coordinates and names of categories, which are read whole, are no larger."""
_NO_STORE = "give the folder of a Zarr store; `python -m data_tools convert` makes one"
_RESTORE = "restore the file from its source, or convert the data again"

StoreLike = str | os.PathLike[str] | zarr.Group | zarr.Array[Any] | Store


class _Itself:
    """Stands for a thing, and keeps it: equal for that very one alone, whatever its own class calls equal."""

    def __init__(self, thing: object) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other._thing is self._thing

    def __hash__(self) -> int:
        return id(self._thing)


@dataclass(frozen=True)
class Located:
    """A store, and where in it the user's root lies."""

    store: Store | str
    path: str
    root: Path | None
    """The folder on this machine; None where the store is anything else."""
    name: str
    """What messages call it."""
    bucket: Bucket | None = None
    """What a URL names."""

    @property
    def source(self) -> ByteSource | None:
        """Where the fast lane asks for bytes; None for a folder."""
        if self.bucket is not None:
            return self.bucket
        if isinstance(self.store, ObjectStore):
            return Owned(self.store.store)
        return StoreBytes(self.store) if isinstance(self.store, Store) and self.root is None else None

    @property
    def identity(self) -> Hashable:
        """Equal for those that read the same store, in this process and while they live."""
        if self.root is not None:
            return self.address
        return self.bucket.identity if self.bucket is not None else _Itself(self.store)

    @property
    def tells_versions(self) -> bool:
        """Whether what is there may come with a version; by zarr's own interface nothing does."""
        return not isinstance(self.source, StoreBytes)

    @property
    def address(self) -> str:
        """What it is called from one run to the next; of a folder, wherever links lead to it."""
        if self.root is not None:
            return os.path.realpath(self.root)
        return self.bucket.url("") if self.bucket is not None else str(self.store)

    def unreachable(self, error: Exception) -> bool:
        """Whether this tells of the way to the store, not of what is in it."""
        return self.bucket is not None and (self.bucket.transient(error) or type(error).__name__ in REFUSALS)

    def close(self) -> None:
        """Drop connections; what is asked for later makes new ones."""
        if self.bucket is not None:
            self.bucket.close()


def locate(store: object, storage_options: object = None, *, retries: int = 3) -> Located:
    """Tell what kind of store this is, without looking at it.

    Raises ConfigError for what is none, EnvironmentProblem for a URL where obstore is not installed.
    """
    options = string_pairs(storage_options, "storage_options")
    if isinstance(store, str) and is_url(store):
        bucket = Bucket(store, options, retries=retries)
        return Located(bucket.zarr_store, "", None, store, bucket)
    if options:
        raise ConfigError("storage_options= belong to a URL such as s3://bucket/data.zarr", hint="leave them out")
    if isinstance(store, zarr.Group | zarr.Array):
        inner, path = store.store, store.path
        root = inner.root if isinstance(inner, LocalStore) else None
        return Located(inner, path, root, str(store.store_path))
    if isinstance(store, Store):
        return Located(store, "", store.root if isinstance(store, LocalStore) else None, str(store))
    if isinstance(store, str | os.PathLike):
        text = os.fspath(store)
        text = os.path.expanduser(text.removeprefix("file://"))
        if not text:
            raise ConfigError("store is empty", hint=_NO_STORE)
        return Located(text, "", Path(os.path.abspath(text)), text)
    if isinstance(store, list | tuple):
        raise ConfigError(
            f"one store is meant here, not a list of {len(store)}",
            hint="give them one by one; ZarrStream alone takes several as one dataset",
        )
    raise ConfigError(f"store must be a path, a zarr group, array or store, not {type(store).__name__}", hint=_NO_STORE)


@dataclass(frozen=True)
class OpenArray:
    """An array that can be read."""

    layout: ArrayLayout
    reader: ChunkReader
    fallback: str | None
    """Why zarr's own API reads it and no fast lane does; None where one does."""
    encoding: Encoding | None = None
    """Set where the name is of a group: then this is the array of its values."""
    beside: tuple[OpenArray, ...] = ()
    """The group's other arrays that are read, in the order of `encoding.members`."""
    categories: tuple[str, ...] | None = None
    """What the codes stand for."""
    metadata: str = ""
    """What zarr's metadata say of how it is stored, attributes left out, as canonical JSON."""


async def open_arrays(
    where: Located, names: Sequence[str] | None, *, io: IO, loop: ZarrLoop, timeout: float, retries: int = 3
) -> dict[str, OpenArray]:
    """Open these arrays; None stands for the one array that the store holds. Data is read on `loop`.

    Raises DataError where the store or an array is missing or damaged, Untrainable (one of those) where it is in order
    but no numbers, EnvironmentProblem where it can't be reached.
    """
    if where.root is not None:
        _check_folder(where.root, where.path, where.name)
    node = await _opened(where, "")
    found: dict[str, zarr.AsyncArray[Any] | zarr.AsyncGroup]
    if names is None:
        array = await _only_array(node, where)
        found = {array.path.rpartition("/")[2] or ALONE: array}
    elif not isinstance(node, zarr.AsyncGroup):
        raise DataError(f"{where.name} is one array, not a group with {', '.join(names)}", hint="leave inputs= out")
    else:
        found = {name: await _member(node, where, name) for name in names}
    source = where.source
    far = Fetcher(source, retries=retries, timeout=timeout) if source is not None else None
    files = StoreFiles(where.root) if where.root is not None else None

    def readable(array: zarr.AsyncArray[Any]) -> OpenArray:
        return _readable(array, files, far, io=io, loop=loop, timeout=timeout)

    result: dict[str, OpenArray] = {}
    for name, member in found.items():
        if isinstance(member, zarr.AsyncGroup):
            result[name] = await _encoded(node, where, name, member, readable)
        elif (path := old_categories(member.metadata.attributes)) is not None and names is not None:
            categories = await _array_in(node, where, f"{name.rpartition('/')[0]}/{path}".lstrip("/"))
            known = await _texts(where, categories)
            result[name] = replace(readable(member), encoding=Encoding("categorical"), categories=known)
        else:
            result[name] = readable(member)
    return result


async def _encoded(
    node: zarr.AsyncGroup | zarr.AsyncArray[Any],
    where: Located,
    name: str,
    group: zarr.AsyncGroup,
    readable: Callable[[zarr.AsyncArray[Any]], OpenArray],
) -> OpenArray:
    """What AnnData has written as a group. Raises DataError for a group that is no array."""
    encoding = encoding_of(name, group.metadata.attributes)
    if encoding is None:
        raise DataError(f"{where.name}: {name!r} is a group, not an array", hint=f"name an array in it: '{name}/...'")
    first, *others = [await _array_in(node, where, f"{name}/{member}") for member in encoding.members]
    if encoding.kind == "categorical":
        return replace(readable(first), encoding=encoding, categories=await _texts(where, others[0]))
    return replace(readable(first), encoding=encoding, beside=tuple(readable(array) for array in others))


async def _array_in(node: zarr.AsyncGroup | zarr.AsyncArray[Any], where: Located, name: str) -> zarr.AsyncArray[Any]:
    """An array of a group."""
    assert isinstance(node, zarr.AsyncGroup)
    member = await _member(node, where, name)
    if isinstance(member, zarr.AsyncGroup):
        raise DataError(f"{where.name}: {name!r} is a group, not an array", hint=f"name an array in it: '{name}/...'")
    return member


async def _texts(where: Located, array: zarr.AsyncArray[Any]) -> tuple[str, ...]:
    """What an array of names holds, read whole."""
    check_whole(where, array, array.path)
    try:
        return tuple(map(str, np.asarray(await within_bounds(array).getitem(slice(None))).reshape(-1).tolist()))
    except Exception as error:
        raise _unusable(where, array.path, error, "restore the file from its source") from error


def check_whole(where: Located, array: zarr.AsyncArray[Any], name: str) -> None:
    """Raise DataError for an array that claims to be larger than what is read whole."""
    size = math.prod(array.shape) * max(1, array.dtype.itemsize)
    if size > MOST_BYTES:
        raise DataError(
            f"{where.name}: array {name!r} claims {math.prod(array.shape)} values of {format_bytes(size)} in all; at "
            f"most {format_bytes(MOST_BYTES)} is read whole",
            hint="restore its metadata, or name another array",
        )


async def array_at(where: Located, name: str) -> zarr.AsyncArray[Any] | None:
    """An array of any dtype, None where none has this name. Raises as `open_arrays` does."""
    _check_name(where, name)
    node = await _opened(where, "")
    if not isinstance(node, zarr.AsyncGroup):
        return None
    try:
        member = await node.getitem(name)
    except KeyError:
        return None
    except Exception as error:
        raise _unusable(where, name, error, _RESTORE) from error
    return await _own(node, where, member, name) if isinstance(member, zarr.AsyncArray) else None


async def list_arrays(where: Located) -> list[str]:
    """The names of all arrays below this root. Runs on a loop of its own, like `open_arrays`."""
    if where.root is not None:
        _check_folder(where.root, where.path, where.name)
    node = await _opened(where, "")
    return [""] if not isinstance(node, zarr.AsyncGroup) else await _names(node, where)


async def list_columns(where: Located) -> list[str]:
    """The same, with groups that AnnData writes as one array (sparse, categorical, with a mask) under their own names
    instead of those of the arrays in them."""
    names = await list_arrays(where)
    node = await _opened(where, "")
    return await _as_columns(node, where, names) if isinstance(node, zarr.AsyncGroup) else names


async def _as_columns(node: zarr.AsyncGroup, where: Located, names: Sequence[str]) -> list[str]:
    whole = set()
    for group in {name.rpartition("/")[0] for name in names} - {""}:
        with contextlib.suppress(DataError):  # its arrays say so themselves
            if stands_for_one((await _member(node, where, group)).metadata.attributes):
                whole.add(group)
    return list(dict.fromkeys(group if (group := name.rpartition("/")[0]) in whole else name for name in names))


def _readable(
    array: zarr.AsyncArray[Any],
    files: StoreFiles | None,
    far: Fetcher | None,
    *,
    io: IO,
    loop: ZarrLoop,
    timeout: float,
) -> OpenArray:
    check_trainable(array.path, array.dtype)  # before `to_dict`, which warns of dtypes that Zarr 3 does not specify
    metadata: Mapping[str, Any] = array.metadata.to_dict()
    layout = parse_array(array.path, metadata, array.dtype, array.metadata.fill_value)
    said = json.dumps({**metadata, "attributes": None}, sort_keys=True, default=str)
    why = layout.slow or ("io='store'" if io == "store" else None)
    if why is not None:
        array = within_bounds(array)
    if why is not None and far is not None:
        return OpenArray(layout, RemoteZarrReader(layout, array, loop, far, timeout=timeout), why, metadata=said)
    if why is not None:
        return OpenArray(layout, ZarrReader(layout, array, loop, timeout=timeout, files=files), why, metadata=said)
    if far is not None:
        if io != "auto":
            logger.info("io=%r is for folders of this machine; %s is read by ranges of bytes", io, array.store_path)
        return OpenArray(layout, RemoteReader(layout, far, loop), None, metadata=said)
    assert files is not None
    mapped = io == "mmap" or (io == "auto" and is_local(files.root) and _mapped(layout, files))
    return OpenArray(layout, LocalReader(layout, files, mapped=mapped), None, metadata=said)


def _mapped(layout: ArrayLayout, files: StoreFiles) -> bool:
    """Whether maps are the better way to this array's files; if not for their number, it is said."""
    if not maps_serve(layout):
        return False
    if files.worth_mapping(layout):
        return True
    logger.info(
        "%s: array %s has %d files, and %d maps can be kept (half of `ulimit -n`): they are read by pread, which is "
        "quicker than to map small files anew each time",
        files.root,
        layout.name or ALONE,
        layout.num_files,
        files.max_maps,
    )
    return False


async def _opened(where: Located, name: str) -> zarr.AsyncGroup | zarr.AsyncArray[Any]:
    path = "/".join(part for part in (where.path, name) if part)
    try:
        return await zarr_api.open(store=where.store, path=path or None, mode="r")
    except FileNotFoundError as error:
        copy = None if name else await _copied(where)
        if copy is None:
            raise DataError(f"{where.name}: no Zarr group or array there", hint=_NO_STORE) from error
        return copy
    except Exception as error:
        if where.unreachable(error):
            raise EnvironmentProblem(
                f"{where.name} can't be reached: {one_line(error)}",
                hint="check the network, the endpoint and the credentials (environment variables, storage_options=)",
            ) from error
        raise _unusable(where, name, error, _RESTORE) from error


async def _copied(where: Located) -> zarr.AsyncGroup | None:
    """The group whose consolidated metadata are all that was kept."""
    store = LocalStore(where.root, read_only=True) if isinstance(where.store, str) and where.root else where.store
    try:
        return await open_copy(store, where.path) if isinstance(store, Store) else None
    except Exception as error:
        raise _unusable(where, CONSOLIDATED, error, "restore the file from its source") from error


def _of_the_process(error: Exception) -> bool:
    """Whether that is a limit of this process, which tells nothing of a store; memory is none, for metadata that lie
    ask for any amount."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return isinstance(error, RuntimeError) and str(error) == NO_THREAD


def _unusable(where: Located, name: str, error: Exception, hint: str) -> StreamtrainError:
    cause = f"{type(error).__name__}: {error}".partition("\n")[0]
    if _of_the_process(error):
        return EnvironmentProblem(
            f"{where.name} can't be opened: {cause}",
            hint="raise the limits of this process (ulimit -n, -u, -v): nothing is known to be wrong with the data",
        )
    if "data type" in cause:
        hint = f"zarr {zarr.__version__} knows no such data type; a package may add it, or convert the data to another"
    elif type(error).__name__ == "UnknownCodecError":
        quoted = re.search(r"'+([^']+)'+", str(error))
        codec = f"codec {quoted[1]!r}" if quoted else "such codec"
        hint = (
            f"zarr {zarr.__version__} and numcodecs know no {codec}: install the package that registers it, or write "
            "the data again with another, such as zstd, where it can be read"
        )
    path = "/".join(part for part in (where.name, name) if part)
    return DataError(f"{path}: its metadata can't be used: {cause}", hint=hint)


async def _only_array(node: zarr.AsyncGroup | zarr.AsyncArray[Any], where: Located) -> zarr.AsyncArray[Any]:
    if not isinstance(node, zarr.AsyncGroup):
        return node
    names = await _names(node, where)
    if len(names) != 1:
        there = f"holds {', '.join(await _as_columns(node, where, names))}" if names else "holds no array"
        raise DataError(f"{where.name} {there}", hint="name one: inputs='...'" if names else _NO_STORE)
    return await _array_in(node, where, names[0])


def _check_name(where: Located, name: str) -> None:
    """Raise DataError for what can be no array's name."""
    if "\0" in name or {".", ".."} & {*name.split("/")}:
        raise DataError(
            f"{where.name} has no array {name!r}: names lead down from the store, without '.' and '..'",
            hint="name an array in it; of one that lies elsewhere, give its folder as the store",
        )


async def _member(node: zarr.AsyncGroup, where: Located, name: str) -> zarr.AsyncArray[Any] | zarr.AsyncGroup:
    _check_name(where, name)
    _check_member(where, name)
    member: object = None
    try:
        member = await node.getitem(name)
    except KeyError:
        names = await _names(node, where)
        if name in names:  # an array of the other Zarr format within a group
            return await _other_format(where, name)
        if name not in {each.rpartition("/")[0] for each in names}:  # else a folder that is no group asks for itself
            names = await _as_columns(node, where, names)
        near = difflib.get_close_matches(name, names, 1)
        there = f"there are: {', '.join(names)}" if names else "there is none"
        hint = f"did you mean {near[0]!r}?" if near else "name one of those" if names else _NO_STORE
        raise DataError(f"{where.name} has no array {name!r}; {there}", hint=hint) from None
    except Exception as error:
        raise _unusable(where, name, error, _RESTORE) from error
    if isinstance(member, zarr.AsyncGroup):
        return member
    assert isinstance(member, zarr.AsyncArray)
    return await _own(node, where, member, name)


async def _own(node: zarr.AsyncGroup, where: Located, array: zarr.AsyncArray[Any], name: str) -> zarr.AsyncArray[Any]:
    try:
        return await own_metadata(node, array, name)
    except Exception as error:
        raise _unusable(where, name, error, _RESTORE) from error


async def _other_format(where: Located, name: str) -> zarr.AsyncArray[Any]:
    node = await _opened(where, name)
    assert isinstance(node, zarr.AsyncArray)
    return node


async def _names(node: zarr.AsyncGroup, where: Located) -> list[str]:
    """All arrays below this group; on this machine also those whose metadata are damaged, so that they can be named."""
    if where.root is not None:
        return sorted({*_array_folders(where.root / where.path, ""), *consolidated_names(node)})
    found = [name async for name, member in node.members(max_depth=None) if isinstance(member, zarr.AsyncArray)]
    return sorted(found)


def _array_folders(folder: Path, name: str) -> Iterator[str]:
    """Folders of arrays below this one; an array's own folder is not entered, however many chunks lie in it."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir():
            continue
        path, inner = Path(entry.path), f"{name}/{entry.name}".lstrip("/")
        if os.path.lexists(path / ".zarray") or (os.path.lexists(path / "zarr.json") and not _is_group(path)):
            yield inner
        elif any(os.path.lexists(path / file) for file in METADATA):
            yield from _array_folders(path, inner)


def _is_group(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "zarr.json").read_bytes()).get("node_type") == "group")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _check_folder(root: Path, path: str, name: str) -> None:
    """A folder with metadata that is JSON. Raises DataError."""
    folder = root / path
    if not folder.exists():
        raise DataError(f"dataset {name} does not exist", hint="check the path")
    if not folder.is_dir():
        raise DataError(f"{name} is not a Zarr store but a plain file", hint=_NO_STORE)
    if not any(os.path.lexists(folder / file) for file in METADATA):
        raise DataError(f"{name} is not a Zarr store (no zarr.json, .zgroup or .zarray in it)", hint=_NO_STORE)
    _check_json(folder)


def _check_member(where: Located, name: str) -> None:
    if where.root is not None and (where.root / where.path / name).is_dir():
        _check_json(where.root / where.path / name)


def _check_json(folder: Path) -> None:
    for file in METADATA:
        path = folder / file
        if not os.path.lexists(path):
            continue
        if not path.is_file():
            raise DataError(f"{path} is no regular file", hint=_RESTORE)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}", hint=_RESTORE) from error
        if not text.strip():
            raise DataError(f"{path} is empty (byte 0 of {len(text)})", hint=_RESTORE)
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            at = len(error.doc[: error.pos].encode())
            raise DataError(
                f"{path} is no JSON: {error.msg.removesuffix(' at')} at byte {at} of {len(text)}", hint=_RESTORE
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is no JSON: not UTF-8 at byte {error.start} of {len(text)}", hint=_RESTORE
            ) from error
        except RecursionError as error:
            raise DataError(f"{path} is no JSON that can be read: nested too deep", hint=_RESTORE) from error
        except ValueError as error:  # Python reads no integer of more than 4,300 digits
            digits = _longest_number(text)
            raise DataError(
                f"{path} is no JSON that can be read: a number of {len(digits[0])} digits at byte {digits.start()} of "
                f"{len(text)}",
                hint=_RESTORE,
            ) from error


def _longest_number(text: bytes) -> re.Match[bytes]:
    """The longest run of digits outside of strings."""
    found = (match for match in re.finditer(rb'"(?:\\.|[^"\\])*"|[0-9]+', text) if match[0][:1] != b'"')
    return max(found, key=lambda match: len(match[0]))


def string_pairs(pairs: object, name: str) -> dict[str, str] | None:
    """A mapping of names to strings; numbers and truth values are taken as they are written in a configuration."""
    if pairs is None:
        return None
    if not isinstance(pairs, Mapping):
        raise ConfigError(f"{name} must be a mapping of strings, not {pairs!r}")
    for key, value in pairs.items():
        if not isinstance(key, str) or not isinstance(value, str | bool | int):
            raise ConfigError(f"{name} must be a mapping of strings, not of {key!r} to {value!r}")
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in pairs.items()}
