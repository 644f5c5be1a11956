"""What streams of sparse rows promise: the dense rows that numpy makes of them, in the order of any other stream."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from streamtrain.data import ragged_site, survey
from streamtrain.data.block import Block, block_bytes
from streamtrain.data.feed import Box
from streamtrain.data.ragged import LONG, Area, Piece, RaggedColumn, Run
from streamtrain.data.stream import ZarrStream
from streamtrain.data.wants import wants_of
from streamtrain.errors import ConfigError, DataError
from tests.data.sparse import Sparse, random_sparse, sparse_store, write_arrays, write_sparse

WIDTH = 40
MATRIX = random_sparse(203, WIDTH, 12)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of a few rows, and blocks that are filled one by one, as large data have them."""
    monkeypatch.setattr(ragged_site, "CELL_BYTES", 0)
    monkeypatch.setattr(ragged_site, "SPANS", 2)
    monkeypatch.setattr(survey, "UNIT_BYTES", 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_store(tmp_path_factory.mktemp("sparse") / "s.zarr", MATRIX)


def stream(path: Path, **options: Any) -> ZarrStream:
    given: dict[str, Any] = {"inputs": "X", "targets": "y", "batch_size": 16, "memory": "16MiB", "output": "numpy"}
    return ZarrStream(path, **{**given, **options})


def epoch(made: ZarrStream, most: int | None = None) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Copies of the batches' inputs and sample numbers."""

    async def read() -> list[tuple[NDArray[Any], NDArray[Any]]]:
        found = []
        async with made:
            async for batch in made:
                found.append((batch.inputs.copy(), batch.index.copy()))
                if len(found) == most:
                    break
        return found

    return asyncio.run(read())


def rows_of(batches: list[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.concatenate([x for x, _ in batches]), np.concatenate([i for _, i in batches])


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 2 * LONG), min_size=1, max_size=40),
    batch=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 99),
)
def test_a_block_lays_out_what_was_put_whatever_the_order(
    lengths: list[int], batch: int, cuts: list[int], seed: int
) -> None:
    rng, rows, width = np.random.default_rng(seed), len(lengths), 2 * LONG
    sizes = np.array(lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    columns = np.concatenate([rng.permutation(width)[:n] for n in lengths]).astype(np.int64)
    values = rng.random(len(columns)).astype(np.float32)
    f4 = np.dtype(np.float32)
    column = RaggedColumn("X", (width,), f4, batch, (Piece(f4), Piece(np.dtype(np.int32))), int(starts[-1]))
    slots = -(-rows // batch)
    block = Block(np.full(block_bytes([column], slots), 255, dtype=np.uint8), [column], 7, slots)
    place = rng.permutation(rows)
    by_place = np.empty(rows, dtype=np.int64)
    by_place[place] = sizes
    none = np.zeros(rows, dtype=np.int64)
    for first, last in itertools.pairwise(sorted({0, rows, *(cut for cut in cuts if cut < rows)})):
        block.lay(0, 7 + first, by_place[first:last])
    for some in np.array_split(rng.permutation(rows), 3):
        block.put(0, place[some] + 7, Run({0: values, 1: columns}, starts[some], sizes[some], none[some]))
    expected = np.zeros((rows, width), dtype=np.float32)
    expected[np.repeat(place, sizes), columns] = values
    room = np.empty(column.batch_bytes, dtype=np.uint8)
    for slot in range(slots):
        count = min(batch, rows - slot * batch)
        [laid] = block.batch(slot, count, room)
        assert np.array_equal(laid, expected[slot * batch : slot * batch + count])


ORDERS: list[dict[str, Any]] = [
    {},
    {"shuffle": True, "shuffle_blocks": 2},
    {"shuffle": "global"},
    {"shuffle": True, "split": (0.1, 0.7)},
    {"shuffle": True, "split": (0.2, 0.9), "split_by": "sample"},
    {"shuffle": True, "indices": [3, 5, 7, 100, 99, 202, 0]},
    {"shuffle": True, "weights": np.arange(203.0)},
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(map(str, order)) or "plain")
def test_rows_are_those_of_the_dense_matrix_whatever_reads_them(store: Path, order: dict[str, Any]) -> None:
    first, numbers = rows_of(epoch(stream(store, **order)))
    assert np.array_equal(first, MATRIX.dense[numbers])
    others: list[dict[str, Any]] = [
        {"threads": 1, "batch_size": 7, "cache": 0, "io": "pread"},
        {"threads": 3, "prefetch": 1, "batch_size": 203, "io": "store"},
    ]
    for other in others:
        again, same = rows_of(epoch(stream(store, **order, **other)))
        assert np.array_equal(same, numbers)
        assert np.array_equal(again, first)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 60),
    most=st.integers(0, 30),
    chunk=st.integers(1, 90),
    batch=st.integers(1, 70),
    packed=st.booleans(),
    v2=st.booleans(),
    shuffle=st.sampled_from([False, "block", "global"]),
    seed=st.integers(0, 99),
)
def test_any_sparse_store_gives_its_dense_rows(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    most: int,
    chunk: int,
    batch: int,
    packed: bool,
    v2: bool,
    shuffle: Any,
    seed: int,
) -> None:
    matrix = random_sparse(rows, 30, most, seed, "int16")
    options: dict[str, Any] = {"zarr_format": 2} if v2 else {}
    if not packed:
        options["compressors"] = None
    path = sparse_store(tmp_path_factory.mktemp("any") / "s.zarr", matrix, chunk, **options)
    found, numbers = rows_of(epoch(stream(path, batch_size=batch, shuffle=shuffle, shuffle_blocks=1)))
    assert sorted(numbers) == list(range(rows))
    assert found.dtype == np.int16
    assert np.array_equal(found, matrix.dense[numbers])


@pytest.mark.parametrize("taken", [0, 1, 5, 12, 13])
def test_a_stream_goes_on_where_another_stopped(store: Path, taken: int) -> None:
    order: dict[str, Any] = {"shuffle": True, "shuffle_blocks": 1}
    whole = np.concatenate([i for _, i in epoch(stream(store, **order))])
    first = stream(store, **order)
    begun = epoch(first, taken) if taken else []
    rest = stream(store, **order, batch_size=9)
    rest.load_state_dict(first.state_dict())
    found, numbers = rows_of([*begun, *epoch(rest)])
    assert np.array_equal(numbers, whole)
    assert np.array_equal(found, MATRIX.dense[numbers])


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("batch", [16, 17])
def test_ranks_together_have_each_batch(store: Path, lanes: int, batch: int) -> None:
    options: dict[str, Any] = {"shuffle": True, "shuffle_blocks": 2, "lanes": lanes, "batch_size": batch}
    alone = epoch(stream(store, **options))
    ranks = [epoch(stream(store, **options, rank=rank, world_size=3)) for rank in range(3)]
    for number, (_, index) in enumerate(alone):
        parts = [batches[number] for batches in ranks]
        assert sorted(index) == sorted(np.concatenate([i for _, i in parts]))
        assert all(np.array_equal(x, MATRIX.dense[i]) for x, i in parts)


def test_many_stores_are_one_dataset(tmp_path: Path) -> None:
    parts = [random_sparse(rows, WIDTH, 9, seed=rows) for rows in (31, 5, 77)]
    paths = [sparse_store(tmp_path / f"{n}.zarr", part) for n, part in enumerate(parts)]
    dense = np.concatenate([part.dense for part in parts])
    found, numbers = rows_of(epoch(ZarrStream(paths, inputs="X", batch_size=8, shuffle=True, output="numpy")))
    assert sorted(numbers) == list(range(113))
    assert np.array_equal(found, dense[numbers])


def test_a_transform_and_a_cast_get_dense_rows(store: Path) -> None:
    def double(batch: Any) -> Any:
        assert batch.inputs.dtype == np.float64
        batch.inputs *= 2
        return batch

    found, numbers = rows_of(epoch(stream(store, shuffle=True, dtype="float64", transform=double)))
    assert np.array_equal(found, 2.0 * MATRIX.dense[numbers])


def test_batches_are_private_aligned_and_stay_valid(store: Path) -> None:
    async def read() -> list[Any]:
        return [batch async for batch in stream(store, shuffle=True, batch_size=10)]

    kept = asyncio.run(read())
    for batch in kept:
        assert batch.inputs.ctypes.data % 64 == 0
        assert np.array_equal(batch.inputs, MATRIX.dense[batch.index])
        batch.inputs[:] = -1


@pytest.mark.parametrize("prefetch", [None, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_budget_holds_blocks_batches_and_offsets(tmp_path: Path, prefetch: int | None, weighted: bool) -> None:
    matrix = random_sparse(4000, 500, 60)
    path = sparse_store(tmp_path / "s.zarr", matrix, 1000)
    options: dict[str, Any] = {"shuffle": True, "shuffle_blocks": 1, "batch_size": 50, "threads": 2}
    options |= {"prefetch": prefetch, "weights": np.arange(4000.0) ** 4 if weighted else None}
    least = stream(path, **options).plan().memory_least
    for memory in (least, 3 * least):
        made = stream(path, **options, memory=memory)
        found, numbers = rows_of(epoch(made))
        assert np.array_equal(found, matrix.dense[numbers])
        assert made.budget.statistics().peak <= memory
        assert made.budget.statistics().used == 0
    with pytest.raises(ConfigError, match="is too small"):
        epoch(stream(path, **options, memory=least - 1))


def test_who_keeps_all_batches_is_told_so_and_can_go_on(tmp_path: Path) -> None:
    path = sparse_store(tmp_path / "s.zarr", random_sparse(2000, 500, 60), 1000)
    options: dict[str, Any] = {"shuffle": True, "shuffle_blocks": 1, "batch_size": 50}
    made = stream(path, **options, memory=stream(path, **options).plan().memory_least)

    async def keep() -> int:
        kept: list[Any] = []
        numbers: list[int] = []
        batches = aiter(made)
        held = 0
        while True:
            try:
                kept.append(await anext(batches))
                numbers += kept[-1].index.tolist()
            except StopAsyncIteration:
                break
            except Exception as error:
                assert "you hold batches" in str(error)  # noqa: PT017
                held += 1
                kept.clear()
        await made.aclose()
        assert sorted(numbers) == list(range(2000))
        return held

    assert asyncio.run(keep()) > 0


@pytest.mark.parametrize("shuffle", [False, "global"])
@pytest.mark.parametrize("chunk", [64, 1, 3])
def test_repeated_columns_are_added_up_and_unsorted_ones_find_their_place(
    tmp_path: Path, chunk: int, shuffle: Any
) -> None:
    matrix = Sparse(np.array([1, 2, 4, 8, 16], dtype=np.float32), np.array([3, 3, 1, 9, 0]), np.array([0, 2, 2, 5]), 10)
    path = sparse_store(tmp_path / "s.zarr", matrix, chunk)
    found, numbers = rows_of(epoch(stream(path, shuffle=shuffle)))
    assert np.array_equal(found, matrix.dense[numbers])
    assert found[numbers.tolist().index(0), 3] == 3


def test_a_batch_that_reaches_into_the_next_block_has_room_there(tmp_path: Path) -> None:
    """Rows of one length in whole cells: a block is as full as one can be."""
    indptr = np.arange(0, 1601, 8)
    matrix = Sparse(np.ones(1600, dtype=np.float32), np.tile(np.arange(8), 200), indptr, 9)
    path = sparse_store(tmp_path / "s.zarr", matrix, 80, compressors=None)
    made = stream(path, shuffle=True, shuffle_blocks=1, batch_size=17)
    assert made.plan().cells == 20
    found, numbers = rows_of(epoch(made))
    assert sorted(numbers) == list(range(200))
    assert np.array_equal(found, matrix.dense[numbers])


@pytest.mark.parametrize("shuffle", [False, "global"])
@pytest.mark.parametrize("wrong", [WIDTH, -1])
def test_a_column_that_is_none_is_named_with_its_row_and_chunk(tmp_path: Path, shuffle: Any, wrong: int) -> None:
    indices = MATRIX.indices.copy()
    indices[700] = wrong
    path = sparse_store(tmp_path / "s.zarr", Sparse(MATRIX.data, indices, MATRIX.indptr, WIDTH))
    row = int(np.searchsorted(MATRIX.indptr, 700, side="right")) - 1
    with pytest.raises(DataError, match=rf"'X/indices': row {row} names column {wrong}, in chunk 10; .* 0 to 39"):
        epoch(stream(path, shuffle=shuffle))


def _with_offset(place: int, value: int) -> NDArray[np.int64]:
    offsets = MATRIX.indptr.copy()
    offsets[place] = value
    return offsets


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        (_with_offset(100, 0), "'X/indptr': chunk 1: row 99 would end at element 0, before its first"),
        (_with_offset(0, -1), "'X/indptr': chunk 0: row 0 would begin at element -1"),
        (_with_offset(203, 10**9), "'X/indptr': chunk 3: row 202 would end at element 1000000000, and there are"),
        (MATRIX.indptr[:-1], r"'X/indptr' has shape \(203,\); for 203 rows there must be 204"),
        (MATRIX.indptr.astype(np.float64), "must hold whole numbers along one axis; it is float64"),
    ],
)
def test_offsets_that_can_not_be_are_refused_before_any_row(tmp_path: Path, offsets: Any, said: str) -> None:
    path = sparse_store(tmp_path / "s.zarr", MATRIX)
    group = zarr.open_group(path, mode="r+")["X"]
    assert isinstance(group, zarr.Group)
    del group["indptr"]
    write_arrays(group, {"indptr": offsets}, 64)
    with pytest.raises(DataError, match=said):
        epoch(stream(path))


def test_bad_chunks_cost_their_rows_alone(tmp_path: Path) -> None:
    path = sparse_store(tmp_path / "s.zarr", MATRIX)
    lost: set[int] = set()
    for name, chunk in (("data", 3), ("indices", 8)):
        (path / "X" / name / "c" / str(chunk)).write_bytes(b"no chunk")
        low, high = chunk * 64, (chunk + 1) * 64
        lost |= {
            row
            for row, (a, b) in enumerate(itertools.pairwise(MATRIX.indptr.tolist()))
            if a < high and b > low and b > a
        }
    for shuffle in (False, True, "global"):
        made = stream(path, shuffle=shuffle, on_bad_chunk="skip", max_skipped=0.5)
        found, numbers = rows_of(epoch(made))
        assert set(range(203)) - set(numbers.tolist()) == lost
        assert np.array_equal(found, MATRIX.dense[numbers])
        assert made.statistics().rows_skipped == len(lost)
    with pytest.raises(DataError, match="X/data"):
        epoch(stream(path))


def test_layers_come_beside_each_other_as_a_dict(tmp_path: Path) -> None:
    other = random_sparse(203, 7, 5, seed=4, dtype="float64")
    path = sparse_store(tmp_path / "s.zarr", MATRIX)
    write_sparse(zarr.open_group(path, mode="r+"), "layers/counts", other)

    async def read() -> None:
        made = stream(path, inputs=["X", "layers/counts"], shuffle=True)
        async for batch in made:
            assert np.array_equal(batch.inputs["X"], MATRIX.dense[batch.index])
            assert np.array_equal(batch.inputs["layers/counts"], other.dense[batch.index])

    asyncio.run(read())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 3}, "'X' has rows of different lengths: its samples are those rows"),
        ({"sample_axes": (0, 1)}, "'X' has rows of different lengths"),
        ({"normalize": {"X": (0.0, 2.0)}}, "of the sparse array 'X' would make a number of each of its zeros"),
        ({"stack": True}, "rows of 'X' have different lengths"),
    ],
)
def test_what_can_not_be_done_to_sparse_rows_is_said(store: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        epoch(stream(store, targets=None, **options))


def test_other_elements_are_another_dataset(tmp_path: Path, store: Path) -> None:
    state = stream(store).state_dict()
    other = stream(sparse_store(tmp_path / "s.zarr", random_sparse(203, WIDTH, 13)))
    with pytest.raises(DataError, match="the dataset changed"):
        other.load_state_dict(state)


def test_a_store_elsewhere_gives_the_same_rows_fetched_ahead(store: Path) -> None:
    far = MemoryStore()
    root = zarr.open_group(far, mode="w")
    write_sparse(root, "X", MATRIX)
    write_arrays(root, {"y": np.arange(203)}, 50)
    order: dict[str, Any] = {"shuffle": True, "shuffle_blocks": 1}
    made = ZarrStream(far, inputs="X", targets="y", batch_size=16, output="numpy", **order)
    near, numbers = rows_of(epoch(stream(store, **order)))
    found, same = rows_of(epoch(made))
    assert np.array_equal(same, numbers)
    assert np.array_equal(found, near)
    fetch = made.statistics().fetch
    assert fetch is not None
    assert fetch.requests > 0


@pytest.mark.parametrize("rows", [slice(20, 31), np.array([3, 90, 91])])
def test_what_is_fetched_ahead_is_what_the_rows_lie_in(rows: Any) -> None:
    far = MemoryStore()
    write_sparse(zarr.open_group(far, mode="w"), "X", MATRIX)
    made = ZarrStream(far, inputs="X", batch_size=16, output="numpy")
    made.open_blocking()
    opened = made._known()  # white box: what a pass hands to the threads
    numbers = np.arange(203)[rows]
    wanted = wants_of(opened.feeds[0][0], Box((0,), (203,)), rows)
    chunks = {place // 64 for row in numbers for place in range(MATRIX.indptr[row], MATRIX.indptr[row + 1])}
    assert sorted((want.reader.layout.name, *want.chunk) for want in wanted) == sorted(
        (name, chunk) for name in ("X/data", "X/indices") for chunk in chunks
    )
    asyncio.run(made.aclose())


def test_an_unshuffled_epoch_comes_again_from_what_is_kept(store: Path) -> None:
    made = stream(store)

    async def read() -> list[list[NDArray[Any]]]:
        return [[batch.inputs async for batch in made] for _ in range(2)]

    first, second = asyncio.run(read())
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert np.array_equal(np.concatenate(first), MATRIX.dense)


def dense_of(rows: Any) -> NDArray[Any]:
    """Sparse rows of a batch as numpy writes them out; none of their columns comes twice."""
    data, indices, indptr, shape = rows
    out = np.zeros(shape, dtype=data.dtype)
    places = np.repeat(np.arange(shape[0]), np.diff(indptr)), indices
    assert len(set(zip(*(place.tolist() for place in places), strict=True))) == len(data)
    out[places] = data
    return out


@pytest.mark.parametrize("shuffle", [False, True, "global"])
def test_sparse_rows_come_as_they_are_where_that_is_wished(store: Path, shuffle: Any) -> None:
    async def read(made: ZarrStream) -> None:
        async for batch in made:
            assert batch.inputs.shape == (len(batch.index), WIDTH)
            assert np.array_equal(dense_of(batch.inputs), MATRIX.dense[batch.index])
            batch.inputs.data[:] = 0

    asyncio.run(read(stream(store, sparse=True, shuffle=shuffle)))


def test_sparse_rows_of_bad_chunks_are_left_out_and_repeated_columns_added_up(tmp_path: Path) -> None:
    matrix = Sparse(MATRIX.data, MATRIX.indices // 2, MATRIX.indptr, WIDTH)
    path = sparse_store(tmp_path / "s.zarr", matrix)
    (path / "X" / "data" / "c" / "3").write_bytes(b"no chunk")

    async def read() -> int:
        rows = 0
        async for batch in stream(path, sparse=True, shuffle=True, on_bad_chunk="skip", max_skipped=0.5):
            assert np.array_equal(dense_of(batch.inputs), matrix.dense[batch.index])
            rows += len(batch.index)
        return rows

    assert 150 < asyncio.run(read()) < 203


def test_sparse_rows_are_torchs_sparse_tensors(store: Path) -> None:
    torch = pytest.importorskip("torch")

    async def read(made: ZarrStream) -> int:
        count = 0
        async for batch in made:
            assert batch.inputs.layout == torch.sparse_csr
            assert np.array_equal(batch.inputs.to_dense().numpy(), MATRIX.dense[batch.index.numpy()])
            assert batch.inputs.matmul(torch.ones(WIDTH, 1)).shape == (len(batch.index), 1)
            count += len(batch.index)
        return count

    for shuffle in (True, False):
        made = stream(store, sparse=True, shuffle=shuffle, output="torch")
        assert [asyncio.run(read(made)) for _ in range(2)] == [203, 203]
    given: dict[str, Any] = {"sparse": True, "output": "torch", "inputs": ["X"]}
    tree = stream(store, **given, transform=lambda batch: (batch.inputs["X"], batch.targets))
    assert asyncio.run(read(tree)) == 203


def test_an_array_without_any_axis_stands_beside_every_row(tmp_path: Path) -> None:
    path = sparse_store(tmp_path, random_sparse(50, 9, 5))
    zarr.open_group(path).create_array("scale", data=np.array(2.5))

    async def read() -> list[Any]:
        async with stream(path, inputs=["X", "scale"]) as source:
            return [batch.inputs["scale"] async for batch in source]

    found = np.concatenate(asyncio.run(read()))
    assert found.shape == (50,)
    assert (found == 2.5).all()


@pytest.mark.parametrize("axis", [1, 2, "genes"])
def test_that_columns_of_sparse_rows_can_not_be_selected_is_said(store: Path, axis: Any) -> None:
    for inputs in ("X", ["y", "X"]):
        with pytest.raises(ConfigError, match=f"axis {axis!r}: columns of the sparse rows of 'X' can't be selected"):
            stream(store, inputs=inputs, select={axis: [0, 2]}).plan()


def test_sparse_rows_are_refused_where_nobody_could_take_them(store: Path) -> None:
    with pytest.raises(ConfigError, match="processes get no sparse rows"):
        stream(store, sparse=True, transform=len, transform_workers="process:1")
    with pytest.raises(ConfigError, match="batches of sparse rows are not kept"):
        stream(store, sparse=True, cache_transform=True)
    with pytest.raises(ConfigError, match="no array of the stream is sparse"):
        epoch(stream(store, inputs="y", sparse=True))


@pytest.mark.parametrize("shuffle", [False, "block", "global"])
def test_rows_that_name_no_column_twice_are_not_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: Any
) -> None:
    """To add up takes three times as long, makes 0.0 of -0.0, and copies what may be a view."""
    marked: list[bool] = []
    puts = Area.put

    def noted(self: Area, places: Any, rows: Run) -> None:
        marked.append(rows.repeated)
        puts(self, places, rows)

    monkeypatch.setattr(Area, "put", noted)
    path = sparse_store(tmp_path / "s.zarr", random_sparse(203, WIDTH, WIDTH), chunk=300)
    monkeypatch.setattr(ragged_site, "CELL_BYTES", 4096)
    epoch(stream(path, shuffle=shuffle))
    assert marked
    assert not any(marked)
