"""A Zarr 3 store of what a model made of a stream's samples, in the source's coordinates. Blocking: for a thread.

Its law: each chunk is written once, whole, and the store appears when all of it is durable; where no sample came is
fill, and that is said.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.api import asynchronous as zarr_api
from zarr.codecs import ZstdCodec

from streamtrain.data.canvas import Axis, Canvas, Ground, canvas_of, rows
from streamtrain.data.coordinates import OWN, Stored, as_texts, counted_alike, read_stored
from streamtrain.data.permutation import Ints
from streamtrain.data.stitching import Band, Stitching
from streamtrain.data.whole import check_apart, whole_or_nothing
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import DataError, UserCodeError

logger = logging.getLogger(__name__)

Values = NDArray[Any]

CHUNK_BYTES = 16 << 20
"""The most that a chunk has, decoded; a row that is larger is divided."""
SUMMED = 16
"""Bytes of a place where samples overlap: sum and weight, float64. A band of those is as large as a chunk elsewhere."""
UNKNOWN_ROWS = 1 << 16
"""Rows of a chunk, at most, where nobody knows how many there will be."""
LEAST_MEMORY = 64 << 20
"""What open bands may take of a small budget; of a large one a quarter. Beyond that they lie in a file."""
PACKED = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned", "dtype", "coordinates")
"""Attributes of a target that tell how its numbers are packed, or what lies beside it: not true of predictions."""


class Abandoned(Exception):
    """The writing is given up."""


@dataclass
class _Output:
    """One array on its way."""

    canvas: Canvas
    array: zarr.AsyncArray[Any]
    stitching: Stitching
    row: tuple[int, ...]
    """The shape of one sample's."""
    bands: int = 0
    missing: bool = False


class PredictedStore:
    """Takes in outputs batch by batch; `commit` gives the store its name. Not thread-safe, and blocks: for a thread."""

    def __init__(self, target: Path, ground: Ground | None, *, overwrite: bool = False, expected: int = 0) -> None:
        """`ground`: what the numbers of samples stand for; None where the source does not tell: then there is a row for
        each number, or for each sample in the order in which they come. `expected`: rows, then, if that is known.

        Raises ConfigError for a target within the source or around it.
        """
        self.target, self._ground, self._expected = target, ground, expected
        for where in () if ground is None else ground.where:
            if where.root is not None:
                check_apart(where.root, target)
        self._whole: contextlib.AbstractContextManager[Path] = whole_or_nothing(target, overwrite=overwrite)
        self._loop = ZarrLoop()
        self._part: Path | None = None
        self._group: zarr.AsyncGroup | None = None
        self._outputs: dict[str, _Output] = {}
        self._names: frozenset[str] = frozenset()
        self._dims: dict[str, tuple[object, ...]] = {}
        self._last = -1

    def open(self) -> None:
        """Raises ConfigError where the target exists, EnvironmentProblem where the disk refuses."""
        self._part = self._whole.__enter__()

    def add(self, numbers: Ints | None, outputs: Mapping[str, Values], samples: int) -> None:
        """Take in the outputs, (B, ...) by name, of these samples; without numbers in the order in which they come.

        Raises UserCodeError for outputs that are no rows of these samples or change their shapes, EnvironmentProblem
        where the disk refuses.
        """
        self._check(outputs, samples)
        if not self._outputs:
            with self._disk():
                self._begin(outputs, ordered=numbers is None)
            self._expected = 0 if numbers is None else self._expected
        if numbers is None:
            numbers = np.arange(self._last + 1, self._last + 1 + samples, dtype=np.int64)
        self._last = max(self._last, int(numbers.max(initial=-1)))
        with self._disk():
            for name, output in self._outputs.items():
                for band in output.stitching.put(numbers, outputs[name]):
                    self._write(output, band)

    def commit(self) -> Path:
        """Write the rest, make all durable, and give it its name. Raises DataError where nothing came."""
        if not self._outputs:
            raise DataError("a stream to predict on gave no batch", hint="Check its split and filters.")
        with self._disk():
            for name, output in self._outputs.items():
                self._finish(name, output)
            self._consolidate()
        self._let_go()
        self._part = None
        self._whole.__exit__(None, None, None)
        return self.target

    def close(self) -> None:
        """Give up what was not committed; nothing of it stays."""
        self._let_go()
        if self._part is not None:
            self._give_up(Abandoned())

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Give up where the disk refuses. Raises EnvironmentProblem."""
        try:
            yield
        except OSError as error:
            self._let_go()
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._part = None
        self._whole.__exit__(type(error), error, error.__traceback__)

    def _let_go(self) -> None:
        for output in self._outputs.values():
            output.stitching.close()
        self._loop.close()

    # ---- the beginning

    def _check(self, outputs: Mapping[str, Values], samples: int) -> None:
        for name, values in outputs.items():
            if values.ndim < 1 or len(values) != samples:
                raise UserCodeError(
                    f"predict: {name} has shape {values.shape} for a batch of {samples} samples",
                    hint="The first axis of an output is that of the samples.",
                )
            known = self._outputs.get(name)
            if known is not None and (values.shape[1:], values.dtype) != (known.row, known.stitching.dtype):
                raise UserCodeError(
                    f"predict: {name} has samples of {values.dtype}{list(values.shape[1:])} in one batch, of "
                    f"{known.stitching.dtype}{list(known.row)} in those before",
                    hint="All batches need the same, to become one array.",
                )
        if self._outputs and outputs.keys() != self._outputs.keys():
            raise UserCodeError(
                f"predict: a batch has the outputs {', '.join(outputs)}, those before had {', '.join(self._outputs)}",
                hint="All batches need the same.",
            )

    def _begin(self, outputs: Mapping[str, Values], *, ordered: bool) -> None:
        self._group = self._run(zarr_api.create_group(store=str(self._part)))
        self._names = frozenset(outputs)
        for name, values in outputs.items():
            if not name or "/" in name or name.startswith((".", "__")):
                raise UserCodeError(f"predict: an output is named {name!r}", hint="A name without / is needed.")
            self._outputs[name] = self._create(name, self._canvas(name, values), values, ordered=ordered)

    def _canvas(self, name: str, values: Values) -> Canvas:
        if self._ground is None:
            return rows(values.shape[1:], self._expected)
        canvas = canvas_of(values.shape[1:], self._ground, name)
        if canvas.numbered and any(reach.length for part in self._ground.parts for reach in part.reaches):
            logger.info(
                "%s has %s numbers a sample, which is no window of the source: they have a row for each sample, at the "
                "coordinates where it begins",
                name,
                list(values.shape[1:]),
            )
        return canvas

    def _create(self, name: str, canvas: Canvas, values: Values, *, ordered: bool) -> _Output:
        assert self._part is not None
        unknown = self._ground is None
        place = max(values.dtype.itemsize, SUMMED) if canvas.blends else values.dtype.itemsize
        chunks = chunk_shape(canvas.shape, place, unknown=unknown)
        fill = fill_of(values.dtype)
        dims = [self._dim(name, number, axis, canvas) for number, axis in enumerate(canvas.axes)]
        said = {} if canvas.like is None else canvas.like.layout.attributes
        attributes = {key: value for key, value in said.items() if key not in (*PACKED, *OWN)}
        array = self._array(name, canvas.shape, values.dtype, chunks, dims, attributes, fill)
        memory = LEAST_MEMORY if self._ground is None else max(LEAST_MEMORY, self._ground.memory // 4)
        stitching = Stitching(
            canvas,
            values.dtype,
            fill,
            height=chunks[0],
            folder=self._part.parent,
            ordered=ordered if self._ground is None else self._ground.ordered,
            memory=memory,
        )
        if not stitching.in_memory:
            logger.info("%s: samples come in another order, or too many at once for memory: they wait in a file", name)
        self._copy_coordinates(canvas, dims)
        return _Output(canvas, array, stitching, values.shape[1:])

    def _array(
        self,
        name: str,
        shape: Sequence[int],
        dtype: Any,
        chunks: Sequence[int],
        dims: Sequence[str],
        attributes: Mapping[str, Any],
        fill: Any,
    ) -> zarr.AsyncArray[Any]:
        assert self._group is not None
        compressors: Any = ZstdCodec(level=1, checksum=True)
        made: zarr.AsyncArray[Any] = self._run(
            self._group.create_array(
                name,
                shape=tuple(shape),
                dtype=dtype,
                chunks=tuple(chunks),
                compressors=compressors,
                fill_value=fill,
                dimension_names=list(dims),
                attributes=dict(attributes),
                config={"write_empty_chunks": True},
            )
        )
        return made

    def _run(self, coroutine: Any) -> Any:
        return self._loop.run(coroutine, None)

    # ---- dimensions and coordinates

    def _dim(self, name: str, number: int, axis: Axis, canvas: Canvas) -> str:
        """What an axis is called: as in the source, unless another array has another axis of that name."""
        several = sum(each.sample is not None for each in canvas.axes) > 1
        plain = f"{name}_{number}" if axis.sample is None else f"sample_{axis.sample}" if several else "sample"
        wanted = axis.dim or plain
        length = None if axis.sample is not None and not canvas.frames else axis.length
        taken = axis.taken.indices(axis.full) if isinstance(axis.taken, slice) else tuple(axis.taken.tolist())
        key = (length, axis.dim is None, taken)
        if wanted in self._names or self._dims.setdefault(wanted, key) != key:
            wanted = f"{name}_{wanted}"
            self._dims[wanted] = key
        return wanted

    def _copy_coordinates(self, canvas: Canvas, dims: Sequence[str]) -> None:
        """Those of all dimensions that the source has any of, and what they and the target name beside them."""
        beside = [] if canvas.like is None else _names(canvas.like.layout.attributes.get("coordinates"))
        for axis, dim in zip(canvas.axes, dims, strict=True):
            if axis.dim is None or self._written(dim):
                continue
            stored = self._coordinate(axis)
            if stored is not None:
                self._put(dim, stored.values, [dim], stored.attributes)
                beside += _names(stored.attributes.get("bounds"))
        along = {axis.dim: axis for axis in canvas.axes if axis.dim is not None}
        if self._ground is None or len(self._ground.where) > 1 or not along.keys() <= {*dims}:
            return
        for name in beside:
            if "/" not in name and not self._written(name):
                self._copy_beside(name, along)

    def _written(self, name: str) -> bool:
        return name in self._names or (self._part is not None and (self._part / name).exists())

    def _copy_beside(self, name: str, along: Mapping[str, Axis]) -> None:
        """An array that others name: bounds, a coordinate of several dimensions."""
        assert self._ground is not None
        stored = self._read(0, name, next(iter(along.values())).beside)
        if stored is None or not any(dim in along for dim in stored.dims):
            return
        values, dims = stored.values, [dim or f"{name}_{n}" for n, dim in enumerate(stored.dims)]
        for number, dim in enumerate(dims):
            if dim in along:
                if values.shape[number] != along[dim].full:
                    return
                values = values[(*(slice(None),) * number, along[dim].taken)]
        self._put(name, values, dims, stored.attributes)

    def _coordinate(self, axis: Axis) -> Stored | None:
        """The coordinate of an axis, of all stores in a row where that is one; None, which is said, where it can't be
        copied."""
        assert self._ground is not None
        assert axis.dim is not None
        several = axis.sample == 0
        found: list[Stored] = []
        for number in range(len(self._ground.where) if several else 1):
            stored = self._read(number, axis.dim, axis.beside)
            if stored is None or stored.values.ndim != 1:
                return None
            cut = self._cut(stored, axis, number)
            found.append(counted_alike(cut, found[0], axis.dim) if found else cut)
        if any(each.attributes != found[0].attributes for each in found):
            logger.warning("coordinate %s is not copied: its attributes differ between the stores", axis.dim)
            return None
        joined = np.concatenate([as_texts(each.values) for each in found])
        if len(joined) != axis.length:
            logger.warning(
                "coordinate %s is not copied: it has %d values for %d places", axis.dim, len(joined), axis.length
            )
            return None
        return replace(found[0], values=joined)

    def _cut(self, stored: Stored, axis: Axis, number: int) -> Stored:
        assert self._ground is not None
        taken = axis.taken
        if axis.sample == 0 and isinstance(taken, slice) and taken.step is not None:
            taken = slice(0, self._ground.frames[number].sample_shape[0] * taken.step, taken.step)
        if not isinstance(taken, slice) and len(taken) and int(taken.max()) >= len(stored.values):
            return replace(stored, values=stored.values[:0])
        return replace(stored, values=stored.values[taken])

    def _read(self, number: int, name: str, beside: str) -> Stored | None:
        assert self._ground is not None
        ground = self._ground
        try:
            reading = read_stored(
                ground.where[number], name, beside, loop=self._loop, timeout=ground.timeout, retries=ground.retries
            )
            stored: Stored | None = self._loop.run(reading, ground.timeout)
            return stored
        except (DataError, TimeoutError) as error:
            logger.warning("%s is not copied from the source: %s", name, str(error) or "it was not read in time")
            return None

    def _put(self, name: str, values: Values, dims: Sequence[str], attributes: Mapping[str, Any]) -> None:
        """Write an array of the source, of the places that stand here, with its attributes and no other."""
        values = as_texts(values)
        texts = values.dtype.kind == "O"
        chunks = values.shape if texts else chunk_shape(values.shape, values.dtype.itemsize)
        array = self._array(name, values.shape, str if texts else values.dtype, chunks, dims, attributes, None)
        self._run(array.setitem(Ellipsis, values))

    # ---- rows

    def _write(self, output: _Output, band: Band) -> None:
        array, stop = output.array, band.start + len(band.values)
        if stop > array.shape[0]:  # of a source that did not tell how long it is
            self._run(array.resize((max(stop, 2 * array.shape[0]), *array.shape[1:])))
        output.bands += 1
        output.missing |= band.missing
        self._run(array.setitem((slice(band.start, stop), Ellipsis), band.values))

    def _finish(self, name: str, output: _Output) -> None:
        """The bands that are left, and the last word on what is there."""
        length = output.canvas.shape[0] if output.canvas.frames else max(self._last + 1, self._expected)
        array = output.array
        if array.shape[0] != length:
            self._run(array.resize((length, *array.shape[1:])))
        for band in output.stitching.rest(length):
            self._write(output, band)
        missing = output.missing or output.bands < -(-length // output.stitching.height)
        attributes: dict[str, Any] = {"streamtrain": {"complete": not missing, "manifest": True}}
        if missing:
            fill = output.stitching.fill
            logger.info("%s: no sample came to some places of %s, which are %s", self.target, name, fill)
            if output.stitching.dtype.kind in "iu":
                attributes["_FillValue"] = int(fill)
        self._run(array.update_attributes(attributes))

    def _consolidate(self) -> None:
        """Copy the arrays' metadata into the group's, where xarray looks for them first."""
        assert self._part is not None
        every = {path.parent.name: json.loads(path.read_bytes()) for path in sorted(self._part.glob("*/zarr.json"))}
        root = self._part / "zarr.json"
        copied = {"kind": "inline", "must_understand": False, "metadata": every}
        root.write_text(json.dumps({**json.loads(root.read_bytes()), "consolidated_metadata": copied}, indent=2))


def _names(text: object) -> list[str]:
    """Names as CF lists them."""
    return text.split() if isinstance(text, str) else []


def fill_of(dtype: np.dtype[Any]) -> Any:
    """What stands where no sample came: NaN, of whole numbers the least (of unsigned ones the largest), or False."""
    if dtype.kind == "c":
        return complex(math.nan, math.nan)
    if dtype.kind == "f":
        return math.nan
    if dtype.kind == "b":
        return False
    return int(np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max)


def chunk_shape(shape: Sequence[int], itemsize: int, *, unknown: bool = False) -> tuple[int, ...]:
    """Whole rows up to CHUNK_BYTES; of a row that is larger, halves of its longest axes. `unknown`: of more rows."""
    inner = [max(1, size) for size in shape[1:]]
    while math.prod(inner) * itemsize > CHUNK_BYTES:
        longest = inner.index(max(inner))
        inner[longest] = -(-inner[longest] // 2)
    most = max(1, CHUNK_BYTES // max(1, math.prod(inner) * itemsize))
    if inner != [max(1, size) for size in shape[1:]]:
        most = 1
    return (min(most, UNKNOWN_ROWS) if unknown else max(1, min(most, shape[0])), *inner)
