"""`ZarrStream`: batches of a Zarr store, in shuffled order, within a budget in bytes, from any position.

Its law: the order is arithmetic on (seed, epoch, position), so a position is all there is to save; memory, threads,
prefetch and batch size change nothing in it.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from streamtrain.data import contents
from streamtrain.data.asked import Asked
from streamtrain.data.batch import START, Batch, Cursor, cursor_of
from streamtrain.data.block import Pool
from streamtrain.data.budget import Budget, parse_bytes
from streamtrain.data.canvas import Ground, Part
from streamtrain.data.chosen import Chosen
from streamtrain.data.crops import CropAt
from streamtrain.data.disk_cache import disk_cache_of
from streamtrain.data.finished import Kept, KeptPass, Watched, WatchedAsync
from streamtrain.data.finished_rows import FinishedRows
from streamtrain.data.framing import Axis
from streamtrain.data.loader import Loader
from streamtrain.data.locating import Location, Locator, coordinates_at, sample_numbers
from streamtrain.data.opening import IO, OpenArray
from streamtrain.data.options import (
    array_names,
    at_least,
    cast_dtypes,
    choice,
    choice_of,
    decode_mode,
    framing_of,
    ragged_of,
    ranks_of,
    seconds_above_zero,
    share_of_one,
    shuffle_mode,
    split_pair,
    thread_count,
    transform_crew,
)
from streamtrain.data.order import EpochOrder
from streamtrain.data.passes import Recipe, ZarrPass
from streamtrain.data.permutation import derive_key
from streamtrain.data.remote import fetch_statistics
from streamtrain.data.settling import Finished, Opened, Opening
from streamtrain.data.skipping import MAX_SKIPPED, OnBadChunk
from streamtrain.data.source import Ending, Pass
from streamtrain.data.splits import Split, SplitBy
from streamtrain.data.stores import Stores, name_of, name_stores
from streamtrain.data.stream_statistics import StreamStatistics, lane_of
from streamtrain.data.survey import Plan
from streamtrain.data.transform import Transform, check_transform, is_async
from streamtrain.data.transform_processes import pickled
from streamtrain.data.trust import Verify
from streamtrain.data.values import Normalization, Normalize, Wishes, check_normalize
from streamtrain.data.workers import default_threads
from streamtrain.data.zarr_lane import ZarrLoop
from streamtrain.errors import CheckpointError, ConfigError, DataError

logger = logging.getLogger(__name__)

FIGURES_SHOWN = 150
"""Characters of figures that a position shows; longer ones as a digest."""
FRAMED = frozenset({"sample_axes", "window", "stride", "horizon", "target_window", "select", "crop", "jitter"})
"""Keys of a fingerprint that tell what a sample is."""
POISON = "STREAMTRAIN_POISON"
"""Set this environment variable to have returned buffers filled with a pattern, to find batches used too long."""


class ZarrStream:
    """A stream of batches from one Zarr store; `async for batch in stream` is one epoch.

    `store`: a path, a URL (`s3://`, `gs://`, `az://`, `https://`, by the extra `cloud`), a `zarr.Group`, `zarr.Array`
    or `zarr.abc.store.Store`; or a list or glob of them: one dataset, its samples numbered store by store and shuffled
    across all. `storage_options`: settings of a URL's store, strings named as obstore names them (endpoint, region,
    skip_signature, ...), over those of the environment.
    `inputs`, `targets`: an array's name, or a list of names (then batches hold dicts by name, even of one). `inputs`
    is left out where the store is one array.
    `batch_size`: samples of a batch, of all ranks together.
    `rank`, `world_size`: of each batch this rank has the positions p with p mod world_size = rank, so that all ranks
    together have each sample once, and each step the same samples in any number of ranks. A rank's part of the last
    batch may be empty. `lanes` (part of the order; world_size at the run's start unless told otherwise) divide a
    block's chunks among the ranks: where world_size divides the lanes, a rank reads little but its own.
    `shuffle`: False; "block" (True): the rows of `shuffle_blocks` cells, drawn at random, are permuted together, each
    chunk is read once; "global": a full shuffle, which reads compressed chunks many times.
    `split`: two floats are fractions of the samples (bound = floor(f * n)), two ints are sample numbers; taken of the
    samples in a row (`split_by="range"`), of the cells ("chunk") or of the samples ("sample") in an order keyed by
    `split_seed`.
    `groups`: an array's name; a split takes samples with the same value there together. `indices`: sample numbers, or
    the name of a boolean array; a split is of those. `weights`: a number for each sample, or an array's name: samples
    come in proportion, as many in an epoch as there are; `balance`: an array of labels that come equally often. Each
    epoch has each sample as often as its share says, rounded up or down by one keyed offset for all (systematic
    resampling, no independent draws): over epochs shares are exact, and within one about so.
    `sample_axes`: axes that number the samples, in this order; (0, 1) makes each element of the first two axes a
    sample. Axes that a window adds come in their order, behind those here where these do not ascend.
    `window`: places that a sample covers along some axes, `{axis name or number: length}` (a length alone is along the
    first sample axis); over several axes these are patches. `stride`: places from one sample to the next; along an
    axis of which it says nothing 1, for patches the patch itself. `horizon`: places from a window's last one to the
    first of its target, which has `target_window` of them (None: one, without an axis); without a horizon targets cover
    the window itself. Of windows that overlap, `split` divides the places of the first sample axis, and each part has
    those that lie in it whole. With a window or without: an array that has no such axis, by the names of the
    dimensions, is the same for all samples (beside (time, lat, lon) one of (lat, lon) comes whole with each), and
    so is one without any axis, named behind others.
    `jitter`: windows begin up to so many places later, a number or by axis, as far as there are places.
    `crop`: so many places in a row are taken of some axes of each sample, `{axis number or name: length}`: arrays that
    have the axis are cropped alike, and only chunks that crops touch are read. They begin at places keyed by seed,
    epoch and sample number (`crop_at="random"`) or lie in the middle ("center").
    `select`: what is taken of some axes. By an axis' number, positions: `{1: [0, 3]}`, `{1: slice(0, 4)}`. By its name,
    values of the 1-D array of that name, numbers exactly and ranges with both ends: `{"time": slice("2000", "2010"),
    "lat": slice(30.0, 60.0), "level": [500.0, 850.0]}`; whole numbers in a list may be positions too, and where both
    can be meant, that is an error. Of axes that number samples, those places are left; no window crosses what is not.
    `ragged`: `{values: offsets}`, names of arrays: sample i is the values offsets[i] to offsets[i + 1], and a batch has
    (B, max_length, ...) of them, cut there and padded by `pad_value` (0), beside the lengths (int64, of shape (B,)) as
    `VALUES.lengths` among the inputs, which are a dict then. `max_length` is that of the longest unless told otherwise.
    A group that AnnData writes is an array as well: sparse rows (csr_matrix) come dense, or with `sparse` as tensors of
    torch's layout `sparse_csr` (numpy: as `(data, indices, indptr, shape)`); a categorical as its codes (int64; see
    `categories`). A row without a category, or whose value is masked, is refused by its number.
    `stack`: the inputs become one array, with them as its channels: (B, len(inputs), ...), put together in one gather.
    `decode_cf`: "auto" applies the arrays' `scale_factor`, `add_offset`, `_FillValue` and `missing_value` as xarray
    does (missing ones are NaN), and says so once; False leaves them alone.
    `normalize`: "stats" makes of each input `(x - mean) / std` by the statistics among its attributes (`data_tools
    stats` writes them); or a dict by name, of targets too, of (mean, std) or (mean, std, axis): numbers, or one for
    each entry of an axis (its number or name). The result is float32 unless `dtype` says otherwise. The figures are
    part of the position.
    `dtype`: cast inputs while gathering, and targets of the same kind (integers stay what they are); or a dict by
    name. Numbers are decoded, normalised, cast, then given to the transform.
    `transform`: `transform(batch) -> batch | (inputs, targets)` on numpy arrays: a plain function runs in our threads
    (those that read, or `transform_workers=4` of its own), an `async def` on the loop of the pass, at most
    `transform_workers` (16) at a time; "process:4" spawns processes for a pass, which takes a second or so and pays for
    transforms that hold the interpreter. Batches keep their order.
    `cache_transform`: finished batches of an unshuffled stream are kept for the next epoch where they cost more than a
    copy (they are transformed or decompressed) and memory is left; False: never; True: of shuffled streams too, row by
    row where there is room for all samples, by processes, and of transforms that draw from `batch.rng` (what the first
    epoch drew is then repeated). With True a transform must depend on the samples alone, not on the epoch, and of a
    shuffled stream make the same of a sample whatever else is in its batch.
    `memory`: this stream's whole budget, or a shared `Budget`; `cache`: bytes of it for decoded chunks, and as many
    for finished batches (0: neither); "auto" keeps chunks that several cells share, and all where a quarter of the
    memory holds them. Streams that share a `Budget` decode and keep a chunk of one store once for all of them.
    `disk_cache`: a folder for decoded chunks, up to `disk_cache_bytes` ("50GiB"), or a size alone ("20GiB") for one
    where the user's caches lie: compressed and remote data come from memory maps of it from the second epoch on, in
    later runs too, as long as their sources have not changed. One process at a time; its streams may share it.
    `io`: "auto" (memory maps where they are safe), "mmap",
    "pread", "store" (zarr's own API).
    `verify`: hold chunks against the manifest that our writers make "once" for each chunk while the stream lives,
    "always", or "never". `on_bad_chunk`: "raise" a DataError, or "skip" its rows, up to `max_skipped` of an epoch.
    `threads` that read and decode; `prefetch` batches at most ahead; `read_timeout` seconds until a read counts as
    hung, and a request is given up; `retries`: how often one that failed for a passing reason is made again.
    `output`: "torch" tensors or "numpy" arrays.

    The constructor checks its arguments only; metadata is read on first use. Raises ConfigError.
    """

    pulls_inside = False

    def __init__(
        self,
        store: Stores,
        *,
        inputs: str | Sequence[str] | None = None,
        targets: str | Sequence[str] | None = None,
        batch_size: int,
        shuffle: bool | Literal["block", "global"] = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        lanes: int | None = None,
        shuffle_blocks: int | None = None,
        split: tuple[float, float] | tuple[int, int] | Sequence[float] | None = None,
        split_by: SplitBy = "range",
        split_seed: int = 0,
        groups: str | None = None,
        indices: str | Sequence[int] | NDArray[Any] | None = None,
        weights: str | Sequence[float] | NDArray[Any] | None = None,
        balance: str | None = None,
        sample_axes: int | Sequence[int] = (0,),
        window: int | Mapping[Axis, int] | None = None,
        stride: int | Mapping[Axis, int] | None = None,
        horizon: int | None = None,
        target_window: int | None = None,
        select: Mapping[Axis, Any] | None = None,
        ragged: Mapping[str, str] | None = None,
        max_length: int | None = None,
        pad_value: float | None = None,
        crop: Mapping[Axis, int] | None = None,
        crop_at: CropAt = "random",
        jitter: int | Mapping[Axis, int] | None = None,
        sparse: bool = False,
        stack: bool = False,
        dtype: DTypeLike | Mapping[str, DTypeLike] | None = None,
        decode_cf: bool | Literal["auto"] = "auto",
        normalize: Normalize | None = None,
        transform: Transform | None = None,
        transform_workers: int | str | None = None,
        cache_transform: bool | None = None,
        memory: str | int | Budget = "1GiB",
        cache: str | int = "auto",
        disk_cache: str | int | os.PathLike[str] | None = None,
        disk_cache_bytes: str | int | None = None,
        io: IO = "auto",
        threads: int | None = None,
        prefetch: int | None = None,
        read_timeout: float = 60.0,
        retries: int = 3,
        storage_options: Mapping[str, str] | None = None,
        verify: Verify = "once",
        on_bad_chunk: OnBadChunk = "raise",
        max_skipped: float = MAX_SKIPPED,
        output: Literal["torch", "numpy"] = "torch",
        **unknown: object,
    ) -> None:
        for key in unknown:
            near = difflib.get_close_matches(key, [*self.__init__.__kwdefaults__, "batch_size"], 1)  # type: ignore[misc]
            raise ConfigError(f"ZarrStream takes no {key}=", hint=f"did you mean {near[0]}=?" if near else "")
        tries = at_least(retries, 0, "retries")
        places = name_stores(store, storage_options, retries=tries)
        chosen_inputs, chosen_targets = array_names(inputs, "inputs"), array_names(targets, "targets")
        if chosen_targets is not None and chosen_inputs is None:
            raise ConfigError("targets= without inputs=", hint="name the inputs too")
        crew = transform_crew(transform_workers)
        if sparse and crew.kind == "process":
            raise ConfigError("sparse=True: processes get no sparse rows", hint="transform_workers=N threads")
        if sparse and cache_transform:
            raise ConfigError("sparse=True: batches of sparse rows are not kept", hint="leave cache_transform= out")
        check_transform(transform, crew)
        self._asked = Asked(
            named=places,
            name=name_of(places),
            inputs=chosen_inputs,
            targets=chosen_targets,
            batch_size=at_least(batch_size, 1, "batch_size"),
            shuffle=choice(shuffle_mode(shuffle), ("none", "block", "global"), "shuffle"),
            seed=at_least(seed, 0, "seed"),
            drop_last=drop_last,
            ranks=ranks_of(rank, world_size),
            shuffle_blocks=None if shuffle_blocks is None else at_least(shuffle_blocks, 1, "shuffle_blocks"),
            split=split_pair(split),
            split_by=choice(split_by, ("range", "chunk", "sample"), "split_by"),
            split_seed=at_least(split_seed, 0, "split_seed"),
            choice=choice_of(indices, groups, weights, balance),
            framing=framing_of(sample_axes, window, stride, horizon, target_window, select, crop, crop_at, jitter),
            ragged=ragged_of(ragged, max_length, pad_value, sparse),
            stack=stack,
            wishes=Wishes(decode_mode(decode_cf), check_normalize(normalize), cast_dtypes(dtype)),
            transform=transform,
            crew=crew,
            payload=pickled(transform) if transform is not None and crew.kind == "process" else None,
            cache_transform=None if cache_transform is None else bool(cache_transform),
            cache_bytes=None if cache == "auto" else parse_bytes(cache, "cache"),
            io=choice(io, ("auto", "mmap", "pread", "store"), "io"),
            threads=default_threads() if threads is None else thread_count(threads, "threads"),
            prefetch=None if prefetch is None else at_least(prefetch, 1, "prefetch"),
            read_timeout=seconds_above_zero(read_timeout, "read_timeout"),
            retries=tries,
            verify=choice(verify, ("once", "always", "never"), "verify"),
            on_bad_chunk=choice(on_bad_chunk, ("raise", "skip"), "on_bad_chunk"),
            max_skipped=share_of_one(max_skipped, "max_skipped"),
            output=choice(output, ("torch", "numpy"), "output"),
        )
        self._lanes = world_size if lanes is None else at_least(lanes, 1, "lanes")
        self._lanes_given = lanes is not None
        self.budget = memory if isinstance(memory, Budget) else Budget(memory)
        self._share = self.budget.join()
        self._disk = disk_cache_of(disk_cache, disk_cache_bytes)
        self._zarr_loop = ZarrLoop()
        self._opening = Opening(self._asked, self._share, self._disk, self._zarr_loop)
        self._opened: Opened | None = None
        self._locator: Locator | None = None
        self._pool: Pool | None = None
        self._rooms: Pool | None = None
        self._pass: ZarrPass | KeptPass | None = None
        self._first: _FirstPass | None = None
        self._epoch = 0
        self._skip = 0
        self._cursor = START
        self._skipped = 0
        """Samples of its epoch before it that bad chunks have cost, over all ranks as far as one of them can tell."""
        self._driven = False

    # ---- what it holds

    async def open(self) -> None:
        """Read metadata, off the loop; a second call does nothing.

        Raises DataError for a store that can't be used, ConfigError for arguments that do not fit it (or too little
        memory), EnvironmentProblem if reading hangs.
        """
        if self._opened is not None:
            return
        loop = ZarrLoop()
        try:
            task = asyncio.wrap_future(loop.submit(self._opening.read()))
            async with asyncio.timeout(self._asked.read_timeout):  # wait_for loses cancellations on Python 3.11
                self._opened = await task
        except TimeoutError:
            raise self._asked.hung() from None
        finally:
            await loop.aclose()

    def open_blocking(self) -> None:
        """The same for callers without a loop; blocks for up to `read_timeout`."""
        if self._opened is not None:
            return
        loop = ZarrLoop()
        try:
            self._opened = loop.run(self._opening.read(), self._asked.read_timeout)
        except TimeoutError:
            raise self._asked.hung() from None
        finally:
            loop.close()

    @property
    def normalization(self) -> dict[str, Normalization]:
        """The figures by which arrays are normalised, by name; empty without normalize=. Before the first use this
        reads metadata, and may block."""
        opened = self._known()
        found = zip(self._asked.fields(opened.stores[0]), opened.changes, strict=True)
        return {name: change.normal for name, change in found if change.normal is not None}

    def categories(self, name: str) -> tuple[str, ...]:
        """What the codes of a categorical stand for, by their number; `name` is that of an input, a target, or an array
        that chooses samples. Before the first use this reads metadata, and may block.

        Raises ConfigError for an array that the stream does not read, or that is no categorical.
        """
        found = self._known().stores[0].get(name)
        if found is None or found.categories is None:
            raise ConfigError(f"{name!r} is no categorical that this stream reads", hint="name an input or a target")
        return found.categories

    # ---- a pass

    def __aiter__(self) -> Pass:
        """Start a pass: the current epoch over, or from where `load_state_dict` went. Ends the one that was live.

        Metadata that is not known yet is read, off the loop, when the first batch is asked for.
        """
        if self._first is not None:
            self._first.supersede()
        self._first = None if self._opened is not None else _FirstPass(self)
        return self._first or self.start()

    def start(self) -> ZarrPass | KeptPass:
        """The same for a stream that is open."""
        opened = self._known()
        if self._pass is not None:
            if self._driven and not self._pass.closed:
                raise ConfigError(
                    "a fit is reading this stream: another pass would end its epoch",
                    hint="give the other reader a stream of its own",
                )
            self._pass.supersede()
        self._share.active = True
        if self._pool is None:
            poison, sizes = bool(os.environ.get(POISON)), opened.survey.sizes
            self._pool = Pool(sizes.buffer_bytes, self._share, poison=poison)
            room = sizes.room_bytes
            if sizes.copies(self._share.total) and self._asked.payload is None:  # processes give copies anyway
                room = sizes.batch_bytes
            self._rooms = Pool(room, self._share, poison=poison) if room else None
        start, self._skip = Cursor(self._epoch, self._skip), 0
        skipped = self._skipped if start == self._cursor and start.position else 0
        if not self._driven:
            self._cursor, self._skipped = start, skipped
        order = EpochOrder(
            opened.survey.epoch(self._asked.seed, self._epoch),
            self._asked.shuffle,
            opened.survey.cells_per_block,
            self._asked.seed,
            self._epoch,
            lanes=self._lanes,
        )
        make = partial(ZarrPass, self._recipe(opened, self._pool, skipped), order)
        if opened.finished is None:
            before = self._pass if isinstance(self._pass, ZarrPass) else None
            self._pass = make(start, self._returned, before=before)
        else:
            end, finished = self.num_samples, opened.finished
            kept: Kept
            if isinstance(finished, FinishedRows):
                kept = finished.of(order, self._asked.batch_size, drop_last=self._asked.drop_last)
            else:
                kept = finished
            self._pass = KeptPass(
                kept,
                start,
                end,
                make=make,
                finish=opened.finish,
                returned=self._returned,
                every_epoch=self._asked.shuffle == "none",
                before=self._pass,
            )
        return self._pass

    def _watched(self, finished: Finished | None) -> Transform | None:
        """The transform, watched for what makes each epoch another: then nothing is kept unless it was asked for."""
        if self._asked.transform is None or finished is None:
            return self._asked.transform
        off = partial(
            finished.stop, "the transform draws random numbers or looks at the epoch, so that each epoch is another"
        )
        if self._asked.cache_transform:
            off = partial(logger.warning, KEPT_DRAWS)
        return (WatchedAsync if is_async(self._asked.transform) else Watched)(self._asked.transform, off)

    def _recipe(self, opened: Opened, pool: Pool, skipped: int) -> Recipe:
        names = self._asked.fields(opened.stores[0])
        count = len(names) - self._asked.num_targets
        several = (
            self._asked.inputs is not None
            and (self._asked.inputs[1] or bool(self._asked.ragged.offsets))
            and not self._asked.stack,
            self._asked.targets is not None and self._asked.targets[1],
        )
        first, wrap = 1 if self._asked.stack else count, opened.wrap  # first of the targets' columns

        def assemble(arrays: Sequence[NDArray[Any]]) -> Batch:
            wrapped = list(map(wrap, arrays))
            inputs: Any = dict(zip(names[:count], wrapped, strict=False)) if several[0] else wrapped[0]
            targets: Any = dict(zip(names[count:], wrapped[first:-1], strict=True)) if several[1] else None
            if not several[1] and count < len(names):
                targets = wrapped[first]
            return Batch(inputs, targets, wrapped[-1])

        return Recipe(
            feeds=[[feed.during(self._asked.seed, self._epoch) for feed in feeds] for feeds in opened.feeds],
            columns=opened.survey.columns,
            places=opened.survey.places,
            ranks=self._asked.ranks,
            cache_bytes=opened.survey.cache_bytes,
            sizes=opened.survey.sizes,
            share=self._share,
            batch_size=self._asked.batch_size,
            drop_last=self._asked.drop_last,
            seed=self._asked.seed
            if self._asked.ranks.alone
            else derive_key(self._asked.seed, "rank", self._asked.ranks.rank),
            threads=self._asked.threads,
            prefetch=self._asked.prefetch,
            read_timeout=self._asked.read_timeout,
            transform=self._watched(opened.finished),
            crew=self._asked.crew,
            payload=self._asked.payload,
            assemble=assemble,
            finish=opened.finish,
            at_end=self._zarr_loop.aclose,
            pool=pool,
            rooms=self._rooms,
            max_skipped=self._asked.max_skipped if self._asked.on_bad_chunk == "skip" else None,
            skipped=skipped // self._asked.ranks.world,
        )

    def _returned(self, cursor: Cursor, finished: bool) -> None:
        if finished and cursor.epoch == self._epoch:
            self._epoch += 1
            cursor = Cursor(self._epoch, 0)
        if not self._driven:
            self._go_on_to(cursor)

    def _go_on_to(self, cursor: Cursor) -> None:
        """All before this position is behind; what bad chunks have cost of its epoch goes with it."""
        if cursor.epoch != self._cursor.epoch:
            self._skipped = 0
        self._cursor = cursor
        if (reading := self._reading) is not None and reading.epoch == cursor.epoch and cursor.position:
            lost = reading.skips.behind(cursor.position) * self._asked.ranks.world
            self._skipped = min(lost, cursor.position)

    def as_loader(self, collate: Callable[[Batch], Any] | None = None) -> Loader:
        """A plain iterable over this stream, for Lightning, Accelerate, Hugging Face and bare loops.

        It gives batches (`x, y = batch`), or what `collate` makes of each: `lambda b: {"x": b.inputs, "labels":
        b.targets}`. It has `len`, `set_epoch`, `state_dict` and `load_state_dict`; while it is iterated nobody else
        can read the stream.
        """
        return Loader(self, collate)

    async def __aenter__(self) -> ZarrStream:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the live pass and give all memory back; batches that are still held stay valid."""
        if self._first is not None:
            self._first.stop()
        if self._pass is not None:
            await self._pass.aclose()
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._rooms is not None:
            self._rooms.close()
            self._rooms = None
        if self._opened is not None and self._opened.cache is not None:
            self._opened.cache.close()
        if self._opened is not None and self._opened.finished is not None:
            self._opened.finished.clear()
        self._share.active = False
        if self._disk is not None:
            await asyncio.wrap_future(self._zarr_loop.submit(_called(self._disk.close)))
        await self._zarr_loop.aclose()
        for where in self._opening.where:
            where.close()

    async def pause(self) -> None:
        """Read no further ahead until `resume`; what is ready can still be taken."""
        if self._pass is not None:
            self._pass.paused = True

    def resume(self) -> None:
        """Read ahead again."""
        if self._pass is not None:
            self._pass.paused = False
            self._pass.go_on()

    # ---- position

    @property
    def epoch(self) -> int:
        """The epoch that the next pass, or the live one, gives."""
        return self._epoch

    @property
    def batch_size(self) -> int:
        """Samples of a full batch."""
        return self._asked.batch_size

    @property
    def num_samples(self) -> int:
        """Samples of an epoch. Before the first use this reads metadata, and may block."""
        return self._known().survey.split.num_samples

    @property
    def needs_loop(self) -> bool:
        """Whether something of it gets on only while its loop turns: an async transform."""
        return self._asked.transform is not None and is_async(self._asked.transform)

    @property
    def drop_last(self) -> bool:
        """Whether a short last batch is left out."""
        return self._asked.drop_last

    def __len__(self) -> int:
        """Batches of an epoch. Before the first use this reads metadata, and may block."""
        count = self.num_samples
        return count // self._asked.batch_size if self._asked.drop_last else -(-count // self._asked.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of this epoch; does nothing within it. Raises ConfigError for a negative one."""
        if at_least(epoch, 0, "epoch") != self._epoch:
            self._leave_pass()
            self._epoch, self._skip = epoch, 0
            self._cursor, self._skipped = Cursor(epoch, 0), 0

    def follow(self, driven: bool) -> None:
        """While `driven`, the position that `state_dict` tells is moved by `trained` alone.

        Raises ConfigError where another fit drives it already.
        """
        if driven and self._driven:
            raise ConfigError(
                "another fit is reading this stream, which has one position",
                hint="Give each fit one of its own: a second ZarrStream of the same store (memory= may be one Budget).",
            )
        self._driven = driven

    def trained(self, cursor: Cursor) -> None:
        """All before this position is part of a finished update."""
        self._go_on_to(cursor)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch returned (in a fit: trained), and what of; JSON, at most 1 KiB."""
        at = {"epoch": self._cursor.epoch, "position": self._cursor.position}
        return at | ({"skipped": self._skipped} if self._skipped else {}) | {"of": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position: the next pass continues there.

        Raises DataError where the data have changed since, as far as their shapes, manifests or (without one) the
        beginnings of some of their files tell, CheckpointError where the order is another one (seed, split,
        shuffle, windows, ...); both name the differences. Batch size, memory, threads and prefetch may differ.
        """
        cursor = cursor_of(state, "a ZarrStream", ["of"], ["skipped"])
        skipped = state.get("skipped", 0)
        if type(skipped) is not int or not 0 <= skipped <= cursor.position:
            raise DataError(f"this is no position of a ZarrStream: 'skipped' is {skipped!r:.40}")
        if not isinstance(theirs := state["of"], Mapping):
            raise DataError(f"this is no position of a ZarrStream: 'of' is {theirs!r:.80}")
        if not self._lanes_given and isinstance(theirs.get("lanes"), int):
            self._lanes = at_least(theirs["lanes"], 1, "lanes")  # the order's, whatever the world is now
        mine, theirs = self._fingerprint(), dict(theirs)
        if lines := contents.changed(theirs.pop("contents", None), mine.pop("contents")):
            raise DataError(
                f"the dataset changed since the position was saved: {'; '.join(lines)}",
                hint="bring back the data that it was saved on, or start over",
            )
        different = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if different:
            table = "; ".join(f"{key}: {theirs.get(key)} then, {mine.get(key)} now" for key in different)
            if _other_data(theirs, mine, different):
                raise DataError(
                    f"the dataset changed since the position was saved: {table}",
                    hint="bring back the data that it was saved on, or start over",
                )
            raise CheckpointError(
                f"the saved position belongs to another order: {table}",
                hint="set these back: the same split, shuffle, seed and so on; or start over",
            )
        if cursor.position > self.num_samples:
            raise DataError(f"the saved position {tuple(cursor)} is beyond the {self.num_samples} samples")
        self._leave_pass()
        self._epoch, self._skip, self._cursor, self._skipped = cursor.epoch, cursor.position, cursor, skipped

    def _leave_pass(self) -> None:
        """The position moves: a pass that still lives would move it back."""
        if self._pass is not None:
            self._pass.stop()

    def _fingerprint(self) -> dict[str, Any]:
        opened = self._known()
        split = opened.survey.split
        arrays: Any = [
            {name: _shape_of(a) for name, a in arrays.items()}
            for arrays in ({name: arrays[name] for name in self._asked.fields(arrays)} for arrays in opened.stores)
        ]
        cells = [list(frame.cell) for frame in opened.survey.frames]
        count = len(arrays)
        if count == 1:
            arrays, cells = arrays[0], cells[0]  # type: ignore[assignment]
        if len(str(arrays)) + len(str(cells)) > 500:
            digest = derive_key(str(arrays), str(cells))
            arrays = f"{count} stores of {len(opened.stores[0])} arrays, digest {digest:016x}"
            cells = cells if count == 1 else []
        keyed = self._asked.shuffle != "none" or self._asked.framing.random
        return {
            "arrays": arrays,
            **self._asked.framing.fingerprint(opened.select),
            "cells": cells,
            "shuffle": self._asked.shuffle,
            "seed": self._asked.seed if keyed else None,
            "shuffle_blocks": opened.survey.cells_per_block if self._asked.shuffle == "block" else None,
            "lanes": self._lanes if self._asked.shuffle == "block" else None,
            "split": [split.lower, split.upper] if isinstance(split, Split) else _plain(self._asked.split),
            "chosen": None if opened.survey.drawn is None else opened.survey.drawn.digest,
            "split_by": split.by,
            "split_seed": self._asked.split_seed if split.by != "range" else None,
            "contents": contents.told(opened.contents),
            **self._figures(opened),
        }

    def _figures(self, opened: Opened) -> dict[str, str]:
        """What the fingerprint says of the numbers; nothing where they are as they are stored."""
        names = self._asked.fields(opened.stores[0])
        told: dict[str, str] = {}
        for key, each in (
            ("decode_cf", [change.packing for change in opened.changes]),
            ("normalize", [change.normal for change in opened.changes]),
        ):
            found = str({name: str(figures) for name, figures in zip(names, each, strict=True) if figures is not None})
            if found != "{}":
                told[key] = found if len(found) <= FIGURES_SHOWN else f"digest {derive_key(found):016x}"
        return told

    def _known(self) -> Opened:
        if self._opened is None:
            self.open_blocking()
        assert self._opened is not None
        return self._opened

    # ---- how it does

    @property
    def _reading(self) -> ZarrPass | None:
        """The pass that reads, or the last one that did; None where none does."""
        return self._pass.inner if isinstance(self._pass, KeptPass) else self._pass

    def statistics(self) -> StreamStatistics:
        """How the live pass does, or how the last one did."""
        opened = self._opened
        stores = opened.stores if opened is not None else ()
        reading = self._reading
        scratches = reading.scratches if reading is not None else []

        def seconds(what: str) -> float:
            return sum(scratch.seconds[what] for scratch in scratches)

        return StreamStatistics(
            lanes={
                name: ", ".join(sorted({lane_of(arrays[name]) for arrays in stores if name in arrays}))
                for name in (stores[0] if stores else ())
            },
            chunks=sum(scratch.chunks for scratch in scratches),
            bytes_read=sum(scratch.bytes_read for scratch in scratches),
            read_seconds=seconds("read"),
            decode_seconds=seconds("decode"),
            gather_seconds=seconds("gather"),
            transform_seconds=reading.transform_seconds if reading is not None else 0.0,
            queue=reading.queue.statistics() if reading is not None else None,
            budget=self.budget.statistics(),
            cache=opened.cache.statistics() if opened is not None and opened.cache is not None else None,
            fetch=fetch_statistics(
                each.reader for arrays in stores for array in arrays.values() for each in (array, *array.beside)
            ),
            finished=opened.finished.statistics() if opened is not None and opened.finished is not None else None,
            disk_cache=self._disk.statistics() if self._disk is not None else None,
            threads=self._asked.threads,
            buffers=reading.buffers if reading is not None else 0,
            buffer_bytes=opened.survey.sizes.buffer_bytes if opened is not None else 0,
            chunks_checked=sum(scratch.checked for scratch in scratches),
            chunks_skipped=reading.skips.chunks if reading is not None else 0,
            rows_skipped=reading.skips.rows if reading is not None else 0,
        )

    def plan(self) -> Plan:
        """What a pass costs, without reading data. Before the first use this reads metadata, and may block."""
        return self._known().survey.plan()

    @overload
    def locate(self, index: int, *, epoch: int | None = None) -> Location: ...

    @overload
    def locate(self, index: Sequence[int] | NDArray[Any], *, epoch: int | None = None) -> list[Location]: ...

    def locate(self, index: Any, *, epoch: int | None = None) -> Location | list[Location]:
        """Where a sample lies, or each of some: `index` is a number, or several, as in `batch.index` (of the unsplit
        samples of all stores). `epoch`: crops and jitter of that epoch are told too.

        Metadata before the first use, and coordinates when they are first asked for, are read, which may block for up
        to `read_timeout`: on an event loop, `await asyncio.to_thread(stream.locate, batch.index)`.
        Raises ConfigError for what is no sample's number, DataError for coordinates that can't be read.
        """
        survey = self._known().survey
        numbers = sample_numbers(index, survey.split.grid.num_samples)
        if self._locator is None:
            read = coordinates_at(self._asked.read_timeout, self._asked.retries, self._asked.verify)
            self._locator = Locator(
                self._opening.where, survey.frames, [feeds[0] for feeds in self._known().feeds], read
            )
        try:
            found = self._locator.locate(
                numbers, self._asked.seed, None if epoch is None else at_least(epoch, 0, "epoch")
            )
        except TimeoutError:
            raise self._asked.hung() from None
        return found[0] if np.ndim(index) == 0 else found

    def parts(self) -> tuple[Part, ...]:
        """The arrays of a batch, inputs first, as they lie in the first store. Metadata must be known."""
        feeds = self._known().feeds[0]
        first = len(feeds) - self._asked.num_targets
        return tuple(
            Part(feed.layout, feed.site, getattr(feed.change, "normal", None), number >= first)
            for number, feed in enumerate(feeds)
        )

    def ground(self) -> Ground:
        """What the numbers of its samples stand for: where predictions belong. Metadata must be known.

        Raises ConfigError where samples lie at other places in each epoch, or this is one rank's part.
        """
        opened, asked = self._known(), self._asked
        if asked.framing.random:
            raise ConfigError(
                "predict(out=...) on a stream of random crops or jitter: their places are others in each epoch",
                hint="give crop_at='center' and leave jitter= out",
            )
        if not asked.ranks.alone:
            raise ConfigError(
                f"predict(out=...) on a stream of rank {asked.ranks.rank} alone: it has a part of each batch",
                hint="give a stream without rank= and world_size=",
            )
        survey = opened.survey
        return Ground(
            parts=self.parts(),
            frames=tuple(survey.frames),
            where=tuple(self._opening.where),
            ordered=asked.shuffle == "none" and (isinstance(survey.split, Chosen) or survey.split.by == "range"),
            memory=self.budget.total,
            timeout=asked.read_timeout,
            retries=asked.retries,
        )


KEPT_DRAWS = (
    "the transform draws random numbers or looks at the epoch, and cache_transform=True keeps what it made: each epoch "
    "repeats it, and a run that is resumed makes it anew, so that it does not end with the same weights"
)


class _FirstPass(Ending):
    """A pass over a stream that is not open yet: the first batch that is asked for opens it."""

    def __init__(self, stream: ZarrStream) -> None:
        self._stream: ZarrStream | None = stream
        self._pass: ZarrPass | KeptPass | None = None

    def __aiter__(self) -> _FirstPass:
        return self

    async def __anext__(self) -> Batch:
        if self._pass is None:
            if self._stream is not None:
                await self._stream.open()
            if self._stream is None:  # stopped, perhaps meanwhile
                self._no_more()
            self._pass, self._stream = self._stream.start(), None
        return await self._pass.__anext__()

    def next_nowait(self) -> Batch | None:
        """The next batch if it is ready. Before the first, reading metadata may block."""
        if self._pass is None:
            if self._stream is None:
                self._no_more()
            self._pass, self._stream = self._stream.start(), None
        return self._pass.next_nowait()

    def supersede(self) -> None:
        """Another pass begins: end, and say so to who asks for more."""
        self._end_by_another(self._stream is not None)
        self.stop()

    def stop(self) -> None:
        """End before anything was started."""
        self._stream = None

    async def aclose(self) -> None:
        """End the pass and join its threads."""
        self.stop()
        if self._pass is not None:
            await self._pass.aclose()


def _other_data(theirs: Mapping[str, Any], mine: Mapping[str, Any], different: Sequence[str]) -> bool:
    """Whether it is the data that differ (arrays, or how they are chunked), and not only what is asked of them."""
    if FRAMED & set(different):
        return False  # which makes other cells of the same data
    one, other = theirs.get("arrays"), mine.get("arrays")
    same_names = not isinstance(one, dict) or not isinstance(other, dict) or one.keys() == other.keys()
    return same_names and bool({"arrays", "cells"} & set(different))


def _shape_of(array: OpenArray) -> str:
    """What the fingerprint says of an array."""
    shape = "x".join(map(str, array.layout.shape))
    if array.encoding is not None and array.encoding.kind == "csr":
        shape = f"{'x'.join(map(str, array.encoding.shape))} csr {shape}"
    return f"{shape} {array.layout.native}"


async def _called(function: Callable[[], None]) -> None:
    """For a private loop, where it may block."""
    function()


def _plain(numbers: Sequence[float] | None) -> list[float] | None:
    """As JSON has it, so that what comes back from there is the same."""
    return None if numbers is None else list(numbers)
