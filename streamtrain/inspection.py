"""What a store holds, what a pass over it costs, and what would make it cheaper; no chunk is read for it.

Its law: an array that can't be read is listed with its reason, and hides none of the others; one that is no numbers,
such as texts, is listed as that, and ends nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamtrain import assembly
from streamtrain.config import resolve_data
from streamtrain.config_tables import DataTable
from streamtrain.data import opening
from streamtrain.data.budget import format_bytes, format_enough
from streamtrain.data.layout import ALONE, Untrainable
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import DataError, EnvironmentProblem
from streamtrain.said import Said

if TYPE_CHECKING:
    from streamtrain.data.opening import OpenArray
    from streamtrain.data.stream import ZarrStream
    from streamtrain.data.survey import Plan


Arrays = Mapping[str, "OpenArray | DataError"]
"""By name; where one can't be read, why: Untrainable is no damage."""

SMALL_FILE = 256 << 10
LARGE_CHUNK = 64 << 20
MANY_FILES = 10_000


def inspect(said: Said) -> Iterator[str]:
    """Lines to print. Raises DataError after them for an array that can't be read, unless `inputs` names others."""
    table = resolve_data(said)
    arrays = look(table)
    for name, array in arrays.items():
        yield from describe(name, array)
    bad = [array for array in arrays.values() if isinstance(array, DataError) and not isinstance(array, Untrainable)]
    if bad and table.inputs is None:
        raise bad[0]
    table = chosen(table, arrays)
    stream = assembly.stream(table, said, "data", output="numpy")
    plan = asyncio.run(_planned(stream))
    yield ""
    yield from cost(plan, table)
    yield ""
    yield from advice({name: arrays[name] for name in _names(table) or arrays if name in arrays}, plan)


def look(table: DataTable) -> Arrays:
    """Open every array of the store, without reading a chunk."""
    store: object = table.store
    if isinstance(store, list):
        store = store[0] if len(store) == 1 else store
    where, loop = opening.locate(store, table.storage_options, retries=table.retries), ZarrLoop()

    async def open_all() -> Arrays:
        found: dict[str, OpenArray | DataError] = {}
        for name in await opening.list_columns(where):
            try:
                opened = await opening.open_arrays(
                    where, [name] if name else None, io=table.io, loop=loop, timeout=table.read_timeout
                )
                found[name] = next(iter(opened.values()))
            except DataError as error:
                found[name] = error
        return found

    try:
        found = loop.run(open_all(), table.read_timeout)
    except TimeoutError:
        raise EnvironmentProblem(
            f"the metadata of {table.store} did not come within {table.read_timeout:g} s",
            hint="Check the file system, or give more with --read-timeout.",
        ) from None
    finally:
        loop.close()
        where.close()
    if not found:
        raise DataError(f"{table.store} holds no array", hint="`python -m data_tools convert` makes one.")
    return found


def with_inputs(table: DataTable) -> DataTable:
    """The same with inputs where none were named."""
    if table.inputs is not None:
        return table
    return chosen(table, look(table))


def chosen(table: DataTable, arrays: Arrays) -> DataTable:
    """The same with inputs: those that were named, else all arrays with as many rows as most of them have."""
    found = {n: array for n, array in arrays.items() if not isinstance(array, DataError)}
    alone = len(arrays) == 1 and all(array.encoding is None for array in found.values())
    if table.inputs is not None or alone:
        return table
    lengths = {name: shape[0] for name, array in found.items() if (shape := _rows_and_columns(array))}
    if not lengths:
        return table
    rows = Counter(lengths.values())
    most = max(rows, key=lambda count: (rows[count], count))
    targets = [table.targets] if isinstance(table.targets, str) else table.targets or []
    names = [name for name, length in lengths.items() if length == most and name not in targets]
    return table.model_copy(update={"inputs": names})


def _rows_and_columns(array: OpenArray) -> tuple[int, ...]:
    """The shape by which its rows are counted: of a sparse one, that of the matrix."""
    sparse = array.encoding is not None and array.encoding.kind == "csr"
    return array.encoding.shape if array.encoding is not None and sparse else array.layout.shape


def describe(name: str, array: OpenArray | DataError) -> list[str]:
    """How an array is stored and which lane reads it."""
    if isinstance(array, Untrainable):
        return [f"{name or ALONE}: can't be trained on: {array}"]
    if isinstance(array, DataError):
        return [f"{name or ALONE}: can't be read: {array}"]
    layout = array.layout
    size = math.prod(layout.shape) * layout.dtype.itemsize
    shards = f" in shards {_shape(layout.file_shape)}" if layout.shard_shape else ""
    file_bytes = math.prod(layout.file_shape) * layout.dtype.itemsize
    codecs = ", ".join(_codec(codec.name, codec.config) for codec in layout.codecs) or "none: raw bytes"
    return [
        f"{name or ALONE}: {_kind(array)}{layout.dtype.name} {_shape(layout.shape)}, {format_bytes(size)}",
        f"  chunks {_shape(layout.chunk_shape)} of {format_bytes(layout.chunk_bytes)}{shards}; "
        f"{layout.num_files} files of at most {format_bytes(file_bytes)} decoded",
        f"  codecs {codecs if array.fallback is None else 'see below'}",
        f"  lane {_lane(array)}",
    ]


def cost(plan: Plan, table: DataTable) -> Iterator[str]:
    """What a pass with these options takes."""
    over = ", ".join(_names(table)) or "the array"
    yield f"a pass over {over}: {plan.samples} samples in {plan.batches} batches of {table.batch_size}"
    yield (
        f"  reads {plan.chunks} chunks, {format_bytes(plan.bytes_read)} decoded for {format_bytes(plan.bytes_used)} of "
        f"samples: amplification {plan.read_amplification:.2f}"
    )
    shuffle = table.shuffle if isinstance(table.shuffle, str) else "block" if table.shuffle else "none"
    together = f", {plan.cells_per_block} of {plan.cells} cells permuted together" if shuffle == "block" else ""
    yield f"  shuffle {shuffle}{together}: quality {plan.shuffle_quality:.2f} (1 is a full shuffle)"
    yield (
        f"  memory {format_bytes(plan.memory)}, of which {format_enough(plan.memory_least)} is the least that works; "
        f"buffers of {format_bytes(plan.buffer_bytes)}"
    )


def advice(used: Arrays, plan: Plan) -> list[str]:
    """What to change, one line each; or that there is nothing."""
    found = [line for name, array in used.items() for line in _advice(name or "the array", array)]
    if plan.read_amplification > 1.5:
        found.append("chunks are read for a part of their rows, or more than once: shuffle in blocks, or rechunk")
    if plan.memory_least > plan.memory / 2:
        found.append("memory is close to the least that works: more of it reads further ahead")
    return ["what to change:", *(f"  {line}" for line in found or ["nothing: this streams well as it is"])]


def _kind(array: OpenArray) -> str:
    """What it is, where it is more than the array of its values, which are told then."""
    if array.encoding is None:
        return ""
    if array.encoding.kind == "csr":
        return f"sparse matrix (CSR) {_shape(array.encoding.shape)}; its numbers that are stored: "
    if array.encoding.kind == "categorical":
        return f"categorical of {len(array.categories or ())} categories; its codes: "
    return "column with a mask of missing values; its values: "


def _advice(name: str, array: OpenArray | DataError) -> Iterator[str]:
    if isinstance(array, DataError):
        return
    layout = array.layout
    if array.fallback is not None:
        yield f"{name}: converting it to raw or zstd chunks takes it off the slow lane ({array.fallback})"
    file_bytes = math.prod(layout.file_shape) * layout.dtype.itemsize
    if file_bytes < SMALL_FILE and layout.num_files > MANY_FILES:
        yield f"{name}: {layout.num_files} files of {format_bytes(file_bytes)}: larger chunks, or shards, open fewer"
    if layout.chunk_bytes > LARGE_CHUNK:
        yield f"{name}: chunks of {format_bytes(layout.chunk_bytes)} take much memory at once; 1 to 16 MiB serve better"
    if layout.ndim > 1 and layout.chunk_shape[0] == layout.shape[0] > 1 and layout.chunk_shape[1:] != layout.shape[1:]:
        yield f"{name}: each chunk holds a part of every row, so any row needs all chunks: chunk along axis 0"


def _lane(array: OpenArray) -> str:
    if array.fallback is not None:
        return f"zarr's own API, slower: {array.fallback}"
    lane = {"mmap": "memory maps", "pread": "pread"}[array.reader.lane]
    return lane if array.layout.raw else f"{lane}, decoded by numcodecs into buffers kept for it"


def _codec(name: str, config: Mapping[str, Any]) -> str:
    level = config.get("level", config.get("clevel"))
    return f"{name} (level {level})" if level is not None else name


def _shape(lengths: Sequence[int]) -> str:
    return " x ".join(map(str, lengths)) or "()"


def _names(table: DataTable) -> list[str]:
    given = [table.inputs, table.targets]
    return [name for part in given if part for name in ([part] if isinstance(part, str) else part)]


async def _planned(stream: ZarrStream) -> Plan:
    try:
        await stream.open()
        return stream.plan()
    finally:
        await stream.aclose()
