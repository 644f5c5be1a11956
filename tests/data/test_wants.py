"""What dry runs promise: they name the reads that are made for rows, and put nothing together."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore

from streamtrain.data import wants
from streamtrain.data.feed import Box
from streamtrain.data.reading import Scratch
from streamtrain.data.remote import RemoteReader
from streamtrain.data.stream import ZarrStream
from streamtrain.data.wants import reads_of
from tests.data.sparse import random_sparse, write_arrays, write_sparse

N = 60
ORDERS: dict[str, dict[str, Any]] = {
    "plain": {"inputs": "x"},
    "changed": {"inputs": "x", "normalize": {"x": (1.0, 2.0)}},
    "windows": {"inputs": "x", "window": {0: 5}},
    "crops": {"inputs": "x", "crop": {1: 4, 2: 3}},
    "sparse": {"inputs": "X"},
    "ragged": {"inputs": "values", "ragged": {"values": "offsets"}, "max_length": 9},
    "ragged, changed": {"inputs": "values", "ragged": {"values": "offsets"}, "normalize": {"values": (1.0, 2.0)}},
    "masked": {"inputs": "age"},
}


class Nothing(Scratch):
    """Gives no memory."""

    def take(self, name: str, size: int) -> Any:
        raise AssertionError(f"{size} bytes for {name}")


@pytest.fixture(scope="module")
def far() -> MemoryStore:
    """A store elsewhere."""
    root, matrix = zarr.open_group(store := MemoryStore(), mode="w"), random_sparse(N, 8, 5)
    root.create_array("x", data=np.arange(N * 120, dtype=np.float32).reshape(N, 12, 10), chunks=(7, 5, 4))
    write_sparse(root, "X", matrix, 16)
    elements = np.arange(int(matrix.indptr[-1]) * 6, dtype=np.float32).reshape(-1, 6)
    root.create_array("values", data=elements, chunks=(16, 4))
    write_arrays(root, {"offsets": matrix.indptr}, 16)
    age = root.create_group("age")
    age.attrs["encoding-type"] = "nullable-integer"
    write_arrays(age, {"values": np.arange(N), "mask": np.zeros(N, dtype=bool)}, 10)
    return store


@pytest.mark.parametrize("rows", [slice(20, 31), np.array([3, 40, 41])], ids=["run", "scattered"])
@pytest.mark.parametrize("name", ORDERS)
async def test_a_dry_run_names_what_is_read_and_takes_no_memory(
    far: MemoryStore, name: str, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, tuple[int, ...], tuple[int, int], bool]] = []

    def note(self: RemoteReader, chunk: Any, rows: tuple[int, int], scratch: Scratch, *, few: bool = False) -> None:
        read.append((self.layout.name, tuple(chunk), rows, few))

    async with ZarrStream(far, batch_size=8, output="numpy", cache=0, **ORDERS[name]) as made:
        await made.open()
        feed = made._known().feeds[0][0]  # white box: what a pass hands to the threads
        box = Box((0,), (N - 4,))
        with monkeypatch.context() as patch:
            patch.setattr(wants, "Scratch", Nothing)
            planned = [(each.layout.name, *noted) for each, noted in reads_of(feed, box, rows)]
        monkeypatch.setattr(RemoteReader, "read", note)
        await asyncio.to_thread(feed.fill, box, rows, lambda *_: None, Scratch())
    assert sorted(planned) == sorted(read) != []
