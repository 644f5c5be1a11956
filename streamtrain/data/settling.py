"""From arguments and metadata to all that a pass needs: arrays opened, samples framed, sizes cut, feeds made.

Its law: no data are read but offsets, labels and coordinates; whatever does not fit together is refused here.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from streamtrain.data.asked import Asked
from streamtrain.data.batch import Batch
from streamtrain.data.block import Column
from streamtrain.data.budget import Share, available_memory, format_bytes
from streamtrain.data.cache import ChunkCache
from streamtrain.data.choosing import read_values
from streamtrain.data.columns import Labels, open_labels, read_coordinates
from streamtrain.data.contents import joined
from streamtrain.data.disk_cache import DiskCache
from streamtrain.data.feed import Feed
from streamtrain.data.finished import FinishedBatches
from streamtrain.data.finished_rows import FinishedRows
from streamtrain.data.framing import Field, row_axes_of
from streamtrain.data.glance import SECONDS, Held, known_by
from streamtrain.data.kept_chunks import kept_reader
from streamtrain.data.layout import decoded_whole
from streamtrain.data.opening import Located, OpenArray, open_arrays
from streamtrain.data.passes import BLOCKS_AHEAD
from streamtrain.data.ragged_site import RaggedArray
from streamtrain.data.reading import ChunkReader
from streamtrain.data.routes import routes_of
from streamtrain.data.scanning import LENGTHS, as_long_as_the_longest, feed_for, ragged_arrays, settled
from streamtrain.data.selected import named, resolved, told
from streamtrain.data.selecting import Coordinate
from streamtrain.data.skipping import SkippingReader
from streamtrain.data.stores import find_stores
from streamtrain.data.survey import Survey, take_survey
from streamtrain.data.values import Change
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import ConfigError, EnvironmentProblem

T = TypeVar("T")
logger = logging.getLogger(__name__)

Finished = FinishedBatches | FinishedRows

OPEN_TOGETHER = 16
"""Stores whose metadata are read at the same time."""


@dataclass(frozen=True)
class Opened:
    """A stream whose metadata is known."""

    stores: Sequence[dict[str, OpenArray]]
    survey: Survey
    feeds: list[list[Feed]]
    cache: ChunkCache | None
    finish: Callable[[Batch], Batch]
    """A transformed batch as it is handed over."""
    wrap: Callable[[Any], Any]
    """An array of a batch as it is handed over, or as the transform gets it."""
    changes: list[Change]
    """What is done to the rows of each part of a batch."""
    finished: Finished | None
    """Batches kept after the transform; None where they are not."""
    select: Mapping[str, Any]
    """What the position says of the places that are taken."""
    contents: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    """What the position says of what the arrays hold, as `contents.told` takes it."""


class Opening:
    """Opens what a stream was asked for."""

    def __init__(self, asked: Asked, share: Share, disk: DiskCache | None, loop: ZarrLoop) -> None:
        """`loop`: where zarr's own API runs, as long as the stream lives."""
        self._asked, self._share, self._disk, self._loop = asked, share, disk, loop
        self._alone = object()
        self.where: list[Located] = []
        """The stores that were found."""

    async def read(self) -> Opened:
        """All that is known before data is read; runs on a private loop, where it may block."""
        used = self._asked.used
        said = [
            *self._asked.choice.names,
            *(self._asked.ragged.offsets[name] for name in used if name in self._asked.ragged.offsets),
        ]
        names = None if self._asked.inputs is None else list(dict.fromkeys([*used, *said]))
        if unknown := [name for name in self._asked.ragged.offsets if name not in used]:
            raise ConfigError(f"ragged= names {unknown[0]!r}, which is neither an input nor a target")
        wanted = [name for name in self._asked.choice.names if name not in used]
        if names is None and self._asked.choice.names:
            raise ConfigError(
                f"the array {self._asked.choice.names[0]!r} beside inputs that have no name",
                hint="name them: inputs='...'",
            )
        many = asyncio.Semaphore(OPEN_TOGETHER)

        async def one(where: Located) -> tuple[dict[str, OpenArray], dict[str, Labels], dict[str, Coordinate]]:
            async with many:
                columns = await open_labels(where, wanted, timeout=self._asked.read_timeout)
                arrays = await open_arrays(
                    where,
                    None if names is None else [name for name in names if name not in columns],
                    io=self._asked.io,
                    loop=self._loop,
                    timeout=self._asked.read_timeout,
                    retries=self._asked.retries,
                )
                known = await read_coordinates(
                    where,
                    arrays,
                    named(self._asked.framing),
                    loop=self._loop,
                    timeout=self._asked.read_timeout,
                    retries=self._asked.retries,
                    verify=self._asked.verify,
                )
                return arrays, columns, known

        self.where = find_stores(self._asked.named)
        if self._disk is not None:
            self._disk.open()  # now, so that what is wrong with it is said before anything is read
        read = await asyncio.gather(*map(one, self.where))
        stores = [arrays for arrays, _, _ in read]
        contents = await self._contents(stores)
        if self._disk is not None:
            stores = [self._kept(arrays, where) for arrays, where in zip(stores, self.where, strict=True)]
        ragged = as_long_as_the_longest(
            [ragged_arrays(arrays, self._asked.ragged, self._share.total) for arrays in stores]
        )
        for arrays in stores:  # lengths come with the values
            arrays |= {name: arrays[name.removesuffix(LENGTHS)] for name in self._asked.ragged.lengths_of(used)}
        settled = self._settle(stores, ragged, [columns for _, columns, _ in read], [each for _, _, each in read])
        return replace(settled, contents=contents)

    async def _contents(self, stores: Sequence[Mapping[str, OpenArray]]) -> dict[str, list[str | None]]:
        """Hold all arrays against their manifests from now on; what the position says of those of a batch."""
        told: list[Held] = []
        for where, arrays in zip(self.where, stores, strict=True):
            manifests = {
                name: joined([each.reader.vouch(self._asked.verify) for each in (array, *array.beside)])
                for name, array in arrays.items()
            }
            names = list(dict.fromkeys(name.removesuffix(LENGTHS) for name in self._asked.fields(arrays)))
            told.append(Held(where, [arrays[name] for name in names], [manifests[name] for name in names]))
        names = list(dict.fromkeys(name.removesuffix(LENGTHS) for name in self._asked.fields(stores[0])))
        seconds = min(SECONDS, self._asked.read_timeout / 4)
        return dict(zip(names, await known_by(told, seconds), strict=True))

    def _kept(self, arrays: Mapping[str, OpenArray], where: Located) -> dict[str, OpenArray]:
        """The arrays with the disk cache before them."""
        assert self._disk is not None
        with_cache = partial(
            kept_reader, cache=self._disk, root=where.root, address=where.address, verify=self._asked.verify
        )

        def kept(array: OpenArray, beside: tuple[OpenArray, ...] = ()) -> OpenArray:
            return replace(array, reader=with_cache(array.reader, array.layout), beside=beside)

        return {name: kept(array, tuple(map(kept, array.beside))) for name, array in arrays.items()}

    def _settle(
        self,
        stores: Sequence[dict[str, OpenArray]],
        ragged: Sequence[Mapping[str, RaggedArray]],
        labels: Sequence[Mapping[str, Labels]],
        coordinates: Sequence[Mapping[str, Coordinate]],
    ) -> Opened:
        """Everything that follows from metadata and arguments."""
        for name, why in {(name, a.fallback) for arrays in stores for name, a in arrays.items() if a.fallback}:
            logger.info("array %s is read by zarr's own API, which is slower: %s", name, why)
        fields = self._asked.fields(stores[0])
        parts = [self._parts(fields, arrays, mine) for arrays, mine in zip(stores, ragged, strict=True)]
        changes = self._changes(fields, parts)
        framings = resolved(self._asked.framing, parts, coordinates)
        survey = take_survey(
            [
                [replace(part, dtype=change.dtype) for part, change in zip(mine, made, strict=True)]
                for mine, made in zip(parts, changes, strict=True)
            ],
            framings=framings,
            stack=self._asked.stack,
            choice=self._asked.choice,
            values=lambda frames: {
                name: read_values([c.get(name) or a[name] for a, c in zip(stores, labels, strict=True)], frames, name)
                for name in self._asked.choice.names
            },
            batch_size=self._asked.batch_size,
            ranks=self._asked.ranks,
            drop_last=self._asked.drop_last,
            shuffle=self._asked.shuffle,
            shuffle_blocks=self._asked.shuffle_blocks,
            split=self._asked.split,
            split_by=self._asked.split_by,
            split_seed=self._asked.split_seed,
            memory=self._share.total,
            cache=self._asked.cache_bytes,
            prefetch=self._asked.prefetch,
            store=self._asked.name,
            names=[where.name for where in self.where],
            change_bytes=max((c.scratch_bytes for made in changes for c in made if not c.plain), default=0),
        )
        if survey.cut:
            logger.info(
                "split_by='chunk': %d windows cross a border of this part and are left out; larger chunks, or "
                "split_by='range', cut fewer",
                survey.cut,
            )
        if self._share.budget.total > available_memory():
            logger.warning(
                "memory=%s is more than this machine or container has (%s)",
                format_bytes(self._share.budget.total),
                format_bytes(available_memory()),
            )
        cache = ChunkCache(survey.cache_bytes, self._share) if survey.cache_bytes else None
        readers: dict[int, ChunkReader] = {}

        def tolerant(array: OpenArray) -> ChunkReader:  # one for each array, whatever columns are made of it
            return readers.setdefault(id(array.reader), self._tolerant(array.reader))

        feeds = [
            [
                feed_for(
                    arrays[part.name],
                    site,
                    cache,
                    number,
                    self._kept_as(self.where[number]),
                    None if change.plain else change.on(site.taken, site.row_axes, site.inner_shape),
                    tolerant,
                )
                for part, site, change in zip(parts[number], frame.sites, changes[number], strict=True)
            ]
            for number, (arrays, frame) in enumerate(zip(stores, survey.frames, strict=True))
        ]
        read = [[feed.site for feed, _ in routes_of(each, survey.places)] for each in feeds]
        survey = replace(survey, read=read)
        finished = self._finished(stores, survey)
        threads = survey.sizes.threads_within(self._share.total, self._asked.threads, survey.cache_bytes)
        self._share.least = survey.sizes.needed(self._share.total, threads)
        return Opened(
            stores, survey, feeds, cache, *self._given_as(survey.columns), changes[0], finished, told(framings)
        )

    def _finished(self, stores: Sequence[Mapping[str, OpenArray]], survey: Survey) -> Finished | None:
        """The cache of finished batches: where epochs are the same and cost more than a copy, or as it was told."""
        wanted = self._asked.cache_transform
        if wanted is None:
            costs = self._asked.transform is not None or any(
                decoded_whole(array.layout) for arrays in stores for array in arrays.values()
            )
            wanted = costs and self._asked.shuffle == "none" and self._asked.crew.kind == "thread"
        if self._asked.framing.random or (survey.drawn is not None and survey.drawn.weights is not None):
            if self._asked.cache_transform:
                logger.info("finished batches are not kept: each epoch has others (crops, jitter or weights)")
            wanted = False
        if wanted and not self._asked.ranks.alone:
            wanted = False
            logger.info("finished batches are not kept where there are several ranks")
        sizes = survey.sizes
        room = self._share.total - BLOCKS_AHEAD * sizes.buffer_bytes - self._asked.threads * sizes.scratch_bytes
        room -= survey.cache_bytes + sizes.kept_bytes + (self._asked.threads + 3) * sizes.room_bytes
        capacity = room // 2 if self._asked.cache_bytes is None else min(room, self._asked.cache_bytes)
        if not wanted or capacity <= 0:
            return None
        finished: Finished
        if self._asked.shuffle != "none" and self._asked.on_bad_chunk == "raise":  # skipped rows count each time
            split = survey.split
            finished = FinishedRows(capacity, self._share, samples=split.num_samples, numbers=split.grid.num_samples)
        else:
            finished = FinishedBatches(capacity, self._share)
        self._share.lend_kept = _weakly(finished.clear)
        return finished

    def _parts(
        self, fields: Sequence[str], arrays: Mapping[str, OpenArray], ragged: Mapping[str, RaggedArray]
    ) -> list[Field]:
        """The parts of a batch as they lie in one store."""
        targets = len(fields) - self._asked.num_targets
        return [
            Field(name, arrays[name].layout, _own_dtype(arrays[name]), target=i >= targets, ragged=ragged.get(name))
            for i, name in enumerate(self._asked.fields(arrays))
        ]

    def _kept_as(self, where: Located) -> Hashable:
        """What a store is called among those whose chunks are kept in memory; what was skipped is nobody else's, nor
        what may have changed since another stream has read it."""
        alone = self._asked.on_bad_chunk == "skip" or not where.tells_versions
        return where.identity, self._asked.verify, self._alone if alone else None

    def _tolerant(self, reader: ChunkReader) -> ChunkReader:
        return SkippingReader(reader) if self._asked.on_bad_chunk == "skip" else reader

    def _changes(self, fields: Sequence[str], stores: Sequence[Sequence[Field]]) -> list[list[Change]]:
        """What is done to the rows of each part of a batch, store by store; figures are those of the first."""
        self._asked.wishes.check(fields)
        made: list[list[Change]] = []
        for parts in stores:
            axes = row_axes_of(parts, self._asked.framing)
            mine = [
                settled(part, self._asked.wishes.change(part.name, part.layout, axes[number], is_input=not part.target))
                for number, part in enumerate(parts)
            ]
            first = made[0] if made else mine
            made.append([replace(own, normal=his.normal) for own, his in zip(mine, first, strict=True)])
        packings = {name: change.packing for name, change in zip(fields, made[0], strict=True) if change.packing}
        for name, packing in packings.items():
            logger.info("array %s is decoded as CF says: %s; decode_cf=False leaves it alone", name, packing)
        return made

    def _given_as(self, columns: Sequence[Column]) -> tuple[Callable[[Batch], Batch], Callable[[Any], Any]]:
        """What turns a transformed batch into what is handed over, and an array into that or what the transform gets;
        checks dtypes."""
        if self._asked.output == "numpy":
            return _same, _same
        sparse, plain = self._asked.ragged.kept_sparse, self._asked.transform is None
        try:
            from streamtrain.tensors import any_tensor, tensor_batch, to_tensor
        except ImportError as error:
            raise EnvironmentProblem(f"no tensors: {error}", hint='install torch, or give output="numpy"') from error

        for column in columns:
            to_tensor(np.empty(0, dtype=column.dtype))
        return tensor_batch, (any_tensor if sparse else to_tensor) if plain else _same


def _same(given: T) -> T:
    return given


def _own_dtype(array: OpenArray) -> np.dtype[Any]:
    """The dtype of the array's samples, unless another is asked for."""
    codes = array.encoding is not None and array.encoding.kind == "categorical"
    return np.dtype(np.int64) if codes else array.layout.native


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Calls a method of something as long as it lives."""
    weak = weakref.WeakMethod(method)

    def call() -> None:
        living = weak()
        if living is not None:
            living()

    return call
