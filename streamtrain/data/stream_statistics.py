"""How a stream does, in numbers that say what to change; its law: each field's docstring says how to read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamtrain.data.budget import BudgetStatistics
from streamtrain.data.cache import CacheStatistics
from streamtrain.data.disk_cache import DiskCacheStatistics
from streamtrain.data.fetch import FetchStatistics
from streamtrain.data.finished import FinishedStatistics
from streamtrain.data.opening import OpenArray
from streamtrain.data.queue import QueueStatistics


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """How a stream does; sums are of the live pass, or else of the last one."""

    lanes: Mapping[str, str]
    """Which lane reads each array: `mmap`, `pread`, `obstore` (URLs), `store` (another zarr store's own `get`), or
    `zarr` with the reason why no fast lane can; `disk cache over` one of these with `disk_cache`. Where the machine
    refused maps of the store's files, `mmap` has with it how many were read by `pread` instead, and why; of arrays that
    memory can't hold `pread` serves all but scattered rows."""
    chunks: int
    """Chunks that were asked for. Many more than the dataset has: see `plan().read_amplification`."""
    bytes_read: int
    """Encoded bytes fetched; those of a memory map count as if each chunk were read whole."""
    read_seconds: float
    """Time of all threads in reading. The largest of the four: storage is the bottleneck. (What is elsewhere is fetched
    ahead of them, and counts in `fetch`.)"""
    decode_seconds: float
    """In decompressing. The largest: cores are; more threads, or a faster codec, would help."""
    gather_seconds: float
    """In copying rows to their places; for memory maps the reading happens here."""
    transform_seconds: float
    """In the transform; of async ones and processes with their waiting. The largest: make it cheaper, or
    `transform_workers` more."""
    queue: QueueStatistics | None
    """What is ready; its `wait_seconds` is how long the consumer waited for data."""
    budget: BudgetStatistics
    cache: CacheStatistics | None
    """Decoded chunks kept for other cells, epochs and streams of the budget; None where none are."""
    fetch: FetchStatistics | None
    """Requests to a store that is elsewhere; None for a folder."""
    finished: FinishedStatistics | None
    """Batches kept after the transform; None where none are."""
    disk_cache: DiskCacheStatistics | None
    """Decoded chunks on the disk; None without `disk_cache`."""
    threads: int
    buffers: int
    """Buffers in use. All of them while `queue.items` is 0: batches are kept by the consumer."""
    buffer_bytes: int
    chunks_checked: int
    """Chunks whose bytes were held against a manifest. 0: there is none, or all were checked in a pass before."""
    chunks_skipped: int
    """Chunks that could not be used; see the warnings for which, and why."""
    rows_skipped: int
    """Samples left out for them. Samples handed over and these make up the epoch (a transform's filter apart)."""


def lane_of(array: OpenArray) -> str:
    """Which lane reads an array, and why no faster one."""
    return array.reader.lane + (f" ({array.fallback})" if array.fallback is not None else "")
