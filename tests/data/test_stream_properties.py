"""What holds for every stream: its batches are the source indexed by `batch.index`, once an epoch, in one order.

Stores of any shape, chunking, codec and format; any memory, threads, prefetch and lane; any place to resume from.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.codecs import numcodecs as v3
from zarr.storage import MemoryStore

from streamtrain.data.batch import Batch
from streamtrain.data.stream import ZarrStream
from streamtrain.errors import ConfigError

DTYPES = ["int32", "float32", "float64", "uint8", "bool", "float16", "c8", "int64"]
DTYPES += ["int8", "int16", "uint16", "uint32", "uint64", "c16"]
V3_CODECS: list[Any] = [
    *[None, ZstdCodec(level=1), GzipCodec(level=1), BloscCodec(typesize=1), Crc32cCodec()],
    *[[ZstdCodec(), Crc32cCodec()], [Crc32cCodec(), ZstdCodec()], [v3.Shuffle(elementsize=1), v3.LZ4()]],
    *[v3.Zlib(level=1), [v3.LZ4(), v3.Adler32()], v3.BZ2()],
]
V2_CODECS: list[Any] = [
    *[None, numcodecs.Zstd(level=1), numcodecs.Blosc(), numcodecs.LZ4(), numcodecs.Zlib(), numcodecs.GZip()],
    numcodecs.BZ2(),
]
FILLS: dict[str, list[Any]] = {
    "f": [0, 1, float("nan"), float("-inf"), -0.0, 0.1],
    "c": [0, 1, complex("nan"), complex(0, float("inf"))],
    "b": [False, True],
}


@dataclass(frozen=True)
class Source:
    """One array: how it is laid out and what is in it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    options: dict[str, Any]
    empty: float
    """This part of it is fill, so that chunks are left out."""

    def write(self, group: zarr.Group) -> None:
        array = group.create_array(self.name, shape=self.shape, dtype=self.dtype, **self.options)
        data = np.random.default_rng(len(self.name)).integers(0, 100, self.shape).astype(array.dtype)
        fill = self.options.get("fill_value")
        data.reshape(-1)[: int(data.size * self.empty)] = 0 if fill is None else fill
        if data.shape:
            array[...] = data


@dataclass(frozen=True)
class Drawn:
    """A store and a stream over it."""

    sources: list[Source]
    zarr_format: int
    in_memory: bool
    sample_axes: tuple[int, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    consolidated: bool = False


@st.composite
def sources(draw: st.DrawFn, name: str, axes: tuple[int, ...], samples: tuple[int, ...], zarr_format: int) -> Source:
    rest = draw(st.lists(st.integers(1, 4), min_size=max(axes) + 1 - len(axes), max_size=2).map(list))
    shape, others = [0] * (len(axes) + len(rest)), list(rest)
    for axis in range(len(shape)):
        shape[axis] = samples[axes.index(axis)] if axis in axes else others.pop()
    dtype = draw(st.sampled_from(DTYPES))
    options: dict[str, Any] = {"chunks": tuple(draw(st.integers(1, size + 1)) for size in shape)}
    if zarr_format == 2:
        options["order"] = draw(st.sampled_from(["C", "F"]))
        options["compressors"] = draw(st.sampled_from(V2_CODECS))
        options["fill_value"] = draw(st.sampled_from([None, *FILLS.get(np.dtype(dtype).kind, [0, 1, 7])]))
        options["chunk_key_encoding"] = {"name": "v2", "separator": draw(st.sampled_from("./"))}
        if dtype.startswith("int") and draw(st.booleans()):
            options["filters"] = [numcodecs.Delta(dtype=np.dtype(dtype).str)]
        elif draw(st.booleans()):
            options["filters"] = [numcodecs.Shuffle(elementsize=np.dtype(dtype).itemsize)]
        if draw(st.booleans()):
            dtype = np.dtype(dtype).newbyteorder(">").str
    else:
        options["compressors"] = draw(st.sampled_from(V3_CODECS))
        options["fill_value"] = draw(st.sampled_from(FILLS.get(np.dtype(dtype).kind, [0, 1, 7])))
        if dtype not in ("bool", "uint8", "int8"):
            options["serializer"] = BytesCodec(endian=draw(st.sampled_from(["little", "big"])))
        if draw(st.booleans()):
            options["filters"] = TransposeCodec(order=draw(st.permutations(range(len(shape))).map(tuple)))
        elif dtype.startswith("int") and draw(st.booleans()):
            options["filters"] = v3.Delta(dtype=np.dtype(dtype).str)
            options.pop("serializer", None)
        if draw(st.booleans()):
            per = tuple(c * draw(st.integers(1, 3)) for c in options["chunks"])
            options["shards"] = {"shape": per, "index_location": draw(st.sampled_from(["start", "end"]))}
    empty = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))
    return Source(name, tuple(shape), dtype, options, empty)


@st.composite
def streams(draw: st.DrawFn) -> Drawn:
    axes = draw(st.sampled_from([(0,), (0,), (1,), (0, 1), (1, 0), (0, 2)]))
    samples = tuple(draw(st.integers(1, 40 if len(axes) == 1 else 8)) for _ in axes)
    zarr_format, count = draw(st.sampled_from([3, 3, 2])), draw(st.integers(1, 3))
    names = ["a", "b", "t"][:count]
    arrays = [draw(sources(name, axes, samples, zarr_format)) for name in names]
    n = int(np.prod(samples))
    split = draw(st.none() | st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda ab: tuple(sorted(ab))))
    if split is not None and split[0] == split[1]:
        split = None
    targets: dict[str, Any] = {"targets": "t"} if count == 3 else {}
    keywords: dict[str, Any] = {
        "inputs": draw(st.sampled_from(["a", ["a"]])) if count == 1 else ["b", "a"][: draw(st.integers(1, 2))],
        **targets,
        "sample_axes": axes,
        "batch_size": draw(st.integers(1, n + 2)),
        "shuffle": draw(st.sampled_from([False, "block", "block", "global"])),
        "shuffle_blocks": draw(st.none() | st.integers(1, 5)),
        "seed": draw(st.integers(0, 3)),
        "split": split,
        "split_by": draw(st.sampled_from(["range", "chunk", "sample"])),
        "split_seed": draw(st.integers(0, 3)),
    }
    if draw(st.integers(0, 3)) == 0 and not any("c" in source.dtype for source in arrays):
        keywords["dtype"] = "float32"
    return Drawn(arrays, zarr_format, draw(st.integers(0, 5)) == 0, axes, keywords, draw(st.integers(0, 3)) == 0)


@contextmanager
def store_of(drawn: Drawn) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        store: Any = MemoryStore() if drawn.in_memory else folder
        group = zarr.create_group(store, zarr_format=drawn.zarr_format)  # type: ignore[arg-type]
        for source in drawn.sources:
            source.write(group)
        if drawn.consolidated:
            zarr.consolidate_metadata(store)
        yield store


def read(store: Any, drawn: Drawn) -> dict[str, NDArray[Any]]:
    """Each array by zarr's own reading, sample axes in front and flattened."""
    group, count = zarr.open_group(store, mode="r"), len(drawn.sample_axes)
    result = {}
    for source in drawn.sources:
        moved = np.moveaxis(np.asarray(group[source.name][...]), drawn.sample_axes, range(count))  # type: ignore[index]
        result[source.name] = moved.reshape(-1, *moved.shape[count:])
    return result


def stream(store: Any, drawn: Drawn, **changes: Any) -> ZarrStream:
    given: dict[str, Any] = {"memory": "64MiB", "threads": 2, "output": "numpy", **drawn.keywords, **changes}
    return ZarrStream(store, **given)


async def collect(source: ZarrStream, stop: int | None = None) -> list[Batch]:
    """Batches of a pass, as copies: they hold no memory of the stream."""
    found: list[Batch] = []
    async for batch in source:
        inputs = (
            {k: v.copy() for k, v in batch.inputs.items()} if isinstance(batch.inputs, dict) else batch.inputs.copy()
        )
        targets = None if batch.targets is None else batch.targets.copy()
        found.append(Batch(inputs, targets, batch.index.copy(), batch.epoch, batch.cursor))
        del batch
        if len(found) == stop:
            break
    return found


def numbers(batches: list[Batch]) -> list[int]:
    return [int(number) for batch in batches for number in batch.index]


def check_values(batches: list[Batch], arrays: dict[str, NDArray[Any]], drawn: Drawn) -> None:
    named = drawn.keywords["inputs"]
    for batch in batches:
        inputs = {named: batch.inputs} if isinstance(named, str) else batch.inputs
        assert list(inputs) == ([named] if isinstance(named, str) else named)
        parts = {**inputs, **({"t": batch.targets} if "targets" in drawn.keywords else {})}
        for name, values in parts.items():
            expected = arrays[name][batch.index]
            if "dtype" in drawn.keywords and (name != "t" or expected.dtype.kind == "f"):
                expected = expected.astype(np.float32)
            assert values.dtype == expected.dtype.newbyteorder("=")
            assert values.flags.writeable
            np.testing.assert_array_equal(values, expected)


def check_counting(batches: list[Batch], source: ZarrStream, drawn: Drawn) -> None:
    size, count = drawn.keywords["batch_size"], source.num_samples
    assert [len(batch) for batch in batches] == [size] * (count // size) + ([count % size] if count % size else [])
    assert len(source) == len(batches)
    assert [batch.cursor.position for batch in batches] == [min((i + 1) * size, count) for i in range(len(batches))]
    order = numbers(batches)
    assert len(set(order)) == len(order) == count
    if drawn.keywords["split_by"] == "range":
        lower, upper = drawn.keywords["split"] or (0, count)
        assert sorted(order) == list(range(lower, upper))
        if not drawn.keywords["shuffle"]:
            assert order == sorted(order)


def unchanged(batch: Batch) -> tuple[Any, Any]:
    """A transform that hands on what it was given."""
    return batch.inputs, batch.targets


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
quick = settings(max_examples=50, suppress_health_check=SLOW)
quicker = settings(max_examples=25, suppress_health_check=SLOW)


@quick
@given(streams())
def test_batches_are_the_source_by_their_index_each_sample_once(drawn: Drawn) -> None:
    async def scenario(store: Any, arrays: dict[str, NDArray[Any]]) -> None:
        async with stream(store, drawn) as source:
            for epoch in range(2):
                batches = await collect(source)
                assert {batch.epoch for batch in batches} == {epoch}
                check_counting(batches, source, drawn)
                check_values(batches, arrays, drawn)

    with store_of(drawn) as store:
        asyncio.run(scenario(store, read(store, drawn)))


@quick
@given(streams(), st.data())
def test_the_order_knows_nothing_of_memory_threads_prefetch_and_lane(drawn: Drawn, data: st.DataObject) -> None:
    """With as little memory as `plan` says is enough, and with more."""
    changes: dict[str, Any] = {
        "threads": data.draw(st.integers(1, 4), label="threads"),
        "prefetch": data.draw(st.none() | st.integers(1, 5), label="prefetch"),
        "io": data.draw(st.sampled_from(["auto", "mmap", "pread", "store"]), label="io"),
        "cache": data.draw(st.sampled_from(["auto", 0, 100, "1MiB"]), label="cache"),
        "transform": data.draw(st.sampled_from([None, None, unchanged]), label="transform"),
    }
    little = data.draw(st.booleans(), label="little")

    async def scenario(store: Any, arrays: dict[str, NDArray[Any]]) -> None:
        async with stream(store, drawn) as source:
            expected = await collect(source)
        if little:
            async with stream(store, drawn, **changes) as source:
                changes["memory"] = source.plan().memory_least
            with pytest.raises(ConfigError, match="the least that works") as caught:
                await stream(store, drawn, **{**changes, "memory": changes["memory"] - 1}).open()
            said = str(caught.value).partition("the least that works is ")[2]
            async with stream(store, drawn, **{**changes, "memory": said}):
                pass
        async with stream(store, drawn, **changes) as source:
            found = await collect(source)
            assert source.statistics().budget.peak <= source.budget.total
        assert source.budget.statistics().used == 0
        check_values(found, arrays, drawn)
        assert [batch.index.tolist() for batch in found] == [batch.index.tolist() for batch in expected]

    with store_of(drawn) as store:
        asyncio.run(scenario(store, read(store, drawn)))


@quick
@given(streams(), st.data())
def test_from_any_batch_a_pass_goes_on_exactly_with_any_batch_size(drawn: Drawn, data: st.DataObject) -> None:
    other = data.draw(st.integers(1, 50), label="other batch size")
    epoch = data.draw(st.integers(0, 2), label="epoch")

    async def scenario(store: Any, arrays: dict[str, NDArray[Any]]) -> None:
        async with stream(store, drawn) as source:
            source.set_epoch(epoch)
            whole = await collect(source)
            source.set_epoch(epoch)
            stop = data.draw(st.integers(1, len(whole)), label="batches before")
            before = await collect(source, stop)
            state = source.state_dict()
        assert [b.index.tolist() for b in before] == [b.index.tolist() for b in whole[:stop]]
        for size in (drawn.keywords["batch_size"], other):
            async with stream(store, drawn, batch_size=size) as source:
                source.load_state_dict(state)
                assert source.state_dict() == state
                after = await collect(source)
                if stop < len(whole):
                    assert numbers(after) == numbers(whole[stop:])
                    assert {batch.epoch for batch in after} == {epoch}
                    assert after[-1].cursor == whole[-1].cursor
                check_values(after, arrays, drawn)
                assert source.epoch == epoch + 1 + (stop == len(whole) and bool(after))

    with store_of(drawn) as store:
        asyncio.run(scenario(store, read(store, drawn)))


@quicker
@given(streams(), st.integers(1, 20))
def test_dropping_the_last_drops_nothing_else(drawn: Drawn, size: int) -> None:
    async def scenario(store: Any, arrays: dict[str, NDArray[Any]]) -> None:
        async with stream(store, drawn, batch_size=size) as source:
            whole = await collect(source)
        if len(whole[0]) < size:
            return
        async with stream(store, drawn, batch_size=size, drop_last=True) as source:
            found = await collect(source)
            assert len(source) == len(found)
        assert [b.index.tolist() for b in found] == [b.index.tolist() for b in whole if len(b) == size]
        check_values(found, arrays, drawn)

    with store_of(drawn) as store:
        asyncio.run(scenario(store, read(store, drawn)))


@quicker
@given(streams(), st.data())
def test_complementary_splits_show_each_sample_once(drawn: Drawn, data: st.DataObject) -> None:
    n = int(np.prod([drawn.sources[0].shape[axis] for axis in drawn.sample_axes]))
    cut = data.draw(st.integers(0, n), label="cut")

    async def scenario(store: Any) -> None:
        seen: list[int] = []
        for split in [(0, cut), (cut, n)]:
            if split[0] < split[1]:
                async with stream(store, drawn, split=split) as source:
                    seen += numbers(await collect(source))
        assert sorted(seen) == list(range(n))

    with store_of(drawn) as store:
        asyncio.run(scenario(store))
